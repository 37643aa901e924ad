r"""Velocities by way of a density: a field made of a regression of the drift and of the score of a fitted density,

    w(θ) = A θ + a + m(θ) - D ∇log q̂(θ)

with A θ + a the best affine drift and m a smooth mean of what it misses. The field is taken a share α of the way from the best affine one,

    α = E[(w - w₀)·(v - w₀)] / E‖w - w₀‖²,   held within [0, 1],

estimated from members that neither has seen: few members in many dimensions know their moments and not their density. Fitted on one
half of the members and evaluated on the other in the variational expression of `velocity`, it is a lower bound of σ in expectation, short
of it by E‖w - v‖², whatever the density.

The score plugged in, E‖b - D ∇log q̂‖², would be no bound: it is high by the square of the same error wherever the law is nearly at rest,
and where the drift is no function of the positions (that of a projection is not) it counts the scatter of the drift as entropy production.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_key, check_positive_int, refuse
from esljax._types import Array, Float, Key, Scalar
from esljax.density import (
    BLOCK,
    AbstractDensity,
    AbstractLogDensity,
    AbstractSmoother,
    FlowDensity,
    Frame,
    HistogramDensity,
    KDEDensity,
)
from esljax.velocity.affine import AffineVelocity
from esljax.velocity.base import (
    AbstractField,
    AbstractVelocity,
    Snapshot,
    Velocity,
    halves,
    interleave,
    rows,
    variational,
)

FEWEST = 4
"""Unseen members without which α stays 0: halves of fewer than 16."""


class AbstractDensityVelocity(AbstractVelocity):
    """The field of a fitted density, α of the way from the affine one, cross-fitted: a lower bound in expectation."""

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
        """The field at each member, with the density and the regression of the half that it is not in."""
        answers, states = [], []
        first, second = halves(_moving(snapshot))
        for learned, judged, given in ((second, first, state[0]), (first, second, state[1])):
            field, after = self._fit(learned, given)
            answers.append(variational(field, judged))
            states.append(after)
        values, divergence, contributions = (
            interleave(*pair) for pair in zip(*answers, strict=True)
        )
        return Velocity(
            values, contributions, None, divergence, bound="lower", note=self.density.note
        ), tuple(states)

    def _fit(self, snapshot: Snapshot, state: Any) -> tuple[AbstractField, Any]:
        """The field of these members: α by the fifth that four in five are fitted without, everything else from all."""
        fifth = np.arange(len(snapshot.positions)) % 5 == 0
        learned, unseen = rows(snapshot, ~fifth), rows(snapshot, fifth)
        law, after = self.density.estimate(snapshot.positions, state)
        if len(unseen.positions) < FEWEST:
            return _affine(snapshot), after
        blind = (
            law
            if self.density.spares_a_fifth
            else self.density.estimate(learned.positions, state)[0]
        )
        share = _share(_affine(learned), _field(blind, learned), unseen)
        return _Between(_affine(snapshot), _field(law, snapshot), share), after

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """b - D ∇log q̂ with one density fitted to all members; the drift is known there and needs no regression."""
        law, _ = self.density.estimate(snapshot.positions, self.density.init(snapshot.positions))
        scores = jax.lax.map(law.score, snapshot.positions, batch_size=BLOCK)
        return snapshot.drift - _diffuse(snapshot.diffusion, scores)


class KDEVelocity(AbstractDensityVelocity):
    r"""Kernels for the density and for the drift: it follows multimodal laws, in few dimensions.

        m(θ) = Σ_j p_j(θ) r_j,    p_j(θ) ∝ N(θ; θ_j, h² C), Σ_j p_j = 1,

    r_j being what the affine drift misses at member j, and h and C the bandwidth and the covariance of `KDEDensity`. O(n²).

    **Differentiation:** forward and reverse, of every order, at the bandwidth found.
    """

    @property
    def density(self) -> AbstractDensity:
        return KDEDensity(for_score=True)


class HistogramVelocity(AbstractDensityVelocity):
    """Binned counts for the density, and means over the same bins for the drift, both through a spline (`HistogramDensity`): quick and
    transparent, for at most three dimensions.

    **Raises:** `InputError` in more than three dimensions.
    **Differentiation:** in the drift and the diffusion; the members' positions move no counts, so that their slope is not the estimate's.
    """

    @property
    def density(self) -> AbstractDensity:
        return HistogramDensity()


class FlowVelocity(AbstractDensityVelocity):
    """A normalizing flow for the density (`FlowDensity`), which follows multimodal laws in several dimensions for seconds of fitting, and
    kernels for the drift, as in `KDEVelocity`.

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


