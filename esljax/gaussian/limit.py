"""Σ, L and W2² of the exact Gaussian law, the law itself, and the learning rate of least Σ."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import (
    as_float,
    check_fits,
    check_nonnegative,
    check_positive,
    check_positive_int,
    door,
    known,
    refuse,
)
from esljax._numerics import safe_root
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.gaussian.distance import distance
from esljax.gaussian.drift import HasSchedules, HasStiffness, Schedules
from esljax.gaussian.flow import (
    Run,
    check_resolved,
    densities,
    flow,
    inside,
    moved,
    nan_unless_resolved,
    panel,
    run_of,
)
from esljax.gaussian.law import AnyLaw, Law
from esljax.measures import SpeedLimit
from esljax.schedules import Constant, Knots


@door
def speed_limit(
    law: AnyLaw, potential: HasStiffness, rule: HasSchedules, *, steps: int, panels: int = 64
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
    run = run_of(law, potential, rule, steps, panels)
    report, exponent = _speed_limit(run)
    check_resolved(exponent, panels)
    return report


@door
def laws(
    law: AnyLaw,
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
    run, times = run_of(law, potential, rule, steps, panels), as_float(times)
    if times.ndim != 1:
        raise refuse("times", "have shape (J,)", f"has shape {times.shape}")
    check_nonnegative("times", times)
    check_nonnegative("1 - times", 1 - times)
    path, exponent = _laws(run, times)
    check_resolved(exponent, panels)
    return path


@door
def optimal_learning_rate(
    law: AnyLaw,
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
    check_fits("knots", 16.0 * knots, f"{knots:,} knots", "take fewer knots")
    run = run_of(
        law, potential, Schedules(Constant(learning_time), Constant(temperature)), 1, panels
    )
    rates, exponent = _constant_speed(run, knots)
    check_resolved(exponent, panels)
    if known(rates) and not bool(jnp.all(jnp.isfinite(rates))):
        raise refuse(
            "law", "not be stationary under the rule", "has the velocity 0 somewhere on its path"
        )
    return Knots(rates / steps)


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _speed_limit(run: Run) -> tuple[SpeedLimit, Scalar]:
    panels, starts, end = flow(run)
    density = jax.vmap(jax.vmap(densities, (None, 0, 0)), (None, 0, 0))(
        run.stiffness, panels.temperature, inside(panels, starts)
    )
    weights, mobility = panels.weights, panels.mobility
    speed = mobility * safe_root(density.metric)
    exponent = jnp.max(panels.exponent)
    report = SpeedLimit(
        entropy_production=jnp.sum(weights * mobility**2 * density.force),
        length_squared=jnp.sum(weights * speed) ** 2,
        w2_squared=distance(run.law, end),
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
    return nan_unless_resolved(report, exponent), exponent


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _laws(run: Run, times: Float[Array, " J"]) -> tuple[Law, Scalar]:
    panels, starts, _ = flow(run)

    def at(time):
        left = jnp.clip(jnp.searchsorted(run.edges, time, side="right") - 1, 0, run.edges.size - 2)
        last = panel(run, run.edges[left], time)
        return moved(last, jax.tree.map(lambda x: x[left], starts), -1)

    exponent = jnp.max(panels.exponent)
    path = jax.vmap(at)(times.astype(run.edges.dtype))
    path = eqx.tree_at(lambda p: p.mean, path, path.mean + run.center)
    return nan_unless_resolved(path, exponent), exponent


@eqx.filter_jit
@jax.default_matmul_precision("highest")
def _constant_speed(run: Run, knots: int) -> tuple[Float[Array, " m"], Scalar]:
    # With a constant mobility U the time of the run is the clock: u = U s.
    panels, starts, end = flow(run)
    heat, learning_time = panels.temperature[0, 0], panels.mobility[0, 0]

    def speed(law):
        return safe_root(densities(run.stiffness, heat, law).force)

    speeds = jax.vmap(jax.vmap(speed))(inside(panels, starts))
    arcs = learning_time * jnp.einsum("pij,pj->pi", panels.cumulative, speeds)
    offsets = jnp.cumsum(arcs[:, -1])
    length = offsets[-1]
    arc = (
        jnp.concatenate(
            [jnp.zeros(1), (arcs[:, :-1] + (offsets - arcs[:, -1])[:, None]).ravel(), length[None]]
        )
        / length
    )
    clock = learning_time * jnp.concatenate([jnp.zeros(1), panels.times.ravel(), jnp.ones(1)])
    rate = length / jnp.concatenate([speed(run.law)[None], speeds.ravel(), speed(end)[None]])

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
    return nan_unless_resolved(rates, exponent), exponent
