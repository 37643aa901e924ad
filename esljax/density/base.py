r"""The density of the law that an ensemble samples: log q̂ and its score ∇log q̂, from the members.

Gaussian, flow and kernel densities work in the frame y = L⁻¹(θ - θ̄) with L Lᵀ the covariance of the members, its correlations shrunk, in
which the cloud has unit width along every axis, so that their answers do not depend on the units of θ:

    log q̂(θ) = log p̂(y) - log|L|,    ∇log q̂(θ) = L⁻ᵀ ∇log p̂(y)

A class here is a way to fit; what it fits is a pytree with `log_density` and `score`. A density fitted to some members and evaluated at the
same members flatters itself: fit on one half and evaluate on the other.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from esljax._checks import check_ensemble, known, refuse
from esljax._numerics import shrunk_covariance
from esljax._types import Array, ArrayLike, Float, Scalar

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
    def smooth(
        self, positions: Float[Array, "n d"], values: Float[Array, "n p"]
    ) -> Callable[[Array], Array]:
        """The local mean of what the members carry, a function of one position (d,) with values (p,): a pytree, differentiable once.
        `positions` are those the density was fitted to."""


class AbstractDensity(eqx.Module):
    """A way to fit a density to an ensemble. Calls look like `KDEDensity().fit(positions).log_density(x)`."""

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
    def estimate(
        self, positions: Float[Array, "n d"], state: Any
    ) -> tuple[AbstractLogDensity, Any]:
        """The density of these members and the state for the next fit. Values are not checked: for use inside `jit`, `vmap` and `scan`."""

    def fit(self, positions: Float[ArrayLike, "n d"]) -> AbstractLogDensity:
        """The density of the law of these members, compiled once per shape.

        **Args:** `positions`: shape (n, d), n ≥ 4, one row per member, spread out in every direction.
        **Returns:** a pytree with `log_density(x)` and `score(x)` of one point, shape (d,); `jax.vmap` takes them to many.
        **Raises:** `InputError` for wrong shapes, members that are not finite or lie in a plane, and what the class cannot take.
        **Differentiation:** as the class documents.

        **Example:**

            >>> import jax
            >>> density = KDEDensity().fit(jax.random.normal(jax.random.key(0), (2000, 1)))
            >>> abs(float(density.log_density(jax.numpy.zeros(1))) + 0.919) < 0.1  # -½ log(2π)
            True
        """
        positions = jnp.asarray(positions)
        check_ensemble("positions", positions, minimum_members=4)
        density = _compiled_fit(self, positions)
        fitted = jax.tree.leaves(eqx.filter(density, eqx.is_inexact_array))
        if known(fitted) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in fitted):
            raise refuse(
                "positions",
                "be spread out in every direction",
                "gives a density that is not finite",
            )
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
        return cls(
            jnp.mean(positions, axis=0),
            scale[:, None] * jnp.linalg.cholesky(shrunk_covariance(positions / scale)),
        )

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
