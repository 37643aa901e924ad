"""Differentiable simulation of learning as irreversible transport.

Training moves a whole ensemble of model configurations. Its entropy production Σ cannot be less than the squared Wasserstein distance
between start and end, the epistemic speed limit (Okanohara, arXiv 2601.17607). This package simulates such ensembles, measures both
sides, and optimizes schedules toward the limit by gradient.
"""

from esljax import datasets, executors, gaussian, models, recordings
from esljax._checks import InputError
from esljax.adjoint import AbstractGradient, Autodiff, ForwardMode, HessianAdjoint
from esljax.checkpoints import Checkpoints, Terminated
from esljax.configuration import RunConfig
from esljax.density import (
    AbstractDensity,
    AbstractLogDensity,
    FlowDensity,
    GaussianDensity,
    HistogramDensity,
    KernelDensity,
)
from esljax.diagnosis import Evidence, Finding
from esljax.dynamics import AbstractRule, Controls, Langevin, ProbabilityFlow
from esljax.entropy import (
    AbstractEntropy,
    Entropy,
    FlowEntropy,
    GaussianEntropy,
    HistogramEntropy,
    KDEEntropy,
    NearestNeighborEntropy,
)
from esljax.fields import KernelVelocity, NetworkVelocity
from esljax.free_energy import FreeEnergy, TransportedEntropy, free_energy
from esljax.memory import Plan, plan
from esljax.minibatch import MinibatchNoise, minibatch_noise
from esljax.optimization import Equality, History, Iteration, Optimum, optimize
from esljax.potentials import AbstractPotential, DoubleWell, Driven, FlaxLoss, FromFunction, Mixture, Quadratic
from esljax.report import Interval, SpeedLimit, Split
from esljax.runs import run
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
from esljax.scores import FlowVelocity, HistogramVelocity, KDEVelocity
from esljax.sharding import member_mesh
from esljax.simulation import simulate
from esljax.sinkhorn import SinkhornTransport
from esljax.speed_limit import speed_limit
from esljax.study import Study
from esljax.study_run import LostWorkersError, run_study
from esljax.study_store import open_study
from esljax.study_summary import summarize
from esljax.trajectory import Trajectory, recorded
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    Mapped,
    Projected,
    SlicedTransport,
    Solution,
    principal_directions,
    random_directions,
)
from esljax.velocity import AbstractVelocity, AffineVelocity, PathVelocity, TransportVelocity, Velocity

__all__ = [
    "AbstractDensity",
    "AbstractEntropy",
    "AbstractGradient",
    "AbstractLogDensity",
    "AbstractPotential",
    "AbstractRule",
    "AbstractSchedule",
    "AbstractTransport",
    "AbstractVelocity",
    "AffineVelocity",
    "Autodiff",
    "Checkpoints",
    "Constant",
    "Controls",
    "Cosine",
    "DoubleWell",
    "Driven",
    "Entropy",
    "Equality",
    "Evidence",
    "ExactTransport",
    "Exponential",
    "Finding",
    "FlaxLoss",
    "FlowDensity",
    "FlowEntropy",
    "FlowVelocity",
    "ForwardMode",
    "FreeEnergy",
    "FromFunction",
    "FromOptax",
    "GaussianDensity",
    "GaussianEntropy",
    "GaussianTransport",
    "HessianAdjoint",
    "HistogramDensity",
    "HistogramEntropy",
    "HistogramVelocity",
    "History",
    "InputError",
    "Interval",
    "Iteration",
    "KDEEntropy",
    "KDEVelocity",
    "KernelDensity",
    "KernelVelocity",
    "Knots",
    "Langevin",
    "Linear",
    "LostWorkersError",
    "Mapped",
    "MinibatchNoise",
    "Mixture",
    "NearestNeighborEntropy",
    "NetworkVelocity",
    "Optimum",
    "PathVelocity",
    "Plan",
    "ProbabilityFlow",
    "Projected",
    "Quadratic",
    "RunConfig",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "SpeedLimit",
    "Split",
    "Study",
    "Terminated",
    "Trajectory",
    "TransportVelocity",
    "TransportedEntropy",
    "Velocity",
    "WarmupStableDecay",
    "datasets",
    "executors",
    "free_energy",
    "gaussian",
    "member_mesh",
    "minibatch_noise",
    "models",
    "open_study",
    "optimize",
    "plan",
    "principal_directions",
    "random_directions",
    "recorded",
    "recordings",
    "run",
    "run_study",
    "simulate",
    "speed_limit",
    "summarize",
]
