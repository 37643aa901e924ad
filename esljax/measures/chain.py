r"""The chain of transport distances between snapshots: Σ, L² and W2² that obey the speed limit.

    dist_j = dist(q_j, q_{j+1}),   j = 0, ..., J-1
    Σ  = Σ_j dist_j²/Δs_j  ≥  L² = (Σ_j dist_j)²  ≥  W2² = dist²(q_0, q_J)

For any true metric on laws both inequalities hold on samples exactly, for every number of members
and dimensions: the first is Cauchy-Schwarz, the second the triangle inequality.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import safe_divide, safe_root
from esljax._types import Array, Float, Scalar
from esljax.measures.evidence import evidence_of
from esljax.measures.report import SpeedLimit
from esljax.sharding import AnyMesh, map_pairs, replicate
from esljax.simulation import Trajectory
from esljax.transport import (
    AbstractTransport,
    pairing_of,
    part_solutions_of,
    solution_of,
    subset_solutions_of,
)

# Rounds for the pairs of one kind: often enough to watch, and few programs to start.
_ROUNDS = range(8, 13)

_CHAIN = (
    "A chain of laws is a lower bound of Σ (coarse snapshots and circulation are invisible); a "
    "chain of samples is neither bound until it is debiased, because sampling noise adds to every "
    "link."
)
_RECORDED = "So does any noise of the steps, which was not recorded."
_UNKNOWN = "So does any noise of the steps, which the rule does not state."


class Distances(eqx.Module):
    """The squared distances of a chain, in units of θ².

    Distances of subsets of the members lie on a leading axis.
    """

    links: Float[Array, "*subsets J"]
    """Between neighboring snapshots, shape (J,)."""
    whole: Float[Array, "*subsets"]
    """Between the first snapshot and the last, shape ()."""
    coarse: Float[Array, "*subsets half"] | None
    """Between every second snapshot, shape (J/2,); None if J is odd."""
    converged: Array
    """Whether all these problems were solved, a boolean of shape ()."""
    debiased_links: Float[Array, "*subsets J"] | None = None
    """As `links`, without the sampling bias; None unless debiased."""
    debiased_whole: Float[Array, "*subsets"] | None = None
    """As `whole`, without the sampling bias; None unless debiased."""
    parts: Float[Array, "pairs d"] | None = None
    """The parts of the coordinates in the mean squared displacement of each link, and last from the
    first snapshot to the last: of the pairs of members that the transport found, else of the
    members themselves. None for subsets, and where the parameters have no names."""


@dataclasses.dataclass
class Rounds:
    """Solves the pairs of snapshots a few at a time from the host, which can tell in between.

    **Args:** `progress`: called with the transport problems solved so far, and those in all.
    `total`: those in all; a pair has one for each subset of the members.
    """

    progress: Callable[[int, int], None]
    total: int
    done: int = 0

    def of_pairs(
        self,
        function: Callable[[AbstractTransport, Array, Array], Any],
        trajectory: Trajectory,
        transport: AbstractTransport,
        pairs: Sequence[tuple[int, int]],
        subsets: Array | None,
    ) -> Any:
        """Return what `of_pairs` does, up to rounding."""
        # All rounds are of one size, so that one program is compiled; where that does not come out
        # even, some pairs at the end are solved twice.
        devices = 1 if trajectory.mesh is None else trajectory.mesh.size
        size = devices * _size_of_rounds(-(-len(pairs) // devices))
        each = 1 if subsets is None else len(subsets)
        ends, solved = np.array(pairs), []
        for start in range(0, len(pairs), size):
            first, second = ends[np.minimum(np.arange(start, start + size), len(pairs) - 1)].T
            some = _round(function, trajectory, transport, first, second, subsets)
            solved.append(jax.block_until_ready(some))
            self.done += each * min(size, len(pairs) - start)
            self.progress(self.done, self.total)
        axis = 0 if subsets is None else 1

        def joined(*parts: Array) -> Array:
            return jnp.take(jnp.concatenate(parts, axis), jnp.arange(len(pairs)), axis)

        return jax.tree.map(joined, *solved)


def _size_of_rounds(count: int) -> int:
    """Return the size of some eight to twelve equal rounds with the fewest in excess."""
    return min((-(-count // rounds) for rounds in _ROUNDS), key=lambda size: -count % size)


@eqx.filter_jit
def _round(
    function: Callable[[AbstractTransport, Array, Array], Any],
    trajectory: Trajectory,
    transport: AbstractTransport,
    first: Any,
    second: Any,
    subsets: Array | None,
) -> Any:
    positions = trajectory.positions
    ends = jnp.concatenate([positions[jnp.asarray(first)], positions[jnp.asarray(second)]])
    pairs = [(k, len(first) + k) for k in range(len(first))]
    return _of_ends(function, ends, trajectory.mesh, transport, pairs, subsets)


def distances(
    trajectory: Trajectory,
    transport: AbstractTransport,
    *,
    halves: bool,
    subsets: Array | None = None,
    rounds: Rounds | None = None,
) -> Distances:
    """Solve the transport problems of one run, or of each of the `subsets` (subsets, m) of members.

    With `halves` there are also debiased distances W(x, y') - ½ W(x, x') - ½ W(y, y'), where x, y
    are one half of the members and x', y' the other. All three are distances of independent samples
    of one size, so their bias cancels to leading order. Distances between moments need no halves:
    a jackknife removes their bias and adds hardly any noise. With `subsets` as well, each must hold
    neighbors of the two halves together, as the groups of a jackknife of unit 2 do. The run is not
    checked. With `rounds`, outside of `jit`, pairs are solved a few at a time.
    """
    solve = of_pairs if rounds is None else rounds.of_pairs
    links = trajectory.positions.shape[0] - 1
    pairs, coarse = compared(links)
    parts = None
    if subsets is None and trajectory.keys is not None:
        plain, parts = solve(_by_coordinate, trajectory, transport, pairs + coarse, None)
        parts = parts[: links + 1]
    else:
        plain = solve(solution_of, trajectory, transport, pairs + coarse, subsets)
    solved = Distances(
        parts=parts,
        links=plain.squared[..., :links],
        whole=plain.squared[..., links],
        coarse=plain.squared[..., links + 1 :] if coarse else None,
        converged=jnp.all(plain.converged, axis=-1),
    )
    if not halves:
        return solved
    across = solve(_across, trajectory, transport, pairs, subsets)
    same = [(j, j) for j in range(links + 1)]
    within = solve(_within, trajectory, transport, same, subsets)
    first, second = np.array(pairs).T
    squares = across - within[..., first] / 2 - within[..., second] / 2
    return dataclasses.replace(
        solved, debiased_links=squares[..., :links], debiased_whole=squares[..., links]
    )


def problems(links: int, subsets: int, halves: bool) -> int:
    """Return how many problems `distances` solves for so many subsets of the members: a pair of
    snapshots is one, of any function."""
    pairs, coarse = compared(links)
    return subsets * (len(pairs + coarse) + halves * (len(pairs) + links + 1))


def of_pairs(
    function: Callable[[AbstractTransport, Array, Array], Any],
    trajectory: Trajectory,
    transport: AbstractTransport,
    pairs: Sequence[tuple[int, int]],
    subsets: Array | None,
) -> Any:
    """Return `function(transport, x, y)` for every pair of snapshots, stacked.

    With subsets (subsets, m) of the members, return it for each of them, on a leading axis.
    """
    positions, mesh = trajectory.positions, trajectory.mesh
    return _of_ends(function, positions, mesh, transport, pairs, subsets)


def _of_ends(
    function: Callable[[AbstractTransport, Array, Array], Any],
    positions: Array,
    mesh: AnyMesh | None,
    transport: AbstractTransport,
    pairs: Sequence[tuple[int, int]],
    subsets: Array | None,
) -> Any:
    def of_pair(shared, x, y):
        transport, subsets = shared
        together = _in_parts(function, transport, x, y, subsets)
        if together is not None:
            return together
        if subsets is None:
            return function(transport, x, y)
        of_subsets = _OF_SUBSETS.get(function)
        if of_subsets is not None:
            return of_subsets(transport, x, y, subsets)
        return jax.lax.map(lambda kept: function(transport, x[kept], y[kept]), subsets)

    # Members leave where two whole snapshots already lie together: elsewhere the history would be
    # gathered for each group.
    first, second = np.array(pairs).T
    shared = transport, subsets
    solved = map_pairs(of_pair, shared, positions, first, second, mesh, in_turn=transport.in_turn)
    # A few numbers, from here on whole on each device: sums and differences of numbers that lie
    # apart would each wait for all devices.
    solved = replicate(solved, mesh)
    return solved if subsets is None else jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), solved)


def _by_coordinate(transport: AbstractTransport, x: Array, y: Array) -> tuple[Any, Array]:
    """The distance, and the mean squared displacement in each coordinate, shape (d,)."""
    solved, places = pairing_of(transport, x, y)
    x, y = jax.lax.stop_gradient((x, y))
    compared = y if places is None else transport.partners(x, y, places)
    return solved, jnp.mean((compared - x) ** 2, axis=0)


def _halves(x: Array) -> tuple[Array, Array]:
    members = len(x) // 2 * 2
    return x[0:members:2], x[1:members:2]


def _across(transport: AbstractTransport, x: Array, y: Array) -> Array:
    (one, other), (first, second) = _halves(x), _halves(y)
    there, back = solution_of(transport, one, second), solution_of(transport, other, first)
    return (there.squared + back.squared) / 2


def _within(transport: AbstractTransport, x: Array, _: Array) -> Array:
    return solution_of(transport, *_halves(x)).squared


def _across_subsets(transport: AbstractTransport, x: Array, y: Array, subsets: Array) -> Array:
    (one, other), (first, second) = _halves(x), _halves(y)
    kept = _of_half(subsets)
    there = subset_solutions_of(transport, one, second, kept)
    back = subset_solutions_of(transport, other, first, kept)
    return (there.squared + back.squared) / 2


def _within_subsets(transport: AbstractTransport, x: Array, _: Array, subsets: Array) -> Array:
    return subset_solutions_of(transport, *_halves(x), _of_half(subsets)).squared


def _of_half(subsets: Array) -> Array:
    """The members of each subset by their places in either half.

    Groups hold neighbors in pairs, so that what is left of the halves is the halves of what is
    left, and both lack the same places.
    """
    return subsets[:, : subsets.shape[1] // 2 * 2 : 2] // 2


# What solves the problems of subsets together: those of all members help with them.
_OF_SUBSETS = {
    solution_of: subset_solutions_of,
    _across: _across_subsets,
    _within: _within_subsets,
}


# Which half of x meets which half of y.
_PARTS = {_across: ((0, 1), (1, 0)), _within: ((0, 1),)}


def _in_parts(
    function: Any, transport: AbstractTransport, x: Array, y: Array, subsets: Array | None
) -> Array | None:
    """The same from parts of one problem, for a transport that shares work between them.

    None for any other transport or function.
    """
    if function not in _PARTS:
        return None
    kept = jnp.arange(len(x))[None] if subsets is None else subsets
    halves = tuple(jax.vmap(lambda one: jnp.stack(_halves(one)))(kept).swapaxes(0, 1))
    rows, columns = (
        jnp.concatenate([halves[ends[side]] for ends in _PARTS[function]]) for side in (0, 1)
    )
    solved = part_solutions_of(transport, x, y, rows, columns)
    if solved is None:
        return None
    squared = jnp.mean(solved.squared.reshape(-1, len(kept)), axis=0)
    return squared[0] if subsets is None else squared


def chain(
    trajectory: Trajectory,
    transport: AbstractTransport,
    solved: Distances,
    *,
    given: Trajectory | None = None,
    size: Scalar | float = 1.0,
) -> SpeedLimit:
    """Return the report of one run by its chain. Not checked: for use inside `jit`.

    **Args:** `given`: the run itself, if `trajectory` is in units of `size`; so is the report.
    """
    positions, times = trajectory.positions, trajectory.times
    links = positions.shape[0] - 1
    squares = solved.links

    elapsed = jnp.diff(times)
    # Rounding can bring a Sinkhorn divergence below 0; only the length counts that as 0.
    lengths = safe_root(squares)
    learning_times: Any = None
    dissipation = learning_time = mobility = None
    law = trajectory.law
    if law is not None:
        learning_times = jnp.sum(law.mobility.reshape(links, -1), axis=1)
        dissipation = jnp.sum(safe_divide(squares, learning_times))
        learning_time = jnp.sum(learning_times)
        mobility = learning_times / elapsed
    return SpeedLimit(
        entropy_production=jnp.sum(squares / elapsed),
        length_squared=jnp.sum(lengths) ** 2,
        w2_squared=solved.whole,
        housekeeping=None,
        circulation="invisible",
        dissipation=dissipation,
        learning_time=learning_time,
        times=(times[1:] + times[:-1]) / 2,
        speed=lengths / elapsed,
        converged=solved.converged,
        elapsed=elapsed,
        mobility=mobility,
        entropy_production_coarse=None
        if solved.coarse is None
        else jnp.sum(solved.coarse / (elapsed[::2] + elapsed[1::2])),
        debiased_entropy_production=None
        if solved.debiased_links is None
        else jnp.sum(solved.debiased_links / elapsed),
        debiased_dissipation=None
        if solved.debiased_links is None or law is None
        else jnp.sum(safe_divide(solved.debiased_links, learning_times)),
        debiased_length_squared=None
        if solved.debiased_links is None
        else jnp.sum(safe_root(solved.debiased_links)) ** 2,
        debiased_w2_squared=solved.debiased_whole,
        noise_floor=_noise_floor(trajectory, transport, size),
        identity_fraction=_identity_fraction(trajectory, transport, squares),
        evidence=evidence_of(trajectory, transport, given=given, size=size, parts=solved.parts),
        source=f"a chain of {links} links in {transport.name}",
        worth=_CHAIN if law is not None else f"{_CHAIN} {_noise_of(trajectory)}",
        is_bound=transport.is_metric,
    )


def _noise_of(trajectory: Trajectory) -> str:
    """Return a sentence on the noise of steps whose law is not known."""
    return _RECORDED if trajectory.rates is None else _UNKNOWN


def compared(links: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the pairs of snapshots that a chain compares.

    First those of each link and of the whole run; then those of links twice as long, if they fit.
    """
    coarse = [(j, j + 2) for j in range(0, links, 2)] if links % 2 == 0 else []
    return [(j, j + 1) for j in range(links)] + [(0, links)], coarse


def _noise_floor(
    trajectory: Trajectory, transport: AbstractTransport, unit: Scalar | float
) -> Scalar | None:
    """Return the share of injected noise in Σ where each member is its own best partner.

    2 tr(MᵀM) Σ_j Σ_{k∈j} T_k η_k/Δs_j, with M the projection: tr(MᵀM) = d without one. T is that of
    the noise that members receive, 0 for those that follow the probability flow.
    """
    law = trajectory.law
    if law is None or trajectory.observed:
        return None
    if not (transport.pairs_members and transport.linear):
        return None
    snapshots, _, d = trajectory.positions.shape
    matrix = transport.projection
    size = d if matrix is None else jnp.sum(matrix.astype(trajectory.positions.dtype) ** 2)
    heat = jnp.sum((law.injected * law.mobility).reshape(snapshots - 1, -1), axis=1)
    return jnp.sum(2 * size * (heat / unit / unit) / jnp.diff(trajectory.times))


def _identity_fraction(
    trajectory: Trajectory, transport: AbstractTransport, squares: Float[Array, " J"]
) -> Scalar | None:
    """Return the share of links for which pairing each member with itself was optimal."""
    if not transport.pairs_members:
        return None
    compared = transport.coordinates(trajectory.positions)
    paired = jnp.mean(jnp.sum((compared[1:] - compared[:-1]) ** 2, axis=2), axis=1)
    # The identity is the best assignment if no other is cheaper than rounding allows.
    return jnp.mean(squares >= paired * (1 - 1e-5), dtype=paired.dtype)
