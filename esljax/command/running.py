"""One run of a command that searches schedules: a folder, a bar, signals, exit codes around it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.markup

from esljax.command.job import blamed, join
from esljax.command.results import Results
from esljax.command.settings import DONE, FAILED, INTERRUPTED, NOT_WRITTEN, JobConfig
from esljax.command.streams import wide
from esljax.command.unfinished import Kept, unfinished_run
from esljax.experiment import Leaves, enable, place_of
from esljax.files import Terminated, alone


class Whole(str):
    """A line that is printed whole on any terminal, so that it can be copied."""


class Finished(NamedTuple):
    """What a command has found."""

    leaves: Leaves
    """Its files."""
    printed: Sequence[Any]
    """What it prints: tables, sentences, and lines that stay whole."""
    interrupted: bool = False
    """Whether it was ended early, and has judged what there was."""
    failed: bool = False
    """Whether it is no success."""


def run_command(
    config: JobConfig,
    work: Callable[[Kept, rich.console.Console], Finished],
    *,
    report: str,
    figures: tuple[str, ...],
    schedules: Sequence[str],
    stages: tuple[str, ...],
) -> int:
    """Check the settings, protect the folder, do the work, write, print; return the exit code.

    **Args:** `work`: computes, with checkpoints in the folder of `Kept`. `report` and `figures`:
    names of the files. `schedules`: names of those that it may save. `stages`: names of the folders
    of checkpoints.
    """
    started = time.perf_counter()
    config.check()
    join(config)
    enable(config.dtype)
    # Every process computes everything; the first one prints and writes.
    first = jax.process_index() == 0
    # A table may have eleven columns.
    console = wide(rich.console.Console(quiet=config.quiet or not first), 136)
    results = Results(
        config.out,
        config.as_dict(),
        figures,
        force=config.force,
        report=report,
        schedules=[place_of(name) for name in schedules],
    )
    with results.claimed(), alone(config.out, "out"):
        # Again, now that nobody else writes there.
        results.check()
        kept = Kept(config.out / "checkpoints", stages)
        try:
            with unfinished_run(config, kept, results, first), blamed(config):
                finished = work(kept, console)
        except KeyboardInterrupt:
            print(f"esljax: interrupted; {kept.words()}", file=sys.stderr)
            return INTERRUPTED
        except Terminated as stop:
            # A stage that saves has said so itself.
            known = " saved" in stop.message
            raise stop if known else Terminated(f"{stop.message[:-1]}; {kept.words()}") from None
        wall = time.perf_counter() - started
        if first:
            leaves = finished.leaves
            content = {**leaves.numbers, "wall_seconds": wall}
            results.write(content, leaves.figures, leaves.schedules)
        for each in (*finished.printed, f"{wall:.0f} s; {results.places()}"):
            text = rich.markup.escape(each) if isinstance(each, str) else each
            console.print(text, highlight=False, soft_wrap=isinstance(each, Whole))
        results.say()
        if finished.interrupted:
            return INTERRUPTED
        if results.failed:
            return NOT_WRITTEN
        if first:
            kept.remove()
        return FAILED if finished.failed else DONE
