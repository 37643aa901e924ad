r"""One step of training, for the whole ensemble at once.

A rule is a pytree with `controls`, which reads its schedules at every step, and a pure `step` on
the array of positions (n, d).
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import refuse
from esljax._numerics import safe_root
from esljax._types import Array, Bool, Float, Key, Scalar, ScalarLike
from esljax.potentials import drawn_in_line
from esljax.schedules import AbstractSchedule, as_schedule
from esljax.simulation.diffusion import Diffusion
from esljax.velocity import AbstractVelocity, Snapshot

Kick = Callable[[Float[Array, "n d"], Scalar], tuple[Float[Array, " n"], Float[Array, "n d"]]]
"""Positions (n, d) and a learning rate η to energies (n,) and η∇Φ (n, d), on the batches of the
present step."""

_learning_rate = functools.partial(as_schedule, argument="learning_rate")
_temperature = functools.partial(as_schedule, argument="temperature")

# Members of fewer coordinates get their noise from one row, with the same bits. XLA vectorizes the
# last axis alone: on a CPU it drew (1024, 10) in 3 times the time of (10240,), and from 100
# coordinates on there was no difference. The draw must be a branch of its own: a reshape that XLA
# can move goes back into it.
_WIDE = 128


# A condition of each run would become a choice under vmap, for which each draws the noise anew.
@jax.custom_batching.custom_vmap
def _in_any_run(holds: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether something holds in any of the runs side by side: one answer for all of them."""
    return holds


@_in_any_run.def_vmap
def _in_any_of_many(count: int, batched: Any, holds: Bool[Array, " runs"]) -> tuple[Array, bool]:
    del count, batched
    return _in_any_run(jnp.any(holds, axis=0)), False


class Controls(NamedTuple):
    """The numbers that a step reads: scalars, or (K,) for all steps of a run."""

    learning_rate: Array
    """η_k, per step as in optax."""
    temperature: Array
    """T_k, in units of Φ."""


class AbstractRule(eqx.Module):
    """A Markov map of the ensemble, and the schedules that control it.

    A subclass is an `equinox.Module` with two fields, `learning_rate` and `temperature`, and two
    methods, `controls` and `step`. A step gets its gradients from `kick`, so that the run can be
    differentiated in any way, and its noise from `key`.

    D, U, the noise floor, `free_energy`, `jarzynski` and velocities that take the potential, such
    as `AffineVelocity`, need to know the dynamics. A rule whose members follow overdamped Langevin
    dynamics says so in a third method, `law`. Without it these measures are None or refuse the run,
    and the chain of distances and `TransportVelocity` measure it.

    **Example:** a rule without a law, as no temperature and mobility describe it.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class SignDescent(esl.AbstractRule):
        ...     learning_rate: esl.AbstractSchedule
        ...     temperature: esl.AbstractSchedule = esl.Constant(0.0)
        ...
        ...     def controls(self, steps):
        ...         schedules = self.learning_rate, self.temperature
        ...         return esl.simulation.Controls(*(each.rates(steps) for each in schedules))
        ...
        ...     def step(self, positions, kick, control, key):
        ...         energies, kicks = kick(positions, control.learning_rate)
        ...         return positions - control.learning_rate * jnp.sign(kicks), energies
        >>> start, key = jnp.ones((4, 2)), jax.random.key(0)
        >>> rule = SignDescent(esl.Constant(0.25))
        >>> path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=2, snapshots=2, key=key)
        >>> print(path.positions[:, 0, 0])
        [1.   0.75 0.5 ]
    """

    learning_rate: eqx.AbstractVar[AbstractSchedule]
    """η, per step as in optax."""
    temperature: eqx.AbstractVar[AbstractSchedule]
    """T, in units of Φ."""

    @abc.abstractmethod
    def controls(self, steps: int) -> Controls:
        """The controls of all `steps` steps, each (K,)."""

    def law(self, control: Controls) -> Diffusion | None:
        """The law of one step under these controls, each of shape (); None, unless a subclass
        claims one, if members do not follow overdamped Langevin dynamics."""
        del control
        return None

    @abc.abstractmethod
    def step(
        self, positions: Float[Array, "n d"], kick: Kick, control: Controls, key: Key
    ) -> tuple[Array, Array]:
        """One step: the new positions (n, d), and the energies (n,) at the old ones. `key` belongs
        to this step alone: it is `fold_in(fold_in(key of the run, k), 1)`. On a CPU many numbers
        are drawn faster from `esl.potentials.drawn_in_line(key)`."""


