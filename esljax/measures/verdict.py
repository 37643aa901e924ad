"""The verdict of a report in three tiers, one sentence for each question.

First the number that can be trusted and what it is a number of; then where the waste is and what
would remove it; then the caveats.
"""

from typing import Any

import numpy as np

from esljax.results import measured

_NOTHING = "Nothing moved: all members are at the same place in every snapshot."
_UNSOLVED = "transport did not converge"
# Findings that leave the numbers nothing to say, and that name why.
_SILENCING = ("overflow", "underflow", "ε hides the motion", "rounded positions without motion")


def sentences(report: Any) -> list[str]:
    """Return the three tiers of one `SpeedLimit`, a line each; the last may be missing."""
    found = report.diagnose()
    findings = [finding.name for finding in found]
    for finding in found:
        if finding.name in _SILENCING:
            others = _on_findings([name for name in findings if name != finding.name])
            return [
                f"No verdict, by {finding.name}: {finding.evidence} Try: {finding.change}.",
                *([others] if others else []),
            ]
    if "nothing moved" in findings:
        nothing = next(finding for finding in found if finding.name == "nothing moved")
        others = _on_findings([name for name in findings if name != "nothing moved"])
        # A simulated run that stands still has reasons of its own.
        why = nothing.evidence.partition("is rounding.")[2]
        return [_NOTHING + why, *([others] if others else [])]
    if not bool(report.converged):
        unsolved = next(finding for finding in found if finding.name == _UNSOLVED)
        others = _on_findings(findings)
        return [
            "No verdict. A transport problem did not converge: do not trust these numbers. Whether "
            f"Σ ≥ W2² holds, and by how much, is not known. Try: {unsolved.change}.",
            *([others] if others else []),
        ]
    if not np.isfinite(float(report.entropy_production + report.gap + report.length_squared)):
        others = _on_findings(findings)
        return ["No verdict: the numbers are not finite.", *([others] if others else [])]
    caveats = (
        _on_the_geometry(report),
        _on_spacing(report),
        report.worth,
        _on_the_bound(report),
        _on_circulation(report),
        _on_noise(report),
        _on_pairing(report),
        _on_findings(findings),
    )
    tiers = (
        _on_the_limit(report, "bound violated" in findings),
        _on_the_waste(report),
        " ".join(sentence for sentence in caveats if sentence),
    )
    return [tier for tier in tiers if tier]


# --- The number -----------------------------------------------------------------------------------


def _on_the_limit(report: Any, violated: bool) -> str:
    sigma, whole = float(report.best("entropy_production")), float(report.best("w2_squared"))
    gap = float(report.gap)
    if sigma == 0 and gap == 0:
        return _on_rest(report)
    errors = report.standard_error
    if errors is not None and not np.isfinite(float(errors.gap)):
        return (
            f"No verdict on the speed limit: the gap is {gap:.4g}, and its standard error is not "
            "finite."
        )
    if errors is None:
        if not report.holds:
            return (
                f"The speed limit is violated by {-gap:.4g}: Σ and W2² do not come from one "
                "geometry, or an estimate is off; there is no standard error to judge that by."
            )
        return (
            f"The speed limit holds: {_ratio(sigma, whole)} (gap {gap:.4g}, without a standard "
            "error)."
        )
    within = report.interval("gap")
    lower, upper = float(within.lower), float(within.upper)
    between = (
        f"the gap Σ - W2² of {_subject(report)} lies within [{lower:.4g}, {upper:.4g}] at 95 %"
    )
    if violated:
        least = gap if report.gap_upper is None else min(gap, float(report.gap_upper))
        # With few groups of members even four standard errors may leave 0 inside of the interval.
        by = f", {-gap / float(errors.gap):.1f} standard errors" if upper < 0 else ""
        return (
            f"The speed limit is violated by {-least:.4g}{by}: Σ and W2² do not come from one "
            "geometry, or an estimate is off."
        )
    if upper < 0 or not report.holds:
        chance = ", or by chance" if report.holds else ""
        return (
            f"Σ came out below W2²: {between}. An estimate that misses part of the velocity does "
            f"that{chance}."
        )
    if _of_paths(report):
        return f"{_action(report)} Of the law behind them {_resolved(lower)}: {between}."
    if lower > 0:
        return f"The speed limit holds: {_ratio(sigma, whole)}; {between}."
    if (
        report.is_bound
        and report.entropy_production_chain is None
        and gap >= 0
        and not _debiased(report)
    ):
        # Of the members themselves the inequality is an identity.
        return f"The speed limit holds: {_ratio(sigma, whole)}; {between}."
    return f"These members do not resolve a gap: {between}, which includes 0."


