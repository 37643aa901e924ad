r"""Σ and D from velocities at snapshots, integrated on the clock of learning time.

In learning time u = ∫η ds the velocity is v = η g, and the rate g² = E‖g‖² changes as smoothly as
the law does, whatever the schedule:

    Σ = K Σ_k η_k² g²(u_k + η_k/2),     D = ∫ g² du,     L = ∫ g du,

with g² interpolated linearly between snapshots. A run without a law (recorded, or of a rule that
claims none) has no such clock: its clock is training time and η = 1, so that Σ is the trapezoidal
sum over its snapshots, and neither D nor U is known. Source: Okanohara, arXiv 2601.17607.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import product, safe_divide, safe_root
from esljax._types import Array, Float
from esljax.measures.report import SpeedLimit
from esljax.sharding import AnyMesh, replicate
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport
from esljax.velocity import AbstractVelocity, Snapshot

_VELOCITY = {
    "lower": "Σ is a lower bound in expectation: its class of fields cannot follow all of the "
    "velocity.",
    "upper": "Σ is the action of the members' own paths, never below W2² of the same members; "
    "noise in the steps would swamp it.",
    "none": "Σ is an approximation that may lie on either side.",
}


class MemberRates(eqx.Module):
    """The share of each member in g² = E‖g‖² at each snapshot, per squared unit of learning time.

    Where `between`, a row belongs to a link instead of a snapshot.
    """

    whole: Float[Array, "snapshots n"]
    """Numbers whose mean over the members is g²."""
    gradient: Float[Array, "snapshots n"] | None
    """The same for E‖∇ψ‖², the part of the velocity that moves mass; None if it is not known."""
    divergence: Float[Array, "snapshots n"] | None
    """∇·v per unit of learning time; None if the estimator does not know it."""
    between: bool = eqx.field(static=True)
    """Whether there is one row for each link instead of each snapshot."""
    bound: str = eqx.field(static=True)
    """The side on which g² errs, as in `Velocity.bound`."""
    name: str = eqx.field(static=True)
    """The class of the estimator."""

    def members(self, kept: Array) -> "MemberRates":
        """The rates of these members alone."""
        return jax.tree.map(lambda x: x[:, kept], self)


class _Moment(NamedTuple):
    """The ensemble at one snapshot, or on one link, and its neighbors in time; stacked, at all of
    them."""

    members: Array
    """The members themselves, which the potential acts on."""
    s: Array
    temperature: Any
    """T, shape (); None without a law."""
    positions: Array
    """The members in the coordinates of the transport, as are `before` and `after`."""
    before: Array
    after: Array
    elapsed: Array
    """The learning time between `before` and `after`."""


def member_rates(
    trajectory: Trajectory, transport: AbstractTransport, velocity: AbstractVelocity, potential: Any
) -> MemberRates:
    """Estimate the velocity at every snapshot of one run, in the coordinates of the transport."""
    positions, matrix = transport.coordinates(trajectory.positions), transport.projection
    matrix = None if matrix is None else matrix.astype(positions.dtype)
    snapshot_of = (
        functools.partial(_driven, potential=potential, matrix=matrix)
        if velocity.needs_drift
        else functools.partial(_in_time, mesh=trajectory.mesh)
    )

    def at_moment(state: Any, moment: _Moment) -> Any:
        estimate, state = velocity.checked_estimate(snapshot_of(moment), state)
        return state, estimate

    moments = _moments(trajectory, positions, velocity.between)
    _, estimates = jax.lax.scan(at_moment, velocity.init(positions[0]), moments)
    return MemberRates(
        whole=estimates.contributions,
        gradient=estimates.gradient_contributions,
        divergence=estimates.divergence,
        between=velocity.between,
        bound=estimates.bound,
        name=type(velocity).__name__,
    )


def _moments(trajectory: Trajectory, positions: Array, between: bool) -> _Moment:
    """All snapshots with their neighbors in time, or all links with their ends, stacked."""
    links = positions.shape[0] - 1
    clock = learning_clock(trajectory)
    per_link = (clock.shape[0] - 1) // links
    clock = clock[::per_link]
    at = np.arange(links if between else links + 1)
    earlier = at if between else np.maximum(at - 1, 0)
    later = np.minimum(at + 1, links)
    # The step that starts at the snapshot; at the end of the run the last step.
    step = np.minimum(at * per_link, links * per_link - 1)
    law = trajectory.law
    return _Moment(
        members=trajectory.positions[at],
        s=trajectory.times[at],
        temperature=None if law is None else law.temperature[step],
        positions=positions[at],
        before=positions[earlier],
        after=positions[later],
        elapsed=clock[later] - clock[earlier],
    )


def _driven(moment: _Moment, potential: Any, matrix: Array | None) -> Snapshot:
    """A snapshot with its drift -∇Φ and its diffusion T in learning time, projected if need be."""
    acting = potential.at(moment.s)
    drift = -jax.vmap(lambda member: acting.energy_and_gradient(member)[1])(moment.members)
    diffusion = moment.temperature
    if matrix is not None:
        drift, diffusion = product(drift, matrix), diffusion * product(matrix.T, matrix)
    return Snapshot(moment.positions, drift, diffusion, moment.before, moment.after, moment.elapsed)


def _in_time(moment: _Moment, mesh: AnyMesh | None) -> Snapshot:
    """A snapshot with its neighbors in time, whole on every device.

    An estimator that compares whole snapshots must not wait for other devices in each of its
    iterations. One snapshot fits on every device; the whole history need not.
    """
    positions, before, after = replicate((moment.positions, moment.before, moment.after), mesh)
    return Snapshot(positions, None, None, before, after, moment.elapsed)


def learning_clock(trajectory: Trajectory) -> Float[Array, " ticks"]:
    """The learning time u_k = Σ_{i<k} η_i of every step of one run; without a law the training
    times of its snapshots."""
    law = trajectory.law
    if law is None:
        return trajectory.times
    return jnp.concatenate([jnp.zeros_like(law.mobility[:1]), jnp.cumsum(law.mobility)])


def from_velocities(trajectory: Trajectory, chain: SpeedLimit, rates: MemberRates) -> SpeedLimit:
    """The report of the chain with its Σ, L and D replaced by those from velocities."""
    links = trajectory.positions.shape[0] - 1
    action, time = _weights(trajectory, rates.between)
    whole = jnp.mean(rates.whole, axis=1)
    moving = whole if rates.gradient is None else jnp.mean(rates.gradient, axis=1)
    speed = safe_root(moving)
    along = spans(trajectory) * (speed if rates.between else (speed[1:] + speed[:-1]) / 2)
    return dataclasses.replace(
        chain,
        entropy_production=jnp.sum(action * whole),
        entropy_production_chain=chain.entropy_production,
        housekeeping=jnp.sum(action * (whole - moving)),
        length_squared=jnp.sum(along) ** 2,
        dissipation=None if trajectory.law is None else jnp.sum(time * whole),
        speed=along / jnp.diff(trajectory.times),
        source=f"{rates.name} at {links + 1} snapshots; W2² and {chain.source} in the same "
        "coordinates",
        bound=rates.bound,
        worth=_VELOCITY[rates.bound],
    )


def spans(trajectory: Trajectory) -> Float[Array, " J"]:
    """The learning time of each link; without a law its training time."""
    clock, links = learning_clock(trajectory), trajectory.positions.shape[0] - 1
    return jnp.diff(clock[:: (clock.shape[0] - 1) // links])


def _weights(trajectory: Trajectory, between: bool) -> tuple[Array, Array]:
    """The weights of g² at each snapshot (or on each link) in Σ and in D."""
    clock = learning_clock(trajectory)
    steps, links = clock.shape[0] - 1, trajectory.positions.shape[0] - 1
    learning_times = spans(trajectory)
    if between:
        return learning_times**2 / jnp.diff(trajectory.times), learning_times
    law = trajectory.law
    eta = (jnp.diff(clock) if law is None else law.mobility).reshape(links, -1)
    # Steps per unit of training time; without a law each link is one step, of any length.
    pace = steps if law is not None else 1 / jnp.diff(trajectory.times)
    # Where in learning time the middle of each step lies between its two snapshots.
    middle = clock[:-1].reshape(links, -1) + eta / 2 - clock[: -1 : steps // links, None]
    where = middle * safe_divide(jnp.ones_like(learning_times), learning_times)[:, None]
    left = pace * jnp.sum(eta**2 * (1 - where), axis=1)
    right = pace * jnp.sum(eta**2 * where, axis=1)
    return _spread(left, right), _spread(learning_times / 2, learning_times / 2)


def _spread(left: Float[Array, " J"], right: Float[Array, " J"]) -> Float[Array, " snapshots"]:
    """The weights of links at their left and right ends, summed at the snapshots."""
    zero = jnp.zeros(1, left.dtype)
    return jnp.concatenate([left, zero]) + jnp.concatenate([zero, right])
