r"""Findings about a report: each with its evidence, its likely causes and the change to make.

A finding is about the reliability of the numbers, not about the quality of a schedule. All
thresholds are in this file, each with its reason.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

# One false alarm in 30 000 healthy reports, if errors are Gaussian; they are not quite, and
# jackknife errors scatter by 10 to 20 %.
VIOLATION = 4.0
# The usual schedules stay below 6 times W2² on a contracting flow; the worst of them, a decay by
# e⁵, is at 5.2.
EXTREME = 20.0
# A chain that still changes by a fifth without every second snapshot has an error of the size of
# its temporal part.
SPACING = 0.2
NOISE = 0.2
EPSILON = 0.1
# A straight path at constant speed has no gap; by entropic transport at ε = .05 of the mean cost it
# came out up to 1.1 % of W2² below 0, and at .1 up to 2.4 % (200 members in 1, 2 and 5 dimensions
# that spread threefold).
INEXACT = 0.02
# Members of a stable run stay within some ten times their typical distance from the start of the
# ensemble.
DIVERGED = 100.0
# Heating from a cold start raises E[Φ] by about d T/2, and a stable run never climbs far above its
# start.
CLIMB = 10.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a report. `print` shows it in one line."""

    name: str
    """Its name, always the same for the same kind of finding, such as "bound violated"."""
    evidence: str
    """The observation, with numbers: a sentence."""
    causes: tuple[str, ...]
    """The likely causes, the likeliest first."""
    change: str
    """The change to make."""

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence} Likely: {'; '.join(self.causes)}. Try: {self.change}."


def diagnose(report: Any, convexity: float | None = None) -> tuple[Finding, ...]:
    """All findings about one report, the most serious first; none if nothing is wrong.

    **Args:** `report`: a `SpeedLimit` of one run or the average of several. `convexity`: a λ such
    that Φ is λ-convex, in units of the potential per θ²; with it the sharper bound
    U·D ≥ (x/2)coth(x/2) W2², x = λU, is checked too.
    """
    checks = (
        _members,
        _convergence,
        _violation,
        _negative,
        _stability,
        _epsilon,
        _spacing,
        _noise,
        _resolution,
        _extreme,
    )
    findings = [finding for check in checks for finding in check(report)]
    return (*findings, *([] if convexity is None else _convex(report, convexity)))


def _members(report: Any) -> Iterator[Finding]:
    if report.evidence is None:
        return
    distances = np.asarray(report.evidence.distances, float)
    links = distances.shape[0] - 1
    bad = ~np.isfinite(distances)
    kind = "is not finite"
    if not bad.any():
        typical = np.median(distances)
        bad = (
            (distances > DIVERGED * typical) & (distances > DIVERGED / 10 * distances[0])
            if typical > 0
            else bad
        )
        kind = f"is over {DIVERGED:g} times as far from the start as is typical"
    if bad.any():
        first = int(np.argmax(bad.any(axis=1)))
        members = np.flatnonzero(bad.any(axis=0))
        listed = ", ".join(map(str, members[:5])) + (", ..." if len(members) > 5 else "")
        steps = report.evidence.steps
        after = (
            ""
            if steps is None
            else f", after step {(first - 1) * steps // links} and by step {first * steps // links}"
        )
        yield Finding(
            "members diverged",
            f"{len(members)} of {distances.shape[1]} members (number {listed}) left; the first "
            f"{kind} from snapshot {first}{after}.",
            (
                "the learning rate is above the stability limit 2/(largest curvature)",
                "the start holds members far outside",
                "NaN in the data",
            ),
            "lower the learning rate where it happened, or warm it up",
        )