class Langevin(AbstractRule):
    """θ ← θ - η ∇Φ(θ) + sqrt(2Tη) ξ, ξ standard normal: overdamped Langevin dynamics with step η
    (Euler-Maruyama).

    **Args:** `learning_rate`: η, per step as in optax, a schedule or a number. `temperature`: T, in
    units of Φ, a schedule or a number.
    **Raises:** `InputError` for anything else, such as a bare function.
    **Differentiation:** in both schedules. The noise amplitude has an infinite slope where Tη = 0;
    its derivative is taken as 0 there.
    **Cost:** a step with Tη = 0 draws no noise. Runs side by side, by `vmap` over schedules, draw
    none in a step where Tη = 0 in all of them; elsewhere, those of one key draw it once.
    **Reference:** Okanohara, arXiv 2601.17607, whose mobility per unit of training time, K η here,
    is 1.

    **Example:**

        >>> import esljax as esl
        >>> rule = esl.Langevin(esl.Cosine(0.1), temperature=0.01)
        >>> round(float(rule.learning_rate(0.5)), 6)
        0.05
    """

    learning_rate: AbstractSchedule = eqx.field(converter=_learning_rate)
    temperature: AbstractSchedule = eqx.field(converter=_temperature, default=0.0)

    def replace(
        self,
        *,
        learning_rate: AbstractSchedule | ScalarLike | None = None,
        temperature: AbstractSchedule | ScalarLike | None = None,
    ) -> "Langevin":
        """The same rule with another learning rate, another temperature, or both."""
        return Langevin(
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            temperature=self.temperature if temperature is None else temperature,
        )

    def controls(self, steps: int) -> Controls:
        return Controls(self.learning_rate.rates(steps), self.temperature.rates(steps))

    def law(self, control: Controls) -> Diffusion:
        return Diffusion(control.learning_rate, control.temperature, injected=control.temperature)

    def step(
        self, positions: Float[Array, "n d"], kick: Kick, control: Controls, key: Key
    ) -> tuple[Array, Array]:
        energies, kicks = kick(positions, control.learning_rate)
        power = 2 * control.temperature * control.learning_rate
        amplitude = safe_root(jnp.where(power < 0, jnp.nan, power))
        # The gradient stores the noise: redrawing it would save a third of the memory, and take
        # twice the time where the force costs little. Steps without noise draw none.
        shape = (positions.size,) if positions.shape[1] < _WIDE else positions.shape

        def quiet() -> Array:
            # Of the key: within a shard_map, it may be of each device like the noise.
            return jnp.zeros_like(jax.random.key_data(key), positions.dtype, shape)

        def drawn() -> Array:
            return jax.random.normal(drawn_in_line(key), shape, positions.dtype)

        def of_step() -> Array:
            return jax.lax.cond(_in_any_run(amplitude > 0), drawn, quiet)

        # With the condition of the step alone, XLA that does not optimize rounds steps on one
        # device otherwise than on eight.
        noise = jax.lax.cond(_in_any_run(control.temperature > 0), of_step, quiet)
        return positions - kicks + amplitude * noise.reshape(positions.shape), energies


class ProbabilityFlow(AbstractRule):
    """θ ← θ + v(θ), v = -η∇Φ - ηT ∇log q estimated from the members at every step: the law of
    `Langevin` without its noise (Euler).

    Members then move along deterministic paths, and for every n, d and K their action is a bound on
    samples, not only on average:

        K Σ_k mean_i ‖Δ_k,i‖² ≥ W2²(start, end)

    **Args:** `learning_rate`, `temperature`: as in `Langevin`. `velocity`: an estimator that works
    on one snapshot, such as `AffineVelocity()` (exact for Gaussian laws) or `KernelVelocity()`.
    **Raises:** `InputError` for an estimator that needs neighboring snapshots.
    **Differentiation:** in both schedules, and through the estimator as it documents.
    **Reference:** Maoutsa, Reich and Opper, "Interacting particle solutions of Fokker-Planck
    equations through gradient-log-density estimation", Entropy 22, 802 (2020).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> flow = esl.ProbabilityFlow(0.1, 0.01, esl.AffineVelocity())
        >>> start, key = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.key(1)
        >>> print(esl.simulate(esl.Quadratic(1.0), flow, start, steps=40, key=key))
        Trajectory: 8 members of 2 coordinates, 40 steps, 21 snapshots
    """

    learning_rate: AbstractSchedule = eqx.field(converter=_learning_rate)
    temperature: AbstractSchedule = eqx.field(converter=_temperature)
    velocity: AbstractVelocity

    def __check_init__(self):
        velocity = self.velocity
        if (
            not isinstance(velocity, AbstractVelocity)
            or not velocity.needs_drift
            or velocity.between
        ):
            raise refuse(
                "velocity",
                "estimate from one snapshot, as AffineVelocity() does",
                f"is {velocity!r}",
            )

    def controls(self, steps: int) -> Controls:
        return Controls(self.learning_rate.rates(steps), self.temperature.rates(steps))

    def law(self, control: Controls) -> Diffusion:
        return Diffusion(control.learning_rate, control.temperature, injected=0.0)

    def step(
        self, positions: Float[Array, "n d"], kick: Kick, control: Controls, key: Key
    ) -> tuple[Array, Array]:
        energies, kicks = kick(positions, control.learning_rate)
        snapshot = Snapshot(positions, -kicks, control.temperature * control.learning_rate)
        # Recompute the fit in the backward pass; storing its intermediates would keep an n × n
        # matrix per step.
        flow = jax.checkpoint(
            lambda velocity, snapshot: velocity.checked_flow(snapshot), prevent_cse=False
        )
        return positions + flow(self.velocity, snapshot), energies
