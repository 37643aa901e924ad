"""Any transport in other coordinates: features of each member, or a projection."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_key, check_positive_int, refuse
from esljax._numerics import product
from esljax._types import Array, ArrayLike, Float, Key
from esljax.transport.base import AbstractTransport, Solution


class _Elsewhere(AbstractTransport):
    """Another transport, in other coordinates."""

    transport: AbstractTransport

    @property
    def is_metric(self) -> bool:
        return self.transport.is_metric

    @property
    def in_turn(self) -> bool:
        return self.transport.in_turn


class MappedTransport(_Elsewhere):
    """Another transport, of the features `map(θ)` of each member: a metric on laws of features, blind to what the map does not see.

    **Args:** `transport`: any other. `map`: from one member, shape (d,), to its features, shape (p,); a pytree or a function of jax.
    **Raises:** `InputError` if the map does not answer with shape (p,).
    **Differentiation:** as the inner transport, through the map.

    **Example:**

        >>> import jax.numpy as jnp
        >>> norm = MappedTransport(ExactTransport(), lambda member: jnp.linalg.norm(member, keepdims=True))
        >>> float(norm.squared(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 7.0]])))
        4.0
    """

    map: Callable[[Float[Array, " d"]], Float[Array, " p"]]

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = jax.vmap(self.map)(x), jax.vmap(self.map)(y)
        if x.ndim != 2:
            raise refuse("map", "return shape (p,) for one member", f"returns shape {x.shape[1:]}")
        return self.transport.solve(x, y)


def principal_directions(
    positions: Float[ArrayLike, "*many d"], coordinates: int
) -> Float[Array, "d p"]:
    """The orthonormal directions along which all these members together vary most, as columns: a matrix for `ProjectedTransport`.

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
    """Orthonormal directions that know nothing of the data, as columns: a matrix for `ProjectedTransport`. Uniform, and the same in every precision.

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
        raise refuse(
            "coordinates", f"be at most {d}, the numbers in one member", f"is {coordinates}"
        )
    if coordinates > members:
        raise refuse(
            "coordinates",
            f"be at most {members}, the members of all snapshots together",
            f"is {coordinates}",
        )


class ProjectedTransport(_Elsewhere):
    """Another transport, of the coordinates θ @ `matrix`. With orthonormal columns every metric here then bounds its full self from below.

    **Args:** `transport`: any other. `matrix`: shape (d, p), a leaf of the pytree.
    **Raises:** `InputError` if `matrix` has not shape (d, p).
    **Differentiation:** as the inner transport, in the matrix as well.

    **Example:**

        >>> import jax.numpy as jnp
        >>> first = ProjectedTransport(ExactTransport(), jnp.array([[1.0], [0.0]]))
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
                "matrix",
                f"have shape ({x.shape[1]}, p) for members of {x.shape[1]} coordinates",
                f"has shape {self.matrix.shape}",
            )
        matrix = self.matrix.astype(x.dtype)
        return self.transport.solve(product(x, matrix), product(y, matrix))


def coordinates(
    transport: AbstractTransport, positions: Float[Array, "snapshots n d"]
) -> tuple[Array, Array | None]:
    """What the transport compares in the end, (J+1, n, p), and the matrix (d, p) that led there if it is a projection."""
    matrix = None
    while isinstance(transport, MappedTransport | ProjectedTransport):
        if isinstance(transport, ProjectedTransport):
            step = transport.matrix.astype(positions.dtype)
            matrix = step if matrix is None else product(matrix, step)
            positions = product(positions, step)
        else:
            positions = jax.vmap(jax.vmap(transport.map))(positions)
        transport = transport.transport
    return positions, matrix