class _Field(AbstractField):
    frame: Frame
    offset: Float[Array, " d"]
    slope: Float[Array, "d d"]
    missed: Any
    """m, a function of one position."""
    law: AbstractLogDensity
    diffusion: Float[Array, "..."]

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        spread = (
            diffusion
            if diffusion.ndim == 2
            else diffusion * jnp.eye(len(self.offset), dtype=positions.dtype)
        )

        def at(x):
            jacobian = jax.jacfwd(self._value)(x)
            return self._value(x), jnp.sum(spread * jacobian), jnp.trace(jacobian)

        return jax.lax.map(at, positions, batch_size=BLOCK)

    def _value(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        drift = (
            self.offset
            + jnp.matmul(self.slope, self.frame.into(x), precision="highest")
            + self.missed(x)
        )
        return drift - _diffuse(self.diffusion, self.law.score(x))


def _field(law: AbstractLogDensity, snapshot: Snapshot) -> _Field:
    """The drift of these members by regression, and the score of a density of theirs."""
    drift: Any = snapshot.drift
    diffusion: Any = snapshot.diffusion
    frame = Frame.of(snapshot.positions)
    members, offset = frame.into(snapshot.positions), jnp.mean(drift, axis=0)
    # In the frame the covariance is 1, so that the best slope is the cross-covariance itself.
    slope = jnp.matmul((drift - offset).T, members, precision="highest") / len(members)
    rest = drift - offset - jnp.matmul(members, slope.T, precision="highest")
    smoother = (
        law
        if isinstance(law, AbstractSmoother)
        else KDEDensity(for_score=True).estimate(snapshot.positions, None)[0]
    )
    return _Field(frame, offset, slope, smoother.smooth(snapshot.positions, rest), law, diffusion)


class _Between(AbstractField):
    """A field α of the way from one to another."""

    base: AbstractField
    other: AbstractField
    share: Scalar

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        base, other = (each.evaluate(positions, diffusion) for each in (self.base, self.other))
        w, spread, divergence = (a + self.share * (b - a) for a, b in zip(base, other, strict=True))
        return w, spread, divergence


def _share(base: AbstractField, other: AbstractField, unseen: Snapshot) -> Scalar:
    """α, where the variational expression of unseen members is largest, with one standard error taken off its numerator: where the sample
    cannot tell, the simpler field stands."""
    (w, spread, _), (other_w, other_spread, _) = (
        each.evaluate(unseen.positions, unseen.diffusion) for each in (base, other)
    )
    step = other_w - w
    gains = jnp.sum(step * (unseen.drift - w), axis=1) + other_spread - spread
    error = jnp.std(gains, ddof=1) / jnp.sqrt(len(gains))
    square = jnp.mean(jnp.sum(step**2, axis=1))
    return jnp.where(
        square > 0, jnp.clip((jnp.mean(gains) - error) / jnp.where(square > 0, square, 1), 0, 1), 0
    )


def _affine(snapshot: Snapshot) -> AbstractField:
    """The best affine field of these members."""
    return AffineVelocity().fit(snapshot, False, None)[0]


def _moving(snapshot: Snapshot) -> Any:
    """The snapshot, if it carries the drift and the diffusion that a velocity by way of a density needs."""
    if snapshot.drift is None or snapshot.diffusion is None:
        raise refuse("snapshot", "carry the drift and the diffusion of its members", "does not")
    return snapshot


def _diffuse(diffusion: Float[Array, "..."], scores: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """D times a score, or each of several."""
    return (
        jnp.matmul(scores, diffusion, precision="highest")
        if diffusion.ndim == 2
        else diffusion * scores
    )
