"""Whether a study fits: its results on the disk and in memory, and its runs in memory."""

import math
import shutil
from pathlib import Path

from esljax._checks import memory_of_the_machine, refuse, size
from esljax.experiment import Columns, memory_of_a_task, program_of, task_of
from esljax.study.columns import MOST_MADE
from esljax.study.description import Slice, Study

# The space that a file of a Zarr chunk takes on a usual disk, however short it is.
_BLOCK = 4096


def check_room(path: Path, study: Study, task_size: int, columns: Columns) -> None:
    """Reject results that would not fit, by an estimate, before anything is written."""
    if not path.parent.is_dir():
        raise refuse("out", "be in a folder that exists", f"{path.parent} does not")
    variables = len(columns.names()) + 4
    lengths = zip(study.dimensions.values(), study.chunks(task_size), strict=True)
    chunks = math.prod(-(-length // step) for length, step in lengths)
    on_disk = variables * max(8 * study.size, _BLOCK * chunks)
    free = shutil.disk_usage(path.parent).free
    if on_disk > free:
        raise refuse(
            "out",
            f"have room for {study.size:,} runs, about {size(on_disk)}",
            f"{path.parent} has {size(free)} left",
        )
    # The numbers when they are read, and the list of tasks.
    in_memory = variables * 8 * study.size + 200 * study.size
    available = memory_of_the_machine()
    if in_memory > available:
        raise refuse(
            "grid",
            f"fit in the {size(available)} of memory of this machine",
            f"the results of {study.size:,} runs need about {size(in_memory)}",
        )


def check_memory(study: Study, slices: list[Slice]) -> None:
    """Reject a run that this machine cannot hold, by an estimate from its shapes.

    **Raises:** `InputError`, naming the run and the memory that it needs.
    """
    available, seen = memory_of_the_machine(), set()
    for part in slices:
        config = study.point(int(part.indices[0]))
        if study.problem is not None:
            if len(seen) >= MOST_MADE:
                return
            # Of an own problem each kind is made once: that may take its time.
            if (program := program_of(config)) in seen:
                continue
            seen.add(program)
        needed = memory_of_a_task(task_of((config,), 1, 1, study.problem))
        if needed > available:
            what = (
                f"{config.members} members of hidden {config.hidden} over {config.snapshots} "
                "snapshots need"
                if study.problem is None
                else f"a run of {study.problem} needs"
            )
            raise refuse(
                "members" if study.problem is None else "problem",
                f"fit in the {size(available)} of memory of this machine",
                f"{what} about {size(needed)}",
            )
