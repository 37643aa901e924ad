"""A potential that depends on training time through a drive."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from esljax._checks import InputError, as_float, in_words, refuse
from esljax._types import Array, Float, Key, Scalar, ScalarLike
from esljax.potentials.base import AbstractPotential, check_potential
from esljax.schedules import AbstractSchedule, as_schedule


class Driven(AbstractPotential):
    """A potential that an outside hand moves: Φ(θ; λ(s)) = `family(λ(s))(θ)`.

    It has energies only at a given training time: `driven.at(s).energy(position)`.

    **Args:**
    - `family`: a function from the drive λ, shape (), to a potential, such as
      `lambda center: Quadratic(1.0, center)`. A callable pytree keeps its own arrays
      differentiable; a closure does not.
    - `drive`: λ(s), a schedule or a number.
    - `before`, `after`: where the drive rests before s = 0 and after s = 1, if it jumps there. The
      members do not move in a jump, so `simulate` never sees these two; `free_energy` counts the
      work of the jumps, and its first and last rows are the ends of the whole process.

    **Raises:** `InputError` if `family` does not return a potential.
    **Differentiation:** in the drive, through `simulate` and all that follows from it.
    **Reference:** Schmiedl and Seifert, PRL 98, 108301 (2007): drives of least work jump at both
    ends.

    **Example:**

        >>> import esljax as esl
        >>> trap = esl.Driven(lambda center: esl.Quadratic(1.0, center), esl.Linear(0.0, 5.0))
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
            raise refuse(
                "family", "be a function of the drive to a potential", f"is {in_words(family)}"
            )
        self.family, self.drive = family, as_schedule(drive, "drive")
        for name, value in (("before", before), ("after", after)):
            if value is not None and jnp.shape(value) != ():
                raise refuse(name, "be one number", f"has shape {jnp.shape(value)}")
        self.before, self.after = (
            None if value is None else as_float(value) for value in (before, after)
        )
        check_potential("family(drive)", eqx.filter_eval_shape(family, self.drive(0.0)))

    @property
    def conservative(self) -> bool:
        return self.at(0.0).conservative

    @property
    def parameter_keys(self) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
        return eqx.filter_eval_shape(self.family, self.drive(0.0)).parameter_keys

    @property
    def outputs_by_array(self) -> Callable[[Sequence[Array], Any], Any] | None:
        return self.at_start().outputs_by_array

    def probes(self, key: Key, count: int) -> tuple[Float[Array, " d"], Any] | None:
        return self.at_start().probes(key, count)

    def at(self, s: ScalarLike) -> AbstractPotential:
        return self.family(self.drive(s))

    def at_start(self) -> AbstractPotential:
        return self.at(0.0) if self.before is None else self.family(self.before)

    def at_end(self) -> AbstractPotential:
        return self.at(1.0) if self.after is None else self.family(self.after)

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        raise _without_a_time()

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        raise _without_a_time()

    def draw(self, key: Key, members: int) -> Any:
        raise _without_a_time()


def _without_a_time() -> InputError:
    return InputError("A Driven potential has energies only at a time: use `potential.at(s)`.")
