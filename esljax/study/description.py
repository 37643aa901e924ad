"""A study: many training runs that differ in some fields of `RunConfig`.

The runs form a grid or a list of points. This file holds the description alone, from Python or from
a TOML file; `run_study` runs it and `open_study` reads the results.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from esljax._checks import InputError, check_choice, check_positive_int, refuse
from esljax._checks import size as in_bytes
from esljax.experiment import NUMBERS, RunConfig, convert, converted, read_toml, shape_of

# A list of more runs than these would fill the memory of a usual machine by itself.
_MOST = 10_000_000
# Whole numbers in a row are held by their ends from this length on.
_LONG = 10_000
# A dozen numbers and marks of a run.
_BYTES = 112

_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


class Slice(NamedTuple):
    """Runs of one shape that share a compiled program."""

    indices: np.ndarray
    """Their indices in the study, shape (runs,), at most `length` of them."""
    length: int
    """The number of runs that their program is compiled for."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that share the settings `base` and differ on a grid, or point by point.

    **Args:**
    - `base`: the settings that all runs share.
    - `grid`: fields of `RunConfig` and the values of each. The runs are all combinations, and the
      fields are the dimensions of the result.
    - `points`: instead of a grid, one mapping of fields to values for each run, no two the same.
      The result has the single dimension `point`.

    **Raises:** `InputError` for an unknown field, a value of the wrong type, a field without values
    or with the same value twice, settings that cannot run, more than 10,000,000 runs, and for both
    or neither of `grid` and `points`.

    **Example:**

        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,))
        >>> study = esl.study.Study(base, grid={"rate": [0.1, 0.2, 0.4], "seed": range(10)})
        >>> study.size, study.dimensions
        (30, {'rate': 3, 'seed': 10})
        >>> study.point(11).rate, study.point(11).seed
        (0.2, 1)
    """

    base: RunConfig = dataclasses.field(default_factory=RunConfig)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()

    POINT: ClassVar[str] = "point"

    def __post_init__(self):
        self._check_types()
        _check_size(self.grid, len(self.points))
        grid = {name: _axis(name, values) for name, values in self.grid.items()}
        points = tuple(_point(i, point) for i, point in enumerate(self.points))
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "points", points)
        if points:
            self._check_points()
        else:
            self._check_grid()

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimensions of the result and their lengths."""
        if self.points:
            return {self.POINT: len(self.points)}
        return {name: len(values) for name, values in self.grid.items()}

    @property
    def size(self) -> int:
        """The number of runs."""
        return math.prod(self.dimensions.values())

    @property
    def coordinates(self) -> dict[str, tuple[str, tuple]]:
        """The fields that vary: the dimension that each lies along, and its values there."""
        if not self.points:
            return {name: (name, values) for name, values in self.grid.items()}
        varying = [name for name in _FIELDS if any(name in point for point in self.points)]
        return {
            name: (
                self.POINT,
                tuple(point.get(name, getattr(self.base, name)) for point in self.points),
            )
            for name in varying
        }

    @property
    def has_errors(self) -> bool:
        """Whether some run has standard errors of its own, by the jackknife over its members."""
        _, counts = self.coordinates.get("jackknife", ("", (self.base.jackknife,)))
        return any(count > 0 for count in counts)

    def point(self, index: int) -> RunConfig:
        """The settings of one run; indices count along the last dimension first."""
        if self.points:
            return dataclasses.replace(self.base, **self.points[index])
        places = np.unravel_index(index, tuple(self.dimensions.values()))
        return dataclasses.replace(
            self.base,
            **{name: self.grid[name][int(i)] for name, i in zip(self.grid, places, strict=True)},
        )

    def chunks(self, task_size: int) -> tuple[int, ...]:
        """The block of the result that one task fills, as a length along each dimension.

        A block holds at most `task_size` runs of one shape, and is whole along the last fields
        first.
        """
        check_positive_int("task_size", task_size)
        if self.points:
            return (min(task_size, len(self.points)),)
        block, room = [], task_size
        for name in reversed(list(self.grid)):
            length = min(len(self.grid[name]), room) if name in NUMBERS else 1
            block.append(length)
            # Where a block is not whole along this field, no room is left along the next.
            room //= length
        return tuple(reversed(block))

    def slices(self, task_size: int) -> list[Slice]:
        """The runs of the study in groups, each for one call of a compiled program."""
        return self._slices_of_points(task_size) if self.points else self._slices_of_grid(task_size)

    def _slices_of_points(self, task_size: int) -> list[Slice]:
        groups: dict[RunConfig, list[int]] = {}
        for i in range(len(self.points)):
            groups.setdefault(shape_of(self.point(i)), []).append(i)
        return [
            Slice(np.array(indices[i : i + task_size]), min(len(indices), task_size))
            for indices in groups.values()
            for i in range(0, len(indices), task_size)
        ]

    def _slices_of_grid(self, task_size: int) -> list[Slice]:
        shape, block = tuple(self.dimensions.values()), self.chunks(task_size)
        starts = itertools.product(
            *(range(0, length, step) for length, step in zip(shape, block, strict=True))
        )
        blocks = (
            [
                range(i, min(i + step, length))
                for i, step, length in zip(start, block, shape, strict=True)
            ]
            for start in starts
        )
        return [
            Slice(np.ravel_multi_index(np.ix_(*places), shape).reshape(-1), math.prod(block))
            for places in blocks
        ]

    def as_dict(self) -> dict[str, Any]:
        """The study in the types of TOML and JSON; `from_dict` reads it back."""
        content: dict[str, Any] = {"base": self.base.as_dict()}
        if self.points:
            points = [
                dict(zip(point, _lists(point.values()), strict=True)) for point in self.points
            ]
            return content | {"points": points}
        return content | {
            "grid": {
                name: {"range": [values.start, values.stop]}
                if isinstance(values, range)
                else _lists(values)
                for name, values in self.grid.items()
            }
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], place: str = "the study") -> "Study":
        """Make a study from a table with the keys `base`, and `grid` or `points`.

        A field of the grid has a list of values; or `{range = [first, end]}`, as in Python; or
        `{start = 0.05, stop = 0.8, num = 5, scale = "log"}`, with both ends included.

        **Args:** `content`: the table. `place`: the source of the table, for messages.
        **Raises:** `InputError` as the class does, and for unknown keys.

        **Example:**

            >>> import esljax as esl
            >>> rates = {"start": 0.1, "stop": 0.4, "num": 3, "scale": "log"}
            >>> esl.study.Study.from_dict({"grid": {"rate": rates}}).grid
            {'rate': (0.1, 0.2, 0.4)}
        """
        for key in content:
            if key not in ("base", "grid", "points"):
                raise InputError(
                    f"Key `{key}` of {place} is unknown; the known keys are base, grid, points."
                )
        for key, kind, phrase in (
            ("base", Mapping, "a table"),
            ("grid", Mapping, "a table"),
            ("points", list, "a list of tables"),
        ):
            if key in content and not isinstance(content[key], kind):
                raise refuse(key, f"be {phrase} in {place}", f"is {content[key]!r}")
        base = RunConfig(**converted(content.get("base", {}), _FIELDS, f"[base] of {place}"))
        grid = {name: _values(name, given) for name, given in content.get("grid", {}).items()}
        return cls(base, grid, content.get("points", ()))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Study":
        """Make a study from a TOML file, laid out as `from_dict` describes.

        **Raises:** `InputError` if the file cannot be read or its content is wrong.
        """
        return cls.from_dict(read_toml(Path(path)), str(path))

    def difference(self, other: "Study") -> str | None:
        """Describe the first field in which another study differs; None if they are the same.

        **Returns:** a phrase such as "grid.rate, [0.1] there and [0.1, 0.2] here".
        """
        ours, theirs = _flat(self.as_dict()), _flat(other.as_dict())
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(name) != theirs.get(name):
                return f"{name}, {_brief(theirs.get(name))} there and {_brief(ours.get(name))} here"
        if self.grid and list(self.grid) != list(other.grid):
            order, other_order = ", ".join(self.grid), ", ".join(other.grid)
            return f"the order of its dimensions, {other_order} there and {order} here"
        return None

    def _check_types(self) -> None:
        if not isinstance(self.base, RunConfig):
            raise refuse("base", "be a RunConfig", f"is {self.base!r}")
        if not isinstance(self.grid, Mapping):
            raise refuse("grid", "be a table of fields and their values", f"is {self.grid!r}")
        if isinstance(self.points, str | Mapping) or not isinstance(self.points, Sequence):
            raise refuse("points", "be a list of tables", f"is {self.points!r}")
        if bool(self.grid) == bool(len(self.points)):
            raise refuse(
                "grid",
                "name a field and its values, unless `points` lists the runs one by one",
                "both are given" if self.grid else "neither is given",
            )

    def _check_points(self) -> None:
        """Check each run, and that no two are the same."""
        seen: dict[RunConfig, int] = {}
        for i in range(len(self.points)):
            config = self.point(i)
            try:
                config.check()
            except InputError as error:
                raise InputError(f"In points[{i}]: {error}") from error
            if (first := seen.setdefault(config, i)) != i:
                # Means over the seeds would count it as two runs.
                raise refuse(
                    f"points[{i}]",
                    "be another run than those before it",
                    f"is the same as points[{first}]",
                )

    def _check_grid(self) -> None:
        """Check every number once, and whole numbers by their ends, because only the steps and the
        snapshots interact."""
        numbers = {name: values for name, values in self.grid.items() if name in NUMBERS}
        shapes = {name: values for name, values in self.grid.items() if name not in NUMBERS}
        first = {name: values[0] for name, values in self.grid.items()}
        self._check_links(shapes, first)
        some = (
            values if isinstance(values[0], str | tuple) else _ends(values)
            for values in shapes.values()
        )
        for combination in itertools.product(*some):
            settings = first | dict(zip(shapes, combination, strict=True))
            dataclasses.replace(self.base, **settings).check()
        for name, values in numbers.items():
            # Every bound is one of an interval, so the two ends check all values between them; what
            # is not finite is in no order.
            ends = values if isinstance(values[0], str) else _ends(values)
            for value in ends:
                dataclasses.replace(self.base, **first | {name: value}).check()

    def _check_links(self, shapes: dict[str, Any], first: dict[str, Any]) -> None:
        """Check that all numbers of snapshots divide all numbers of steps."""
        steps, snapshots = (
            shapes.get(name, (getattr(self.base, name),)) for name in ("steps", "snapshots")
        )
        for few in snapshots:
            left = np.asarray(steps, object) % few if few > 0 else np.zeros(1)
            if left.any():
                odd = {"steps": steps[int(np.flatnonzero(left)[0])], "snapshots": few}
                dataclasses.replace(self.base, **first | odd).check()


