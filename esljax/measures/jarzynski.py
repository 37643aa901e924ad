r"""Free-energy differences from work alone, by the Jarzynski equality.

    ΔF = -T log ⟨e^{-W/T}⟩,     ⟨W⟩ - ΔF ≥ 0 is dissipated

The mean is over members that start in equilibrium in the potential before the run, and W is the
work on each of them (`Trajectory.work`). ΔF is the difference of the equilibrium free energies of
the potentials after and before the run, however far from equilibrium the members are driven.

The mean of an exponential rests on the few members of least work. From n members ΔF errs upward on
average, by about T var(e^{-W/T})/(2n ⟨e^{-W/T}⟩²) where the members are many and by more where they
are few, so the estimate carries its bias and the effective number of members that it rests on.
Source: Jarzynski, PRL 78, 2690 (1997).
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import door, known, refuse
from esljax._types import Array, Float, Scalar
from esljax.results import StandardErrors, is_number, measured, table
from esljax.sharding import replicate
from esljax.simulation import Trajectory, check_runs, on_devices, stack

# With fewer effective members, unless they are most of all, the interval of two standard errors
# covers the truth in less than 90 % of ensembles: in 73 to 88 % at 10 to 30 (Gaussian work).
_FEW = 50

_PRINTED = {
    "ΔF": "free_energy_change",
    "work ⟨W⟩": "work",
    "dissipated ⟨W⟩ - ΔF": "dissipated_work",
    "bias of ΔF": "bias",
    "effective members": "effective_members",
}


class Jarzynski(eqx.Module):
    """A difference of free energies from work, with its error and its bias. `print` shows a table.

    All numbers have shape () and, but for the number of members, the units of the potential.
    """

    free_energy_change: Scalar
    """ΔF = -T log ⟨e^{-W/T}⟩. Its mean over many ensembles lies above the truth by about `bias`,
    which is not subtracted."""
    work: Scalar
    """⟨W⟩, the mean work, without bias."""
    bias: Scalar
    """An estimate of the bias of `free_energy_change` by the jackknife (Quenouille, 1956). It sees
    the part of order 1/n, so it is too small if `effective_members` are few."""
    effective_members: Scalar
    """(Σ w)²/Σ w² with w = e^{-W/T}: how many members the mean of the exponential rests on, from 1
    to all of them."""
    standard_error: StandardErrors
    """Standard errors of `free_energy_change`, `work` and `dissipated_work`, by the jackknife."""
    members: int = eqx.field(static=True)
    """How many members the means are over, of all runs together."""
    errors: str = eqx.field(static=True)
    """How the standard errors were taken, in words."""

    @property
    def dissipated_work(self) -> Scalar:
        """⟨W⟩ - ΔF: the work that a reversible process would not need. With its bias removed it is
        not negative, but for its error."""
        return self.work - self.free_energy_change

    def verdict(self) -> str:
        """How far ΔF can be trusted, in words."""
        effective, error = float(self.effective_members), self.standard_error.free_energy_change
        rests = f"ΔF rests on about {effective:.3g} of {self.members} members"
        if effective < min(_FEW, self.members / 2):
            return (
                f"{rests}, too few to trust its error and its bias: take it as an upper value. "
                "Drive more slowly, or use many more members."
            )
        if abs(float(self.bias)) > float(error) / 2:
            return f"{rests}; its bias is {abs(float(self.bias)) / float(error):.2g} of its error."
        return f"{rests}; its bias is small against its error."

    def __str__(self) -> str:
        if not is_number(self.work):
            return repr(self)
        heading = f"free energy by the Jarzynski equality; standard errors: {self.errors}"
        cells = [
            (label, measured(getattr(self, name), self.standard_error.get(name)))
            for label, name in _PRINTED.items()
        ]
        return "\n".join([heading, table(cells), self.verdict()])


@door
def jarzynski(trajectory: Trajectory | Sequence[Trajectory]) -> Jarzynski:
    """Estimate the difference of equilibrium free energies from the work of a run.

    ΔF = -T log ⟨e^{-W/T}⟩ over members that start in equilibrium at temperature T in the potential
    before the run (`potential.at_start()`); no density is estimated. Neither the start nor the
    batches are checked: noise of batches heats the members beyond T, and the equality then fails,
    as it does by a share of order η for large steps.

    **Args:** `trajectory`: one run, or several of one process: a sequence, or one made by
    `jax.vmap(simulate)`. Their members are pooled into one mean, whose bias is that of all of them
    together; errors leave the same member out of every run, so that runs may share their start.
    **Returns:** `Jarzynski`; `print` shows it with a verdict.
    **Raises:** `InputError` for a run whose work or law is not known, or whose temperature is 0 or
    changes, and for members without noise (`ProbabilityFlow`), whose work has the right mean alone.
    **Differentiation:** in the trajectory, and so in everything that made it.
    **Reference:** Jarzynski, PRL 78, 2690 (1997).

    **Example:** a trap that moves has the same free energy everywhere.

        >>> import jax
        >>> import esljax as esl
        >>> trap = esl.Driven(lambda center: esl.Quadratic(1.0, center), esl.Linear(0.0, 1.0))
        >>> start, rule = jax.random.normal(jax.random.key(0), (500, 1)), esl.Langevin(0.01, 1.0)
        >>> path = esl.simulate(trap, rule, start, steps=100, key=jax.random.key(1))
        >>> found = esl.jarzynski(path)
        >>> bool(abs(found.free_energy_change) < 5 * found.standard_error.free_energy_change)
        True
        >>> bool(found.dissipated_work > 0)
        True
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = stack(trajectory)
    check_runs(trajectory, 0)
    _check(trajectory)
    trajectory = on_devices(trajectory)
    return replicate(_of_work(trajectory), trajectory.mesh)


