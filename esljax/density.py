r"""The density of the law that an ensemble samples: log q̂ and its score ∇log q̂, from the members.

Gaussian, flow and kernel densities work in the frame y = L⁻¹(θ - θ̄) with L Lᵀ the covariance of the members, its correlations shrunk, in
which the cloud has unit width along every axis, so that their answers do not depend on the units of θ:

    log q̂(θ) = log p̂(y) - log|L|,    ∇log q̂(θ) = L⁻ᵀ ∇log p̂(y)

A class here is a way to fit; what it fits is a pytree with `log_density` and `score`. A density fitted to some members and evaluated at the
same members flatters itself: fit on one half and evaluate on the other.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.distributions import AbstractDistribution, StandardNormal
from flowjax.flows import block_neural_autoregressive_flow
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp

from esljax._checks import check_ensemble, check_key, check_positive, check_positive_int, known, refuse
from esljax._matrix import shrunk_covariance
from esljax._types import Array, ArrayLike, Float, Key, Scalar

# The bandwidths that are tried, relative to the best one for a Gaussian law: steps of 19 %, down to modes 32 times as narrow as the law.
_RELATIVE_BANDWIDTHS = 2.0 ** np.arange(-5.0, 1.01, 0.25)

# Members whose kernels or whose derivatives are held in memory at a time.
BLOCK = 128


class AbstractLogDensity(eqx.Module):
    """A density, fitted once and then evaluated anywhere: a pytree."""

    @abc.abstractmethod
    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        """log q̂ at one point, in nats."""

    @abc.abstractmethod
    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """∇log q̂ at one point."""


class AbstractSmoother(eqx.Module):
    """A density whose kernels or bins average more than members."""

    @abc.abstractmethod
    def smooth(self, positions: Float[Array, "n d"], values: Float[Array, "n p"]) -> Callable[[Array], Array]:
        """The local mean of what the members carry, a function of one position (d,) with values (p,): a pytree, differentiable once.
        `positions` are those the density was fitted to."""


class AbstractDensity(eqx.Module):
    """A way to fit a density to an ensemble. Calls look like `KernelDensity().fit(positions).log_density(x)`."""

    # Whether a fit takes every fifth member, the first included, only to stop by.
    spares_a_fifth: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """What a fit does to the data, in words."""

    @abc.abstractmethod
    def init(self, positions: Float[Array, "n d"]) -> Any:
        """The state before the first fit: arrays from which a fit of a similar ensemble can start, or None."""

    @abc.abstractmethod
    def estimate(self, positions: Float[Array, "n d"], state: Any) -> tuple[AbstractLogDensity, Any]:
        """The density of these members and the state for the next fit. Values are not checked: for use inside `jit`, `vmap` and `scan`."""

    def fit(self, positions: Float[ArrayLike, "n d"]) -> AbstractLogDensity:
        """The density of the law of these members, compiled once per shape.

        **Args:** `positions`: shape (n, d), n ≥ 4, one row per member, spread out in every direction.
        **Returns:** a pytree with `log_density(x)` and `score(x)` of one point, shape (d,); `jax.vmap` takes them to many.
        **Raises:** `InputError` for wrong shapes, members that are not finite or lie in a plane, and what the class cannot take.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> density = KernelDensity().fit(jax.random.normal(jax.random.key(0), (2000, 1)))
            >>> abs(float(density.log_density(jax.numpy.zeros(1))) + 0.919) < 0.1  # -½ log(2π)
            True
        """
        positions = jnp.asarray(positions)
        check_ensemble("positions", positions, minimum_members=4)
        density = _compiled_fit(self, positions)
        fitted = jax.tree.leaves(eqx.filter(density, eqx.is_inexact_array))
        if known(fitted) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in fitted):
            raise refuse("positions", "be spread out in every direction", "gives a density that is not finite")
        return density


@eqx.filter_jit
def _compiled_fit(density: AbstractDensity, positions: Float[Array, "n d"]) -> AbstractLogDensity:
    return density.estimate(positions, density.init(positions))[0]


class Frame(eqx.Module):
    """Coordinates in which an ensemble has mean 0 and, to the shrinkage, covariance 1."""

    center: Float[Array, " d"]
    root: Float[Array, "d d"]

    @classmethod
    def of(cls, positions: Float[Array, "n d"]) -> "Frame":
        """The frame of an ensemble."""
        # Shrinkage is towards equal widths, so that every coordinate first gets its own unit.
        scale = jnp.std(positions, axis=0)
        return cls(jnp.mean(positions, axis=0), scale[:, None] * jnp.linalg.cholesky(shrunk_covariance(positions / scale)))

    @property
    def log_volume(self) -> Scalar:
        """log|L|: what a density loses on the way out of the frame."""
        return jnp.sum(jnp.log(jnp.diagonal(self.root)))

    def into(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Positions in the frame."""
        return solve_triangular(self.root, (x - self.center).T, lower=True).T

    def gradient(self, within: Float[Array, " d"]) -> Float[Array, " d"]:
        """A gradient taken in the frame, as a gradient outside."""
        return solve_triangular(self.root, within, lower=True, trans=1)


