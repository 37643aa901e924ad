"""Reasons not to believe the answer of a search, in sentences."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from esljax.optimization.probes import AGREE, Probes
from esljax.optimization.search import CUT, Candidate, State, usual

# A multiplier is called wrong if its residual is slack by this many standard errors.
_ERRORS = 3.0
# λ·|r| up to this share of the value counts as 0.
_NEGLIGIBLE = 0.01


def doubts(
    state: State, start: Any, ends: list[int], cuts: bool, failing: list[str]
) -> tuple[str, ...]:
    """All doubts about a search: of its start, its gradients, and its multipliers.

    **Args:** `start`: the moving leaves at the start, which name the entries. `ends`: iterations
    done at each probe. `cuts`: whether large gradients were cut. `failing`: the doubts of
    `judged_multipliers`.
    """
    return tuple(
        [
            *_still(state.probes.still, start),
            *_disagreement(state.probes, ends),
            *_spikes(state, cuts),
            *failing,
        ]
    )


def _still(still: np.ndarray, start: Any) -> Iterator[str]:
    """On entries that the objective does not feel at the start."""
    named = [name for name, _ in _entries(still, start)]
    if not named:
        return
    zero = [name for name, value in _entries(still, start) if value == 0]
    verb = "is" if len(named) == 1 else "are"
    sentence = f"The gradient of {_listed(named)} {verb} exactly 0 at the start on two noises"
    if zero:
        verb = "starts" if len(zero) == 1 else "start"
        sentence += (
            f"; {_listed(zero)} {verb} at 0, where the slope of a temperature is 0 by convention: "
            "start a temperature above 0"
        )
    else:
        sentence += ": the objective does not depend on it there, or starts at an optimum"
    yield sentence + "."


def _entries(still: np.ndarray, start: Any) -> Iterator[tuple[str, float]]:
    """The name of each still leaf, or of each still entry of a leaf, and its largest size."""
    done = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        here = still[done : done + leaf.size].reshape(leaf.shape) > 0
        done += leaf.size
        values, name = np.abs(np.asarray(leaf, float)), "controls" + jax.tree_util.keystr(path)
        if leaf.size and here.all():
            yield name, float(values.max())
        else:
            for index in np.argwhere(here):
                yield f"{name}[{', '.join(map(str, index))}]", float(values[tuple(index)])


def _disagreement(probes: Probes, ends: list[int]) -> Iterator[str]:
    """On gradients that are noise, at the start or where noise exceeds all signal so far.

    At an optimum the mean gradient vanishes and two noises must disagree, so a low agreement alone
    says nothing later on: noise must also exceed the largest mean gradient of the search.
    """
    agreement, signal, noise = probes.agreement, probes.signal, probes.noise
    taken = [i for i in range(1, agreement.size) if not np.isnan(agreement[i])]
    bad = [
        i
        for i in taken
        if agreement[i] < AGREE and noise[i] ** 2 > 2 * np.nanmax(signal[: i + 1]) ** 2
    ]
    at_start = agreement[0] < AGREE
    # One probe of a few entries may disagree by accident.
    if not at_start and len(bad) < 2:
        return
    worst = 0 if at_start else min(bad, key=lambda i: agreement[i])
    where = "at the start" if at_start else f"at iteration {ends[worst] - 1}"
    more = f" (and at {len(bad)} of {len(taken)} later probes)" if at_start and bad else ""
    yield (
        f"Gradients of two noises agree to {agreement[worst]:.2g} only {where}{more}, where 1 is "
        "full agreement and 0 none: the learning rate is above the edge for gradients, or noise "
        "hides them; lower the rate, take fewer steps, or average over more members."
    )


def _spikes(state: State, cuts: bool) -> Iterator[str]:
    """On gradients far above the usual size."""
    norms = state.history.gradient_norm
    times = np.array([norms[i] / usual(norms[:i], state.probes) for i in range(1, len(norms))])
    count = int(np.sum(times > CUT))
    if count:
        first = int(np.argmax(times)) + 1
        verb = "gradient was" if count == 1 else "gradients were"
        how = f"cut to {CUT:g} times it" if cuts else "followed as they are"
        yield (
            f"{count} {verb} more than {CUT:g} times the usual size, the largest "
            f"{times.max():.2g} times at iteration {first}, and {how}: the likely cause is a "
            "learning rate near the stability limit 2/(largest curvature); lower it."
        )


def judged_multipliers(
    state: State, equalities: np.ndarray, tolerance: float, validation: int
) -> tuple[np.ndarray, list[str]]:
    """The multipliers (c,) of the best controls, and doubts where a residual contradicts them.

    At an optimum λ r = 0. A slack residual has the multiplier 0 if λ r is 0 within errors; else the
    multiplier stands, with the doubt.
    """
    best, scale = state.best, float(state.dual.scale)
    multipliers = np.asarray(state.dual.pull, float) * scale
    value_error, *errors = _errors(state.probes, best, validation)
    doubts = []
    for i, residual in enumerate(np.asarray(best.residuals, float)):
        slack = -residual - _ERRORS * errors[i] - tolerance
        if equalities[i] or not slack > 0 or multipliers[i] == 0:
            continue
        if multipliers[i] * -residual <= max(_NEGLIGIBLE * abs(float(best.value)), 2 * value_error):
            multipliers[i] = 0
            continue
        doubts.append(
            f"Complementarity fails: residual {i} is slack by {-residual:.2g} ± {errors[i]:.2g} "
            f"beside a multiplier of {multipliers[i]:.3g}. Noise of the residual drives the "
            "multiplier, or the search has not settled: average over more members, or take more "
            "iterations."
        )
    return multipliers, doubts


def _errors(probes: Probes, best: Candidate, validation: int) -> np.ndarray:
    """Errors (1+c,) of the value and the residuals on the held-out keys.

    Their own spread where there are enough keys, and no less than that of the probes.
    """
    own = np.append(float(best.value_error), np.asarray(best.residuals_error, float))
    return np.fmax(own, probes.spread / np.sqrt(validation))


def _listed(names: list[str]) -> str:
    most = 3
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
