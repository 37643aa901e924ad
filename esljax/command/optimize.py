"""`esljax optimize` and `esljax plan`: a comparison with files, a progress bar and exit codes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.markup
import rich.progress
import rich.table
from jax.sharding import Mesh

from esljax._checks import InputError, first_sentence, memory_of_a_device, refuse
from esljax.command.results import SETTINGS, Results
from esljax.command.settings import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_WRITTEN,
    OptimizeConfig,
    PlanConfig,
)
from esljax.command.streams import legible, wide
from esljax.experiment import (
    Comparison,
    Judgment,
    Problem,
    compare,
    enable,
    in_words,
    make_problem,
    telling,
    usual_shapes,
)
from esljax.files import (
    Checkpoints,
    Terminated,
    alone,
    is_ours,
    remove_ours,
    watch_processes,
    writing,
)
from esljax.optimization import Iteration
from esljax.sharding import member_mesh


def optimize_command(config: OptimizeConfig) -> int:
    """Run `esljax optimize` and return its exit code."""
    started = time.perf_counter()
    config.check()
    _join(config)
    enable(config.dtype)
    # Every process computes everything; the first one prints and writes.
    first = jax.process_index() == 0
    # The table has eleven columns.
    console = wide(rich.console.Console(quiet=config.quiet or not first), 136)
    results = Results(config.out, config.as_dict(), _FIGURES, force=config.force)
    with results.claimed(), alone(config.out, "out"):
        # Again, now that nobody else writes there.
        results.check()
        kept = _Kept(config.out / "checkpoints")
        try:
            with _unfinished_run(config, kept, results, first):
                comparison = _compare(config, kept.folder, console)
        except KeyboardInterrupt:
            print(f"esljax: interrupted; {kept.words()}", file=sys.stderr)
            return INTERRUPTED
        except Terminated as stop:
            # A stage that saves has said so itself.
            known = " saved" in stop.message
            raise stop if known else Terminated(f"{stop.message[:-1]}; {kept.words()}") from None
        wall = time.perf_counter() - started
        if first:
            _write(config, comparison, wall, results)
        _show(config, comparison, wall, console, results)
        results.say()
        if comparison.interrupted:
            return INTERRUPTED
        if results.failed:
            return NOT_WRITTEN
        if first:
            kept.remove()
        return FAILED if comparison.misses_target else DONE


def plan_command(config: PlanConfig) -> int:
    """Run `esljax plan` and return its exit code."""
    config.check()
    enable(config.dtype)
    devices = config.devices or jax.device_count()
    plan = _problem(config, jax.random.key(config.seed)).plan_memory(devices=devices)
    if not config.quiet:
        print(plan)
    plan.check(memory_of_a_device() if config.memory is None else config.memory * 1e9)
    return DONE


def _problem(config: OptimizeConfig, key: Any, mesh: Mesh | None = None) -> Problem:
    return make_problem(config, config.make_transport(key), mesh=mesh, recompute=config.recompute)


def _compare(config: OptimizeConfig, kept: Path, console: rich.console.Console) -> Comparison:
    """Make the problem of the settings and compare schedules on it."""
    with _Progress(config, console) as progress:
        key = jax.random.key(config.seed)
        mesh = _mesh(config)
        problem = _problem(config, jax.random.split(key, 4)[0], mesh)
        plan = problem.plan_memory(devices=1 if mesh is None else mesh.size)
        plan.check(memory_of_a_device())
        return compare(
            problem,
            rate=config.rate,
            key=key,
            target=config.target,
            knots=config.knots,
            iterations=config.iterations,
            match_runs=config.match_runs,
            judge_runs=config.judge_runs,
            watcher=progress,
            checkpoints=Checkpoints(kept, resume=config.resume, every=config.checkpoint_every),
        )


# --- What surrounds it ----------------------------------------------------------------------------


def _join(config: OptimizeConfig) -> None:
    """Find the other processes, if there are any."""
    if not config.distributed:
        return
    settings = {
        "coordinator_address": config.coordinator,
        "num_processes": config.processes,
        "process_id": config.process,
    }
    try:
        jax.distributed.initialize(
            **{name: value for name, value in settings.items() if value is not None}
        )
    except (RuntimeError, ValueError) as error:
        raise refuse(
            "distributed",
            "find the other processes from the environment or the flags",
            f"fails: {first_sentence(error)}",
        ) from error
    watch_processes()


def _mesh(config: OptimizeConfig) -> Mesh | None:
    """The devices of the settings, by default all there are; None for one."""
    if config.devices is None and jax.device_count() == 1:
        return None
    mesh = member_mesh(config.devices)
    if config.members % mesh.size:
        raise refuse(
            "members",
            f"be a multiple of the {mesh.size} devices that share them",
            f"is {config.members}",
        )
    return mesh


class _Kept:
    """The checkpoints of the stages of a comparison, in a folder that may hold other files too."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stages = [folder / name for name in ("matching", "search")]
        # An empty folder that was there before stays.
        self._was_there = [path for path in (folder, *self.stages) if os.path.lexists(path)]

    @property
    def unfinished(self) -> bool:
        """Whether there is a checkpoint. Half of one has more than a number in its name."""
        return bool(self._numbered())

    def check(self) -> None:
        """**Raises:** `InputError` if something else has the name of a checkpoint."""
        for path in self._numbered():
            empty = path.is_dir() and not any(path.iterdir())
            if not empty and not is_ours(path):
                raise refuse(
                    "out",
                    "be where nothing but results of esljax is replaced",
                    f"{path} is there, which is no checkpoint of esljax (choose another folder)",
                )

    def _numbered(self) -> list[Path]:
        every = (path for stage in self.stages for path in stage.glob("*"))
        return sorted(path for path in every if path.name.isdecimal())

    def words(self) -> str:
        """What becomes of the work so far."""
        if self.unfinished:
            return f"what is saved in {self.folder} is finished by --resume."
        return "nothing was saved yet, and no report was written."

    def remove(self, *, of_this_run: bool = False) -> None:
        """Remove the checkpoints, and the folders that are then empty.

        **Args:** `of_this_run`: leave the folders that were there before this process began.
        """
        for stage in self.stages:
            remove_ours(stage)
        with contextlib.suppress(OSError):
            if self.folder not in self._was_there or not of_this_run:
                self.folder.rmdir()


