"""The numbers that a study stores of each run, as its problems have them."""

import re
from typing import Any

import numpy as np

from esljax._checks import InputError, refuse
from esljax.experiment import Columns, measured, program_of, task_of
from esljax.study.description import Study

# The most problems that are made before the first run, to learn what they measure.
MOST_MADE = 32
_RESERVED = ("rate", "converged", "reason", "done", "knot", "knots", "point", "checksum")


def columns_of(study: Study) -> Columns:
    """The numbers that the runs of a study give: their problems say which metrics they have.

    **Raises:** `InputError` if no problem of the study can be made.
    """
    columns, metrics, classifies, errors = study.columns, [], [], []
    for index in _corners(study):
        try:
            names, classes, jackknife = measured(
                task_of((study.point(index),), 1, 1, study.problem)
            )
        except InputError as error:
            errors.append(error)
            continue
        except Exception:
            # Its run will report why.
            continue
        metrics += [name for name in names if name not in metrics]
        classifies.append(classes)
        columns = columns._replace(errors=columns.errors or jackknife)
    if errors and not classifies:
        raise errors[0]
    taken = {*columns._replace(metrics=()).names(), *study.coordinates, *_RESERVED}
    for name in metrics:
        if name in taken or not re.fullmatch(r"[\w\- ]+", name) or name.startswith("__"):
            raise refuse(
                "metrics",
                "have names of letters, digits, spaces, - and _, and none that a study uses",
                f"holds {name!r}",
            )
    if not classifies:
        return columns
    loss = columns.loss if all(classifies) else "units of the loss"
    return columns._replace(metrics=tuple(metrics), loss=loss)


def _corners(study: Study) -> list[int]:
    """Runs among which every value occurs of what a problem is made from, up to a number."""
    if study.points:
        programs: dict[Any, int] = {}
        for i in range(study.size):
            programs.setdefault(program_of(study.point(i)), i)
            if len(programs) >= MOST_MADE:
                break
        return list(programs.values())
    shape, corners = tuple(study.dimensions.values()), [0]
    for axis, length in enumerate(shape):
        if study.makes_problems(list(study.grid)[axis]):
            for i in range(1, min(length, MOST_MADE)):
                place = [0] * len(shape)
                place[axis] = i
                corners.append(int(np.ravel_multi_index(place, shape)))
    return corners
