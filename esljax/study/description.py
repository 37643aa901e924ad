"""A study: many training runs that differ in some settings, of the built-in problem or of any.

The runs form a grid or a list of points. This file holds the description alone, from Python or from
a TOML file; `run_study` runs it and `open_study` reads the results.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from esljax._checks import InputError, check_choice, check_positive_int, refuse
from esljax._checks import size as in_bytes
from esljax.experiment import (
    NUMBERS,
    OPTIMIZED,
    RUN_SCHEDULES,
    Columns,
    OutsideConfig,
    RunConfig,
    Source,
    check_given,
    convert,
    plain,
    program_of,
    read_toml,
    settings_class,
    spelled,
)
from esljax.study.fields import converted_table, is_plain, plain_kind
from esljax.study.recorded import Recorded, recorded

# A dozen numbers and marks of a run.
_BYTES = 112

# A list of more runs than these would fill the memory of a usual machine by itself.
_MOST = 10_000_000
# Whole numbers in a row are held by their ends from this length on.
_LONG = 10_000


class Slice(NamedTuple):
    """Runs of one shape that share a compiled program."""

    indices: np.ndarray
    """Their indices in the study, shape (runs,), at most `length` of them."""
    length: int
    """The number of runs that their program is compiled for."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that share the settings `base` and differ on a grid, or point by point.

    The settings of a run of the built-in problem are the fields of `RunConfig`. Those of a run of
    any other `problem` are the keywords of its function, and `rate`, `target`, `schedule`, `knots`,
    `iterations`, `match_runs`, `seed` and `dtype`, as in `RunConfig` but for the rate, which is by
    default the largest of a few that leaves the constant schedule stable. Everything else is fixed
    by the problem itself.

    **Args:**
    - `base`: the settings that all runs share: a `RunConfig`, and of another `problem` a mapping of
      settings to values.
    - `grid`: settings and the values of each. The runs are all combinations, and the settings are
      the dimensions of the result.
    - `points`: instead of a grid, one mapping of settings to values for each run, no two the same.
      The result has the single dimension `point`.
    - `problem`: a `Problem`, a function of keywords that returns one, or the place of either, such
      as "my_file.py:name" or "package.module:name"; by default the built-in problem.

    **Raises:** `InputError` for an unknown setting, a value of the wrong type, a setting without
    values or with the same value twice, settings that cannot run, a rate that varies beside a
    target, more than 10,000,000 runs, and for both or neither of `grid` and `points`.

    **Example:**

        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,))
        >>> study = esl.study.Study(base, grid={"rate": [0.1, 0.2, 0.4], "seed": range(10)})
        >>> study.size, study.dimensions
        (30, {'rate': 3, 'seed': 10})
        >>> study.point(11).rate, study.point(11).seed
        (0.2, 1)

        A problem of your own, whose keyword is an axis, each run at the rate that leads to a loss
        of 0.3:

        >>> import jax
        >>> def plane(stiffness: float = 1.0) -> esl.Problem:
        ...     start = lambda key: jax.random.normal(key, (8, 2))
        ...     potential = esl.Quadratic(stiffness)
        ...     return esl.Problem(potential, members=8, steps=10, snapshots=5, start=start)
        >>> grid = {"stiffness": [1.0, 2.0], "schedule": ["constant", "cosine"]}
        >>> esl.study.Study({"target": 0.3}, grid, problem=plane).dimensions
        {'stiffness': 2, 'schedule': 2}
    """

    base: Any = None
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()
    problem: Any = None

    POINT: ClassVar[str] = "point"

    def __post_init__(self):
        given = self.problem
        if given is not None and not isinstance(given, Recorded):
            object.__setattr__(self, "problem", Source.of(given))
        self._check_types()
        object.__setattr__(self, "base", self._settings(self.base))
        _check_size(self.grid, len(self.points))
        grid = {name: self._axis(name, values) for name, values in self.grid.items()}
        points = tuple(self._point(i, point) for i, point in enumerate(self.points))
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "points", points)
        if points:
            self._check_points()
        else:
            self._check_grid()
        self._check_targets()

    @functools.cached_property
    def _kind(self) -> Any:
        """The class of the settings of a run."""
        return RunConfig if self.problem is None else settings_class(OutsideConfig, self.problem)

    @functools.cached_property
    def _fields(self) -> dict[str, dataclasses.Field]:
        return {field.name: field for field in dataclasses.fields(self._kind)}

    @functools.cached_property
    def _record(self) -> dict[str, str]:
        """What a store holds of the problem; nothing of the built-in one."""
        return {} if self.problem is None else recorded(self.problem)

    @property
    def content(self) -> str:
        """A digest of what the problem is made from; "" for the built-in one."""
        return self._record.get("content", "")

    def loaded(self) -> "Study":
        """The study with its problem loaded, where only its record was read.

        **Raises:** `InputError` if it was given as an object, or cannot be loaded.
        """
        if not isinstance(self.problem, Recorded):
            return self
        return Study(self._plain_base(), self.grid, self.points, self.problem.loaded())

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
    def coordinates(self) -> dict[str, tuple[str, Any]]:
        """The fields that vary: the dimension that each lies along, and its values there."""
        if not self.points:
            return {name: (name, values) for name, values in self.grid.items()}
        varying = [name for name in self._fields if any(name in point for point in self.points)]
        return {
            name: (
                self.POINT,
                tuple(point.get(name, getattr(self.base, name)) for point in self.points),
            )
            for name in varying
        }

    @property
    def has_errors(self) -> bool:
        """Whether some run of the built-in problem has standard errors of its own, by the jackknife
        over its members."""
        return self.problem is None and any(count > 0 for count in self.values("jackknife"))

    @property
    def columns(self) -> Columns:
        """The numbers that are stored of each run, as far as the settings fix them."""
        optimized = OPTIMIZED in self.values("schedule")
        found = any(self.values("target")) or not all(self.values("rate")) or optimized
        # With the rate on an axis its values are the coordinate of that name.
        rate = found and "rate" not in self.coordinates
        knots = max(self.values("knots")) if optimized else 0
        return Columns(errors=self.has_errors, rate=rate, knots=knots)

    def values(self, name: str) -> Sequence[Any]:
        """The values of a setting in the runs of the study."""
        return self.coordinates.get(name, ("", (getattr(self.base, name),)))[1]

    def point(self, index: int) -> Any:
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
            length = min(len(self.grid[name]), room) if name in self._numbers else 1
            block.append(length)
            # Where a block is not whole along this field, no room is left along the next.
            room //= length
        return tuple(reversed(block))

    @property
    def _numbers(self) -> tuple[str, ...]:
        """The settings in which the runs of a task may differ."""
        keywords = () if self.problem is None else tuple(self.problem.keywords)
        return tuple(name for name in NUMBERS if name not in keywords)

    def makes_problems(self, name: str) -> bool:
        """Whether a problem is made for each value of a setting."""
        return name not in self._numbers

    def slices(self, task_size: int) -> list[Slice]:
        """The runs of the study in groups, each for one call of a compiled program."""
        return self._slices_of_points(task_size) if self.points else self._slices_of_grid(task_size)

    def _slices_of_points(self, task_size: int) -> list[Slice]:
        groups: dict[Any, list[int]] = {}
        for i in range(len(self.points)):
            groups.setdefault(program_of(self.point(i)), []).append(i)
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
        content: dict[str, Any] = {}
        if self.problem is not None:
            content["problem"] = self._record
        content["base"] = self._plain_base()
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

    def _plain_base(self) -> dict[str, Any]:
        """The settings of the base but those that are to be given by the grid or the points."""
        values = plain(self.base)
        return {name: value for name, value in values.items() if is_plain(value)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], place: str = "the study") -> "Study":
        """Make a study from a table with the keys `base`, and `grid` or `points`, and `problem` for
        one that is not built in.

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
            if key not in ("base", "grid", "points", "problem"):
                raise InputError(
                    f"Key `{key}` of {place} is unknown; the known keys are base, grid, points, "
                    "problem."
                )
        for key, kind, phrase in (
            ("base", Mapping, "a table"),
            ("grid", Mapping, "a table"),
            ("points", list, "a list of tables"),
        ):
            if key in content and not isinstance(content[key], kind):
                raise refuse(key, f"be {phrase} in {place}", f"is {content[key]!r}")
        problem: Any = content.get("problem")
        if isinstance(problem, Mapping):
            problem = Recorded.of(content, place)
        elif problem is not None and not isinstance(problem, str | Source):
            must = f"be a string such as 'my_file.py:name' in {place}"
            raise refuse("problem", must, f"is {problem!r}")
        elif problem is not None:
            problem = Source.of(problem)
        kind = RunConfig if problem is None else settings_class(OutsideConfig, problem)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        base = converted_table(content.get("base", {}), fields, problem, f"[base] of {place}")
        grid = {
            name: _values(name, given, fields) for name, given in content.get("grid", {}).items()
        }
        return cls(kind(**base), grid, content.get("points", ()), problem)

    @classmethod
    def from_toml(cls, path: str | Path, *, problem: Any = None) -> "Study":
        """Make a study from a TOML file, laid out as `from_dict` describes.

        A `problem` that the file names, such as "my_file.py:name", is beside it.

        **Args:** `path`: of the file. `problem`: as of `Study`, in place of the one in the file.

        **Raises:** `InputError` if the file cannot be read or its content is wrong.
        """
        content = read_toml(Path(path))
        if problem is not None:
            content["problem"] = problem if isinstance(problem, str) else Source.of(problem)
            return cls.from_dict(content, str(path))
        problem = content.get("problem")
        if isinstance(problem, str) and problem.rpartition(":")[0].endswith(".py"):
            content["problem"] = str(Path(path).resolve().parent / Path(problem).expanduser())
        return cls.from_dict(content, str(path))

    def difference(self, other: "Study") -> str | None:
        """Describe the first field in which another study differs; None if they are the same.

        **Returns:** a phrase such as "grid.rate, [0.1] there and [0.1, 0.2] here".
        """
        if (self.content or other.content) and self.content != other.content:
            here, there = (str(x.problem) if x.content else "absent" for x in (self, other))
            if here == there:
                return f"the content of its problem {here}"
            return f"problem, {there} there and {here} here"
        ours, theirs = _flat(self.as_dict()), _flat(other.as_dict())
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(name) != theirs.get(name):
                return f"{name}, {_brief(theirs.get(name))} there and {_brief(ours.get(name))} here"
        if self.grid and list(self.grid) != list(other.grid):
            order, other_order = ", ".join(self.grid), ", ".join(other.grid)
            return f"the order of its dimensions, {other_order} there and {order} here"
        return None

    def _settings(self, base: Any) -> Any:
        """The base in the class of the settings."""
        kind, place = self._kind, "base"
        if base is None:
            return kind()
        if isinstance(base, kind):
            return base
        if self.problem is not None and isinstance(base, Mapping):
            for name in base:
                self._check_name(place, name)
            given = {name: self._value(name, value, place) for name, value in base.items()}
            return kind(**given)
        if self.problem is not None and isinstance(base, RunConfig | OutsideConfig):
            # What a whole configuration leaves at its defaults is not given.
            given = {
                field.name: getattr(base, field.name)
                for field in dataclasses.fields(base)
                if getattr(base, field.name) != field.default
            }
            return self._settings(given)
        must = "a RunConfig" if self.problem is None else "a mapping of settings to values"
        raise refuse("base", f"be {must}", f"is {base!r}")

    def _check_name(self, argument: str, name: Any) -> None:
        """Reject a setting that this study does not have."""
        if name in RunConfig.__dataclass_fields__ and name not in self._fields:
            raise refuse(
                argument,
                f"hold settings of a run ({', '.join(self._fields)})",
                f"holds {name!r}, which {self.problem} fixes itself: make it a keyword of a "
                "function that returns the problem",
            )
        check_choice(argument, name, tuple(self._fields))

    def _check_types(self) -> None:
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
        names = () if self.problem is None else self.problem.keywords
        taken = {*Columns(True, rate=True).names(), "converged", "done", "reason", "checksum"}
        taken |= {"knot", "knots", self.POINT}
        for name in names:
            if name in taken:
                raise refuse(
                    "problem",
                    "be a function whose keywords differ from the numbers that a study stores "
                    "(rename it in the function)",
                    f"{self.problem} has the keyword `{name}`",
                )

    def _check_targets(self) -> None:
        """Reject rates beside targets, and targets beside rates that vary."""
        together = [point for point in self.points if "rate" in point and point.get("target")]
        if together or ("rate" in self.coordinates and any(self.values("target"))):
            if self.points and not together:
                return
            raise refuse(
                "rate",
                "be left out of a grid or a point beside a target, which sets the rate of each run",
                "is given beside it",
            )

    def _check_points(self) -> None:
        """Check each run, and that no two are the same."""
        seen: dict[Any, int] = {}
        for i in range(len(self.points)):
            config = self.point(i)
            try:
                check_given(config)
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
        numbers = {name: values for name, values in self.grid.items() if name in self._numbers}
        shapes = {name: values for name, values in self.grid.items() if name not in self._numbers}
        first = {name: values[0] for name, values in self.grid.items()}
        if self.problem is not None:
            # Keywords are checked one by one: what they make together shows when it is made.
            for name, values in ({"": [None]} | shapes).items():
                for value in values:
                    settings = dataclasses.replace(
                        self.base, **first | ({name: value} if name else {})
                    )
                    check_given(settings)
                    settings.check()
            shapes = {}
        else:
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

    def _axis(self, name: str, values: Any) -> tuple | range:
        self._check_name("grid", name)
        place = f"grid.{name}"
        if isinstance(values, str | bytes | Mapping) or not isinstance(
            values, Sequence | np.ndarray
        ):
            raise refuse(place, "be a list of values", f"is {values!r}")
        if not _length(values):
            raise refuse(place, "hold at least one value", "is empty")
        if isinstance(values, np.ndarray):
            values = values.tolist()
        kind = plain_kind(self._fields[name])
        if isinstance(values, range):
            # The type of all is that of one, and no two are the same.
            self._value(name, values[0], place)
            if values.step == 1 and len(values) >= _LONG and kind is int:
                return values
        if kind in (int, float) and set(map(type, values)) == {kind}:
            axis = tuple(values)
        else:
            axis = tuple(self._value(name, value, place) for value in values)
        if len(set(axis)) < len(axis):
            twice, _ = collections.Counter(axis).most_common(1)[0]
            raise refuse(place, "hold each value once", f"holds {twice!r} twice")
        whole = type(axis[0]) is int and len(axis) >= _LONG
        if whole and axis == tuple(range(axis[0], axis[-1] + 1)):
            return range(axis[0], axis[-1] + 1)
        return axis

    def _point(self, i: int, point: Any) -> dict[str, Any]:
        place = f"points[{i}]"
        if not isinstance(point, Mapping) or not point:
            raise refuse(place, "be a table of at least one field", f"is {point!r}")
        for name in point:
            self._check_name(place, name)
        return {name: self._value(name, value, place) for name, value in point.items()}

    def _value(self, name: str, value: Any, place: str) -> Any:
        """One value of a setting, from Python, NumPy or TOML, in the type of its field."""
        return _value(self._fields[name], value, place, self.problem is not None)


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


def _value(field: dataclasses.Field, value: Any, place: str, outside: bool) -> Any:
    if value is None:
        # No file of settings holds it; a keyword has it by default.
        raise refuse(field.name, f"be a value in {place}", "is None: leave it out for the default")
    if field.name == "schedule":
        value = spelled(value, RUN_SCHEDULES)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list):
        items = [item.item() if isinstance(item, np.generic) else item for item in value]
        value = tuple(items) if isinstance(value, tuple) and not outside else items
    return convert(field.name, value, field, place)


def _lists(values: Iterable[Any]) -> list:
    """The values with lists for tuples, as TOML has them."""
    return [
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for value in values
    ]


def _values(name: str, given: Any, fields: Mapping[str, dataclasses.Field]) -> Any:
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
    whole = name in fields and plain_kind(fields[name]) is int
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
