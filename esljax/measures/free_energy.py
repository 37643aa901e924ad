r"""The free-energy monitor: the energies, entropies, work and dissipation of an ensemble.

The balance D = F₀ - F₁ + work + tempering checks them against each other (`balance`). D is measured
from velocities at snapshots, D = ∫ E‖g‖² du in learning time u, or from a chain of transport
distances, D = Σ_j dist_j²/U_j.

Work is that of the run, `Trajectory.work_of_links`: the drive rests during a step and changes after
it, and each member receives the change of Φ at its position, with the jumps of a `Driven` potential
at its ends. It is exact for the process that was simulated, for any drive and any number of
snapshots, and so is the first law on samples, ΔE = work + heat (Sekimoto, Prog. Theor. Phys. Suppl.
130, 17 (1998)). The work of a run with batches is that of the batches: unbiased, with their noise.

Every number is a mean over members of a sum over time, so its standard error counts the
correlations along a path. Source: Okanohara, arXiv 2601.17607.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_kind, door, refuse
from esljax._numerics import average, safe_divide
from esljax._types import Array, Float, Int
from esljax.density import AbstractEntropy, TransportedEntropy
from esljax.measures.balance import NUMBERS, FreeEnergy
from esljax.measures.chain import of_pairs
from esljax.measures.errors import jackknife_groups
from esljax.measures.labels import canonical
from esljax.measures.velocities import member_rates, spans
from esljax.potentials import AbstractPotential, check_potential
from esljax.results import StandardErrors
from esljax.sharding import bring
from esljax.simulation import Trajectory, check_runs, on_devices, stack
from esljax.transport import (
    AbstractTransport,
    GaussianTransport,
    check_is_transport,
    check_room,
    check_transport,
    solution_of,
)
from esljax.velocity import AbstractVelocity


@door
def free_energy(
    trajectory: Trajectory | Sequence[Trajectory],
    potential: AbstractPotential,
    *,
    entropy: AbstractEntropy | TransportedEntropy,
    velocity: AbstractVelocity | None = None,
    transport: AbstractTransport | None = None,
    jackknife: int = 32,
) -> FreeEnergy:
    """Follow the free energy of a run and compare its drop with the dissipation.

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with
      positions (runs, J+1, n, d). Copies of a member count once.
    - `potential`: the potential of the run; energies are over all its data, whatever batches the
      run saw. Work is that of the run itself.
    - `entropy`: an estimator of H at every snapshot, or `TransportedEntropy(start)`, which follows
      H along `velocity`.
    - `velocity`: an estimator of D at every snapshot, on the clock of learning time, as in
      `speed_limit`.
    - `transport`: instead of `velocity`, D from the chain Σ_j dist²/U_j, a lower bound but for
      sampling noise. Without either, D is known by balance alone.
    - `jackknife`: with a `transport` or a `TransportedEntropy`, the most groups of members left out
      in turn for the standard errors, each of which repeats that estimate; 0 for no errors. Without
      them errors are taken over members and cost nothing.

    **Returns:** `FreeEnergy`; `print` shows it with a verdict. Of several runs, the mean of each
    number, with errors from their spread.
    **Raises:** `InputError` for observed runs (which hold no positions), runs without a law or
    without the work of a potential that moves, members that are not finite, and estimators that do
    not fit.
    **Differentiation:** in the trajectory, and so in everything that made it, and in the potential:
    forward and reverse where the entropy, the velocity and the transport are. Put the call inside
    the function that is differentiated, with `simulate` before it.
    **Reference:** Okanohara, arXiv 2601.17607.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> potential, start = esl.Quadratic(1.0), jax.random.normal(jax.random.key(0), (40, 1))
        >>> rule = esl.Langevin(0.05, 0.1)
        >>> path = esl.simulate(potential, rule, start, steps=20, key=jax.random.key(1))
        >>> books = esl.free_energy(
        ...     path,
        ...     potential,
        ...     entropy=esl.density.GaussianEntropy(),
        ...     velocity=esl.AffineVelocity(),
        ... )
        >>> bool(abs(books.residual) < 5 * books.standard_error.residual)
        True
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = stack(trajectory)
    check_runs(trajectory, jackknife)
    trajectory, _ = canonical(trajectory, None)
    if transport is not None:
        check_is_transport("transport", transport)
        transport = transport.of_parameters(trajectory.keys)
    _check(trajectory, potential, entropy, velocity, transport)
    # Devices are settled here, once.
    trajectory = on_devices(trajectory)
    potential, entropy, velocity, transport = bring(
        (potential, entropy, velocity, transport), trajectory.mesh
    )
    if trajectory.positions.ndim == 3:
        return _of_one(trajectory, potential, entropy, velocity, transport, jackknife)
    return _of_several(trajectory, potential, entropy, velocity, transport)


