"""A comparison in rows, in sentences and in plain numbers: what it prints and what it reports."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from esljax.experiment.judging import Judgment, agreement, ratio
from esljax.experiment.problem import ACCURACY
from esljax.experiment.runs import QUANTITIES, WITH_ERROR
from esljax.experiment.settings import in_words
from esljax.results import concise

_SQUARED = "squared parameters"
_HEADINGS = {ACCURACY: "accuracy"}


# --- Numbers --------------------------------------------------------------------------------------


def numbers(comparison: Any) -> dict[str, Any]:
    """All numbers of a comparison, in types that JSON holds, with their units."""
    judgments = comparison.judgments
    return {
        "rate": comparison.rate,
        "target_loss": comparison.target,
        "schedules": {name: _schedule(judgment) for name, judgment in judgments.items()},
        "optimized": _examined(comparison),
        "paths": agreement(judgments)._asdict() if len(judgments) > 1 else None,
        "units": units(comparison),
    }


def _schedule(judgment: Judgment) -> dict[str, Any]:
    report = judgment.report
    errors: Any = report.standard_error
    rates = judgment.schedule.values[:-1]
    return {
        **{name: float(getattr(report, name)) for name in WITH_ERROR},
        "efficiency": float(report.efficiency),
        "dissipation": known(report.dissipation),
        "final_loss": float(judgment.final_loss),
        **{name: float(value) for name, value in judgment.metrics.items()},
        "learning_time": known(report.learning_time),
        "noise_floor": known(report.noise_floor),
        "identity_fraction": known(report.identity_fraction),
        "transport_converged": bool(report.converged),
        "learning_rates": [float(rate) for rate in rates],
        "schedule": judgment.schedule.as_dict(),
        "standard_error": {
            **{name: float(getattr(errors, name)) for name in WITH_ERROR},
            "dissipation": known(errors.dissipation),
            "final_loss": float(judgment.standard_error.final_loss),
            **{name: float(judgment.standard_error.get(name)) for name in judgment.metrics},
            # The rates are given, not estimated.
            "learning_time": 0.0,
        },
    }


def _examined(comparison: Any) -> dict[str, Any]:
    """The numbers of the optimized schedule alone."""
    bracket: Any = comparison.bracket
    batches: Any = comparison.batches
    examined = comparison.examination
    proved, proved_error = (None, None) if examined is None else examined.observable_limit
    of_members: Any = None if examined is None else examined.member_error
    sides = ("lower", "lower_error", "upper", "upper_error")
    return {
        "debiased_w2_squared": None if bracket is None else float(bracket.lower),
        "w2_bracket": None
        if bracket is None
        else {
            **{side: float(getattr(bracket, side)) for side in sides},
            "geometry": bracket.geometry,
        },
        "entropy_production_of_loss": proved,
        "batch_temperature": None
        if batches is None
        else [float(temperature) for temperature in batches.temperature],
        "batch_floor": None if batches is None else float(batches.floor),
        "standard_error": {
            "debiased_w2_squared": None if bracket is None else float(bracket.lower_error),
            "entropy_production_of_loss": proved_error,
            "batch_floor": None if batches is None else float(batches.standard_error.floor),
        },
        "standard_error_of_one_run": None
        if of_members is None
        else {name: float(of_members.get(name)) for name in WITH_ERROR},
    }


def units(comparison: Any) -> dict[str, str]:
    """The unit of each number in a report."""
    nats = unit_of_loss(comparison) == "nats"
    loss, one = ("nats per example", "nat") if nats else ("units of the loss", "unit of loss")
    return {quantity.name: quantity.units for quantity in QUANTITIES} | {
        "efficiency": "1",
        "dissipation": loss,
        "final_loss": loss,
        "identity_fraction": "1",
        "learning_rates": f"squared parameters per {one} and step",
        "debiased_w2_squared": _SQUARED,
        "w2_bracket": _SQUARED,
        "entropy_production_of_loss": _SQUARED,
        "standard_error_of_one_run": _SQUARED,
        "batch_temperature": loss,
        "batch_floor": _SQUARED,
    }


def known(value: Any) -> float | None:
    """A number as JSON holds it; None where there is none."""
    return None if value is None else float(value)


# --- Words ----------------------------------------------------------------------------------------


def title(comparison: Any) -> str:
    """What the rows are."""
    runs = next(iter(comparison.judgments.values())).entropy_productions.size
    return (
        f"Matched final loss, {runs} held-out runs; digits in parentheses: standard error of the "
        "last digits"
    )


def rows(comparison: Any) -> list[tuple[str, ...]]:
    """The headings and one row for each schedule, least Σ first."""
    some = next(iter(comparison.judgments.values()))
    headings = ("schedule", "Σ", "L²", "W2²", "gap", "temporal", "geometric", "W2²/Σ", "U")
    metrics = (_HEADINGS.get(name, in_words(name)) for name in some.metrics)
    lines: list[tuple[str, ...]] = [(*headings, "final loss", *metrics)]
    for name, judgment in comparison.judgments.items():
        report, errors = judgment.report, judgment.standard_error
        lines.append(
            (
                in_words(name),
                *(
                    concise(getattr(report, number), getattr(report.standard_error, number))
                    for number in WITH_ERROR
                ),
                f"{float(report.efficiency):.3f}",
                "unknown" if report.learning_time is None else f"{float(report.learning_time):.4g}",
                concise(judgment.final_loss, errors.final_loss),
                *(concise(value, errors.get(name)) for name, value in judgment.metrics.items()),
            )
        )
    return lines


def sentences(comparison: Any) -> Iterator[str]:
    """Units, what was gained, what is left above the limit, and reasons to doubt it."""
    unit = unit_of_loss(comparison)
    one = "nat" if unit == "nats" else "unit of loss"
    losses = "nats (loss)" if unit == "nats" else "units of the loss"
    yield f"Units: squared parameters (Σ, L², W2² and the parts), the same per {one} (U), {losses}."
    yield from _gains(comparison)
    yield from _on_the_limit(comparison)
    yield from _on_the_laws(comparison)
    yield from _on_the_path(comparison)
    yield from _doubts(comparison)


def unit_of_loss(comparison: Any) -> str:
    """Nats for the cross entropy of a classifier, whose accuracy is known; else words."""
    some = next(iter(comparison.judgments.values()))
    return "nats" if ACCURACY in some.metrics else "units of the loss"


def _gains(comparison: Any) -> Iterator[str]:
    """How much less Σ than the schedules in common use, and how much of that needs no search."""
    judgments, optimized = comparison.judgments, comparison.optimized
    usual, rising = comparison.best_usual, comparison.best_rising
    if optimized is None or usual is None:
        return
    yield (
        f"At the same final loss {comparison.target:.4g}, the optimized schedule produces "
        f"{_share(optimized, judgments[usual])} times the entropy of the best schedule in common "
        f"use ({in_words(usual)})."
    )
    others = [
        ("the best rising shape ({})", rising),
        (
            "the first shape passed at constant speed ({})",
            "retimed" if "retimed" in judgments else None,
        ),
    ]
    known = [(words.format(in_words(name)), judgments[name]) for words, name in others if name]
    if known:
        shares = ", ".join(f"{_share(each, judgments[usual])} by {words}" for words, each in known)
        adds = all(ratio(optimized, each)[0] < 1 for _, each in known)
        rest = "the rest is what the search adds" if adds else "the search adds nothing to that"
        yield f"Without a search: {shares}; {rest}."


def _on_the_limit(comparison: Any) -> Iterator[str]:
    """What is left above W2², and what that W2² is."""
    optimized = comparison.optimized
    if optimized is None:
        return
    report = optimized.report
    over = float(report.entropy_production / report.w2_squared)
    left = float(report.temporal / report.w2_squared)
    yield (
        f"Its Σ is {over:.3f} times W2²; {left:.2%} of W2² is left to timing, the rest is the bend "
        "of the path."
    )
    share = known(report.identity_fraction)
    paired = share is not None and share > 0.5
    if paired:
        yield (
            f"This W2² is the mean squared displacement of {comparison.members} members (each is "
            f"its own best partner in {share:.0%} of the links), an upper value of the squared "
            "distance between the laws."
        )


def _on_the_laws(comparison: Any) -> Iterator[str]:
    """The law's own W2² of the examined schedule, and what else is known of its Σ."""
    examined = comparison.examination
    if examined is None:
        return
    if examined.bracket is not None:
        pairs = next(iter(comparison.judgments.values())).report.identity_fraction is not None
        yield (
            str(examined.bracket)
            if pairs
            else f"Without sampling bias, W2² is {concise(*comparison.debiased_w2_squared)}."
        )
    yield (
        f"The change of the loss alone proves a Σ of {concise(*examined.observable_limit)}, "
        "whatever the path."
    )
    errors: Any = examined.member_error
    if errors is not None:
        known_to = float(errors.entropy_production)
        yield f"One run of {comparison.members} members alone knows Σ to ± {known_to:.2g}."


