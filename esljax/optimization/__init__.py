"""Gradient optimization of any pytree of controls, under constraints, with doubts about itself."""

from esljax.optimization.horizon import GradientNorms, gradient_norms
from esljax.optimization.optimize import optimize
from esljax.optimization.result import Equality, History, Iteration, Optimum

__all__ = [
    "Equality",
    "GradientNorms",
    "History",
    "Iteration",
    "Optimum",
    "gradient_norms",
    "optimize",
]
