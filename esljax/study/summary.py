"""The summary of a study: means of each number over the seeds, with standard errors."""

from typing import Any, NamedTuple

import numpy as np

from esljax.study.store import DONE, FAILED


class Group(NamedTuple):
    """Runs that differ in their seed alone, with the mean and standard error of each number.

    Means and errors are taken over the finished runs; their names and units are those of the
    variables of `open_study`.
    """

    settings: dict[str, Any]
    """The fields that vary in the study, without the seed, and their values in this group."""
    runs: int
    """The number of runs that are done."""
    asked: int
    """The number of runs that the study has, done or not."""
    failed: int
    """The number of runs that failed."""
    unconverged: int
    """The number of finished runs with a transport problem that was not solved: do not trust the
    means of the group."""
    means: dict[str, float]
    """The mean of each number by name; NaN if no run is done."""
    errors: dict[str, float]
    """The standard error of each mean by name; of a single run its own, by jackknife, or NaN."""


def summarize(dataset: Any) -> list[Group]:
    """Group the results of a study by all settings but the seed.

    **Args:** `dataset`: the result of `open_study` or `run_study`, or a selection from it.
    **Returns:** one `Group` for each combination of settings, in the order of the grid.

    **Example:**

        >>> import tempfile
        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> study = esl.study.Study(base, grid={"rate": [0.1, 0.2], "seed": range(3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = esl.study.run_study(study, folder + "/study.zarr").load()
        >>> for group in esl.study.summarize(results):
        ...     print(group.settings, group.runs, group.errors["gap"] > 0)
        {'rate': 0.1} 3 True
        {'rate': 0.2} 3 True
    """
    dimensions = set(dataset["done"].dims)
    fields = [
        name
        for name, labels in dataset.coords.items()
        if name != "seed" and set(labels.dims) <= dimensions
    ]
    numbers = [
        name
        for name, values in dataset.data_vars.items()
        if values.dtype.kind == "f" and set(values.dims) <= dimensions
    ]
    # The error of a number has its name; a metric may end in "_error" itself.
    own_names = {f"{name}_error" for name in numbers} & set(numbers)
    names = [name for name in numbers if name not in own_names]

    def flat(name: str) -> np.ndarray:
        return (
            dataset[name]
            .broadcast_like(dataset["done"])
            .transpose(*dataset["done"].dims)
            .values.reshape(-1)
        )

    settings = {name: flat(name) for name in fields}
    state, converged = flat("done"), flat("converged")
    values = {name: flat(name) for name in names}
    own = {name: flat(f"{name}_error") for name in names if f"{name}_error" in dataset}
    members: dict[tuple, list[int]] = {}
    for i in range(state.size):
        members.setdefault(tuple(settings[name][i] for name in fields), []).append(i)
    groups = []
    for setting, indices in members.items():
        rows = np.array(indices)[state[indices] == DONE]
        groups.append(
            Group(
                settings={
                    name: value.item() if isinstance(value, np.generic) else value
                    for name, value in zip(fields, setting, strict=True)
                },
                runs=rows.size,
                asked=len(indices),
                failed=int(np.sum(state[indices] == FAILED)),
                unconverged=int(np.sum(~converged[rows])),
                means={
                    name: float(np.mean(values[name][rows])) if rows.size else np.nan
                    for name in names
                },
                errors={
                    name: _error(values[name][rows], own[name][rows] if name in own else None)
                    for name in names
                },
            )
        )
    return groups


def _error(values: np.ndarray, own: np.ndarray | None) -> float:
    if values.size > 1:
        return float(np.std(values, ddof=1) / np.sqrt(values.size))
    return float(own[0]) if own is not None and values.size else np.nan
