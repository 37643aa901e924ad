"""W2² by optimal assignment, and by sorting in one dimension."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import door, refuse
from esljax._numerics import moderating_unit, product
from esljax._types import Array, Float, Int, Scalar
from esljax.sharding import keep
from esljax.transport.base import (
    AbstractTransport,
    Solution,
    check_room,
    of_one_type,
    recentred,
    solution,
)
from esljax.transport.pairing import in_units, pairs, pairs_within, solvable


class ExactTransport(AbstractTransport):
    r"""W2² itself, by optimal assignment π of equally many members; in d = 1 by sorting, any n, m.

        W2²(x, y) = min_π (1/n) Σ_i |x_i - y_π(i)|²

    Where members of one run are their own nearest partners by more than rounding, one product of
    matrices shows it. Elsewhere the pairs are those of `esljax.transport.assignment`: one sweep
    over the costs if members are their own best partners, else shortest augmenting paths, O(n³).

    **Raises:** `InputError` if n ≠ m and d > 1.
    **Differentiation:** forward and reverse, to every order, at the assignment found (envelope
    theorem): exact wherever it is unique.
    **Reference:** Jonker and Volgenant, Computing 38, 325 (1987).

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> x, y = jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
        >>> float(esl.ExactTransport().squared(x, y))
        1.0
    """

    is_metric: ClassVar[bool] = True
    # Together, each waits at each of its steps for all others: 31 problems of n = 1000 then took
    # 1.5 s each instead of .7.
    in_turn: ClassVar[bool] = True
    pairs_members: ClassVar[bool] = True
    of_distances: ClassVar[bool] = True

    def in_units(self, size: Scalar) -> "ExactTransport":
        return self

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        return self.paired(x, y)[0]

    @door
    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        n, d = x.shape
        if d == 1:
            solved = solution(sorted_squared(x, y)[0])
            return solved, paired_by_sorting(x, y) if len(y) == n else None
        if len(y) != n:
            raise refuse(
                "y",
                f"hold {n} members, as `x` does, for an exact assignment in more than one "
                "dimension (`GaussianTransport`, `SlicedTransport` and `SinkhornTransport` take "
                "unequal sizes)",
                f"holds {len(y)}",
            )
        (places, _), solved = _partners(x, y)
        return solution(mean_square(x, y[places]), solved), places

    def solve_subsets(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"], subsets: Int[Array, "subsets kept"]
    ) -> Solution:
        if x.shape[1] == 1 or len(x) != len(y):
            return super().solve_subsets(x, y, subsets)

        def as_they_stand():
            return subsets.astype(jnp.int32), jnp.array(True)

        def mended():
            cost = costs(x, y)
            whole, solved = _solved(cost)
            return pairs_within(cost, solved, whole, subsets), solved

        partners, solved = keep(jax.lax.cond(own_is_nearest(x, y), as_they_stand, mended))
        return jax.lax.map(
            lambda pair: solution(mean_square(x[pair[0]], y[pair[1]]), solved), (subsets, partners)
        )

    @door
    def solve_costs(
        self,
        across: Float[Array, "n m"],
        within: Callable[[], tuple[Float[Array, "n n"], Float[Array, "m m"]]],
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        n, m = across.shape
        if n != m:
            raise refuse("y", f"hold {n} members, as `x` does", f"holds {m}")
        (places, _), solved = _solved(in_units(jax.lax.stop_gradient(across))[0])
        return solution(jnp.mean(across[jnp.arange(n), places]), solved), places

    @door
    def map(self, x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Return the partner in y of each member of x, shape (n, d).

        **Differentiation:** in y, at the assignment found.
        """
        if len(x) != len(y):
            raise refuse("y", f"hold {len(x)} members, as `x` does", f"holds {len(y)}")
        x, y = of_one_type(x, y)
        check_room(self, x.shape[0], x.shape[1], x.dtype)
        return y[paired_by_sorting(x, y) if x.shape[1] == 1 else _partners(x, y)[0][0]]

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int:
        # In one dimension members are sorted and there are no costs.
        matrix = 0 if d == 1 else 1.05 * n**2
        return (9 if differentiated else 5) * n * d + matrix


def _sorted(x: Float[Array, "n 1"], y: Float[Array, "n 1"]) -> tuple[Array, Array]:
    return jnp.argsort(x[:, 0]), jnp.argsort(y[:, 0])


def _places(i: Array, j: Array) -> Int[Array, " n"]:
    return jnp.zeros_like(i).at[i].set(j)


def paired_by_sorting(x: Float[Array, "n 1"], y: Float[Array, "n 1"]) -> Int[Array, " n"]:
    """The place in y of the partner of each member of x."""
    return _places(*_sorted(x, y))


