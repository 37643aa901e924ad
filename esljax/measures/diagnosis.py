r"""Findings about a report: each with its evidence, its likely causes and the change to make.

`finding` holds the thresholds, `member_findings` the checks of members and snapshots, and
`number_findings` those of Σ, W2² and their errors.
"""

from collections.abc import Callable, Iterator
from typing import Any

from esljax.measures import member_findings as members
from esljax.measures import number_findings as numbers
from esljax.measures.finding import Finding, rounding

__all__ = ["Finding", "diagnose", "rounding"]

CHECKS: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    members.of_labels,
    members.of_members,
    numbers.of_convergence,
    numbers.of_errors,
    numbers.of_violation,
    numbers.of_negative,
    numbers.of_stability,
    numbers.of_disagreement,
    members.of_leaps,
    members.of_tails,
    members.of_snapshots,
    members.of_times,
    members.of_coordinates,
    members.of_rounding,
    numbers.of_epsilon,
    numbers.of_sampling,
    numbers.of_spacing,
    numbers.of_noise,
    numbers.of_resolution,
    numbers.of_extreme,
)
"""All checks of a report, the most serious first."""

OF_DISTANCES = (
    numbers.of_violation,
    numbers.of_negative,
    numbers.of_disagreement,
    numbers.of_epsilon,
    numbers.of_sampling,
    numbers.of_spacing,
    numbers.of_noise,
    numbers.of_extreme,
)
"""Those that compare distances, which say nothing where a problem was not solved."""


def diagnose(report: Any, convexity: float | None = None) -> tuple[Finding, ...]:
    """All findings about one report, the most serious first; none if nothing is wrong.

    **Args:** `report`: a `SpeedLimit` of one run or the average of several. `convexity`: a λ such
    that Φ is λ-convex, in units of the potential per θ²; with it the sharper bound
    U·D ≥ (x/2)coth(x/2) W2², x = λU, is checked too.
    """
    blocking = members.blocking(report)
    if blocking:
        # Ratios of numbers that are rounding, 0 or infinite are no second finding.
        return (*members.of_labels(report), *blocking)
    solved = bool(report.converged)
    checks = [check for check in CHECKS if solved or check not in OF_DISTANCES]
    findings = [finding for check in checks for finding in check(report)]
    if convexity is not None and solved:
        findings.extend(numbers.of_convexity(report, convexity))
    return tuple(findings)
