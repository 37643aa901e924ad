"""`esljax study`: run a study, show its progress, print its numbers, plot them."""

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.console
import rich.progress
import rich.table
import rich.text
import tyro

from esljax._checks import InputError, refuse
from esljax.command.settings import DONE, FAILED, INTERRUPTED, NOT_WRITTEN
from esljax.command.streams import legible, print_whole
from esljax.experiment import AtLeast, Manner, check_fields, in_words, read_toml
from esljax.files import TERMINATED, Terminated, storage, uninterrupted, writing
from esljax.results import concise
from esljax.study import (
    LostWorkersError,
    Progress,
    Study,
    executors,
    lock_path,
    open_study,
    read_study,
    run_study,
    summarize,
)

_Where = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class RunStudyConfig:
    """Run the unfinished runs of a study: a TOML file with [base] and [grid], or [[points]].

    `problem = "my_file.py:name"` in the file, or --problem, makes it a study of a problem of your
    own, whose keywords are settings. It may be interrupted or killed at any time; the same command
    resumes it.

    Exit codes: 0 done; 1 some runs failed or have unsolved transport problems, or the workers or
    the disk failed; 2 bad input; 130 interrupted; 143 ended by SIGTERM or SIGHUP.
    """

    study: _Where
    """The TOML file of the study, or a store to resume."""
    out: Path | None = None
    """Zarr store of the results; by default the TOML file with the ending .zarr."""
    problem: str = ""
    """A `Problem`, or a function of keywords that returns one, in place of the built-in problem:
    my_file.py:name or package.module:name."""
    processes: Annotated[int, AtLeast(0)] = 0
    """Worker processes on this machine; 0 to run in the process of the command."""
    scheduler: str = ""
    """Address of a dask scheduler whose workers do the runs, such as tcp://10.0.0.1:8786."""
    slurm: Annotated[int, AtLeast(0)] = 0
    """SLURM jobs to run in, as ~/.config/dask/jobqueue.yaml describes them; 0 for none."""
    task_size: Annotated[int | None, AtLeast(1)] = None
    """Runs in a task; results are saved task by task. By default as many as take a few seconds."""
    width: Annotated[int, AtLeast(0)] = 0
    """Runs side by side in one program; 0 for 1 on a CPU, as many as fit on an accelerator."""
    retry: bool = False
    """Run failed runs again."""
    reuse: tuple[Path, ...] = ()
    """Stores of other studies: finished runs with the same settings are copied, not run again."""
    compilation_cache: Annotated[bool, Manner()] = True
    """Keep compiled programs in your folder for caches, or where ESLJAX_COMPILATION_CACHE says."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class StudyStatusConfig:
    """Show the progress of a study: runs done, failed and to do, its writer, and the time left."""

    study: _Where
    """The store, or the TOML file beside it."""


@dataclasses.dataclass(frozen=True)
class ShowStudyConfig:
    """Print the numbers of a study: means over the seeds, with their standard errors."""

    study: _Where
    """The store, or the TOML file beside it."""
    rows: Annotated[int, AtLeast(1)] = 60
    """Most rows to print."""


@dataclasses.dataclass(frozen=True)
class PlotStudyConfig:
    """Plot a study: Σ against the final loss, a line for each schedule.

    --x, --y, --hue and --facet choose other numbers and settings; --panels draws Σ, W2² and the gap
    against each numeric setting. Points are means over the seeds, with their standard errors.

    Exit codes: 0 done; 2 bad input; 3 the figure could not be written; 130 interrupted; 143 ended
    by SIGTERM or SIGHUP.
    """

    study: _Where
    """The store, or the TOML file beside it."""
    out: Path | None = None
    """The figure; by default the store with the ending .png."""
    x: str = "final_loss"
    """A number of the study, or a setting that varies."""
    y: str = "entropy_production"
    """A number of the study."""
    hue: str = ""
    """The setting of the colors; by default the schedule where it varies. "none" for one color."""
    facet: str = ""
    """The setting of the panels; by default one that is left with few values. "none" for one."""
    panels: bool = False
    """Draw Σ, W2² and the gap against each numeric setting instead."""
    force: bool = False
    """Replace a figure that esljax drew of another study."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Run and read studies: many runs on a grid of settings, or point by point."""

    command: (
        Annotated[RunStudyConfig, tyro.conf.subcommand("run")]
        | Annotated[StudyStatusConfig, tyro.conf.subcommand("status")]
        | Annotated[ShowStudyConfig, tyro.conf.subcommand("show")]
        | Annotated[PlotStudyConfig, tyro.conf.subcommand("plot")]
    )


