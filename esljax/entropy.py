r"""The differential entropy of an ensemble from its members: H[q] = -E log q, in nats, for the free energy F = E Φ - T H.

Every estimator is a mean over members, H ≈ (1/n) Σ_i h_i, whose terms are -log q̂ at the member plus what corrects a known bias. The terms
are kept: their spread is the standard error, and a jackknife may leave some out. In other units of θ every estimate moves by the
logarithm of the unit for each coordinate, as H itself does.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import digamma

from esljax._checks import check_ensemble, known, refuse
from esljax._types import Array, ArrayLike, Float, Scalar


class Entropy(eqx.Module):
    """An entropy with its standard error and what it is worth."""

    contributions: Float[Array, " n"]
    """One number for each member, in nats, whose mean is the entropy."""
    note: str = eqx.field(static=True, default="")
    """How it was estimated and in which direction it errs, in words."""

    @property
    def value(self) -> Scalar:
        """H, shape (), in nats."""
        return jnp.mean(self.contributions)

    @property
    def standard_error(self) -> Scalar:
        """The standard error of `value` over members; of its bias it says nothing."""
        return jnp.std(self.contributions, ddof=1) / jnp.sqrt(self.contributions.shape[0])

    def __str__(self) -> str:
        if not known(self.contributions) or self.contributions.ndim != 1:
            return repr(self)
        return f"H = {float(self.value):.6g} ± {float(self.standard_error):.2g} nats ({self.note})"


class AbstractEntropy(eqx.Module):
    """A way to estimate the entropy of an ensemble. Calls look like `GaussianEntropy()(positions)`."""

    @abc.abstractmethod
    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        """The entropy of the law of these members. Values are not checked: for use inside `jit`, `vmap` and `scan`."""

    @abc.abstractmethod
    def check(self, positions: Float[Array, "n d"]) -> None:
        """Refuse what the estimator cannot take, where it can be seen: shapes always, values outside `jit`."""

    def __call__(self, positions: Float[ArrayLike, "n d"]) -> Entropy:
        """The entropy of the law of these members, compiled once per shape.

        **Args:** `positions`: shape (n, d), n ≥ 4, one row per member.
        **Returns:** `Entropy`; `print` shows it. **Raises:** `InputError` for wrong shapes, for members that are not finite and for what the
        class cannot take.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> entropy = GaussianEntropy()(jax.random.normal(jax.random.key(0), (2000, 1)))
            >>> abs(float(entropy.value) - 1.4189) < 5 * float(entropy.standard_error)  # ½ log(2πe)
            True
        """
        positions = jnp.asarray(positions)
        check_ensemble("positions", positions, minimum_members=4)
        self.check(positions)
        return _compiled_estimate(self, positions)


@eqx.filter_jit
def _compiled_estimate(entropy: AbstractEntropy, positions: Float[Array, "n d"]) -> Entropy:
    return entropy.estimate(positions)


class GaussianEntropy(AbstractEntropy):
    r"""The entropy of the Gaussian of the same covariance: exact for Gaussian laws, an upper bound for every other.

        H = ½ d log(2πe) + ½ log|C|,    log|C| ≈ log|A| - d log 2 - Σ_{i=1..d} ψ((n - i)/2)

    A is the scatter matrix Σ_i (θ_i - θ̄)(θ_i - θ̄)ᵀ. With the digammas the estimate is unbiased for Gaussian laws at every n > d; without
    them it would be low by about d(d + 3)/4n.

    **Raises:** `InputError` for n ≤ d, where the covariance has no volume.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Misra, Singh and Demchuk, "Estimation of the entropy of a multivariate normal distribution", JMVA 92, 324 (2005).
    """

    def estimate(self, positions: Float[Array, "n d"]) -> Entropy:
        n, d = positions.shape
        centred = positions - jnp.mean(positions, axis=0)
        root = jnp.linalg.cholesky(jnp.matmul(centred.T, centred, precision="highest") / n)
        white = jax.scipy.linalg.solve_triangular(root, centred.T, lower=True)
        volume = 2 * jnp.sum(jnp.log(jnp.diagonal(root))) + d * jnp.log(n / 2) - jnp.sum(digamma((n - jnp.arange(1, d + 1)) / 2))
        # The squares of the whitened members have mean d exactly, and spread the terms as the influence of each member on log|C|.
        terms = (d * jnp.log(2 * jnp.pi) + volume + jnp.sum(white**2, axis=0)) / 2
        return Entropy(terms.astype(positions.dtype), "of the Gaussian of this covariance; an upper bound for every other law")

    def check(self, positions: Float[Array, "n d"]) -> None:
        _check_volume(positions)


def _check_volume(positions: Float[Array, "n d"]) -> None:
    n, d = positions.shape
    if n <= d:
        raise refuse("positions", f"hold more than {d} members, as many as coordinates, for the covariance to have a volume", f"holds {n}")