def mean_square(x: Float[Array, "n d"], partners: Float[Array, "n d"]) -> Scalar:
    """The mean over members of |x_i - partner_i|²."""
    return jnp.mean(jnp.sum((x - partners) ** 2, axis=-1))


def scaled(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Both clouds in a unit that suits them, a power of two, which rounds nothing.

    Sums of the squares of very large or very small members then are numbers, and in order. NaN
    where a square itself is none: beside such a member the others may have lost theirs.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))
    unit = moderating_unit(largest, 2.0**20)
    unit = jnp.where(jnp.isfinite(largest**2), unit, jnp.nan)
    return x / unit, y / unit


# Coordinates whose squares are summed before they are added to the costs: XLA then makes one loop
# along the rows of them all.
_TOGETHER = 16


def costs(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """|x_i - y_j|², in difference form, so that coincident members cost nothing at all.

    In the square of the unit of `scaled`.
    """
    x, y = scaled(*jax.lax.stop_gradient((x, y)))
    n, d = x.shape
    width = min(d, _TOGETHER)

    def blocks(members):
        # (blocks, width, n): a few coordinates at a time, because XLA may store all n²d
        # differences. Padding with zeros adds nothing.
        padded = jnp.pad(members, ((0, 0), (0, -d % width)))
        return padded.T.reshape(-1, width, n)

    def add(costs, block):
        mine, theirs = block
        return costs + sum((mine[k, :, None] - theirs[k]) ** 2 for k in range(width)), None

    return jax.lax.scan(add, jnp.zeros((n, n), x.dtype), (blocks(x), blocks(y)))[0]


def _partners(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> tuple[tuple[Array, Array], Array]:
    """The partner of each member with the duals of the others, and whether there are such."""
    n = len(x)

    def as_they_stand():
        return (jnp.arange(n, dtype=jnp.int32), jnp.zeros(n, x.dtype)), jnp.array(True)

    return keep(jax.lax.cond(own_is_nearest(x, y), as_they_stand, lambda: _solved(costs(x, y))))


def _solved(cost: Float[Array, "n n"]) -> tuple[tuple[Array, Array], Array]:
    solved = solvable(cost)
    return pairs(cost, solved), solved


# Members that are compared with all others at a time, to hold no second matrix of n² numbers.
_WIDTH = 1024


def own_is_nearest(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Array:
    """Whether it is certain that y_i is nearer to x_i than any other y_j, for every i, shape ().

    Then members are paired as they stand, and no costs are needed. |x_i|² + |y_j|² - 2 x_i·y_j is
    one product of matrices, but it cancels: to 4 (d + 4) eps (|x_i|² + |y_j|²), the rounding of its
    three sums of d terms about the middle. So the nearest must win by four times that, and by the
    terms that are below the least number of their type and count as none.
    """
    x, y = recentred(*jax.lax.stop_gradient((x, y)))
    n, d = x.shape
    rounding = 16 * (d + 4) * jnp.finfo(x.dtype).eps
    mine, theirs = (jnp.sum(each**2, axis=1) for each in (x, y))
    width = min(n, _WIDTH)

    def least(block):
        members, numbers = block
        # Minima down the columns: a CPU takes them several columns at a time.
        others = (1 - rounding) * theirs[:, None] - 2 * product(y, members.T)
        own = jnp.arange(n)[:, None] == numbers
        return jnp.min(jnp.where(own, jnp.inf, others), axis=0)

    blocks = jnp.pad(x, ((0, -n % width), (0, 0))).reshape(-1, width, d)
    numbers = jnp.arange(len(blocks) * width).reshape(-1, width)
    nearest = (1 - rounding) * mine + jax.lax.map(least, (blocks, numbers)).ravel()[:n]
    finite = jnp.isfinite(n * jnp.sum(mine + theirs))
    lost = 16 * d * jnp.finfo(x.dtype).tiny
    return finite & jnp.all(nearest > jnp.sum((x - y) ** 2, axis=1) + lost)


def sorted_squared(x: Float[Array, "n k"], y: Float[Array, "m k"]) -> Float[Array, " k"]:
    """Return the one-dimensional W2² of each column.

    ∫(F_x⁻¹(t) - F_y⁻¹(t))² dt over the union of the grids i/n and j/m.
    """
    n, m = len(x), len(y)
    # In units of 1/nm the edges are whole numbers, so that shared edges coincide.
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    weights = jnp.asarray(np.diff(edges) / (n * m), x.dtype)
    difference = jnp.sort(x, axis=0)[edges[:-1] // m] - jnp.sort(y, axis=0)[edges[:-1] // n]
    return jnp.sum(weights[:, None] * difference**2, axis=0)