def study(config: StudyConfig) -> int:
    """Run one of the commands and return its exit code."""
    command = config.command
    check_fields(command)
    with _warnings_as_lines():
        if isinstance(command, RunStudyConfig):
            return _run(command)
        if isinstance(command, StudyStatusConfig):
            return _status(command)
        return _show(command) if isinstance(command, ShowStudyConfig) else _plot(command)


def _run(config: RunStudyConfig) -> int:
    places = [name for name in ("processes", "scheduler", "slurm") if getattr(config, name)]
    if len(places) > 1:
        raise refuse(places[1], f"be given without {places[0]}", "both are given")
    is_store = config.study.is_dir()
    if is_store and config.problem:
        raise refuse("problem", "be left out beside a store, which names it", "is given")
    description = (
        read_study(config.study)
        if is_store
        else Study.from_toml(config.study, problem=config.problem or None)
    )
    out = config.out or (config.study if is_store else _store(config.study))
    console = rich.console.Console(quiet=config.quiet)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_Bar(console))
        try:
            with _executor(config) as executor:
                run_study(
                    description,
                    out,
                    executor=executor,
                    task_size=config.task_size,
                    width=config.width or None,
                    retry=config.retry,
                    reuse=config.reuse,
                    watch=bar.watch,
                )
        except (KeyboardInterrupt, Terminated) as stop:
            terminated = isinstance(stop, Terminated)
            how = str(stop).rstrip(".").replace("E", "e", 1) if terminated else "interrupted"
            print(
                f"esljax: {how}; {bar.words()} in {out}, and the same command resumes it.",
                file=sys.stderr,
            )
            return TERMINATED if terminated else INTERRUPTED
        except LostWorkersError as error:
            print(f"esljax: {error}", file=sys.stderr)
            return FAILED
        except OSError as error:
            print(
                f"esljax: ended by {error}; {bar.words()} in {out}, and the same command resumes "
                "it.",
                file=sys.stderr,
            )
            return FAILED
    console.print(f"{bar.words()} in {out}", markup=False, highlight=False, soft_wrap=True)
    doubts = _doubts(open_study(out))
    for doubt in doubts:
        console.print(f"  {doubt}", markup=False, highlight=False, soft_wrap=True)
    return FAILED if doubts else DONE


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print warnings as one line each, without the place in the code that gave them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"esljax: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield


def _executor(config: RunStudyConfig) -> Any:
    if config.processes:
        return executors.processes(config.processes)
    if config.scheduler:
        return executors.scheduler(config.scheduler)
    return executors.slurm(config.slurm) if config.slurm else contextlib.nullcontext()


def _status(config: StudyStatusConfig) -> int:
    path = _existing(config.study)
    dataset = open_study(path)
    done = dataset["done"].values
    counts = {
        "done": int(np.sum(done == 1)),
        "failed": int(np.sum(done == 2)),
        "to do": int(np.sum(done == 0)),
    }
    dimensions = " × ".join(f"{name} {length}" for name, length in dataset["done"].sizes.items())
    lines = [
        f"{path}: {done.size} runs ({dimensions})",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
    ]
    lines += [f"  {doubt}" for doubt in _doubts(dataset)]
    writer = storage.holder(lock_path(path))
    if writer is not None:
        elapsed = time.time() - writer.get("started", time.time())
        fresh = done.size - counts["to do"] - writer.get("before", 0)
        left = f", {_duration(elapsed / fresh * counts['to do'])} left" if fresh > 0 else ""
        lines.append(f"process {writer['pid']} of {writer['host']} is running it{left}")
    elif counts["to do"]:
        lines.append(f"nothing is running it; resume it by: esljax study run {config.study}")
    print("\n".join(lines))
    return DONE