class GaussianDensity(AbstractDensity):
    """The Gaussian of the members' mean and covariance, its correlations shrunk by the oracle-approximating rule: n < d is possible.

    **Differentiation:** forward and reverse, of every order, in the members and in x.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58, 5016 (2010).
    """

    note: ClassVar[str] = "Gaussian, correlations shrunk by the oracle-approximating rule"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, positions: Float[Array, "n d"], state: Any) -> tuple[AbstractLogDensity, Any]:
        return _Gaussian(Frame.of(positions)), state


class _Gaussian(AbstractLogDensity):
    frame: Frame

    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        y = self.frame.into(x)
        return -(jnp.sum(y**2) + len(y) * math.log(2 * math.pi)) / 2 - self.frame.log_volume

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.frame.gradient(-self.frame.into(x))


class KernelDensity(AbstractDensity):
    r"""Gaussian kernels around the members, of the covariance of the ensemble times h²: smooth, O(n²), for few dimensions.

        q̂(θ) = (1/n) Σ_j N(θ; θ_j, h² C),    h = argmax Σ_i log q̂_{-i}(θ_i) over a logarithmic grid of 25 values,

    q̂_{-i} being the same without member i. The rules of thumb (Silverman's) take the law for a Gaussian and smear a multimodal one.

    For its score pass `for_score=True`: a gradient amplifies noise and wants a wider kernel, h ∝ n^{-1/(d+6)} rather than n^{-1/(d+4)},
    and h is widened by the ratio of the two rules for a Gaussian law, in which its own width cancels: 1.36 at n = 1000, d = 1.

    **Differentiation:** forward and reverse, of every order, in x and the members, at the bandwidth found.
    **Reference:** Duin, "On the choice of smoothing parameters for Parzen estimators", IEEE Trans. Comput. C-25, 1175 (1976); Chacón, Duong
    and Wand, "Asymptotics for general multivariate kernel density derivative estimators", Stat. Sinica 21, 807 (2011).
    """

    for_score: bool = eqx.field(static=True, default=False)

    @property
    def note(self) -> str:
        widened = ", widened for the score by the ratio of the normal reference rules" if self.for_score else ""
        return f"Gaussian kernels, bandwidth of maximum leave-one-out likelihood{widened}"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, positions: Float[Array, "n d"], state: Any) -> tuple["Kernels", Any]:
        law = self.with_left_out(positions)[0]
        widening = _reference_bandwidth(*positions.shape, derivatives=1) / _reference_bandwidth(*positions.shape, derivatives=0)
        return Kernels(law.frame, law.members, law.bandwidth * widening) if self.for_score else law, state

    def with_left_out(self, positions: Float[Array, "n d"]) -> tuple["Kernels", Float[Array, " n"]]:
        """The density at the likeliest bandwidth, and log q̂_{-i} at each member."""
        n, d = positions.shape
        frame = Frame.of(positions)
        members = frame.into(positions)
        bandwidths = jnp.asarray(_reference_bandwidth(n, d, derivatives=0) * _RELATIVE_BANDWIDTHS, positions.dtype)

        def left_out(one):
            i, y = one
            squares = jnp.sum((members - y) ** 2, axis=1).at[i].set(jnp.inf)
            return logsumexp(-squares / (2 * bandwidths[:, None] ** 2), axis=1)

        logs = jax.lax.map(left_out, (jnp.arange(n), members), batch_size=BLOCK) - d * jnp.log(bandwidths)
        best = jnp.argmax(jnp.mean(logs, axis=0))
        constant = math.log(n - 1) + d / 2 * math.log(2 * math.pi) + frame.log_volume
        return Kernels(frame, members, bandwidths[best]), logs[:, best] - constant


def _reference_bandwidth(n: int, d: int, derivatives: int) -> float:
    """The bandwidth of least integrated squared error for the derivatives of a standard Gaussian law."""
    return (4 / ((d + 2 * derivatives + 2) * n)) ** (1 / (d + 2 * derivatives + 4))


