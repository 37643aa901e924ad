r"""Velocities by way of a density: v = b - D ∇log q̂, with q̂ fitted on one half of the members and evaluated on the other.

`KDEVelocity` evaluates its field in the variational expression of `velocity` and is a lower bound. `HistogramVelocity` and `FlowVelocity`
plug the score in,

    E‖b - D ∇log q̂‖² = σ - 2 E[v·e] + E‖e‖²,    e = D (∇log q̂ - ∇log q),

whose error is of first order in that of the score and of either sign; near equilibrium, where v = 0, it is high.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_key, check_positive_int, refuse
from esljax._types import Array, Float, Key
from esljax.density import BLOCK, AbstractDensity, AbstractLogDensity, FlowDensity, HistogramDensity, KernelDensity, Kernels
from esljax.velocity import AbstractField, AbstractVelocity, Snapshot, Velocity, halves, interleave, variational


class KDEVelocity(AbstractVelocity):
    r"""Kernels for the density and for the drift: a lower bound in expectation that follows multimodal laws, in few dimensions.

        w(θ) = A θ + a + Σ_j p_j(θ) r_j - D ∇log q̂(θ),    p_j(θ) ∝ N(θ; θ_j, h² C), Σ_j p_j = 1

    A θ + a is the best affine drift and r_j what it misses at member j. Plugging the score of a kernel density in would be high wherever
    the law is nearly at rest (kernels widen it) and at the mercy of the tails; its field in the variational expression errs by the square
    of its error only, and downwards. O(n²).

    **Differentiation:** forward and reverse, of every order, at the bandwidth found.
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = True
    between: ClassVar[bool] = False

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        density = KernelDensity(for_score=True)
        first, second = halves(_moving(snapshot))
        answers = [variational(_kernel_field(density, learned), judged) for learned, judged in ((second, first), (first, second))]
        values, divergence, contributions = (interleave(*pair) for pair in zip(*answers, strict=True))
        return Velocity(values, contributions, None, divergence, bound="lower", note=density.note), state

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """b - D ∇log q̂ with one kernel density of all members; the drift is known and needs no kernels."""
        law, _ = KernelDensity(for_score=True).estimate(snapshot.positions, None)
        return _plugged_in(law, snapshot)


def _kernel_field(density: KernelDensity, snapshot: Snapshot) -> "_KernelField":
    law, _ = density.estimate(snapshot.positions, None)
    drift: Any = snapshot.drift
    diffusion: Any = snapshot.diffusion
    offset = jnp.mean(drift, axis=0)
    # In the frame the covariance is 1, so that the best slope is the cross-covariance itself.
    slope = jnp.matmul((drift - offset).T, law.members, precision="highest") / len(law.members)
    missed = drift - offset - jnp.matmul(law.members, slope.T, precision="highest")
    return _KernelField(law, offset, slope, missed, diffusion)


class _KernelField(AbstractField):
    law: Kernels
    offset: Float[Array, " d"]
    slope: Float[Array, "d d"]
    missed: Float[Array, "n d"]
    diffusion: Float[Array, "..."]

    def evaluate(self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        spread = diffusion if diffusion.ndim == 2 else diffusion * jnp.eye(len(self.offset), dtype=positions.dtype)

        def at(x):
            jacobian = jax.jacfwd(self._value)(x)
            return self._value(x), jnp.sum(spread * jacobian), jnp.trace(jacobian)

        return jax.lax.map(at, positions, batch_size=BLOCK)

    def _value(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        drift = self.offset + jnp.matmul(self.slope, self.law.frame.into(x), precision="highest") + self.law.average(x, self.missed)
        return drift - _diffuse(self.diffusion, self.law.score(x))


class AbstractPlugInVelocity(AbstractVelocity):
    """The score of a density, cross-fitted, in place of the true one: an approximation that may lie on either side."""

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = True
    between: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def density(self) -> AbstractDensity:
        """What is fitted to each half of the members."""

    def init(self, positions: Float[Array, "n d"]) -> Any:
        """The states of the two densities."""
        return self.density.init(positions[1::2]), self.density.init(positions[0::2])

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """b - D ∇log q̂ at each member, with the q̂ of the half that it is not in."""
        density, states, values = self.density, [], []
        first, second = halves(_moving(snapshot))
        for learned, judged, given in ((second, first, state[0]), (first, second, state[1])):
            law, after = density.estimate(learned.positions, given)
            values.append(_plugged_in(law, judged))
            states.append(after)
        values = interleave(*values)
        return Velocity(values, jnp.sum(values**2, axis=1), None, None, bound="none", note=density.note), tuple(states)

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """b - D ∇log q̂ with one density fitted to all members."""
        law, _ = self.density.estimate(snapshot.positions, self.density.init(snapshot.positions))
        return _plugged_in(law, snapshot)


class HistogramVelocity(AbstractPlugInVelocity):
    """The score from the logarithms of binned counts (`HistogramDensity`): quick and transparent, for at most three dimensions.

    **Raises:** `InputError` in more than three dimensions.
    **Differentiation:** in the drift and the diffusion; the members' positions move no counts, so that their slope is not the estimate's.
    """

    @property
    def density(self) -> AbstractDensity:
        return HistogramDensity()


class FlowVelocity(AbstractPlugInVelocity):
    """The score of a normalizing flow (`FlowDensity`), which follows multimodal laws in several dimensions, for seconds of fitting.

    Each snapshot of a run starts from the flow of the one before.

    **Args:** `key`: what the first flow is drawn from. `steps`: of the optimizer, per snapshot and half.
    **Raises:** `InputError` if `key` is not a key or `steps` not a positive integer.
    **Differentiation:** in the drift and the diffusion; in the positions through the optimization of the flow, which costs its memory.
    """

    key: Key
    steps: int = eqx.field(static=True, default=1000)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("steps", self.steps)

    @property
    def density(self) -> AbstractDensity:
        return FlowDensity(self.key, steps=self.steps)


def _moving(snapshot: Snapshot) -> Any:
    """The snapshot, if it carries the drift and the diffusion that a velocity by way of a density needs."""
    if snapshot.drift is None or snapshot.diffusion is None:
        raise refuse("snapshot", "carry the drift and the diffusion of its members", "does not")
    return snapshot


def _plugged_in(law: AbstractLogDensity, snapshot: Any) -> Float[Array, "n d"]:
    """b - D ∇log q̂ at each member."""
    return snapshot.drift - _diffuse(snapshot.diffusion, jax.lax.map(law.score, snapshot.positions, batch_size=BLOCK))


def _diffuse(diffusion: Float[Array, "..."], scores: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """D times a score, or each of several."""
    return jnp.matmul(scores, diffusion, precision="highest") if diffusion.ndim == 2 else diffusion * scores
