"""Φ: the objective that drives an ensemble, the data and the models that it is made of."""

from esljax.potentials import datasets, models, symmetry
from esljax.potentials.analytic import DoubleWell, FromFunction, Mixture, Quadratic
from esljax.potentials.base import AbstractPotential, check_potential
from esljax.potentials.curriculum import Curriculum
from esljax.potentials.driven import Driven
from esljax.potentials.flax import FlaxLoss
from esljax.potentials.keys import as_of_jax, drawn_in_line
from esljax.potentials.models import mlp
from esljax.potentials.own_models import Sizes, own_model, takes
from esljax.potentials.splits import Dataset, Examples

__all__ = [
    "AbstractPotential",
    "Curriculum",
    "Dataset",
    "DoubleWell",
    "Driven",
    "Examples",
    "FlaxLoss",
    "FromFunction",
    "Mixture",
    "Quadratic",
    "Sizes",
    "as_of_jax",
    "check_potential",
    "datasets",
    "drawn_in_line",
    "mlp",
    "models",
    "own_model",
    "symmetry",
    "takes",
]