class Kernels(AbstractLogDensity, AbstractSmoother):
    """What `KernelDensity` fits."""

    frame: Frame
    members: Float[Array, "n d"]
    """The members in the frame."""
    bandwidth: Scalar
    """h, relative to the width of the ensemble."""

    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        n, d = self.members.shape
        constant = math.log(n) + d / 2 * math.log(2 * math.pi) + d * jnp.log(self.bandwidth) + self.frame.log_volume
        return logsumexp(self._exponents(x)) - constant

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.frame.gradient((self.average(x, self.members) - self.frame.into(x)) / self.bandwidth**2)

    def smooth(self, positions: Float[Array, "n d"], values: Float[Array, "n p"]) -> Callable[[Array], Array]:
        return eqx.Partial(self.average, values=values)

    def average(self, x: Float[Array, " d"], values: Float[Array, "n p"]) -> Float[Array, " p"]:
        """The mean of what each member carries, weighted by its kernel at x (Nadaraya and Watson)."""
        return jnp.matmul(jax.nn.softmax(self._exponents(x)), values, precision="highest")

    def _exponents(self, x: Float[Array, " d"]) -> Float[Array, " n"]:
        return -jnp.sum((self.members - self.frame.into(x)) ** 2, axis=1) / (2 * self.bandwidth**2)


class HistogramDensity(AbstractDensity):
    r"""Counts in equal bins between the least and the greatest member, ⌈2 n^{1/(d+2)}⌉ along each of at most three axes.

        q̂(θ) = (c + ½) / (n + ½ bins) / volume inside the box, 0 outside

    with c the members in the bin of θ; half a member more in each bin (Jeffreys' prior) keeps empty ones finite. The number of bins is
    what Scott's rule gives for a Gaussian law. A step has no slope, so the score is that of the quadratic B-spline through log(c + ½),
    continuous, exact where log q is a parabola along each axis but for the noise of the counts, and constant outside the box.

    **Raises:** `InputError` in more than three dimensions, where nearly every bin is empty.
    **Differentiation:** the score, once, in x. The counts are steps: no slope in the members is taken from them.
    **Reference:** Scott, "On optimal and data-based histograms", Biometrika 66, 605 (1979).
    """

    note: ClassVar[str] = "histogram of ⌈2 n^{1/(d+2)}⌉ bins along each axis"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, positions: Float[Array, "n d"], state: Any) -> tuple["Histogram", Any]:
        n, d = positions.shape
        if d > 3:
            raise refuse("positions", "have at most 3 coordinates per member for a histogram", f"has shape {positions.shape}")
        bins = math.ceil(2 * n ** (1 / (d + 2)))
        lower, upper = jnp.min(positions, axis=0), jnp.max(positions, axis=0)
        empty = Histogram(jnp.zeros((bins,) * d, positions.dtype), lower, (upper - lower) / bins)
        counts = empty.counts.at[tuple(empty.bin(positions).T)].add(1)
        return Histogram(counts, empty.lower, empty.width), state