def _convergence(report: Any) -> Iterator[Finding]:
    if bool(report.converged):
        return
    evidence = report.evidence
    causes = ["too few iterations for this ε", "ε far below the squared spacing of the members"]
    sentence = "At least one transport problem did not converge: do not trust these numbers."
    if evidence is not None:
        squares = np.asarray(evidence.distances, float) ** 2
        with np.errstate(invalid="ignore"):
            share = np.max(squares.max(axis=1) / np.maximum(squares.sum(axis=1), 1e-300))
        if not np.isfinite(share):
            causes.insert(0, "members that are not finite")
        elif squares.shape[1] >= 8 and share > 0.5:
            sentence += f" A single member holds {100 * share:.0f} % of the second moment."
            causes.insert(0, "heavy tails: the second moment, and with it W2², may not exist")
        elif np.all(squares[0] == 0):
            sentence += " All members start at one point."
            causes.insert(0, "a point mass, for which entropic transport has no scale")
    yield Finding(
        "transport did not converge",
        sentence,
        tuple(causes),
        "raise ε or `max_iterations`, or use an exact or sliced transport",
    )


def _violation(report: Any) -> Iterator[Finding]:
    error = report.standard_error
    if report.gap_upper is not None:
        gap, size = float(report.gap_upper), None if error is None else float(error.gap_upper)
    else:
        sigma = max(float(report.entropy_production), float(report.chained))
        gap, size = sigma - float(report.w2_squared), None if error is None else float(error.gap)
    # A transport that is no metric may miss the inequality by itself, by less than this at a
    # suitable ε.
    inexact = 0.0 if report.is_bound else INEXACT * abs(float(report.w2_squared))
    if not gap < -max(rounding(report), inexact, 0 if size is None else VIOLATION * size):
        return
    by = f", {-gap / size:.1f} standard errors" if size else ""
    yield Finding(
        "bound violated",
        f"Σ is below W2² by {-gap:.4g}{by}, so Σ ≥ W2² does not hold.",
        (
            "Σ and W2² do not come from one geometry or one law",
            "the transport is no metric"
            if not report.is_bound
            else "an estimate of Σ that misses part of the velocity",
            "members that are not independent",
        ),
        "measure both sides in one transport, by a metric",
    )


def _negative(report: Any) -> Iterator[Finding]:
    sigma, error = float(report.entropy_production), report.standard_error
    size = 0.0 if error is None else VIOLATION * float(error.entropy_production)
    if sigma < -max(size, rounding(report)):
        yield Finding(
            "negative entropy production",
            f"Σ is {sigma:.4g}, and no velocity has a negative square.",
            (
                "a field fitted to too few members",
                "drift and noise that do not belong to these members",
                "a transport that is no metric",
            ),
            "use more members or a smaller class of fields",
        )


def _stability(report: Any) -> Iterator[Finding]:
    evidence = report.evidence
    if evidence is None or evidence.energies is None:
        return
    energies = np.asarray(evidence.energies, float)
    lowest = np.nanmin(energies) if np.isfinite(energies).any() else np.nan
    heat = evidence.coordinates * float(evidence.temperature or 0)
    allowed = CLIMB * (heat + abs(energies[0] - lowest)) + 1e-6 * abs(energies[0])
    climbed = energies[-1] - lowest
    if not climbed <= allowed:
        where = int(np.nanargmin(energies)) if np.isfinite(energies).any() else 0
        step = where * (evidence.steps or 0) // (len(energies) - 1)
        yield Finding(
            "rate above the stability limit",
            f"E[Φ] climbs from {energies[where]:.4g} at step {step} to {energies[-1]:.4g}, which "
            "no heating at this temperature explains.",
            (
                "the learning rate exceeds 2/(largest curvature)",
                "a drive that does work faster than the ensemble follows",
            ),
            f"lower the learning rate from step {step} on",
        )


def _epsilon(report: Any) -> Iterator[Finding]:
    doubled = None if report.evidence is None else report.evidence.doubled_epsilon
    if doubled is None:
        return
    whole = float(report.w2_squared)
    change = abs(float(doubled) - whole)
    if change > EPSILON * abs(whole):
        yield Finding(
            "ε dependence",
            f"Doubling ε changes W2² from {whole:.4g} to {float(doubled):.4g}.",
            ("ε is not small against the squared distance that the ensemble travels",),
            "lower ε until W2² stops changing, with more iterations",
        )


