"""Σ, L², W2², their split and errors, the free energy, and the noise of batches."""

from esljax.measures.balance import Balance, FreeEnergy
from esljax.measures.chain import compared
from esljax.measures.evidence import Evidence
from esljax.measures.finding import Finding
from esljax.measures.free_energy import free_energy
from esljax.measures.minibatch import MinibatchNoise, minibatch_noise
from esljax.measures.report import Interval, SpeedLimit, Split, average, jackknife_groups
from esljax.measures.speed_limit import speed_limit

__all__ = [
    "Balance",
    "Evidence",
    "Finding",
    "FreeEnergy",
    "Interval",
    "MinibatchNoise",
    "SpeedLimit",
    "Split",
    "average",
    "compared",
    "free_energy",
    "jackknife_groups",
    "minibatch_noise",
    "speed_limit",
]