def _on_rest(report: Any) -> str:
    """What is left to say where Σ and W2² are 0 and the members are not known to rest."""
    moves = None if report.evidence is None else np.asarray(report.evidence.displacements, float)
    if moves is None or not moves.any():
        return "Nothing moved: Σ and W2² are both 0."
    return (
        "Σ and W2² are both 0: in this transport the law did not move, while members moved by up "
        f"to {moves.max():.3g} in a link."
    )


def _ratio(sigma: float, whole: float) -> str:
    if whole <= 0:
        return f"Σ is {sigma:.4g}, and W2² cannot be distinguished from 0"
    return f"Σ is {sigma / whole:.3g} times W2²"


def _subject(report: Any) -> str:
    """What the numbers are numbers of."""
    if _of_paths(report):
        return "the law"
    if _paired(report) > 0.5:
        return "the members' own paths"
    if report.entropy_production_chain is not None:
        return "the law, estimated from velocities,"
    if _debiased(report):
        return "the law, estimated by a chain,"
    return "these samples, measured by a chain,"


def _debiased(report: Any) -> bool:
    return report.debiased_w2_squared is not None


def _of_paths(report: Any) -> bool:
    """Whether the plug-in numbers of a debiased chain are those of the members' own paths.

    They need no debiasing: of these members they are exact. Debiased numbers are of the law.
    """
    by_chain = report.entropy_production_chain is None
    return by_chain and _debiased(report) and _paired(report) > 0.5


def _action(report: Any) -> str:
    """The numbers of the members' own paths."""
    errors: Any = report.standard_error
    sigma = measured(report.entropy_production, errors.entropy_production, digits=4)
    distance = measured(report.w2_squared, errors.w2_squared, digits=4)
    times = float(report.entropy_production) / max(float(report.w2_squared), 1e-300)
    return (
        f"Of the members' own paths, Σ is {sigma}, {times:.3g} times their mean squared "
        f"displacement {distance}, which no paths between the same places go below."
    )


def _resolved(lower: float) -> str:
    return "these members resolve a gap" if lower > 0 else "these members resolve no gap"


# --- The waste ------------------------------------------------------------------------------------


def _on_the_waste(report: Any) -> str:
    """Where the gap comes from and what would remove it; nothing without a resolved split."""
    gap, errors = float(report.gap), report.standard_error
    if _of_paths(report) and errors is not None:
        return _waste_of_paths(report)
    if errors is not None and not float(report.interval("gap").lower) > 0:
        return ""
    if not gap > 0:
        return ""
    parts = []
    circulating = 0.0 if report.housekeeping is None else float(report.housekeeping)
    if circulating > 0.01 * gap and not _vanishes(report, "housekeeping"):
        parts.append(
            f"{_share(circulating, gap)} of the gap is circulation that moves no "
            "mass; dynamics without it would remove that"
        )
    unclear = report.length_resolved is not None and not bool(report.length_resolved)
    parts += _unsplit(report) if unclear else _split(report)
    joined = "; ".join(parts)
    return joined[0].upper() + joined[1:] + "."


def _waste_of_paths(report: Any) -> str:
    """The split of the members' own paths, from plug-in numbers."""
    sigma, length, distance = (
        float(getattr(report, name))
        for name in ("entropy_production", "length_squared", "w2_squared")
    )
    excess = sigma - distance
    if not excess > 0:
        return ""
    return (
        f"Of the excess of these paths, {_share(sigma - length, excess)} is uneven timing; at "
        f"constant speed they would produce Σ = {length:.4g}. {_share(length - distance, excess)} "
        "is their bend, which only another control than the learning rate removes."
    )


def _unsplit(report: Any) -> list[str]:
    """What is left to say of timing and bend where the speed is not resolved."""
    sentence = (
        "the speed does not stand out of its noise, so uneven timing cannot be separated from the "
        "bend of the path"
    )
    if report.standard_error is None:
        return [sentence]
    upper = float(report.interval("temporal").upper)
    return [sentence, f"timing accounts for between 0 and {upper:.3g} of Σ"]


