r"""The particle estimate of the epistemic speed limit: a chain of transport distances between snapshots.

    dist_j = dist(q_j, q_{j+1}),   j = 0, ..., J-1
    Σ  = Σ_j dist_j²/Δs_j  ≥  L² = (Σ_j dist_j)²  ≥  W2² = dist²(q_0, q_J)

For any true metric on laws both inequalities hold exactly on samples, for every number of members and dimensions: the first is
Cauchy-Schwarz, the second the triangle inequality. Where a velocity estimator is given, Σ comes from velocities instead, on the clock of
learning time u = ∫η ds, on which v = η g and the rate g² = E‖g‖² changes as smoothly as the law does whatever the schedule:

    Σ = K Σ_k η_k² g²(u_k + η_k/2),     D = ∫ g² du,     L = ∫ g du,

with g² interpolated linearly between snapshots. Source: Okanohara, arXiv 2601.17607.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, known, refuse
from esljax._types import Array, Float
from esljax.potentials import AbstractPotential, Driven, potential_at
from esljax.report import SpeedLimit, average, split, with_errors
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport, ExactTransport, GaussianTransport, Mapped, Projected
from esljax.velocity import AbstractVelocity, Snapshot

_CHAIN = (
    "A chain bounds the entropy production of its laws from below (coarse snapshots and housekeeping are invisible); "
    "sampling noise pushes it up."
)
_VELOCITY = {
    "lower": "Σ is a lower bound in expectation: what its class of fields cannot follow is missing.",
    "none": "Σ is an approximation that may lie on either side.",
}


def speed_limit(
    trajectory: Trajectory | Sequence[Trajectory],
    *,
    transport: AbstractTransport,
    velocity: AbstractVelocity | None = None,
    potential: AbstractPotential | Driven | None = None,
    jackknife: int = 32,
) -> SpeedLimit:
    """Hold a run against the speed limit Σ ≥ L² ≥ W2².

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with positions (runs, J+1, n, d).
    - `transport`: the geometry in which Σ, L² and W2² are all taken, so that they are a matched pair.
    - `velocity`: what to make Σ from, in place of the chain, which then stands beside it. It works in the coordinates that the transport
      measures in (a `Projected` transport projects the members, their drift and their noise), so that Σ and W2² belong together.
    - `potential`: Φ, whose gradient over all data is the drift that velocities need; finite differences between snapshots need none.
    - `jackknife`: of one run, the most groups of members left out in turn for the standard errors; 0 for none. Each group repeats the whole
      chain. The errors of several runs are taken over the runs.

    **Returns:** `SpeedLimit`; `print` shows it with a verdict. Of several runs, the mean of each number.
    **Raises:** `InputError` for members that are not finite, fewer than two of them, runs of different shapes, and pairs of `velocity` and
    `transport` that do not measure the same law.
    **Differentiation:** as the transport; a link that nothing moves along contributes slope 0 to L.

    **Example:**

        >>> report = speed_limit(path, transport=ExactTransport())
        >>> print(report)
    """
    if not isinstance(transport, AbstractTransport):
        raise refuse("transport", "be a transport such as ExactTransport()", f"is {transport!r}")
    if not isinstance(trajectory, Trajectory):
        trajectory = stack(trajectory)
    check_runs(trajectory, jackknife)
    _check_pair(trajectory, transport, velocity, potential)
    if trajectory.positions.ndim == 3:
        return _of_one(trajectory, transport, velocity, potential, jackknife)
    return _of_several(trajectory, transport, velocity, potential)


@eqx.filter_jit
def _of_one(trajectory, transport, velocity, potential, jackknife: int) -> SpeedLimit:
    rates = None if velocity is None else member_rates(trajectory, transport, velocity, potential)
    report = _report(trajectory, transport, rates)
    members = trajectory.positions.shape[1]
    groups = min(members, jackknife)
    size = members // groups if groups else 0
    if members - size < 2 or groups < 2:
        return report
    left_out = np.arange(groups * size).reshape(groups, size)
    kept = np.stack([np.setdiff1d(np.arange(members), group) for group in left_out])

    def without(kept):
        # The fields stay as they were fitted: what a member adds to a fit is of second order in σ.
        return split(_report(_members(trajectory, kept), transport, None if rates is None else rates.members(kept)))

    replicates = jax.lax.map(without, jnp.asarray(kept))
    # Delete-m jackknife (Shao and Wu, 1989): n - m members stay, m leave, in `groups` disjoint groups.
    variance = lambda x: (members - size) / (size * groups) * jnp.sum((x - jnp.mean(x)) ** 2)  # noqa: E731
    errors = jax.tree.map(lambda x: jnp.sqrt(variance(x)), replicates)
    return with_errors(report, errors, f"jackknife over {groups} groups of {size} of {members} members")


@eqx.filter_jit
def _of_several(trajectory, transport, velocity, potential) -> SpeedLimit:
    def one(trajectory):
        rates = None if velocity is None else member_rates(trajectory, transport, velocity, potential)
        return _report(trajectory, transport, rates)

    return average(jax.lax.map(one, trajectory))


def _report(trajectory: Trajectory, transport: AbstractTransport, rates: "MemberRates | None") -> SpeedLimit:
    chain = _chain(trajectory, transport)
    return chain if rates is None else _from_velocities(trajectory, chain, rates)


class MemberRates(eqx.Module):
    """What each member contributes to g² = E‖g‖² at each snapshot, per squared unit of learning time."""

    whole: Float[Array, "snapshots n"]
    gradient: Float[Array, "snapshots n"] | None
    divergence: Float[Array, "snapshots n"] | None
    """∇·v per unit of learning time, where the estimator knows it."""
    bound: str = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def members(self, kept: Array) -> "MemberRates":
        return jax.tree.map(lambda x: x[:, kept], self)


def member_rates(trajectory: Trajectory, transport: AbstractTransport, velocity: AbstractVelocity, potential: Any) -> MemberRates:
    """The velocity estimated at every snapshot of one run, in the coordinates that the transport measures in."""
    positions, matrix = trajectory.positions, None
    while isinstance(transport, Mapped | Projected):
        if isinstance(transport, Projected):
            matrix = transport.matrix if matrix is None else _matmul(matrix, transport.matrix)
            positions = _matmul(positions, transport.matrix.astype(positions.dtype))
        else:
            positions = jax.vmap(jax.vmap(transport.map))(positions)
        transport = transport.transport
    links = positions.shape[0] - 1
    clock = learning_clock(trajectory)[:: trajectory.rates.shape[0] // links]
    earlier, later = np.maximum(np.arange(links + 1) - 1, 0), np.minimum(np.arange(links + 1) + 1, links)
    steps = np.minimum(np.arange(links + 1) * (trajectory.rates.shape[0] // links), trajectory.rates.shape[0] - 1)

    def at_snapshot(state, xs):
        members, s, temperature, positions, before, after, elapsed = xs
        drift = diffusion = None
        if velocity.needs_drift:
            acting = potential_at(potential, s)
            drift = -jax.vmap(lambda member: acting.energy_and_gradient(member)[1])(members)
            diffusion = temperature
            if matrix is not None:
                drift, diffusion = _matmul(drift, matrix.astype(drift.dtype)), temperature * _matmul(matrix.T, matrix).astype(drift.dtype)
        found, state = velocity.estimate(Snapshot(positions, drift, diffusion, before, after, elapsed), state)
        return state, found

    _, found = jax.lax.scan(
        at_snapshot,
        velocity.init(positions[0]),
        (
            trajectory.positions,
            trajectory.times,
            trajectory.temperatures[steps],
            positions,
            positions[earlier],
            positions[later],
            clock[later] - clock[earlier],
        ),
    )
    return MemberRates(found.contributions, found.gradient_contributions, found.divergence, found.bound, type(velocity).__name__)


def learning_clock(trajectory: Trajectory) -> Float[Array, " K+1"]:
    """The learning time u_k = Σ_{i<k} η_i of every step of one run."""
    return jnp.concatenate([jnp.zeros_like(trajectory.rates[:1]), jnp.cumsum(trajectory.rates)])


def _from_velocities(trajectory: Trajectory, chain: SpeedLimit, rates: MemberRates) -> SpeedLimit:
    steps, links = trajectory.rates.shape[0], trajectory.positions.shape[0] - 1
    eta = trajectory.rates.reshape(links, -1)
    clock = learning_clock(trajectory)
    spans = jnp.diff(clock[:: steps // links])
    # Where in learning time the middle of each step lies between its two snapshots.
    middle = clock[:-1].reshape(links, -1) + eta / 2 - clock[: -1 : steps // links, None]
    where = middle * jnp.where(spans > 0, 1 / jnp.where(spans > 0, spans, 1), 0)[:, None]
    zero = jnp.zeros(1, eta.dtype)
    spread = lambda left, right: jnp.concatenate([left, zero]) + jnp.concatenate([zero, right])  # noqa: E731
    action = steps * spread(jnp.sum(eta**2 * (1 - where), axis=1), jnp.sum(eta**2 * where, axis=1))
    time = spread(spans / 2, spans / 2)

    whole = jnp.mean(rates.whole, axis=1)
    moving = whole if rates.gradient is None else jnp.mean(rates.gradient, axis=1)
    speed = _safe_sqrt(moving)
    along = (speed[1:] + speed[:-1]) / 2 * spans
    values = {name: getattr(chain, name) for name in SpeedLimit.__dataclass_fields__}
    changed = {
        "entropy_production": jnp.dot(action, whole),
        "entropy_production_chain": chain.entropy_production,
        "entropy_production_coarse": None,
        "housekeeping": jnp.dot(action, whole - moving),
        "length_squared": jnp.sum(along) ** 2,
        "dissipation": jnp.dot(time, whole),
        "speed": along / jnp.diff(trajectory.times),
        "source": f"{rates.name} at {links + 1} snapshots; W2² and {chain.source} in the same coordinates",
        "worth": _VELOCITY[rates.bound],
        "is_bound": chain.is_bound,
    }
    return SpeedLimit(**{**values, **changed})


def _chain(trajectory: Trajectory, transport: AbstractTransport) -> SpeedLimit:
    positions, times = trajectory.positions, trajectory.times
    links = positions.shape[0] - 1
    pairs = [(j, j + 1) for j in range(links)] + [(0, links)]
    coarse = [(j, j + 2) for j in range(0, links, 2)] if links % 2 == 0 else []
    first, second = np.array(pairs + coarse).T
    solved = jax.vmap(transport.solve)(positions[first], positions[second])
    squares, whole, coarse_squares = solved.squared[:links], solved.squared[links], solved.squared[links + 1 :]

    elapsed = jnp.diff(times)
    lengths = _safe_sqrt(squares)
    learning_times = jnp.sum(trajectory.rates.reshape(links, -1), axis=1)
    moved = learning_times > 0
    exact_members = isinstance(transport, ExactTransport) and not trajectory.observed
    heat = jnp.sum((trajectory.temperatures * trajectory.rates).reshape(links, -1), axis=1)
    paired = jnp.mean(jnp.sum((positions[1:] - positions[:-1]) ** 2, axis=2), axis=1)
    return SpeedLimit(
        entropy_production=jnp.sum(squares / elapsed),
        length_squared=jnp.sum(lengths) ** 2,
        w2_squared=whole,
        housekeeping=jnp.zeros_like(whole),
        dissipation=jnp.sum(jnp.where(moved, squares / jnp.where(moved, learning_times, 1), 0)),
        learning_time=jnp.sum(learning_times),
        times=(times[1:] + times[:-1]) / 2,
        speed=lengths / elapsed,
        converged=jnp.all(solved.converged),
        entropy_production_coarse=jnp.sum(coarse_squares / (elapsed[::2] + elapsed[1::2])) if coarse else None,
        noise_floor=jnp.sum(2 * positions.shape[2] * heat / elapsed) if exact_members else None,
        # The identity is the best assignment if no other is cheaper than rounding allows.
        identity_fraction=jnp.mean(squares >= paired * (1 - 1e-5), dtype=paired.dtype) if isinstance(transport, ExactTransport) else None,
        source=f"a chain of {links} links in {type(transport).__name__}",
        worth=_CHAIN,
        is_bound=transport.is_metric,
    )


def _members(trajectory: Trajectory, kept: Array) -> Trajectory:
    return eqx.tree_at(lambda t: t.positions, trajectory, trajectory.positions[:, kept])


def _safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # Rounding can bring a Sinkhorn divergence below 0; only the length takes that for 0, and NaN stays NaN.
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def stack(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Several runs as one trajectory with a leading axis."""
    if not isinstance(trajectories, Sequence):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a {type(trajectories).__name__}")
    if len(trajectories) < 2 or not all(isinstance(one, Trajectory) for one in trajectories):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a sequence of {len(trajectories)} items")
    shapes = {one.positions.shape for one in trajectories}
    if len(shapes) > 1 or len({(one.rates.shape, one.final.shape, one.observed) for one in trajectories}) > 1:
        raise refuse("trajectory", "hold runs of one shape", f"holds {len(trajectories)} runs with positions of shapes {sorted(shapes)}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectories)


def check_runs(trajectory: Trajectory, jackknife: int) -> None:
    """Refuse what is no run, or several, of at least two snapshots of at least two members that stayed finite."""
    shape = trajectory.positions.shape
    if len(shape) not in (3, 4):
        raise refuse("trajectory", "hold positions (J+1, n, d), or (runs, J+1, n, d)", f"has positions of shape {shape}")
    if shape[-3] < 2 or shape[-2] < 2:
        raise refuse("trajectory", "hold at least two snapshots of at least two members", f"has positions of shape {shape}")
    if len(shape) == 4 and shape[0] < 2:
        raise refuse("trajectory", "hold at least two runs on its leading axis", f"has positions of shape {shape}")
    if isinstance(jackknife, bool) or not isinstance(jackknife, int) or jackknife < 0:
        raise refuse("jackknife", "be an integer of at least 0", f"is {jackknife!r}")
    if known(trajectory.positions):
        bad = np.logical_not(np.isfinite(np.asarray(trajectory.positions)).all(axis=-1))
        if bad.any():
            snapshot = int(np.argwhere(bad.any(axis=-1).reshape(-1, shape[-3]))[:, 1].min())
            raise InputError(
                f"Argument `trajectory` must hold finite members, but {int(bad[..., -1, :].sum())} of them are not at the end, the first "
                f"from snapshot {snapshot} on; the likely cause is a learning rate above the stability limit 2/(largest curvature)."
            )


def _check_pair(trajectory: Trajectory, transport: AbstractTransport, velocity: Any, potential: Any) -> None:
    if velocity is None:
        if potential is not None:
            raise refuse("potential", "be given together with a velocity, which is what needs it", "stands alone")
        return
    if not isinstance(velocity, AbstractVelocity):
        raise refuse("velocity", "be a velocity estimator such as AffineVelocity()", f"is {velocity!r}")
    inner, mapped = transport, False
    while isinstance(inner, Mapped | Projected):
        inner, mapped = inner.transport, mapped or isinstance(inner, Mapped)
    name, measure = type(velocity).__name__, type(inner).__name__
    if velocity.moments_only and not isinstance(inner, GaussianTransport):
        raise refuse(
            "transport",
            f"be GaussianTransport() beside {name}, which sees the same moments",
            f"is {measure}, whose W2² its Σ need not exceed",
        )
    if not velocity.needs_drift:
        return
    if not isinstance(potential, AbstractPotential | Driven):
        raise refuse("potential", f"be the potential of the run, whose gradient {name} needs", f"is {potential!r}")
    if trajectory.observed or mapped:
        what = "an observed run" if trajectory.observed else "a Mapped transport"
        raise refuse("velocity", "be TransportVelocity(...) in features, where the drift is not known", f"is {name} in {what}")
