"""The commands of studies: run one, see how far it is, show its numbers, plot them."""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.console
import rich.progress
import rich.table
import rich.text
import tyro

from esljax._checks import check_positive_int, refuse
from esljax.command.settings import DONE, FAILED, INTERRUPTED
from esljax.figures import plot_study
from esljax.files import storage
from esljax.measures import concise
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
    """Run what is left of a study: a TOML file with [base] and [grid], or [[points]], over the settings of one run.

    It can be interrupted or killed at any time; the same command goes on from there.

    Exit codes: 0 done; 1 some runs failed or have transport problems that were not solved, or the workers or the disk ended; 2 bad input;
    130 interrupted.
    """

    study: _Where
    """The TOML file of the study, or a store to go on with."""
    out: Path | None = None
    """Zarr store of the results; by default beside the TOML file, with its name and .zarr."""
    processes: int = 0
    """Processes of this machine to run in; 0 to run in this one."""
    scheduler: str = ""
    """Address of a dask scheduler whose workers run the study, such as tcp://10.0.0.1:8786."""
    slurm: int = 0
    """Jobs of a SLURM cluster whose workers run the study, as ~/.config/dask/jobqueue.yaml describes them."""
    task_size: int = 32
    """The most runs in a task; results are kept task by task."""
    width: int = 0
    """Runs side by side in one program; 0 for one on a CPU and as many as fit the memory of an accelerator."""
    retry: bool = False
    """Run again what has failed."""
    reuse: tuple[Path, ...] = ()
    """Stores of other studies, whose finished runs are taken over where all their settings are the same: to extend a study."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclasses.dataclass(frozen=True)
class StudyStatusConfig:
    """Say how far a study is: runs done, failed and to do, who is writing it and how long that may still take."""

    study: _Where
    """The store, or the TOML file beside it."""


@dataclasses.dataclass(frozen=True)
class ShowStudyConfig:
    """Show the numbers of a study in a table: means over the seeds, with their standard errors."""

    study: _Where
    """The store, or the TOML file beside it."""
    rows: int = 60
    """The most rows to print."""


@dataclasses.dataclass(frozen=True)
class PlotStudyConfig:
    """Plot Σ, W2² and the gap of a study against each of its numeric settings: means over the seeds, with their standard errors."""

    study: _Where
    """The store, or the TOML file beside it."""
    out: Path | None = None
    """The figure; by default beside the store, with its name and .png."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Studies: many runs on a grid of settings, or point by point."""

    command: (
        Annotated[RunStudyConfig, tyro.conf.subcommand("run")]
        | Annotated[StudyStatusConfig, tyro.conf.subcommand("status")]
        | Annotated[ShowStudyConfig, tyro.conf.subcommand("show")]
        | Annotated[PlotStudyConfig, tyro.conf.subcommand("plot")]
    )


def study(config: StudyConfig) -> int:
    """Run one command of studies and return its exit code."""
    command = config.command
    if isinstance(command, RunStudyConfig):
        return _run(command)
    if isinstance(command, StudyStatusConfig):
        return _status(command)
    return _show(command) if isinstance(command, ShowStudyConfig) else _plot(command)


def _run(config: RunStudyConfig) -> int:
    for name in ("processes", "slurm", "width"):
        check_positive_int(name, getattr(config, name), 0)
    check_positive_int("task_size", config.task_size)
    places = [name for name in ("processes", "scheduler", "slurm") if getattr(config, name)]
    if len(places) > 1:
        raise refuse(places[1], f"stand without {places[0]}", "both are given")
    is_store = config.study.is_dir()
    described = read_study(config.study) if is_store else Study.from_toml(config.study)
    out = config.out or (config.study if is_store else _store(config.study))
    console = rich.console.Console(quiet=config.quiet)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_Bar(console))
        try:
            with _executor(config) as executor:
                run_study(
                    described,
                    out,
                    executor=executor,
                    task_size=None if is_store else config.task_size,
                    width=config.width or None,
                    retry=config.retry,
                    reuse=config.reuse,
                    watch=bar.watch,
                )
        except KeyboardInterrupt:
            print(
                f"esljax: interrupted; {bar.said()} in {out}, and the same command goes on from there.",
                file=sys.stderr,
            )
            return INTERRUPTED
        except LostWorkersError as error:
            print(f"esljax: {error}", file=sys.stderr)
            return FAILED
        except OSError as error:
            print(
                f"esljax: ended by {error}; {bar.said()} in {out}, and the same command goes on from there.",
                file=sys.stderr,
            )
            return FAILED
    console.print(f"{bar.said()} in {out}", markup=False, highlight=False, soft_wrap=True)
    doubts = _doubts(open_study(out))
    for doubt in doubts:
        console.print(f"  {doubt}", markup=False, highlight=False, soft_wrap=True)
    return FAILED if doubts else DONE


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
    dimensions = " × ".join(f"{name} {length}" for name, length in dataset.sizes.items())
    said = [
        f"{path}: {done.size} runs ({dimensions})",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
    ]
    said += [f"  {doubt}" for doubt in _doubts(dataset)]
    writer = storage.holder(lock_path(path))
    if writer is not None:
        elapsed, fresh = (
            time.time() - writer.get("started", time.time()),
            done.size - counts["to do"] - writer.get("before", 0),
        )
        left = f", {_duration(elapsed / fresh * counts['to do'])} left" if fresh > 0 else ""
        said.append(f"process {writer['pid']} of {writer['host']} is running it{left}")
    elif counts["to do"]:
        said.append(f"nothing is running it; go on by: esljax study run {config.study}")
    print("\n".join(said))
    return DONE


