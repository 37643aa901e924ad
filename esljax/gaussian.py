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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    as_float,
    check_finite,
    check_nonnegative,
    check_positive,
    check_positive_int,
    door,
    in_words,
    known,
    refuse,
)
from esljax._numerics import exponential, lyapunov, product, safe_root, sqrtm
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.measures import SpeedLimit
from esljax.schedules import AbstractSchedule, Constant, Knots


@runtime_checkable
class HasStiffness(Protocol):
    """Φ = (θ - c)ᵀ K (θ - c)/2, or the linear force -K (θ - c) where K is not symmetric."""

    @property
    def stiffness(self) -> Any:
        """K: a number, its diagonal (d,), or a matrix (d, d); in units of the potential per θ²."""
        ...

    @property
    def center(self) -> Any:
        """c: a number or shape (d,), in units of θ."""
        ...


@runtime_checkable
class HasSchedules(Protocol):
    """A Langevin rule: a learning rate per step and a temperature, both schedules on s ∈ [0, 1]."""

    @property
    def learning_rate(self) -> Any:
        """η per step, in units of θ² per unit of the potential."""
        ...

    @property
    def temperature(self) -> Any:
        """T, in units of the potential."""
        ...


class Law(eqx.Module):
    """The Gaussian law N(mean, covariance).

    **Args:** `mean`: shape (d,), in units of θ. `covariance`: shape (d, d), symmetric positive
    semidefinite; zero is a point mass.
    **Raises:** `InputError` for wrong shapes and, where the values are known, for a matrix that is
    no covariance.

    **Example:**

        >>> import esljax as esl
        >>> esl.gaussian.Law([2.0, 0.0], [[1.0, 0.3], [0.3, 0.5]]).mean.shape
        (2,)
    """

    mean: Float[Array, " d"]
    """m, shape (d,), in units of θ; of several laws, such as those of `laws`, (J, d)."""
    covariance: Float[Array, "d d"]
    """C, shape (d, d), in units of θ²; of several laws (J, d, d)."""

    def __init__(self, mean: Any, covariance: Any):
        mean, covariance = as_float(mean), as_float(covariance)
        if mean.ndim != 1 or mean.size < 1:
            raise refuse("mean", "have shape (d,)", f"has shape {mean.shape}")
        if covariance.shape != 2 * mean.shape:
            raise refuse(
                "covariance",
                f"have shape {2 * mean.shape}, as the mean has {mean.size} entries",
                f"has shape {covariance.shape}",
            )
        check_finite("mean", mean)
        check_finite("covariance", covariance)
        if known(covariance):
            matrix = np.asarray(covariance)
            rounding = np.sqrt(np.finfo(matrix.dtype).eps) * np.abs(matrix).max()
            if np.abs(matrix - matrix.T).max() > rounding:
                raise refuse(
                    "covariance",
                    "be symmetric",
                    f"differs from its transpose by {np.abs(matrix - matrix.T).max():g}",
                )
            if np.linalg.eigvalsh(matrix).min() < -rounding:
                raise refuse(
                    "covariance",
                    "be positive semidefinite",
                    f"has the eigenvalue {np.linalg.eigvalsh(matrix).min():g}",
                )
        dtype = jnp.result_type(mean, covariance)
        self.mean, self.covariance = mean.astype(dtype), covariance.astype(dtype)


@door
def w2_squared(start: Law, end: Law) -> Scalar:
    r"""The squared Wasserstein distance between two Gaussian laws, in closed form.

        W2² = |m₀ - m₁|² + tr C₀ + tr C₁ - 2 tr (C₀^½ C₁ C₀^½)^½

    **Args:** `start`, `end`: laws of the same d.
    **Returns:** shape (), in units of θ². Rounding leaves an error of the size of a trace times the
    machine precision, of either sign.
    **Raises:** `InputError` if the laws differ in d.
    **Differentiation:** forward and reverse, of every order; finite at equal laws, isotropic laws
    and point masses (where one-sided infinite slopes out of the null space count as 0).
    **Reference:** Dowson and Landau, J. Multivariate Anal. 12 (1982).
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.w2_squared(start, end)), 4)
        2.0
    """
    _check_same_size(start, end)
    return _distance(start, end)


