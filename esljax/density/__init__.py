"""q_s: the density of the law that an ensemble samples, and its entropy."""

from esljax.density.base import BLOCK, AbstractDensity, AbstractLogDensity, AbstractSmoother, Frame
from esljax.density.entropy import (
    AbstractEntropy,
    Entropy,
    FlowEntropy,
    GaussianEntropy,
    HistogramEntropy,
    KDEEntropy,
    NearestNeighborEntropy,
    TransportedEntropy,
)
from esljax.density.flow import FlowDensity
from esljax.density.gaussian import GaussianDensity
from esljax.density.histogram import HistogramDensity
from esljax.density.kernel import KDEDensity
from esljax.density.training import train

__all__ = [
    "BLOCK",
    "AbstractDensity",
    "AbstractEntropy",
    "AbstractLogDensity",
    "AbstractSmoother",
    "Entropy",
    "FlowDensity",
    "FlowEntropy",
    "Frame",
    "GaussianDensity",
    "GaussianEntropy",
    "HistogramDensity",
    "HistogramEntropy",
    "KDEDensity",
    "KDEEntropy",
    "NearestNeighborEntropy",
    "TransportedEntropy",
    "train",
]
