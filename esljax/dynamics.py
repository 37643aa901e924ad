r"""One step of training, for the whole ensemble at once.

A rule is a pytree with `controls` (what it reads from its schedules at every step) and a pure `step` on the array of positions (n, d).
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._types import Array, Float, Key, Scalar, ScalarLike
from esljax.schedules import AbstractSchedule, as_schedule

Kick = Callable[[Float[Array, "n d"], Scalar], tuple[Float[Array, " n"], Float[Array, "n d"]]]
"""Positions (n, d) and a learning rate η to energies (n,) and η∇Φ (n, d), on the batches of the present step."""


class Controls(NamedTuple):
    """What one step reads: scalars, or (K,) for all steps of a run."""

    learning_rate: Array
    temperature: Array


class AbstractRule(eqx.Module):
    """A Markov map of the ensemble, and the schedules that control it."""

    learning_rate: eqx.AbstractVar[AbstractSchedule]
    temperature: eqx.AbstractVar[AbstractSchedule]

    @abc.abstractmethod
    def controls(self, steps: int) -> Controls:
        """The controls of all `steps` steps, each (K,)."""

    @abc.abstractmethod
    def step(self, positions: Float[Array, "n d"], kick: Kick, control: Controls, key: Key) -> tuple[Array, Array]:
        """One step: the new positions (n, d), and the energies (n,) at the old ones. `key` belongs to this step alone."""


class Langevin(AbstractRule):
    """θ ← θ - η ∇Φ(θ) + sqrt(2Tη) ξ, ξ standard normal: overdamped Langevin dynamics with step η (Euler-Maruyama).

    **Args:** `learning_rate`: η, per step as in optax, a schedule or a number. `temperature`: T, in units of Φ, a schedule or a number.
    **Differentiation:** in both schedules. The noise amplitude has an infinite slope where Tη = 0; its derivative is taken as 0 there.
    **Reference:** Okanohara, arXiv 2601.17607, whose mobility per unit of training time, K η here, is 1.
    """

    learning_rate: AbstractSchedule = eqx.field(converter=as_schedule)
    temperature: AbstractSchedule = eqx.field(converter=as_schedule, default=0.0)

    def replace(
        self, *, learning_rate: AbstractSchedule | ScalarLike | None = None, temperature: AbstractSchedule | ScalarLike | None = None
    ) -> "Langevin":
        """The same rule with another learning rate, another temperature, or both."""
        return Langevin(
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            temperature=self.temperature if temperature is None else temperature,
        )

    def controls(self, steps: int) -> Controls:
        return Controls(self.learning_rate.rates(steps), self.temperature.rates(steps))

    def step(self, positions: Float[Array, "n d"], kick: Kick, control: Controls, key: Key) -> tuple[Array, Array]:
        energies, kicks = kick(positions, control.learning_rate)
        noise = jax.random.normal(key, positions.shape, positions.dtype)
        amplitude = _safe_sqrt(2 * control.temperature * control.learning_rate)
        return positions - kicks + amplitude * noise, energies


def _safe_sqrt(x: Any) -> Array:
    positive = jnp.where(x > 0, x, 1)
    return jnp.where(x > 0, jnp.sqrt(positive), jnp.where(x == 0, 0, jnp.nan))
