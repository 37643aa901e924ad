r"""The particle estimate of the epistemic speed limit Σ ≥ L² ≥ W2²: by the chain of snapshots, or with Σ from velocities, and its errors.

Source: Okanohara, arXiv 2601.17607.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import refuse
from esljax.measures.chain import Distances, chain, distances
from esljax.measures.report import SpeedLimit, average, jackknife_groups, split, with_errors
from esljax.measures.velocities import MemberRates, from_velocities, member_rates
from esljax.potentials import AbstractPotential, check_potential
from esljax.sharding import AnyMesh, bring, replicate
from esljax.simulation import Trajectory, check_runs, on_devices, stack
from esljax.transport import (
    AbstractTransport,
    GaussianTransport,
    MappedTransport,
    ProjectedTransport,
)
from esljax.velocity import AbstractVelocity


def speed_limit(
    trajectory: Trajectory | Sequence[Trajectory],
    *,
    transport: AbstractTransport,
    velocity: AbstractVelocity | None = None,
    potential: AbstractPotential | None = None,
    jackknife: int = 32,
    debias: bool = False,
    mesh: AnyMesh | None = None,
) -> SpeedLimit:
    """Hold a run against the speed limit Σ ≥ L² ≥ W2².

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with positions (runs, J+1, n, d).
    - `transport`: the geometry in which Σ, L² and W2² are all taken, so that they are a matched pair.
    - `velocity`: what to make Σ from, in place of the chain, which then stands beside it. It works in the coordinates that the transport
      measures in (a `ProjectedTransport` transport projects the members, their drift and their noise), so that Σ and W2² belong together.
    - `potential`: Φ, whose gradient over all data is the drift that velocities need; finite differences between snapshots need none.
    - `jackknife`: of one run, the most groups of members left out in turn for the standard errors; 0 for none. Each group repeats the whole
      chain. The errors of several runs are taken over the runs.
    - `debias`: whether to add estimates whose sampling bias is removed by splitting the members in two, of Σ by the chain and of W2², and
      with them an interval of the gap between an estimate that errs below and one that errs above. Members must be independent.
    - `mesh`: the devices that share the pairs of snapshots, of which there may be any number; by default those of the run, or all local
      ones if it lies on none in particular. Inside `jit` those of the run, or of `jax.set_mesh`.

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
    trajectory = on_devices(trajectory, mesh)
    transport, velocity, potential = bring((transport, velocity, potential), trajectory.mesh)
    if trajectory.positions.ndim == 3:
        return _of_one(trajectory, transport, velocity, potential, jackknife, debias)
    return _of_several(trajectory, transport, velocity, potential, debias)


@eqx.filter_jit
def _of_one(trajectory, transport, velocity, potential, jackknife: int, debias: bool) -> SpeedLimit:
    rates = None if velocity is None else member_rates(trajectory, transport, velocity, potential)
    report = replicate(
        _report(trajectory, transport, rates, distances(trajectory, transport, debias=debias)),
        trajectory.mesh,
    )
    members = trajectory.positions.shape[1]
    # A group must take as many members from the one half as from the other.
    unit = 2 if debias else 1
    kept = jackknife_groups(members, jackknife, unit=unit, least=2 * unit)
    if kept is None:
        return report
    groups, size = kept.shape[0], members - kept.shape[1]

    def without(kept_and_solved):
        # The fields stay as they were fitted: what a member adds to a fit is of second order in σ.
        kept, solved = kept_and_solved
        return split(
            _report(trajectory, transport, None if rates is None else rates.members(kept), solved)
        )

    kept = jnp.asarray(kept)
    solved = distances(trajectory, transport, debias=debias, subsets=kept)
    replicates = replicate(jax.lax.map(without, (kept, solved)), trajectory.mesh)

    # Delete-m jackknife (Shao and Wu, 1989): n - m members stay, m leave, in `groups` disjoint groups.
    def variance(x):
        return (members - size) / (size * groups) * jnp.sum((x - jnp.mean(x)) ** 2)

    errors = jax.tree.map(lambda x: jnp.sqrt(variance(x)), replicates)
    return with_errors(
        report, errors, f"jackknife over {groups} groups of {size} of {members} members", groups - 1
    )


@eqx.filter_jit
def _of_several(trajectory, transport, velocity, potential, debias: bool) -> SpeedLimit:
    def one(trajectory):
        rates = (
            None if velocity is None else member_rates(trajectory, transport, velocity, potential)
        )
        return _report(
            trajectory, transport, rates, distances(trajectory, transport, debias=debias)
        )

    return replicate(average(jax.lax.map(one, trajectory)), trajectory.mesh)


def _report(
    trajectory: Trajectory,
    transport: AbstractTransport,
    rates: MemberRates | None,
    solved: Distances,
) -> SpeedLimit:
    report = chain(trajectory, transport, solved)
    return report if rates is None else from_velocities(trajectory, report, rates)


def _check_pair(
    trajectory: Trajectory, transport: AbstractTransport, velocity: Any, potential: Any
) -> None:
    if velocity is None:
        if potential is not None:
            raise refuse(
                "potential",
                "be given together with a velocity, which is what needs it",
                "stands alone",
            )
        return
    if not isinstance(velocity, AbstractVelocity):
        raise refuse(
            "velocity", "be a velocity estimator such as AffineVelocity()", f"is {velocity!r}"
        )
    inner, mapped = transport, False
    while isinstance(inner, MappedTransport | ProjectedTransport):
        inner, mapped = inner.transport, mapped or isinstance(inner, MappedTransport)
    name, measure = type(velocity).__name__, type(inner).__name__
    if velocity.moments_only and not isinstance(inner, GaussianTransport):
        raise refuse(
            "transport",
            f"be GaussianTransport() beside {name}, which sees the same moments",
            f"is {measure}, whose W2² its Σ need not exceed",
        )
    if not velocity.needs_drift:
        return
    if trajectory.rates is None:
        raise refuse(
            "velocity",
            "be TransportVelocity(...) for a recorded run, where the drift is not known",
            f"is {name}",
        )
    if potential is None:
        raise refuse(
            "potential", f"be the potential of the run, whose gradient {name} needs", "is None"
        )
    check_potential("potential", potential)
    if trajectory.observed or mapped:
        what = "an observed run" if trajectory.observed else "a MappedTransport"
        raise refuse(
            "velocity",
            "be TransportVelocity(...) in features, where the drift is not known",
            f"is {name} in {what}",
        )
