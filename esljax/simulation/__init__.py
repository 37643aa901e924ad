"""The ensemble tracker: rules, the loop over training time, its derivatives, and its result."""

from esljax.simulation.adjoint import (
    AbstractGradient,
    Autodiff,
    ForwardMode,
    HessianAdjoint,
    group_length,
)
from esljax.simulation.checks import check_functions, check_links
from esljax.simulation.diffusion import Diffusion
from esljax.simulation.loop import simulate
from esljax.simulation.rules import AbstractRule, Controls, Langevin, ProbabilityFlow
from esljax.simulation.streaming import from_checkpoints
from esljax.simulation.trajectory import (
    Folded,
    Keys,
    Trajectory,
    check_runs,
    from_snapshots,
    on_devices,
    stack,
)

__all__ = [
    "AbstractGradient",
    "AbstractRule",
    "Autodiff",
    "Controls",
    "Diffusion",
    "Folded",
    "ForwardMode",
    "HessianAdjoint",
    "Keys",
    "Langevin",
    "ProbabilityFlow",
    "Trajectory",
    "check_functions",
    "check_links",
    "check_runs",
    "from_checkpoints",
    "from_snapshots",
    "group_length",
    "on_devices",
    "simulate",
    "stack",
]
