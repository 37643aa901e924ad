r"""The numbers of a report without their sampling bias, with their standard errors.

Squared distances between moments are smooth functions of means over the members: a jackknife
removes their bias b with little noise of its own. Other distances come debiased by halves of the
members. L² = (Σ_j ℓ_j Δs_j)² is made of roots, whose curvature bends noise into bias, and is
corrected by the jackknife in any case. Errors are those of the module `errors`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esljax._numerics import debiased_variance, safe_root
from esljax._types import Array
from esljax.measures.chain import Distances
from esljax.measures.errors import (
    Groups,
    jackknife_bias,
    jackknife_variance,
    resolved_squares,
)
from esljax.measures.evidence import Corrected
from esljax.measures.report import NUMBERS, SpeedLimit
from esljax.measures.velocities import MemberRates

Numbers = dict[str, Any]

# Means over members of terms that they share: no bias, and no other version.
_MEANS = ("entropy_production_bound", "housekeeping", "dissipation")


def plain(report: SpeedLimit, rates: MemberRates | None, solved: Distances) -> Numbers:
    """The numbers of a report before any correction.

    "chain", "length" and "distance" are those that will be corrected: Σ of the chain, L² and W2²,
    of the halves of the members where there are any. "sigma" is the Σ of the gap, and "squares" are
    the squared speeds behind the length.
    """
    halves = solved.debiased_links is not None
    links: Any = solved.debiased_links if halves else solved.links
    whole: Any = solved.debiased_whole if halves else solved.whole
    chain = report.debiased_entropy_production if halves else report.chained
    heat = report.debiased_dissipation if halves and rates is None else report.dissipation
    numbers = {name: getattr(report, name) for name in _MEANS}
    plug_in = {
        "length_squared": report.length_squared,
        "w2_squared": report.w2_squared,
        "chain_plug_in": report.chained,
        "chain_above": report.chained + report.hidden_by_spacing,
    }
    if rates is None:
        own = {"sigma": chain, "length": jnp.sum(safe_root(links)) ** 2, "squares": links}
    else:
        squares = jnp.mean(rates.moving, axis=1)
        own = {
            "sigma": report.entropy_production,
            "length": report.length_squared,
            "squares": squares,
        }
    return {**numbers, **plug_in, **own, "chain": chain, "distance": whole, "heat": heat}


def corrected(
    report: SpeedLimit,
    full: Numbers,
    covered: Numbers,
    replicates: Numbers,
    groups: Groups,
    members: int,
    debias: bool,
) -> tuple[SpeedLimit, Numbers]:
    """The report, debiased if asked for, and the standard errors of its numbers by name.

    **Args:** `full`: the plain numbers of all n = `members`. `covered`: of those that groups hold.
    `replicates`: of those without each group, on a leading axis. `debias`: whether the report gets
    debiased numbers.
    """
    by_velocity = report.entropy_production_chain is not None
    halves = report.debiased_w2_squared is not None

    def variance(x: Array) -> Array:
        return jackknife_variance(x, groups, members)

    def without_bias(name: str) -> Array:
        return full[name] - jackknife_bias(covered[name], replicates[name], groups)

    squares = full["squares"] if by_velocity or halves else without_bias("squares")
    clear = resolved_squares(squares, variance(replicates["squares"]))
    report = dataclasses.replace(report, length_resolved=clear)
    evidence = report.evidence
    if not debias and not by_velocity and evidence is not None and evidence.moments_only:
        known = Corrected(*(without_bias(name) for name in ("chain", "length", "distance")))
        evidence = dataclasses.replace(evidence, corrected=jax.lax.stop_gradient(known))
        report = dataclasses.replace(report, evidence=evidence)
    if debias:
        chain, distance, heat = (
            full[name] if halves or full[name] is None else without_bias(name)
            for name in ("chain", "distance", "heat")
        )
        report = dataclasses.replace(
            report,
            debiased_entropy_production=chain,
            debiased_length_squared=without_bias("length"),
            debiased_w2_squared=distance,
            debiased_dissipation=None if by_velocity else heat,
        )
    return report, _errors(report, replicates, variance, debias and not halves)


def _errors(report: Any, x: Numbers, variance: Callable[[Array], Array], smooth: bool) -> Numbers:
    """The standard errors of a corrected report, from the numbers `x` without each group.

    **Args:** `smooth`: whether a jackknife has removed the bias of the distances.
    """
    variances = {name: variance(x[name]) for name in _MEANS if x[name] is not None}
    moving = x["sigma"] if x["housekeeping"] is None else x["sigma"] - x["housekeeping"]
    variances |= {
        "metric_action": variance(moving),
        "temporal": variance(moving - x["length"]),
        "geometric": variance(x["length"] - x["distance"]),
        "length_squared": variance(x["length_squared"]),
        "w2_squared": variance(x["w2_squared"]),
        "entropy_production": variance(x["sigma"]),
    }
    # The jackknife counts twice what is noise alone in a square (`errors`).
    sigma = chain = variance(x["chain"])
    distance = variance(x["distance"])
    bound = report.entropy_production_bound
    if report.entropy_production_chain is not None:
        sigma = variances["entropy_production"]
        if bound is not None:
            # By three fits w_i of mean w̄, Σ = ‖w̄‖² - Q/6 and the bias is Q/4, where Q is the sum of
            # ‖w_i - w̄‖²: so Σ is no less than -2/3 of it, up to noise of the judging members.
            bias = jnp.maximum(report.entropy_production - bound, 0) / 2
            value = jnp.maximum(report.entropy_production, -2 / 3 * bias)
            sigma = debiased_variance(value, sigma, bias)
    noise = jnp.maximum(variances["entropy_production"] - sigma, 0)
    if smooth:
        value = report.debiased_entropy_production
        chain = debiased_variance(value, chain, report.chained - value)
        value = report.debiased_w2_squared
        fewer = debiased_variance(value, distance, report.w2_squared - value)
        noise, distance = noise + jnp.maximum(distance - fewer, 0), fewer
    gap = variance(x["sigma"] - x["distance"])
    variances["entropy_production"] = sigma
    variances["gap"] = jnp.maximum(gap - noise, gap / 4)
    if report.debiased_w2_squared is not None:
        below = x["sigma"] if bound is None else x["entropy_production_bound"]
        variances |= {
            "debiased_entropy_production": chain,
            "debiased_length_squared": variance(x["length"]),
            "debiased_w2_squared": distance,
            "debiased_gap": variances["gap"],
            "gap_lower": variance(below - x["w2_squared"]),
            "gap_upper": variance(x["chain_above"] - x["distance"]),
        }
        if report.debiased_dissipation is not None:
            variances["debiased_dissipation"] = variance(x["heat"])
        if report.entropy_production_chain is None:
            variances["entropy_production"] = variance(x["chain_plug_in"])
    return {
        name: jnp.sqrt(jnp.maximum(variances[name], 0)) if name in variances else None
        for name in NUMBERS
    }