def _show(config: ShowStudyConfig) -> int:
    path = _existing(config.study)
    groups = summarize(open_study(path))
    fields = [
        name
        for name in groups[0].settings
        if len({group.settings[name] for group in groups}) > 1 or len(groups) == 1
    ]
    alike = ", ".join(
        f"{in_words(name)} {_value(value)}"
        for name, value in groups[0].settings.items()
        if name not in fields
    )
    over = "means over the seeds; " * any(group.asked > 1 for group in groups)
    title = (
        f"{path}{f', {alike}' if alike else ''}: {over}digits in parentheses: standard error of "
        "the last digits"
    )
    table = rich.table.Table(
        title=rich.text.Text(title), title_justify="left", title_style="", box=None, pad_edge=False
    )
    for name in fields:
        table.add_column(legible(in_words(name)), justify="left", no_wrap=True)
    numbers = _numbers(groups[0].means)
    texts = {name: _texts([group.settings[name] for group in groups]) for name in fields}
    for heading in ("runs", *numbers.values()):
        table.add_column(legible(heading), justify="right", no_wrap=True)
    for group in groups[: config.rows]:
        floor = {"noise_floor": f"{group.means['noise_floor']:.2g}"}
        cells = (
            floor.get(name) or concise(group.means[name], group.errors[name]) for name in numbers
        )
        runs = str(group.runs) if group.runs == group.asked else f"{group.runs}/{group.asked}"
        shown = cells if group.runs else ["-"] * len(numbers)
        table.add_row(
            *(texts[name][group.settings[name]] for name in fields),
            runs + "*" * bool(group.unconverged),
            *shown,
        )
    print_whole(rich.console.Console(), table)
    if any(group.unconverged for group in groups[: config.rows]):
        print("* Some transport problems were not solved: do not trust these numbers.")
    if len(groups) > config.rows:
        print(f"… and {len(groups) - config.rows} more; --rows {len(groups)} shows all.")
    return DONE


_NUMBERS = {
    "rate": "rate",
    "entropy_production": "Σ",
    "length_squared": "L²",
    "w2_squared": "W2²",
    "gap": "gap",
    "temporal": "temporal",
    "geometric": "geometric",
    "noise_floor": "Σ floor",
    "final_loss": "final loss",
    "test_accuracy": "accuracy",
}


def _numbers(means: Any) -> dict[str, str]:
    """The numbers of the table and their headings, with the metrics of the problem at the end."""
    usual = {name: words for name, words in _NUMBERS.items() if name in means}
    return usual | {name: in_words(name) for name in means if name not in (*usual, "learning_time")}


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else in_words(str(value))


def _texts(values: list[Any]) -> dict[Any, str]:
    """The values of a setting with four significant digits, or as many as distinguish them."""
    if not all(isinstance(value, float) for value in values):
        return {value: _value(value) for value in values}
    tries = ({value: f"{value:.{digits}g}" for value in values} for digits in range(4, 18))
    return next(texts for texts in tries if len(set(texts.values())) == len(texts))


def _plot(config: PlotStudyConfig) -> int:
    path = _existing(config.study)
    dataset = open_study(path)
    out = config.out or path.with_suffix(".png")
    out = out if out.suffix else out.with_suffix(".png")
    names = ("x", "y", "hue", "facet", "panels")
    drawn = {name: getattr(config, name) for name in names}
    settings = {"study": read_study(path).as_dict(), "figure": drawn}
    if not out.parent.is_dir():
        reason = f"{out} gives: there is no folder {out.parent}"
        raise refuse("out", "be a figure that can be written", reason)
    with writing.prepared(out.parent, "out"):
        writing.claim([out], settings, force=config.force)
    groups = summarize(dataset)

    def draw() -> Any:
        # Imported here, because loading matplotlib takes its time and may fail.
        from esljax.figures import plot_settings, plot_study

        if config.panels:
            return plot_settings(groups)
        hue, facet = config.hue or None, config.facet or None
        return plot_study(groups, x=config.x, y=config.y, hue=hue, facet=facet)

    content, remark = _rendered(draw, out, settings)
    try:
        with uninterrupted():
            writing.replace(out, content)
    except OSError as error:
        print(f"esljax: {out} could not be written: {error.strerror}", file=sys.stderr)
        return NOT_WRITTEN
    state = dataset["done"].values
    missing = [f"{int(np.sum(state == 2))} failed"] if (state == 2).any() else []
    missing += [f"{int(np.sum(state == 0))} not done"] if (state == 0).any() else []
    without = f", without {' and '.join(missing)}" if missing else ""
    print(f"{out} shows {int(np.sum(state == 1))} runs of {path}{without}")
    if remark:
        print(f"esljax: it is {remark}.", file=sys.stderr)
    return DONE


