"""A study: many training runs that differ in some fields of `RunConfig`, on a grid or as a list of points.

The description alone, from Python or from a TOML file. `run_study` runs it and `open_study` reads what came out.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from esljax._checks import InputError, check_choice, check_positive_int, refuse
from esljax.experiment import NUMBERS, RunConfig, convert, converted, read_toml, shape_of

# A list of the runs alone would fill the memory of a usual machine.
_MOST = 10_000_000

_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


class Slice(NamedTuple):
    """Runs of one shape: their indices in the study, and the number of runs that their program is compiled for."""

    indices: np.ndarray
    length: int


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that share `base` and differ on a grid, or point by point.

    **Args:**
    - `base`: the settings that all runs share.
    - `grid`: fields of `RunConfig` and the values of each; the runs are all combinations, and the fields the dimensions of the result.
    - `points`: in place of a grid, one mapping of fields to values for each run, no two the same; the result has the one dimension `point`.

    **Raises:** `InputError` for an unknown field, a value of the wrong type, no values or the same value twice, a run that cannot be, and
    for both or neither of `grid` and `points`.

    **Example:**

        >>> study = Study(RunConfig(data="moons", hidden=(4,)), grid={"rate": [0.1, 0.2, 0.4], "seed": range(10)})
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
        if not isinstance(self.base, RunConfig):
            raise refuse("base", "be a RunConfig", f"is {self.base!r}")
        if not isinstance(self.grid, Mapping):
            raise refuse("grid", "be a table of fields and their values", f"is {self.grid!r}")
        if isinstance(self.points, str | Mapping) or not isinstance(self.points, Sequence):
            raise refuse("points", "be a list of tables", f"is {self.points!r}")
        if bool(self.grid) == bool(len(self.points)):
            which = "both are" if self.grid else "there is neither"
            raise refuse(
                "grid",
                "name a field and its values, or `points` list them run by run, one of the two",
                which,
            )
        _check_size(self.grid)
        grid = {name: _axis(name, values) for name, values in self.grid.items()}
        points = tuple(_point(i, point) for i, point in enumerate(self.points))
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "points", points)
        self._check_runs()

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimensions of the result and their lengths."""
        return (
            {self.POINT: len(self.points)}
            if self.points
            else {name: len(values) for name, values in self.grid.items()}
        )

    @property
    def size(self) -> int:
        """How many runs there are."""
        return math.prod(self.dimensions.values())

    @property
    def coordinates(self) -> dict[str, tuple[str, tuple]]:
        """The fields that vary: the dimension that each runs along, and its values there."""
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
        """Whether some run has standard errors of its own."""
        given = dict(self.coordinates)
        return any(
            value > 0
            for value in (given["jackknife"][1] if "jackknife" in given else (self.base.jackknife,))
        )

    def point(self, index: int) -> RunConfig:
        """The settings of one run, counted along the last dimension first."""
        if self.points:
            return dataclasses.replace(self.base, **self.points[index])
        places = np.unravel_index(index, tuple(self.dimensions.values()))
        return dataclasses.replace(
            self.base,
            **{name: self.grid[name][int(i)] for name, i in zip(self.grid, places, strict=True)},
        )

    def chunks(self, task_size: int) -> tuple[int, ...]:
        """The block of the result that one task fills: at most `task_size` runs of one shape, whole along the last fields first."""
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

    def slices(self, task_size: int) -> list["Slice"]:
        """The runs in the groups that go through one call of a compiled program."""
        if self.points:
            groups: dict[RunConfig, list[int]] = {}
            for i in range(len(self.points)):
                groups.setdefault(shape_of(self.point(i)), []).append(i)

            def cut(some):
                return [some[i : i + task_size] for i in range(0, len(some), task_size)]

            return [
                Slice(np.array(part), min(len(some), task_size))
                for some in groups.values()
                for part in cut(some)
            ]
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
        """The study as TOML and JSON know it; `from_dict` reads it back."""

        def plain(values):
            return [list(value) if isinstance(value, tuple) else value for value in values]

        told: dict[str, Any] = {"base": self.base.as_dict()}
        if self.points:
            return told | {
                "points": [
                    dict(zip(point, plain(point.values()), strict=True)) for point in self.points
                ]
            }
        return told | {"grid": {name: plain(values) for name, values in self.grid.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], place: str = "the study") -> "Study":
        """The study that a table tells: `base`, and `grid` or `points`.

        A field of the grid has a list of values, `{range = [first, end]}` as in Python, or
        `{start = 0.05, stop = 0.8, num = 5, scale = "log"}` with both ends.
        """
        for key in content:
            if key not in ("base", "grid", "points"):
                raise InputError(
                    f"Key `{key}` of {place} is unknown; the known keys are base, grid, points."
                )
        for key, kind, said in (
            ("base", Mapping, "a table"),
            ("grid", Mapping, "a table"),
            ("points", list, "a list of tables"),
        ):
            if not isinstance(content.get(key, kind() if kind is list else {}), kind):
                raise refuse(key, f"be {said} in {place}", f"is {content[key]!r}")
        base = RunConfig(**converted(content.get("base", {}), _FIELDS, f"[base] of {place}"))
        grid = {name: _spread(name, values) for name, values in content.get("grid", {}).items()}
        return cls(base, grid, content.get("points", ()))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Study":
        """The study that a TOML file tells, as in `from_dict`. **Raises:** `InputError` if the file or what it tells is wrong."""
        return cls.from_dict(read_toml(Path(path)), str(path))

    def difference(self, other: "Study") -> str | None:
        """The first field in which another study differs, and how; None if it does not."""
        ours, theirs = _flat(self.as_dict()), _flat(other.as_dict())
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(name) != theirs.get(name):
                return f"{name}, {_brief(theirs.get(name))} there and {_brief(ours.get(name))} here"
        if self.grid and list(self.grid) != list(other.grid):
            return f"the order of its dimensions, {', '.join(other.grid)} there and {', '.join(self.grid)} here"
        return None

    def _check_runs(self) -> None:
        """Every run of a list; of a grid every shape and every number, which are looked at apart."""
        if self.points:
            seen: dict[RunConfig, int] = {}
            for i in range(len(self.points)):
                _at(f"points[{i}]", self.point(i))
                if (first := seen.setdefault(self.point(i), i)) != i:
                    # Means over the seeds would take it for two runs.
                    raise refuse(
                        f"points[{i}]",
                        "be another run than those before it",
                        f"is the same as points[{first}]",
                    )
            return
        shapes = {name: values for name, values in self.grid.items() if name not in NUMBERS}
        numbers = {name: values for name, values in self.grid.items() if name in NUMBERS}
        for combination in itertools.product(*shapes.values()):
            first = dict(zip(shapes, combination, strict=True)) | {
                name: values[0] for name, values in numbers.items()
            }
            dataclasses.replace(self.base, **first).check()
        first = {name: values[0] for name, values in self.grid.items()}
        for name, values in numbers.items():
            # Of many seeds the ends say it all; other numbers may also be no numbers.
            for value in (min(values), max(values)) if name == "seed" else values:
                dataclasses.replace(self.base, **first | {name: value}).check()


