"""Schedules from tables and functions: knots and what lies between them, and optax schedules."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    as_count,
    as_float,
    check_choice,
    check_finite,
    check_positive,
    door,
    in_words,
    known,
    refuse,
)
from esljax._types import Array, Float, Scalar, ScalarLike
from esljax.results import in_short
from esljax.schedules import record
from esljax.schedules.base import AbstractSchedule


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
        >>> print(esl.Knots([1.0, 4.0]))
        Knots: 2 log-linear knots from 1 to 4: 1 4
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

    @classmethod
    @door
    def from_rates(cls, rates: Any) -> "Knots":
        """The inverse of `rates(K)`: the schedule whose K steps read exactly these K values.

        They are the values at s = k/K and so K of the K+1 linear knots at 0, 1/K, ..., 1; the last
        one holds to the end. `Knots(rates)` would spread them over [0, 1] instead, so that step k
        reads a value at k (K-1)/K.

        **Args:** `rates`: shape (K,), K ≥ 1, finite; such as `path.rates`, or a list.
        **Raises:** `InputError` for another shape and numbers that are not finite.
        **Differentiation:** in the rates.

        **Example:**

            >>> import esljax as esl
            >>> print(esl.Knots.from_rates([0.5, 0.25, 0.0]).rates(3))
            [0.5  0.25 0.  ]
        """
        rates = as_float(rates)
        if rates.ndim != 1 or rates.size < 1:
            raise refuse(
                "rates", "have shape (K,) with K of at least 1", f"has shape {rates.shape}"
            )
        check_finite("rates", rates)
        return cls(jnp.append(rates, rates[-1]), "linear")

    @property
    def values(self) -> Float[Array, " m"]:
        """The values at the knots, shape (m,)."""
        return jnp.exp(self.parameters) if self.interpolation == "log-linear" else self.parameters

    def __call__(self, s: ScalarLike) -> Scalar:
        links = self.parameters.size - 1
        position = _counted(jnp.clip(as_float(s), 0, 1), links)
        left = jnp.clip(jnp.floor(position).astype(int), 0, links - 1)
        weight = position - left.astype(position.dtype)
        between = (1 - weight) * self.parameters[left] + weight * self.parameters[left + 1]
        return jnp.exp(between) if self.interpolation == "log-linear" else between

    def corners(self) -> np.ndarray:
        return np.linspace(0, 1, self.parameters.size)[1:-1]

    @door
    def as_dict(self) -> dict[str, Any]:
        fields = {"interpolation": self.interpolation, "values": self.values}
        if self.interpolation == "log-linear":
            # Readers want the values; the parameters themselves are what comes back bit for bit.
            fields["log_values"] = self.parameters
        return record.encode(self, fields)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Knots":
        fields = dict(fields)
        logs = fields.pop("log_values", None)
        if logs is None:
            return cls(**fields)
        values = as_float(fields.get("values", ()))
        if fields.get("interpolation") != "log-linear" or values.shape != jnp.shape(logs):
            raise ValueError("`log_values` are not those of `values`")
        with np.errstate(over="ignore"):
            expected = np.exp(np.asarray(logs, np.float64)).astype(values.dtype)
        # 1e-3 for half precision; a value may have underflowed.
        if not np.allclose(values, expected, rtol=1e-3, atol=1e-37, equal_nan=True):
            raise ValueError("`values` are not those of `log_values` (delete the latter)")
        knots = cls(**{**fields, "values": jnp.ones_like(values)})
        return eqx.tree_at(lambda knots: knots.parameters, knots, as_float(logs))

    def _summary(self) -> str:
        if not known(self.parameters) or self.parameters.ndim != 1:
            return f"{self.interpolation} knots, parameters {in_short(self.parameters)}"
        values = self.values
        ends = f"from {in_short(values[0])} to {in_short(values[-1])}"
        return f"{values.size} {self.interpolation} knots {ends}: {in_short(values)}"


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
        self.fn = fn
        self.steps = None if steps is None else as_count("steps", steps)

    def over(self, steps: int) -> "FromOptax":
        return self if self.steps is not None else FromOptax(self.fn, steps)

    @door
    def as_dict(self) -> dict[str, Any]:
        """The table of its values: a file cannot hold a function. See `Knots.as_dict`."""
        if self.steps is None:
            raise refuse(
                "schedule",
                "have a number of steps to be saved as a table, as FromOptax(fn, steps)",
                "has none",
            )
        return Knots(self._table(self.steps), "linear").as_dict()

    def _summary(self) -> str:
        fn = in_words(self.fn)
        if self.steps is None:
            return f"{fn}, over the steps of the run"
        ends = f"from {in_short(self(0.0))} to {in_short(self(1.0))}"
        return f"{fn}, over {self.steps} steps {ends}"

    def __call__(self, s: ScalarLike) -> Scalar:
        if self.steps is None:
            raise refuse(
                "steps", "be given where no run supplies it, as FromOptax(fn, steps)", "is None"
            )
        return as_float(self.fn(_counted(as_float(s), self.steps)))


def _counted(s: Scalar, count: int) -> Scalar:
    """s · count, and a whole number where s is a rounded k/count: a table must give back its
    entries, and a step must fall on its own side."""
    position = s * count
    nearest = jnp.round(position)
    # s = k/count is off by half a unit of its last place and the product by another: together one
    # epsilon of at most count.
    missed = jnp.abs(position - nearest) <= count * jnp.finfo(position.dtype).eps
    return position + jax.lax.stop_gradient(jnp.where(missed, nearest - position, 0))
