r"""Findings about a report: each with its evidence, its likely causes and the change to make.

`finding` holds the thresholds, `member_findings` the checks of members and snapshots, and
`number_findings` those of Σ, W2² and their errors.
"""

from typing import Any

from esljax.measures import member_findings, number_findings
from esljax.measures.finding import Finding, rounding

__all__ = ["Finding", "diagnose", "rounding"]


def diagnose(report: Any, convexity: float | None = None) -> tuple[Finding, ...]:
    """All findings about one report, the most serious first; none if nothing is wrong.

    **Args:** `report`: a `SpeedLimit` of one run or the average of several. `convexity`: a λ such
    that Φ is λ-convex, in units of the potential per θ²; with it the sharper bound
    U·D ≥ (x/2)coth(x/2) W2², x = λU, is checked too.
    """
    blocking = member_findings.blocking(report)
    if blocking:
        # Ratios of numbers that are rounding, 0 or infinite are no second finding.
        return (*member_findings.of_labels(report), *blocking)
    checks = (*member_findings.CHECKS, *number_findings.CHECKS)
    findings = [finding for check in checks for finding in check(report)]
    if convexity is not None:
        findings.extend(number_findings.of_convexity(report, convexity))
    return tuple(findings)