def _show(config: ShowStudyConfig) -> int:
    check_positive_int("rows", config.rows)
    path = _existing(config.study)
    groups = summarize(open_study(path))
    fields = [
        name
        for name in groups[0].settings
        if len({group.settings[name] for group in groups}) > 1 or len(groups) == 1
    ]
    alike = ", ".join(
        f"{_words(name)} {_value(value)}"
        for name, value in groups[0].settings.items()
        if name not in fields
    )
    over = "means over the seeds; " * any(group.asked > 1 for group in groups)
    title = f"{path}{f', {alike}' if alike else ''}: {over}digits in parentheses: standard error of the last digits"
    table = rich.table.Table(
        title=rich.text.Text(title), title_justify="left", title_style="", box=None, pad_edge=False
    )
    for name in fields:
        table.add_column(_words(name), justify="left", no_wrap=True)
    for heading in ("runs", *_NUMBERS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups[: config.rows]:
        floor = {"noise_floor": f"{group.means['noise_floor']:.2g}"}
        cells = (
            floor.get(name) or concise(group.means[name], group.errors[name]) for name in _NUMBERS
        )
        runs = str(group.runs) if group.runs == group.asked else f"{group.runs}/{group.asked}"
        shown = cells if group.runs else ["-"] * len(_NUMBERS)
        table.add_row(
            *(_value(group.settings[name]) for name in fields),
            runs + "*" * bool(group.unconverged),
            *shown,
        )
    console = rich.console.Console()
    # Let a narrow terminal break the lines rather than the numbers.
    console.width = max(
        console.width,
        console.measure(table, options=console.options.update(max_width=10_000)).maximum,
    )
    console.print(table)
    if any(group.unconverged for group in groups[: config.rows]):
        print("* Some transport problems were not solved: do not trust these numbers.")
    if len(groups) > config.rows:
        print(f"… and {len(groups) - config.rows} more; --rows {len(groups)} shows all.")
    return DONE


_NUMBERS = {
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


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    # As many digits as tell any two values of a study apart.
    return f"{value:.12g}" if isinstance(value, float) else str(value).replace("_", " ")


def _plot(config: PlotStudyConfig) -> int:
    path = _existing(config.study)
    dataset = open_study(path)
    out = config.out or path.with_suffix(".png")
    figure = plot_study(summarize(dataset))
    out = out if out.suffix else out.with_suffix(".png")
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise refuse("out", "be a figure that can be written", f"{out} gives: {error}") from error
    print(f"{out} shows {int((dataset['done'] == 1).sum())} runs of {path}")
    return DONE


def _store(toml: Path) -> Path:
    return toml.with_suffix(".zarr")


def _existing(path: Path) -> Path:
    """The store that is meant, and a word if the file beside it tells of another study by now."""
    if path.is_dir() or not (path.suffix == ".toml" or path.is_file()):
        return path
    store = _store(path)
    if store.exists() and path.exists():
        differs = Study.from_toml(path).difference(read_study(store))
        if differs is not None:
            print(
                f"esljax: {path} has changed since, in {differs}; this is what is in {store}.",
                file=sys.stderr,
            )
    return store


def _doubts(dataset: Any) -> list[str]:
    """What is wrong with the runs of a study, each with how many it concerns."""
    state = dataset["done"].values
    reasons, counts = np.unique(
        dataset["reason"].values[state == 2].astype(str), return_counts=True
    )
    failed = sorted(zip(reasons.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1])
    unsolved = int(np.sum((state == 1) & ~dataset["converged"].values))
    said = f"{unsolved} done, but with transport problems that were not solved: do not trust their numbers"
    return [*(f"{count} failed: {reason}" for reason, count in failed), *[said] * bool(unsolved)]


def _duration(seconds: float) -> str:
    size, unit = (3600, "h") if seconds > 5400 else (60, "min") if seconds > 90 else (1, "s")
    return f"about {seconds / size:.{int(unit == 'h')}f} {unit}"


class _Bar:
    """Runs done of all, and the time left; on a terminal a bar, elsewhere a line now and then."""

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

    def said(self) -> str:
        if not self.last.runs:
            return "nothing was begun"
        failed = f", {self.last.failed} failed" if self.last.failed else ""
        taken = f", {self.last.taken} taken from other stores" if self.last.taken else ""
        return f"{self.last.done} of {self.last.runs} runs done{failed}{taken}"

    def watch(self, progress: Progress) -> None:
        self.last = progress
        ended, now = progress.done + progress.failed, time.monotonic()
        if self._task is None:
            self._task = self._bar.add_task(self.said(), total=progress.runs, completed=ended)
            self._started = self._printed = now
        self._bar.update(self._task, description=self.said(), completed=ended)
        if not self.console.is_terminal and progress.fresh and now - self._printed > 10:
            left = (now - self._started) / progress.fresh * (progress.runs - ended)
            self.console.print(
                f"{self.said()}, {_duration(left)} left", markup=False, highlight=False
            )
            self._printed = now
