r"""The trade of loss and Σ of a noisy quadratic, exactly: the least Σ at each final loss.

    minimize  log E Φ(q_K) + λ log Σ        over the knots of a learning rate, for each weight λ

is a point of the front of slope d log loss/d log Σ = -λ. The law is exact, so there is nothing to
sample and L-BFGS finds each point in a few steps from the one before it. The objective is bounded
below in neither variable: Σ → 0 without moving, so a point is a local minimum, which exists while
the front is steeper than λ, and without noise the loss has no floor. Given target losses instead,
the search is for least log Σ at log loss = log target, by an augmented Lagrangian; its multiplier
is 1/λ.

Reference for the optimizer: Liu and Nocedal, Math. Program. 45, 503 (1989).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esljax._checks import (
    as_float,
    check_finite,
    check_nonnegative,
    check_positive,
    check_positive_int,
    door,
    known,
    refuse,
)
from esljax._types import Array, Float, Int, ScalarLike
from esljax.gaussian.descent import AbstractMotion, motion_of, path_of
from esljax.gaussian.drift import HasStiffness
from esljax.gaussian.law import AnyLaw
from esljax.results import table
from esljax.schedules import Knots, as_schedule


class Front(eqx.Module):
    """Points of the front of a noisy quadratic, in the order of the weights or targets.

    `print` shows a table.
    """

    final_loss: Float[Array, " P"]
    """E Φ(q_K) of each of P points, in units of the potential."""
    entropy_production: Float[Array, " P"]
    """Σ of each point, in units of θ²."""
    w2_squared: Float[Array, " P"]
    """W2² of each point, in units of θ²."""
    weights: Float[Array, " P"]
    """λ = -d log loss/d log Σ at each point, without units."""
    rates: Float[Array, "P m"]
    """The learning rates at the knots of each point, evenly spaced over training time."""
    converged: Array
    """Whether each search ended at a stationary point below the loss of the start, and at its
    target if it has one: booleans, shape (P,). Where the front is nowhere as steep as a weight,
    there is no such point; the next search starts from the last one that there was."""
    iterations: Int[Array, " P"]
    """The steps of L-BFGS of each point."""

    @property
    def schedules(self) -> tuple[Knots, ...]:
        """The learning rate of each point, P log-linear schedules."""
        return tuple(Knots(rates) for rates in self.rates)

    def __str__(self) -> str:
        if not known(self.rates) or self.rates.ndim != 2:
            return repr(self)
        columns = (self.weights, self.final_loss, self.entropy_production, self.w2_squared)
        rows: list[tuple[str, ...]] = [("λ", "final loss", "Σ", "W2²", "learning rate at knots")]
        for numbers, rates, good in zip(
            zip(*columns, strict=True), self.rates, self.converged, strict=True
        ):
            knots = " ".join(f"{float(rate):.3g}" for rate in rates)
            note = "" if good else "  (no minimum found)"
            rows.append((*(f"{float(x):.4g}" for x in numbers), knots + note))
        return table(rows, align="rrrrl")


@door
def front(
    law: AnyLaw,
    potential: HasStiffness,
    *,
    steps: int,
    weights: Any = None,
    targets: Any = None,
    knots: int = 12,
    temperature: Any = 0.0,
    largest_rate: ScalarLike | None = None,
    iterations: int = 200,
) -> Front:
    r"""Find the least Σ at each final loss over learning rates with knots, exactly.

    **Args:**
    - `law`, `potential`: as for `descent`. `Independent` and no matrices are much the fastest.
    - `steps`: K, which is also the number of links of Σ.
    - `weights`: λ > 0 of each point, shape (P,), best in an order in which each is near the one
      before; by default seven from 0.1 to 0.7.
    - `targets`: final losses, shape (P,), in units of the potential, in place of weights.
    - `knots`: m, the number of knots of the log-linear learning rates.
    - `temperature`: T of the injected noise, a number or a schedule, in units of the potential.
    - `largest_rate`: no rate exceeds it, in units of θ² per unit of the potential; by default 2
      over the largest eigenvalue of the symmetric stiffness, beyond which steps diverge.
    - `iterations`: the most steps of L-BFGS of one search.

    **Returns:** `Front`; `print` shows it.
    **Raises:** `InputError` for mismatched shapes, weights and targets together, and numbers that
    are not positive.
    **Differentiation:** none; points are stationary, so by the envelope theorem their objective has
    the derivatives of `descent` at fixed schedules.
    **Reference:** Okanohara, arXiv 2601.17607.
    **Example:** with noise of batches it warms up and cools down.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> spectrum = 1 / jnp.arange(1.0, 11.0)
        >>> start = esl.gaussian.Independent(jnp.ones(10), 0.0)
        >>> noisy = esl.Quadratic(spectrum, gradient_noise=spectrum)
        >>> front = esl.gaussian.front(start, noisy, steps=50, weights=[0.3], knots=5)
        >>> [round(float(rate), 2) for rate in front.rates[0]]
        [0.08, 0.23, 0.23, 0.11, 0.06]
    """
    check_positive_int("steps", steps)
    check_positive_int("knots", knots, minimum=2)
    check_positive_int("iterations", iterations)
    if weights is not None and targets is not None:
        raise refuse("targets", "be given in place of weights", "is given beside them")
    name, wanted = ("weights", weights) if targets is None else ("targets", targets)
    wanted = as_float(np.linspace(0.1, 0.7, 7) if wanted is None else wanted, name)
    if wanted.ndim != 1 or not wanted.size:
        raise refuse(name, "have shape (P,)", f"has shape {wanted.shape}")
    check_positive(name, wanted)
    motion = motion_of(law, potential)
    if largest_rate is None:
        largest_rate = 2 / motion.stiffest()
    cap = as_float(largest_rate, "largest_rate")
    if cap.ndim:
        raise refuse("largest_rate", "be a number", f"has shape {cap.shape}")
    check_positive("largest_rate", cap)
    heats = as_schedule(temperature, "temperature").rates(steps)
    if heats.shape != (steps,):
        raise refuse("temperature", "be one number at each time", f"has shape {heats.shape[1:]}")
    check_finite("temperature", heats)
    check_nonnegative("temperature", heats)
    search = _Search(motion, cap.astype(motion.mean.dtype), heats, knots, iterations)
    return _front(search, wanted.astype(motion.mean.dtype), targets is not None)


# Rounds of the multiplier of one target, and the weight p of its squared residual. With the
# curvature κ of log Σ along the front a round divides the residual by 1 + p/κ; κ is of order ten
# near the floor that noise sets to the loss.
_ROUNDS, _PENALTY = 8, 100.0


class _Goal(NamedTuple):
    """a log loss + b log Σ + p/2 (log loss - t)²."""

    loss: Array
    entropy: Array
    penalty: Array
    target: Array


class _Search(eqx.Module):
    """The law as a function of unbounded knots z: rates of `cap` · sigmoid(z)."""

    motion: AbstractMotion
    cap: Array
    heats: Float[Array, " K"]
    knots: int = eqx.field(static=True)
    iterations: int = eqx.field(static=True)

    def rates(self, z: Float[Array, "*points m"]) -> Float[Array, "*points m"]:
        return self.cap * jax.nn.sigmoid(z)

    def numbers(self, z: Float[Array, " m"]) -> tuple[Array, Array, Array]:
        """Final loss, Σ and W2²."""
        steps = self.heats.size
        times = jnp.arange(steps, dtype=z.dtype) / steps
        rates = jax.vmap(Knots(self.rates(z)))(times)
        squares, whole, means, spreads = path_of(self.motion, rates, self.heats, steps)
        return self.motion.loss(means[-1], spreads[-1]), steps * jnp.sum(squares), whole

    def value(self, z: Float[Array, " m"], goal: _Goal) -> Array:
        loss, sigma, _ = self.numbers(z)
        away = jnp.log(loss) - goal.target
        return goal.loss * away + goal.entropy * jnp.log(sigma) + goal.penalty * away**2 / 2

    def tolerance(self) -> float:
        # The objective is a logarithm. Rounding leaves it an error of about a hundred epsilons over
        # hundreds of steps, and its slope the root of that near a minimum of curvature one.
        return float(jnp.finfo(self.cap.dtype).eps ** 0.5)

    def minimum(self, z: Float[Array, " m"], goal: _Goal) -> tuple[Array, Array, Array]:
        """The knots of a minimum near z, the norm of the slope there, and the steps taken."""
        optimizer = optax.lbfgs()

        def fn(z):
            return self.value(z, goal)

        slope = optax.value_and_grad_from_state(fn)

        def unfinished(carry):
            _, _, count, size = carry
            return (count < self.iterations) & (size > self.tolerance())

        def step(carry):
            z, state, count, _ = carry
            value, gradient = slope(z, state=state)
            updates, state = optimizer.update(
                gradient, state, z, value=value, grad=gradient, value_fn=fn
            )
            size = jnp.linalg.norm(optax.tree_utils.tree_get(state, "grad"))
            return z + updates, state, count + 1, size

        start = z, optimizer.init(z), jnp.asarray(0), jnp.asarray(jnp.inf, z.dtype)
        z, _, count, size = jax.lax.while_loop(unfinished, step, start)
        return z, size, count

    def of_weight(self, z: Float[Array, " m"], weight: Array) -> tuple[Array, ...]:
        zero = jnp.zeros_like(weight)
        z, size, count = self.minimum(z, _Goal(zero + 1, weight, zero, zero))
        return z, weight, size < 100 * self.tolerance(), count

    def of_target(self, z: Float[Array, " m"], target: Array) -> tuple[Array, ...]:
        goal = jnp.log(target)

        def round_(carry, _):
            z, multiplier = carry
            one = jnp.ones_like(multiplier)
            z, size, count = self.minimum(z, _Goal(multiplier, one, _PENALTY * one, goal))
            away = jnp.log(self.numbers(z)[0]) - goal
            return (z, multiplier + _PENALTY * away), (size, count, away)

        (z, multiplier), (sizes, counts, away) = jax.lax.scan(
            round_, (z, jnp.ones_like(goal)), length=_ROUNDS
        )
        met = (sizes[-1] < 100 * self.tolerance()) & (jnp.abs(away[-1]) < 1e-3)
        return z, 1 / multiplier, met, jnp.sum(counts)

    def start(self, wanted: Array, by_target: bool) -> Float[Array, " m"]:
        """The constant rate of least loss, or of the loss nearest to the first target."""
        grid = jnp.linspace(-8, 3, 45, dtype=self.cap.dtype)
        losses = jnp.log(jax.lax.map(lambda z: self.numbers(jnp.full(self.knots, z))[0], grid))
        away = jnp.abs(losses - jnp.log(wanted[0])) if by_target else losses
        best = jnp.argmin(jnp.where(jnp.isfinite(away), away, jnp.inf))
        return jnp.full(self.knots, grid[best])


@eqx.filter_jit
def _front(search: _Search, wanted: Float[Array, " P"], by_target: bool) -> Front:
    find = search.of_target if by_target else search.of_weight

    def point(z, one):
        there, weight, met, count = find(z, one)
        # Where there is no minimum the search runs off, to no motion or to rates that blow up.
        met &= search.numbers(there)[0] < search.motion.loss(
            search.motion.mean, search.motion.spread
        )
        return jnp.where(met, there, z), (there, weight, met, count)

    _, (z, weights, converged, iterations) = jax.lax.scan(
        point, search.start(wanted, by_target), wanted
    )
    loss, sigma, whole = jax.lax.map(search.numbers, z)
    return Front(loss, sigma, whole, weights, search.rates(z), converged, iterations)
