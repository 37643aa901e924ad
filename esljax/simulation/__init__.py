"""The ensemble tracker: rules of motion, the loop over training time, its derivatives, and what it returns."""

from esljax.simulation.adjoint import AbstractGradient, Autodiff, ForwardMode, HessianAdjoint
from esljax.simulation.loop import check_functions, check_links, group_length, simulate
from esljax.simulation.rules import AbstractRule, Controls, Langevin, ProbabilityFlow
from esljax.simulation.trajectory import Trajectory, check_runs, from_snapshots, on_devices, stack

__all__ = [
    "AbstractGradient",
    "AbstractRule",
    "Autodiff",
    "Controls",
    "ForwardMode",
    "HessianAdjoint",
    "Langevin",
    "ProbabilityFlow",
    "Trajectory",
    "check_functions",
    "check_links",
    "check_runs",
    "from_snapshots",
    "group_length",
    "on_devices",
    "simulate",
    "stack",
]
