"""Differentiable simulation of learning as irreversible transport.

Training moves a whole ensemble of model configurations. Its entropy production Σ cannot be less
than the squared Wasserstein distance between start and end, the epistemic speed limit (Okanohara,
arXiv 2601.17607). This package simulates such ensembles, measures both sides, and optimizes
schedules toward the limit by gradient.
"""

import functools
import sys
import warnings
from typing import Any

# First: it answers signals while the others are imported.
from esljax import _starting as _starting
from esljax import (
    density,
    gaussian,
    measures,
    optimization,
    potentials,
    results,
    schedules,
    sharding,
    simulation,
    study,
    transport,
    velocity,
)
from esljax._checks import InputError
from esljax.experiment import (
    Comparison,
    Front,
    Plan,
    Problem,
    RunConfig,
    compare,
    front,
    plan_memory,
    run,
    usual_families,
    usual_shapes,
)
from esljax.files import Checkpoints, Terminated, recordings
from esljax.measures import (
    FreeEnergy,
    SpeedLimit,
    constant_speed,
    free_energy,
    jarzynski,
    minibatch_noise,
    speed_limit,
)
from esljax.optimization import Equality, Optimum, optimize
from esljax.potentials import (
    AbstractPotential,
    Curriculum,
    DoubleWell,
    Driven,
    FlaxLoss,
    FromFunction,
    Mixture,
    Quadratic,
    datasets,
    models,
    symmetry,
)
from esljax.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    Exponential,
    FromOptax,
    Knots,
    Linear,
    Piecewise,
    Scaled,
    Warmup,
    WarmupStableDecay,
    load_schedule,
)
from esljax.sharding import member_mesh
from esljax.simulation import (
    AbstractGradient,
    AbstractRule,
    Autodiff,
    ForwardMode,
    HessianAdjoint,
    Langevin,
    ProbabilityFlow,
    Trajectory,
    from_checkpoints,
    from_snapshots,
    simulate,
)
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    HierarchicalTransport,
    MappedTransport,
    ProjectedTransport,
    QuotientTransport,
    SinkhornTransport,
    SlicedTransport,
    Solution,
    principal_directions,
    random_directions,
)
from esljax.velocity import (
    AbstractVelocity,
    AffineVelocity,
    FlowVelocity,
    HistogramVelocity,
    KDEVelocity,
    KernelVelocity,
    NetworkVelocity,
    PathVelocity,
    TransportVelocity,
)

__version__ = "0.1.0"

# The public modules are files of rooms; `import esljax.datasets` finds them as before.
sys.modules.update(
    {
        "esljax.datasets": datasets,
        "esljax.executors": study.executors,
        "esljax.models": models,
        "esljax.recordings": recordings,
        "esljax.symmetry": symmetry,
    }
)

__all__ = [
    "AbstractGradient",
    "AbstractPotential",
    "AbstractRule",
    "AbstractSchedule",
    "AbstractTransport",
    "AbstractVelocity",
    "AffineVelocity",
    "Autodiff",
    "Checkpoints",
    "Comparison",
    "Constant",
    "Cosine",
    "Curriculum",
    "DoubleWell",
    "Driven",
    "Equality",
    "ExactTransport",
    "Exponential",
    "FlaxLoss",
    "FlowVelocity",
    "ForwardMode",
    "FreeEnergy",
    "FromFunction",
    "FromOptax",
    "Front",
    "GaussianTransport",
    "HessianAdjoint",
    "HierarchicalTransport",
    "HistogramVelocity",
    "InputError",
    "KDEVelocity",
    "KernelVelocity",
    "Knots",
    "Langevin",
    "Linear",
    "MappedTransport",
    "Mixture",
    "NetworkVelocity",
    "Optimum",
    "PathVelocity",
    "Piecewise",
    "Plan",
    "ProbabilityFlow",
    "Problem",
    "ProjectedTransport",
    "Quadratic",
    "QuotientTransport",
    "RunConfig",
    "Scaled",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "SpeedLimit",
    "Terminated",
    "Trajectory",
    "TransportVelocity",
    "Warmup",
    "WarmupStableDecay",
    "compare",
    "constant_speed",
    "datasets",
    "density",
    "free_energy",
    "from_checkpoints",
    "from_snapshots",
    "front",
    "gaussian",
    "jarzynski",
    "load_schedule",
    "measures",
    "member_mesh",
    "minibatch_noise",
    "models",
    "optimization",
    "optimize",
    "plan_memory",
    "potentials",
    "principal_directions",
    "random_directions",
    "recordings",
    "results",
    "run",
    "schedules",
    "sharding",
    "simulate",
    "simulation",
    "speed_limit",
    "study",
    "symmetry",
    "transport",
    "usual_families",
    "usual_shapes",
    "velocity",
]

# Names of 0.1 before the rooms, and what they are called now: aliases for one release.
_RENAMED = {
    "AbstractDensity": "density.AbstractDensity",
    "AbstractEntropy": "density.AbstractEntropy",
    "AbstractLogDensity": "density.AbstractLogDensity",
    "Controls": "simulation.Controls",
    "Entropy": "density.Entropy",
    "Evidence": "measures.Evidence",
    "Finding": "measures.Finding",
    "FlowDensity": "density.FlowDensity",
    "FlowEntropy": "density.FlowEntropy",
    "GaussianDensity": "density.GaussianDensity",
    "GaussianEntropy": "density.GaussianEntropy",
    "HistogramDensity": "density.HistogramDensity",
    "HistogramEntropy": "density.HistogramEntropy",
    "History": "optimization.History",
    "Interval": "measures.Interval",
    "Iteration": "optimization.Iteration",
    "KDEEntropy": "density.KDEEntropy",
    "KernelDensity": "density.KDEDensity",
    "LostWorkersError": "study.LostWorkersError",
    "Mapped": "MappedTransport",
    "MinibatchNoise": "measures.MinibatchNoise",
    "NearestNeighborEntropy": "density.NearestNeighborEntropy",
    "Projected": "ProjectedTransport",
    "Split": "measures.Split",
    "Study": "study.Study",
    "TransportedEntropy": "density.TransportedEntropy",
    "Velocity": "velocity.Velocity",
    "executors": "study.executors",
    "open_study": "study.open_study",
    "plan": "plan_memory",
    "recorded": "from_snapshots",
    "run_study": "study.run_study",
    "summarize": "study.summarize",
}

# Modules that became files of a room.
_MOVED = {
    "adjoint": "simulation",
    "chain": "measures",
    "checkpoints": "files",
    "cli": "command",
    "comparison": "experiment",
    "configuration": "experiment",
    "description": "files",
    "diagnosis": "measures",
    "dynamics": "simulation",
    "entropy": "density",
    "entropy_production": "measures",
    "fields": "velocity",
    "measurement": "command",
    "memory": "experiment",
    "minibatch": "measures",
    "optimize_cli": "command",
    "plotting": "figures",
    "references": "command",
    "report": "measures",
    "runs": "experiment",
    "scores": "velocity",
    "sinkhorn": "transport",
    "storage": "files",
    "study_cli": "command",
    "study_plotting": "figures",
    "study_run": "study",
    "study_store": "study",
    "study_summary": "study",
    "trajectory": "simulation",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        message = f"esljax.{name} is now esljax.{new}; the old name goes with the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return functools.reduce(getattr, new.split("."), sys.modules[__name__])
    if name in _MOVED:
        # An ImportError, because `from esljax import` would hide the sentence of any other.
        raise ImportError(f"Module esljax.{name} has become part of esljax.{_MOVED[name]}.")
    raise AttributeError(f"module 'esljax' has no attribute {name!r}")
