"""Σ, W2² and their difference by the parameters of a model."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from esljax._checks import refuse
from esljax.results import table
from esljax.simulation import Keys

# Rows of a printed table; what is left is summed in one more.
_ROWS = 10
# Parts of a whole that is rounding are no parts.
_ROUNDING = 1e-5


class KeyShare(NamedTuple):
    """The share of one parameter in the numbers of a report. Shares of all parameters add to 1.

    None where the whole is 0 up to rounding.
    """

    key: str
    """The name of the parameter, such as "layers/0/kernel"."""
    coordinates: int
    """How many numbers of a member it holds."""
    entropy_production: float | None
    """Its share of Σ."""
    w2_squared: float | None
    """Its share of W2²."""
    waste: float | None
    """Its share of Σ - W2². Below 0 for a parameter that the pairs of the links move less than
    those of the whole run."""


class KeyShares(tuple[KeyShare, ...]):
    """The shares of all parameters, the largest share of Σ first. `print` shows the first ten."""

    def __str__(self) -> str:
        shown = self if len(self) <= _ROWS + 1 else self[:_ROWS]
        rows = [("key", "coordinates", "of Σ", "of W2²", "of Σ - W2²")]
        rows += [_cells(share) for share in shown]
        if len(shown) < len(self):
            rest = self[_ROWS:]
            sums = (_sum(parts) for parts in zip(*(share[2:] for share in rest), strict=True))
            count = sum(share.coordinates for share in rest)
            rows.append(_cells(KeyShare(f"the other {len(rest)}", count, *sums)))
        return table(rows, align="lrrrr")


def shares_of(report: Any) -> KeyShares:
    """Return the shares of the parameters in one report.

    **Raises:** `InputError` if the report does not know them.
    """
    evidence = report.evidence
    if evidence is None or evidence.keys is None or evidence.by_coordinate is None:
        raise refuse(
            "report",
            "be of a run whose parameters have names (from_snapshots(..., keys=...), or a "
            "simulated FlaxLoss)",
            "knows none",
        )
    sigma, whole = (np.asarray(x, np.float64) for x in evidence.by_coordinate)
    parts = np.stack([sigma, whole, sigma - whole])
    totals = parts.sum(axis=1)
    known = np.abs(totals) > _ROUNDING * totals[0]
    shares, start = [], 0
    sizes = evidence.sizes or [math.prod(shape) for _, shape in evidence.keys]
    for (key, shape), size in zip(evidence.keys, sizes, strict=True):
        count = math.prod(shape)
        held = parts[:, start : start + count].sum(axis=1)
        of = [
            float(x / all_) if ok else None for x, all_, ok in zip(held, totals, known, strict=True)
        ]
        shares.append(KeyShare(key, size, *of))
        start += count
    return KeyShares(sorted(shares, key=lambda share: -(share.entropy_production or 0.0)))


def count_of(places: Sequence[int] | np.ndarray, evidence: Any) -> int:
    """Return how many numbers of a member these coordinates are; of folded members those of whole
    parameters."""
    if evidence.sizes is None or evidence.keys is None:
        return len(places)
    ends = np.cumsum([math.prod(shape) for _, shape in evidence.keys])
    held = set(np.searchsorted(ends, np.asarray(places), side="right").tolist())
    return sum(evidence.sizes[k] for k in held)


def named(places: Sequence[int] | np.ndarray, keys: Keys, most: int = 5) -> str:
    """Return coordinates by the names of their parameters: "all of `opt/mu`, `bias[3]`"."""
    chosen, words, start = set(map(int, places)), [], 0
    for key, shape in keys:
        count = math.prod(shape)
        inside = [i - start for i in sorted(chosen) if start <= i < start + count]
        if count and len(inside) == count:
            words.append(f"`{key}`" if not shape else f"all of `{key}`")
        else:
            indices = (np.unravel_index(i, shape) for i in inside)
            words += [f"`{key}[{', '.join(map(str, index))}]`" for index in indices]
        start += count
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def _cells(share: KeyShare) -> tuple[str, ...]:
    percents = ("-" if x is None else f"{100 * x:.3g} %" for x in share[2:])
    return (share.key, str(share.coordinates), *percents)


def _sum(parts: Sequence[float | None]) -> float | None:
    return None if None in parts else sum(x for x in parts if x is not None)
