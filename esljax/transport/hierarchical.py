"""W2² of very many members, from above: halved clouds, and pairs improved in small problems."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_key, check_positive_int, door, plain_int, refuse
from esljax._numerics import product
from esljax._types import Array, Float, Int, Key
from esljax.sharding import keep
from esljax.transport.base import (
    AbstractTransport,
    Solution,
    check_room,
    of_one_type,
    recentred,
    solution,
)
from esljax.transport.exact import costs, mean_square, paired_by_sorting, scaled
from esljax.transport.pairing import pairs, solvable


class HierarchicalTransport(AbstractTransport):
    r"""An upper value of W2² whose time grows as n log n, for 10⁴ to 10⁶ members.

        W2²(x, y) ≤ (1/n) Σ_i |x_i - y_π(i)|²

    π is one to one, so the value is never below W2² of the samples, but for rounding. Both clouds
    are halved along common directions until at most `leaf` members are left on each side, and each
    pair of leaves is solved exactly. If the members as they stand are closer, these pairs are taken
    instead. Each pass then halves the *pairs* along directions of its own, and solves every leaf of
    pairs anew, which can only lower the value. With `n` up to `leaf` it is `ExactTransport`.

    **Args:** `key`: of the directions; the same key gives the same pairs. `leaf`: the most members
    of an exact problem. `passes`: how often pairs are improved.
    **Raises:** `InputError` if n ≠ m, for a `key` that is none, and for a `leaf` or `passes` that
    is no positive integer.
    **Differentiation:** forward and reverse, to every order, of the upper value at the pairs found,
    which count as constants.
    **Reference:** in the manner of Halmos et al., "Hierarchical Refinement: Optimal Transport to
    Infinity and Beyond", ICML 2025, with halves by directions in place of low-rank plans, and
    passes that mend them.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (600, 2))
        >>> transport = esl.HierarchicalTransport(jax.random.key(1), leaf=64)
        >>> exact = float(esl.ExactTransport().squared(x, 2 * x + 1))
        >>> 1 <= float(transport.squared(x, 2 * x + 1)) / exact < 1.02
        True
    """

    is_metric: ClassVar[bool] = False
    in_turn: ClassVar[bool] = True
    pairs_members: ClassVar[bool] = True
    key: Key
    leaf: int = eqx.field(static=True, converter=plain_int, default=256)
    passes: int = eqx.field(static=True, converter=plain_int, default=18)

    def __check_init__(self):
        check_key("key", self.key)
        check_positive_int("leaf", self.leaf)
        check_positive_int("passes", self.passes)

    def in_units(self, size: Any) -> "HierarchicalTransport":
        return self

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        return self.paired(x, y)[0]

    @door
    def paired(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Solution, Int[Array, " n"] | None]:
        places, solved = self._pairs(x, y)
        return solution(mean_square(x, y[places]), solved), places

    @door
    def map(self, x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Return the partner in y of each member of x, shape (n, d).

        **Differentiation:** in y, at the pairs found.
        """
        x, y = of_one_type(x, y)
        check_room(self, x.shape[0], x.shape[1], x.dtype)
        return y[self._pairs(x, y)[0]]

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int:
        return (8 if differentiated else 7) * n * d + 20 * n + min(n, self.leaf) ** 2

    def _pairs(
        self, x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Int[Array, " n"], Array | bool]:
        """The place in y of the partner of each member of x, and whether all leaves were solved."""
        if len(x) != len(y):
            raise refuse("y", f"hold {len(x)} members, as `x` does", f"holds {len(y)}")
        if x.shape[1] == 1:
            return paired_by_sorting(x, y), True
        return keep(_pairs(*jax.lax.stop_gradient((x, y)), self.key, self.leaf, self.passes))


def _pairs(x: Array, y: Array, key: Key, leaf: int, passes: int) -> tuple[Int[Array, " n"], Array]:
    n, d = x.shape
    levels = max(0, math.ceil(math.log2(n / leaf)))
    # Leaves of one size: members without a place, which pair with each other, fill the last ones.
    total = -(-n // 2**levels) * 2**levels
    real = jnp.arange(total) < n
    x, y = (jnp.pad(cloud, ((0, total - n), (0, 0))) for cloud in scaled(*recentred(x, y)))
    numbers = jnp.arange(total, dtype=jnp.int32)
    first, rest = jax.random.split(key)

    def directions(key: Key, cloud: Array) -> Float[Array, "levels d"]:
        """Random, and longest where the cloud is wide."""
        # The same in every precision.
        drawn = jax.random.normal(key, (d, levels), jnp.float32).astype(cloud.dtype)
        return product(cloud.T, product(cloud, drawn)).T

    def apart(columns):
        """Each cloud by itself, along common directions."""
        along = directions(first, jnp.concatenate([x, y]))
        mine, theirs = (_leaves(product(cloud, along.T), real, levels) for cloud in (x, y))
        found, solved = _in_leaves(x, y, real, mine, theirs)
        return columns.at[mine].set(found), solved

    def together(state, inputs):
        """Pairs, by where they begin, where they end, or both."""
        (columns, solved), (key, weights) = state, inputs
        ends, (one, other) = y[columns], jax.random.split(key)
        along = weights[0] * product(x, directions(one, x).T)
        along += weights[1] * product(ends, directions(other, y).T)
        leaves = _leaves(along, real, levels)
        found, all_ = _in_leaves(x, y, real, leaves, columns[leaves])
        return (columns.at[leaves].set(found), solved & all_), None

    def value(columns):
        return jnp.sum((x - y[columns]) ** 2)

    halved, solved = apart(numbers)
    if levels == 0:
        return halved[:n], solved
    start = jnp.where(value(numbers) <= value(halved), numbers, halved)
    weights = jnp.resize(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], x.dtype), (passes, 2))
    keys = jax.vmap(lambda i: jax.random.fold_in(rest, i))(jnp.arange(passes))
    (columns, solved), _ = jax.lax.scan(together, (start, solved), (keys, weights))
    return columns[:n], solved


def _leaves(
    along: Float[Array, "total levels"], real: Array, levels: int
) -> Int[Array, "leaves size"]:
    """The members of each leaf: halved by the places along one direction after the other."""
    along = jnp.where(real[:, None], along, jnp.inf)
    members = jnp.arange(len(along), dtype=jnp.int32)[None]
    for level in range(levels):
        order = jnp.argsort(along[members, level], axis=1)
        members = jnp.take_along_axis(members, order, axis=1).reshape(2 * len(members), -1)
    return members


def _in_leaves(
    x: Float[Array, "total d"],
    y: Float[Array, "total d"],
    real: Array,
    rows: Int[Array, "leaves size"],
    columns: Int[Array, "leaves size"],
) -> tuple[Int[Array, "leaves size"], Array]:
    """The partner of each row of each leaf, among the columns of that leaf, and whether all leaves
    were solved."""

    def of_leaf(leaf):
        mine, theirs = leaf
        cost = costs(x[mine], y[theirs])
        # One pair with a filler makes another one: both cost more than two pairs without.
        here, there = real[mine][:, None], real[theirs]
        cost = jnp.where(here & there, cost, jnp.where(here == there, 0.0, jnp.max(cost)))
        solved = solvable(cost)
        return theirs[pairs(cost, solved)[0]], solved

    found, solved = jax.lax.platform_dependent(
        (rows, columns),
        cpu=lambda leaves: jax.lax.map(of_leaf, leaves),
        default=lambda leaves: jax.vmap(of_leaf)(leaves),
    )
    return found, jnp.all(solved)
