r"""Shapes of schedules: formulas of training time s ∈ [0, 1] with a few numbers."""

import itertools
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_choice, check_positive, in_words, known, refuse
from esljax._numerics import safe_root
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.results import in_short
from esljax.schedules.base import AbstractSchedule


def _as_numbers(times: Any) -> tuple[float, ...]:
    """The boundaries as Python numbers, which a static field must be."""
    if not known(times):
        raise refuse("boundaries", "be known numbers, outside of jit and grad", "is traced")
    try:
        return tuple(float(time) for time in times)
    except (TypeError, ValueError) as error:
        raise refuse("boundaries", "be a list of times", f"is {in_words(times)}") from error


class Constant(AbstractSchedule):
    """The same value at every s.

    **Args:** `value`: a number, in the units of what is scheduled.

    **Example:**

        >>> import esljax as esl
        >>> float(esl.Constant(0.5)(0.3))
        0.5
    """

    value: Scalar = eqx.field(converter=as_float)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.value

    def _summary(self) -> str:
        return in_short(self.value)


class Linear(AbstractSchedule):
    """start + (end - start) s.

    **Args:** `start`, `end`: the values at s = 0 and s = 1.

    **Example:**

        >>> import esljax as esl
        >>> float(esl.Linear(1.0, 0.0)(0.25))
        0.75
    """

    start: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.start + (self.end - self.start) * s


class Cosine(AbstractSchedule):
    """end + (peak - end) (1 + cos πs)/2.

    **Args:** `peak`: the value at s = 0. `end`: the value at s = 1, by default 0.
    **Reference:** Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts",
    ICLR (2017).

    **Example:**

        >>> import esljax as esl
        >>> round(float(esl.Cosine(1.0)(0.5)), 6)
        0.5
    """

    peak: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float, default=0.0)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.end + (self.peak - self.end) * (1 + jnp.cos(jnp.pi * s)) / 2


class Exponential(AbstractSchedule):
    """start (end/start)^s.

    **Args:** `start`, `end`: the values at s = 0 and s = 1, both positive.
    **Raises:** `InputError` if one of them is not.

    **Example:**

        >>> import esljax as esl
        >>> round(float(esl.Exponential(1.0, 0.01)(0.5)), 6)
        0.1
    """

    start: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float)

    def __check_init__(self):
        check_positive("start", self.start)
        check_positive("end", self.end)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.start * (self.end / self.start) ** s


class WarmupStableDecay(AbstractSchedule):
    """Linear from `start` to `peak`, then `peak`, then down to `end`.

    The decay is linear, or `"1-sqrt"`: end + (peak - end)(1 - √t) at the fraction t of the decay,
    which falls steeply at first and slowly at the end.

    **Args:**
    - `peak`: the value between warmup and decay.
    - `warmup`, `decay`: the fractions of the run at its start and its end in which the value moves,
      positive, together at most 1.
    - `start`, `end`: the values at s = 0 and s = 1, by default 0.
    - `decay_shape`: `"linear"` or `"1-sqrt"`.

    **Raises:** `InputError` for fractions out of these bounds and for another shape.
    **Differentiation:** at the first moment of a `"1-sqrt"` decay, where the slope is infinite, it
    is taken as 0.
    **Reference:** Hu et al., "MiniCPM", arXiv 2404.06395 (2024); for 1 - √t Hägele et al., "Scaling
    laws and compute-optimal training beyond fixed training durations", arXiv 2405.18392 (2024).

    **Example:**

        >>> import esljax as esl
        >>> [round(float(esl.WarmupStableDecay(1.0)(s)), 6) for s in (0.05, 0.5, 0.9)]
        [0.5, 1.0, 0.5]
        >>> round(float(esl.WarmupStableDecay(1.0, decay_shape="1-sqrt")(0.85)), 6)
        0.5
    """

    peak: Scalar = eqx.field(converter=as_float)
    warmup: Scalar = eqx.field(converter=as_float, default=0.1)
    decay: Scalar = eqx.field(converter=as_float, default=0.2)
    start: Scalar = eqx.field(converter=as_float, default=0.0)
    end: Scalar = eqx.field(converter=as_float, default=0.0)
    decay_shape: Literal["linear", "1-sqrt"] = eqx.field(static=True, default="linear")

    def __check_init__(self):
        check_choice("decay_shape", self.decay_shape, ("linear", "1-sqrt"))
        check_positive("warmup", self.warmup)
        check_positive("decay", self.decay)
        whole = self.warmup + self.decay
        if known(whole) and not bool(jnp.all(whole <= 1 + 1e-6)):
            raise refuse(
                "decay", "leave warmup + decay at most 1", f"makes it {float(jnp.max(whole)):g}"
            )

    def __call__(self, s: ScalarLike) -> Scalar:
        rise = jnp.clip(s / self.warmup, 0, 1)
        fall = jnp.clip((1 - s) / self.decay, 0, 1)
        if self.decay_shape == "1-sqrt":
            fall = 1 - safe_root(1 - fall)
        return jnp.where(
            s < self.warmup,
            self.start + (self.peak - self.start) * rise,
            self.end + (self.peak - self.end) * fall,
        )

    def corners(self) -> Float[Array, " c"]:
        decay = 1 - self.decay
        # A root is no polynomial on any panel that begins at its branch point: they shrink there.
        near = decay + self.decay * 0.5 ** np.arange(1, 17)
        times = jnp.stack([self.warmup, decay])
        return times if self.decay_shape == "linear" else jnp.concatenate([times, near])


