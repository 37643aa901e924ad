r"""Velocities from fields in a reproducing kernel Hilbert space (RKHS), on top of the affine field.

    σ[w₀ + u] = σ[w₀] + 2 E[u·(b - w₀)] + 2 E[tr(D ∇u)] - E‖u‖²,    u = Σ_m a_m k(·, θ_m)

The affine field w₀ is fitted first, so the remainder u is fitted to the drift b - w₀ and is 0 where
the law is Gaussian. The flexibility of u is chosen by the value of this expression on members that
it was not fitted to, which also decides what share of u is taken, or none at all.

Here a kernel k spans a space of fields. The kernels of `KDEVelocity` estimate a density.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from esljax._checks import (
    as_float,
    check_nonnegative,
    check_positive,
    check_positive_int,
    plain_int,
)
from esljax._numerics import product, whitening
from esljax._types import Array, Float, Scalar
from esljax.velocity.affine import AffineVelocity
from esljax.velocity.base import (
    AbstractField,
    AbstractVariationalVelocity,
    Snapshot,
    Sum,
    diffusion_matrix,
    rows,
)

# The best of 25 noisy gains is positive by chance, and a field of few members can blow up. Of 400
# ensembles of 200 members of a Gaussian near rest some did with 2.5 standard errors, which spread σ
# by .013 instead of .0037; with 3 none did. Two modes of as many members keep 73 % of σ with 3,
# 81 % with 2.5.
_CAUTION = 3.0
# Members that judge without which there is no u: thirds of fewer than 7.
_FEWEST = 4


class KernelVelocity(AbstractVariationalVelocity):
    r"""Affine fields plus fields in an RKHS: closed form, for few dimensions.

        u = Σ_m a_m k(θ, θ_m)   or   u = ∇ Σ_m a_m k(θ, θ_m)

        k(θ, θ') = exp(-(θ - θ')ᵀ C⁻¹ (θ - θ')/(2 h² d))

    maximizes the variational expression less λ‖u‖². The θ_m are members spread evenly over the
    third that is learned from (the Nyström approximation). h, λ and the share of u that is taken,
    or none, are chosen by cross-validation within that third.

    **Args:** `landmarks`: the greatest number of terms of the sum. `bandwidths`: shape (g,), the h
    to choose from, in standard deviations √d of the ensemble. `penalties`: shape (g,), the λ to
    choose from, relative to the mean square of the kernel features. `folds`: of the
    cross-validation, at least 2. `caution`: standard errors that are taken off the gain of a field
    before it is compared, at least 0. The default suits one measurement of few members; the many
    steps of a `ProbabilityFlow` of many members lose less with 2.
    **Raises:** `InputError` for numbers out of these ranges.
    **Differentiation:** forward and reverse, at the h, λ and share chosen.
    **Reference:** Sriperumbudur, Fukumizu, Gretton, Hyvärinen and Kumar, "Density estimation in
    infinite dimensional exponential families", JMLR 18, 57 (2017); Sutherland, Strathmann, Arbel
    and Gretton, "Efficient and principled score estimation with Nyström kernel exponential
    families", AISTATS (2018).

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (500, 1)) / 2
        >>> x = x.at[:250].add(4.0)  # two modes that diffuse, in every third
        >>> kernel, affine = esl.KernelVelocity(landmarks=40), esl.AffineVelocity()
        >>> bool(kernel(x, 0 * x, 1.0).squared > 10 * affine(x, 0 * x, 1.0).squared)
        True
    """

    moments_only: ClassVar[bool] = False
    note: ClassVar[str] = "affine and kernel fields, bandwidth and penalty by cross-validation"
    landmarks: int = eqx.field(static=True, converter=plain_int, default=200)
    bandwidths: Float[Array, " g"] = eqx.field(
        converter=as_float, default=(0.15, 0.3, 0.6, 1.2, 2.4)
    )  # type: ignore
    penalties: Float[Array, " g"] = eqx.field(
        converter=as_float, default=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    )  # type: ignore
    folds: int = eqx.field(static=True, converter=plain_int, default=5)
    caution: float = eqx.field(static=True, default=_CAUTION)

    def __check_init__(self):
        check_positive_int("landmarks", self.landmarks)
        check_positive_int("folds", self.folds, minimum=2)
        check_nonnegative("caution", self.caution)
        check_positive("bandwidths", self.bandwidths)
        check_positive("penalties", self.penalties)

    def in_units(self, size: Scalar) -> "KernelVelocity":
        return self

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        base, _ = AffineVelocity().fit(snapshot, gradient, None)
        n = len(snapshot.positions)
        if n - len(_landmarks(n, self.landmarks)) < _FEWEST:
            return base, None
        bandwidth, penalty, share = self._chosen(*jax.lax.stop_gradient((base, snapshot)), gradient)
        kernel = _Kernel(snapshot.positions, self.landmarks, bandwidth)
        gram, given = _moments(kernel, base, snapshot, gradient)
        remainder = _Remainder(
            kernel, kernel.expand(share * _ridge(gram, given, penalty)), gradient
        )
        return Sum(base, remainder), None

    def _chosen(
        self, base: AbstractField, snapshot: Snapshot, gradient: bool
    ) -> tuple[Scalar, Scalar, Scalar]:
        """Return the bandwidth and the penalty that gain most on held-out folds.

        The third number is the share of the remainder that gains most there, from 0 to 1.
        """
        dtype = snapshot.positions.dtype
        n = snapshot.positions.shape[0]
        # A kernel that is centered on a member fits that member too well, so the landmarks only
        # learn and never judge.
        landmarks = _landmarks(n, self.landmarks)
        others = np.setdiff1d(np.arange(n), landmarks)
        count = min(self.folds, len(others))
        folds = [others[i::count] for i in range(count)]
        own_fold = np.arange(len(others)) % count
        judged = rows(snapshot, others)
        rest = judged.drift - base.evaluate(judged.positions, judged.diffusion)[0]

        def at_bandwidth(bandwidth):
            kernel = _Kernel(snapshot.positions, self.landmarks, bandwidth)
            of_each, of_all = _moments_of_folds(
                kernel, base, snapshot, gradient, (*folds, landmarks)
            )

            def at_penalty(penalty):
                # One factorization at a time: batched ones gain nothing here, and two of some
                # kinds in one program can wait for each other forever.
                weights = jax.lax.map(lambda fold: _without(fold, of_all, penalty), of_each)

                def judge(weights):
                    remainder = _Remainder(kernel, kernel.expand(weights), gradient)
                    return remainder.evaluate(judged.positions, judged.diffusion)[:2]

                values, spread = (
                    x[own_fold, np.arange(len(others))] for x in jax.vmap(judge)(weights)
                )
                linear = 2 * jnp.sum(values * rest, axis=1) + 2 * spread
                return _gain(linear, values, self.caution)

            return jax.lax.map(at_penalty, self.penalties.astype(dtype))

        gains = jax.lax.map(at_bandwidth, self.bandwidths.astype(dtype))
        gains = jnp.where(jnp.isfinite(gains), gains, 0)
        best = jnp.unravel_index(jnp.argmax(gains), gains.shape)
        return (
            self.bandwidths[best[0]].astype(dtype),
            self.penalties[best[1]].astype(dtype),
            (gains[best] > 0).astype(dtype),
        )


class _Kernel(eqx.Module):
    """k(·, θ_m) on whitened coordinates, and the root R of the matrix k(θ_m, θ_l) = R Rᵀ.

    The features R⁻¹ k(θ_·, θ) have unit norms.
    """

    center: Float[Array, " d"]
    whitening: Float[Array, "d d"]
    points: Float[Array, "m d"]
    width: Scalar
    root: Float[Array, "m m"]

    def __init__(self, positions: Float[Array, "n d"], landmarks: int, bandwidth: Scalar):
        n, d = positions.shape
        self.center, self.whitening = whitening(positions)
        self.width = bandwidth * d**0.5
        kept = _landmarks(n, landmarks)
        self.points = self.whiten(positions[kept])
        # Rounding perturbs the eigenvalues of a matrix with entries up to 1 by about (its size) ε.
        jitter = 4 * len(kept) * jnp.finfo(positions.dtype).eps
        self.root = jnp.linalg.cholesky(
            self(self.points) + jitter * jnp.eye(len(kept), dtype=positions.dtype)
        )

    def whiten(self, positions: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Return positions in whitened coordinates."""
        return product(positions - self.center, self.whitening.T)

    def __call__(self, z: Float[Array, "n d"]) -> Float[Array, "n m"]:
        return jnp.exp(
            -_squares(z, self.points, jnp.eye(z.shape[1], dtype=z.dtype)) / (2 * self.width**2)
        )

    def unit(self, functions: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Return linear functions of k(·, θ_m) as the same functions of the features."""
        return solve_triangular(self.root, functions.T, lower=True).T

    def expand(self, weights: Float[Array, "m c"]) -> Float[Array, "m c"]:
        """Return weights of the features as weights a_m of k(·, θ_m)."""
        return solve_triangular(self.root, weights, lower=True, trans=1)

    def turned(
        self, z: Float[Array, "n d"], k: Float[Array, "n m"], diffusion: Float[Array, "d d"]
    ) -> Float[Array, "n m"]:
        """Return tr(D ∇∇k), for D in whitened coordinates."""
        return (
            k
            * (_squares(z, self.points, diffusion) / self.width**2 - jnp.trace(diffusion))
            / self.width**2
        )


class _Remainder(AbstractField):
    """u, which is added to the affine field."""

    kernel: _Kernel
    weights: Float[Array, "m c"]
    """(m, d) of a general field, (m, 1) of the potential of a gradient field."""
    gradient: bool = eqx.field(static=True)

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        kernel, d = self.kernel, positions.shape[1]
        z = kernel.whiten(positions)
        k = kernel(z)
        sums = product(k, self.weights)
        one = jnp.ones((), positions.dtype)
        if self.gradient:
            push = (product(k, self.weights * kernel.points) - sums * z) / kernel.width**2

            def turn(D):
                return product(kernel.turned(z, k, _whitened(kernel, D, d)), self.weights)[:, 0]

            return product(push, kernel.whitening), turn(diffusion), turn(one)

        def turn(D):  # tr(D ∇u) = Σ_m (θ_m - θ)ᵀ D a_m k/h² in whitened coordinates
            mixed = product(kernel.whitening, diffusion_matrix(D, d))
            ahead = product(k, jnp.sum(product(kernel.points, mixed) * self.weights, axis=1))
            return (ahead - jnp.sum(product(z, mixed) * sums, axis=1)) / kernel.width**2

        return sums, turn(diffusion), turn(one)


def _moments(
    kernel: _Kernel, base: AbstractField, snapshot: Snapshot, gradient: bool
) -> tuple[Array, Array]:
    """Return G (m, m) and g (m, c), the variational expression in the weights a of the features.

    E‖u‖² = tr(aᵀ G a) and E[u·(b - w₀)] + E[tr(D ∇u)] = tr(aᵀ g).
    """
    x = snapshot.positions
    n, d = x.shape
    rest = snapshot.drift - base.evaluate(x, snapshot.diffusion)[0]
    z = kernel.whiten(x)
    k = kernel(z)
    if gradient:
        turned = jnp.mean(kernel.turned(z, k, _whitened(kernel, snapshot.diffusion, d)), axis=0)
        ahead = (
            product(kernel.points, kernel.whitening).T - product(z, kernel.whitening)[:, :, None]
        )
        slopes = (k[:, None, :] * ahead / kernel.width**2).reshape(n * d, -1)
        unit = kernel.unit(slopes)
        given = product(unit.T, rest.reshape(n * d, 1)) / n + kernel.unit(turned[None]).T
    else:
        unit = kernel.unit(k)
        ahead = jnp.mean(k, axis=0)[:, None] * kernel.points - product(k.T, z) / n
        turned = (
            product(ahead, product(kernel.whitening, diffusion_matrix(snapshot.diffusion, d)))
            / kernel.width**2
        )
        given = product(unit.T, rest) / n + kernel.unit(turned.T).T
    return product(unit.T, unit) / n, given


def _moments_of_folds(
    kernel: _Kernel,
    base: AbstractField,
    snapshot: Snapshot,
    gradient: bool,
    parts: Sequence[np.ndarray],
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """Return G, g and the share of the members of every fold, stacked, and G and g of all members.

    **Args:** `parts`: the members of each fold, and last those that are in none.
    """
    n = len(snapshot.positions)
    each = [_moments(kernel, base, rows(snapshot, part), gradient) for part in parts]
    *grams, own_gram = (gram for gram, _ in each)
    *givens, own_given = (given for _, given in each)
    grams, givens = jnp.stack(grams), jnp.stack(givens)
    *shares, own = (len(part) / n for part in parts)
    shares = jnp.array(shares, snapshot.positions.dtype)

    def of_folds(moments):
        return product(moments.T, shares).T

    whole = (of_folds(grams) + own * own_gram, of_folds(givens) + own * own_given)
    return (grams, givens, shares), whole


def _without(
    fold: tuple[Array, Array, Array], whole: tuple[Array, Array], penalty: Scalar
) -> Float[Array, "m c"]:
    """Return the weights fitted to all members but those of one fold."""
    gram, given, share = fold
    rest = [
        (total - share * part) / (1 - share)
        for total, part in zip(whole, (gram, given), strict=True)
    ]
    return _ridge(rest[0], rest[1], penalty)


def _gain(linear: Float[Array, " n"], values: Float[Array, "n d"], caution: float) -> Scalar:
    """Return the least that u is believed to gain on unseen members."""
    terms = linear - jnp.sum(values**2, axis=1)
    # Few members do not know their own spread: a quantile of Student's t, about.
    caution = caution * (1 + 4 / terms.size)
    return jnp.mean(terms) - caution * jnp.std(terms, ddof=1) / jnp.sqrt(terms.size)


def _ridge(
    gram: Float[Array, "m m"], given: Float[Array, "m c"], penalty: Scalar
) -> Float[Array, "m c"]:
    """Return (G + λ tr G)⁻¹ g, and 0 where all features vanish."""
    size = jnp.trace(gram)
    ridge = jnp.where(size > 0, penalty * size, 1)
    factor = jnp.linalg.cholesky(gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype))
    return solve_triangular(
        factor, solve_triangular(factor, given, lower=True), lower=True, trans=1
    )


def _landmarks(n: int, most: int) -> np.ndarray:
    """Return evenly spread rows, at most half of all."""
    return np.linspace(0, n - 1, max(1, min(n // 2, most))).round().astype(int)


def _squares(
    x: Float[Array, "n d"], y: Float[Array, "m d"], metric: Float[Array, "d d"]
) -> Float[Array, "n m"]:
    """Return (x - y)ᵀ M (x - y) for every pair."""

    def own(a):
        return jnp.sum(product(a, metric) * a, axis=1)

    return jnp.maximum(own(x)[:, None] + own(y) - 2 * product(product(x, metric), y.T), 0)


def _whitened(kernel: _Kernel, diffusion: Float[Array, "..."], d: int) -> Float[Array, "d d"]:
    """Return D in whitened coordinates."""
    return product(product(kernel.whitening, diffusion_matrix(diffusion, d)), kernel.whitening.T)
