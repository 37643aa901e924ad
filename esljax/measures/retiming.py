r"""The schedule that passes a measured path at constant speed, in closed form from that speed.

Where the noise is tied to the learning rate, a schedule is a change of clock u = ∫η ds of one path.
A report of any run along that path knows its metric speed per unit of learning time,

    g(u) = ℓ(s)/η(s),     L = ∫ g du,     U = ∫ η ds,

and the schedule of constant speed moves by L per unit of its training time:

    s*(u) = ∫₀ᵘ g du'/L,     η*(s) = du/ds* = L/g(u(s)).

It has the same U, the same path and the same ends, and Σ = L². No search is needed. Source:
Okanohara, arXiv 2601.17607; constant speed as in Benamou and Brenier, Numer. Math. 84 (2000).
"""

import jax.numpy as jnp

from esljax._checks import as_float, check_kind, check_positive_int, door, known, refuse
from esljax._numerics import safe_divide
from esljax._types import Array, Float, ScalarLike
from esljax.measures.report import SpeedLimit
from esljax.schedules import Knots


@door
def constant_speed(
    report: SpeedLimit, steps: int | None = None, *, limit: ScalarLike = 10.0
) -> Knots:
    """Return the learning rate that passes the path of a report at constant speed.

    Run again with it, from the same start, Σ falls to `report.length_squared`: the temporal part
    goes, the geometric part and the housekeeping stay. That is exact in the limit of many steps
    and links where a schedule only re-times the path: overdamped dynamics whose noise is tied to
    the learning rate, at a fixed temperature and potential. Batches, momentum and preconditioning
    make the path itself depend on the rate; the promise then holds about as well as L² stays the
    same. Sampling noise and the noise floor of a chain count as speed here as they do in Σ, and a
    speed that varies within one link stays hidden.

    **Args:**
    - `report`: of one run, or the average of several with one schedule.
    - `steps`: K of the run to come; by default that of the measured run.
    - `limit`: a speed per unit of learning time lower than the mean, L/U, by more than this factor
      counts as the mean divided by it. It bounds the rate at about `limit` times the mean rate
      where the path comes to rest and constant speed would need an infinite one. A stiff potential
      may need less: Euler steps are unstable above 2 over the stiffness.

    **Returns:** log-linear `Knots` with a value for each step, in units of θ² per unit of the
    potential; `rates(steps)` has the sum U of the report. For a recorded run, whose rates η are not
    known, the values r have mean 1 and the new rate at s is r(s) η(∫₀ˢ r ds'): for a constant
    rate, multiply it by r(s).
    **Raises:** `InputError` for several runs in one report, for a path along which nothing moves,
    for an exact law without `steps`, where a transport problem was not solved, and where members
    are paired anew at each link and the debiased Σ is within two standard errors of 0: the speed is
    then that of sampling noise.
    **Differentiation:** forward and reverse, in the speed and the mobility of the report.
    **Reference:** Benamou and Brenier, Numer. Math. 84 (2000); Okanohara, arXiv 2601.17607.

    **Example:**

        >>> import esljax as esl
        >>> start, trap = esl.gaussian.Law([2.0], [[1.0]]), esl.Quadratic(1.0)
        >>> rule = esl.Langevin(0.002, temperature=0.1)
        >>> report = esl.gaussian.speed_limit(start, trap, rule, steps=1000)
        >>> rate = esl.constant_speed(report, steps=1000)
        >>> again = esl.gaussian.speed_limit(start, trap, esl.Langevin(rate, 0.1), steps=1000)
        >>> round(float(report.entropy_production), 2), round(float(report.length_squared), 2)
        (4.6, 3.44)
        >>> round(float(again.entropy_production), 2)
        3.44
    """
    check_kind("report", report, SpeedLimit, "be a SpeedLimit, as speed_limit(...) returns")
    limit = as_float(limit)
    if known(limit) and not float(limit) > 1:
        raise refuse("limit", "be greater than 1", f"is {float(limit):g}")
    elapsed = _checked(report)
    steps = _steps(report, steps)
    mobility = jnp.ones_like(elapsed) if report.mobility is None else report.mobility
    learning_times = mobility * elapsed
    pace = safe_divide(report.speed, mobility)
    slowest = jnp.sum(report.speed * elapsed) / jnp.sum(learning_times) / limit
    rate = _rate(jnp.maximum(pace, slowest), learning_times, steps)
    if report.mobility is None:
        return Knots(rate / jnp.mean(rate[:-1]))
    return Knots(rate * jnp.sum(learning_times) / jnp.sum(rate[:-1]))


