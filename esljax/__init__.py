"""Differentiable simulation of learning as irreversible transport.

Training moves a whole ensemble of model configurations. Its entropy production Σ cannot be less than the squared Wasserstein distance
between start and end, the epistemic speed limit (Okanohara, arXiv 2601.17607). This package simulates such ensembles, measures both
sides, and optimizes schedules toward the limit by gradient.
"""

from esljax import datasets, gaussian, models
from esljax._checks import InputError
from esljax.adjoint import AbstractGradient, Autodiff, ForwardMode, HessianAdjoint
from esljax.dynamics import AbstractRule, Controls, Langevin
from esljax.fields import KernelVelocity, NetworkVelocity
from esljax.optimization import Equality, History, Iteration, Optimum, optimize
from esljax.potentials import AbstractPotential, DoubleWell, Driven, FlaxLoss, FromFunction, Mixture, Quadratic
from esljax.report import SpeedLimit, Split
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
from esljax.simulation import Trajectory, simulate
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
    "ExactTransport",
    "Exponential",
    "FlaxLoss",
    "ForwardMode",
    "FromFunction",
    "FromOptax",
    "GaussianTransport",
    "HessianAdjoint",
    "History",
    "InputError",
    "Iteration",
    "KernelVelocity",
    "Knots",
    "Langevin",
    "Linear",
    "Mapped",
    "Mixture",
    "NetworkVelocity",
    "Optimum",
    "PathVelocity",
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
    "simulate",
    "speed_limit",
]