def _on_the_path(comparison: Any) -> Iterator[str]:
    """How far the schedules pass one path, and the noise that bends it."""
    judgments = comparison.judgments
    if len(judgments) > 1:
        same = agreement(judgments)
        yield (
            f"L² agrees over the schedules to {same.spread:.2%} (χ² of equality "
            f"{same.chi_squared:.3g} on {same.freedom} degrees of freedom): that far, schedules "
            "re-time one path."
        )
    known = [judgment.report.dissipation for judgment in judgments.values()]
    dissipations = [float(dissipation) for dissipation in known if dissipation is not None]
    if dissipations:
        least, most = min(dissipations), max(dissipations)
        unit = unit_of_loss(comparison)
        between = f"{least:.4g} to {most:.4g} {unit}"
        yield f"The dissipated free energy D is {between} over the schedules."
    batches: Any = comparison.batches
    optimized = comparison.optimized
    examined = "optimized" if optimized is not None else next(iter(judgments))
    if batches is not None and batches.temperature is not None:
        low, high = float(jnp.min(batches.temperature)), float(jnp.max(batches.temperature))
        yield (
            f"Along the {in_words(examined)} schedule, batches spread members as injected noise of "
            f"temperature {low:.2g} to {high:.2g} {unit_of_loss(comparison)} would, which is not "
            f"tied to the rate; in Σ they make up to {float(batches.floor):.2g}."
        )
    if optimized is not None and optimized.report.noise_floor is not None:
        yield f"Injected noise makes up to {float(optimized.report.noise_floor):.2g} of its Σ."


