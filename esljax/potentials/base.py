r"""Potentials: the objective Φ(θ) whose gradient drives every member of the ensemble.

A potential sees one member at a time, a position θ of shape (d,), and optionally a batch of what it averages over:

    energy(θ, batch)              -> Φ(θ)
    energy_and_gradient(θ, batch) -> Φ(θ), ∇Φ(θ)

`draw(key, members)` addresses the batches of one step, one for every member; potentials without data draw None.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from esljax._types import Array, Float, Key, Scalar


class AbstractPotential(eqx.Module):
    """Φ(θ) and the force that follows from it."""

    @property
    @abc.abstractmethod
    def conservative(self) -> bool:
        """Whether the force is the gradient of the energy, so that its Jacobian is symmetric."""

    @abc.abstractmethod
    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        """Φ at one position; over `batch`, or over everything if that is None."""

    @abc.abstractmethod
    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        """Φ and minus the force, shape (d,), at one position."""

    @abc.abstractmethod
    def draw(self, key: Key, members: int) -> Any:
        """The batches of one step: a pytree with a leading axis of length `members`, or None."""

    def __call__(self, positions: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """Φ over everything at positions of shape (..., d), one number for each."""
        return jnp.vectorize(self.energy, signature="(d)->()")(positions)