@door
def entropic_transport(start: Law, end: Law, *, epsilon: ScalarLike) -> Scalar:
    r"""The entropic transport cost between two Gaussian laws, in closed form.

        OT_ε = min_P ∫|x - y|² dP + ε KL(P | q₀ ⊗ q₁)
             = |m₀ - m₁|² + tr C₀ + tr C₁ - tr D + (ε/2) (d (1 - log ε) + log det(D + ε/2))
        D = (4 C₀^½ C₁ C₀^½ + (ε/2)²)^½

    **Args:** `start`, `end`: laws of the same d. `epsilon`: ε > 0, in units of θ².
    **Returns:** shape (), in units of θ²; W2² plus an entropic bias that vanishes as ε → 0.
    **Raises:** `InputError` if the laws differ in d or ε is not positive.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Janati, Muzellec, Peyré and Cuturi, NeurIPS 2020, Theorem 1 (their 2σ² is ε).
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.entropic_transport(start, end, epsilon=0.1)), 4)
        2.2348
    """
    _check_same_size(start, end)
    epsilon = as_float(epsilon)
    check_positive("epsilon", epsilon)
    return _entropic(start, end, epsilon)


@door
def sinkhorn_divergence(start: Law, end: Law, *, epsilon: ScalarLike) -> Scalar:
    r"""The debiased entropic transport cost between two Gaussian laws, in closed form.

        S_ε(q₀, q₁) = OT_ε(q₀, q₁) - ½ OT_ε(q₀, q₀) - ½ OT_ε(q₁, q₁)

    **Args:** `start`, `end`: laws of the same d. `epsilon`: ε > 0, in units of θ².
    **Returns:** shape (), in units of θ²; nonnegative, 0 at equal laws, and W2² as ε → 0. It is no
    metric.
    **Raises:** `InputError` if the laws differ in d or ε is not positive.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Janati et al., NeurIPS 2020; Feydy et al., AISTATS 2019.
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.sinkhorn_divergence(start, end, epsilon=0.1)), 4)
        1.9999
    """
    _check_same_size(start, end)
    epsilon = as_float(epsilon)
    check_positive("epsilon", epsilon)
    return (
        _entropic(start, end, epsilon)
        - (_entropic(start, start, epsilon) + _entropic(end, end, epsilon)) / 2
    )


@door
def speed_limit(
    law: Law, potential: HasStiffness, rule: HasSchedules, *, steps: int, panels: int = 64
) -> SpeedLimit:
    r"""Σ, D, U, L, W2² and the split of the exact Gaussian law, by the equations of this module.

    **Args:**
    - `law`: the law at s = 0. Its covariance may be singular only if the temperature starts at 0.
    - `potential`: has `stiffness` (a number, (d,), or (d, d), not necessarily symmetric) and
      `center` (a number or (d,)), such as `Quadratic`.
    - `rule`: has `learning_rate` (per step) and `temperature` (units of the potential), schedules
      on s ∈ [0, 1], such as `Langevin`. They must be smooth, apart from their `corners`, at which
      panels end; a function has none.
    - `steps`: K; the mobility is K · learning_rate(s).
    - `panels`: the least number of panels of equal length. The stiffness (an upper bound of its
      norm) times the learning time of a panel must not exceed 2: by default, at a constant rate,
      its product with U may reach 128.

    **Returns:** a `SpeedLimit`; `times` and `speed` are the collocation nodes. Where values are
    known only under a transformation, numbers that the panels cannot resolve are NaN.
    **Raises:** `InputError` for mismatched shapes and, where values are known: negative or not
    finite schedules, a singular covariance with a temperature (Σ or D would be infinite), too few
    panels.
    **Differentiation:** forward and reverse, in the schedules' leaves, the law, the stiffness and
    the center. In directions out of the null space of a covariance only Σ, D and U have true
    derivatives; the split and W2² count 0 there.
    **Reference:** Okanohara, arXiv 2601.17607.
    **Example:**

        >>> import esljax as esl
        >>> start = esl.gaussian.Law([2.0], [[1.0]])
        >>> trap, rule = esl.Quadratic(1.0), esl.Langevin(0.01, 0.1)
        >>> report = esl.gaussian.speed_limit(start, trap, rule, steps=100)
        >>> round(float(report.entropy_production), 4), round(float(report.w2_squared), 4)
        (2.0431, 1.8782)
    """
    run = _run(law, potential, rule, steps, panels)
    report, exponent = _speed_limit(run)
    _check_resolved(exponent, panels)
    return report


