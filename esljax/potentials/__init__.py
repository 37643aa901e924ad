"""Φ: the objective that drives an ensemble, the data and the models that it is made of."""

from esljax.potentials import datasets, models
from esljax.potentials.analytic import DoubleWell, FromFunction, Mixture, Quadratic
from esljax.potentials.base import AbstractPotential, check_potential
from esljax.potentials.curriculum import Curriculum
from esljax.potentials.datasets import Examples
from esljax.potentials.driven import Driven
from esljax.potentials.flax import FlaxLoss
from esljax.potentials.models import mlp

__all__ = [
    "AbstractPotential",
    "Curriculum",
    "DoubleWell",
    "Driven",
    "Examples",
    "FlaxLoss",
    "FromFunction",
    "Mixture",
    "Quadratic",
    "check_potential",
    "datasets",
    "mlp",
    "models",
]
