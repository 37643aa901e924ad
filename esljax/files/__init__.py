"""Everything that touches a disk: results, checkpoints, recordings, and descriptions of runs."""

from esljax.files import recordings, storage, writing
from esljax.files.checkpoints import Checkpoints, alone, remove_ours, session
from esljax.files.companions import Selection, described
from esljax.files.names import patterns
from esljax.files.recordings import read, read_matrix
from esljax.files.signals import TERMINATED, Terminated, ended, uninterrupted

__all__ = [
    "TERMINATED",
    "Checkpoints",
    "Selection",
    "Terminated",
    "alone",
    "described",
    "ended",
    "patterns",
    "read",
    "read_matrix",
    "recordings",
    "remove_ours",
    "session",
    "storage",
    "uninterrupted",
    "writing",
]
