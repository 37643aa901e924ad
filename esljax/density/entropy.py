r"""The differential entropy of an ensemble from its members, for the free energy F = E Φ - T H.

    H[q] = -E log q ≈ (1/n) Σ_i h_i,    in nats

Each term h_i is -log q̂ at member i plus a correction for a known bias. The result keeps the terms:
their spread is the standard error, and a jackknife may leave some out. A change of the units of θ
moves every estimate by the logarithm of the unit for each coordinate, as it moves H itself.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import digamma

from esljax._checks import (
    as_cloud,
    check_key,
    check_kind,
    check_positive_int,
    door,
    known,
    plain_int,
    refuse,
    wrong_answer,
)
from esljax._numerics import product
from esljax._types import Array, ArrayLike, Float, Key, Scalar
from esljax.density.base import BLOCK, Frame
from esljax.density.flow import FlowDensity
from esljax.density.histogram import HistogramDensity
from esljax.density.kernel import KDEDensity
from esljax.results import StandardErrors, measured


class Entropy(eqx.Module):
    """An entropy with its standard error; `print` shows it.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> entropy = esl.density.Entropy(jnp.array([1.0, 3.0]), "by hand")
        >>> print(entropy)
        H = 2 ± 1 nats (by hand)
        >>> float(entropy.standard_error.value), entropy.errors
        (1.0, 'spread over 2 members; bias is not included')
    """

    contributions: Float[Array, " n"]
    """One number for each member, shape (n,), in nats, whose mean is the entropy."""
    note: str = eqx.field(static=True, default="")
    """How it was estimated and in which direction it errs, in words."""

    @property
    def value(self) -> Scalar:
        """H, shape (), in nats."""
        return jnp.mean(self.contributions)

    @property
    def standard_error(self) -> StandardErrors:
        """The standard error of `value`, shape (), in nats."""
        spread = jnp.std(self.contributions, ddof=1)
        return StandardErrors({"value": spread / jnp.sqrt(self.contributions.shape[0])})

    @property
    def errors(self) -> str:
        """The sample behind `standard_error`, in words."""
        return f"spread over {self.contributions.shape[0]} members; bias is not included"

    def __str__(self) -> str:
        if not known(self.contributions) or self.contributions.ndim != 1:
            return repr(self)
        note = f" ({self.note})" if self.note else ""
        return f"H = {measured(self.value, self.standard_error.value)} nats{note}"


class AbstractEntropy(eqx.Module):
    """A way to estimate the entropy of an ensemble, called as `GaussianEntropy()(positions)`.

    A subclass defines one method, `estimate`, which returns an `Entropy` with one number for each
    member. Its fields are its settings.

    **Example:** the entropy of an exponential law on the positive axis, 1 + log(mean).

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class ExponentialEntropy(esl.density.AbstractEntropy):
        ...     def estimate(self, positions):
        ...         mean = jnp.mean(positions, axis=0)
        ...         terms = jnp.sum(positions / mean + jnp.log(mean), axis=1)
        ...         return esl.density.Entropy(terms, "of the exponential law of this mean")
        >>> print(ExponentialEntropy()(jnp.array([[1.0], [2.0], [2.0], [3.0]])))
        H = 1.69315 ± 0.2 nats (of the exponential law of this mean)
    """

    @abc.abstractmethod
    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        """Return the entropy of the law of these members, shape (n, d).

        The values of the members are not checked: for use inside `jit`, `vmap` and `scan`.
        """

    def checked_estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        """Return `estimate(positions)`, or reject an answer of the wrong kind or shape.

        **Raises:** `InputError` for anything but an `Entropy` with one number for each member.
        """
        answer: Any = self.estimate(positions)
        if not isinstance(answer, Entropy):
            raise wrong_answer("entropy", self, "estimate", "an Entropy", answer)
        if jnp.shape(answer.contributions) != positions.shape[:1]:
            expected = f"contributions of shape {positions.shape[:1]}"
            raise wrong_answer("entropy", self, "estimate", expected, answer.contributions)
        return answer

    @door
    def __call__(self, positions: Float[ArrayLike, "n d"]) -> Entropy:
        """Estimate the entropy of the law of these members, compiled once per shape.

        **Args:** `positions`: shape (n, d), n ≥ 4, one row per member.
        **Returns:** `Entropy`; `print` shows it.
        **Raises:** `InputError` for wrong shapes, for members that are not finite, and where the
        members have no entropy because they coincide or lie in a plane. Under `jit`, where values
        are not known, these give NaN, never -∞.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> import esljax as esl
            >>> x = jax.random.normal(jax.random.key(0), (2000, 1))
            >>> entropy = esl.density.GaussianEntropy()(x)
            >>> bool(abs(entropy.value - 1.4189) < 5 * entropy.standard_error.value)  # ½ log(2πe)
            True
        """
        positions = as_cloud("positions", positions, minimum_members=4)
        answer = _compiled_estimate(self, positions)
        if known(positions, answer) and not bool(jnp.all(jnp.isfinite(answer.contributions))):
            lost = int(jnp.sum(~jnp.isfinite(answer.contributions)))
            raise refuse(
                "positions",
                "be spread out in every direction, without repeated members",
                f"leaves {lost} without a density",
            )
        return answer


class GaussianEntropy(AbstractEntropy):
    r"""The entropy of the Gaussian of the same covariance: an upper bound, exact for Gaussian laws.

        H = ½ d log(2πe) + ½ log|C|,    log|C| ≈ log|A| - d log 2 - Σ_{i=1..d} ψ((n - i)/2)

    A is the scatter matrix Σ_i (θ_i - θ̄)(θ_i - θ̄)ᵀ. With the digammas the estimate is unbiased for
    Gaussian laws at every n > d; without them it would be low by about d(d + 3)/4n.

    **Raises:** `InputError` for n ≤ d, where the covariance has no volume.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Misra, Singh and Demchuk, "Estimation of the entropy of a multivariate normal
    distribution", JMVA 92, 324 (2005).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> entropy = esl.density.GaussianEntropy()(x)
        >>> bool(abs(entropy.value - 1.4189) < 5 * entropy.standard_error.value)  # ½ log(2πe)
        True
    """

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        n, d = positions.shape
        if n <= d:
            raise refuse(
                "positions",
                f"hold more than {d} members for {d} coordinates to span a volume",
                f"holds {n}",
            )
        centered = positions - jnp.mean(positions, axis=0)
        root = jnp.linalg.cholesky(product(centered.T, centered) / n)
        white = solve_triangular(root, centered.T, lower=True)
        volume = (
            2 * jnp.sum(jnp.log(jnp.diagonal(root)))
            + d * jnp.log(n / 2)
            - jnp.sum(digamma((n - jnp.arange(1, d + 1)) / 2))
        )
        # The squares of the whitened members have mean d exactly, and spread the terms as each
        # member's influence on log|C| does.
        terms = (d * jnp.log(2 * jnp.pi) + volume + jnp.sum(white**2, axis=0)) / 2
        return Entropy(
            terms.astype(positions.dtype),
            "of the Gaussian of this covariance; an upper bound for every other law",
        )


class NearestNeighborEntropy(AbstractEntropy):
    r"""Distances to the k-th nearest neighbor: no bandwidth, little bias up to a few dimensions.

        H = (1/n) Σ_i [ψ(n) - ψ(k) + log V_d + d log r_i] + log|L|

    r_i is the distance of member i from its k-th nearest neighbor in the `Frame` of the ensemble,
    where the cloud has covariance 1 and not L Lᵀ; V_d is the volume of the unit ball. The terms
    spread more than those of the other estimators. The bias falls as (k/n)^{2/d}; it is upward
    where the density falls off inside the balls, as it does in many dimensions. O(n²).

    If k + 1 members coincide they have r = 0: they are rejected, and give NaN under `jit`. Two
    equal members are no rarity among thousands in float32, which is one reason not to take k = 1.

    **Args:** `neighbors`: k, at least 1; a larger k trades spread for bias.
    **Raises:** `InputError` if `neighbors` is not a positive integer or n ≤ k.
    **Differentiation:** forward and reverse, of every order, at the neighbors found.
    **Reference:** Kozachenko and Leonenko, Probl. Inf. Transm. 23, 95 (1987); Kraskov, Stögbauer
    and Grassberger, PRE 69, 066138 (2004).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> entropy = esl.density.NearestNeighborEntropy(neighbors=5)(x)
        >>> bool(abs(entropy.value - 1.4189) < 5 * entropy.standard_error.value)  # ½ log(2πe)
        True
    """

    neighbors: int = eqx.field(static=True, converter=plain_int, default=3)

    def __check_init__(self):
        check_positive_int("neighbors", self.neighbors)

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        n, d = positions.shape
        k = self.neighbors
        if n <= k:
            raise refuse(
                "positions", f"hold more members than the {k} neighbors of each", f"holds {n}"
            )
        frame = Frame.of(positions)
        members = frame.into(positions)

        def neighbor(one):
            i, y = one
            squares = jnp.sum((members - y) ** 2, axis=1).at[i].set(jnp.inf)
            # k passes: `top_k` takes ten times as long on a CPU (2000 members in 2 or 10
            # dimensions).
            for _ in range(k - 1):
                squares = squares.at[jnp.argmin(squares)].set(jnp.inf)
            return jnp.min(squares)

        squares = jax.lax.map(neighbor, (jnp.arange(n), members), batch_size=BLOCK)
        logs = jnp.log(jnp.where(squares > 0, squares, 1)) / 2
        ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        terms = d * logs + ball + digamma(float(n)) - digamma(float(k)) + frame.log_volume
        note = f"Kozachenko-Leonenko, {k} neighbors; high in many dimensions"
        return Entropy(jnp.where(squares > 0, terms, jnp.nan).astype(positions.dtype), note)


class KDEEntropy(AbstractEntropy):
    """-log q̂_{-i} at each member i, with kernels around all the others (`KDEDensity`). O(n²).

    Too high in expectation, because kernels smear the law; slightly less so because the bandwidth
    is chosen on the same members that judge it.

    **Differentiation:** forward and reverse, of every order, at the bandwidth chosen.
    **Reference:** Hall and Morton, "On the estimation of entropy", Ann. Inst. Statist. Math. 45,
    69 (1993).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> entropy = esl.density.KDEEntropy()(x)
        >>> bool(abs(entropy.value - 1.4189) < 5 * entropy.standard_error.value)  # ½ log(2πe)
        True
    """

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        density = KDEDensity()
        return Entropy(
            -density.with_left_out(positions)[1],
            f"leave-one-out, {density.note}; high by what kernels smear",
        )


class HistogramEntropy(AbstractEntropy):
    r"""Counts c in the bins of `HistogramDensity`, corrected for the number of bins.

        H = -Σ_bins (c/n) log(c/(n volume)) + (occupied bins - 1)/2n

    The last term cancels the first order of the bias by counting noise; the width of the bins adds
    about E|∇log q · width|²/24.

    **Raises:** `InputError` in more than three dimensions.
    **Differentiation:** of no use in the members: counts are steps, so that only the box stretches.
    **Reference:** Miller, "Note on the bias of information estimates" (1955).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (500, 1))
        >>> entropy = esl.density.HistogramEntropy()(x)
        >>> bool(abs(entropy.value - 1.4189) < 5 * entropy.standard_error.value)  # ½ log(2πe)
        True
    """

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        density = HistogramDensity()
        table, _ = density.estimate(positions, None)
        occupied = jnp.sum(table.counts > 0)
        counts = table.counts[tuple(table.bin(positions).T)]
        terms = (
            jnp.sum(jnp.log(table.width))
            - jnp.log(counts / len(positions))
            + (occupied - 1) / (2 * len(positions))
        )
        return Entropy(terms.astype(positions.dtype), f"{density.note}, Miller-Madow correction")


class FlowEntropy(AbstractEntropy):
    """-log q̂ at each member, with a normalizing flow fitted to the half that it is not in.

    In expectation an upper bound of H, above it by the relative entropy of the law to the flow.

    **Args:** `key`: draws the flow. `steps`: as in `FlowDensity`, for each half.
    **Raises:** `InputError` if `key` is not a key or `steps` not a positive integer.
    **Differentiation:** forward and reverse; in the members also through the optimization of the
    flow, which costs its memory.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (40, 1))
        >>> esl.density.FlowEntropy(jax.random.key(1), steps=2)(x).contributions.shape
        (40,)
    """

    key: Key
    steps: int = eqx.field(static=True, converter=plain_int, default=1000)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("steps", self.steps)

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        density = FlowDensity(self.key, steps=self.steps)
        evens, odds = (
            density.estimate(half, density.init(half))[0]
            for half in (positions[0::2], positions[1::2])
        )
        even = jnp.arange(len(positions)) % 2 == 0
        logs = jnp.where(
            even, jax.vmap(odds.log_density)(positions), jax.vmap(evens.log_density)(positions)
        )
        return Entropy(-logs, f"an upper bound in expectation: {density.note}")


class TransportedEntropy(eqx.Module):
    """The entropy of the start, carried along by the velocity that `free_energy` is given.

        H(s) = H(0) + ∫₀ˢ E[∇·v] ds

    An error of the estimate at the start then shifts H by the same amount at all times. The
    velocity must know its divergence, and is fitted anew without each group of the jackknife,
    because an error of the field is an error of H.

    **Args:** `start`: the estimator of H(0).
    **Raises:** `InputError` if `start` is no entropy estimator.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> potential, rule = esl.Quadratic(1.0), esl.Langevin(0.1, 0.5)
        >>> x = jax.random.normal(jax.random.key(0), (64, 1))
        >>> run = {"steps": 8, "snapshots": 4, "key": jax.random.key(1)}
        >>> path = esl.simulate(potential, rule, x, **run)
        >>> entropy = esl.density.TransportedEntropy(esl.density.GaussianEntropy())
        >>> velocity = esl.AffineVelocity()
        >>> report = esl.free_energy(path, potential, entropy=entropy, velocity=velocity)
        >>> bool(report.entropy[-1] < report.entropy[0])  # the law narrows
        True
    """

    start: AbstractEntropy

    def __check_init__(self):
        must = "be an entropy estimator such as GaussianEntropy()"
        check_kind("start", self.start, AbstractEntropy, must)


@eqx.filter_jit
def _compiled_estimate(entropy: AbstractEntropy, positions: Float[Array, "n d"]) -> Entropy:
    return entropy.checked_estimate(positions)
