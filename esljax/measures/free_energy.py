r"""The free-energy monitor: F = E Φ - T H of an ensemble over training time, and the balance that checks its dissipation.

    dF/ds = E[∂_s Φ] - (dT/ds) H - E‖v‖²/η        hence        D = F₀ - F₁ + work + tempering
    work = ∫ E[∂_s Φ] ds        tempering = -∫ (dT/ds) H ds        D = ∫ E‖v‖²/η ds

The left side is measured from velocities (or a chain of transport distances), the right side from energies and entropies. With a fixed
potential and temperature the whole drop of F is dissipated; ΔE and Δ(TH) are then book-keeping, and no part of the drop is reversible.

Work is summed over the links between snapshots, as the change of the potential averaged over the members of both ends,

    work_j = ½ (E_{q_j} + E_{q_{j+1}}) [Φ_{j+1} - Φ_j],

which is the trapezoidal rule for ∫ E[∂_s Φ] ds (error ∝ 1/J²) where the drive is smooth, needs no derivative where it is not, and keeps
the first law exact on samples: ΔE = work + heat with heat_j the change of ½ (Φ_j + Φ_{j+1}) along the members' paths (Sekimoto, Prog.
Theor. Phys. Suppl. 130, 17 (1998)). The jumps of a `Driven` potential at its ends add E_{q_0}[Φ_0 - Φ_before] and
E_{q_J}[Φ_after - Φ_J] exactly.

Every number is a mean over members of a sum over time, so its standard error counts the correlations along a path. Source: Okanohara, arXiv
2601.17607.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import known, refuse
from esljax._types import Array, Float
from esljax.density import AbstractEntropy, TransportedEntropy
from esljax.measures.report import jackknife_groups
from esljax.measures.velocities import learning_clock, member_rates
from esljax.potentials import AbstractPotential, Driven
from esljax.sharding import bring, map_pairs
from esljax.simulation import Trajectory, check_runs, on_devices, stack
from esljax.transport import (
    AbstractTransport,
    GaussianTransport,
    MappedTransport,
    ProjectedTransport,
)
from esljax.velocity import AbstractVelocity


class Balance(eqx.Module):
    """One number for each part of a `FreeEnergy`: here the standard errors. (J+1,) for the first three, shape () for the others."""

    energy: Float[Array, "*runs snapshots"]
    entropy: Float[Array, "*runs snapshots"]
    free_energy: Float[Array, "*runs snapshots"]
    energy_change: Float[Array, "*runs"]
    heat_content_change: Float[Array, "*runs"]
    free_energy_change: Float[Array, "*runs"]
    work: Float[Array, "*runs"]
    heat: Float[Array, "*runs"]
    tempering: Float[Array, "*runs"]
    dissipation_by_balance: Float[Array, "*runs"]
    entropy_production_by_balance: Float[Array, "*runs"]
    dissipation: Float[Array, "*runs"] | None
    residual: Float[Array, "*runs"] | None


class FreeEnergy(eqx.Module):
    """E, H and F = E - T H at the snapshots of a run, and its balance. `print` shows a table; every number differentiates.

    Energies are in units of the potential, entropies in nats. Where a `Driven` potential jumps at its ends, the first row is before and the
    last row after the jump.
    """

    times: Float[Array, "*runs snapshots"]
    """The training times s_j of the snapshots, (J+1,)."""
    temperature: Float[Array, "*runs snapshots"]
    """T at these times; at s = 1 the last that acted."""
    mobility: Float[Array, "*runs J"]
    """The learning time per unit of training time of each link, the mean of η(s) over it."""
    energy: Float[Array, "*runs snapshots"]
    """E Φ."""
    entropy: Float[Array, "*runs snapshots"]
    """H."""
    work_of_links: Float[Array, "*runs J"]
    """∫ E[∂_s Φ] ds of each link, jumps at the ends included."""
    dissipation_of_links: Float[Array, "*runs J"] | None
    """D of each link from velocities or transport; None if neither was asked for."""
    dissipation_coarse: Float[Array, "*runs"] | None = None
    """D from every second snapshot, if their number allows it."""
    standard_error: Balance | None = None
    """Standard errors under the same names."""
    source: str = eqx.field(static=True, default="")
    """What made these numbers, in words."""
    errors: str = eqx.field(static=True, default="none")
    """What the standard errors are taken over, in words."""

    @property
    def heat_content(self) -> Float[Array, "*runs snapshots"]:
        """T H at the snapshots; 0 where T = 0, also for members in one point."""
        return jnp.where(self.temperature > 0, self.temperature * self.entropy, 0)

    @property
    def free_energy(self) -> Float[Array, "*runs snapshots"]:
        """F = E Φ - T H at the snapshots."""
        return self.energy - self.heat_content

    @property
    def energy_change(self) -> Float[Array, "*runs"]:
        """ΔE = E₁ - E₀."""
        return self.energy[..., -1] - self.energy[..., 0]

    @property
    def heat_content_change(self) -> Float[Array, "*runs"]:
        """T₁H₁ - T₀H₀."""
        return self.heat_content[..., -1] - self.heat_content[..., 0]

    @property
    def free_energy_change(self) -> Float[Array, "*runs"]:
        """F₁ - F₀."""
        return self.free_energy[..., -1] - self.free_energy[..., 0]

    @property
    def work(self) -> Float[Array, "*runs"]:
        """∫ E[∂_s Φ] ds: the energy that the drive puts in."""
        return jnp.sum(self.work_of_links, axis=-1)

    @property
    def heat(self) -> Float[Array, "*runs"]:
        """ΔE - work: the energy that the members take up by moving; negative where they give it to the bath."""
        return self.energy_change - self.work

    @property
    def tempering_of_links(self) -> Float[Array, "*runs J"]:
        """-∫ H dT of each link."""
        change = jnp.diff(self.temperature, axis=-1)
        # An entropy of -inf (members in one point) costs nothing where the temperature stands still.
        return jnp.where(
            change != 0, -change * (self.entropy[..., 1:] + self.entropy[..., :-1]) / 2, 0
        )

    @property
    def tempering(self) -> Float[Array, "*runs"]:
        """-∫ (dT/ds) H ds: what a change of temperature does to F."""
        return jnp.sum(self.tempering_of_links, axis=-1)

    @property
    def balance_of_links(self) -> Float[Array, "*runs J"]:
        """D of each link as it follows from energies and entropies, F_j - F_{j+1} + work_j + tempering_j."""
        return (
            self.free_energy[..., :-1]
            - self.free_energy[..., 1:]
            + self.work_of_links
            + self.tempering_of_links
        )

    @property
    def dissipation_by_balance(self) -> Float[Array, "*runs"]:
        """D = F₀ - F₁ + work + tempering."""
        return jnp.sum(self.balance_of_links, axis=-1)

    @property
    def entropy_production_by_balance(self) -> Float[Array, "*runs"]:
        """Σ = ∫ η dD from the same, with the mean mobility of each link: exact for constant learning rates, to order 1/J² for others."""
        return jnp.sum(self.mobility * self.balance_of_links, axis=-1)

    @property
    def dissipation(self) -> Float[Array, "*runs"] | None:
        """D from velocities or transport."""
        return (
            None
            if self.dissipation_of_links is None
            else jnp.sum(self.dissipation_of_links, axis=-1)
        )

    @property
    def residual(self) -> Float[Array, "*runs"] | None:
        """F₀ - F₁ + work + tempering - D, which is 0 but for sampling, the spacing of snapshots and the finite steps of the run."""
        return None if self.dissipation is None else self.dissipation_by_balance - self.dissipation

    def verdict(self) -> str:
        """In words: whether the books balance and by how many standard errors, and what casts doubt on the numbers."""
        if not self._is_one_run():
            return "Several runs in one report: index or average them before asking for a verdict."
        return " ".join(self._sentences())

    def __str__(self) -> str:
        if not self._is_one_run():
            return repr(self)
        lines = [f"free energy by {self.source}; standard errors: {self.errors}"]
        lines.append(f"{'s':>6}{'T':>12}{'E':>24}{'H':>24}{'F = E - T H':>24}")
        count = self.times.shape[0]
        # Eleven rows show a run; all numbers are in the fields.
        for j in np.unique(np.linspace(0, count - 1, min(count, 11)).round().astype(int)):
            cells = "".join(
                f"{self._number(name, j):>24}" for name in ("energy", "entropy", "free_energy")
            )
            lines.append(f"{float(self.times[j]):>6.3f}{float(self.temperature[j]):>12.5g}{cells}")
        rows = [
            ("ΔE", "energy_change"),
            ("Δ(TH)", "heat_content_change"),
            ("ΔF = ΔE - Δ(TH)", "free_energy_change"),
            ("work ∫E[∂Φ/∂s]ds", "work"),
            ("heat ΔE - work", "heat"),
            ("tempering -∫H dT", "tempering"),
            ("D = work + tempering - ΔF", "dissipation_by_balance"),
            ("D measured", "dissipation"),
            ("residual", "residual"),
            ("Σ by balance", "entropy_production_by_balance"),
        ]
        lines += [
            f"{label:<28}{self._number(name):>24}"
            for label, name in rows
            if getattr(self, name) is not None
        ]
        return "\n".join([*lines, self.verdict()])

    def _number(self, name: str, row: Any = None) -> str:
        value, error = getattr(self, name), getattr(self.standard_error, name, None)
        value, error = (
            (value, error) if row is None else (value[row], None if error is None else error[row])
        )
        return f"{float(value):.6g}" + ("" if error is None else f" ± {float(error):.2g}")

    def _is_one_run(self) -> bool:
        return known(self.energy) and np.ndim(self.energy) == 1

    def _sentences(self) -> list[str]:
        if not np.isfinite(float(self.dissipation_by_balance)):
            return [
                "No verdict: the numbers are not finite; members that coincide or lie in a plane have no entropy."
            ]
        said = []
        if self.residual is None or self.dissipation is None:
            said.append(
                f"Energies and entropies say that {float(self.dissipation_by_balance):.4g} was dissipated; nothing checks it here."
            )
        else:
            residual, error = (
                float(self.residual),
                None if self.standard_error is None else self.standard_error.residual,
            )
            size = abs(residual) / float(error) if error is not None and float(error) > 0 else None
            share = f"{abs(residual) / max(abs(float(self.dissipation)), 1e-300):.2g} of D"
            if size is None:
                said.append(f"The books balance to {share}; no standard error to judge that by.")
            elif size <= 3:
                said.append(
                    f"The books balance: the residual is {size:.1f} standard errors, {share}."
                )
            else:
                said.append(
                    f"The books do not balance: the residual is {size:.1f} standard errors, {share}; an estimate of E, H or D is off."
                )
            if self.dissipation_coarse is not None:
                # The trapezoidal rule's error falls as 1/J², so a third of the last change is what all further halvings would add.
                change = float(self.dissipation) - float(self.dissipation_coarse)
                said.append(
                    f"Halving the number of snapshots changes D by {change:.2g}, so spacing still hides about {change / 3:.1g}."
                )
        if not bool(
            np.all(np.asarray(self.temperature) == np.asarray(self.temperature)[0])
        ) or float(jnp.max(jnp.abs(self.work_of_links))):
            said.append(
                "Work and tempering are what the controls did to F; the rest of its change was dissipated."
            )
        else:
            said.append(
                "Potential and temperature are fixed, so the whole drop of F is dissipation."
            )
        return said


def free_energy(
    trajectory: Trajectory | Sequence[Trajectory],
    potential: AbstractPotential | Driven,
    *,
    entropy: AbstractEntropy | TransportedEntropy,
    velocity: AbstractVelocity | None = None,
    transport: AbstractTransport | None = None,
    jackknife: int = 32,
) -> FreeEnergy:
    """Follow the free energy of a run and hold its drop against what was dissipated.

    **Args:**
    - `trajectory`: one run, or several: a sequence, or one made by `jax.vmap(simulate)` with positions (runs, J+1, n, d).
    - `potential`: the potential of the run; energies are over all its data, whatever batches the run saw.
    - `entropy`: what estimates H at every snapshot, or `TransportedEntropy(start)`, which follows it along `velocity`.
    - `velocity`: what estimates D at every snapshot, on the clock of learning time, as in `speed_limit`.
    - `transport`: instead of `velocity`, D from the chain Σ_j dist²/U_j, a lower bound but for sampling noise. Without either, D is known
      by balance alone.
    - `jackknife`: with a `transport` or a `TransportedEntropy`, the most groups of members left out in turn for the standard errors, each
      of which repeats that estimate; 0 for no errors. Without them errors are taken over members and cost nothing.

    **Returns:** `FreeEnergy`; `print` shows it with a verdict. Of several runs, the mean of each number, with errors from their spread.
    **Raises:** `InputError` for observed runs (whose positions are gone), members that are not finite, and estimators that do not fit.
    **Differentiation:** in the trajectory, and so in whatever made it, and in the potential: forward and reverse where the entropy, the
    velocity and the transport are. Put the call inside the function that is differentiated, with `simulate` before it.

    **Example:**

        >>> report = free_energy(path, potential, entropy=GaussianEntropy(), velocity=AffineVelocity())
        >>> print(report)
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = stack(trajectory)
    check_runs(trajectory, jackknife)
    _check(trajectory, potential, entropy, velocity, transport)
    trajectory = on_devices(trajectory)
    potential, entropy, velocity, transport = bring(
        (potential, entropy, velocity, transport), trajectory.mesh
    )
    if trajectory.positions.ndim == 3:
        return _of_one(trajectory, potential, entropy, velocity, transport, jackknife)
    return _of_several(trajectory, potential, entropy, velocity, transport)


