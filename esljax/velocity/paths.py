"""Velocities by finite differences in time: of laws, or of the members themselves."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp

from esljax._types import Array, Float
from esljax.velocity.base import AbstractVelocity, Snapshot, Velocity


@runtime_checkable
class Maps(Protocol):
    """A transport that maps one ensemble onto another."""

    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """Where each member of x goes on the way to y."""
        ...


class TransportVelocity(AbstractVelocity):
    """Finite differences of laws: where a transport maps each member from one snapshot to the next, over the time between.

    Central inside the run and one-sided at its ends: the error is of the order of the squared spacing where snapshots are evenly spaced on
    the clock, and of its first power at the ends and where they are not. It needs no drift, and sees only what moves mass: σ and E‖∇ψ‖²
    are the same number.

    **Args:** `transport`: `ExactTransport()`, `GaussianTransport()` or `SinkhornTransport(epsilon)`.
    **Differentiation:** at the assignment or map found.
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = False
    transport: Maps

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        forward = self.transport.map(snapshot.positions, snapshot.after)
        backward = self.transport.map(snapshot.positions, snapshot.before)
        moved = snapshot.elapsed > 0
        values = (forward - backward) * jnp.where(
            moved, 1 / jnp.where(moved, snapshot.elapsed, 1), 0
        )
        squares = jnp.sum(values**2, axis=1)
        return Velocity(
            values,
            squares,
            squares,
            None,
            bound="none",
            note="finite differences between snapshots",
        ), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values


class PathVelocity(AbstractVelocity):
    """The members' own displacements over the time between snapshots: for members that move without noise, such as probability-flow
    members. Then Σ = Σ_j mean‖Δ_j‖²/Δs_j ≥ W2² holds on samples exactly, for every n, d and K, and with a snapshot at every step it is
    K Σ_k mean‖Δ_k‖². With noise in the steps this is not a velocity and diverges with K."""

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = True

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        moved = snapshot.elapsed > 0
        values = (snapshot.after - snapshot.before) * jnp.where(
            moved, 1 / jnp.where(moved, snapshot.elapsed, 1), 0
        )
        return Velocity(
            values,
            jnp.sum(values**2, axis=1),
            None,
            None,
            bound="upper",
            note="the members' own paths",
        ), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values
