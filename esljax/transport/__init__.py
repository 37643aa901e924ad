"""W2²: the squared Wasserstein distance between two ensembles."""

from esljax.transport.base import AbstractTransport, Solution
from esljax.transport.coordinates import (
    MappedTransport,
    ProjectedTransport,
    coordinates,
    principal_directions,
    random_directions,
)
from esljax.transport.exact import ExactTransport
from esljax.transport.gaussian import GaussianTransport
from esljax.transport.sinkhorn import SinkhornTransport
from esljax.transport.sliced import SlicedTransport

__all__ = [
    "AbstractTransport",
    "ExactTransport",
    "GaussianTransport",
    "MappedTransport",
    "ProjectedTransport",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "coordinates",
    "principal_directions",
    "random_directions",
]
