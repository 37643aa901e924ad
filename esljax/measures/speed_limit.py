r"""The particle estimate of the epistemic speed limit Σ ≥ L² ≥ W2², and its errors.

    report = chain(distances), or from_velocities(chain(distances), rates)
    errors = jackknife over groups of the members of one run, or spread over several runs

Source: Okanohara, arXiv 2601.17607.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_kind, door, known, refuse
from esljax._types import Array
from esljax.files import watch_processes
from esljax.measures.chain import Distances, Rounds, chain, distances, problems
from esljax.measures.debiasing import corrected, plain
from esljax.measures.errors import Groups, jackknife_groups
from esljax.measures.labels import canonical, with_labels
from esljax.measures.report import SpeedLimit, average, with_errors
from esljax.measures.units import OwnUnits, in_own_units, put_back
from esljax.measures.velocities import MemberRates, from_velocities, member_rates
from esljax.potentials import AbstractPotential, check_potential
from esljax.sharding import AnyMesh, bring, replicate
from esljax.simulation import Trajectory, check_runs, on_devices, stack
from esljax.transport import AbstractTransport, check_is_transport, check_room, check_transport
from esljax.velocity import AbstractVelocity


@door
def speed_limit(
    trajectory: Trajectory | Sequence[Trajectory],
    *,
    transport: AbstractTransport,
    velocity: AbstractVelocity | None = None,
    potential: AbstractPotential | None = None,
    jackknife: int = 32,
    debias: bool = False,
    mesh: AnyMesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpeedLimit:
    """Measure a run against the epistemic speed limit Σ ≥ L² ≥ W2².

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with
      positions (runs, J+1, n, d).
    - `transport`: the geometry in which Σ, L² and W2² are all taken, so that they are a matched
      pair.
    - `velocity`: an estimator of the velocity from which Σ is made instead of the chain; the Σ of
      the chain stays in the report beside it. It works in the coordinates that the transport
      measures in (a `ProjectedTransport` projects the members, their drift and their noise), so
      that Σ and W2² belong together.
    - `potential`: Φ, whose gradient over all data is the drift that velocities need; finite
      differences between snapshots need none.
    - `jackknife`: for one run, the most groups of members left out in turn for the standard errors;
      0 for none. Each group repeats the whole chain. The errors of several runs are taken over the
      runs.
    - `debias`: whether to remove the sampling bias from the chain's Σ, L² and W2², and make the gap
      and its parts of the result: by the jackknife for distances between moments, else by splitting
      the members in two. Members must be independent.
    - `mesh`: the devices that share the pairs of snapshots, of which there may be any number; by
      default those of the run, or all local ones if the run lies on none in particular. Inside
      `jit` those of the run, or of `jax.set_mesh`.
    - `progress`: for one run outside of `jit`, called with the transport problems of the chain that
      are solved and those in all, subsets of the members included. The host then solves them in
      rounds; last digits may differ, and there are no derivatives.

    **Returns:** `SpeedLimit`; `print` shows it with a verdict. Of several runs, the mean of each
    number.
    **Raises:** `InputError` for members that are not finite, fewer than two of them, runs of
    different shapes, and pairs of `velocity` and `transport` that do not measure the same law.
    **Differentiation:** as the transport; a link along which nothing moves contributes slope 0 to
    L.
    **Reference:** Okanohara, arXiv 2601.17607.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> start = 3 + jax.random.normal(jax.random.key(0), (16, 2))
        >>> path = esl.simulate(
        ...     esl.Quadratic(1.0), esl.Langevin(0.1), start, steps=20, key=jax.random.key(1)
        ... )
        >>> report = esl.speed_limit(path, transport=esl.ExactTransport())
        >>> bool(report.entropy_production > report.w2_squared)
        True
        >>> report.errors
        'jackknife over 16 groups of 1 of 16 members'
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = stack(trajectory)
    check_runs(trajectory, jackknife, folded=True)
    check_is_transport("transport", transport)
    transport = transport.of_parameters(trajectory.keys)
    _check_pair(trajectory, transport, velocity, potential)
    if debias and transport.moments_only and trajectory.positions.shape[-2] < 3:
        raise refuse("debias", "be False for the moments of two members", "is True")
    if progress is not None and not (
        trajectory.positions.ndim == 3 and known(trajectory.positions)
    ):
        raise refuse("progress", "be None for several runs and inside `jit`", "is given")
    trajectory, labels = canonical(trajectory, velocity)
    # Devices are settled here, once.
    watch_processes()
    trajectory = on_devices(trajectory, mesh)
    mesh = trajectory.mesh
    transport, velocity, potential = bring((transport, velocity, potential), mesh)
    if trajectory.positions.ndim == 4:
        report = _of_several(trajectory, transport, velocity, potential, debias)
    elif progress is None:
        report = _of_one(trajectory, transport, velocity, potential, jackknife, debias)
    else:
        own = _in_own_units(trajectory, transport, velocity)
        split = _Split.of(own, jackknife, debias)
        rounds = Rounds(progress, split.problems(own))
        progress(0, rounds.total)
        report = _finished(own, potential, jackknife, debias, _solved(own, split, rounds))
    return with_labels(replicate(report, mesh), labels)


