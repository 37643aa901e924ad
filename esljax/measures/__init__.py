"""Σ, L², W2², their split and errors, the free energy, work, and the noise of batches."""

from esljax.measures.balance import Balance, FreeEnergy
from esljax.measures.bracket import Bracket, w2_bracket
from esljax.measures.chain import compared
from esljax.measures.errors import Interval, jackknife_groups
from esljax.measures.evidence import Evidence
from esljax.measures.finding import Finding
from esljax.measures.free_energy import free_energy
from esljax.measures.jarzynski import Jarzynski, jarzynski
from esljax.measures.keys import KeyShare, KeyShares
from esljax.measures.minibatch import MinibatchNoise, minibatch_noise
from esljax.measures.observable import ObservableLimit, observable_limit
from esljax.measures.report import SpeedLimit, Split, average
from esljax.measures.retiming import constant_speed
from esljax.measures.speed_limit import speed_limit

__all__ = [
    "Balance",
    "Bracket",
    "Evidence",
    "Finding",
    "FreeEnergy",
    "Interval",
    "Jarzynski",
    "KeyShare",
    "KeyShares",
    "MinibatchNoise",
    "ObservableLimit",
    "SpeedLimit",
    "Split",
    "average",
    "compared",
    "constant_speed",
    "free_energy",
    "jackknife_groups",
    "jarzynski",
    "minibatch_noise",
    "observable_limit",
    "speed_limit",
    "w2_bracket",
]
