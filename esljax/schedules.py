r"""Schedules: numbers that change over training time s ∈ [0, 1], such as a learning rate η or a
temperature T.

A schedule is a pytree whose floating leaves are its parameters, so `jax.grad` with respect to a
schedule is a schedule of derivatives and an optimizer can move it. Step k of K reads the schedule
at s = k/K:

    rates(K) = (schedule(0), schedule(1/K), ..., schedule((K-1)/K))
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import (
    as_float,
    check_choice,
    check_fits,
    check_positive,
    check_positive_int,
    in_words,
    known,
    refuse,
)
from esljax._types import Array, Float, Scalar, ScalarLike


class AbstractSchedule(eqx.Module):
    """A number as a function of training time s ∈ [0, 1].

    A subclass is an `equinox.Module` with one method, `__call__`; a gradient and an optimizer see
    its floating arrays. A schedule that counts steps also overrides `over`.

    **Example:**

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Wave(esl.AbstractSchedule):
        ...     mean: jax.Array
        ...     periods: int
        ...
        ...     def __call__(self, s):
        ...         return self.mean * (1 + jnp.sin(2 * jnp.pi * self.periods * s) / 2)
        >>> print(esl.Langevin(Wave(jnp.array(0.1), 2)).learning_rate.rates(4).round(3))
        [0.1 0.1 0.1 0.1]
    """

    @abc.abstractmethod
    def __call__(self, s: ScalarLike) -> Scalar:
        """The value at training time `s`; differentiable in `s` and in every floating leaf."""

    def over(self, steps: int) -> "AbstractSchedule":
        """The schedule of a run of `steps` steps: this one, unless a subclass counts steps."""
        return self

    def rates(self, steps: int) -> Float[Array, " K"]:
        """The values that a run of `steps` steps reads.

        **Args:** `steps`: K ≥ 1.
        **Returns:** shape (K,), the values at s = k/K, k = 0, ..., K-1.
        **Raises:** `InputError` if `steps` is not a positive integer.
        **Differentiation:** forward and reverse, in every floating leaf.
        """
        check_positive_int("steps", steps)
        kept = 4 * steps * jnp.result_type(float).itemsize
        check_fits("steps", kept, f"the rates of {steps:,} steps", "take fewer steps")
        times = jnp.arange(steps, dtype=jnp.result_type(float)) / steps
        return jax.vmap(self.over(steps))(times)


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
    """Linear from `start` to `peak`, then `peak`, then linear to `end`.

    **Args:**
    - `peak`: the value between warmup and decay.
    - `warmup`, `decay`: the fractions of the run at its start and its end in which the value moves,
      positive, together at most 1.
    - `start`, `end`: the values at s = 0 and s = 1, by default 0.

    **Raises:** `InputError` for fractions out of these bounds.
    **Reference:** Hu et al., "MiniCPM", arXiv 2404.06395 (2024).

    **Example:**

        >>> import esljax as esl
        >>> [round(float(esl.WarmupStableDecay(1.0)(s)), 6) for s in (0.05, 0.5, 0.9)]
        [0.5, 1.0, 0.5]
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

    `"log-linear"` interpolates the logarithms and holds them as its parameters: every step of an
    optimizer then keeps the values positive and is relative to their size. `"linear"` interpolates
    the values themselves.

    **Args:** `values`: shape (m,), positive if log-linear. `interpolation`: one of these two.
    **Raises:** `InputError` for another shape, another interpolation, or values that are not
    positive.

    **Example:**

        >>> import esljax as esl
        >>> round(float(esl.Knots([1.0, 4.0])(0.5)), 6)
        2.0
    """

    parameters: Float[Array, " m"]
    """The interpolated numbers: the logarithms of the values, or the values themselves."""
    interpolation: Literal["log-linear", "linear"] = eqx.field(static=True)
    """How the values between the knots are found."""

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
    """An optax schedule `fn(count)`, read at count = s · steps. It has no trainable leaf.

    **Args:** `fn`: a function of the count of steps to a number. `steps`: how many counts training
    time 0 to 1 spans; by default the steps of the run that reads it, so that step k reads `fn(k)`.
    **Raises:** `InputError` if `fn` is no function, and where the schedule is read outside of a run
    and `steps` is not given.

    **Example:**

        >>> import optax
        >>> import esljax as esl
        >>> rule = esl.Langevin(esl.FromOptax(optax.cosine_decay_schedule(0.1, 100)))
        >>> [f"{float(rate):.4f}" for rate in rule.learning_rate.rates(4)]
        ['0.1000', '0.1000', '0.0999', '0.0998']
    """

    fn: Callable[[Any], Any] = eqx.field(static=True)
    """The function of the count of steps."""
    steps: int | None = eqx.field(static=True)
    """The number of counts from s = 0 to s = 1; None for that of the run."""

    def __init__(self, fn: Callable[[Any], Any], steps: int | None = None):
        if not callable(fn) or isinstance(fn, AbstractSchedule):
            raise refuse("fn", "be optax's function of a count of steps", f"is {fn!r}")
        if steps is not None:
            check_positive_int("steps", steps)
        self.fn, self.steps = fn, steps

    def over(self, steps: int) -> "FromOptax":
        return self if self.steps is not None else FromOptax(self.fn, steps)

    def __call__(self, s: ScalarLike) -> Scalar:
        if self.steps is None:
            raise refuse(
                "steps", "be given where no run supplies it, as FromOptax(fn, steps)", "is None"
            )
        return as_float(self.fn(_counted(as_float(s), self.steps)))


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


def _counted(s: Scalar, count: int) -> Scalar:
    """s · count, and a whole number where s is a rounded k/count: a table must give back its
    entries, and a step must fall on its own side."""
    position = s * count
    nearest = jnp.round(position)
    # s = k/count is off by half a unit of its last place and the product by another: together one
    # epsilon of at most count.
    missed = jnp.abs(position - nearest) <= count * jnp.finfo(position.dtype).eps
    return position + jax.lax.stop_gradient(jnp.where(missed, nearest - position, 0))
