"""Differentiable simulation of learning as irreversible transport.

Training moves a whole ensemble of model configurations. Its entropy production Σ cannot be less than the squared Wasserstein distance
between start and end, the epistemic speed limit (Okanohara, arXiv 2601.17607). This package simulates such ensembles, measures both
sides, and optimizes schedules toward the limit by gradient.
"""

from esljax import datasets, gaussian, models, recordings
from esljax._checks import InputError
from esljax.adjoint import AbstractGradient, Autodiff, ForwardMode, HessianAdjoint
from esljax.diagnosis import Evidence, Finding
from esljax.dynamics import AbstractRule, Controls, Langevin, ProbabilityFlow
from esljax.optimization import Equality, History, Iteration, Optimum, optimize
from esljax.potentials import AbstractPotential, DoubleWell, Driven, FlaxLoss, FromFunction, Mixture, Quadratic
from esljax.report import Interval, SpeedLimit, Split
from esljax.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    Exponential,
    FromOptax,
    Knots,
    Linear,
    WarmupStableDecay,
)
from esljax.simulation import Trajectory, recorded, simulate
from esljax.speed_limit import speed_limit
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    Mapped,
    Projected,
    SinkhornTransport,
    SlicedTransport,
    Solution,
    principal_directions,
    random_directions,
)
from esljax.velocity import AbstractVelocity, AffineVelocity, PathVelocity, TransportVelocity, Velocity

__all__ = [
    "AbstractGradient",
    "AbstractPotential",
    "AbstractRule",
    "AbstractSchedule",
    "AbstractTransport",
    "AbstractVelocity",
    "AffineVelocity",
    "Autodiff",
    "Constant",
    "Controls",
    "Cosine",
    "DoubleWell",
    "Driven",
    "Equality",
    "Evidence",
    "ExactTransport",
    "Exponential",
    "Finding",
    "FlaxLoss",
    "ForwardMode",
    "FromFunction",
    "FromOptax",
    "GaussianTransport",
    "HessianAdjoint",
    "History",
    "InputError",
    "Interval",
    "Iteration",
    "Knots",
    "Langevin",
    "Linear",
    "Mapped",
    "Mixture",
    "Optimum",
    "PathVelocity",
    "ProbabilityFlow",
    "Projected",
    "Quadratic",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "SpeedLimit",
    "Split",
    "Trajectory",
    "TransportVelocity",
    "Velocity",
    "WarmupStableDecay",
    "datasets",
    "gaussian",
    "models",
    "optimize",
    "principal_directions",
    "random_directions",
    "recorded",
    "recordings",
    "simulate",
    "speed_limit",
]