@eqx.filter_jit
def _of_one(
    trajectory: Trajectory,
    potential: Any,
    entropy: Any,
    velocity: AbstractVelocity | None,
    transport: AbstractTransport | None,
    jackknife: int,
) -> FreeEnergy:
    members = trajectory.positions.shape[1]
    each = _of_each_member(trajectory, potential, entropy, velocity, transport)
    of_all = _of_all_members(trajectory, potential, entropy, velocity, transport)
    report = dataclasses.replace(_mean(each), **of_all)
    jointly = [name for name in ("entropy", "dissipation_of_links") if name in of_all]
    if not jointly:
        return _with_errors(report, each, f"over {members} members")
    # Entropies need four members.
    left_out = jackknife_groups(members, jackknife, least=4)
    if left_out is None:
        return report
    groups, size = left_out.count, left_out.size
    subsets = jnp.asarray(left_out.kept)
    if transport is None:
        left = {"entropy": _entropies_without(trajectory, potential, entropy, velocity, subsets)}
    else:
        left = {"dissipation_of_links": _chain(trajectory, 1, transport, subsets)}
    # The jackknife's pseudo-values (Tukey, 1958) turn a number of the whole ensemble into a mean
    # over groups.
    pseudo = {name: groups * of_all[name] - (groups - 1) * left[name] for name in jointly}
    grouped = jax.tree.map(
        lambda x: jnp.mean(x[: groups * size].reshape(groups, size, *x.shape[1:]), axis=1), each
    )
    words = f"jackknife over {groups} groups of {size} of {members} members"
    return _with_errors(report, dataclasses.replace(grouped, **pseudo), words)


@eqx.filter_jit
def _of_several(
    trajectory: Trajectory,
    potential: Any,
    entropy: Any,
    velocity: AbstractVelocity | None,
    transport: AbstractTransport | None,
) -> FreeEnergy:
    def one(run: Trajectory) -> FreeEnergy:
        each = _of_each_member(run, potential, entropy, velocity, transport)
        of_all = _of_all_members(run, potential, entropy, velocity, transport)
        return dataclasses.replace(_mean(each), **of_all)

    reports = jax.lax.map(one, trajectory)
    words = f"spread over {trajectory.positions.shape[0]} independent runs"
    return _with_errors(_mean(reports), reports, words)


def _of_each_member(
    trajectory: Trajectory,
    potential: Any,
    entropy: Any,
    velocity: AbstractVelocity | None,
    transport: AbstractTransport | None,
) -> FreeEnergy:
    """The share of each member in every number, on a leading axis (n,): the report is their mean.

    Numbers that belong to the ensemble as a whole are missing here: `_of_all_members` adds them.
    """
    energy = _energies(trajectory, potential)
    links, members = energy.shape[0] - 1, energy.shape[1]
    # Of a potential at rest, which needs no record of it, the work is 0.
    work: Any = trajectory.work_of_links if potential.moves else jnp.zeros_like(energy[1:])
    along = coarse = None
    if velocity is not None:
        along, coarse = _dissipation(trajectory, potential, velocity)

    def alike(x: Array) -> Array:
        return jnp.broadcast_to(x, (members, *x.shape))

    return FreeEnergy(
        times=alike(trajectory.times),
        temperature=alike(_temperatures(trajectory)),
        mobility=alike(spans(trajectory) / jnp.diff(trajectory.times)),
        energy=energy.T,
        entropy=_entropies(trajectory, entropy).T,
        work_of_links=work.T,
        dissipation_of_links=along,
        dissipation_coarse=coarse,
        source=_source(entropy, velocity, transport, links),
    )