def _rate(
    pace: Float[Array, " J"], learning_times: Float[Array, " J"], steps: int
) -> Float[Array, " knots"]:
    """The learning time of each step, times K: the mean of η* over it; last, η* at s = 1.

    u* is the cubic through the clock at the ends of the links, s_j = Σ_{i<j} g_i u_i/L, with the
    slopes L/g there: it keeps the mean speed of each link, and no step of the rate is left at a
    snapshot.
    """
    arcs = pace * learning_times
    length = jnp.sum(arcs)
    zero = jnp.zeros(1, arcs.dtype)
    ends = jnp.concatenate([zero, jnp.cumsum(arcs)]) / length
    clock = jnp.concatenate([zero, jnp.cumsum(learning_times)])
    slopes = length / _at_ends(pace, learning_times)

    s = jnp.arange(steps + 1, dtype=ends.dtype) / steps
    i = jnp.clip(jnp.searchsorted(ends, s, side="right") - 1, 0, arcs.size - 1)
    width = ends[i + 1] - ends[i]
    t = jnp.clip(safe_divide(s - ends[i], width), 0, 1)
    reached = (
        clock[i]
        + learning_times[i] * t**2 * (3 - 2 * t)
        + width * t * (1 - t) * (slopes[i] * (1 - t) - slopes[i + 1] * t)
    )
    return jnp.append(steps * jnp.diff(reached), slopes[-1])


def _at_ends(
    pace: Float[Array, " J"], learning_times: Float[Array, " J"]
) -> Float[Array, " snapshots"]:
    """The speeds per unit of learning time at the ends of the links, on lines between the middles.

    A cubic with slopes of at most three times the mean slope of its link is monotone (Fritsch and
    Carlson, SIAM J. Numer. Anal. 17, 1980), so no rate is negative.
    """
    left, right = learning_times[:-1], learning_times[1:]
    share = safe_divide(left, left + right)
    between = pace[:-1] + share * (pace[1:] - pace[:-1])
    if pace.size == 1:
        return jnp.concatenate([pace, pace])
    first = pace[:1] - share[:1] * (pace[1:2] - pace[:1])
    last = pace[-1:] + (1 - share[-1:]) * (pace[-1:] - pace[-2:-1])
    at_ends = jnp.concatenate([first, between, last])
    around = jnp.maximum(jnp.concatenate([pace[:1], pace]), jnp.concatenate([pace, pace[-1:]]))
    return jnp.maximum(at_ends, around / 3)


def _checked(report: SpeedLimit) -> Array:
    """The training time of each speed of a report that a re-timing can be made of."""
    if report.elapsed is None:
        raise refuse("report", "hold the training time of each speed", "holds none")
    if report.elapsed.ndim != 1:
        raise refuse("report", "be of one run or an average", "holds several: index or average it")
    if known(report.length_squared) and not float(report.length_squared) > 0:
        raise refuse(
            "report",
            "be of a path along which the ensemble moves",
            f"has the squared length {float(report.length_squared):g}",
        )
    if known(report.converged) and not bool(report.converged):
        raise refuse("report", "be of transport problems that were solved", "holds others")
    _check_resolved(report)
    return report.elapsed


def _check_resolved(report: SpeedLimit) -> None:
    """Reject a chain whose speed is sampling noise.

    Where each member is its own best partner, the speed is that of the members themselves.
    """
    sigma, paired = report.debiased_entropy_production, report.identity_fraction
    if sigma is None or report.entropy_production_chain is not None or not known(sigma):
        return
    if paired is not None and float(paired) > 0.5:
        return
    errors = report.standard_error
    error = None if errors is None else errors.get("debiased_entropy_production")
    width = 0.0 if error is None else 2 * float(error)
    if float(sigma) <= width:
        raise refuse(
            "report",
            "resolve the speed: more members, fewer snapshots, or moments help",
            f"has a debiased Σ of {float(sigma):.3g}"
            + ("" if error is None else f" ± {float(error):.2g}"),
        )


def _steps(report: SpeedLimit, steps: int | None) -> int:
    if steps is not None:
        check_positive_int("steps", steps)
        return steps
    if report.evidence is not None and report.evidence.steps is not None:
        return report.evidence.steps
    if report.mobility is not None:
        raise refuse("steps", "be given for an exact law, which has none of its own", "is None")
    # A recorded run gets a relative rate, which has no unit of steps: eight values for each link.
    return 8 * report.speed.size
