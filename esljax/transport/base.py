r"""Transports: the squared 2-Wasserstein distance between two ensembles of equally weighted members.

    W2²(x, y) = min_P Σ_ij P_ij |x_i - y_j|²          P ≥ 0 with row sums 1/n and column sums 1/m

`ExactTransport` solves this; `GaussianTransport` and `SlicedTransport` are lower bounds of it that are metrics themselves;
`SinkhornTransport` (in `sinkhorn`) is a smooth approximation and no metric. `MappedTransport` and `ProjectedTransport` measure any of them in other
coordinates. With a
metric, dist = sqrt(squared), the chain identities of the speed limit hold on samples exactly:

    Σ_j dist²(q_j, q_{j+1})/(s_{j+1} - s_j) ≥ (Σ_j dist(q_j, q_{j+1}))² ≥ dist²(q_0, q_J)

Two ensembles of one run are close together, so small increments must survive rounding: every metric here is written as a sum of squared
differences of matched things, whose error is relative to the increment, and never as a difference of large moments.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_ensemble, refuse
from esljax._types import Array, ArrayLike, Float, Scalar


class Solution(eqx.Module):
    """What a transport answers: the number and whether it can be trusted."""

    squared: Scalar
    """The squared distance, shape (), in units of θ²."""
    converged: Array
    """Whether the problem was solved, a boolean of shape (). False where the answer is not finite."""


class AbstractTransport(eqx.Module):
    """A squared distance between the laws that two ensembles sample. All are invariant under a permutation of the members."""

    @property
    @abc.abstractmethod
    def is_metric(self) -> bool:
        """Whether sqrt(squared) obeys the triangle inequality on samples, by construction."""

    @property
    def in_turn(self) -> bool:
        """Whether a CPU had better solve several problems one after the other than all of them together. Accelerators never do."""
        return False

    @abc.abstractmethod
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        """The squared distance and whether it converged. Not checked and not compiled: for use inside `jit` and `vmap`."""

    def squared(self, x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]) -> Scalar:
        """The squared distance between two ensembles, compiled once per shape.

        **Args:** `x`: shape (n, d), one row per member. `y`: shape (m, d).
        **Returns:** shape (), in units of θ². Under `jit`, where values cannot be looked at, a NaN member gives NaN. (`jax.jit` hashes what
        it is given, so a bare method of an object that holds arrays goes to `eqx.filter_jit`.)
        **Raises:** `InputError` if a shape or type is wrong, or if a member is seen not to be finite.
        **Differentiation:** forward and reverse in `x`, `y` and every floating leaf, once; second derivatives are each class's matter.
        """
        check_ensemble("x", x)
        check_ensemble("y", y)
        if jnp.shape(x)[1] != jnp.shape(y)[1]:
            raise refuse(
                "y",
                f"have {jnp.shape(x)[1]} coordinates per member, as `x` has",
                f"has {jnp.shape(y)[1]}",
            )
        return _compiled_solve(self, x, y).squared


@eqx.filter_jit
def _compiled_solve(transport: AbstractTransport, x: Any, y: Any) -> Solution:
    return transport.solve(jnp.asarray(x), jnp.asarray(y))


def solution(squared: Scalar, solved: Array | bool = True) -> Solution:
    """A factor rather than a choice, so that what has no finite answer has no finite derivative either."""
    finite = jnp.isfinite(squared) & solved
    return Solution(
        squared * jnp.where(finite, jnp.ones_like(squared), jnp.full_like(squared, jnp.nan)), finite
    )


def recentred(x: Array, y: Array) -> tuple[Array, Array]:
    """Both clouds about one point: no distance changes, and products of coordinates stop cancelling far from the origin."""
    center = jax.lax.stop_gradient(jnp.mean(x, axis=0))
    return x - center, y - center