def _axis(name: str, values: Any) -> tuple | range:
    check_choice("grid", name, tuple(_FIELDS))
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence | np.ndarray):
        raise refuse(f"grid.{name}", "be a list of values", f"is {values!r}")
    if not _length(values):
        raise refuse(f"grid.{name}", "hold at least one value", "is empty")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, range):
        # The type of all is that of one, and no two are the same.
        _value(name, values[0], f"grid.{name}")
        if values.step == 1 and len(values) >= _LONG and type(_FIELDS[name].default) is int:
            return values
    kind = type(_FIELDS[name].default)
    if kind in (int, float) and set(map(type, values)) == {kind}:
        axis = tuple(values)
    else:
        axis = tuple(_value(name, value, f"grid.{name}") for value in values)
    if len(set(axis)) < len(axis):
        twice, _ = collections.Counter(axis).most_common(1)[0]
        raise refuse(f"grid.{name}", "hold each value once", f"holds {twice!r} twice")
    if len(axis) >= _LONG and type(axis[0]) is int and axis == tuple(range(axis[0], axis[-1] + 1)):
        return range(axis[0], axis[-1] + 1)
    return axis


def _ends(values: Sequence[Any]) -> list[Any]:
    """The least and the greatest value, or the first that is not finite."""
    if isinstance(values, range):
        return [min(values[0], values[-1]), max(values[0], values[-1])]
    strange = np.flatnonzero(~np.isfinite(np.asarray(values, float)))
    return [values[strange[0]]] if strange.size else [min(values), max(values)]


