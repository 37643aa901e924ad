"""Exact laws of linear drift, without members: the oracle of the package."""

from esljax.gaussian.descent import Descent, descent
from esljax.gaussian.distance import entropic_transport, sinkhorn_divergence, w2_squared
from esljax.gaussian.drift import HasSchedules, HasStiffness
from esljax.gaussian.front import Front, front
from esljax.gaussian.law import AnyLaw, Independent, Law
from esljax.gaussian.limit import laws, optimal_learning_rate, speed_limit

__all__ = [
    "AnyLaw",
    "Descent",
    "Front",
    "HasSchedules",
    "HasStiffness",
    "Independent",
    "Law",
    "descent",
    "entropic_transport",
    "front",
    "laws",
    "optimal_learning_rate",
    "sinkhorn_divergence",
    "speed_limit",
    "w2_squared",
]