@eqx.filter_jit
def _of_one(trajectory, potential, entropy, velocity, transport, jackknife: int) -> FreeEnergy:
    each = _of_each_member(trajectory, potential, entropy, velocity, transport)
    members = trajectory.positions.shape[1]
    of_all = _of_all_members(trajectory, potential, entropy, velocity, transport)
    report = _replaced(_mean(each), **of_all)
    jointly = [name for name in ("entropy", "dissipation_of_links") if name in of_all]
    if not jointly:
        return _with_errors(report, each, f"over {members} members")
    # Entropies need four members.
    kept = jackknife_groups(members, jackknife, least=4)
    if kept is None:
        return report
    groups, size = kept.shape[0], members - kept.shape[1]

    def without(rows):
        fewer = eqx.tree_at(lambda run: run.positions, trajectory, trajectory.positions[:, rows])
        return {
            "entropy": _of_all_members(fewer, potential, entropy, velocity, transport)["entropy"]
        }

    if transport is None:
        left = jax.lax.map(without, jnp.asarray(kept))
    else:
        left = {
            "dissipation_of_links": _chain(
                trajectory, 1, _spans(trajectory), transport, jnp.asarray(kept)
            )
        }
    # What is no mean over members is made one over groups by the pseudo-values of the jackknife (Tukey, 1958).
    pseudo = {name: groups * of_all[name] - (groups - 1) * left[name] for name in jointly}
    grouped = jax.tree.map(
        lambda x: jnp.mean(x[: groups * size].reshape(groups, size, *x.shape[1:]), axis=1), each
    )
    return _with_errors(
        report,
        _replaced(grouped, **pseudo),
        f"jackknife over {groups} groups of {size} of {members} members",
    )


