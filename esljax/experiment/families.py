"""Families of learning-rate schedules: one shape each, with numbers of its own that a search tunes.

A search moves unconstrained numbers x. A rate is cap · sigmoid(x), so that no step leaves the range
(0, cap) in which runs stay finite, and a share of training time is a sigmoid too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esljax._types import Array
from esljax.experiment.spelling import Spelled
from esljax.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    Exponential,
    Knots,
    Linear,
    WarmupStableDecay,
)


class Family(NamedTuple):
    """Schedules of one shape, for `front`.

    **Example:** a rate that falls to a floor of its own.

        >>> import esljax as esl
        >>> from esljax.experiment import Family, bounded, unbounded
        >>> family = Family(
        ...     start=lambda rate, cap: (unbounded(rate, cap), unbounded(0.1, 1.0)),
        ...     make=lambda x, cap: esl.Linear(
        ...         bounded(x[0], cap), bounded(x[0], cap) * bounded(x[1], 1.0)
        ...     ),
        ... )
        >>> schedule = family.make(family.start(0.5, 2.0), 2.0)
        >>> round(float(schedule(0.0)), 4), round(float(schedule(1.0)), 4)
        (0.5, 0.05)
    """

    start: Callable[[float, float], Any]
    """A rate and the cap to a pytree of unconstrained numbers x, where a search starts."""
    make: Callable[[Any, float], AbstractSchedule]
    """x and the cap to a schedule."""


def bounded(x: Any, most: Any) -> Array:
    """most · sigmoid(x): between 0 and `most` for every x."""
    return most * jax.nn.sigmoid(jnp.asarray(x))


def unbounded(value: Any, most: Any) -> Array:
    """The x at which `bounded` is a value between 0 and `most`."""
    share = jnp.clip(jnp.asarray(value, jnp.result_type(float)) / most, 1e-6, 1 - 1e-6)
    return jnp.log(share) - jnp.log1p(-share)


def knots_of(count: int) -> Family:
    """Schedules with a free rate at each of `count` knots, log-linear between them."""
    return Family(
        start=lambda rate, cap: unbounded(jnp.full(count, rate), cap),
        make=lambda x, cap: Knots(bounded(x, cap)),
    )


def fitted(count: int, schedule: Callable[[Array], Array], cap: float) -> Array:
    """The x of `knots_of(count)` whose knots read a schedule, as far as they are clear of 0 and the
    cap, where no gradient is left."""
    rates = jax.vmap(schedule)(jnp.linspace(0.0, 1.0, count))
    return unbounded(jnp.clip(rates, 1e-3 * cap, 0.95 * cap), cap)


def scaled(shape: Callable[[Array], AbstractSchedule]) -> Family:
    """Schedules of a shape whose only number is its peak."""
    return Family(start=unbounded, make=lambda x, cap: shape(bounded(x, cap)))


def _tuned_decay(x: Any, cap: float) -> AbstractSchedule:
    peak = bounded(x["peak"], cap)
    # A third of the run is left for the middle.
    warmup, decay = bounded(x["warmup"], 1 / 3), bounded(x["decay"], 1 / 3)
    floor = bounded(x["floor"], 1.0)
    start = bounded(x["start"], 1.0)
    return WarmupStableDecay(peak, warmup, decay, start=start * peak, end=floor * peak)


def _exponential(x: Any, cap: float) -> AbstractSchedule:
    return Exponential(bounded(x["first"], cap), bounded(x["last"], cap))


def usual_families() -> dict[str, Family]:
    """The families in common use, by name.

    Constant, linear decay, cosine, and warmup stable decay with 10 % warmup and 20 % decay have a
    peak to tune; `exponential_tuned` has both ends, and so may decay or rise;
    `warmup_stable_decay_tuned` has its peak, the shares of warmup and decay (up to a third of the
    run each), and the rates at both ends.

    **Example:**

        >>> import esljax as esl
        >>> cosine = esl.usual_families()["cosine"]
        >>> round(float(cosine.make(cosine.start(0.25, 1.0), 1.0)(0.0)), 4)
        0.25
    """
    families = {
        "constant": scaled(Constant),
        "linear_decay": scaled(lambda peak: Linear(peak, 0.0)),
        "cosine": scaled(Cosine),
        "exponential_tuned": Family(
            start=lambda rate, cap: dict.fromkeys(("first", "last"), unbounded(rate, cap)),
            make=_exponential,
        ),
        "warmup_stable_decay": scaled(WarmupStableDecay),
        "warmup_stable_decay_tuned": Family(
            start=lambda rate, cap: {
                "peak": unbounded(rate, cap),
                "warmup": unbounded(0.1, 1 / 3),
                "decay": unbounded(0.2, 1 / 3),
                "start": unbounded(0.3, 1.0),
                "floor": unbounded(0.1, 1.0),
            },
            make=_tuned_decay,
        ),
    }
    return Spelled(families, {"exponential": "exponential_tuned"})