@eqx.filter_jit
def _of_one(
    trajectory: Trajectory,
    transport: AbstractTransport,
    velocity: AbstractVelocity | None,
    potential: Any,
    jackknife: int,
    debias: bool,
) -> SpeedLimit:
    own = in_own_units(trajectory, transport, velocity)
    solved = _solved(own, _Split.of(own, jackknife, debias))
    return _with_errors(own, potential, jackknife, debias, solved)


def _with_errors(
    own: OwnUnits, potential: Any, jackknife: int, debias: bool, solved: "_Solved"
) -> SpeedLimit:
    report, errors, groups = _measured(own, potential, jackknife, debias, solved)
    if groups is not None and jackknife:
        members = own.path.positions.shape[1]
        words = f"jackknife over {groups.count} groups of {groups.size} of {members} members"
        report = with_errors(report, errors, words, groups.count - 1)
    return put_back(report, own.size)


_in_own_units = eqx.filter_jit(in_own_units)
_finished = eqx.filter_jit(_with_errors)


@eqx.filter_jit
def _of_several(
    trajectory: Trajectory,
    transport: AbstractTransport,
    velocity: AbstractVelocity | None,
    potential: Any,
    debias: bool,
) -> SpeedLimit:
    own = in_own_units(trajectory, transport, velocity)

    def one(run_and_itself: tuple[Trajectory, Trajectory]) -> SpeedLimit:
        path, given = run_and_itself
        run = dataclasses.replace(own, path=path, given=given)
        solved = _solved(run, _Split.of(run, 0, debias))
        return _measured(run, potential, 0, debias, solved)[0]

    return put_back(average(jax.lax.map(one, (own.path, own.given))), own.size)


# Groups that leave in turn to remove a bias where no standard errors are asked for.
_GROUPS = 16


class _Split(NamedTuple):
    """The subsets of the members that are measured beside all of them."""

    halves: bool
    """Whether the members are split in two, of each subset too."""
    groups: Groups | None

    @classmethod
    def of(cls, own: OwnUnits, jackknife: int, debias: bool) -> "_Split":
        members = own.path.positions.shape[1]
        halves = debias and not own.transport.moments_only
        # A group must take as many members from the one half as from the other.
        unit = 2 if halves else 1
        most = jackknife or _GROUPS * debias
        return cls(halves, jackknife_groups(members, most, unit=unit, least=2 * unit))

    def problems(self, own: OwnUnits) -> int:
        """The transport problems of the chain for all members and for all subsets."""
        snapshots, members, _ = own.path.positions.shape
        groups = self.groups
        subsets = 1 if groups is None else 1 + groups.count + (groups.covered < members)
        return problems(snapshots - 1, subsets, self.halves)


class _Solved(NamedTuple):
    """The distances of one run, in units of its own."""

    full: Distances
    """Of all members."""
    covered: Distances | None
    """Of those that groups hold, if those are not all."""
    without: Distances | None
    """Of those without each group."""


def _solved(own: OwnUnits, split: _Split, rounds: Rounds | None = None) -> _Solved:
    """Solve the transport problems of one run."""
    halves, groups = split

    def of(subsets: np.ndarray | None) -> Distances:
        kept = None if subsets is None else jnp.asarray(subsets)
        return distances(own.path, own.transport, halves=halves, subsets=kept, rounds=rounds)

    full = of(None)
    if groups is None:
        return _Solved(full, None, None)
    some = groups.covered < own.path.positions.shape[1]
    covered = of(np.arange(groups.covered)[None]) if some else None
    return _Solved(full, covered, of(groups.kept))


