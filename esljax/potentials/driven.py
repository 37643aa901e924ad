"""A potential that depends on training time through a drive."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from esljax._checks import as_float, refuse
from esljax._types import Scalar, ScalarLike
from esljax.potentials.base import AbstractPotential
from esljax.schedules import AbstractSchedule, as_schedule


class Driven(eqx.Module):
    """A potential that an outside hand moves: Φ(θ; λ(s)) = `family(λ(s))(θ)`.

    **Args:** `family`: a function from the drive λ, shape (), to a potential, such as `lambda center: Quadratic(1.0, center)`; a callable
    pytree keeps its own arrays differentiable (a closure does not). `drive`: λ(s), a schedule or a number. `before`, `after`: where the
    drive rests before s = 0 and after s = 1, if it jumps there. The members do not move in a jump, so `simulate` never sees these two;
    the work of the jumps is counted by `free_energy`, and its ends are the ends of the whole process.
    **Differentiation:** in the drive, through `simulate` and all that follows from it.
    **Reference:** Schmiedl and Seifert, PRL 98, 108301 (2007): drives of least work jump at both ends.

    **Example:**

        >>> trap = Driven(lambda center: Quadratic(1.0, center), Linear(0.0, 5.0))
        >>> float(trap.at(0.5).center)
        2.5
    """

    family: Callable[[Scalar], AbstractPotential]
    drive: AbstractSchedule
    before: Scalar | None
    after: Scalar | None

    def __init__(
        self,
        family: Callable[[Scalar], AbstractPotential],
        drive: AbstractSchedule | ScalarLike,
        *,
        before: ScalarLike | None = None,
        after: ScalarLike | None = None,
    ):
        if not callable(family):
            raise refuse("family", "be a function of the drive to a potential", f"is {family!r}")
        self.family, self.drive = family, as_schedule(drive)
        for name, value in (("before", before), ("after", after)):
            if value is not None and jnp.shape(value) != ():
                raise refuse(name, "be one number", f"has shape {jnp.shape(value)}")
        self.before, self.after = (
            None if value is None else as_float(value) for value in (before, after)
        )
        example = eqx.filter_eval_shape(family, self.drive(0.0))
        if not isinstance(example, AbstractPotential):
            raise refuse(
                "family",
                "return a potential such as Quadratic(1.0)",
                f"returns a {type(example).__name__}",
            )

    def at(self, s: ScalarLike) -> AbstractPotential:
        """The potential at training time s."""
        return self.family(self.drive(s))

    def at_start(self) -> AbstractPotential:
        """The potential before the first jump."""
        return self.at(0.0) if self.before is None else self.family(self.before)

    def at_end(self) -> AbstractPotential:
        """The potential after the last jump."""
        return self.at(1.0) if self.after is None else self.family(self.after)


def potential_at(potential: AbstractPotential | Driven, s: ScalarLike) -> AbstractPotential:
    """The potential that acts at training time s."""
    return potential.at(s) if isinstance(potential, Driven) else potential