@eqx.filter_jit
def _of_several(trajectory, potential, entropy, velocity, transport) -> FreeEnergy:
    def one(trajectory):
        each = _of_each_member(trajectory, potential, entropy, velocity, transport)
        return _replaced(
            _mean(each), **_of_all_members(trajectory, potential, entropy, velocity, transport)
        )

    reports = jax.lax.map(one, trajectory)
    return _with_errors(
        _mean(reports), reports, f"spread over {trajectory.positions.shape[0]} independent runs"
    )


def _of_each_member(
    trajectory: Trajectory, potential: Any, entropy: Any, velocity: Any, transport: Any
) -> FreeEnergy:
    """What each member contributes to every number, on a leading axis of length n: the report is their mean."""
    energy, work = _energies(trajectory, potential)
    spans = _spans(trajectory)[:, None]
    links, members = spans.shape[0], energy.shape[1]
    rates = (
        None
        if velocity is None
        else member_rates(trajectory, GaussianTransport(), velocity, potential)
    )
    if isinstance(entropy, TransportedEntropy):
        entropies = jnp.zeros_like(energy)  # of all members together, to be filled in
    else:
        entropies = jax.lax.map(
            lambda members: entropy.checked_estimate(members).contributions, trajectory.positions
        )
    temperatures: Any = trajectory.temperatures
    steps = np.minimum(
        np.arange(links + 1) * (temperatures.shape[0] // links), temperatures.shape[0] - 1
    )
    coarse = spans[::2] + spans[1::2] if links % 2 == 0 else None

    def alike(x):
        return jnp.broadcast_to(x, (members, *x.shape))

    return FreeEnergy(
        times=alike(trajectory.times),
        temperature=alike(temperatures[steps]),
        mobility=alike(spans[:, 0] / jnp.diff(trajectory.times)),
        energy=energy.T,
        entropy=entropies.T,
        work_of_links=work.T,
        dissipation_of_links=None if rates is None else _trapezoids(rates.whole, spans).T,
        dissipation_coarse=None
        if rates is None or coarse is None
        else jnp.sum(_trapezoids(rates.whole[::2], coarse), axis=0),
        source=_source(entropy, velocity, transport, links),
    )


def _of_all_members(
    trajectory: Trajectory, potential: Any, entropy: Any, velocity: Any, transport: Any
) -> dict[str, Any]:
    """The numbers of a report that belong to the ensemble as a whole and are no mean over members."""
    found: dict[str, Any] = {}
    spans = _spans(trajectory)
    if isinstance(entropy, TransportedEntropy):
        divergence = member_rates(trajectory, GaussianTransport(), velocity, potential).divergence
        if divergence is None:
            raise refuse(
                "velocity",
                "know its divergence, which TransportedEntropy follows",
                f"is {type(velocity).__name__}",
            )
        start = entropy.start.checked_estimate(trajectory.positions[0]).value
        found["entropy"] = jnp.concatenate(
            [start[None], start + jnp.cumsum(_trapezoids(jnp.mean(divergence, axis=1), spans))]
        )
    if transport is not None:
        found["dissipation_of_links"] = _chain(trajectory, 1, spans, transport)
        if spans.size % 2 == 0:
            found["dissipation_coarse"] = jnp.sum(
                _chain(trajectory, 2, spans[::2] + spans[1::2], transport)
            )
    return found


def _energies(trajectory: Trajectory, potential: Any) -> tuple[Array, Array]:
    """Φ of every member at every snapshot (J+1, n), outside the jumps at the ends, and the work on it along every link (J, n)."""
    positions, times = trajectory.positions, trajectory.times
    if not isinstance(potential, Driven):
        energy = jax.lax.map(jax.vmap(potential.energy), positions)
        return energy, jnp.zeros_like(energy[1:])
    links = positions.shape[0] - 1

    def at_snapshot(j_and_members):
        j, members = j_and_members
        near = times[jnp.clip(jnp.stack([j - 1, j, j + 1]), 0, links)]
        return jax.lax.map(lambda s: jax.vmap(potential.at(s).energy)(members), near)

    earlier, now, later = jnp.moveaxis(
        jax.lax.map(at_snapshot, (jnp.arange(links + 1), positions)), 1, 0
    )
    start, end = (
        jax.vmap(potential.at_start().energy)(positions[0]),
        jax.vmap(potential.at_end().energy)(positions[-1]),
    )
    work = (later[:-1] - now[:-1] + now[1:] - earlier[1:]) / 2
    return now.at[0].set(start).at[-1].set(end), work.at[0].add(now[0] - start).at[-1].add(
        end - now[-1]
    )


def _chain(
    trajectory: Trajectory,
    stride: int,
    spans: Array,
    transport: AbstractTransport,
    subsets: Array | None = None,
) -> Array:
    """D of every link, or of every `stride` of them, from the transport between its ends; of some members if `subsets` lists them."""
    ends = np.arange(0, trajectory.positions.shape[0], stride)

    def solve(shared, x, y):
        transport, subsets = shared

        def one(x, y):
            return transport.solve(x, y).squared

        return (
            one(x, y)
            if subsets is None
            else jax.lax.map(lambda rows: one(x[rows], y[rows]), subsets)
        )

    # Members are left out where two snapshots lie whole already: elsewhere the history would be gathered for each group.
    shared, positions = (transport, subsets), trajectory.positions
    squared = map_pairs(
        solve, shared, positions, ends[:-1], ends[1:], trajectory.mesh, in_turn=transport.in_turn
    )
    squared = squared if subsets is None else squared.T
    return jnp.where(spans > 0, squared / jnp.where(spans > 0, spans, 1), 0)


def _source(entropy: Any, velocity: Any, transport: Any, links: int) -> str:
    named = type(entropy).__name__
    if isinstance(entropy, TransportedEntropy):
        named = f"{named} from {type(entropy.start).__name__}"
    measured = "" if velocity is None else f" and {type(velocity).__name__}"
    measured = measured if transport is None else f" and a chain in {type(transport).__name__}"
    return f"{named}{measured} at {links + 1} snapshots"


def _mean(reports: FreeEnergy) -> FreeEnergy:
    # About the first, so that what all have in common (times, temperatures) comes out as it went in.
    return jax.tree.map(lambda x: x[0] + jnp.mean(x - x[0], axis=0), reports)


def _with_errors(report: FreeEnergy, replicates: FreeEnergy, words: str) -> FreeEnergy:
    """Standard errors of a mean over the leading axis of `replicates`."""

    def error(x):
        return jnp.std(x, axis=0, ddof=1) / np.sqrt(x.shape[0])

    errors: dict[str, Any] = {
        name: jax.tree.map(error, getattr(replicates, name))
        for name in Balance.__dataclass_fields__
    }
    return _replaced(report, standard_error=Balance(**errors), errors=words)


def _replaced(report: FreeEnergy, **values: Any) -> FreeEnergy:
    return FreeEnergy(
        **{**{name: getattr(report, name) for name in FreeEnergy.__dataclass_fields__}, **values}
    )


def _trapezoids(values: Array, spans: Array) -> Array:
    """∫ over each span between the rows of `values`."""
    return spans * (values[1:] + values[:-1]) / 2


def _spans(trajectory: Trajectory) -> Float[Array, " J"]:
    """The learning time of each link."""
    clock = learning_clock(trajectory)
    return jnp.diff(clock[:: (clock.shape[0] - 1) // (trajectory.positions.shape[0] - 1)])


def _check(
    trajectory: Trajectory, potential: Any, entropy: Any, velocity: Any, transport: Any
) -> None:
    if not isinstance(potential, AbstractPotential | Driven):
        raise refuse(
            "potential", "be the potential of the run, such as Quadratic(1.0)", f"is {potential!r}"
        )
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
    if not isinstance(entropy, AbstractEntropy | TransportedEntropy):
        raise refuse(
            "entropy", "be an entropy estimator such as GaussianEntropy()", f"is {entropy!r}"
        )
    if velocity is not None and (not isinstance(velocity, AbstractVelocity) or velocity.between):
        raise refuse(
            "velocity", "be a velocity estimator such as AffineVelocity()", f"is {velocity!r}"
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
    if transport is not None and (
        not isinstance(transport, AbstractTransport)
        or isinstance(transport, MappedTransport | ProjectedTransport)
    ):
        raise refuse(
            "transport",
            "be a transport between whole members, such as GaussianTransport()",
            f"is a {type(transport).__name__}",
        )
    if trajectory.positions.shape[-2] < 4:
        raise refuse(
            "trajectory",
            "hold at least 4 members for an entropy",
            f"holds {trajectory.positions.shape[-2]}",
        )