class Piecewise(AbstractSchedule):
    """Constant values between boundaries, such as a rate that falls in steps.

    From a boundary on, the next value holds. The boundaries are no parameters: the values that the
    steps of a run read do not change with a small move of one, so it has no gradient.

    **Args:** `values`: shape (m,). `boundaries`: the m-1 increasing times in (0, 1) at which the
    value changes; known numbers.
    **Raises:** `InputError` for another number of boundaries and for boundaries that do not
    increase within (0, 1).

    **Example:**

        >>> import esljax as esl
        >>> drops = esl.Piecewise([0.1, 0.01, 0.001], boundaries=[0.5, 0.75])
        >>> [f"{float(rate):g}" for rate in drops.rates(4)]
        ['0.1', '0.1', '0.01', '0.001']
    """

    values: Float[Array, " m"] = eqx.field(converter=as_float)
    boundaries: tuple[float, ...] = eqx.field(static=True, converter=_as_numbers)

    def __check_init__(self):
        values, times = self.values, self.boundaries
        if values.ndim != 1 or values.size < 1:
            raise refuse(
                "values", "have shape (m,) with m of at least 1", f"has shape {values.shape}"
            )
        if len(times) != values.size - 1:
            raise refuse(
                "boundaries", f"be {values.size - 1}, one less than the values", f"is {len(times)}"
            )
        if not all(a < b for a, b in itertools.pairwise([0.0, *times, 1.0])):
            raise refuse("boundaries", "increase within (0, 1)", f"is {times}")

    def __call__(self, s: ScalarLike) -> Scalar:
        s = as_float(s)
        # A compiler may divide k by K as k times 1/K: step k must still be on its own side.
        times = jnp.asarray(self.boundaries, s.dtype) - 2 * jnp.finfo(s.dtype).eps
        passed = s[..., None] >= times
        return self.values[jnp.sum(passed, axis=-1, dtype=int)]

    def corners(self) -> np.ndarray:
        return np.asarray(self.boundaries)

    def _summary(self) -> str:
        if not known(self.values) or self.values.ndim > 1:
            return f"values {in_short(self.values)}, boundaries {self.boundaries}"
        values = [in_short(value) for value in self.values]
        pieces = [f"{v} to s = {s:g}" for v, s in zip(values, self.boundaries, strict=False)]
        return ", ".join([*pieces, f"{values[-1]} to the end"])


def as_schedule(value: Any, argument: str = "schedule") -> AbstractSchedule:
    """A number as `Constant`, and a schedule as it is.

    **Raises:** `InputError` for anything else. A bare function may be one of s or of a count of
    steps, so it is rejected.
    """
    if isinstance(value, AbstractSchedule):
        return value
    must = (
        "be a number or a schedule, such as Cosine(0.1), Knots(values) for a table "
        "or FromOptax(fn) for an optax schedule"
    )
    if not callable(value) and not isinstance(value, str | list | tuple | None):
        try:
            return Constant(value)
        except (TypeError, ValueError):
            pass  # no number either
    raise refuse(argument, must, f"is {in_words(value)}")
