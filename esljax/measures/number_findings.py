"""Findings about the numbers of a report: Σ, W2², their bounds, noise and convergence."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from esljax.measures import finding as at
from esljax.measures.finding import Finding, listed, rounding
from esljax.measures.member_findings import durations


def of_convergence(report: Any) -> Iterator[Finding]:
    """Transport problems that were not solved."""
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


def of_errors(report: Any) -> Iterator[Finding]:
    """Standard errors that are no numbers."""
    errors = report.standard_error
    if errors is None:
        return
    lost = [
        name
        for name, error in errors.numbers.items()
        if error is not None
        and not np.isfinite(float(error))
        and np.isfinite(float(getattr(report, name)))
    ]
    if lost:
        yield Finding(
            "errors are not finite",
            f"The standard error of {listed(lost, 3)} is no finite number, while the number is.",
            (
                "groups of members whose own problems were not solved, or are too large or small "
                "for their type",
            ),
            "measure with jackknife=0, leave members far outside out, or compute in float64",
        )


def of_violation(report: Any) -> Iterator[Finding]:
    """Σ below W2²."""
    error = report.standard_error
    if report.gap_upper is not None:
        gap, size = float(report.gap_upper), None if error is None else float(error.gap_upper)
    else:
        sigma = max(float(report.entropy_production), float(report.chained))
        gap, size = sigma - float(report.w2_squared), None if error is None else float(error.gap)
    # A transport that is no metric may miss the inequality by itself, by less than this at a
    # suitable ε.
    inexact = 0.0 if report.is_bound else at.INEXACT * abs(float(report.w2_squared))
    if not gap < -max(rounding(report), inexact, 0 if size is None else at.VIOLATION * size):
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


def of_negative(report: Any) -> Iterator[Finding]:
    """Σ below 0."""
    sigma, error = float(report.entropy_production), report.standard_error
    size = 0.0 if error is None else at.VIOLATION * float(error.entropy_production)
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


def of_stability(report: Any) -> Iterator[Finding]:
    """E[Φ] that climbs."""
    evidence = report.evidence
    if evidence is None or evidence.energies is None:
        return
    energies = np.asarray(evidence.energies, float)
    lowest = np.nanmin(energies) if np.isfinite(energies).any() else np.nan
    heat = evidence.coordinates * float(evidence.temperature or 0)
    allowed = at.CLIMB * (heat + abs(energies[0] - lowest)) + 1e-6 * abs(energies[0])
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


def of_disagreement(report: Any) -> Iterator[Finding]:
    """Velocities that the chain of the same snapshots contradicts.

    Both estimate the part of Σ that moves mass: the velocity from the drift and the noise that the
    run is said to have, the chain from the members alone.
    """
    if report.entropy_production_chain is None or report.bound == "upper":
        return
    resolved = report.housekeeping is not None
    sigma = float(report.entropy_production)
    moving = sigma - (float(report.housekeeping) if resolved else 0.0)
    chains = [float(report.entropy_production_chain)]
    debiased = report.debiased_entropy_production
    allowed = float(report.hidden_by_spacing)
    # The trapezoid of a velocity errs by less than its distance from the mean speed of each link.
    steady = float(np.sum(np.asarray(report.speed, float) ** 2 * durations(report)))
    allowed += min(max(moving - steady, 0.0), abs(moving) / 2)
    if debiased is not None:
        chains.append(float(debiased))
    names = ("entropy_production", "debiased_entropy_production")
    error = max(_error(report, name) for name in names)
    # Finite differences between snapshots share the sampling bias of the chain.
    rest = moving - allowed - at.DISAGREEING * error
    above = moving > at.DISAGREEMENT * max(chains) and (
        rest > at.DISAGREEMENT * max(chains[-1], 0.0)
    )
    # A class of fields may miss part of a velocity. Affine fields miss nothing of a chain of
    # moments, whatever the law.
    exact = debiased is not None and report.evidence is not None and report.evidence.moments_only
    rest = min(chains) - allowed - at.VIOLATION * error
    below = exact and rest > at.DISAGREEMENT * max(moving, 0.0)
    if not (above or below):
        return
    chain = chains[-1]
    ratio = f"{moving / chain:.3g} times" if chain > 0 else "beside"
    yield Finding(
        "velocity and chain disagree",
        f"By velocities {moving:.4g} of Σ moves mass, {ratio} the chain's "
        f"{'' if debiased is None else 'debiased '}{chain:.4g} of the same snapshots; spacing "
        f"explains {allowed:.2g}, and the error is {error:.2g}.",
        (
            "a potential, learning rates or temperatures that are not those of the run",
            *([] if resolved else ["circulation, which this estimator does not tell apart"]),
            "snapshots too far apart for both",
        ),
        "give the potential, rates and temperatures that moved these members, or measure by "
        "TransportVelocity, which needs none of them",
    )


def of_epsilon(report: Any) -> Iterator[Finding]:
    """W2² that depends on ε."""
    doubled = None if report.evidence is None else report.evidence.doubled_epsilon
    if doubled is None:
        return
    whole = float(report.w2_squared)
    change = abs(float(doubled) - whole)
    if change > at.EPSILON * abs(whole):
        yield Finding(
            "ε dependence",
            f"Doubling ε changes W2² from {whole:.4g} to {float(doubled):.4g}.",
            ("ε is not small against the squared distance that the ensemble travels",),
            "lower ε until W2² stops changing, with more iterations",
        )


def of_sampling(report: Any) -> Iterator[Finding]:
    """A chain whose Σ, L² or bend is mostly sampling noise."""
    if report.entropy_production_chain is not None:
        return
    if report.noise_floor is not None and _paired(report) > at.FOLLOWED:
        # Such a chain is a mean over the members' own paths: its bias is their noise, which has a
        # finding of its own.
        return
    for name, plain, value, error, least in _biased(report):
        # The noise of steps has a finding of its own.
        excess = plain - value - _floor(report)
        if not excess > max(at.SAMPLING * (max(value, 0.0) + 2 * error), least):
            continue
        yield Finding(
            "sampling noise",
            f"The chain's {name} is {plain:.4g}, and {value:.4g} without its sampling bias: "
            "of laws a chain is a lower bound, of so few members it errs upward.",
            (
                "snapshots so dense that the law moves less in a link than its sampling error",
                "few members for these dimensions",
            ),
            "use more members, fewer snapshots, moments (GaussianTransport), a projection, or "
            "velocities",
        )
        return


def _debiased(report: Any) -> Any:
    """Return what has the debiased numbers of the chain; None if nothing has.

    Errors of a distance between moments know its bias as well.
    """
    if report.debiased_entropy_production is not None:
        return report
    return None if report.evidence is None else report.evidence.corrected


def _biased(report: Any) -> Iterator[tuple[str, float, float, float, float]]:
    """Of Σ, L² and the bend: the plain and the debiased value, the error of this, and how large a
    bias must be to matter."""
    debiased = _debiased(report)
    if debiased is None:
        return
    prefix = "debiased_" if debiased is report else ""
    sigma, length, whole = (
        float(getattr(debiased, f"debiased_{name}"))
        for name in ("entropy_production", "length_squared", "w2_squared")
    )
    plain = float(report.length_squared)
    error = _error(report, f"{prefix}entropy_production")
    yield "Σ", float(report.entropy_production), sigma, error, 0.0
    error = _error(report, f"{prefix}length_squared")
    yield "L²", plain, length, error, 0.0
    if report.length_resolved is not None and bool(report.length_resolved):
        bend, error = plain - float(report.w2_squared), _error(report, "geometric")
        # A path that is nearly straight has hardly any bend to compare with.
        yield "L² - W2²", bend, length - whole, error, at.BENT * plain


def of_spacing(report: Any) -> Iterator[Finding]:
    """A chain that more snapshots would change, and not by noise."""
    coarse = report.entropy_production_coarse
    if coarse is None or report.entropy_production_chain is not None:
        return
    chain = float(report.entropy_production)
    change = abs(chain - float(coarse))
    corrected = _debiased(report)
    debiased = None if corrected is None else corrected.debiased_entropy_production
    # Links twice as long carry a quarter of the bias of sampling and half of the noise of steps.
    floor = _floor(report)
    noise = floor / 2
    if debiased is not None:
        noise += 0.75 * max(chain - float(debiased) - floor, 0)
    if change - noise > at.SPACING * abs(chain):
        known = "" if debiased is None else " Sampling noise does not explain it."
        yield Finding(
            "Σ not converged in snapshot spacing",
            f"The chain's Σ is {chain:.4g} with all snapshots and {float(coarse):.4g} with every "
            f"second one.{known}",
            (
                "too few snapshots where the ensemble is fast",
                *(["sampling noise in every link, if n is small"] if debiased is None else []),
                "noise of the steps in every link",
            ),
            "take more snapshots; if Σ then rises without end, use more members, or a velocity "
            "estimator instead of the chain"
            if debiased is not None
            else "measure with debias=True: if the debiased Σ is as high, take more snapshots; if "
            "it is lower, use more members, moments or a projection",
        )


def of_noise(report: Any) -> Iterator[Finding]:
    """A chain made of injected noise."""
    floor = _floor(report)
    if report.entropy_production_chain is not None:
        return
    chain = float(report.entropy_production)
    if floor > at.NOISE * chain:
        yield Finding(
            "noise-dominated chain",
            f"Injected noise alone contributes about {floor:.3g} to the chain's Σ of {chain:.3g}.",
            (
                "the temperature is high for so few members in so many dimensions",
                "snapshots so dense that noise outweighs the drift",
            ),
            "lower the temperature, take fewer snapshots, or measure moments or features",
        )


def of_resolution(report: Any) -> Iterator[Finding]:
    """Fewer members than dimensions."""
    if report.evidence is None:
        return
    n, d = report.evidence.distances.shape[-1], report.evidence.coordinates
    if n > d:
        return
    share = _paired(report)
    if share > 0.5:
        evidence = (
            f"In {100 * share:.0f} % of the links each of the {n} members in {d} dimensions is its "
            "own best partner: the numbers describe the members' paths, not a resolved density."
        )
    elif report.evidence.moments_only:
        evidence = (
            f"{n} members in {d} dimensions have a covariance of rank {n - 1}: the distance "
            "compares so many directions, which turn with every member, and not the law's moments."
        )
    else:
        return
    yield Finding(
        "n too small for d",
        evidence,
        ("fewer members than dimensions",),
        "project to fewer coordinates, measure features, or read Σ as the action of paths",
    )


def of_extreme(report: Any) -> Iterator[Finding]:
    """Σ far above W2²."""
    sigma, whole = float(report.entropy_production), float(report.w2_squared)
    least, most = sigma, abs(whole)
    debiased = report.debiased_w2_squared
    if debiased is not None:
        # The debiased numbers at those ends of their errors that are least in favor.
        chain = report.entropy_production_chain is None
        name = "debiased_entropy_production" if chain else "entropy_production"
        sigma, whole = float(getattr(report, name)), float(debiased)
        least, most = sigma, max(whole, 0.0)
        least -= at.VIOLATION * _error(report, name)
        most += at.VIOLATION * _error(report, "debiased_w2_squared")
    if least > at.EXTREME * most and least > rounding(report):
        yield Finding(
            "gap extreme",
            f"Σ is {sigma / whole:.3g} times W2²."
            if whole > 0
            else f"Σ is {sigma:.4g} while W2² is {whole:.3g}.",
            (
                "an inefficient schedule, or a path that returns",
                *(["sampling noise in every link of the chain"] if debiased is None else []),
                "housekeeping: circulation that moves no mass",
            ),
            "compare `temporal`, `geometric` and `housekeeping`, and the chain with every second "
            "snapshot",
        )


def _paired(report: Any) -> float:
    """The share of links in which each member is its own best partner; 0 if it is not known."""
    share = report.identity_fraction
    labels = None if report.evidence is None else report.evidence.labels
    if share is None and labels is not None:
        share = labels.identity_fraction
    return 0.0 if share is None else float(share)


def _error(report: Any, name: str) -> float:
    """The standard error of a number; 0 if it has none."""
    errors = report.standard_error
    error = None if errors is None else errors.get(name)
    return 0.0 if error is None else float(error)


def _floor(report: Any) -> float:
    """The noise of steps in the chain's Σ; 0 where members change partners or it is not known."""
    floor = report.noise_floor
    return 0.0 if floor is None or _paired(report) <= 0.5 else float(floor)


def of_convexity(report: Any, convexity: float) -> Iterator[Finding]:
    """U·D below the sharper bound of a λ-convex potential."""
    x = convexity * float(report.learning_time)
    sharpened = (x / 2 / np.tanh(x / 2) if x else 1.0) * float(report.w2_squared)
    product = float(report.learning_time * report.dissipation)
    whole = float(report.w2_squared)
    size = at.VIOLATION * np.hypot(
        float(report.learning_time) * _error(report, "dissipation"),
        (sharpened / whole if whole else 0.0) * _error(report, "w2_squared"),
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
