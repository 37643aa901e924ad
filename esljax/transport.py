r"""Transports: the squared 2-Wasserstein distance between two ensembles of equally weighted members.

    W2²(x, y) = min_P Σ_ij P_ij |x_i - y_j|²          P ≥ 0 with row sums 1/n and column sums 1/m

`ExactTransport` solves this; `GaussianTransport` and `SlicedTransport` are lower bounds of it that are metrics themselves;
`SinkhornTransport` (in `sinkhorn`) is a smooth approximation and no metric. `Mapped` and `Projected` measure any of them in other
coordinates. With a
metric, dist = sqrt(squared), the chain identities of the speed limit hold on samples exactly:

    Σ_j dist²(q_j, q_{j+1})/(s_{j+1} - s_j) ≥ (Σ_j dist(q_j, q_{j+1}))² ≥ dist²(q_0, q_J)

Two ensembles of one run are close together, so small increments must survive rounding: every metric here is written as a sum of squared
differences of matched things, whose error is relative to the increment, and never as a difference of large moments.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_ensemble, check_key, check_positive_int, refuse
from esljax._matrix import product
from esljax._ott import ott
from esljax._types import Array, ArrayLike, Float, Key, Scalar
from esljax.sharding import keep


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
            raise refuse("y", f"have {jnp.shape(x)[1]} coordinates per member, as `x` has", f"has {jnp.shape(y)[1]}")
        return _compiled_solve(self, x, y).squared


class ExactTransport(AbstractTransport):
    r"""W2² itself, by optimal assignment π of equally many members; in d = 1 by sorting, any n and m.

        W2²(x, y) = min_π (1/n) Σ_i |x_i - y_π(i)|²

    The assignment comes from optax's Hungarian algorithm by way of ott, O(n³), one member after the other: .7 s for n = 1000 on two cores.

    **Raises:** `InputError` if n ≠ m and d > 1.
    **Differentiation:** forward and reverse, to every order, at the assignment found (envelope theorem): exact wherever it is unique.
    **Reference:** Kuhn, "The Hungarian method for the assignment problem", Naval Res. Logist. Q. 2, 83 (1955).

    **Example:**

        >>> import jax.numpy as jnp
        >>> float(ExactTransport().squared(jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.array([[3.0, 1.0], [0.0, 1.0]])))
        1.0
    """

    is_metric: ClassVar[bool] = True
    # Together, each waits at each of its steps for all others: 31 problems of n = 1000 took 1.5 s each and not .7.
    in_turn: ClassVar[bool] = True

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        n, d = x.shape
        if d == 1:
            return solution(_sorted_squared(x, y)[0])
        if len(y) != n:
            raise refuse(
                "y",
                f"hold {n} members, as `x` does, for an exact assignment in more than one dimension "
                "(`GaussianTransport`, `SlicedTransport` and `SinkhornTransport` take unequal sizes)",
                f"holds {len(y)}",
            )
        (i, j), solvable = _assignment(x, y)
        return solution(jnp.mean(jnp.sum((x[i] - y[j]) ** 2, axis=-1)), solvable)

    def map(self, x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The partner in y of each member of x, shape (n, d). **Differentiation:** in y, at the assignment found."""
        if len(x) != len(y):
            raise refuse("y", f"hold {len(x)} members, as `x` does", f"holds {len(y)}")
        i, j = (jnp.argsort(x[:, 0]), jnp.argsort(y[:, 0])) if x.shape[1] == 1 else _assignment(x, y)[0]
        return jnp.zeros_like(x).at[i].set(y[j])


