"""How many runs go into a task: as many as take a few seconds, by the time of those before.

A study that is interrupted loses the tasks at work. So the first task of a kind of runs has one
run, which also compiles its program, and later ones are sized by what was measured. A program is
compiled for the whole block that the runs are of, and skips what a task leaves out of it: the size
of a task changes no number and compiles nothing anew.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from esljax.experiment import OPTIMIZED, program_of, task_of, width_of_a_task
from esljax.study.description import Slice, Study

# The time of a task: long beside the writing of its results, and short to lose.
_SECONDS = 3.0


class Part(NamedTuple):
    """Some runs of a slice, for one task."""

    indices: np.ndarray
    """Their indices in the study."""
    points: tuple[Any, ...]
    """Their settings."""
    length: int
    """The number of runs that their program is compiled for."""
    width: int
    """The number of runs side by side."""
    kind: Any
    """What makes their time comparable, if it is one for all; else None."""


class Pace:
    """Cuts slices into tasks.

    **Args:** `slices`: the runs that are left. `fixed`: the size of all tasks, if it is given.
    `width`: the runs side by side, if that is given.
    """

    def __init__(
        self, study: Study, slices: Sequence[Slice], *, fixed: int | None, width: int | None
    ):
        self._study, self._fixed, self._width = study, fixed, width
        self._slices = collections.deque(slices)
        self._seconds: dict[Any, float] = {}
        self._points: dict[int, Any] = {}

    def next(self) -> Part | None:
        """The next task; None after the last."""
        if not self._slices:
            return None
        length, indices = self._slices[0].length, self._slices[0].indices
        first = self._point(indices[0])
        width = self._width or width_of_a_task(task_of((first,), length, 1, self._study.problem))
        count = self._fixed or self._count(indices, width)
        if count >= len(indices):
            self._slices.popleft()
        else:
            self._slices[0] = Slice(indices[count:], length)
        chosen = indices[:count]
        points = tuple(self._points.pop(int(i), None) or self._study.point(int(i)) for i in chosen)
        kinds = {_kind(point) for point in points}
        return Part(chosen, points, length, width, kinds.pop() if len(kinds) == 1 else None)

    def took(self, part: Part, seconds: float) -> None:
        """Learn from the time that a task took."""
        if part.kind is not None:
            batches = -(-len(part.points) // part.width)
            self._seconds[part.kind] = seconds / batches

    def _count(self, indices: np.ndarray, width: int) -> int:
        """The number of runs, in whole batches, that the next task has time for."""
        total = 0.0
        for count in range(0, len(indices), width):
            needed = self._seconds.get(_kind(self._point(indices[count])))
            total += _SECONDS if needed is None else needed
            if count and (needed is None or total > _SECONDS):
                return count
        return len(indices)

    def _point(self, index: Any) -> Any:
        if int(index) not in self._points:
            self._points[int(index)] = self._study.point(int(index))
        return self._points[int(index)]


def _kind(point: Any) -> Any:
    return program_of(point), point.schedule == OPTIMIZED, point.target > 0
