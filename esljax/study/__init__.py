"""Many experiments: their description, store, workers and summary."""

from esljax.study import executors
from esljax.study.description import Study
from esljax.study.run import LostWorkersError, Progress, run_study
from esljax.study.schedules import schedule_of
from esljax.study.store import lock_path, open_study, read_study
from esljax.study.summary import Group, summarize

__all__ = [
    "Group",
    "LostWorkersError",
    "Progress",
    "Study",
    "executors",
    "lock_path",
    "open_study",
    "read_study",
    "run_study",
    "schedule_of",
    "summarize",
]
