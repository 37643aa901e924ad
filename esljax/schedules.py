r"""Schedules: numbers that change over training time s ∈ [0, 1], such as a learning rate η or a temperature T.

A schedule is a pytree whose floating leaves are its parameters, so `jax.grad` with respect to a schedule is a schedule of
derivatives and an optimizer can move it. Step k of K reads the schedule at s = k/K:

    rates(K) = (schedule(0), schedule(1/K), ..., schedule((K-1)/K))
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_choice, check_positive, check_positive_int, known, refuse
from esljax._types import Array, Float, Scalar, ScalarLike


class AbstractSchedule(eqx.Module):
    """A number as a function of training time s ∈ [0, 1]."""

    @abc.abstractmethod
    def __call__(self, s: ScalarLike) -> Scalar:
        """The value at training time `s`; differentiable in `s` and in every floating leaf."""

    def rates(self, steps: int) -> Float[Array, " K"]:
        """The values that a run of `steps` steps reads.

        **Args:** `steps`: K ≥ 1.
        **Returns:** shape (K,), the values at s = k/K, k = 0, ..., K-1.
        **Raises:** `InputError` if `steps` is not a positive integer.
        **Differentiation:** forward and reverse, in every floating leaf.
        """
        check_positive_int("steps", steps)
        return jax.vmap(self)(jnp.arange(steps, dtype=jnp.result_type(float)) / steps)


class Constant(AbstractSchedule):
    """value at every s."""

    value: Scalar = eqx.field(converter=as_float)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.value


class Linear(AbstractSchedule):
    """start + (end - start) s."""

    start: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.start + (self.end - self.start) * s


class Cosine(AbstractSchedule):
    """end + (peak - end) (1 + cos πs)/2, as in SGDR (Loshchilov and Hutter, 2017)."""

    peak: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float, default=0.0)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.end + (self.peak - self.end) * (1 + jnp.cos(jnp.pi * s)) / 2


class Exponential(AbstractSchedule):
    """start (end/start)^s; both ends must be positive."""

    start: Scalar = eqx.field(converter=as_float)
    end: Scalar = eqx.field(converter=as_float)

    def __check_init__(self):
        check_positive("start", self.start)
        check_positive("end", self.end)

    def __call__(self, s: ScalarLike) -> Scalar:
        return self.start * (self.end / self.start) ** s


class WarmupStableDecay(AbstractSchedule):
    """Linear from `start` to `peak` over the first `warmup` of the run, `peak`, linear to `end` over the last `decay`.

    As in MiniCPM (Hu et al., 2024). `warmup` and `decay` are fractions of the run, positive, together at most 1.
    """

    peak: Scalar = eqx.field(converter=as_float)
    warmup: Scalar = eqx.field(converter=as_float, default=0.1)
    decay: Scalar = eqx.field(converter=as_float, default=0.2)
    start: Scalar = eqx.field(converter=as_float, default=0.0)
    end: Scalar = eqx.field(converter=as_float, default=0.0)

    def __check_init__(self):
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
        return jnp.where(
            s < self.warmup,
            self.start + (self.peak - self.start) * rise,
            self.end + (self.peak - self.end) * fall,
        )


class Knots(AbstractSchedule):
    """Values at m ≥ 2 evenly spaced times 0, 1/(m-1), ..., 1 and an interpolation between them.

    `"log-linear"` interpolates log values linearly and holds them as its parameters: every step of an optimizer then keeps the
    values positive and is relative to their size. `"linear"` interpolates the values themselves.

    **Example:**

        >>> float(Knots([1.0, 4.0])(0.5))
        2.0
    """

    parameters: Float[Array, " m"]
    interpolation: Literal["log-linear", "linear"] = eqx.field(static=True)

    def __init__(self, values: Any, interpolation: Literal["log-linear", "linear"] = "log-linear"):
        values = as_float(values)
        check_choice("interpolation", interpolation, ("log-linear", "linear"))
        if values.ndim != 1 or values.size < 2:
            raise refuse(
                "values", "have shape (m,) with m of at least 2", f"has shape {values.shape}"
            )
        if interpolation == "log-linear":
            check_positive("values", values)
        self.parameters = jnp.log(values) if interpolation == "log-linear" else values
        self.interpolation = interpolation

    @property
    def values(self) -> Float[Array, " m"]:
        """The values at the knots, shape (m,)."""
        return jnp.exp(self.parameters) if self.interpolation == "log-linear" else self.parameters

    def __call__(self, s: ScalarLike) -> Scalar:
        links = self.parameters.size - 1
        position = _counted(jnp.clip(as_float(s), 0, 1), links)
        left = jnp.clip(jnp.floor(position).astype(int), 0, links - 1)
        weight = position - left
        between = (1 - weight) * self.parameters[left] + weight * self.parameters[left + 1]
        return jnp.exp(between) if self.interpolation == "log-linear" else between


class FromOptax(AbstractSchedule):
    """An optax schedule `fn(count)` of `steps` steps, read at count = s · steps. It has no trainable leaf."""

    fn: Callable[[Any], Any] = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __check_init__(self):
        if not callable(self.fn):
            raise refuse("fn", "be a function of the count", f"is {self.fn!r}")
        check_positive_int("steps", self.steps)

    def __call__(self, s: ScalarLike) -> Scalar:
        return as_float(self.fn(_counted(as_float(s), self.steps)))


def as_schedule(value: AbstractSchedule | ScalarLike) -> AbstractSchedule:
    """A number becomes `Constant`; a schedule stays what it is."""
    return value if isinstance(value, AbstractSchedule) else Constant(value)


def _counted(s: Scalar, count: int) -> Scalar:
    """s · count; a whole number where s is a rounded k/count, so that a table gives back its entries and a step falls on its own side."""
    position = s * count
    nearest = jnp.round(position)
    # s = k/count is off by half a unit of its last place and the product by another: together one epsilon of at most count.
    missed = jnp.abs(position - nearest) <= count * jnp.finfo(position.dtype).eps
    return position + jax.lax.stop_gradient(jnp.where(missed, nearest - position, 0))
