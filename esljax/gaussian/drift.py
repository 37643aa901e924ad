r"""The linear drift of a potential and the schedules of a rule, converted and checked."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from esljax._checks import as_float, check_finite, check_nonnegative, in_words, refuse
from esljax._types import Array
from esljax.gaussian.law import AnyLaw
from esljax.schedules import AbstractSchedule


@runtime_checkable
class HasStiffness(Protocol):
    """Φ = (θ - c)ᵀ K (θ - c)/2, or the linear force -K (θ - c) where K is not symmetric."""

    @property
    def stiffness(self) -> Any:
        """K: a number, its diagonal (d,), or a matrix (d, d); in units of the potential per θ²."""
        ...

    @property
    def center(self) -> Any:
        """c: a number or shape (d,), in units of θ."""
        ...


@runtime_checkable
class HasSchedules(Protocol):
    """A Langevin rule: a learning rate per step and a temperature, both schedules on s ∈ [0, 1]."""

    @property
    def learning_rate(self) -> Any:
        """η per step, in units of θ² per unit of the potential."""
        ...

    @property
    def temperature(self) -> Any:
        """T, in units of the potential."""
        ...


class Schedules(NamedTuple):
    """A rule that is nothing but its schedules."""

    learning_rate: Any
    temperature: Any


class Drift(NamedTuple):
    """K, c and the covariance of the gradient noise, as stored: a number, (d,) or (d, d)."""

    stiffness: Array
    center: Array
    noise: Array | None


def drift_of(law: AnyLaw, potential: Any) -> Drift:
    """The linear drift of a potential for a law of d coordinates.

    **Raises:** `InputError` for a potential without one, and for shapes that do not fit the law.
    """
    if not isinstance(potential, HasStiffness):
        must = "have a stiffness and a center, as Quadratic(1.0) has"
        raise refuse("potential", must, f"is {in_words(potential)}")
    d = law.mean.size
    stiffness, center = as_float(potential.stiffness), as_float(potential.center)
    noise = getattr(potential, "gradient_noise", None)
    noise = None if noise is None else as_float(noise)
    _check_fits("potential.stiffness", stiffness, d)
    if center.shape not in ((), (d,)):
        raise refuse(
            "potential.center", f"be a number or have shape ({d},)", f"has shape {center.shape}"
        )
    check_finite("potential.stiffness", stiffness)
    check_finite("potential.center", center)
    if noise is not None:
        _check_fits("potential.gradient_noise", noise, d)
    return Drift(stiffness, center, noise)


def schedules_of(rule: Any, steps: int) -> tuple[Any, Any]:
    """The learning rate and the temperature of a rule, as they are over so many steps.

    **Raises:** `InputError` for a rule without both, and for values that are negative or not
    finite.
    """
    if not isinstance(rule, HasSchedules):
        must = "have a learning rate and a temperature, as Langevin(0.1) has"
        raise refuse("rule", must, f"is {in_words(rule)}")
    schedules = _over(rule.learning_rate, steps), _over(rule.temperature, steps)
    for name, schedule in zip(("learning_rate", "temperature"), schedules, strict=True):
        _check_schedule(f"rule.{name}", schedule)
    return schedules


def _check_fits(argument: str, value: Array, d: int) -> None:
    if value.shape not in ((), (d,), (d, d)):
        raise refuse(
            argument, f"be a number or have shape ({d},) or ({d}, {d})", f"has shape {value.shape}"
        )


def _over(schedule: Any, steps: int) -> Any:
    """The schedule of a run of so many steps; any other function of s as it is."""
    return schedule.over(steps) if isinstance(schedule, AbstractSchedule) else schedule


def _check_schedule(argument: str, schedule: Any) -> None:
    values = jax.vmap(schedule)(jnp.linspace(0, 1, 65))
    if values.ndim != 1:
        raise refuse(argument, "be a schedule of one number", f"gives the shape {values.shape[1:]}")
    check_finite(argument, values)
    check_nonnegative(argument, values)