@door
def laws(
    law: Law,
    potential: HasStiffness,
    rule: HasSchedules,
    *,
    steps: int,
    times: Any,
    panels: int = 64,
) -> Law:
    r"""The exact law at given training times.

    **Args:** as for `speed_limit`; `times`: shape (J,), training times in [0, 1], in any order.
    **Returns:** a `Law` with a leading axis: mean (J, d), covariance (J, d, d).
    `jax.vmap(w2_squared)` works on it.
    **Raises:** `InputError`, as `speed_limit` does.
    **Differentiation:** forward and reverse, in the schedules' leaves, the law, the stiffness, the
    center and the times.
    **Example:**

        >>> import esljax as esl
        >>> start = esl.gaussian.Law([2.0], [[1.0]])
        >>> trap, rule = esl.Quadratic(1.0), esl.Langevin(0.01, 0.1)
        >>> path = esl.gaussian.laws(start, trap, rule, steps=100, times=[0.0, 1.0])
        >>> [round(float(m), 4) for m in path.mean[:, 0]]
        [2.0, 0.7358]
    """
    run, times = _run(law, potential, rule, steps, panels), as_float(times)
    if times.ndim != 1:
        raise refuse("times", "have shape (J,)", f"has shape {times.shape}")
    check_nonnegative("times", times)
    check_nonnegative("1 - times", 1 - times)
    path, exponent = _laws(run, times)
    _check_resolved(exponent, panels)
    return path


@door
def optimal_learning_rate(
    law: Law,
    potential: HasStiffness,
    *,
    temperature: ScalarLike,
    learning_time: ScalarLike,
    steps: int,
    knots: int = 1025,
    panels: int = 64,
) -> Knots:
    r"""The learning rate of least Σ at a given learning time and fixed temperature.

    It moves the law along its path at constant speed:

        η*(s) = L/G(u(s))      G(u) = sqrt(E‖a‖²)      L = ∫₀ᵁ G du      s(u) = ∫₀ᵘ G du / L

    At a fixed temperature a schedule only changes the clock u = ∫η ds, so the path, D, ∫G du and
    W2² are given, and Σ ≥ (∫G du)² with equality at η*. For a symmetric stiffness G is the metric
    speed and Σ = L². Where forces fade (a positive stiffness) the rate rises as the law comes to
    rest, the opposite of a decay; near equilibrium it diverges, and a run of finite `steps` is
    unstable where it exceeds 2 over the stiffness. Where forces grow, as out of a saddle, it falls.
    Of a path that was only measured, `constant_speed` finds this schedule.

    **Args:**
    - `law`, `potential`, `panels`: as for `speed_limit`.
    - `temperature`: T ≥ 0, a number, in units of the potential.
    - `learning_time`: U = Σ_k η_k > 0, in units of θ² per unit of the potential.
    - `steps`: K; the result is η*/K, the rate per step.
    - `knots`: the number of values of the result. Interpolation costs Σ a relative error of about
      1/knots².

    **Returns:** `Knots`, log-linear, exact at its knots.
    **Raises:** `InputError` as `speed_limit` does, and for a law that is stationary (every schedule
    is then optimal).
    **Differentiation:** forward and reverse, in the law, the stiffness, the center, the temperature
    and the learning time.
    **Reference:** Benamou and Brenier, Numer. Math. 84 (2000), for constant speed; Okanohara, arXiv
    2601.17607.
    **Example:**

        >>> import esljax as esl
        >>> start, trap = esl.gaussian.Law([2.0], [[1.0]]), esl.Quadratic(1.0)
        >>> rate = esl.gaussian.optimal_learning_rate(
        ...     start, trap, temperature=0.1, learning_time=2.0, steps=1
        ... )
        >>> round(float(rate(0.0)), 3), round(float(rate(1.0)), 2)
        (0.845, 6.74)

        Out of a saddle it falls throughout:

        >>> start, saddle = esl.gaussian.Law([0.5, 0.5], [[0.1, 0], [0, 0.1]]), [-2.0, 1.0]
        >>> rate = esl.gaussian.optimal_learning_rate(
        ...     start, esl.Quadratic(saddle), temperature=0.01, learning_time=1.0, steps=1
        ... )
        >>> round(float(rate(0.0)), 2), round(float(rate(1.0)), 2)
        (2.89, 0.44)
    """
    learning_time = as_float(learning_time)
    check_positive("learning_time", learning_time)
    check_positive_int("steps", steps)
    check_positive_int("knots", knots, minimum=2)
    run = _run(law, potential, _Rule(Constant(learning_time), Constant(temperature)), 1, panels)
    rates, exponent = _constant_speed(run, knots)
    _check_resolved(exponent, panels)
    if known(rates) and not bool(jnp.all(jnp.isfinite(rates))):
        raise refuse(
            "law", "not be stationary under the rule", "has the velocity 0 somewhere on its path"
        )
    return Knots(rates / steps)


