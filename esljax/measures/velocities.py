r"""The entropy-production integrator: Σ and D from velocities at snapshots, on the clock of learning time.

In learning time u = ∫η ds the velocity is v = η g, and the rate g² = E‖g‖² changes as smoothly as the law does, whatever the schedule:

    Σ = K Σ_k η_k² g²(u_k + η_k/2),     D = ∫ g² du,     L = ∫ g du,

with g² interpolated linearly between snapshots. A recorded run has no learning rates: its clock is training time and η = 1, so that Σ is
the trapezoidal sum over its snapshots, and neither D nor U is known. Source: Okanohara, arXiv 2601.17607.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._numerics import product
from esljax._types import Array, Float
from esljax.measures.chain import safe_sqrt
from esljax.measures.report import SpeedLimit
from esljax.potentials import potential_at
from esljax.sharding import replicate
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport, coordinates
from esljax.velocity import AbstractVelocity, Snapshot

_VELOCITY = {
    "lower": "Σ is a lower bound in expectation: what its class of fields cannot follow is missing.",
    "upper": "Σ is the action of the members' own paths, never below W2² of the same members; noise in the steps would swamp it.",
    "none": "Σ is an approximation that may lie on either side.",
}


class MemberRates(eqx.Module):
    """What each member contributes to g² = E‖g‖² at each snapshot, per squared unit of learning time."""

    whole: Float[Array, "snapshots n"]
    gradient: Float[Array, "snapshots n"] | None
    divergence: Float[Array, "snapshots n"] | None
    """∇·v per unit of learning time, where the estimator knows it."""
    between: bool = eqx.field(static=True)
    """Whether there is one row for each link instead of each snapshot."""
    bound: str = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def members(self, kept: Array) -> "MemberRates":
        """Of these members alone."""
        return jax.tree.map(lambda x: x[:, kept], self)


def member_rates(
    trajectory: Trajectory, transport: AbstractTransport, velocity: AbstractVelocity, potential: Any
) -> MemberRates:
    """The velocity estimated at every snapshot of one run, in the coordinates that the transport measures in."""
    positions, matrix = coordinates(transport, trajectory.positions)
    links = positions.shape[0] - 1
    clock = learning_clock(trajectory)
    per_link = (clock.shape[0] - 1) // links
    clock = clock[::per_link]
    times = np.arange(links + (not velocity.between))
    earlier, later = (
        times if velocity.between else np.maximum(times - 1, 0),
        np.minimum(times + 1, links),
    )
    starting = np.minimum(times * per_link, links * per_link - 1)

    def at_snapshot(state, xs):
        members, s, temperature, positions, before, after, elapsed = xs
        if not velocity.needs_drift:
            # What compares whole snapshots must not wait for other devices in each of its iterations: one snapshot fits on every device.
            positions, before, after = replicate((positions, before, after), trajectory.mesh)
        drift = diffusion = None
        if velocity.needs_drift:
            acting = potential_at(potential, s)
            drift = -jax.vmap(lambda member: acting.energy_and_gradient(member)[1])(members)
            diffusion = temperature
            if matrix is not None:
                drift, diffusion = product(drift, matrix), temperature * product(matrix.T, matrix)
        found, state = velocity.checked_estimate(
            Snapshot(positions, drift, diffusion, before, after, elapsed), state
        )
        return state, found

    _, found = jax.lax.scan(
        at_snapshot,
        velocity.init(positions[0]),
        (
            trajectory.positions[times],
            trajectory.times[times],
            None if trajectory.temperatures is None else trajectory.temperatures[starting],
            positions[times],
            positions[earlier],
            positions[later],
            clock[later] - clock[earlier],
        ),
    )
    return MemberRates(
        found.contributions,
        found.gradient_contributions,
        found.divergence,
        velocity.between,
        found.bound,
        type(velocity).__name__,
    )


def learning_clock(trajectory: Trajectory) -> Float[Array, " ticks"]:
    """The learning time u_k = Σ_{i<k} η_i of every step of one run; of a recorded run the training times of its snapshots."""
    if trajectory.rates is None:
        return trajectory.times
    return jnp.concatenate([jnp.zeros_like(trajectory.rates[:1]), jnp.cumsum(trajectory.rates)])


def from_velocities(trajectory: Trajectory, chain: SpeedLimit, rates: MemberRates) -> SpeedLimit:
    """The report of the chain with Σ, L and D from velocities in place of its own."""
    links = trajectory.positions.shape[0] - 1
    action, time = _weights(trajectory, rates.between)
    whole = jnp.mean(rates.whole, axis=1)
    moving = whole if rates.gradient is None else jnp.mean(rates.gradient, axis=1)
    speed = safe_sqrt(moving)
    clock = learning_clock(trajectory)
    spans = jnp.diff(clock[:: (clock.shape[0] - 1) // links])
    along = spans * (speed if rates.between else (speed[1:] + speed[:-1]) / 2)
    return dataclasses.replace(
        chain,
        entropy_production=jnp.sum(action * whole),
        entropy_production_chain=chain.entropy_production,
        housekeeping=jnp.sum(action * (whole - moving)),
        length_squared=jnp.sum(along) ** 2,
        dissipation=None if trajectory.rates is None else jnp.sum(time * whole),
        speed=along / jnp.diff(trajectory.times),
        source=f"{rates.name} at {links + 1} snapshots; W2² and {chain.source} in the same coordinates",
        bound=rates.bound,
        worth=_VELOCITY[rates.bound],
    )


def _weights(trajectory: Trajectory, between: bool) -> tuple[Array, Array]:
    """What g² at each snapshot (or on each link) weighs in Σ and in D."""
    clock = learning_clock(trajectory)
    steps, links = clock.shape[0] - 1, trajectory.positions.shape[0] - 1
    eta = (jnp.diff(clock) if trajectory.rates is None else trajectory.rates).reshape(links, -1)
    # Steps per unit of training time; in a recorded run each link is one step, of any length.
    pace = steps if trajectory.rates is not None else 1 / jnp.diff(trajectory.times)
    spans = jnp.diff(clock[:: steps // links])
    if between:
        return spans**2 / jnp.diff(trajectory.times), spans
    # Where in learning time the middle of each step lies between its two snapshots.
    middle = clock[:-1].reshape(links, -1) + eta / 2 - clock[: -1 : steps // links, None]
    where = middle * jnp.where(spans > 0, 1 / jnp.where(spans > 0, spans, 1), 0)[:, None]
    zero = jnp.zeros(1, eta.dtype)

    def spread(left, right):
        return jnp.concatenate([left, zero]) + jnp.concatenate([zero, right])

    action = spread(
        pace * jnp.sum(eta**2 * (1 - where), axis=1), pace * jnp.sum(eta**2 * where, axis=1)
    )
    return action, spread(spans / 2, spans / 2)
