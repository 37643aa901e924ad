"""Any other schedule, times a number."""

import functools

import equinox as eqx
import jax.numpy as jnp

from esljax._checks import as_float
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.results import in_short
from esljax.schedules.base import AbstractSchedule
from esljax.schedules.shapes import as_schedule


class Scaled(AbstractSchedule):
    """`factor` times `shape`: a shape with another peak, as one tunes it in a new place.

    **Args:** `shape`: a schedule or a number. `factor`: a number.
    **Raises:** `InputError` for a shape that is no schedule.
    **Differentiation:** in `factor` and in every leaf of the shape.

    **Example:**

        >>> import esljax as esl
        >>> print(esl.Scaled(esl.Knots([0.2, 0.4, 0.1]), 1.5))
        Scaled: 1.5 times Knots: 3 log-linear knots from 0.2 to 0.1: 0.2 0.4 0.1
    """

    shape: AbstractSchedule = eqx.field(converter=functools.partial(as_schedule, argument="shape"))
    factor: Scalar = eqx.field(converter=as_float)

    def __call__(self, s: ScalarLike) -> Scalar:
        return jnp.asarray(self.factor * self.shape(s))

    def over(self, steps: int) -> "Scaled":
        return Scaled(self.shape.over(steps), self.factor)

    def corners(self) -> Float[Array, " c"]:
        return jnp.asarray(self.shape.corners())

    def _summary(self) -> str:
        return f"{in_short(self.factor)} times {self.shape}"
