"""Everything that touches a disk: results, checkpoints, recordings, and descriptions of runs."""

from esljax.files import programs, recordings, storage, writing
from esljax.files.checkpoints import Checkpoints, alone, is_ours, remove_ours, session
from esljax.files.companions import Selection, described
from esljax.files.description import describe
from esljax.files.names import patterns
from esljax.files.processes import LOST_PROCESS, watch_processes
from esljax.files.recordings import Stored, open_stored, read, read_matrix
from esljax.files.signals import TERMINATED, Terminated, deaf, ended, uninterrupted
from esljax.files.storage import digest
from esljax.files.tables import EXAMPLES, holds_examples, is_table, read_examples

__all__ = [
    "EXAMPLES",
    "LOST_PROCESS",
    "TERMINATED",
    "Checkpoints",
    "Selection",
    "Stored",
    "Terminated",
    "alone",
    "deaf",
    "describe",
    "described",
    "digest",
    "ended",
    "holds_examples",
    "is_ours",
    "is_table",
    "open_stored",
    "patterns",
    "programs",
    "read",
    "read_examples",
    "read_matrix",
    "recordings",
    "remove_ours",
    "session",
    "storage",
    "uninterrupted",
    "watch_processes",
    "writing",
]
