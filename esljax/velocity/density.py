r"""Velocities by way of a density: a regression of the drift and the score of a fitted density.

    w(θ) = A θ + a + m(θ) - D ∇log q̂(θ)

A θ + a is the best affine drift and m a smooth mean of the rest. The field is taken a share α of
the way from the best affine field w₀ of `AffineVelocity` to w,

    α = E[(w - w₀)·(v - w₀)] / E‖w - w₀‖²,   held within [0, 1],

estimated from members that neither was fitted to: few members in many dimensions determine their
moments and not their density. Fitted on thirds of the members and evaluated on the others in the
variational expression of `velocity.base`, the fields give σ̂ and a lower bound, whatever the
density. What moves no mass is contained in both, unresolved.

The score plugged in, E‖b - D ∇log q̂‖², would be no bound: it is high by the square of the same
error wherever the law is nearly at rest, and where the drift is no function of the positions (that
of a projection is not) it counts the scatter of the drift as entropy production.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_key, check_positive_int, plain_int, wrong_answer
from esljax._numerics import product, safe_divide
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
    FOLDS,
    AbstractField,
    AbstractVelocity,
    Snapshot,
    Velocity,
    check_parts,
    cross_fitted,
    diffuse,
    diffusion_matrix,
    evaluated,
    rows,
    thirds,
    unbiased,
)

# The fewest members of a density, and unseen ones without which α stays 0: thirds of fewer than 16.
_FEWEST = 4


class AbstractDensityVelocity(AbstractVelocity):
    """The field of a fitted density, α of the way from the affine one, cross-fitted.

    σ̂ is short by the bias of the fit alone, and contains what moves no mass. A subclass defines one
    property, `density`.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> from esljax.velocity.density import AbstractDensityVelocity
        >>> class GaussianVelocity(AbstractDensityVelocity):
        ...     density = esl.density.GaussianDensity()
        >>> x = jax.random.normal(jax.random.key(0), (64, 1))
        >>> GaussianVelocity()(x, -x, 1.0).bound
        'lower'
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = True
    between: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def density(self) -> AbstractDensity:
        """The way to fit a density to each third of the members."""

    def init(self, positions: Float[Array, "n d"]) -> Any:
        """Return the states of the three densities."""
        return tuple(self.density.init(positions[i::FOLDS]) for i in range(FOLDS))

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        """Evaluate each member's third in the fields that were fitted to the other two."""
        check_parts(snapshot, ("drift", "diffusion"))
        parts = thirds(snapshot)
        fits = [self._fit(part, given) for part, given in zip(parts, state, strict=True)]
        fields, states = zip(*fits, strict=True)
        values, divergence, contributions, bounds = cross_fitted(fields, parts)
        return Velocity(
            values,
            contributions,
            None,
            divergence,
            bound="lower",
            note=self.density.note,
            bound_contributions=bounds,
        ), states

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return b - D ∇log q̂ with one density fitted to all members.

        The drift is known at the members and needs no regression.
        """
        check_parts(snapshot, ("drift", "diffusion"))
        positions = snapshot.positions
        law, _ = self.density.checked_estimate(positions, self.density.init(positions))
        scores = jax.lax.map(lambda x: _score(law, x), positions, batch_size=BLOCK)
        return snapshot.drift - diffuse(snapshot.diffusion, scores)

    def _fit(self, snapshot: Snapshot, state: Any) -> tuple[AbstractField, Any]:
        """Return the field of these members, and the state of its density.

        α is judged by every fifth member, from fits to the others; all else is fitted to all.
        """
        fifth = np.arange(len(snapshot.positions)) % 5 == 0
        learned, unseen = rows(snapshot, ~fifth), rows(snapshot, fifth)
        if len(snapshot.positions) < _FEWEST:
            return _affine(snapshot), state
        law, after = self.density.checked_estimate(snapshot.positions, state)
        if len(unseen.positions) < _FEWEST:
            return _affine(snapshot), after
        blind = (
            law
            if self.density.spares_a_fifth
            else self.density.checked_estimate(learned.positions, state)[0]
        )
        share = _share(_affine(learned), _field(blind, learned), unseen)
        return _Between(_affine(snapshot), _field(law, snapshot), share), after


class KDEVelocity(AbstractDensityVelocity):
    r"""A kernel density estimate (KDE), and the same kernels for the drift, in few dimensions.

        m(θ) = Σ_j p_j(θ) r_j,    p_j(θ) ∝ N(θ; θ_j, h² C), Σ_j p_j = 1

    r_j is the drift at member j less the affine drift; h and C are the bandwidth and the covariance
    of `KDEDensity`. It follows multimodal laws. O(n²).

    **Differentiation:** forward and reverse, of every order, at the bandwidth chosen.

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (1000, 1)) / 2
        >>> x = x.at[:500].add(2.0)  # two modes, in every third of the members
        >>> kde, affine = esl.KDEVelocity(), esl.AffineVelocity()
        >>> bool(kde(x, 0 * x, 1.0).squared > 2 * affine(x, 0 * x, 1.0).squared)
        True
    """

    def in_units(self, size: Scalar) -> "KDEVelocity":
        return self

    @property
    def density(self) -> AbstractDensity:
        return KDEDensity(for_score=True)


class HistogramVelocity(AbstractDensityVelocity):
    """Counts in bins for the density, and means over the same bins for the drift.

    Both go through a spline (`HistogramDensity`). Quick and transparent, for at most three
    dimensions.

    **Raises:** `InputError` in more than three dimensions.
    **Differentiation:** in the drift and the diffusion. The positions move no counts, so their
    slope is not that of the estimate.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> velocity = esl.HistogramVelocity()(x, -x, 1.0)  # at equilibrium nothing moves
        >>> bool(abs(velocity.squared) < 5 * velocity.standard_error.squared + 0.01)
        True
    """

    def in_units(self, size: Scalar) -> "HistogramVelocity":
        return self

    @property
    def density(self) -> AbstractDensity:
        return HistogramDensity()


class FlowVelocity(AbstractDensityVelocity):
    """A normalizing flow for the density (`FlowDensity`), and the kernels of `KDEVelocity`.

    It follows multimodal laws in several dimensions, for seconds of fitting. The flow of each
    snapshot of a run starts from that of the snapshot before; the drift is smoothed by kernels.

    **Args:** `key`: draws the first flow. `steps`: as in `FlowDensity`, per snapshot and third.
    **Raises:** `InputError` if `key` is not a key or `steps` not a positive integer.
    **Differentiation:** in the drift and the diffusion; in the positions through the optimization
    of the flow, which costs its memory.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (40, 1))
        >>> esl.FlowVelocity(jax.random.key(1), steps=2)(x, -x, 1.0).bound
        'lower'
    """

    key: Key
    steps: int = eqx.field(static=True, converter=plain_int, default=1000)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("steps", self.steps)

    def in_units(self, size: Scalar) -> "FlowVelocity":
        return self

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
        matrix = diffusion_matrix(diffusion, len(self.offset))

        def at(x):
            jacobian = jax.jacfwd(self._value)(x)
            return self._value(x), jnp.sum(matrix * jacobian), jnp.trace(jacobian)

        return jax.lax.map(at, positions, batch_size=BLOCK)

    def _value(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        missed = _vector(self.law, "smooth", "means", self.missed(x), x)
        drift = self.offset + product(self.slope, self.frame.into(x)) + missed
        return drift - diffuse(self.diffusion, _score(self.law, x))


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


def _affine(snapshot: Snapshot) -> AbstractField:
    """Return the best affine field of these members."""
    return AffineVelocity().fit(unbiased(snapshot), False, None)[0]


def _field(law: AbstractLogDensity, snapshot: Snapshot) -> _Field:
    """Return the field of these members: the regression of their drift, and a score of theirs."""
    drift: Any = snapshot.drift
    diffusion: Any = snapshot.diffusion
    frame = Frame.of(snapshot.positions)
    members, offset = frame.into(snapshot.positions), jnp.mean(drift, axis=0)
    # In the frame the covariance is 1, so the best slope is the cross-covariance itself.
    slope = product((drift - offset).T, members) / len(members)
    rest = drift - offset - product(members, slope.T)
    smoother = (
        law
        if isinstance(law, AbstractSmoother)
        else KDEDensity(for_score=True).estimate(snapshot.positions, None)[0]
    )
    return _Field(frame, offset, slope, smoother.smooth(snapshot.positions, rest), law, diffusion)


def _share(base: AbstractField, other: AbstractField, unseen: Snapshot) -> Scalar:
    """Return the α at which the variational expression of unseen members is greatest.

    One standard error is taken off its numerator, so that the simpler field stands where the sample
    cannot decide, and more where few members judge: near rest, 50 members spread σ by .051 over
    runs with one standard error and by .021 with two.
    """
    (w, spread, _), (other_w, other_spread, _) = (evaluated(each, unseen) for each in (base, other))
    step = other_w - w
    gains = jnp.sum(step * (unseen.drift - w), axis=1) + other_spread - spread
    error = jnp.std(gains, ddof=1) / jnp.sqrt(len(gains))
    square = jnp.mean(jnp.sum(step**2, axis=1))
    caution = 1 + 4 / len(gains)
    return jnp.clip(safe_divide(jnp.mean(gains) - caution * error, square), 0, 1)


def _score(law: AbstractLogDensity, x: Float[Array, " d"]) -> Float[Array, " d"]:
    """Return the score at one point, or reject a score of another shape."""
    return _vector(law, "score", "a score", law.score(x), x)


def _vector(
    law: AbstractLogDensity, method: str, name: str, value: Any, x: Float[Array, " d"]
) -> Float[Array, " d"]:
    """Return a value that a density gives at x, or reject one of another shape."""
    if getattr(value, "shape", None) != x.shape:
        raise wrong_answer("density", law, method, f"{name} of shape {x.shape}", value)
    return value