def _of_all_members(
    trajectory: Trajectory,
    potential: Any,
    entropy: Any,
    velocity: AbstractVelocity | None,
    transport: AbstractTransport | None,
) -> dict[str, Array]:
    """The numbers of a report that belong to the ensemble as a whole and are no mean over
    members."""
    numbers = {}
    if isinstance(entropy, TransportedEntropy):
        numbers["entropy"] = _transported(trajectory, potential, entropy, velocity)
    if transport is not None:
        numbers["dissipation_of_links"] = _chain(trajectory, 1, transport)
        if trajectory.positions.shape[0] % 2:
            numbers["dissipation_coarse"] = jnp.sum(_chain(trajectory, 2, transport))
    return numbers


def _temperatures(trajectory: Trajectory) -> Float[Array, " snapshots"]:
    """T of the step that starts at each snapshot; at the end that of the last step."""
    law: Any = trajectory.law
    steps, links = law.temperature.shape[0], trajectory.positions.shape[0] - 1
    return law.temperature[np.minimum(np.arange(links + 1) * (steps // links), steps - 1)]


def _energies(trajectory: Trajectory, potential: Any) -> Float[Array, "snapshots n"]:
    """Φ of every member at every snapshot, outside the jumps at the ends."""
    positions = trajectory.positions
    if not potential.moves:
        return jax.lax.map(jax.vmap(potential.energy), positions)

    def at_snapshot(s_and_members: tuple[Array, Array]) -> Array:
        s, members = s_and_members
        return jax.vmap(potential.at(s).energy)(members)

    inside = jax.lax.map(at_snapshot, (trajectory.times[1:-1], positions[1:-1]))
    start = jax.vmap(potential.at_start().energy)(positions[0])
    end = jax.vmap(potential.at_end().energy)(positions[-1])
    return jnp.concatenate([start[None], inside, end[None]])


def _entropies(trajectory: Trajectory, entropy: Any) -> Float[Array, "snapshots n"]:
    """The share of each member in H at every snapshot; 0 where H belongs to the ensemble alone."""
    if isinstance(entropy, TransportedEntropy):
        return jnp.zeros(trajectory.positions.shape[:2], trajectory.positions.dtype)
    return jax.lax.map(
        lambda members: entropy.checked_estimate(members).contributions, trajectory.positions
    )


def _transported(
    trajectory: Trajectory, potential: Any, entropy: TransportedEntropy, velocity: Any
) -> Float[Array, " snapshots"]:
    """H(s) = H(0) + ∫ E[∇·v] ds at every snapshot."""
    divergence = member_rates(trajectory, GaussianTransport(), velocity, potential).divergence
    if divergence is None:
        raise refuse(
            "velocity",
            "know its divergence, which TransportedEntropy follows",
            f"is {type(velocity).__name__}",
        )
    start = entropy.start.checked_estimate(trajectory.positions[0]).value
    gained = _trapezoids(jnp.mean(divergence, axis=1), spans(trajectory))
    return jnp.concatenate([start[None], start + jnp.cumsum(gained)])


def _entropies_without(
    trajectory: Trajectory,
    potential: Any,
    entropy: TransportedEntropy,
    velocity: Any,
    subsets: Int[Array, "groups kept"],
) -> Float[Array, "groups snapshots"]:
    """The transported entropy of each of the subsets of the members."""

    def of_subset(kept: Array) -> Array:
        fewer = eqx.tree_at(lambda run: run.positions, trajectory, trajectory.positions[:, kept])
        return _transported(fewer, potential, entropy, velocity)

    return jax.lax.map(of_subset, subsets)


def _dissipation(
    trajectory: Trajectory, potential: Any, velocity: AbstractVelocity
) -> tuple[Array, Array | None]:
    """D = ∫ g² du, the share of each member: of every link (n, J), and in all from every second
    snapshot (n,), if their number allows it.

    With an even number of links, each pair of them is extrapolated from its trapezoids and that
    over both, as Σ is in `velocities`.
    """
    rates = member_rates(trajectory, GaussianTransport(), velocity, potential)
    learning_times = spans(trajectory)[:, None]
    along = _trapezoids(rates.whole, learning_times)
    if learning_times.shape[0] % 2:
        return along.T, None
    pairs = learning_times[::2] + learning_times[1::2]
    coarse = _trapezoids(rates.whole[::2], pairs)
    if rates.smooth:
        missed = (along[::2] + along[1::2] - coarse) / 3
        shares = safe_divide(learning_times, jnp.repeat(pairs, 2, axis=0))
        along = along + shares * jnp.repeat(missed, 2, axis=0)
    return along.T, jnp.sum(coarse, axis=0)


def _chain(
    trajectory: Trajectory,
    stride: int,
    transport: AbstractTransport,
    subsets: Int[Array, "groups kept"] | None = None,
) -> Array:
    """D = dist²/U of every link, or of every two for a `stride` of 2, (J,); of each of some subsets
    of the members, (groups, J)."""
    pairs = [(j, j + stride) for j in range(0, trajectory.positions.shape[0] - 1, stride)]
    squared = of_pairs(_squared, trajectory, transport, pairs, subsets)
    learning_times = spans(trajectory)
    if stride == 2:
        learning_times = learning_times[::2] + learning_times[1::2]
    return safe_divide(squared, learning_times)


def _squared(transport: AbstractTransport, x: Array, y: Array) -> Array:
    return solution_of(transport, x, y).squared


def _trapezoids(values: Array, learning_times: Array) -> Array:
    """∫ over each link between the rows of `values`."""
    return learning_times * (values[1:] + values[:-1]) / 2


def _source(entropy: Any, velocity: Any, transport: Any, links: int) -> str:
    name = type(entropy).__name__
    if isinstance(entropy, TransportedEntropy):
        name = f"{name} from {type(entropy.start).__name__}"
    dissipation = "" if velocity is None else f" and {type(velocity).__name__}"
    if transport is not None:
        dissipation = f" and a chain in {transport.name}"
    return f"{name}{dissipation} at {links + 1} snapshots"


def _mean(reports: FreeEnergy) -> FreeEnergy:
    # Numbers that all share (times, temperatures) stay exactly the same.
    return jax.tree.map(average, reports)


def _with_errors(report: FreeEnergy, replicates: FreeEnergy, words: str) -> FreeEnergy:
    """The report with the standard errors of a mean over the leading axis of `replicates`."""
    values = {name: getattr(replicates, name) for name in NUMBERS}
    errors = jax.tree.map(lambda x: jnp.std(x, axis=0, ddof=1) / np.sqrt(x.shape[0]), values)
    return dataclasses.replace(report, standard_error=StandardErrors(errors), errors=words)


def _check(
    trajectory: Trajectory, potential: Any, entropy: Any, velocity: Any, transport: Any
) -> None:
    check_potential("potential", potential)
    if trajectory.observed:
        raise refuse(
            "trajectory",
            "hold the positions of the members",
            "is a run observed in features, whose energies are gone",
        )
    if trajectory.rates is None:
        raise refuse(
            "trajectory",
            "come from simulate(...), with its rates and temperatures",
            "was recorded without them",
        )
    if trajectory.law is None:
        raise refuse(
            "trajectory",
            "come from a rule with a law, such as Langevin(...), whose mobility and temperature "
            "the balance needs",
            "its rule claims none",
        )
    if potential.moves and trajectory.work_of_links is None:
        raise refuse(
            "trajectory",
            "hold the work of a potential that moves, as simulate(...) counts it",
            "was made without work_of_links",
        )
    if not isinstance(entropy, AbstractEntropy | TransportedEntropy):
        raise refuse(
            "entropy", "be an entropy estimator such as GaussianEntropy()", f"is {entropy!r}"
        )
    if velocity is not None:
        must = "be a velocity estimator such as AffineVelocity()"
        check_kind("velocity", velocity, AbstractVelocity, must)
        if velocity.between:
            must = "estimate at snapshots, where the energies are, as AffineVelocity() does"
            raise refuse(
                "velocity", must, f"is {type(velocity).__name__}, which estimates on links"
            )
    if isinstance(entropy, TransportedEntropy) and velocity is None:
        raise refuse(
            "velocity", "be given beside TransportedEntropy, which follows it", "is missing"
        )
    if transport is not None and velocity is not None:
        raise refuse(
            "transport",
            "stand alone, as D comes from it or from a velocity",
            f"is given beside {type(velocity).__name__}",
        )
    if transport is not None:
        n, d = trajectory.positions.shape[-2:]
        check_transport("transport", transport, n, d, trajectory.positions.dtype)
        check_room(transport, n, d, trajectory.positions.dtype)
        if not transport.linear or transport.projection is not None:
            raise refuse(
                "transport",
                "be a transport between whole members, such as GaussianTransport()",
                f"is a {transport.name}",
            )
    if trajectory.positions.shape[-2] < 4:
        raise refuse(
            "trajectory",
            "hold at least 4 members for an entropy",
            f"holds {trajectory.positions.shape[-2]}",
        )
