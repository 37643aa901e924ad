r"""The chain of transport distances between snapshots, the estimate of Σ, L² and W2² that obeys the speed limit on samples.

    dist_j = dist(q_j, q_{j+1}),   j = 0, ..., J-1
    Σ  = Σ_j dist_j²/Δs_j  ≥  L² = (Σ_j dist_j)²  ≥  W2² = dist²(q_0, q_J)

For any true metric on laws both inequalities hold exactly, for every number of members and dimensions: the first is Cauchy-Schwarz, the
second the triangle inequality.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._types import Array, Float
from esljax.measures.diagnosis import Evidence
from esljax.measures.report import SpeedLimit
from esljax.sharding import map_pairs, replicate
from esljax.simulation import Trajectory
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    MappedTransport,
    ProjectedTransport,
    SinkhornTransport,
    coordinates,
)

_CHAIN = (
    "A chain bounds the entropy production of its laws from below (coarse snapshots and housekeeping are invisible); "
    "sampling noise pushes it up."
)
_RECORDED = "So does any noise of the steps, which was not recorded."


class Distances(eqx.Module):
    """The squared distances of a chain, each perhaps on a leading axis of subsets of the members."""

    links: Float[Array, "*subsets J"]
    whole: Float[Array, "*subsets"]
    coarse: Float[Array, "*subsets half"] | None
    """Between every second snapshot, if their number allows it."""
    converged: Array
    debiased_links: Float[Array, "*subsets J"] | None = None
    debiased_whole: Float[Array, "*subsets"] | None = None


def distances(
    trajectory: Trajectory,
    transport: AbstractTransport,
    *,
    debias: bool,
    subsets: Array | None = None,
) -> Distances:
    """Solve the transport problems of one run; of some of its members (subsets, m) too if `subsets` lists them. Not checked.

    Debiased are W(x, y') - ½ W(x, x') - ½ W(y, y'), where x, y are one half of the members and x', y' the other: all three are then
    distances of independent samples of one size, and their bias cancels to leading order.
    """
    links = trajectory.positions.shape[0] - 1
    pairs, coarse = compared(links)

    def solve(way, pairs):
        def of_pair(shared, x, y):
            transport, subsets = shared
            if subsets is None:
                return way(transport, x, y)
            return jax.lax.map(lambda kept: way(transport, x[kept], y[kept]), subsets)

        first, second = np.array(pairs).T
        positions, mesh = trajectory.positions, trajectory.mesh
        found = map_pairs(
            of_pair, (transport, subsets), positions, first, second, mesh, in_turn=transport.in_turn
        )
        return found if subsets is None else jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), found)

    plain = solve(lambda transport, x, y: transport.solve(x, y), pairs + coarse)
    found = Distances(
        links=plain.squared[..., :links],
        whole=plain.squared[..., links],
        coarse=plain.squared[..., links + 1 :] if coarse else None,
        converged=jnp.all(plain.converged, axis=-1),
    )
    if not debias:
        return found
    across = solve(_across, pairs)
    within = solve(_within, [(j, j) for j in range(links + 1)])
    first, second = np.array(pairs).T
    squares = across - within[..., first] / 2 - within[..., second] / 2
    return dataclasses.replace(
        found, debiased_links=squares[..., :links], debiased_whole=squares[..., links]
    )


def _halves(x: Array) -> tuple[Array, Array]:
    members = len(x) // 2 * 2
    return x[0:members:2], x[1:members:2]


def _across(transport: AbstractTransport, x: Array, y: Array) -> Array:
    (one, other), (first, second) = _halves(x), _halves(y)
    return (transport.solve(one, second).squared + transport.solve(other, first).squared) / 2


def _within(transport: AbstractTransport, x: Array, _: Array) -> Array:
    return transport.solve(*_halves(x)).squared


def chain(trajectory: Trajectory, transport: AbstractTransport, solved: Distances) -> SpeedLimit:
    """The report of one run by its chain. Not checked: for use inside `jit`."""
    positions, times = trajectory.positions, trajectory.times
    links = positions.shape[0] - 1
    squares = solved.links

    elapsed = jnp.diff(times)
    lengths = safe_sqrt(squares)
    dissipation = learning_time = noise_floor = None
    if trajectory.rates is not None and trajectory.temperatures is not None:
        learning_times = jnp.sum(trajectory.rates.reshape(links, -1), axis=1)
        moved = learning_times > 0
        dissipation = jnp.sum(jnp.where(moved, squares / jnp.where(moved, learning_times, 1), 0))
        learning_time = jnp.sum(learning_times)
        if isinstance(transport, ExactTransport) and not trajectory.observed:
            heat = jnp.sum((trajectory.temperatures * trajectory.rates).reshape(links, -1), axis=1)
            noise_floor = jnp.sum(2 * positions.shape[2] * heat / elapsed)
    paired = jnp.mean(jnp.sum((positions[1:] - positions[:-1]) ** 2, axis=2), axis=1)
    return SpeedLimit(
        entropy_production=jnp.sum(squares / elapsed),
        length_squared=jnp.sum(lengths) ** 2,
        w2_squared=solved.whole,
        housekeeping=jnp.zeros_like(solved.whole),
        dissipation=dissipation,
        learning_time=learning_time,
        times=(times[1:] + times[:-1]) / 2,
        speed=lengths / elapsed,
        converged=solved.converged,
        entropy_production_coarse=None
        if solved.coarse is None
        else jnp.sum(solved.coarse / (elapsed[::2] + elapsed[1::2])),
        debiased_entropy_production=None
        if solved.debiased_links is None
        else jnp.sum(solved.debiased_links / elapsed),
        debiased_w2_squared=solved.debiased_whole,
        noise_floor=noise_floor,
        # The identity is the best assignment if no other is cheaper than rounding allows.
        identity_fraction=jnp.mean(squares >= paired * (1 - 1e-5), dtype=paired.dtype)
        if isinstance(transport, ExactTransport)
        else None,
        evidence=_evidence(trajectory, transport),
        source=f"a chain of {links} links in {_named(transport)}",
        worth=_CHAIN if trajectory.rates is not None else f"{_CHAIN} {_RECORDED}",
        is_bound=transport.is_metric,
    )


def compared(links: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The snapshots between which there are distances: of each link and of the whole run; and of links twice as long, if they fit."""
    return [(j, j + 1) for j in range(links)] + [(0, links)], [
        (j, j + 2) for j in range(0, links, 2)
    ] if links % 2 == 0 else []


def _evidence(trajectory: Trajectory, transport: AbstractTransport) -> Evidence:
    positions = jax.lax.stop_gradient(trajectory.positions)
    doubled = _doubled_epsilon(transport)
    compared = jax.eval_shape(lambda x: coordinates(transport, x)[0], positions)
    return Evidence(
        distances=jnp.linalg.norm(positions - jnp.mean(positions[0], axis=0), axis=-1),
        energies=None if trajectory.energies is None else jnp.mean(trajectory.energies, axis=-1),
        temperature=None if trajectory.temperatures is None else jnp.max(trajectory.temperatures),
        # What looks at whole snapshots must not wait for other devices in each of its iterations.
        doubled_epsilon=None
        if doubled is None
        else doubled.solve(*replicate((positions[0], positions[-1]), trajectory.mesh)).squared,
        coordinates=compared.shape[-1],
        steps=None if trajectory.rates is None else trajectory.rates.shape[0],
    )


def _doubled_epsilon(transport: AbstractTransport) -> AbstractTransport | None:
    if isinstance(transport, SinkhornTransport):
        return eqx.tree_at(lambda t: t.epsilon, transport, 2 * transport.epsilon)
    if isinstance(transport, MappedTransport | ProjectedTransport):
        inner = _doubled_epsilon(transport.transport)
        return None if inner is None else eqx.tree_at(lambda t: t.transport, transport, inner)
    return None


def _named(transport: AbstractTransport) -> str:
    name = type(transport).__name__
    return (
        f"{name} {_named(transport.transport)}"
        if isinstance(transport, MappedTransport | ProjectedTransport)
        else name
    )


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The root of what should not be negative, with slope 0 where it vanishes."""
    # Rounding can bring a Sinkhorn divergence below 0; only the length takes that for 0, and NaN stays NaN.
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))
