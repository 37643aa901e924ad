"""What a study says: the mean of each number over the seeds, with its standard error, for every other setting."""

from typing import Any, NamedTuple

import numpy as np

from esljax.experiment import QUANTITIES

_NAMES = tuple(quantity.name for quantity in QUANTITIES)


class Group(NamedTuple):
    """Runs that differ in their seed alone, and the mean and standard error of each number over those that are done."""

    settings: dict[str, Any]
    runs: int
    """How many are done."""
    asked: int
    """How many there are in the study."""
    failed: int
    unconverged: int
    """How many of those done have a transport problem that was not solved: their numbers are not to be trusted."""
    means: dict[str, float]
    errors: dict[str, float]


def summarize(dataset: Any) -> list[Group]:
    """The groups of a study's results, in the order of its grid.

    The standard errors are taken over the seeds; of a run without others, they are its own (by the jackknife), or NaN.

    **Args:** `dataset`: what `open_study` returns. **Returns:** one `Group` for each combination of settings but the seed.
    """
    fields = [name for name in dataset.coords if name != "seed"]
    shape = tuple(dataset.sizes.values())

    def flat(name):
        return (
            dataset[name]
            .broadcast_like(dataset["done"])
            .transpose(*dataset["done"].dims)
            .values.reshape(-1)
        )

    settings, state, converged = (
        {name: flat(name) for name in fields},
        flat("done"),
        flat("converged"),
    )
    members: dict[tuple, list[int]] = {}
    for i in range(int(np.prod(shape))):
        members.setdefault(tuple(settings[name][i] for name in fields), []).append(i)
    values = {name: flat(name) for name in _NAMES}
    own = {name: flat(f"{name}_error") for name in _NAMES if f"{name}_error" in dataset}
    groups = []
    for setting, indices in members.items():
        rows = np.array(indices)[state[indices] == 1]
        errors = {
            name: _error(values[name][rows], own[name][rows] if name in own else None)
            for name in _NAMES
        }
        means = {
            name: float(np.mean(values[name][rows])) if rows.size else np.nan for name in _NAMES
        }
        plain = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in zip(fields, setting, strict=True)
        }
        failed, unconverged = int(np.sum(state[indices] == 2)), int(np.sum(~converged[rows]))
        groups.append(Group(plain, rows.size, len(indices), failed, unconverged, means, errors))
    return groups


def _error(values: np.ndarray, own: np.ndarray | None) -> float:
    if values.size > 1:
        return float(np.std(values, ddof=1) / np.sqrt(values.size))
    return float(own[0]) if own is not None and values.size else np.nan
