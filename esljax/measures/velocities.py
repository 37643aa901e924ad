r"""Σ and D from velocities at snapshots, integrated on the clock of learning time.

In learning time u = ∫η ds the velocity is v = η g, and the rate g² = E‖g‖² changes as smoothly as
the law does, whatever the schedule:

    Σ = K Σ_k η_k² g²(u_k + η_k/2),     D = ∫ g² du,     L = ∫ g du,

with g² interpolated linearly between snapshots, then extrapolated from that and the same sum over
every second snapshot (Richardson; Simpson's rule for even spacing). A run without a law (recorded,
or of a rule that claims none) has no such clock: its clock is training time and η = 1, so that Σ is
the trapezoidal sum over its snapshots, and neither D nor U is known. Source: Okanohara, arXiv
2601.17607.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import product, safe_divide, safe_root
from esljax._types import Array, Float, Scalar
from esljax.measures.report import SpeedLimit
from esljax.sharding import AnyMesh, replicate
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport
from esljax.velocity import AbstractVelocity, Snapshot

_VELOCITY = {
    "lower": "Σ is that of the best field of its class, in expectation: what the class cannot "
    "follow of the velocity is missing.",
    "upper": "Σ is the action of the members' own paths, never below W2² of the same members; "
    "noise in the steps would swamp it.",
    "none": "Σ is an approximation that may lie on either side; near rest sampling noise pushes it "
    "up.",
}


class MemberRates(eqx.Module):
    """The share of each member in g² = E‖g‖² at each snapshot, per squared unit of learning time.

    Where `between`, a row belongs to a link instead of a snapshot.
    """

    whole: Float[Array, "snapshots n"]
    """Numbers whose mean over the members is g²."""
    bound: Float[Array, "snapshots n"] | None
    """The same for a lower bound of g²; None if there is none."""
    gradient: Float[Array, "snapshots n"] | None
    """The same for E‖∇ψ‖², the part of the velocity that moves mass; None if it is not known."""
    divergence: Float[Array, "snapshots n"] | None
    """∇·v per unit of learning time; None if the estimator does not know it."""
    between: bool = eqx.field(static=True)
    """Whether there is one row for each link instead of each snapshot."""
    smooth: bool = eqx.field(static=True)
    """Whether g² is that of the law at each snapshot, smooth in learning time, and no difference
    between snapshots."""
    side: str = eqx.field(static=True)
    """The side on which g² errs, as in `Velocity.bound`."""
    circulation: str = eqx.field(static=True)
    """What became of motion that moves no mass, as in `SpeedLimit.circulation`."""
    name: str = eqx.field(static=True)
    """The class of the estimator."""

    @property
    def moving(self) -> Float[Array, "snapshots n"]:
        """The share of the members in ℓ²: of the part that moves mass where it is known."""
        return self.whole if self.gradient is None else self.gradient

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
    trajectory: Trajectory,
    transport: AbstractTransport,
    velocity: AbstractVelocity,
    potential: Any,
    *,
    given: Trajectory | None = None,
    size: Scalar | float = 1.0,
) -> MemberRates:
    """Estimate the velocity at every snapshot of one run, in the coordinates of the transport.

    **Args:** `given`: the run itself, if `trajectory` is in units of `size`; so are the rates.
    """
    members = trajectory.positions if given is None else given.positions
    positions, matrix = transport.coordinates(trajectory.positions), transport.projection
    matrix = None if matrix is None else matrix.astype(positions.dtype)
    snapshot_of = (
        functools.partial(
            _driven, potential=potential, matrix=matrix, mesh=trajectory.mesh, size=size
        )
        if velocity.needs_drift
        else functools.partial(_in_time, mesh=trajectory.mesh)
    )

    def at_moment(state: Any, moment: _Moment) -> Any:
        estimate, state = velocity.checked_estimate(snapshot_of(moment), state)
        return state, estimate

    moments = _moments(trajectory, members, positions, velocity.between)
    _, estimates = jax.lax.scan(at_moment, velocity.init(positions[0]), moments)
    circulation = "resolved" if estimates.sees_circulation else "invisible"
    if estimates.gradient_contributions is None:
        circulation = "contained"
    return MemberRates(
        whole=estimates.contributions,
        bound=estimates.bound_contributions,
        gradient=estimates.gradient_contributions,
        divergence=estimates.divergence,
        between=velocity.between,
        smooth=velocity.needs_drift,
        side=estimates.bound,
        circulation=circulation,
        name=type(velocity).__name__,
    )


def _moments(trajectory: Trajectory, members: Array, positions: Array, between: bool) -> _Moment:
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
        members=members[at],
        s=trajectory.times[at],
        temperature=None if law is None else law.temperature[step],
        positions=positions[at],
        before=positions[earlier],
        after=positions[later],
        elapsed=clock[later] - clock[earlier],
    )


def _driven(
    moment: _Moment,
    potential: Any,
    matrix: Array | None,
    mesh: AnyMesh | None,
    size: Scalar | float,
) -> Snapshot:
    """A snapshot with its drift -∇Φ and its diffusion T in learning time, projected if need be.

    The members share the devices for their drift; the fields are then fitted on every device, to
    the whole snapshot. A fit to thirds of members that are spread out would wait for other devices
    dozens of times.
    """
    acting = potential.at(moment.s)
    drift = -jax.vmap(lambda member: acting.energy_and_gradient(member)[1])(moment.members)
    drift, diffusion = drift / size, moment.temperature / size / size
    if matrix is not None:
        drift, diffusion = product(drift, matrix), diffusion * product(matrix.T, matrix)
    positions, drift = replicate((moment.positions, drift), mesh)
    return Snapshot(positions, drift, diffusion, moment.before, moment.after, moment.elapsed)


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
    action, time = _weights(trajectory, rates)
    whole, moving = (jnp.mean(each, axis=1) for each in (rates.whole, rates.moving))
    bound = None if rates.bound is None else jnp.mean(rates.bound, axis=1)
    speed = safe_root(moving)
    along = spans(trajectory) * (speed if rates.between else (speed[1:] + speed[:-1]) / 2)
    resolved = rates.circulation == "resolved"
    return dataclasses.replace(
        chain,
        entropy_production=jnp.sum(action * whole),
        entropy_production_bound=None if bound is None else jnp.sum(action * bound),
        entropy_production_chain=chain.entropy_production,
        housekeeping=jnp.sum(action * (whole - moving)) if resolved else None,
        circulation=rates.circulation,
        length_squared=jnp.sum(time * speed) ** 2,
        debiased_length_squared=None,
        debiased_dissipation=None,
        dissipation=None if trajectory.law is None else jnp.sum(time * whole),
        speed=along / jnp.diff(trajectory.times),
        source=f"{rates.name} at {links + 1} snapshots; W2² and {chain.source} in the same "
        "coordinates",
        bound=rates.side,
        worth=_VELOCITY[rates.side],
    )


def spans(trajectory: Trajectory) -> Float[Array, " J"]:
    """The learning time of each link; without a law its training time."""
    clock, links = learning_clock(trajectory), trajectory.positions.shape[0] - 1
    return jnp.diff(clock[:: (clock.shape[0] - 1) // links])


def _weights(trajectory: Trajectory, rates: MemberRates) -> tuple[Array, Array]:
    """The weights of g² at each snapshot (or on each link) in Σ and in D; those of D are also the
    weights of g in L."""
    learning_times = spans(trajectory)
    if rates.between:
        return learning_times**2 / jnp.diff(trajectory.times), learning_times
    fine = _trapezoids(trajectory, 1)
    if not rates.smooth or learning_times.size % 2:
        return fine
    # The error of the trapezoidal rule falls as the square of the spacing.
    coarse = _trapezoids(trajectory, 2)
    action, time = (
        (4 * x - jnp.zeros_like(x).at[::2].set(y)) / 3 for x, y in zip(fine, coarse, strict=True)
    )
    return action, time


def _trapezoids(trajectory: Trajectory, stride: int) -> tuple[Array, Array]:
    """The weights of g² in Σ and D, interpolated linearly between every `stride`-th snapshot."""
    clock = learning_clock(trajectory)
    steps, links = clock.shape[0] - 1, (trajectory.positions.shape[0] - 1) // stride
    edges = clock[:: steps // links]
    learning_times = jnp.diff(edges)
    eta = jnp.diff(clock).reshape(links, -1)
    # Steps per unit of training time; without a law each snapshot ends a step, of any length.
    pace = steps if trajectory.law is not None else 1 / jnp.diff(trajectory.times)
    action = jnp.broadcast_to(pace, (steps,)).reshape(links, -1) * eta**2
    # Where in learning time the middle of each step lies between its two snapshots.
    middle = clock[:-1].reshape(links, -1) + eta / 2 - edges[:-1, None]
    where = middle * safe_divide(jnp.ones_like(learning_times), learning_times)[:, None]
    left, right = (jnp.sum(action * part, axis=1) for part in (1 - where, where))
    return _spread(left, right), _spread(learning_times / 2, learning_times / 2)


def _spread(left: Float[Array, " J"], right: Float[Array, " J"]) -> Float[Array, " snapshots"]:
    """The weights of links at their left and right ends, summed at the snapshots."""
    zero = jnp.zeros(1, left.dtype)
    return jnp.concatenate([left, zero]) + jnp.concatenate([zero, right])
