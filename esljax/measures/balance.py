r"""The report of the free-energy monitor: F = E Φ - T H over training time, and its balance.

    dF/ds = E[∂_s Φ] - (dT/ds) H - E‖v‖²/η        hence        D = F₀ - F₁ + work + tempering
    work = ∫ E[∂_s Φ] ds        tempering = -∫ (dT/ds) H ds        D = ∫ E‖v‖²/η ds

The left side is measured from velocities (or a chain of transport distances), the right side from
energies and entropies. With a fixed potential and temperature the whole drop of F is dissipated;
ΔE and Δ(TH) are then book-keeping, and no part of the drop is reversible. Source: Okanohara, arXiv
2601.17607.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import known
from esljax._types import Array, Float
from esljax.results import StandardErrors, measured, table

# The numbers of a report that have standard errors.
NUMBERS = (
    "energy",
    "entropy",
    "free_energy",
    "energy_change",
    "heat_content_change",
    "free_energy_change",
    "work",
    "heat",
    "tempering",
    "dissipation_by_balance",
    "entropy_production_by_balance",
    "dissipation",
    "residual",
)

# The former name of the class of `FreeEnergy.standard_error`, for one release.
Balance = StandardErrors

_PRINTED = {
    "ΔE": "energy_change",
    "Δ(TH)": "heat_content_change",
    "ΔF = ΔE - Δ(TH)": "free_energy_change",
    "work ∫E[∂Φ/∂s]ds": "work",
    "heat ΔE - work": "heat",
    "tempering -∫H dT": "tempering",
    "D = work + tempering - ΔF": "dissipation_by_balance",
    "D measured": "dissipation",
    "residual": "residual",
    "Σ by balance": "entropy_production_by_balance",
}
# The printed table has at most this many rows; the fields hold all snapshots.
_ROWS = 11


class FreeEnergy(eqx.Module):
    """E, H and F = E - T H at the snapshots of a run, and its balance.

    `print` shows a table; every number differentiates. Energies are in units of the potential,
    entropies in nats. Numbers without a shape have shape (). Reports of several runs made by
    `jax.vmap` carry the axes of the runs first. If a `Driven` potential jumps at its ends, the
    first row is before and the last row after the jump.
    """

    times: Float[Array, "*runs snapshots"]
    """The training times s_j of the snapshots, shape (J+1,), from 0 to 1."""
    temperature: Float[Array, "*runs snapshots"]
    """T at these times, shape (J+1,), in units of the potential; at s = 1 the last that acted."""
    mobility: Float[Array, "*runs J"]
    """The learning time per unit of training time of each link, the mean of η(s) over it, shape
    (J,), in units of θ² per unit of the potential."""
    energy: Float[Array, "*runs snapshots"]
    """E Φ at the snapshots, over all data, shape (J+1,)."""
    entropy: Float[Array, "*runs snapshots"]
    """H at the snapshots, in nats, shape (J+1,)."""
    work_of_links: Float[Array, "*runs J"]
    """∫ E[∂_s Φ] ds of each link, exact for the steps of the run, jumps at the ends included, shape
    (J,)."""
    dissipation_of_links: Float[Array, "*runs J"] | None
    """D of each link from velocities or transport, shape (J,). None if the call asked for
    neither."""
    dissipation_coarse: Float[Array, "*runs"] | None = None
    """D from every second snapshot. None if D was not measured or the number of links is odd."""
    standard_error: StandardErrors | None = None
    """Standard errors under the names of the numbers, each of the shape and units of its number:
    `energy`, `entropy` and `free_energy`, shape (J+1,); `energy_change`, `heat_content_change`,
    `free_energy_change`, `work`, `heat`, `tempering`, `dissipation_by_balance`,
    `entropy_production_by_balance`, and, unless D was not measured, `dissipation` and `residual`.
    None altogether if groups of members were to be left out, but `jackknife` is 0 or the members
    are too few."""
    source: str = eqx.field(static=True, default="")
    """How these numbers were made, in words."""
    errors: str = eqx.field(static=True, default="none")
    """How the standard errors were taken, in words, such as "over 50 members"; "none" without
    errors."""

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
        """Δ(TH) = T₁H₁ - T₀H₀."""
        return self.heat_content[..., -1] - self.heat_content[..., 0]

    @property
    def free_energy_change(self) -> Float[Array, "*runs"]:
        """ΔF = F₁ - F₀."""
        return self.free_energy[..., -1] - self.free_energy[..., 0]

    @property
    def work(self) -> Float[Array, "*runs"]:
        """∫ E[∂_s Φ] ds: the energy that the drive puts in."""
        return jnp.sum(self.work_of_links, axis=-1)

    @property
    def heat(self) -> Float[Array, "*runs"]:
        """ΔE - work: the energy that the members gain by moving; negative where the bath gains
        it."""
        return self.energy_change - self.work

    @property
    def tempering_of_links(self) -> Float[Array, "*runs J"]:
        """-∫ H dT of each link."""
        change = jnp.diff(self.temperature, axis=-1)
        # An entropy of -inf (members in one point) costs nothing at a constant temperature.
        return jnp.where(
            change != 0, -change * (self.entropy[..., 1:] + self.entropy[..., :-1]) / 2, 0
        )

    @property
    def tempering(self) -> Float[Array, "*runs"]:
        """-∫ (dT/ds) H ds: the effect of a changing temperature on F."""
        return jnp.sum(self.tempering_of_links, axis=-1)

    @property
    def balance_of_links(self) -> Float[Array, "*runs J"]:
        """D of each link from energies and entropies, F_j - F_{j+1} + work_j + tempering_j."""
        drop = self.free_energy[..., :-1] - self.free_energy[..., 1:]
        return drop + self.work_of_links + self.tempering_of_links

    @property
    def dissipation_by_balance(self) -> Float[Array, "*runs"]:
        """D = F₀ - F₁ + work + tempering."""
        return jnp.sum(self.balance_of_links, axis=-1)

    @property
    def entropy_production_by_balance(self) -> Float[Array, "*runs"]:
        """Σ = ∫ η dD from the same, in units of θ², with the mean mobility of each link: exact for
        constant learning rates, to order 1/J² for others."""
        return jnp.sum(self.mobility * self.balance_of_links, axis=-1)

    @property
    def dissipation(self) -> Float[Array, "*runs"] | None:
        """D from velocities or transport. None if the call asked for neither."""
        if self.dissipation_of_links is None:
            return None
        return jnp.sum(self.dissipation_of_links, axis=-1)

    @property
    def residual(self) -> Float[Array, "*runs"] | None:
        """F₀ - F₁ + work + tempering - D. It is 0 but for sampling, the spacing of snapshots and
        the finite steps of the run. None if D was not measured."""
        return None if self.dissipation is None else self.dissipation_by_balance - self.dissipation

    def verdict(self) -> str:
        """Whether the balance closes and by how many standard errors, and which numbers are in
        doubt, in words."""
        if not _is_one_run(self):
            return "Several runs in one report: index or average them before asking for a verdict."
        return " ".join(_sentences(self))

    def __str__(self) -> str:
        if not _is_one_run(self):
            return repr(self)
        heading = f"free energy by {self.source}; standard errors: {self.errors}"
        return "\n".join([heading, _over_time(self), _balance(self), self.verdict()])


# --- The printed report ---------------------------------------------------------------------------


def _is_one_run(report: FreeEnergy) -> bool:
    energy = report.energy
    return isinstance(energy, jax.Array | np.ndarray) and known(energy) and energy.ndim == 1


def _over_time(report: FreeEnergy) -> str:
    """E, H and F at eleven snapshots, as a table."""
    count = report.times.shape[0]
    rows: list[tuple[str, ...]] = [("s", "T", "E", "H", "F = E - T H")]
    for j in np.unique(np.linspace(0, count - 1, min(count, _ROWS)).round().astype(int)):
        cells = (_measured(report, name, j) for name in ("energy", "entropy", "free_energy"))
        controls = (f"{float(report.times[j]):.3f}", f"{float(report.temperature[j]):.5g}")
        rows.append((*controls, *cells))
    return table(rows, align="rrrrr")


def _balance(report: FreeEnergy) -> str:
    names = {label: name for label, name in _PRINTED.items() if getattr(report, name) is not None}
    return table([(label, _measured(report, name)) for label, name in names.items()])


def _measured(report: FreeEnergy, name: str, row: Any = ...) -> str:
    errors = None if report.standard_error is None else report.standard_error.get(name)
    return measured(getattr(report, name)[row], None if errors is None else errors[row])


def _sentences(report: FreeEnergy) -> list[str]:
    if not np.isfinite(float(report.dissipation_by_balance)):
        return [
            "No verdict: the numbers are not finite; members that coincide or lie in a plane have "
            "no entropy."
        ]
    if report.dissipation is None or report.residual is None:
        closing = [
            "Energies and entropies give a dissipation of "
            f"{float(report.dissipation_by_balance):.4g}; nothing checks it here."
        ]
    else:
        dissipation = float(report.dissipation)
        closing = [
            _on_the_residual(report, float(report.residual), dissipation),
            *_on_spacing(report, dissipation),
        ]
    return [*closing, _on_the_controls(report)]


def _on_the_residual(report: FreeEnergy, residual: float, dissipation: float) -> str:
    error = 0.0 if report.standard_error is None else float(report.standard_error.residual)
    share = f"{abs(residual) / max(abs(dissipation), 1e-300):.2g} of D"
    if not error > 0:
        return f"The books balance to {share}; no standard error to judge that by."
    size = abs(residual) / error
    if size <= 3:
        return f"The books balance: the residual is {size:.1f} standard errors, {share}."
    return (
        f"The books do not balance: the residual is {size:.1f} standard errors, {share}; an "
        "estimate of E, H or D is off."
    )


def _on_spacing(report: FreeEnergy, dissipation: float) -> list[str]:
    if report.dissipation_coarse is None:
        return []
    # The error of a chain falls as 1/J², so a third of the last change is all that further halvings
    # would add; that of extrapolated velocities falls faster.
    change = dissipation - float(report.dissipation_coarse)
    return [
        f"Halving the number of snapshots changes D by {change:.2g}, so spacing still hides "
        f"{change / 3:.1g} at most."
    ]


def _on_the_controls(report: FreeEnergy) -> str:
    temperature = np.asarray(report.temperature)
    if np.all(temperature == temperature[0]) and not np.any(np.asarray(report.work_of_links)):
        return "Potential and temperature are fixed, so the whole drop of F is dissipation."
    return (
        "Work and tempering are what the controls did to F; the rest of its change was dissipated."
    )