# The largest x = ‖K‖Δu of a panel: twelve nodes follow e^{2Ku} to 2 I₁₂(x) eˣ, which is 4e-8 at
# x = 2 and .001 already at x = 4.
_LARGEST_EXPONENT = 2.0


class _Rule(NamedTuple):
    learning_rate: AbstractSchedule
    temperature: AbstractSchedule


class _Run(eqx.Module):
    """A law, the potential and the schedules that move it, converted and checked."""

    law: Law
    stiffness: Float[Array, "d d"]
    center: Float[Array, " d"]
    learning_rate: Any
    temperature: Any
    # An array, since a Python number would be static: every number of steps would compile again.
    steps: Scalar
    edges: Float[Array, " edges"]


class _Panels(NamedTuple):
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


class _Densities(NamedTuple):
    """E‖a‖², g² and E‖a - ∇ψ‖² of one law."""

    force: Scalar
    metric: Scalar
    housekeeping: Scalar


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _speed_limit(run: _Run) -> tuple[SpeedLimit, Scalar]:
    panels, starts, end = _flow(run)
    density = jax.vmap(jax.vmap(_densities, (None, 0, 0)), (None, 0, 0))(
        run.stiffness, panels.temperature, _inside(panels, starts)
    )
    weights, mobility = panels.weights, panels.mobility
    speed = mobility * safe_root(density.metric)
    exponent = jnp.max(panels.exponent)
    report = SpeedLimit(
        entropy_production=jnp.sum(weights * mobility**2 * density.force),
        length_squared=jnp.sum(weights * speed) ** 2,
        w2_squared=_distance(run.law, end),
        housekeeping=jnp.sum(weights * mobility**2 * density.housekeeping),
        dissipation=jnp.sum(weights * mobility * density.force),
        learning_time=jnp.sum(weights * mobility),
        times=panels.times.ravel(),
        speed=speed.ravel(),
        converged=jnp.asarray(True),
        elapsed=weights.ravel(),
        mobility=mobility.ravel(),
        source="the exact Gaussian law",
    )
    return _nan_unless_resolved(report, exponent), exponent


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _laws(run: _Run, times: Float[Array, " J"]) -> tuple[Law, Scalar]:
    panels, starts, _ = _flow(run)

    def at(time):
        left = jnp.clip(jnp.searchsorted(run.edges, time, side="right") - 1, 0, run.edges.size - 2)
        last = _panel(run, run.edges[left], time)
        return _moved(last, jax.tree.map(lambda x: x[left], starts), -1)

    exponent = jnp.max(panels.exponent)
    path = jax.vmap(at)(times.astype(run.edges.dtype))
    path = eqx.tree_at(lambda p: p.mean, path, path.mean + run.center)
    return _nan_unless_resolved(path, exponent), exponent


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _constant_speed(run: _Run, knots: int) -> tuple[Float[Array, " m"], Scalar]:
    # With a constant mobility U the time of the run is the clock: u = U s.
    panels, starts, end = _flow(run)
    heat, learning_time = panels.temperature[0, 0], panels.mobility[0, 0]

    def speed(law):
        return safe_root(_densities(run.stiffness, heat, law).force)

    inside = jax.vmap(jax.vmap(speed))(_inside(panels, starts))
    arcs = learning_time * jnp.einsum("pij,pj->pi", panels.cumulative, inside)
    offsets = jnp.cumsum(arcs[:, -1])
    length = offsets[-1]
    arc = (
        jnp.concatenate(
            [jnp.zeros(1), (arcs[:, :-1] + (offsets - arcs[:, -1])[:, None]).ravel(), length[None]]
        )
        / length
    )
    clock = learning_time * jnp.concatenate([jnp.zeros(1), panels.times.ravel(), jnp.ones(1)])
    rate = length / jnp.concatenate([speed(run.law)[None], inside.ravel(), speed(end)[None]])

    # η* = du/ds: the slope of the cubic through the clock with the known rates as its slopes.
    s = jnp.linspace(0, 1, knots)
    i = jnp.clip(jnp.searchsorted(arc, s, side="right") - 1, 0, arc.size - 2)
    width = arc[i + 1] - arc[i]
    t = (s - arc[i]) / width
    rates = (
        (1 - t) * (1 - 3 * t) * rate[i]
        + 6 * t * (1 - t) * (clock[i + 1] - clock[i]) / width
        + t * (3 * t - 2) * rate[i + 1]
    )
    exponent = jnp.max(panels.exponent)
    return _nan_unless_resolved(rates, exponent), exponent


