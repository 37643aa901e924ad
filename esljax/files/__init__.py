"""Everything that touches a disk: results, checkpoints, recordings, and descriptions of runs."""

from esljax.files import recordings, storage, writing
from esljax.files.checkpoints import Checkpoints, alone, is_ours, remove_ours, session
from esljax.files.companions import Selection, described
from esljax.files.description import describe
from esljax.files.names import patterns
from esljax.files.processes import LOST_PROCESS, watch_processes
from esljax.files.recordings import read, read_matrix
from esljax.files.signals import TERMINATED, Terminated, deaf, ended, uninterrupted

__all__ = [
    "LOST_PROCESS",
    "TERMINATED",
    "Checkpoints",
    "Selection",
    "Terminated",
    "alone",
    "deaf",
    "describe",
    "described",
    "ended",
    "is_ours",
    "patterns",
    "read",
    "read_matrix",
    "recordings",
    "remove_ours",
    "session",
    "storage",
    "uninterrupted",
    "watch_processes",
    "writing",
]