class GaussianTransport(AbstractTransport):
    r"""The Bures-Wasserstein distance of the sample moments: W2² between Gaussians, a lower bound of W2² for all laws (Gelbrich). Any n, m.

        W2² = |m_x - m_y|² + tr A + tr B - 2 tr(A^½ B A^½)^½  =  |m_x - m_y|² + min_O ‖X - O Y‖²

    A and B are the population covariances (1/n), X and Y the centred clouds over √n and √m (so A = XᵀX), and O runs over rotations of
    the members: an orthogonal Procrustes problem, solved by the singular vectors of X Yᵀ. The second form needs no square root of a
    matrix, takes n < d as it takes n > d, and loses no accuracy to cancellation where x and y are close.

    **Differentiation:** forward and reverse by the envelope theorem, finite for isotropic, rank-deficient and equal clouds and for point
    masses. Second derivatives hold in general position; where singular values coincide they are NaN, or refused.
    **Reference:** Bhatia, Jain and Lim, "On the Bures-Wasserstein distance between positive definite matrices", Expo. Math. 37, 165 (2019).

    **Example:**

        >>> import jax.numpy as jnp
        >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([[0.0], [0.0], [8.0], [8.0]])
        >>> round(float(GaussianTransport().squared(x, y)), 4)  # means 0 and 4, standard deviations 1 and 4
        25.0
    """

    is_metric: ClassVar[bool] = True
    # Two stacks of factorizations at a time can wait for each other forever: jaxlib 0.10 spreads each over the threads that both occupy.
    in_turn: ClassVar[bool] = True

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
        shift = jnp.sum((mean_x - mean_y) ** 2)
        return solution(shift + _procrustes((x - mean_x) / len(x) ** 0.5, (y - mean_y) / len(y) ** 0.5))

    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """The affine image of each member of x, shape (n, d): it has the mean and the covariance of y.

        **Differentiation:** through the singular vectors: not finite where singular values coincide or vanish, unlike `squared`.
        """
        mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
        _, apart, _ = _aligned((x - mean_x) / len(x) ** 0.5, (y - mean_y) / len(y) ** 0.5)
        return x - mean_x + mean_y - len(x) ** 0.5 * apart