def _axis(name: str, values: Any) -> tuple:
    check_choice("grid", name, tuple(_FIELDS))
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence | np.ndarray):
        raise refuse(f"grid.{name}", "be a list of values", f"is {values!r}")
    if not len(values):
        raise refuse(f"grid.{name}", "hold at least one value", "is empty")
    found = tuple(_value(name, value, f"grid.{name}") for value in values)
    if len(set(found)) < len(found):
        twice, _ = collections.Counter(found).most_common(1)[0]
        raise refuse(f"grid.{name}", "hold each value once", f"holds {twice!r} twice")
    return found


def _check_size(grid: Mapping[str, Any]) -> None:
    """Before anything is listed."""
    size = math.prod(
        len(values) for values in grid.values() if isinstance(values, Sequence | np.ndarray)
    )
    if size > _MOST:
        raise refuse("grid", f"hold at most {_MOST:,} runs", f"holds {size:,}")


def _point(i: int, point: Any) -> dict[str, Any]:
    if not isinstance(point, Mapping) or not point:
        raise refuse(f"points[{i}]", "be a table of at least one field", f"is {point!r}")
    for name in point:
        check_choice(f"points[{i}]", name, tuple(_FIELDS))
    return {name: _value(name, value, f"points[{i}]") for name, value in point.items()}


def _value(name: str, value: Any, place: str) -> Any:
    """One value of a field, whether it comes from Python, NumPy or TOML."""
    value = value.item() if isinstance(value, np.generic) else value
    value = (
        [v.item() if isinstance(v, np.generic) else v for v in value]
        if isinstance(value, tuple)
        else value
    )
    return convert(name, value, _FIELDS[name], place)


def _spread(name: str, values: Any) -> Any:
    """The values that a range or a spacing stands for; anything else as it is."""
    if not isinstance(values, Mapping):
        return values
    place = f"grid.{name}"
    must = 'be a list, {range = [first, end]} or {start, stop, num, scale = "linear" or "log"}'
    if set(values) == {"range"}:
        ends = values["range"]
        if (
            not isinstance(ends, list)
            or len(ends) != 2
            or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        ):
            raise refuse(place, "have a range of two integers, [first, end]", f"has {ends!r}")
        return range(*ends)
    if not {"start", "stop", "num"} <= set(values) <= {"start", "stop", "num", "scale"}:
        raise refuse(place, must, f"has the keys {', '.join(values)}")
    start, stop = values["start"], values["stop"]
    for end in (start, stop):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise refuse(place, "have a finite number for start and for stop", f"has {end!r}")
    check_positive_int(f"{place}.num", values["num"], 2)
    if values["num"] > _MOST:
        raise refuse(
            f"{place}.num",
            f"be at most {_MOST:,}, the most runs of a study",
            f"is {values['num']:,}",
        )
    scale = values.get("scale", "linear")
    check_choice(f"{place}.scale", scale, ("linear", "log"))
    if scale == "log" and not (start > 0 and stop > 0):
        raise refuse(place, "have positive ends on a log scale", f"has {start!r} and {stop!r}")
    spread = (np.geomspace if scale == "log" else np.linspace)(start, stop, values["num"])
    # Twelve digits are more than any result has, and a value can then be asked for as it is written.
    spread = [float(f"{value:.12g}") for value in spread]
    whole = isinstance(_FIELDS[name].default if name in _FIELDS else 0.0, int)
    return [int(value) if whole and value.is_integer() else value for value in spread]


def _at(place: str, config: RunConfig) -> None:
    try:
        config.check()
    except InputError as error:
        raise InputError(f"In {place}: {error}") from error


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"base.{name}": value for name, value in told["base"].items()}
    flat |= {f"grid.{name}": value for name, value in told.get("grid", {}).items()}
    return flat | ({"points": told["points"]} if "points" in told else {})


def _brief(value: Any) -> str:
    said = "absent" if value is None else repr(value)
    return (
        said
        if len(said) <= 60
        else f"{said[:40]}… ({len(value) if isinstance(value, list) else len(said)} values)"
    )