def _length(values: Sequence[Any] | np.ndarray) -> int:
    """The number of values, also of a range that is longer than `len` can say."""
    if isinstance(values, range):
        return max(0, -(-(values.stop - values.start) // values.step))
    return len(values)


def _check_size(grid: Mapping[str, Any], points: int) -> None:
    """Reject a study that is too large before anything is listed."""
    size = math.prod(
        _length(values) for values in grid.values() if isinstance(values, Sequence | np.ndarray)
    )
    if max(size, points) > _MOST:
        size = max(size, points)
        raise refuse(
            "points" if points else "grid",
            f"hold at most {_MOST:,} runs",
            f"holds {size:,}, whose results need about {in_bytes(_BYTES * size)}: split it into "
            "several studies",
        )


def _point(i: int, point: Any) -> dict[str, Any]:
    if not isinstance(point, Mapping) or not point:
        raise refuse(f"points[{i}]", "be a table of at least one field", f"is {point!r}")
    for name in point:
        check_choice(f"points[{i}]", name, tuple(_FIELDS))
    return {name: _value(name, value, f"points[{i}]") for name, value in point.items()}


def _value(name: str, value: Any, place: str) -> Any:
    """One value of a field, from Python, NumPy or TOML, in the type of the field."""
    if isinstance(value, tuple):
        value = [item.item() if isinstance(item, np.generic) else item for item in value]
    elif isinstance(value, np.generic):
        value = value.item()
    return convert(name, value, _FIELDS[name], place)


def _lists(values: Iterable[Any]) -> list:
    """The values with lists for tuples, as TOML has them."""
    return [list(value) if isinstance(value, tuple) else value for value in values]


def _values(name: str, given: Any) -> Any:
    """The values that a range or a spacing stands for; anything else unchanged."""
    if not isinstance(given, Mapping):
        return given
    place = f"grid.{name}"
    if set(given) == {"range"}:
        return _range(place, given["range"])
    if not {"start", "stop", "num"} <= set(given) <= {"start", "stop", "num", "scale"}:
        raise refuse(
            place,
            'be a list, {range = [first, end]} or {start, stop, num, scale = "linear" or "log"}',
            f"has the keys {', '.join(given)}",
        )
    whole = isinstance(_FIELDS[name].default if name in _FIELDS else 0.0, int)
    return [
        int(value) if whole and value.is_integer() else value for value in _spaced(place, given)
    ]


def _range(place: str, ends: Any) -> range:
    if (
        not isinstance(ends, list)
        or len(ends) != 2
        or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    ):
        raise refuse(place, "have a range of two integers, [first, end]", f"has {ends!r}")
    return range(*ends)


def _spaced(place: str, given: Mapping[str, Any]) -> list[float]:
    """`num` values from `start` to `stop`, evenly spaced on the chosen scale."""
    start, stop, num = (given[key] for key in ("start", "stop", "num"))
    scale = given.get("scale", "linear")
    for end in (start, stop):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise refuse(place, "have a finite number for start and for stop", f"has {end!r}")
    check_positive_int(f"{place}.num", num, 2)
    if num > _MOST:
        raise refuse(
            f"{place}.num", f"be at most {_MOST:,}, the most runs of a study", f"is {num:,}"
        )
    check_choice(f"{place}.scale", scale, ("linear", "log"))
    if scale == "log" and not (start > 0 and stop > 0):
        raise refuse(place, "have positive ends on a log scale", f"has {start!r} and {stop!r}")
    spaced = (np.geomspace if scale == "log" else np.linspace)(start, stop, num)
    # Twelve digits are more than any result has, and let a value be selected as it is written.
    if num < _LONG:
        return [float(f"{value:.12g}") for value in spaced]
    # The same by powers of ten, which are exact up to 22.
    powers = 11 - np.floor(np.log10(np.where(spaced == 0, 1, np.abs(spaced)))).clip(-11, 11)
    return (np.rint(spaced * 10.0**powers) / 10.0**powers).tolist()


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"base.{name}": value for name, value in content["base"].items()}
    flat |= {f"grid.{name}": value for name, value in content.get("grid", {}).items()}
    return flat | ({"points": content["points"]} if "points" in content else {})


def _brief(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    if len(text) <= 60:
        return text
    return f"{text[:40]}… ({len(value) if isinstance(value, list) else len(text)} values)"