def _measured(
    own: OwnUnits, potential: Any, jackknife: int, debias: bool, solved: _Solved
) -> tuple[SpeedLimit, dict[str, Array | None], Groups | None]:
    """The report of one run, debiased if need be, and its standard errors by name; all in units of
    its own."""
    path, transport, velocity = own.path, own.transport, own.velocity
    members, groups = path.positions.shape[1], _Split.of(own, jackknife, debias).groups
    rates = None
    if velocity is not None:
        rates = member_rates(
            path, transport, velocity, potential, given=own.given.placed, size=own.size
        )
    report = _report(own, rates, solved.full)
    if groups is None or solved.without is None:
        return report, {}, None
    full = plain(report, rates, solved.full)
    # Members that no group holds would add their own noise to a bias.
    covered = full
    if solved.covered is not None:
        kept = np.arange(groups.covered)[None]
        covered = jax.tree.map(lambda x: x[0], _of_subsets(own, rates, solved.covered, kept))
    replicates = _of_subsets(own, rates, solved.without, groups.kept)
    return *corrected(report, full, covered, replicates, groups, members, debias), groups


def _of_subsets(
    own: OwnUnits, rates: MemberRates | None, solved: Distances, subsets: np.ndarray
) -> dict[str, Array | None]:
    """The numbers of the report from each of the subsets of the members, shape (groups,) each.

    Fields stay as they were fitted to all members: the terms of each member hold its share in the
    variance of the fit as well.
    """

    def of_subset(subset_and_distances: tuple[Array, Distances]) -> dict[str, Array | None]:
        kept, solved = subset_and_distances
        left = None if rates is None else rates.members(kept)
        return plain(_report(own, left, solved), left, solved)

    return jax.lax.map(of_subset, (jnp.asarray(subsets), solved))


def _report(own: OwnUnits, rates: MemberRates | None, solved: Distances) -> SpeedLimit:
    report = chain(own.path, own.transport, solved, given=own.given, size=own.size)
    return report if rates is None else from_velocities(own.path, report, rates)


def _check_pair(
    trajectory: Trajectory, transport: AbstractTransport, velocity: Any, potential: Any
) -> None:
    n, d = trajectory.positions.shape[-2:]
    check_transport("transport", transport, n, d, trajectory.positions.dtype)
    check_room(transport, n, d, trajectory.positions.dtype)
    if trajectory.folded is not None:
        if not transport.of_distances:
            raise refuse(
                "transport",
                "look at distances between members alone, as ExactTransport, SinkhornTransport and "
                "GaussianTransport do, for a run of from_checkpoints",
                f"is {transport.name}",
            )
        matrix = transport.projection
        if matrix is not None and not trajectory.folded.keeps(matrix):
            raise refuse(
                "trajectory",
                "be from_checkpoints(..., all_pairs=True) under a projection other than "
                "`folded.directions`",
                "holds the distances between near snapshots alone",
            )
        if velocity is not None:
            raise refuse(
                "velocity",
                "be None for a run of from_checkpoints, which holds distances alone",
                f"is {type(velocity).__name__}",
            )
    if velocity is None:
        if potential is not None:
            raise refuse(
                "potential",
                "be given together with a velocity, which needs it",
                "stands alone",
            )
        return
    must = "be a velocity estimator such as AffineVelocity()"
    check_kind("velocity", velocity, AbstractVelocity, must)
    name = type(velocity).__name__
    if velocity.moments_only and not transport.moments_only:
        raise refuse(
            "transport",
            f"be GaussianTransport() beside {name}, which sees the same moments",
            f"is {transport.name}, whose W2² its Σ need not exceed",
        )
    if not velocity.needs_drift:
        return
    if trajectory.law is None:
        kind = "recorded run" if trajectory.rates is None else "run whose rule claims no law"
        raise refuse(
            "velocity",
            f"be TransportVelocity(...) for a {kind}, where the drift is not known",
            f"is {name}",
        )
    if potential is None:
        raise refuse(
            "potential", f"be the potential of the run, whose gradient {name} needs", "is None"
        )
    check_potential("potential", potential)
    if trajectory.observed or not transport.linear:
        place = "an observed run" if trajectory.observed else f"a {transport.name}"
        raise refuse(
            "velocity",
            "be TransportVelocity(...) in features, where the drift is not known",
            f"is {name} in {place}",
        )
