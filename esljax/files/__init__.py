"""Everything that touches a disk: results, checkpoints, recordings, and descriptions of runs."""

from esljax.files import recordings, storage
from esljax.files.checkpoints import TERMINATED, Checkpoints, Terminated, alone, session
from esljax.files.processes import LOST_PROCESS, watch_processes
from esljax.files.recordings import read, read_matrix

__all__ = [
    "LOST_PROCESS",
    "TERMINATED",
    "Checkpoints",
    "Terminated",
    "alone",
    "read",
    "read_matrix",
    "recordings",
    "session",
    "storage",
    "watch_processes",
]