def _spacing(report: Any) -> Iterator[Finding]:
    coarse = report.entropy_production_coarse
    if coarse is None:
        return
    chain = float(report.chained)
    if abs(chain - float(coarse)) > SPACING * abs(chain):
        yield Finding(
            "Σ not converged in snapshot spacing",
            f"The chain's Σ is {chain:.4g} with all snapshots and {float(coarse):.4g} with every "
            "second one.",
            (
                "too few snapshots where the ensemble is fast",
                "sampling noise in every link, if n is small",
                "injected noise in every link",
            ),
            "take more snapshots; if Σ then rises without end, use more members, or a velocity "
            "estimator instead of the chain",
        )


def _noise(report: Any) -> Iterator[Finding]:
    if (
        report.noise_floor is None
        or report.identity_fraction is None
        or float(report.identity_fraction) <= 0.5
    ):
        return
    chain = float(report.chained)
    if float(report.noise_floor) > NOISE * chain:
        yield Finding(
            "noise-dominated chain",
            f"Injected noise alone contributes about {float(report.noise_floor):.3g} to the "
            f"chain's Σ of {chain:.3g}.",
            (
                "the temperature is high for so few members in so many dimensions",
                "snapshots so dense that noise outweighs the drift",
            ),
            "lower the temperature, take fewer snapshots, or measure moments or features",
        )


def _resolution(report: Any) -> Iterator[Finding]:
    if (
        report.evidence is None
        or report.identity_fraction is None
        or float(report.identity_fraction) <= 0.5
    ):
        return
    n, d = report.evidence.distances.shape[-1], report.evidence.coordinates
    if n <= d:
        yield Finding(
            "n too small for d",
            f"In {100 * float(report.identity_fraction):.0f} % of the links each of the {n} "
            f"members in {d} dimensions is its own best partner: the numbers describe the members' "
            "paths, not a resolved density.",
            ("fewer members than dimensions",),
            "project to fewer coordinates, measure features, or read Σ as the action of paths",
        )


def _extreme(report: Any) -> Iterator[Finding]:
    sigma, whole = float(report.entropy_production), float(report.w2_squared)
    if sigma > EXTREME * abs(whole) and sigma > rounding(report):
        yield Finding(
            "gap extreme",
            f"Σ is {sigma / abs(whole) if whole else np.inf:.3g} times W2².",
            (
                "an inefficient schedule, or a path that returns",
                "sampling noise in every link of the chain",
                "housekeeping: circulation that moves no mass",
            ),
            "compare `temporal`, `geometric` and `housekeeping`, and the chain with every second "
            "snapshot",
        )


def _convex(report: Any, convexity: float) -> Iterator[Finding]:
    x = convexity * float(report.learning_time)
    sharpened = (x / 2 / np.tanh(x / 2) if x else 1.0) * float(report.w2_squared)
    product = float(report.learning_time * report.dissipation)
    error = report.standard_error
    size = 0.0
    if error is not None and error.dissipation is not None:
        size = VIOLATION * np.hypot(
            float(report.learning_time * error.dissipation),
            sharpened / float(report.w2_squared) * float(error.w2_squared),
        )
    if product < sharpened - max(size, rounding(report)):
        yield Finding(
            "convex bound violated",
            f"U·D is {product:.4g}, below (x/2)coth(x/2) W2² = {sharpened:.4g} at x = {x:.3g}.",
            (
                "Φ is less convex than claimed",
                "Σ and W2² do not come from one law",
                "a chain with too few links",
            ),
            "check the convexity, then the snapshots",
        )


def rounding(report: Any) -> float:
    """The largest gap that rounding alone can make."""
    dtype = np.asarray(report.entropy_production).dtype
    return (
        8
        * float(np.finfo(dtype).eps)
        * (abs(float(report.entropy_production)) + abs(float(report.w2_squared)))
    )
