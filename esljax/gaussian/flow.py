r"""Exact laws of linear drift: the speed limit of a Gaussian ensemble in a quadratic potential.

With mobility η(s) = steps · learning_rate(s), in the limit of continuous training time, a law
N(m, C) stays Gaussian, without members and without noise, and

    dm/ds = -η K (m - c)          dC/ds = -η (K C + C Kᵀ) + 2 η T I          v(θ) = -η a(θ)
    a(θ) = K (θ - c) - T C⁻¹ (θ - m)

    Σ = ∫ η² E‖a‖² ds      D = ∫ η E‖a‖² ds      U = ∫ η ds      L = ∫ η g ds
    housekeeping = ∫ η² E‖a - ∇ψ‖² ds
    E‖a‖² = |K (m - c)|² + ⟨K C - T, K - T C⁻¹⟩
    g² = E‖∇ψ‖² = |K (m - c)|² + ½⟨B, M⟩      M C + C M = B = K C + C Kᵀ - 2T
    ∇ψ = K (m - c) + M (θ - m)

where ∇ψ is the gradient part of a, the only part that moves mass. The linear flow is exact in the
clock u = ∫η ds; everything that depends on s alone (schedules) is integrated by Gauss-Legendre
collocation in panels. This module is the oracle of the package: it knows nothing of the particle
code. References: Okanohara, arXiv 2601.17607; Takatsu, Osaka J. Math. 48 (2011), for the geometry
of Gaussian laws.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_fits, check_positive_int, known, refuse
from esljax._numerics import exponential, lyapunov
from esljax._types import Array, Float, Scalar
from esljax.gaussian.drift import HasSchedules, HasStiffness, drift_of, schedules_of
from esljax.gaussian.law import AnyLaw, Law
from esljax.schedules import AbstractSchedule

# The largest x = ‖K‖Δu of a panel: twelve nodes follow e^{2Ku} to 2 I₁₂(x) eˣ, which is 4e-8 at
# x = 2 and .001 already at x = 4.
LARGEST_EXPONENT = 2.0


class Run(eqx.Module):
    """A law, the potential and the schedules that move it, converted and checked."""

    law: Law
    stiffness: Float[Array, "d d"]
    center: Float[Array, " d"]
    learning_rate: Any
    temperature: Any
    # An array, since a Python number would be static: every number of steps would compile again.
    steps: Scalar
    edges: Float[Array, " edges"]


class Panels(NamedTuple):
    """The linear flow within each of P panels, at its nodes and, where there is one more, its end.

    Times, weights and mobility have shape (P, nodes).
    """

    times: Array
    weights: Array
    mobility: Array
    temperature: Array
    cumulative: Array
    forth: Array
    noise: Array
    exponent: Array


class Densities(NamedTuple):
    """E‖a‖², g² and E‖a - ∇ψ‖² of one law."""

    force: Scalar
    metric: Scalar
    housekeeping: Scalar


def flow(run: Run) -> tuple[Panels, Law, Law]:
    """The panels, the laws at the start of each, and the law at the end of the run.

    Means are relative to the center.
    """
    panels = jax.vmap(panel, (None, 0, 0))(run, run.edges[:-1], run.edges[1:])
    end, starts = jax.lax.scan(lambda law, panel: (moved(panel, law, -1), law), run.law, panels)
    return panels, starts, end


def panel(run: Run, left: Scalar, right: Scalar) -> Panels:
    """The flow from training time `left` to the nodes of a panel and to its end `right`.

    In the clock u of the panel, C(u) = e^{-Ku} (C + 2 ∫ η T e^{Ku'} e^{Kᵀu'} ds') e^{-Kᵀu}: the
    growing exponentials stay within the panel.
    """
    points, weights = _collocation()
    dtype = run.edges.dtype
    times = left + (right - left) * jnp.asarray(points, dtype)
    cumulative = (right - left) * jnp.asarray(weights, dtype)
    mobility = jax.vmap(lambda s: (run.steps * run.learning_rate(s)).astype(dtype))(times)
    temperature = jax.vmap(lambda s: jnp.asarray(run.temperature(s), dtype))(times)
    clock = cumulative @ mobility
    forth = exponential(-clock[:, None, None] * run.stiffness)
    back = exponential(clock[:-1, None, None] * run.stiffness)
    noise = 2 * jnp.einsum("ij,j,jab,jcb->iac", cumulative, mobility * temperature, back, back)
    # ‖K‖₂² ≤ ‖K‖₁ ‖K‖_∞, with no decomposition.
    sizes = jnp.abs(jax.lax.stop_gradient(run.stiffness))
    exponent = jnp.sqrt(sizes.sum(0).max() * sizes.sum(1).max()) * jax.lax.stop_gradient(clock[-1])
    return Panels(times, cumulative[-1], mobility, temperature, cumulative, forth, noise, exponent)


def moved(panel: Panels, law: Law, i: int | Array) -> Law:
    """The law at point `i` of a panel that starts from `law`."""
    covariance = panel.forth[i] @ (law.covariance + panel.noise[i]) @ panel.forth[i].T
    return Law(panel.forth[i] @ law.mean, (covariance + covariance.T) / 2)


def inside(panels: Panels, starts: Law) -> Law:
    """The laws at the nodes, with leading axes (P, nodes)."""
    nodes = jnp.arange(panels.times.shape[1])
    return jax.vmap(jax.vmap(moved, (None, None, 0)), (0, 0, None))(panels, starts, nodes)


def densities(stiffness: Float[Array, "d d"], temperature: Scalar, law: Law) -> Densities:
    """E‖a‖², g² and E‖a - ∇ψ‖² of a law at a temperature."""
    identity = jnp.eye(law.mean.size, dtype=law.mean.dtype)
    flow = stiffness @ law.covariance
    inflow = flow - temperature * identity
    drift = jnp.sum((stiffness @ law.mean) ** 2)
    # T C⁻¹ solves the equation of M with 2T on the right; one decomposition serves both, and
    # without heat a singular covariance does no harm.
    pull, score = lyapunov(law.covariance, jnp.stack([flow + flow.T, 2 * temperature * identity]))
    spring, gradient_part = stiffness - score, pull - score
    rest = spring - gradient_part
    return Densities(
        force=drift + jnp.sum(inflow * spring),
        metric=drift + jnp.sum((inflow + inflow.T) * gradient_part) / 2,
        housekeeping=jnp.sum((rest @ law.covariance) * rest),
    )


@functools.cache
def _collocation(nodes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes of [0, 1], and the integrals of their Lagrange polynomials from 0 to
    each node and (last row) to 1."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    ends = np.append(x, 1.0)
    legendre = np.polynomial.legendre.legvander(ends, nodes)
    k = np.arange(1, nodes)
    # ∫P_k = (P_{k+1} - P_{k-1})/(2k + 1) and ∫P_0 = x + 1; the discrete orthogonality of P_k at the
    # nodes gives the Lagrange coefficients.
    integrals = np.column_stack([ends + 1, (legendre[:, 2:] - legendre[:, :-2]) / (2 * k + 1)])
    coefficients = (2 * np.arange(nodes) + 1) / 2 * legendre[:-1, :-1] * w[:, None]
    return (x + 1) / 2, integrals @ coefficients.T / 2


def run_of(
    law: AnyLaw, potential: HasStiffness, rule: HasSchedules, steps: int, panels: int
) -> Run:
    """The run of a law, converted and checked, with means relative to the center.

    **Raises:** `InputError` for input that the flow of a Gaussian law cannot follow.
    """
    check_positive_int("steps", steps)
    check_positive_int("panels", panels)
    d = law.mean.size
    # Positions and products of matrices at twelve nodes of each panel.
    kept = 8.0 * panels * 12 * (2 * d**2 + d)
    words = f"{panels:,} panels of a law in {d:,} dimensions"
    check_fits("panels", kept, words, "take fewer panels")
    drift = drift_of(law, potential)
    if drift.noise is not None:
        raise refuse(
            "potential",
            "have no gradient noise in continuous training time (`descent` counts its steps)",
            "has `gradient_noise`",
        )
    learning_rate, temperature = schedules_of(rule, steps)
    _check_spread(law, as_float(temperature(jnp.asarray(0.0))))
    d, stiffness = law.mean.size, drift.stiffness
    dtype = jnp.result_type(law.mean, stiffness, drift.center)
    stiffness = stiffness if stiffness.ndim == 2 else stiffness * jnp.eye(d)
    center = jnp.broadcast_to(drift.center, (d,)).astype(dtype)
    return Run(
        law=Law(law.mean.astype(dtype) - center, law.covariance.astype(dtype)),
        stiffness=stiffness.astype(dtype),
        center=center,
        learning_rate=learning_rate,
        temperature=temperature,
        steps=jnp.asarray(steps, dtype),
        edges=_edges(panels, (learning_rate, temperature)).astype(dtype),
    )


def _edges(panels: int, schedules: tuple[Any, ...]) -> Float[Array, " edges"]:
    """The ends of the panels: evenly spaced, halved sixteen times towards the start, and at the
    corners of the schedules.

    A narrow law under a temperature, or a stiff direction, spreads or falls within a small part of
    the first panel.
    """
    fixed = [np.linspace(0, 1, panels + 1), 0.5 ** np.arange(1, 17) / panels]
    corners = [
        schedule.corners() for schedule in schedules if isinstance(schedule, AbstractSchedule)
    ]
    fixed += [times for times in corners if isinstance(times, np.ndarray)]
    moving = [times for times in corners if not isinstance(times, np.ndarray)]
    return jnp.sort(jnp.concatenate([np.unique(np.concatenate(fixed).round(12)), *moving]))


def _check_spread(law: AnyLaw, temperature: Scalar) -> None:
    if known(law, temperature) and float(temperature) > 0:
        values = np.linalg.eigvalsh(np.asarray(law.covariance))
        if values[0] <= values.size * np.finfo(values.dtype).eps * values[-1]:
            raise refuse(
                "law",
                "have a positive definite covariance if the temperature starts above 0",
                f"has the eigenvalue {values[0]:g}",
            )


def check_resolved(exponent: Scalar, panels: int) -> None:
    """Reject too few panels, where the largest exponent of them is known."""
    if known(exponent) and float(exponent) > LARGEST_EXPONENT:
        enough = int(np.ceil(panels * float(exponent) / LARGEST_EXPONENT)) + 1
        raise refuse(
            "panels", f"be at least {enough} for this stiffness and learning time", f"is {panels}"
        )


def nan_unless_resolved(result: Any, exponent: Scalar) -> Any:
    """The result, and NaN in all of its numbers if the panels cannot resolve them."""

    def keep(x):
        return jnp.where(exponent <= LARGEST_EXPONENT, x, jnp.nan) if eqx.is_inexact_array(x) else x

    return jax.tree.map(keep, result)