def _flow(run: _Run) -> tuple[_Panels, Law, Law]:
    """The panels, the laws at the start of each, and the law at the end of the run.

    Means are relative to the center.
    """
    panels = jax.vmap(_panel, (None, 0, 0))(run, run.edges[:-1], run.edges[1:])
    end, starts = jax.lax.scan(lambda law, panel: (_moved(panel, law, -1), law), run.law, panels)
    return panels, starts, end


def _panel(run: _Run, left: Scalar, right: Scalar) -> _Panels:
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
    return _Panels(times, cumulative[-1], mobility, temperature, cumulative, forth, noise, exponent)


def _moved(panel: _Panels, law: Law, i: int | Array) -> Law:
    """The law at point `i` of a panel that starts from `law`."""
    covariance = panel.forth[i] @ (law.covariance + panel.noise[i]) @ panel.forth[i].T
    return Law(panel.forth[i] @ law.mean, (covariance + covariance.T) / 2)


def _inside(panels: _Panels, starts: Law) -> Law:
    """The laws at the nodes, with leading axes (P, nodes)."""
    nodes = jnp.arange(panels.times.shape[1])
    return jax.vmap(jax.vmap(_moved, (None, None, 0)), (0, 0, None))(panels, starts, nodes)


def _densities(stiffness: Float[Array, "d d"], temperature: Scalar, law: Law) -> _Densities:
    identity = jnp.eye(law.mean.size, dtype=law.mean.dtype)
    flow = stiffness @ law.covariance
    inflow = flow - temperature * identity
    drift = jnp.sum((stiffness @ law.mean) ** 2)
    # T C⁻¹ solves the equation of M with 2T on the right; one decomposition serves both, and
    # without heat a singular covariance does no harm.
    pull, score = lyapunov(law.covariance, jnp.stack([flow + flow.T, 2 * temperature * identity]))
    spring, gradient_part = stiffness - score, pull - score
    rest = spring - gradient_part
    return _Densities(
        force=drift + jnp.sum(inflow * spring),
        metric=drift + jnp.sum((inflow + inflow.T) * gradient_part) / 2,
        housekeeping=jnp.sum((rest @ law.covariance) * rest),
    )


def _distance(start: Law, end: Law) -> Scalar:
    root = sqrtm(start.covariance)
    cross = sqrtm(product(product(root, end.covariance), root))
    return jnp.sum((start.mean - end.mean) ** 2) + jnp.trace(
        start.covariance + end.covariance - 2 * cross
    )