def _rendered(draw: Any, out: Path, settings: dict[str, Any]) -> tuple[bytes, str]:
    from esljax.figures import rendered

    kind = out.suffix.removeprefix(".").lower()
    return rendered(draw, kind, writing.signature(settings))


def _store(toml: Path) -> Path:
    return toml.with_suffix(".zarr")


def _existing(path: Path) -> Path:
    """The store of a TOML file; a warning is printed if the file has changed since."""
    if path.is_dir() or not (path.suffix == ".toml" or path.is_file()):
        return path
    store = _store(path)
    if store.exists() and path.exists():
        stored = read_study(store)
        try:
            named = "problem" in read_toml(path) or stored.problem is None
            problem = None if named else getattr(stored.problem, "place", "")
            differs = Study.from_toml(path, problem=problem).difference(stored)
        except InputError as error:
            # The results are there, whatever has become of what they are from.
            print(f"esljax: {path} is not compared with {store}: {error}", file=sys.stderr)
            differs = None
        if differs is not None:
            print(
                f"esljax: {path} has changed since, in {differs}; {store} holds the old study.",
                file=sys.stderr,
            )
    return store


def _doubts(dataset: Any) -> list[str]:
    """Each kind of trouble with the runs of a study, and how many it concerns."""
    state = dataset["done"].values
    reasons, counts = np.unique(
        dataset["reason"].values[state == 2].astype(str), return_counts=True
    )
    failed = sorted(zip(reasons.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1])
    unsolved = int(np.sum((state == 1) & ~dataset["converged"].values))
    doubts = [f"{count} failed: {reason}" for reason, count in failed]
    if unsolved:
        doubts.append(
            f"{unsolved} done, but with unsolved transport problems: do not trust their numbers"
        )
    return doubts


def _duration(seconds: float) -> str:
    size, unit = (3600, "h") if seconds > 5400 else (60, "min") if seconds > 90 else (1, "s")
    return f"about {seconds / size:.{int(unit == 'h')}f} {unit}"


class _Bar:
    """Runs done, and the time left: a bar on a terminal, elsewhere a line every 10 seconds."""

    def __init__(self, console: rich.console.Console):
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=32),
            rich.progress.TimeRemainingColumn(),
        )
        self.console, self.last = console, Progress(0, 0, 0, 0, 0)
        self._bar = rich.progress.Progress(
            *columns,
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._task: Any = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def words(self) -> str:
        if not self.last.runs:
            return "nothing was begun"
        failed = f", {self.last.failed} failed" if self.last.failed else ""
        reused = f", {self.last.taken} taken from other stores" if self.last.taken else ""
        repaired = f", {self.last.repaired} damaged and run again" if self.last.repaired else ""
        return f"{self.last.done} of {self.last.runs} runs done{failed}{reused}{repaired}"

    def watch(self, progress: Progress) -> None:
        self.last = progress
        ended, now = progress.done + progress.failed, time.monotonic()
        if self._task is None:
            self._task = self._bar.add_task(self.words(), total=progress.runs, completed=ended)
            self._started = self._printed = now
        self._bar.update(self._task, description=self.words(), completed=ended)
        if not self.console.is_terminal and progress.fresh and now - self._printed > 10:
            left = (now - self._started) / progress.fresh * (progress.runs - ended)
            self.console.print(
                f"{self.words()}, {_duration(left)} left", markup=False, highlight=False
            )
            self._printed = now
