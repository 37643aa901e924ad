r"""Velocities by finite differences in time: of laws, or of the members themselves.

    v = (θ(t₊) - θ(t₋)) / (t₊ - t₋)

θ(t₊) and θ(t₋) are where a transport maps a member, or where the member itself is.
"""

import inspect
from typing import Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp

from esljax._checks import refuse
from esljax._numerics import safe_divide
from esljax._types import Array, Float, Scalar
from esljax.velocity.base import AbstractVelocity, Snapshot, Velocity, check_parts


@runtime_checkable
class Maps(Protocol):
    """A transport that maps one ensemble onto another."""

    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """Return where each member of x, shape (n, d), goes on the way to y, shape (m, d)."""
        ...


class TransportVelocity(AbstractVelocity):
    """Finite differences of laws: a transport maps each member to the snapshots beside its own.

        v(θ_i) = (map(x → after)_i - map(x → before)_i) / elapsed

    Central inside the run and one-sided at its ends: the error is of the order of the squared
    spacing where snapshots are evenly spaced on the clock, and of its first power at the ends and
    where they are not. It needs no drift. It sees only motion that moves mass: housekeeping is no
    part of σ and not resolved. Near rest sampling noise pushes σ up, and nothing takes it off.

    **Args:** `transport`: `ExactTransport()`, `GaussianTransport()`, `SinkhornTransport(epsilon)`,
    or any other with a method `map(x, y)` that returns an array like x.
    **Raises:** `InputError` for a transport without such a method.
    **Differentiation:** at the assignment or map found.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (32, 1))
        >>> potential, rule = esl.Quadratic(1.0), esl.Langevin(0.1, 0.0)
        >>> run = {"steps": 8, "snapshots": 4, "key": jax.random.key(1)}
        >>> path = esl.simulate(potential, rule, x, **run)
        >>> exact = esl.ExactTransport()
        >>> velocity = esl.TransportVelocity(exact)
        >>> report = esl.speed_limit(path, transport=exact, velocity=velocity, jackknife=0)
        >>> print(report.housekeeping)
        None
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = False
    transport: Maps

    def __check_init__(self):
        if not _maps_ensembles(self.transport):
            name = getattr(self.transport, "__name__", type(self.transport).__name__)
            raise refuse(
                "transport",
                "have a method `map`, as ExactTransport(), GaussianTransport() and "
                "SinkhornTransport(epsilon) do",
                f"is {name}, which maps no members",
            )

    def in_units(self, size: Scalar) -> "TransportVelocity | None":
        scale = getattr(self.transport, "in_units", None)
        own = None if scale is None else scale(size)
        return None if own is None else eqx.tree_at(lambda v: v.transport, self, own)

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        check_parts(snapshot, ("before", "after", "elapsed"))
        forward = self.transport.map(snapshot.positions, snapshot.after)
        backward = self.transport.map(snapshot.positions, snapshot.before)
        values = (forward - backward) * safe_divide(1.0, snapshot.elapsed)
        squares = jnp.sum(values**2, axis=1)
        return Velocity(
            values,
            squares,
            squares,
            None,
            bound="none",
            note="finite differences between snapshots",
            sees_circulation=False,
        ), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values


class PathVelocity(AbstractVelocity):
    """The members' own displacements over the time between snapshots.

        v(θ_i) = (after_i - before_i) / elapsed

    For members that move without noise, such as members of a probability flow. Then
    Σ = Σ_j mean‖Δ_j‖²/Δs_j ≥ W2² holds on samples exactly, for every n, d and K, and with a
    snapshot at every step Σ is K Σ_k mean‖Δ_k‖². With noise in the steps this is not a velocity and
    diverges with K.

    **Differentiation:** forward and reverse, of every order.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (32, 1))
        >>> potential, rule = esl.Quadratic(1.0), esl.Langevin(0.1, 0.0)
        >>> run = {"steps": 8, "snapshots": 4, "key": jax.random.key(1)}
        >>> path = esl.simulate(potential, rule, x, **run)
        >>> exact, velocity = esl.ExactTransport(), esl.PathVelocity()
        >>> report = esl.speed_limit(path, transport=exact, velocity=velocity, jackknife=0)
        >>> bool(report.gap > 0)
        True
    """

    moments_only: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = False
    between: ClassVar[bool] = True

    def in_units(self, size: Scalar) -> "PathVelocity":
        return self

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(self, snapshot: Snapshot, state: Any) -> tuple[Velocity, Any]:
        check_parts(snapshot, ("before", "after", "elapsed"))
        values = (snapshot.after - snapshot.before) * safe_divide(1.0, snapshot.elapsed)
        return Velocity(
            values,
            jnp.sum(values**2, axis=1),
            None,
            None,
            bound="upper",
            note="the members' own paths",
        ), None

    def flow(self, snapshot: Snapshot) -> Float[Array, "n d"]:
        """Return finite differences, as in `estimate`."""
        return self.estimate(snapshot, None)[0].values


def _maps_ensembles(transport: Any) -> bool:
    """Whether this is an instance with a method `map` of two ensembles, not of one member."""
    # The class must define it: the field `map` of a `MappedTransport` is a function of one member,
    # even one that takes a second argument, such as `jnp.sort`. A class is no instance of itself.
    if not callable(getattr(type(transport), "map", None)):
        return False
    try:
        inspect.signature(transport.map).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