def _entropic(start: Law, end: Law, epsilon: Scalar) -> Scalar:
    half, identity = epsilon / 2, jnp.eye(start.mean.size)
    root = sqrtm(start.covariance)
    spread = sqrtm(product(product(4 * root, end.covariance), root) + half**2 * identity)
    entropy = (
        start.mean.size * (1 - jnp.log(epsilon)) + jnp.linalg.slogdet(spread + half * identity)[1]
    )
    return (
        jnp.sum((start.mean - end.mean) ** 2)
        + jnp.trace(start.covariance + end.covariance - spread)
        + half * entropy
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


def _run(law: Law, potential: HasStiffness, rule: HasSchedules, steps: int, panels: int) -> _Run:
    check_positive_int("steps", steps)
    check_positive_int("panels", panels)
    if not isinstance(potential, HasStiffness):
        must = "have a stiffness and a center, as Quadratic(1.0) has"
        raise refuse("potential", must, f"is {in_words(potential)}")
    if not isinstance(rule, HasSchedules):
        must = "have a learning rate and a temperature, as Langevin(0.1) has"
        raise refuse("rule", must, f"is {in_words(rule)}")
    d = law.mean.size
    stiffness, center = as_float(potential.stiffness), as_float(potential.center)
    if stiffness.shape not in ((), (d,), (d, d)):
        raise refuse(
            "potential.stiffness",
            f"be a number or have shape ({d},) or ({d}, {d})",
            f"has shape {stiffness.shape}",
        )
    if center.shape not in ((), (d,)):
        raise refuse(
            "potential.center", f"be a number or have shape ({d},)", f"has shape {center.shape}"
        )
    check_finite("potential.stiffness", stiffness)
    check_finite("potential.center", center)
    learning_rate, temperature = _over(rule.learning_rate, steps), _over(rule.temperature, steps)
    _check_schedule("rule.learning_rate", learning_rate)
    _check_schedule("rule.temperature", temperature)
    _check_spread(law, as_float(temperature(jnp.asarray(0.0))))
    dtype = jnp.result_type(law.mean, stiffness, center)
    stiffness = stiffness if stiffness.ndim == 2 else stiffness * jnp.eye(d)
    center = jnp.broadcast_to(center, (d,)).astype(dtype)
    return _Run(
        law=Law(law.mean.astype(dtype) - center, law.covariance.astype(dtype)),
        stiffness=stiffness.astype(dtype),
        center=center,
        learning_rate=learning_rate,
        temperature=temperature,
        steps=jnp.asarray(steps, dtype),
        edges=_edges(panels, (learning_rate, temperature)).astype(dtype),
    )


def _over(schedule: Any, steps: int) -> Any:
    """The schedule of a run of so many steps; any other function of s as it is."""
    return schedule.over(steps) if isinstance(schedule, AbstractSchedule) else schedule


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


def _check_same_size(start: Law, end: Law) -> None:
    if start.mean.shape != end.mean.shape:
        raise refuse(
            "end",
            f"be a law of {start.mean.size} coordinates, as `start` is",
            f"has {end.mean.size}",
        )


def _check_schedule(argument: str, schedule: Any) -> None:
    values = jax.vmap(schedule)(jnp.linspace(0, 1, 65))
    if values.ndim != 1:
        raise refuse(argument, "be a schedule of one number", f"gives the shape {values.shape[1:]}")
    check_finite(argument, values)
    check_nonnegative(argument, values)


def _check_spread(law: Law, temperature: Scalar) -> None:
    if known(law, temperature) and float(temperature) > 0:
        values = np.linalg.eigvalsh(np.asarray(law.covariance))
        if values[0] <= values.size * np.finfo(values.dtype).eps * values[-1]:
            raise refuse(
                "law",
                "have a positive definite covariance if the temperature starts above 0",
                f"has the eigenvalue {values[0]:g}",
            )


def _check_resolved(exponent: Scalar, panels: int) -> None:
    if known(exponent) and float(exponent) > _LARGEST_EXPONENT:
        enough = int(np.ceil(panels * float(exponent) / _LARGEST_EXPONENT)) + 1
        raise refuse(
            "panels", f"be at least {enough} for this stiffness and learning time", f"is {panels}"
        )


def _nan_unless_resolved(result: Any, exponent: Scalar) -> Any:
    def keep(x):
        return (
            jnp.where(exponent <= _LARGEST_EXPONENT, x, jnp.nan) if eqx.is_inexact_array(x) else x
        )

    return jax.tree.map(keep, result)
