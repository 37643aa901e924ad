"""v_s: the velocity of an ensemble, estimated from snapshots."""

from esljax.velocity.affine import AffineVelocity
from esljax.velocity.base import (
    AbstractField,
    AbstractVariationalVelocity,
    AbstractVelocity,
    Snapshot,
    Velocity,
)
from esljax.velocity.density import FlowVelocity, HistogramVelocity, KDEVelocity
from esljax.velocity.kernel import KernelVelocity
from esljax.velocity.network import NetworkVelocity
from esljax.velocity.paths import Maps, PathVelocity, TransportVelocity

__all__ = [
    "AbstractField",
    "AbstractVariationalVelocity",
    "AbstractVelocity",
    "AffineVelocity",
    "FlowVelocity",
    "HistogramVelocity",
    "KDEVelocity",
    "KernelVelocity",
    "Maps",
    "NetworkVelocity",
    "PathVelocity",
    "Snapshot",
    "TransportVelocity",
    "Velocity",
]