class Histogram(AbstractLogDensity, AbstractSmoother):
    """What `HistogramDensity` fits."""

    counts: Float[Array, "..."]
    """Members in each bin, one axis per coordinate."""
    lower: Float[Array, " d"]
    width: Float[Array, " d"]

    def bin(self, x: Float[Array, "*n d"]) -> Array:
        """The bin of each point, shape (..., d); points outside count to the bin at the edge."""
        return jnp.clip(jnp.floor((x - self.lower) / self.width).astype(int), 0, len(self.counts) - 1)

    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        inside = jnp.all((x >= self.lower) & (x <= self.lower + self.width * len(self.counts)))
        total = jnp.sum(self.counts) + self.counts.size / 2
        logs = jnp.log(self.counts[tuple(self.bin(x))] + 0.5) - jnp.log(total) - jnp.sum(jnp.log(self.width))
        return jnp.where(inside, logs, -jnp.inf)

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.grad(lambda x: self._spline(jnp.log(self.counts + 0.5), self._inside(x)))(x)

    def smooth(self, positions: Float[Array, "n d"], values: Float[Array, "n p"]) -> Callable[[Array], Array]:
        """Means over each bin, drawn to 0 by half a member, through the same spline."""
        sums = jnp.zeros((*self.counts.shape, values.shape[1]), values.dtype).at[tuple(self.bin(positions).T)].add(values)
        return eqx.Partial(self._mean, sums / (self.counts + 0.5)[..., None])

    def _mean(self, table: Float[Array, "..."], x: Float[Array, " d"]) -> Float[Array, " p"]:
        return self._spline(table, self._inside(x))

    def _inside(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.clip(x, self.lower, self.lower + self.width * len(self.counts))

    def _spline(self, table: Float[Array, "..."], x: Float[Array, " d"]) -> Float[Array, "..."]:
        # Beyond its edges the table goes on as a straight line.
        axes = len(x)
        patch = jnp.pad(table, [(1, 1)] * axes + [(0, 0)] * (table.ndim - axes), mode="reflect", reflect_type="odd")
        corner = self.bin(x)
        patch = jax.lax.dynamic_slice(patch, [*corner, *[0] * (table.ndim - axes)], (*(3,) * axes, *table.shape[axes:]))
        offset = (x - self.lower) / self.width - corner - 0.5
        for t in offset:
            patch = jnp.tensordot(jnp.stack([(0.5 - t) ** 2 / 2, 0.75 - t**2, (0.5 + t) ** 2 / 2]), patch, axes=1, precision="highest")
        return patch


class FlowDensity(AbstractDensity):
    r"""A normalizing flow: smooth invertible layers from the ensemble to a standard normal, fitted by likelihood.

        log q̂(θ) = log N(f(y); 0, 1) + log|∂f/∂y| - log|L|

    f is a block neural autoregressive flow of smooth layers, so that the score is smooth as well. All but every fifth member are fitted, by
    Adam on a cosine that ends at 0; what is kept are the parameters at which the members left over were likeliest.

    **Args:** `key`: what the parameters of the first fit are drawn from. `layers`: of the flow. `width`: hidden units per coordinate.
    `steps`: of the optimizer, per fit. `learning_rate`: of Adam, at the start.
    **Raises:** `InputError` if `key` is not a key or a number is not positive.
    **Differentiation:** forward and reverse, of every order, in x. In the members it goes through the optimization and costs its memory.
    **Reference:** De Cao, Aziz and Titov, "Block neural autoregressive flow", UAI 2019. The flow itself is flowjax's.
    """

    spares_a_fifth: ClassVar[bool] = True
    key: Key
    layers: int = eqx.field(static=True, default=2)
    width: int = eqx.field(static=True, default=8)
    steps: int = eqx.field(static=True, default=1000)
    learning_rate: float = eqx.field(static=True, default=2e-2)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("layers", self.layers)
        check_positive_int("width", self.width)
        check_positive_int("steps", self.steps)
        check_positive("learning_rate", self.learning_rate)

    @property
    def note(self) -> str:
        return f"block neural autoregressive flow of {self.layers} layers, {self.steps} steps of Adam, stopped by every fifth member"

    def init(self, positions: Float[Array, "n d"]) -> list[Array]:
        parameters = jax.tree.leaves(eqx.filter(self._flow(positions.shape[1]), eqx.is_inexact_array))
        return [parameter.astype(positions.dtype) for parameter in parameters]

    def estimate(self, positions: Float[Array, "n d"], state: list[Array]) -> tuple[AbstractLogDensity, list[Array]]:
        frame = Frame.of(positions)
        members = frame.into(positions)
        chosen = jnp.arange(len(members)) % 5 > 0  # `spares_a_fifth`
        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))

        def losses(parameters):
            logs = self.log_prob(parameters, members)
            judged = -jnp.sum(jnp.where(chosen, 0, logs)) / jnp.sum(~chosen)
            return -jnp.sum(jnp.where(chosen, logs, 0)) / jnp.sum(chosen), judged

        def step(carry, _):
            parameters, moments, best, least = carry
            slope, judged = jax.grad(losses, has_aux=True)(parameters)
            best = jax.tree.map(lambda new, old: jnp.where(judged < least, new, old), parameters, best)
            updates, moments = optimizer.update(slope, moments, parameters)
            return (optax.apply_updates(parameters, updates), moments, best, jnp.minimum(judged, least)), None

        start = (state, optimizer.init(state), state, jnp.asarray(jnp.inf, members.dtype))
        best = jax.lax.scan(step, start, length=self.steps)[0][2]
        return _Flow(frame, best, self), best

    def log_prob(self, parameters: list[Array], y: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        """log p̂ of positions in the frame, by the flow with these parameters."""
        # Made anew in each trace: flowjax's layers hold functions that hold arrays, and those of one trace must not be met in another.
        learned, rest = eqx.partition(self._flow(y.shape[-1]), eqx.is_inexact_array)
        flow = eqx.combine(jax.tree.unflatten(jax.tree.structure(learned), parameters), rest)
        with jax.default_matmul_precision("highest"):
            return flow.log_prob(y).astype(y.dtype)  # flowjax answers in the default precision of numbers.

    def _flow(self, d: int) -> AbstractDistribution:
        base = StandardNormal((d,))
        return block_neural_autoregressive_flow(self.key, base_dist=base, nn_block_dim=self.width, flow_layers=self.layers)


class _Flow(AbstractLogDensity):
    frame: Frame
    parameters: list[Array]
    density: FlowDensity

    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        return self._within(self.frame.into(x)) - self.frame.log_volume

    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.frame.gradient(jax.grad(self._within)(self.frame.into(x)))

    def _within(self, y: Float[Array, " d"]) -> Scalar:
        return self.density.log_prob(self.parameters, y)
