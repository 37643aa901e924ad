"""Schedules: numbers that change over training time, such as a learning rate or a temperature."""

from esljax.schedules.base import AbstractSchedule
from esljax.schedules.record import is_schedule
from esljax.schedules.saved import from_dict, load_schedule
from esljax.schedules.scaled import Scaled
from esljax.schedules.shapes import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    WarmupStableDecay,
    as_schedule,
)
from esljax.schedules.tables import FromOptax, Knots
from esljax.schedules.warmup import Warmup

__all__ = [
    "AbstractSchedule",
    "Constant",
    "Cosine",
    "Exponential",
    "FromOptax",
    "Knots",
    "Linear",
    "Piecewise",
    "Scaled",
    "Warmup",
    "WarmupStableDecay",
    "as_schedule",
    "from_dict",
    "is_schedule",
    "load_schedule",
]