def _split(report: Any) -> list[str]:
    """How much of the gap is timing and how much is bend."""
    gap, temporal, geometric = (
        float(getattr(report, name)) for name in ("gap", "temporal", "geometric")
    )
    best = float(report.best("length_squared"))
    timing = f"{_share(temporal, gap)} of the gap is uneven timing"
    if _vanishes(report, "temporal"):
        timing = "uneven timing cannot be distinguished from 0"
    elif report.mobility is not None and temporal > 0:
        timing += f"; the schedule of esl.constant_speed(report) promises Σ = {best:.4g} without it"
    elif temporal > 0:
        timing += f"; the same path at constant speed would produce Σ = {best:.4g}"
    bend = (
        "the bend of the path cannot be distinguished from 0"
        if _vanishes(report, "geometric")
        else f"{_share(geometric, gap)} is the bend of the path, which only another control than "
        "the learning rate removes"
    )
    return [timing, bend]


def _vanishes(report: Any, name: str) -> bool:
    """Whether the interval of a part reaches below 0; False without errors."""
    if report.standard_error is None:
        return False
    return float(report.interval(name).lower) < 0


def _share(part: float, gap: float) -> str:
    return f"{100 * part / gap:.0f} %"


# --- The caveats ----------------------------------------------------------------------------------


def _on_the_geometry(report: Any) -> str:
    if report.is_bound:
        return ""
    return "This transport is not a metric, so the inequality holds only approximately."


def _on_spacing(report: Any) -> str:
    if report.entropy_production_coarse is None:
        return ""
    name = "Σ" if report.entropy_production_chain is None else "the chain's Σ"
    change = float(report.chained - report.entropy_production_coarse)
    return (
        f"Halving the number of snapshots changes {name} by {change:.3g}, so spacing still hides "
        f"about {float(report.hidden_by_spacing):.2g}."
    )


def _on_the_bound(report: Any) -> str:
    bound = report.entropy_production_bound
    if bound is None:
        return ""
    if float(bound) < 0:
        return f"The lower bound of Σ, {float(bound):.4g}, is below 0 and carries no information."
    if float(bound) < float(report.best("w2_squared")):
        return (
            f"The lower bound of Σ, {float(bound):.4g}, is below W2² and carries no information "
            "beyond it."
        )
    return ""


def _on_circulation(report: Any) -> str:
    if report.circulation == "contained":
        return (
            "This estimator does not tell circulation from transport: whatever circulates is "
            "contained in Σ and L², and L² is an upper value."
        )
    return ""


def _on_noise(report: Any) -> str:
    if report.entropy_production_chain is not None or report.noise_floor is None:
        return ""
    floor = float(report.noise_floor)
    if floor <= 0.05 * float(report.entropy_production):
        return ""
    # The floor belongs to links whose assignment is the identity; where members change partners
    # the noise is mostly reassigned away.
    if _paired(report) > 0.5:
        return (
            "The chain is noise-dominated: injected noise alone contributes up to "
            f"{floor:.3g} to Σ."
        )
    return (
        f"Injected noise would contribute {floor:.3g} to Σ if no member changed partners; here "
        "most links do."
    )


def _on_pairing(report: Any) -> str:
    share = _paired(report)
    if share <= 0.5:
        return ""
    numbers, distance = "the numbers", "W2²"
    if _debiased(report):
        numbers, distance = "the plug-in numbers", "the plug-in W2²"
    return (
        f"In {100 * share:.0f} % of the links each member is its own best partner: {numbers} "
        f"describe the members' paths, not a resolved density, and {distance} is the mean squared "
        "displacement of the members, an upper value of that between laws."
    )


def _on_findings(findings: list[str]) -> str:
    # The other sentences of the verdict already name these.
    named = {
        "bound violated",
        "transport did not converge",
        "noise-dominated chain",
        "n too small for d",
    }
    others = [name for name in findings if name not in named]
    return f"See diagnose() for: {', '.join(others)}." if others else ""


def _paired(report: Any) -> float:
    """The share of the links in which each member is its own best partner; 0 if it is unknown."""
    return 0.0 if report.identity_fraction is None else float(report.identity_fraction)