@eqx.filter_jit
def _of_work(trajectory: Trajectory) -> Jarzynski:
    law: Any = trajectory.law
    work: Any = trajectory.work
    # Runs before members: (runs, n).
    work = work.reshape(-1, work.shape[-1])
    temperature = law.temperature.reshape(-1)[0]
    # Values that could not be checked before, because they are traced.
    usual = (law.temperature == temperature) & (law.injected == temperature) & (temperature > 0)
    temperature = jnp.where(jnp.all(usual), temperature, jnp.nan)
    runs, members = work.shape
    exponents = -work / temperature
    of_member = jax.nn.logsumexp(exponents, axis=0)
    whole = -temperature * (jax.nn.logsumexp(of_member) - np.log(runs * members))
    without = -temperature * (_without_each(of_member) - np.log(runs * (members - 1)))
    mean = jnp.mean(work, axis=0)
    mean_without = (jnp.sum(mean) - mean) / (members - 1)

    def error(left: Array) -> Array:
        return jnp.sqrt((members - 1) * jnp.mean((left - jnp.mean(left)) ** 2))

    shares = jax.nn.softmax(exponents.reshape(-1))
    of_runs = f" of each of {runs} runs" if runs > 1 else ""
    return Jarzynski(
        free_energy_change=whole,
        work=jnp.mean(mean),
        bias=(members - 1) * (jnp.mean(without) - whole),
        effective_members=1 / jnp.sum(shares**2),
        standard_error=StandardErrors(
            {
                "free_energy_change": error(without),
                "work": error(mean_without),
                "dissipated_work": error(mean_without - without),
            }
        ),
        members=runs * members,
        errors=f"jackknife over {members} members{of_runs}",
    )


def _without_each(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """log Σ_{j≠i} e^{x_j} for each i."""
    largest = jnp.argmax(x)
    # Where one term is nearly all of the sum, its rest is lost in rounding: sum the others alone.
    rest = jax.nn.logsumexp(jnp.where(jnp.arange(x.size) == largest, -jnp.inf, x))
    shares = jnp.where(jnp.arange(x.size) == largest, 0, jax.nn.softmax(x))
    others = jax.nn.logsumexp(x) + jnp.log1p(-shares)
    return jnp.where(jnp.arange(x.size) == largest, rest, others)


def _check(trajectory: Trajectory) -> None:
    law = trajectory.law
    if trajectory.work_of_links is None:
        raise refuse(
            "trajectory",
            "hold the work on its members, as simulate(...) counts it",
            "was recorded, or made by hand, without it",
        )
    if law is None:
        raise refuse(
            "trajectory",
            "come from a rule with a law, such as Langevin(...), whose temperature the equality "
            "needs",
            "has none",
        )
    if not known(law):
        return
    temperature, injected = np.asarray(law.temperature), np.asarray(law.injected)
    must = "have one constant temperature above 0"
    if not np.all(temperature > 0):
        raise refuse("trajectory", must, f"has temperature {temperature.min():g}")
    if not np.all(temperature == temperature.flat[0]):
        between = f"{temperature.min():g} to {temperature.max():g}"
        raise refuse("trajectory", must, f"has temperatures from {between}")
    if not np.all(injected == temperature):
        raise refuse(
            "trajectory",
            "hold members that feel the noise of their temperature, as those of Langevin(...) do",
            f"holds members whose noise has temperature {injected.min():g}",
        )
