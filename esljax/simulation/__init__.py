"""The ensemble tracker: rules of motion, the loop over training time, its derivatives, and what it returns."""

from esljax.simulation.adjoint import AbstractGradient, Autodiff, ForwardMode, HessianAdjoint
from esljax.simulation.loop import check_functions, check_links, group_length, simulate
from esljax.simulation.rules import AbstractRule, Controls, Langevin, ProbabilityFlow
from esljax.simulation.trajectory import Trajectory, check_runs, on_devices, recorded, stack

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
    "group_length",
    "on_devices",
    "recorded",
    "simulate",
    "stack",
]
