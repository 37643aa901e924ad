r"""A run about a place and in a unit of its own, in which the squares of its numbers are numbers.

Σ, L² and W2² are squares of lengths: of members that lie at 10⁻²² or 10²⁵ none of the squares is a
number of single precision. Distances do not change if all members are moved together, and squared
distances change by c² if all are divided by c. So a report is computed of (θ - a)/c,

    a: for each coordinate whose values all lie within a factor of two of each other, their least
    c: the power of two below the largest |θ - a|

and its numbers are multiplied by c or c² at the end. Neither step rounds: of such values x, a the
difference x - a is exact (Sterbenz, Floating-Point Computation, 1974), and a power of two changes
no digit.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._numerics import power_of_two
from esljax._types import Array, Float, Scalar
from esljax.measures.report import NUMBERS, SpeedLimit
from esljax.results import StandardErrors
from esljax.simulation import Trajectory
from esljax.transport import AbstractTransport
from esljax.velocity import AbstractVelocity

# The numbers of a report in units of θ², or of θ² per learning rate; those of its errors are all.
_SQUARES = (
    *NUMBERS,
    "entropy_production_coarse",
    "entropy_production_chain",
    "noise_floor",
)


class OwnUnits(eqx.Module):
    """A run in units of its own, with what measures it, and the way back."""

    path: Trajectory
    """The run, its positions (θ - a)/c."""
    given: Trajectory
    """The run itself, where potentials and its stored digits are read."""
    transport: AbstractTransport
    velocity: AbstractVelocity | None
    size: Scalar
    """c, shape (), in units of θ."""

    @property
    def several(self) -> bool:
        """Whether the run holds several runs on a leading axis."""
        return self.path.positions.ndim == 4


def in_own_units(
    trajectory: Trajectory, transport: AbstractTransport, velocity: AbstractVelocity | None
) -> OwnUnits:
    """Return the run in units of its own; as it is if its transport or velocity does not allow it.

    **Differentiation:** the place and the unit are constants: no number depends on them.
    """
    size = _size(_moved(jax.lax.stop_gradient(trajectory.positions)))
    own = transport.in_units(size)
    estimator = None if velocity is None else velocity.in_units(size)
    if own is None or (velocity is not None and estimator is None):
        placed = trajectory.placed
        return OwnUnits(placed, placed, transport, velocity, jnp.ones_like(size))
    path = dataclasses.replace(trajectory, positions=_moved(trajectory.positions) / size)
    return OwnUnits(path, trajectory, own, estimator, size)


def put_back(report: SpeedLimit, size: Scalar) -> SpeedLimit:
    """Return the report of a run in units of its own, in those of the run itself."""

    def squared(x: Any) -> Any:
        # One after the other: the square of the size may be no number.
        return None if x is None else x * size * size

    errors, evidence = report.standard_error, report.evidence
    if errors is not None:
        errors = StandardErrors({name: squared(x) for name, x in errors.numbers.items()})
    if evidence is not None:
        evidence = dataclasses.replace(
            evidence,
            distances=evidence.distances * size,
            displacements=evidence.displacements * size,
            quantum=evidence.quantum * size,
            rounding=squared(evidence.rounding),
            unresolved=squared(evidence.unresolved),
            doubled_epsilon=squared(evidence.doubled_epsilon),
            corrected=jax.tree.map(squared, evidence.corrected),
            size=size,
            own=(report.entropy_production, report.w2_squared),
        )
    fields = {field.name for field in dataclasses.fields(report)}
    return dataclasses.replace(
        report,
        **{name: squared(getattr(report, name)) for name in _SQUARES if name in fields},
        speed=report.speed * size,
        standard_error=errors,
        evidence=jax.lax.stop_gradient(evidence),
    )


def _moved(positions: Float[Array, "*runs snapshots n d"]) -> Float[Array, "*runs snapshots n d"]:
    """Return θ - a. A coordinate with a value that is not finite stays as it is."""
    fixed = jax.lax.stop_gradient(positions)
    low, high = (reduce(fixed, axis=(-3, -2), keepdims=True) for reduce in (jnp.min, jnp.max))
    close = ((low > 0) & (high <= 2 * low)) | ((high < 0) & (low >= 2 * high))
    return positions - jnp.where(close, low, 0)


def _size(positions: Float[Array, "*runs snapshots n d"]) -> Scalar:
    """Return the power of two below the largest finite number; 1 if all are 0."""
    sizes = jnp.abs(positions)
    largest = jnp.max(jnp.where(jnp.isfinite(sizes), sizes, 0))
    return power_of_two(largest)
