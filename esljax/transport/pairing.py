r"""Optimal assignment in compiled loops: the cheapest pairing of the rows and columns of a matrix.

    min_π Σ_i c_i,π(i) = max_{u,v} Σ_i u_i + Σ_j v_j      such that u_i + v_j ≤ c_ij

Equality on the pairs proves a pairing. Two snapshots of one run are mostly paired as they stand,
which is proved first: duals with v_j ≤ v_i + c_ij - c_ii exist exactly if no cycle of exchanges
pays, and a few sweeps of Bellman and Ford find them. Elsewhere the minima of columns and rows give
the first duals, each row takes a free column without slack if it has one, and each row that is left
gets the shortest augmenting path (Dijkstra), one row of slacks an iteration.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_finite, door, refuse
from esljax._types import Array, ArrayLike, Float, Int, Scalar

# Sweeps that may prove the identity.
_SWEEPS = 8


class Assignment(NamedTuple):
    """The cheapest pairing of n rows with as many of the m columns, and its proof."""

    columns: Int[Array, " n"]
    """The column of each row, shape (n,)."""
    cost: Scalar
    """The sum of the costs of the pairs, shape (); NaN where some cost is not finite."""
    row_duals: Float[Array, " n"]
    """u, shape (n,), in units of the costs."""
    column_duals: Float[Array, " m"]
    """v, shape (m,), in units of the costs: u_i + v_j ≤ c_ij, with equality on the pairs, and v = 0
    on unpaired columns, both up to rounding. Then no other pairing is cheaper."""


@door
def assignment(cost: Float[ArrayLike, "n m"]) -> Assignment:
    """Pair every row with a column of its own, at the least sum of costs.

    Works under `jit`, `vmap` and on every device, without callbacks. On a CPU many problems are
    faster one after the other (`jax.lax.map`) than side by side (`vmap`), where each step waits for
    all of them.

    **Args:** `cost`: shape (n, m) with n ≤ m, finite, of any sign.
    **Returns:** `Assignment`. Where n = m and the identity is a cheapest pairing, it is found,
    unless its proof takes more than 8 sweeps.
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
    if cost.ndim != 2 or 0 in cost.shape:
        raise refuse("cost", "have shape (n, m)", f"has shape {cost.shape}")
    if cost.shape[0] > cost.shape[1]:
        raise refuse("cost", "have no more rows than columns", f"has shape {cost.shape}")
    check_finite("cost", cost)
    return _compiled(cost)


@jax.jit
def _compiled(cost: Float[Array, "n m"]) -> Assignment:
    fixed = jax.lax.stop_gradient(cost)
    finite = solvable(fixed)
    columns, v = pairs(fixed, finite)
    rows = jnp.arange(len(cost))
    own = cost[rows, columns]
    poisoned = jnp.sum(own) * jnp.where(finite, 1.0, jnp.nan).astype(cost.dtype)
    return Assignment(columns, poisoned, fixed[rows, columns] - v[columns], v)


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


def pairs_within(
    cost: Float[Array, "n n"],
    solvable: Array,
    solved: tuple[Int[Array, " n"], Float[Array, " n"]],
    kept: Int[Array, " k"],
) -> Int[Array, " k"]:
    """The column of each kept row, when the rows and columns `kept` alone are paired.

    **Args:** `solved`: what `pairs` returned for all of them. Its duals hold for the rest, and its
    pairs but those that lost a partner: a few paths mend them.
    """
    n = len(cost)
    columns, v = solved
    stays = jnp.zeros(n, bool).at[kept].set(True)
    column_of = jnp.where(stays & stays[columns], columns, -1)
    place = jnp.where(column_of >= 0, column_of, n)
    row_of = jnp.full(n, -1, jnp.int32).at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    state = _State(v, row_of, column_of)
    return _augmented(cost, state, stays & solvable, stays).column_of[kept]


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

        def nearest(distance):
            least = jnp.min(distance)
            # Two plain reductions take a third of the time of one argmin.
            return jnp.min(jnp.where(distance <= least, rank, 2 * m - 1)) % m, least

        def unfinished(path):
            return awake & (row_of[path.column] >= 0)

        def lengthen(path):
            row = row_of[path.column]
            reached = path.reached.at[path.column].set(jnp.inf)
            u = cost[row, path.column] - v[path.column]
            through = cost[row] - v + (path.length - u)
            better = (through < path.distance) & (reached == 0)
            distance = jnp.where(better, through, path.distance)
            column, length = nearest(distance + reached)
            return _Path(distance, jnp.where(better, row, path.before), reached, column, length)

        distance = cost[root] - v
        start = _Path(distance, jnp.full(m, root), closed, *nearest(distance + closed))
        path = jax.lax.while_loop(unfinished, lengthen, start)
        settled = (path.reached > 0) & columns
        v = v + jnp.where(settled, path.distance - path.length, 0.0)
        return _State(v, *_flipped(path, root, awake, row_of, column_of))

    count = jnp.sum(rows & (state.column_of < 0), dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, pair, state)


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

    def step(state):
        column, row_of, column_of, _ = state
        row = path.before[column]
        before = column_of[row]
        return before, row_of.at[column].set(row), column_of.at[row].set(column), row == root

    start = path.column, row_of, column_of, ~awake
    return jax.lax.while_loop(lambda s: ~s[3], step, start)[1:3]
