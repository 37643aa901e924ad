r"""The exact law of gradient descent with noise of its batches, step by step.

A step θ ← θ - η (K (θ - c) + ξ) + √(2Tη) ζ with ξ ~ N(0, N) and ζ ~ N(0, I) keeps a law Gaussian:

    m ← m - η K (m - c)      C ← (1 - ηK) C (1 - ηK)ᵀ + η² N + 2ηT I

The spread by batches goes as η² and not as η, so a schedule changes the path and not only the
clock, and the law is that of K steps, with no limit of continuous training time. Its numbers are
those of a chain of the laws at the ends of J links,

    Σ = J Σ_j W2²(q_j, q_{j+1})      L = Σ_j W2(q_j, q_{j+1})      J = K by default,

and the final loss is E Φ(q_K) = ½ tr K (C + (m - c)(m - c)ᵀ). Every change of a law is computed
apart from the law, so that small links lose nothing to cancellation: for independent coordinates

    W2² = |Δm|² + Σ_i (ΔC_i/(√C_i + √(C_i + ΔC_i)))²

and in general W2² = |Δm|² + min_O ‖√C - O √(C + ΔC)‖² over rotations O. References: Okanohara,
arXiv 2601.17607; Bhatia, Jain and Lim, Expo. Math. 37, 165 (2019).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_finite, check_nonnegative, check_positive_int, door, known, refuse
from esljax._numerics import product, safe_divide, safe_root, sqrtm
from esljax._types import Array, Float, Scalar
from esljax.gaussian.drift import HasSchedules, HasStiffness, drift_of, schedules_of
from esljax.gaussian.law import AnyLaw, Independent, Law
from esljax.measures import SpeedLimit


class Descent(eqx.Module):
    """The exact law of a run of K steps, and its numbers."""

    report: SpeedLimit
    """Σ, L², W2², D and U of the chain of these laws. Motion that moves no mass is not seen."""
    final_loss: Scalar
    """E Φ(q_K) over all the data, without the noise of batches, shape (), in units of the
    potential."""
    laws: AnyLaw
    """The laws at the ends of the links, with a leading axis J+1."""

    @property
    def entropy_production(self) -> Scalar:
        """Σ = J Σ_j W2²(q_j, q_{j+1}), shape (), in units of θ²."""
        return self.report.entropy_production

    @property
    def w2_squared(self) -> Scalar:
        """W2²(q_0, q_K), shape (), in units of θ²."""
        return self.report.w2_squared

    def __str__(self) -> str:
        if not known(self.final_loss) or self.final_loss.ndim:
            return repr(self)
        return f"final loss {float(self.final_loss):.6g}\n{self.report}"


@door
def descent(
    law: AnyLaw,
    potential: HasStiffness,
    rule: HasSchedules,
    *,
    steps: int,
    links: int | None = None,
) -> Descent:
    r"""Follow the exact law through K steps, with the noise of batches, and measure its path.

    **Args:**
    - `law`: the law at s = 0. With `Independent`, and no matrices in the potential, a step costs d
      operations: 1000 coordinates and 1000 steps take about a tenth of a second.
    - `potential`: has `stiffness`, `center` and, if its gradient is noisy, `gradient_noise`, such
      as `Quadratic`.
    - `rule`: has `learning_rate` (per step) and `temperature` (units of the potential), such as
      `Langevin`, whose step is the one of this module.
    - `steps`: K. `links`: J, the number of links of the chain, which divides K; K by default.

    **Returns:** `Descent`; `print` shows it.
    **Raises:** `InputError` for mismatched shapes, J that does not divide K and, where values are
    known, rates and temperatures that are negative or not finite.
    **Differentiation:** forward and reverse, in the schedules' leaves, the law, the stiffness, the
    center and the noise. With matrices first derivatives only, by the envelope theorem. Infinite
    slopes out of the null space of a covariance count as 0.
    **Reference:** Okanohara, arXiv 2601.17607.
    **Example:**

        >>> import esljax as esl
        >>> start = esl.gaussian.Independent([2.0, 2.0], 1.0)
        >>> noisy = esl.Quadratic([1.0, 0.1], gradient_noise=[0.2, 0.02])
        >>> run = esl.gaussian.descent(start, noisy, esl.Langevin(0.1), steps=50)
        >>> round(float(run.entropy_production), 3), round(float(run.w2_squared), 3)
        (13.796, 5.54)
        >>> round(float(run.final_loss), 4)
        0.0972
    """
    check_positive_int("steps", steps)
    links = steps if links is None else links
    check_positive_int("links", links)
    if steps % links:
        raise refuse("links", f"divide the {steps} steps", f"is {links}")
    motion = motion_of(law, potential)
    noisy = getattr(potential, "gradient_noise", None) is not None
    worth = _NOISY if noisy else ""
    report, loss, path = _descend(motion, *controls_of(rule, steps), links, worth)
    return Descent(report, loss, path)


_NOISY = (
    "Noise of batches makes the path depend on the learning rate, so another timing takes another "
    "path and its Σ is not the one promised here: gaussian.front searches over both."
)


class AbstractMotion(eqx.Module):
    """One step of a law, as its mean (d,) relative to the center and its spread."""

    mean: eqx.AbstractVar[Float[Array, " d"]]
    """The mean at s = 0, relative to the center."""
    spread: eqx.AbstractVar[Float[Array, "..."]]
    """The covariance at s = 0, as the subclass stores it."""
    center: eqx.AbstractVar[Float[Array, " d"]]
    """c."""

    @abc.abstractmethod
    def step(self, mean: Array, spread: Array, rate: Array, heat: Array) -> tuple[Array, ...]:
        """The mean and the spread after a step, and how much each has changed."""

    @abc.abstractmethod
    def distances(self, spreads: Array, changes: Array) -> Array:
        """W2² between two laws of one mean whose spreads differ by `change`, for each of J."""

    @abc.abstractmethod
    def loss(self, mean: Array, spread: Array) -> Array:
        """E Φ."""

    @abc.abstractmethod
    def stiffest(self) -> Array:
        """The largest eigenvalue of the symmetric part of K."""

    @abc.abstractmethod
    def laws(self, means: Array, spreads: Array) -> AnyLaw:
        """The laws of several means and spreads."""


class _Coordinates(AbstractMotion):
    """Coordinates that are independent throughout: everything has shape (d,)."""

    mean: Float[Array, " d"]
    spread: Float[Array, " d"]
    center: Float[Array, " d"]
    stiffness: Float[Array, " d"]
    noise: Float[Array, " d"]

    def step(self, mean: Array, spread: Array, rate: Array, heat: Array) -> tuple[Array, ...]:
        pull = rate * self.stiffness
        added = rate**2 * self.noise + 2 * rate * heat
        changes = -pull * mean, pull * (pull - 2) * spread + added
        return (1 - pull) * mean, (1 - pull) ** 2 * spread + added, *changes

    def distances(self, spreads: Array, changes: Array) -> Array:
        widths = safe_root(spreads) + safe_root(spreads + changes)
        return jnp.sum(safe_divide(changes, widths) ** 2, axis=-1)

    def loss(self, mean: Array, spread: Array) -> Array:
        return jnp.sum(self.stiffness * (spread + mean**2)) / 2

    def stiffest(self) -> Array:
        return jnp.max(self.stiffness)

    def laws(self, means: Array, spreads: Array) -> AnyLaw:
        return jax.vmap(Independent)(means + self.center, spreads)


class _Matrices(AbstractMotion):
    """Any covariance, stiffness and noise: matrices (d, d)."""

    mean: Float[Array, " d"]
    spread: Float[Array, "d d"]
    center: Float[Array, " d"]
    stiffness: Float[Array, "d d"]
    noise: Float[Array, "d d"]

    def step(self, mean: Array, spread: Array, rate: Array, heat: Array) -> tuple[Array, ...]:
        pull, identity = rate * self.stiffness, jnp.eye(mean.size, dtype=mean.dtype)
        added = rate**2 * self.noise + 2 * rate * heat * identity
        drawn, kept = product(pull, spread), identity - pull
        change = product(drawn, pull.T) - drawn - drawn.T + added
        moved = product(product(kept, spread), kept.T) + added
        return product(kept, mean), (moved + moved.T) / 2, -product(pull, mean), change

    def distances(self, spreads: Array, changes: Array) -> Array:
        # One after another: two stacks of factorizations at a time can wait for each other forever
        # on a machine of two cores (jaxlib 0.10).
        return jax.lax.map(
            lambda link: _procrustes(sqrtm(link[0]), sqrtm(link[0] + link[1])), (spreads, changes)
        )

    def loss(self, mean: Array, spread: Array) -> Array:
        return (jnp.sum(self.stiffness * spread) + mean @ product(self.stiffness, mean)) / 2

    def stiffest(self) -> Array:
        return jnp.linalg.eigvalsh((self.stiffness + self.stiffness.T) / 2)[-1]

    def laws(self, means: Array, spreads: Array) -> AnyLaw:
        return jax.vmap(Law)(means + self.center, spreads)


def motion_of(law: AnyLaw, potential: Any) -> AbstractMotion:
    """The start of a run and its steps, converted and checked.

    **Raises:** `InputError` for shapes that do not fit each other.
    """
    stiffness, center, noise = drift_of(law, potential)
    (d,), noise = law.mean.shape, jnp.zeros((), law.mean.dtype) if noise is None else noise
    dtype = jnp.result_type(law.mean, stiffness, center, noise)
    center = jnp.broadcast_to(center, (d,)).astype(dtype)
    mean = law.mean.astype(dtype) - center
    if isinstance(law, Independent) and max(stiffness.ndim, noise.ndim) < 2:
        along = [jnp.broadcast_to(x, (d,)).astype(dtype) for x in (stiffness, noise)]
        return _Coordinates(mean, law.variance.astype(dtype), center, *along)
    matrices = [(x if x.ndim == 2 else x * jnp.eye(d)).astype(dtype) for x in (stiffness, noise)]
    return _Matrices(mean, law.covariance.astype(dtype), center, *matrices)


def controls_of(rule: Any, steps: int) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """The learning rates and temperatures of all steps, checked.

    **Raises:** `InputError` for values that are negative or not finite.
    """
    schedules, times = schedules_of(rule, steps), jnp.arange(steps) / steps
    rates, heats = (jnp.broadcast_to(jax.vmap(x)(times), (steps,)) for x in schedules)
    for name, values in (("learning_rate", rates), ("temperature", heats)):
        check_finite(f"rule.{name}", values)
        check_nonnegative(f"rule.{name}", values)
    return rates, heats


def path_of(
    motion: AbstractMotion, rates: Float[Array, " K"], heats: Float[Array, " K"], links: int
) -> tuple[Array, Array, Array, Array]:
    """The squares of J links and of the whole, and the means and spreads at their J+1 ends."""

    def step(state, controls):
        mean, spread, *changes = motion.step(*state, *controls)
        return (mean, spread), (*state, *changes)

    dtype = motion.mean.dtype
    controls = rates.astype(dtype), heats.astype(dtype)
    end, (means, spreads, shifts, changes) = jax.lax.scan(
        step, (motion.mean, motion.spread), controls
    )
    shifts, changes = (x.reshape(links, -1, *x.shape[1:]).sum(axis=1) for x in (shifts, changes))
    every = rates.size // links
    means, spreads = (
        jnp.concatenate([x[::every], last[None]])
        for x, last in zip((means, spreads), end, strict=True)
    )
    squares = jnp.sum(shifts**2, axis=-1) + motion.distances(spreads[:-1], changes)
    shift, change = jnp.sum(shifts, axis=0), jnp.sum(changes, axis=0)
    whole = jnp.sum(shift**2) + motion.distances(spreads[:1], change[None])[0]
    return squares, whole, means, spreads


@eqx.filter_jit
def _descend(
    motion: AbstractMotion,
    rates: Float[Array, " K"],
    heats: Float[Array, " K"],
    links: int,
    worth: str,
) -> tuple[SpeedLimit, Scalar, AnyLaw]:
    squares, whole, means, spreads = path_of(motion, rates, heats, links)
    lengths, learning_times = safe_root(squares), rates.reshape(links, -1).sum(axis=1)
    report = SpeedLimit(
        entropy_production=links * jnp.sum(squares),
        length_squared=jnp.sum(lengths) ** 2,
        w2_squared=whole,
        housekeeping=None,
        circulation="invisible",
        dissipation=jnp.sum(safe_divide(squares, learning_times)),
        learning_time=jnp.sum(learning_times),
        times=(jnp.arange(links) + 0.5) / links,
        speed=links * lengths,
        converged=jnp.asarray(True),
        elapsed=jnp.full(links, 1 / links),
        mobility=links * learning_times,
        source=f"the exact Gaussian law of {rates.size} steps in {links} links",
        worth=worth,
    )
    return report, motion.loss(means[-1], spreads[-1]), motion.laws(means, spreads)


@jax.custom_jvp
def _procrustes(x: Float[Array, "d d"], y: Float[Array, "d d"]) -> Scalar:
    """min_O ‖x - O y‖² over rotations O."""
    return jnp.sum(_residual(x, y)[0] ** 2)


@_procrustes.defjvp
def _(primals, tangents):
    # The best O is stationary, so it may be held fixed; a derivative of the singular vectors would
    # be NaN where singular values coincide.
    residual, rotation = _residual(*primals)
    dx, dy = tangents
    slope = jnp.sum(residual * dx) - jnp.sum(product(rotation.T, residual) * dy)
    return jnp.sum(residual**2), 2 * slope


def _residual(x: Float[Array, "d d"], y: Float[Array, "d d"]) -> tuple[Array, Array]:
    """x - O y at the best rotation O, and O."""
    u, _, vt = jnp.linalg.svd(product(x, y.T))
    rotation = jax.lax.stop_gradient(product(u, vt))
    return x - product(rotation, y), rotation
