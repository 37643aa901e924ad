r"""Optimal assignment in compiled loops: the cheapest pairing of the rows and columns of a matrix.

    min_π Σ_i c_i,π(i) = max_{u,v} Σ_i u_i + Σ_j v_j      such that u_i + v_j ≤ c_ij

Equality on the pairs proves a pairing. Two snapshots of one run are mostly paired as they stand,
which is proved first: duals with v_j ≤ v_i + c_ij - c_ii exist exactly if no cycle of exchanges
pays, and a few sweeps of Bellman and Ford find them. Elsewhere the minima of columns and rows give
the first duals, each row takes a free column without slack if it has one, and each row that is left
gets the shortest augmenting path (Dijkstra), one row of slacks an iteration.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_finite, door, refuse
from esljax._numerics import moderating_unit
from esljax._types import Array, ArrayLike, Float, Int, Scalar

# Sweeps that may prove the identity.
_SWEEPS = 8
# On a CPU problems of up to so many columns take the least time so many side by side: with fewer,
# each operation costs more than it does, and with more, all wait longer for the slowest.
_SMALL, _TOGETHER = 64, 32
# How many times less costly than the whole a subset is when the duals of the whole are no start.
_MUCH = 64

_Pairs: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]


class Assignment(NamedTuple):
    """The cheapest pairing of n rows with as many of the m columns, and its proof."""

    columns: Int[Array, "*many n"]
    """The column of each row, shape (*many, n)."""
    cost: Float[Array, "*many"]
    """The sum of the costs of the pairs, shape (*many); NaN where some cost is not finite."""
    row_duals: Float[Array, "*many n"]
    """u, shape (*many, n), in units of the costs."""
    column_duals: Float[Array, "*many m"]
    """v, shape (*many, m), in units of the costs: u_i + v_j ≤ c_ij, with equality on the pairs, and
    v = 0 on unpaired columns, both up to rounding. Then no other pairing is cheaper."""


@door
def assignment(cost: Float[ArrayLike, "*many n m"]) -> Assignment:
    """Pair every row with a column of its own, at the least sum of costs.

    Works under `jit`, `vmap` and on every device, without callbacks. Give many problems in one
    array: on a CPU those of up to 64 columns are solved 32 side by side, and larger ones in turn.
    Under `vmap` each step waits for all of them.

    **Args:** `cost`: shape (*many, n, m) with n ≤ m, finite, of any sign and size.
    **Returns:** `Assignment`. Where one problem has n = m and the identity is a cheapest pairing,
    it is found, unless its proof takes more than 8 sweeps.
    **Raises:** `InputError` for other shapes, and for costs that are known and not finite.
    **Differentiation:** `cost` to every order, at the pairing found (envelope theorem): exact
    wherever it is unique. Pairs and duals count as constants.
    **Reference:** Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse
    linear assignment problems", Computing 38, 325 (1987); Crouse, IEEE Trans. Aerosp. Electron.
    Syst. 52, 1679 (2016).

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> solved = esl.transport.assignment(jnp.array([[4.0, 1.0, 6.0], [2.0, 0.0, 5.0]]))
        >>> solved.columns.tolist(), float(solved.cost)
        ([1, 0], 3.0)
    """
    cost = as_float(cost, "cost")
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise refuse("cost", "have shape (*many, n, m)", f"has shape {cost.shape}")
    if cost.shape[-2] > cost.shape[-1]:
        raise refuse("cost", "have no more rows than columns", f"has shape {cost.shape}")
    check_finite("cost", cost)
    return _compiled(cost)


@jax.jit
def _compiled(cost: Float[Array, "*many n m"]) -> Assignment:
    if cost.ndim == 2:
        return _of_one(cost, pairs)
    *many, n, m = cost.shape
    how, width = many_pairs(m)
    in_a_row = cost.reshape(math.prod(many), n, m)
    found = jax.lax.map(lambda c: _of_one(c, how), in_a_row, batch_size=width)
    return jax.tree.map(lambda x: x.reshape(*many, *x.shape[1:]), found)


def many_pairs(columns: int) -> tuple[_Pairs, int | None]:
    """The function that pairs each of many problems, and how many to solve side by side."""
    return (_pairs_side_by_side, _TOGETHER) if columns <= _SMALL else (pairs, None)


def _of_one(cost: Float[Array, "n m"], how: _Pairs) -> Assignment:
    fixed, unit = in_units(jax.lax.stop_gradient(cost))
    finite = solvable(fixed)
    columns, v = how(fixed, finite)
    rows = jnp.arange(len(cost))
    own = cost[rows, columns]
    poisoned = jnp.sum(own) * jnp.where(finite, 1.0, jnp.nan).astype(cost.dtype)
    return Assignment(columns, poisoned, unit * (fixed[rows, columns] - v[columns]), unit * v)


def in_units(cost: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Scalar]:
    """The costs in a unit of their own, and that unit, a power of two, which rounds nothing.

    Sums of very large or very small costs, such as duals, then are numbers: n³ times the largest
    is one up to n of a million.
    """
    unit = moderating_unit(jnp.max(jnp.abs(cost)), 2.0**60)
    return cost / unit, unit


def solvable(cost: Float[Array, "n m"]) -> Array:
    """Whether duals can be numbers, shape (): they reach n times the largest cost.

    The sum stands in for the largest cost, because XLA's vectorized maximum drops NaN on a CPU.
    """
    return jnp.isfinite(len(cost) * jnp.sum(jnp.abs(cost)))


def pairs(
    cost: Float[Array, "n m"], solvable: Array
) -> tuple[Int[Array, " n"], Float[Array, " m"]]:
    """The column of each row, and v, for use inside `jit`; -1 for rows of costs not `solvable`."""
    n, m = cost.shape
    if n < m:
        # Unpaired columns have v = 0, so their minima are no start.
        state = _greedy(cost, jnp.zeros(m, cost.dtype))
    else:
        proved, v = _proof_of_identity(cost)
        here = jnp.arange(n, dtype=jnp.int32)

        def as_they_stand(_):
            return _State(v, here, here)

        def chosen(_):
            return _greedy(cost, jnp.min(cost, axis=0))

        state = jax.lax.cond(proved, as_they_stand, chosen, None)
    state = _augmented(cost, state, jnp.full(n, solvable), jnp.ones(m, bool))
    return state.column_of, state.v


def _pairs_side_by_side(
    cost: Float[Array, "n m"], solvable: Array
) -> tuple[Int[Array, " n"], Float[Array, " m"]]:
    """The same for small problems under `vmap`, whose loops within loops would wait for the longest
    path of all: in one loop each takes two thirds of the time, and one alone a third more."""
    n, m = cost.shape
    state = _greedy(cost, jnp.min(cost, axis=0) if n == m else jnp.zeros(m, cost.dtype))
    state = _augmented_in_one_loop(cost, state, jnp.full(n, solvable))
    return state.column_of, state.v


def pairs_within(
    cost: Float[Array, "n n"],
    solvable: Array,
    solved: tuple[Int[Array, " n"], Float[Array, " n"]],
    subsets: Int[Array, "subsets k"],
) -> Int[Array, "subsets k"]:
    """The column of each kept row, when the rows and columns of one subset alone are paired.

    **Args:** `solved`: what `pairs` returned for all of them. Its duals hold for the rest, and its
    pairs but those that lost a partner: a few paths mend them. In small problems these paths grow
    side by side: as many in each subset, they wait little for each other. A subset that lost nearly
    all of the costs, which are none below 0, is solved anew: beside them its duals are rounding.
    """
    n = len(cost)
    columns, v = solved
    nowhere = jnp.full(n, -1, jnp.int32)
    nothing = _State(jnp.zeros_like(v), nowhere, nowhere)
    total = jnp.sum(cost[jnp.arange(n), columns])

    def mended(kept):
        stays = jnp.zeros(n, bool).at[kept].set(True)
        column_of = jnp.where(stays & stays[columns], columns, -1)
        place = jnp.where(column_of >= 0, column_of, n)
        row_of = jnp.full(n, -1, jnp.int32)
        row_of = row_of.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
        state = _State(v, row_of, column_of)
        state = _augmented(cost, state, stays & solvable, stays)
        rest = jnp.sum(cost[kept, state.column_of[kept]])
        state = jax.tree.map(lambda a, b: jnp.where(_MUCH * rest < total, b, a), state, nothing)
        return _augmented(cost, state, stays & solvable, stays).column_of[kept]

    return jax.lax.map(mended, subsets, batch_size=_SMALL if n <= _SMALL else None)


class _State(NamedTuple):
    """Feasible duals, and pairs without slack; -1 stands for no partner."""

    v: Float[Array, " m"]
    row_of: Int[Array, " m"]
    column_of: Int[Array, " n"]


def _proof_of_identity(cost: Float[Array, "n n"]) -> tuple[Array, Float[Array, " n"]]:
    """Whether it is found that no cycle of exchanges pays, and v that proves it."""

    def sweep(state):
        v, count, _ = state
        # Minima down the columns: a CPU takes them several columns at a time.
        lower = jnp.minimum(v, jnp.min(cost + (v - jnp.diagonal(cost))[:, None], axis=0))
        return lower, count + 1, jnp.all(lower >= v)

    start = jnp.zeros(len(cost), cost.dtype), jnp.int32(0), jnp.array(False)
    v, _, proved = jax.lax.while_loop(lambda s: (s[1] < _SWEEPS) & ~s[2], sweep, start)
    return proved, v


def _greedy(cost: Float[Array, "n m"], v: Float[Array, " m"]) -> _State:
    """Give each row in turn the first free column without slack, if there is one."""
    n, m = cost.shape
    places = jnp.arange(m, dtype=jnp.int32)

    def choose(row, partners):
        row_of, column_of = partners
        slack = cost[row] - v
        # The choice begins at the row's own place.
        turned = jnp.where(places < row, places + m, places)
        fits = (slack <= jnp.min(slack)) & (row_of < 0)
        column = jnp.min(jnp.where(fits, turned, 2 * m)) % m
        found = fits[column]
        row_of = row_of.at[jnp.where(found, column, m)].set(row, mode="drop")
        return row_of, column_of.at[row].set(jnp.where(found, column, -1))

    free = jnp.full(m, -1, jnp.int32), jnp.full(n, -1, jnp.int32)
    return _State(v, *jax.lax.fori_loop(0, n, choose, free))


def _augmented(cost: Float[Array, "n m"], state: _State, rows: Array, columns: Array) -> _State:
    """Pair every row of the mask `rows`, in columns of the mask `columns`."""
    n, m = cost.shape
    numbers, places = jnp.arange(n, dtype=jnp.int32), jnp.arange(m, dtype=jnp.int32)
    closed = jnp.where(columns, 0.0, jnp.inf).astype(cost.dtype)

    def pair(_, state):
        v, row_of, column_of = state
        waiting = rows & (column_of < 0)
        root = jnp.min(jnp.where(waiting, numbers, n - 1))
        # Side by side with others, a problem that is done goes on in vain, and must end.
        awake = jnp.any(waiting)
        # Among equals a free column ends the path.
        rank = jnp.where(row_of >= 0, places + m, places)

        def unfinished(path):
            return awake & (row_of[path.column] >= 0)

        def lengthen(path):
            row = row_of[path.column]
            reached = path.reached.at[path.column].set(jnp.inf)
            u = cost[row, path.column] - v[path.column]
            through = cost[row] - v + (path.length - u)
            better = (through < path.distance) & (reached == 0)
            distance = jnp.where(better, through, path.distance)
            column, length = _nearest(distance + reached, rank)
            return _Path(distance, jnp.where(better, row, path.before), reached, column, length)

        distance = cost[root] - v
        start = _Path(distance, jnp.full(m, root), closed, *_nearest(distance + closed, rank))
        path = jax.lax.while_loop(unfinished, lengthen, start)
        settled = (path.reached > 0) & columns
        v = v + jnp.where(settled, path.distance - path.length, 0.0)
        return _State(v, *_flipped(path, root, awake, row_of, column_of))

    count = jnp.sum(rows & (state.column_of < 0), dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, pair, state)


def _augmented_in_one_loop(cost: Float[Array, "n m"], state: _State, rows: Array) -> _State:
    """The same for all columns; each turn lengthens a path, and changes its pairs at its end."""
    n, m = cost.shape
    numbers, places = jnp.arange(n, dtype=jnp.int32), jnp.arange(m, dtype=jnp.int32)
    none, nothing = jnp.zeros(m, cost.dtype), jnp.zeros((), cost.dtype)

    def first_waiting(column_of):
        return jnp.min(jnp.where(rows & (column_of < 0), numbers, n))

    def begun(column_of):
        root = first_waiting(column_of)
        nowhere = jnp.full(m, jnp.inf, cost.dtype)
        path = _Path(nowhere, jnp.zeros(m, jnp.int32), none, jnp.int32(0), nothing)
        return path, jnp.minimum(root, n - 1), root

    def turn(carry):
        (v, row_of, column_of), path, row, root = carry
        at = column_of[row]
        costs = cost[row]
        u = jnp.where(at < 0, 0.0, costs[at] - v[at])  # nothing yet at the root
        through = costs - v + (path.length - u)
        better = (through < path.distance) & (path.reached == 0)
        distance = jnp.where(better, through, path.distance)
        before = jnp.where(better, row, path.before)
        rank = jnp.where(row_of >= 0, places + m, places)
        column, length = _nearest(distance + path.reached, rank)
        longer = _Path(
            distance, before, jnp.where(places == column, jnp.inf, path.reached), column, length
        )
        # Side by side, a problem that is done goes on in vain, and must end.
        ends = (row_of[column] < 0) & (root < n)
        settled = jnp.where(path.reached > 0, distance - length, 0.0)
        row_of_all, column_of_all = _flipped(longer, root, ends, row_of, column_of)
        kept = (longer, row_of[column], root)
        following = jax.tree.map(
            lambda new, old: jnp.where(ends, new, old), begun(column_of_all), kept
        )
        state = _State(v + jnp.where(ends, settled, 0.0), row_of_all, column_of_all)
        return state, *following

    def unfinished(carry):
        *_, root = carry
        return root < n

    return jax.lax.while_loop(unfinished, turn, (state, *begun(state.column_of)))[0]


def _nearest(distance: Float[Array, " m"], rank: Int[Array, " m"]) -> tuple[Array, Scalar]:
    """The nearest column, of equals the one of least rank, and its distance.

    Two plain reductions take a third of the time of one argmin.
    """
    least, m = jnp.min(distance), len(distance)
    return jnp.min(jnp.where(distance <= least, rank, 2 * m - 1)) % m, least


class _Path(NamedTuple):
    """The shortest paths from one row, as Dijkstra's algorithm grows them."""

    distance: Float[Array, " m"]
    """To each column, so far."""
    before: Int[Array, " m"]
    """The row before each column."""
    reached: Float[Array, " m"]
    """∞ for columns whose distance is settled, and for those that are left out."""
    column: Int[Array, ""]
    """The nearest column that is not settled."""
    length: Scalar
    """Its distance."""


def _flipped(
    path: _Path, root: Array, awake: Array, row_of: Array, column_of: Array
) -> tuple[Array, Array]:
    """The partners after the path from `root` to its last column has changed all its pairs."""

    numbers, places = (jnp.arange(len(each), dtype=jnp.int32) for each in (column_of, row_of))

    def step(state):
        column, row_of, column_of, _ = state
        row = path.before[column]
        before = column_of[row]
        # Side by side, a choice among all takes less time than a write at one place.
        row_of = jnp.where(places == column, row, row_of)
        return before, row_of, jnp.where(numbers == row, column, column_of), row == root

    start = path.column, row_of, column_of, ~awake
    return jax.lax.while_loop(lambda s: ~s[3], step, start)[1:3]