class SlicedTransport(AbstractTransport):
    r"""d times the mean over fixed directions of the one-dimensional W2² of the projections. Any n, m.

        d · mean_k W2²(⟨u_k, x⟩, ⟨u_k, y⟩) ≤ W2²(x, y)

    The directions depend on `key` and d alone and come in orthonormal blocks of d. With `directions` a multiple of d the bound
    always holds; otherwise on average over keys. It is tight for a translation.

    **Args:** `directions`: how many, at least 1. `key`: what they are drawn from.
    **Raises:** `InputError` if `directions` is not a positive integer or `key` not a key.
    **Differentiation:** forward and reverse, to every order, at the orders found: exact wherever no two projections coincide.
    **Reference:** Bonneel, Rabin, Peyré and Pfister, "Sliced and Radon Wasserstein barycenters of measures", JMIV 51, 22 (2015).

    **Example:**

        >>> import jax
        >>> transport = SlicedTransport(directions=4, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (5, 2))
        >>> round(float(transport.squared(x, x + 1.0)), 5)
        2.0
    """

    is_metric: ClassVar[bool] = True
    directions: int = eqx.field(static=True)
    key: Key

    def __check_init__(self):
        check_positive_int("directions", self.directions)
        check_key("key", self.key)

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        d = x.shape[1]
        across = self._draw(d).astype(x.dtype)
        return solution(d * jnp.mean(_sorted_squared(product(x, across), product(y, across))))

    def _draw(self, d: int) -> Float[Array, "d directions"]:
        """Unit columns, orthonormal within each block of d; the same in every precision."""
        width = min(d, self.directions)
        blocks = -(-self.directions // width)
        normal = jax.random.normal(self.key, (blocks, d, width), jnp.float32).astype(jnp.result_type(float))
        return jnp.concatenate(jnp.linalg.qr(normal)[0], axis=1)[:, : self.directions]


class _Elsewhere(AbstractTransport):
    """Another transport, in other coordinates."""

    transport: AbstractTransport

    @property
    def is_metric(self) -> bool:
        return self.transport.is_metric

    @property
    def in_turn(self) -> bool:
        return self.transport.in_turn


class Mapped(_Elsewhere):
    """Another transport, of the features `map(θ)` of each member: a metric on laws of features, blind to what the map does not see.

    **Args:** `transport`: any other. `map`: from one member, shape (d,), to its features, shape (p,); a pytree or a function of jax.
    **Raises:** `InputError` if the map does not answer with shape (p,).
    **Differentiation:** as the inner transport, through the map.

    **Example:**

        >>> import jax.numpy as jnp
        >>> norm = Mapped(ExactTransport(), lambda member: jnp.linalg.norm(member, keepdims=True))
        >>> float(norm.squared(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 7.0]])))
        4.0
    """

    map: Callable[[Float[Array, " d"]], Float[Array, " p"]]

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = jax.vmap(self.map)(x), jax.vmap(self.map)(y)
        if x.ndim != 2:
            raise refuse("map", "return shape (p,) for one member", f"returns shape {x.shape[1:]}")
        return self.transport.solve(x, y)


def principal_directions(positions: Float[ArrayLike, "*many d"], coordinates: int) -> Float[Array, "d p"]:
    """The orthonormal directions along which all these members together vary most, as columns: a matrix for `Projected`.

    A run is measured in one fixed set of coordinates, so fit it once, to all its snapshots together; a fit of each snapshot would compare
    laws in different spaces.

    **Args:** `positions`: shape (..., d), such as (J+1, n, d). `coordinates`: p, at most d and at most the number of members in all.
    **Returns:** shape (d, p), in decreasing order of variance; of each direction the largest entry is positive.
    **Raises:** `InputError` if p is out of range. **Differentiation:** none; it is made outside of jax.

    **Example:**

        >>> import numpy as np
        >>> principal_directions(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1]]), 1).shape
        (2, 1)
    """
    pooled = np.asarray(positions, np.float64).reshape(-1, np.shape(positions)[-1])
    _check_coordinates(coordinates, pooled.shape[1], len(pooled))
    _, _, rows = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    rows = rows[:coordinates]
    signs = np.sign(rows[np.arange(coordinates), np.argmax(np.abs(rows), axis=1)])
    return jnp.asarray((signs[:, None] * rows).T, jnp.result_type(float))


def random_directions(d: int, coordinates: int, key: Key) -> Float[Array, "d p"]:
    """Orthonormal directions that know nothing of the data, as columns: a matrix for `Projected`. Uniform, and the same in every precision.

    **Args:** `d`: numbers in one member. `coordinates`: p, at most d. `key`: what they are drawn from.
    **Returns:** shape (d, p). **Raises:** `InputError` if p is out of range or `key` not a key.

    **Example:**

        >>> import jax
        >>> random_directions(5, 2, jax.random.key(0)).shape
        (5, 2)
    """
    check_positive_int("d", d)
    check_key("key", key)
    _check_coordinates(coordinates, d, d)
    normal = jax.random.normal(key, (d, coordinates), jnp.float32).astype(jnp.result_type(float))
    upper: Any
    directions, upper = jnp.linalg.qr(normal)
    # Of the two signs of a column, the one that does not depend on the algorithm.
    return directions * jnp.sign(jnp.diagonal(upper))


def _check_coordinates(coordinates: int, d: int, members: int) -> None:
    check_positive_int("coordinates", coordinates)
    if coordinates > d:
        raise refuse("coordinates", f"be at most {d}, the numbers in one member", f"is {coordinates}")
    if coordinates > members:
        raise refuse("coordinates", f"be at most {members}, the members of all snapshots together", f"is {coordinates}")


class Projected(_Elsewhere):
    """Another transport, of the coordinates θ @ `matrix`. With orthonormal columns every metric here then bounds its full self from below.

    **Args:** `transport`: any other. `matrix`: shape (d, p), a leaf of the pytree.
    **Raises:** `InputError` if `matrix` has not shape (d, p).
    **Differentiation:** as the inner transport, in the matrix as well.

    **Example:**

        >>> import jax.numpy as jnp
        >>> first = Projected(ExactTransport(), jnp.array([[1.0], [0.0]]))
        >>> float(first.squared(jnp.array([[1.0, 9.0]]), jnp.array([[4.0, 0.0]])))
        9.0
    """

    matrix: Float[Array, "d p"] = eqx.field(converter=as_float)

    def __check_init__(self):
        if jnp.ndim(self.matrix) != 2 or jnp.size(self.matrix) == 0:
            raise refuse("matrix", "have shape (d, p)", f"has shape {jnp.shape(self.matrix)}")

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        if len(self.matrix) != x.shape[1]:
            raise refuse(
                "matrix", f"have shape ({x.shape[1]}, p) for members of {x.shape[1]} coordinates", f"has shape {self.matrix.shape}"
            )
        matrix = self.matrix.astype(x.dtype)
        return self.transport.solve(product(x, matrix), product(y, matrix))


def coordinates(transport: AbstractTransport, positions: Float[Array, "snapshots n d"]) -> tuple[Array, Array | None]:
    """What the transport compares in the end, (J+1, n, p), and the matrix (d, p) that led there if it is a projection."""
    matrix = None
    while isinstance(transport, Mapped | Projected):
        if isinstance(transport, Projected):
            step = transport.matrix.astype(positions.dtype)
            matrix = step if matrix is None else product(matrix, step)
            positions = product(positions, step)
        else:
            positions = jax.vmap(jax.vmap(transport.map))(positions)
        transport = transport.transport
    return positions, matrix


@eqx.filter_jit
def _compiled_solve(transport: AbstractTransport, x: Any, y: Any) -> Solution:
    return transport.solve(jnp.asarray(x), jnp.asarray(y))


def solution(squared: Scalar, solved: Array | bool = True) -> Solution:
    """A factor rather than a choice, so that what has no finite answer has no finite derivative either."""
    finite = jnp.isfinite(squared) & solved
    return Solution(squared * jnp.where(finite, jnp.ones_like(squared), jnp.full_like(squared, jnp.nan)), finite)


def recentred(x: Array, y: Array) -> tuple[Array, Array]:
    """Both clouds about one point: no distance changes, and products of coordinates stop cancelling far from the origin."""
    center = jax.lax.stop_gradient(jnp.mean(x, axis=0))
    return x - center, y - center


def _assignment(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> tuple[tuple[Array, Array], Array]:
    """The pairs (i, j) of the cheapest assignment, and whether the costs had one."""
    # In difference form, so that coincident members cost nothing at all; row by row, because XLA may store all n²d differences.
    cost = jax.lax.stop_gradient(jax.lax.map(lambda member: jnp.sum((member - y) ** 2, axis=-1), x))
    # The Hungarian's potentials reach n times the largest cost, and beyond the finite numbers neither its answer nor its end can be
    # relied on. The sum stands in for the largest, because XLA's vectorized maximum drops NaN on a CPU.
    solvable = jnp.isfinite(len(x) * jnp.sum(cost))
    _, matching = ott().hungarian(ott().Geometry(cost_matrix=jnp.where(solvable, cost, 0.0)))
    i, j = matching.paired_indices
    return keep(((i, j), solvable))


def _sorted_squared(x: Float[Array, "n k"], y: Float[Array, "m k"]) -> Float[Array, " k"]:
    """The one-dimensional W2² of each column: ∫(F_x⁻¹(t) - F_y⁻¹(t))² dt over the union of the grids i/n and j/m."""
    n, m = len(x), len(y)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1/nm: whole numbers, so that shared edges coincide
    weights = jnp.asarray(np.diff(edges) / (n * m), x.dtype)
    difference = jnp.sort(x, axis=0)[edges[:-1] // m] - jnp.sort(y, axis=0)[edges[:-1] // n]
    return jnp.sum(weights[:, None] * difference**2, axis=0)


@jax.custom_jvp
def _procrustes(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar:
    """min_O ‖x - O y‖² = tr xᵀx + tr yᵀy - 2 ‖x yᵀ‖_*, over the O that rotate members, as if both clouds were padded by zero rows."""
    return jnp.sum(_aligned(x, y)[0] ** 2)


@_procrustes.defjvp
def _(primals, tangents):
    # The optimal O is stationary, so it may be held; a derivative of the singular vectors would be NaN where singular values coincide.
    residual, along_x, along_y = keep(_aligned(*primals))
    dx, dy = tangents
    return jnp.sum(residual**2), 2 * jnp.sum(along_x * dx) + 2 * jnp.sum(along_y * dy)


def _aligned(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> tuple[Array, Array, Array]:
    """The residual R = R_x - O R_y at the optimal O, and half the gradients of ‖R‖² in x = Q_x R_x and in y = Q_y R_y."""
    rows = max(min(x.shape), min(y.shape))
    (qx, rx), (qy, ry) = _factors(x, rows), _factors(y, rows)
    u, _, vt = jnp.linalg.svd(product(rx, ry.T))
    rotation = product(u, vt)
    residual = rx - product(rotation, ry)
    return residual, product(qx, residual), -product(qy, product(rotation.T, residual))


def _factors(x: Float[Array, "n d"], rows: int) -> tuple[Array, Array]:
    """x = Q R with R of `rows` rows: fewer than n where n > d. What is added to get there is zero and moves nothing."""
    n, d = x.shape
    q, r = jnp.linalg.qr(x) if n > d else (jnp.eye(n, dtype=x.dtype), x)
    added = rows - len(r)
    return jnp.pad(q, ((0, 0), (0, added))), jnp.pad(r, ((0, added), (0, 0)))
