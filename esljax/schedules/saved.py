"""Schedules from files and from the content of reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esljax._checks import check_choice, door, in_words, refuse
from esljax.schedules import record
from esljax.schedules.base import AbstractSchedule
from esljax.schedules.scaled import Scaled
from esljax.schedules.shapes import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    WarmupStableDecay,
)
from esljax.schedules.tables import Knots
from esljax.schedules.warmup import Warmup

# Those that a file may name; of `FromOptax` it holds the table.
_KINDS: tuple[type[AbstractSchedule], ...] = (
    Constant,
    Linear,
    Cosine,
    Exponential,
    WarmupStableDecay,
    Warmup,
    Scaled,
    Piecewise,
    Knots,
)


@door
def load_schedule(
    path: str | Path,
    *,
    kinds: Sequence[type[AbstractSchedule]] = (),
    dtype: str | None = None,
) -> AbstractSchedule:
    """Read the schedule that `schedule.save(path)` wrote, bit for bit.

    Nothing in a file is executed: a class from outside of this package is found by its name among
    `kinds` alone.

    **Args:** `path`: of the file. `kinds`: your own classes that the file may name. `dtype`: the
    type of all numbers, by default the one that they were saved in.
    **Raises:** `InputError` if the file cannot be read or holds no schedule, of a kind that is not
    known, and of float64 numbers where jax has no 64-bit numbers and `dtype` is not given.

    **Example:**

        >>> import esljax as esl
        >>> esl.Knots([0.1, 0.4, 0.1]).save("found.json")
        >>> print(esl.load_schedule("found.json"))
        Knots: 3 log-linear knots from 0.1 to 0.1: 0.1 0.4 0.1
    """
    return _decoded(record.read(path), kinds, dtype, record.wrong_file(path))


@door
def from_dict(
    content: Mapping[str, Any],
    *,
    kinds: Sequence[type[AbstractSchedule]] = (),
    dtype: str | None = None,
) -> AbstractSchedule:
    """Build the schedule that `schedule.as_dict()` described.

    **Args:** `content`: of a file or of a report. `kinds`, `dtype`: as in `load_schedule`.
    **Raises:** `InputError` as `load_schedule` does.

    **Example:**

        >>> import esljax as esl
        >>> print(esl.schedules.from_dict({"kind": "Knots", "values": [0.1, 0.4]}))
        Knots: 2 log-linear knots from 0.1 to 0.4: 0.1 0.4
    """
    return _decoded(
        content,
        kinds,
        dtype,
        lambda phrase: refuse("content", "be what `schedule.as_dict()` returns", f"it {phrase}"),
    )


def _decoded(
    content: Any, kinds: Sequence[type], dtype: str | None, problem: record.Problem
) -> AbstractSchedule:
    if dtype is not None:
        check_choice("dtype", dtype, record.DTYPES)
    known = {record.key_of(kind): kind for kind in _KINDS}
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, AbstractSchedule):
            raise refuse("kinds", "hold your own classes of schedules", f"holds {in_words(kind)}")
        known[record.key_of(kind)] = kind
    return record.decode(content, known, dtype, problem)
