"""A linear warmup into any other schedule."""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_positive, known, refuse
from esljax._numerics import safe_divide
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.results import in_short
from esljax.schedules.base import AbstractSchedule
from esljax.schedules.shapes import as_schedule


class Warmup(AbstractSchedule):
    """Linear from `start` to the first value of `shape`, which then runs over the time left.

    shape((s - fraction)/(1 - fraction)) for s ≥ fraction. So the shape is compressed, not cut: it
    ends at s = 1 with its own last value. A shape that counts steps, such as `FromOptax(fn)`,
    counts those that are left.

    **Args:** `shape`: a schedule or a number. `fraction`: of the run, in (0, 1). `start`: the value
    at s = 0, by default 0.
    **Raises:** `InputError` for a fraction out of these bounds and a shape that is no schedule.
    **Differentiation:** in `fraction` and `start` and in every leaf of the shape.

    **Example:**

        >>> import esljax as esl
        >>> warm = esl.Warmup(esl.Linear(1.0, 0.0), fraction=0.2)
        >>> [round(float(rate), 6) for rate in warm.rates(10)]
        [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
        >>> print(warm)
        Warmup: from 0 over 0.2 of the run, then Linear: start 1, end 0
    """

    shape: AbstractSchedule = eqx.field(converter=functools.partial(as_schedule, argument="shape"))
    fraction: Scalar = eqx.field(converter=as_float, default=0.1)
    start: Scalar = eqx.field(converter=as_float, default=0.0)

    def __check_init__(self):
        check_positive("fraction", self.fraction)
        if known(self.fraction) and not bool(np.all(np.asarray(self.fraction) < 1)):
            raise refuse("fraction", "be less than 1", f"is {in_short(self.fraction)}")

    def __call__(self, s: ScalarLike) -> Scalar:
        left = jnp.clip(safe_divide(s - self.fraction, 1 - self.fraction), 0, 1)
        value = self.shape(left)
        # Before its start the shape stands at its first value, whatever its slope there.
        first = self.shape(jnp.zeros_like(left))
        rise = self.start + (first - self.start) * safe_divide(jnp.asarray(s), self.fraction)
        return jnp.where(s < self.fraction, rise, value)

    def over(self, steps: int) -> "Warmup":
        if not known(self.fraction) or self.fraction.ndim:
            return self
        left = max(1, round((1 - float(self.fraction)) * steps))
        return Warmup(self.shape.over(left), self.fraction, self.start)

    def corners(self) -> Float[Array, " c"]:
        within = jnp.asarray(self.shape.corners(), self.fraction.dtype)
        return jnp.append(self.fraction, self.fraction + (1 - self.fraction) * within)

    def _summary(self) -> str:
        start, fraction = in_short(self.start), in_short(self.fraction)
        return f"from {start} over {fraction} of the run, then {self.shape}"
