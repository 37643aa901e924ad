r"""The particle estimate of the epistemic speed limit: a chain of transport distances between snapshots.

    dist_j = dist(q_j, q_{j+1}),   j = 0, ..., J-1
    Σ  = Σ_j dist_j²/Δs_j  ≥  L² = (Σ_j dist_j)²  ≥  W2² = dist²(q_0, q_J)

For any true metric on laws both inequalities hold exactly on samples, for every number of members and dimensions: the first is
Cauchy-Schwarz, the second the triangle inequality. Source: Okanohara, arXiv 2601.17607.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, known, refuse
from esljax._types import Array, Float
from esljax.report import SpeedLimit, average, split, with_errors
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport, ExactTransport


def speed_limit(trajectory: Trajectory | Sequence[Trajectory], *, transport: AbstractTransport, jackknife: int = 32) -> SpeedLimit:
    """Hold a run against the speed limit Σ ≥ L² ≥ W2².

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with positions (runs, J+1, n, d).
    - `transport`: the geometry in which Σ, L² and W2² are all taken, so that they are a matched pair.
    - `jackknife`: of one run, the most groups of members left out in turn for the standard errors; 0 for none. Each group repeats the whole
      chain. The errors of several runs are taken over the runs.

    **Returns:** `SpeedLimit`; `print` shows it with a verdict. Of several runs, the mean of each number.
    **Raises:** `InputError` for members that are not finite, fewer than two of them, or runs of different shapes.
    **Differentiation:** as the transport; a link that nothing moves along contributes slope 0 to L.

    **Example:**

        >>> report = speed_limit(path, transport=ExactTransport())
        >>> print(report)
    """
    if not isinstance(transport, AbstractTransport):
        raise refuse("transport", "be a transport such as ExactTransport()", f"is {transport!r}")
    if not isinstance(trajectory, Trajectory):
        trajectory = _stack(trajectory)
    _check(trajectory, jackknife)
    if trajectory.positions.ndim == 3:
        return _of_one(trajectory, transport, jackknife)
    return _of_several(trajectory, transport)


@eqx.filter_jit
def _of_one(trajectory: Trajectory, transport: AbstractTransport, jackknife: int) -> SpeedLimit:
    report = _chain(trajectory, transport)
    members = trajectory.positions.shape[1]
    groups = min(members, jackknife)
    size = members // groups if groups else 0
    if members - size < 2 or groups < 2:
        return report
    left_out = np.arange(groups * size).reshape(groups, size)
    kept = np.stack([np.setdiff1d(np.arange(members), group) for group in left_out])

    def without(kept):
        return split(_chain(_members(trajectory, kept), transport))

    replicates = jax.lax.map(without, jnp.asarray(kept))
    # Delete-m jackknife (Shao and Wu, 1989): n - m members stay, m leave, in `groups` disjoint groups.
    variance = lambda x: (members - size) / (size * groups) * jnp.sum((x - jnp.mean(x)) ** 2)  # noqa: E731
    errors = jax.tree.map(lambda x: jnp.sqrt(variance(x)), replicates)
    return with_errors(report, errors, f"jackknife over {groups} groups of {size} of {members} members")


@eqx.filter_jit
def _of_several(trajectory: Trajectory, transport: AbstractTransport) -> SpeedLimit:
    return average(jax.lax.map(lambda one: _chain(one, transport), trajectory))


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
        is_bound=transport.is_metric,
    )


def _members(trajectory: Trajectory, kept: Array) -> Trajectory:
    return eqx.tree_at(lambda t: t.positions, trajectory, trajectory.positions[:, kept])


def _safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # Rounding can bring a Sinkhorn divergence below 0; only the length takes that for 0, and NaN stays NaN.
    return jnp.where(x <= 0, 0, jnp.sqrt(jnp.where(x <= 0, 1, x)))


def _stack(trajectories: Sequence[Trajectory]) -> Trajectory:
    if not isinstance(trajectories, Sequence):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a {type(trajectories).__name__}")
    if len(trajectories) < 2 or not all(isinstance(one, Trajectory) for one in trajectories):
        raise refuse("trajectory", "be a Trajectory or a sequence of at least two", f"is a sequence of {len(trajectories)} items")
    shapes = {one.positions.shape for one in trajectories}
    if len(shapes) > 1 or len({(one.rates.shape, one.final.shape, one.observed) for one in trajectories}) > 1:
        raise refuse("trajectory", "hold runs of one shape", f"holds {len(trajectories)} runs with positions of shapes {sorted(shapes)}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectories)


def _check(trajectory: Trajectory, jackknife: int) -> None:
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
