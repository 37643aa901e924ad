"""The schedule of a run of a study, to take home."""

import dataclasses
from typing import Any

import numpy as np

from esljax._checks import refuse
from esljax.experiment import OPTIMIZED, usual_shapes
from esljax.schedules import AbstractSchedule, Knots
from esljax.study.store import DONE

# What a shape of peak 1 holds beside rates.
_SHARES = ("warmup", "decay", "boundaries", "decay_shape")


def schedule_of(run: Any) -> AbstractSchedule:
    """The schedule of one run of a study, to print, save, or hand to optax.

    **Args:** `run`: a selection of one finished run from the result of `open_study` or `run_study`,
    in which the schedule varies.
    **Returns:** the usual shape with the rate of the run as its peak, or the log-linear `Knots` of
    an optimized schedule.
    **Raises:** `InputError` if it is not one finished run, or does not hold its schedule and rate.

    **Example:**

        >>> import tempfile
        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> grid = {"schedule": ["constant", "cosine"], "rate": [0.25]}
        >>> study = esl.study.Study(base, grid=grid)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = esl.study.run_study(study, folder + "/study.zarr").load()
        >>> print(esl.study.schedule_of(results.sel(schedule="cosine", rate=0.25)))
        Cosine: peak 0.25, end 0
    """
    if run["done"].ndim:
        left = ", ".join(run["done"].dims)
        raise refuse("run", "be one run: select its place along every dimension", f"has {left}")
    if int(run["done"]) != DONE:
        raise refuse("run", "be done", f"is not ({str(run['reason'].values) or 'not run yet'})")
    for name in ("schedule", "rate"):
        if name not in run:
            raise refuse("run", f"be of a study in which the {name} varies or is found", "is not")
    name, rate = str(run["schedule"].values), float(run["rate"])
    if name == OPTIMIZED:
        knots = np.asarray(run["knots"].values)
        return Knots(knots[np.isfinite(knots)])
    shape: Any = usual_shapes()[name]
    numbers = {
        field.name: getattr(shape, field.name) * rate
        for field in dataclasses.fields(shape)
        if field.name not in _SHARES
    }
    return dataclasses.replace(shape, **numbers)