def _doubts(comparison: Any) -> Iterator[str]:
    """The reasons not to believe the table."""
    optimum, optimized = comparison.optimum, comparison.optimized
    if optimum is not None:
        if optimum.interrupted or optimum.message != "Ran all iterations.":
            yield optimum.message
        yield from optimum.doubts
    yield from comparison.left_out
    if optimized is not None and comparison.misses_target:
        yield (
            f"Its held-out final loss {float(optimized.final_loss):.4g} misses the target by more "
            "than 1 %."
        )
    reports = [judgment.report for judgment in comparison.judgments.values()]
    if not all(bool(report.converged) for report in reports):
        yield "Some transport problems did not converge: do not trust these numbers."
    floors = [
        (report.noise_floor, report.entropy_production)
        for report in reports
        if report.noise_floor is not None
    ]
    if any(float(floor) > 0.05 * float(sigma) for floor, sigma in floors):
        yield (
            "Injected noise alone makes up more than 5 % of some Σ (its floor): lower the "
            "temperature before comparing."
        )


def _share(first: Judgment, second: Judgment) -> str:
    mean, error = ratio(first, second)
    return f"{mean:.3f} ± {error:.3f}"


def limit_in_figures(comparison: Any) -> str:
    """The name of W2² in a figure: a displacement where each member is its own best partner."""
    name = f"$W_2^2$ of {comparison.members} members"
    reports = [judgment.report for judgment in comparison.judgments.values()]
    shares = [known(report.identity_fraction) for report in reports]
    paired = all(share is not None and share > 0.5 for share in shares)
    return f"{name}: their displacement" if paired else name
