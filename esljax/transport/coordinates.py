"""Any transport in other coordinates: features of each member, or a projection."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    as_array,
    as_float,
    check_finite,
    check_fits,
    check_key,
    check_positive_int,
    check_real,
    door,
    refuse,
)
from esljax._numerics import product
from esljax._types import Array, ArrayLike, Float, Int, Key, Scalar
from esljax.transport.base import (
    AbstractTransport,
    Solution,
    check_is_transport,
    subset_solutions_of,
)


class AbstractWrappedTransport(AbstractTransport):
    """A transport that holds another one and measures by it.

    Every property is that of the inner transport, so that a wrapper silences no warning of a
    report and can be planned for. `MappedTransport` and `ProjectedTransport` are of this kind.

    **Recipe of a subclass:** define `solve`, which calls `self.transport.solve`. Override what the
    wrapper changes: `coordinates` if it measures in other coordinates, with `linear` and
    `projection` if that is a linear map; `pairs_members`, `moments_only` or `is_metric` if the
    answer no longer has the property; `in_units`, `paired` and `solve_subsets`, which are not those
    of the inner transport, if you know them; `numbers_held` if it holds more than the coordinates
    of both ends besides the inner problem.

    **Args:** `transport`: the inner transport.
    **Raises:** `InputError` if `transport` is none.

    **Example:** the least distance over reflections at the origin.

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class ReflectedTransport(esl.transport.AbstractWrappedTransport):
        ...     def solve(self, x, y):
        ...         kept, turned = self.transport.solve(x, y), self.transport.solve(x, -y)
        ...         squared = jnp.minimum(kept.squared, turned.squared)
        ...         return esl.Solution(squared, kept.converged & turned.converged)
        >>> transport = ReflectedTransport(esl.ExactTransport())
        >>> float(transport.squared(jnp.array([[3.0, 4.0]]), jnp.array([[-3.0, -2.0]])))
        4.0
        >>> transport.name
        'ReflectedTransport ExactTransport'
    """

    transport: AbstractTransport

    def __check_init__(self):
        check_is_transport("transport", self.transport)

    @property
    def is_metric(self) -> bool:
        return self.transport.is_metric

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.transport.name}"

    @property
    def in_turn(self) -> bool:
        return self.transport.in_turn

    @property
    def pairs_members(self) -> bool:
        return self.transport.pairs_members

    @property
    def moments_only(self) -> bool:
        return self.transport.moments_only

    @property
    def knows_places(self) -> bool:
        return self.transport.knows_places

    @property
    def projection(self) -> Float[Array, "d p"] | None:
        return self.transport.projection if self.linear else None

    def coordinates(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        return self.transport.coordinates(positions)

    @property
    def linear(self) -> bool:
        forwards = type(self).coordinates is AbstractWrappedTransport.coordinates
        return forwards and self.transport.linear

    def coarser(self) -> "AbstractTransport | None":
        coarser = self.transport.coarser()
        return None if coarser is None else eqx.tree_at(lambda t: t.transport, self, coarser)

    def rounding(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar | None:
        return self.transport.rounding(x, y)

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int | None:
        compared = jax.eval_shape(self.coordinates, jax.ShapeDtypeStruct((1, n, d), np.float32))
        inner = self.transport
        # Several changes of coordinates are priced as one.
        while isinstance(inner, AbstractWrappedTransport) and _prices_as_usual(inner):
            inner = inner.transport
        held = inner.numbers_held(n, compared.shape[-1], differentiated)
        return None if held is None else (4 if differentiated else 2) * n * d + held


def _prices_as_usual(transport: AbstractWrappedTransport) -> bool:
    return type(transport).numbers_held is AbstractWrappedTransport.numbers_held


class MappedTransport(AbstractWrappedTransport):
    """Another transport, between the features `map(θ)` of the members.

    A metric on laws of features, blind to whatever the map does not see.

    **Args:** `transport`: any other. `map`: from one member, shape (d,), to its features, shape
    (p,); a pytree or a function of jax.
    **Raises:** `InputError` if the map does not return shape (p,), and for a `QuotientTransport`.
    **Differentiation:** as the inner transport, through the map.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> norm = esl.MappedTransport(
        ...     esl.ExactTransport(), lambda member: jnp.linalg.norm(member, keepdims=True)
        ... )
        >>> float(norm.squared(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 7.0]])))
        4.0
    """

    map: Callable[[Float[Array, " d"]], Float[Array, " p"]]

    def __check_init__(self):
        _check_takes_coordinates(self.transport)

    def coordinates(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        return self.transport.coordinates(self._features(positions))

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        return self.transport.solve(self._features(x), self._features(y))

    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        return self.transport.paired(self._features(x), self._features(y))

    def solve_subsets(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Int[Array, "subsets kept"]
    ) -> Solution:
        return subset_solutions_of(self.transport, self._features(x), self._features(y), subsets)

    def rounding(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar | None:
        return self.transport.rounding(self._features(x), self._features(y))

    def _features(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        of_many = self.map
        for _ in range(positions.ndim - 1):
            of_many = jax.vmap(of_many)
        features: Any = of_many(positions)
        if not isinstance(features, jax.Array):
            kind = type(features).__name__
            raise refuse("map", "return shape (p,) for one member", f"returns a {kind}")
        if features.ndim != positions.ndim:
            shape = features.shape[positions.ndim - 1 :]
            raise refuse("map", "return shape (p,) for one member", f"returns shape {shape}")
        return features


class ProjectedTransport(AbstractWrappedTransport):
    """Another transport, between the coordinates θ @ `matrix`.

    With orthonormal columns every metric of this package then bounds its full self from below.

    **Args:** `transport`: any other. `matrix`: shape (d, p), a leaf of the pytree.
    **Raises:** `InputError` if `matrix` has not shape (d, p), and for a `QuotientTransport`.
    **Differentiation:** as the inner transport, in the matrix as well.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> first = esl.ProjectedTransport(esl.ExactTransport(), jnp.array([[1.0], [0.0]]))
        >>> float(first.squared(jnp.array([[1.0, 9.0]]), jnp.array([[4.0, 0.0]])))
        9.0
    """

    matrix: Float[Array, "d p"] = eqx.field(
        converter=functools.partial(as_float, argument="matrix")
    )

    def __check_init__(self):
        _check_takes_coordinates(self.transport)
        if jnp.ndim(self.matrix) != 2 or jnp.size(self.matrix) == 0:
            raise refuse("matrix", "have shape (d, p)", f"has shape {jnp.shape(self.matrix)}")

    @property
    def linear(self) -> bool:
        return self.transport.linear

    @property
    def of_distances(self) -> bool:
        # A projection of folded members is one of the members themselves.
        return self.transport.of_distances

    @property
    def projection(self) -> Float[Array, "d p"] | None:
        inner = self.transport.projection
        return self.matrix if inner is None else product(self.matrix, inner)

    def coordinates(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        return self.transport.coordinates(self._projected(positions))

    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        return self.transport.solve(self._projected(x), self._projected(y))

    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        return self.transport.paired(self._projected(x), self._projected(y))

    def solve_subsets(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Int[Array, "subsets kept"]
    ) -> Solution:
        return subset_solutions_of(self.transport, self._projected(x), self._projected(y), subsets)

    def rounding(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar | None:
        return self.transport.rounding(self._projected(x), self._projected(y))

    def in_units(self, size: Scalar) -> "AbstractTransport | None":
        inner = self.transport.in_units(size)
        return None if inner is None else eqx.tree_at(lambda t: t.transport, self, inner)

    def _projected(self, positions: Float[Array, "*many n d"]) -> Float[Array, "*many n p"]:
        d = positions.shape[-1]
        if len(self.matrix) != d:
            raise refuse(
                "matrix",
                f"have shape ({d}, p) for members of {d} coordinates",
                f"has shape {self.matrix.shape}",
            )
        return product(positions, self.matrix.astype(positions.dtype))


def _check_takes_coordinates(transport: AbstractTransport) -> None:
    if transport.knows_places:
        must = "compare members by whatever coordinates they have"
        raise refuse("transport", must, f"is {transport.name}, which turns their parameters")


@door
def principal_directions(
    positions: Float[ArrayLike, "*many d"], coordinates: int
) -> Float[Array, "d p"]:
    """Return the orthonormal directions of the largest variance of all these members together.

    The columns are a matrix for `ProjectedTransport`. A run is measured in one fixed set of
    coordinates, so fit it once, to all its snapshots together; a fit of each snapshot would compare
    laws in different spaces.

    **Args:** `positions`: shape (..., d), such as (J+1, n, d). `coordinates`: p, at most d and at
    most the number of members in all.
    **Returns:** shape (d, p), in decreasing order of variance; of each direction the largest entry
    is positive.
    **Raises:** `InputError` if p is out of range.
    **Differentiation:** none; it is computed outside of jax.

    **Example:**

        >>> import numpy as np
        >>> import esljax as esl
        >>> esl.principal_directions(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1]]), 1).shape
        (2, 1)
    """
    positions = as_array("positions", positions)
    check_real("positions", positions)
    check_finite("positions", positions)
    pooled = np.asarray(positions, np.float64).reshape(-1, np.shape(positions)[-1])
    check_coordinates(coordinates, pooled.shape[1], len(pooled))
    _, _, rows = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    rows = rows[:coordinates]
    signs = np.sign(rows[np.arange(coordinates), np.argmax(np.abs(rows), axis=1)])
    return jnp.asarray((signs[:, None] * rows).T, jnp.result_type(float))


@door
def random_directions(d: int, coordinates: int, key: Key) -> Float[Array, "d p"]:
    """Return orthonormal directions that do not depend on the data, as columns.

    A matrix for `ProjectedTransport`; uniform, and the same in every precision. The normal numbers
    that are made orthonormal are drawn by blocks of rows, so that `from_checkpoints` can draw them
    where it reads.

    **Args:** `d`: numbers in one member. `coordinates`: p, at most d. `key`: the key to draw from.
    **Returns:** shape (d, p).
    **Raises:** `InputError` if p is out of range or `key` is not a key.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> esl.random_directions(5, 2, jax.random.key(0)).shape
        (5, 2)
    """
    check_positive_int("d", d)
    check_key("key", key)
    check_coordinates(coordinates, d, d)
    words = f"{coordinates:,} directions of {d:,} numbers"
    check_fits("coordinates", 12.0 * d * coordinates, words, "take fewer coordinates")
    normal = _drawn(key, coordinates, -(-d // _ROWS))[:d].astype(jnp.result_type(float))
    upper: Any
    directions, upper = jnp.linalg.qr(normal)
    # Of the two signs of a column, choose the one that does not depend on the algorithm.
    return directions * jnp.sign(jnp.diagonal(upper))


# Rows of the normal numbers behind random directions that are drawn by one key.
_ROWS = 4096


def normal_rows(key: Key, coordinates: int, first: int, count: int) -> Float[np.ndarray, "count p"]:
    """Return some rows of the normal numbers that `random_directions` makes orthonormal, whatever
    the number of all rows."""
    blocks = range(first // _ROWS, -(-(first + count) // _ROWS))
    drawn = np.concatenate([_block(key, coordinates, jnp.asarray(k)) for k in blocks])
    return drawn[first - blocks[0] * _ROWS :][:count]


def _drawn(key: Key, coordinates: int, blocks: int) -> Float[Array, "rows p"]:
    rest = jax.lax.map(lambda k: _block(key, coordinates, k), jnp.arange(1, blocks))
    first = _block(key, coordinates, jnp.asarray(0))
    return jnp.concatenate([first, rest.reshape(-1, coordinates)])


@eqx.filter_jit
def _block(key: Key, coordinates: int, k: Any) -> Float[Array, "rows p"]:
    # The first block is drawn by the key itself, as all numbers of small members always were.
    own = jnp.where(k == 0, key, jax.random.fold_in(key, k))
    return jax.random.normal(own, (_ROWS, coordinates), jnp.float32)


def check_coordinates(coordinates: int, d: int, members: int) -> None:
    """Reject more principal coordinates than members of d numbers have, of all snapshots together.

    **Raises:** `InputError` for other counts as well.
    """
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