@contextlib.contextmanager
def _unfinished_run(
    config: OptimizeConfig, kept: _Kept, results: Results, first: bool
) -> Iterator[None]:
    """Protect an unfinished run in `kept`; record a new one, and drop it again if it is rejected.

    **Raises:** `InputError` if there is an unfinished run, no --resume and no --force.
    """
    kept.check()
    if kept.unfinished and config.force and not config.resume and first:
        kept.remove()
    if kept.unfinished and not config.resume:
        raise refuse(
            "out",
            "be a folder without an unfinished run, or be given with --resume to finish it",
            f"{config.out} holds one",
        )
    ours = first and not kept.unfinished
    settings = config.out / SETTINGS
    before = settings.read_bytes() if ours and settings.exists() else None
    if ours:
        try:
            writing.write_toml(settings, results.settings)
        except OSError as error:
            raise refuse(
                "out", "be a folder that can be written", f"{settings} gives: {error.strerror}"
            ) from error
    try:
        yield
    except InputError:
        # A run that is rejected need not be finished; what an earlier run has left stays.
        if ours:
            kept.remove(of_this_run=True)
            if before is None:
                settings.unlink(missing_ok=True)
            else:
                writing.replace(settings, before)
        raise


class _Progress:
    """One bar for the whole job, counted in forward runs so that the time left is of the whole."""

    def __init__(self, config: OptimizeConfig, console: rich.console.Console):
        self.config = config
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
        )
        self.bar = rich.progress.Progress(
            *columns,
            console=console,
            transient=True,
            # Elsewhere than on a terminal, all that would be left of a bar is an empty line.
            disable=config.quiet or not console.is_terminal,
        )
        shapes = len(usual_shapes())
        # A matching takes about two trials, a gradient about 2.3 forward runs, a judgment 1.3. Two
        # schedules are made here, one by the search and one by re-timing.
        total = (
            (2 * shapes + 6) * config.match_runs
            + 2.3 * config.iterations
            + 1.3 * (shapes + 2) * config.judge_runs
        )
        self.task = self.bar.add_task("starting", total=total, numbers="")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def stage(self, name: str) -> None:
        self.bar.update(self.task, description=in_words(name))

    def trial(self, loss: float) -> None:
        self.bar.update(self.task, advance=self.config.match_runs, numbers=f"final loss {loss:.4f}")

    def iteration(self, iteration: Iteration) -> None:
        description = f"optimizing {iteration.iteration + 1}/{self.config.iterations}"
        numbers = _numbers(iteration.value, *iteration.auxiliary)
        self.bar.update(self.task, advance=2.3, description=description, numbers=numbers)

    def judged(self, judgment: Judgment) -> None:
        report = judgment.report
        numbers = _numbers(report.entropy_production, report.w2_squared, judgment.final_loss)
        self.bar.update(self.task, advance=1.3 * self.config.judge_runs, numbers=numbers)


def _numbers(sigma: Any, w2_squared: Any, loss: Any) -> str:
    return f"Σ {float(sigma):.4g}  W2² {float(w2_squared):.4g}  final loss {float(loss):.4f}"


# --- The report -----------------------------------------------------------------------------------


_FIGURES = ("schedules.png", "speed_limit.png")


def _write(config: OptimizeConfig, comparison: Comparison, wall: float, results: Results) -> None:
    judgments = comparison.judgments
    content = {**telling.numbers(comparison), "wall_seconds": wall}

    def schedules() -> Any:
        from esljax.figures import plot_schedules

        return plot_schedules(judgments)

    def speed_limit() -> Any:
        from esljax.figures import plot_speed_limit

        reports = {name: judgment.report for name, judgment in judgments.items()}
        return plot_speed_limit(reports, limit=telling.limit_in_figures(comparison))

    results.write(content, dict(zip(_FIGURES, (schedules, speed_limit), strict=True)))


def _show(
    config: OptimizeConfig,
    comparison: Comparison,
    wall: float,
    console: rich.console.Console,
    results: Results,
) -> None:
    console.print(_table(comparison))
    for line in (*telling.sentences(comparison), f"{wall:.0f} s; {results.places()}"):
        console.print(rich.markup.escape(line), highlight=False)


def _table(comparison: Comparison) -> rich.table.Table:
    heading, *rows = telling.rows(comparison)
    table = rich.table.Table(
        title=telling.title(comparison),
        title_justify="left",
        title_style="",
        box=None,
        pad_edge=False,
    )
    for i, each in enumerate(heading):
        table.add_column(legible(each), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
