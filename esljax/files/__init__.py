"""Everything that touches a disk: results, checkpoints, recordings, and descriptions of runs."""

from esljax.files import recordings, storage
from esljax.files.checkpoints import TERMINATED, Checkpoints, Terminated, alone, session
from esljax.files.companions import Selection, described
from esljax.files.names import patterns
from esljax.files.recordings import read, read_matrix

__all__ = [
    "TERMINATED",
    "Checkpoints",
    "Selection",
    "Terminated",
    "alone",
    "described",
    "patterns",
    "read",
    "read_matrix",
    "recordings",
    "session",
    "storage",
]
