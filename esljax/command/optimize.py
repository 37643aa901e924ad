"""`esljax optimize` and `esljax plan`: a comparison with files, a progress bar and exit codes."""

import contextlib
import shutil
import signal
import threading
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

from esljax._checks import InputError, first_sentence, refuse
from esljax.command.settings import (
    DONE,
    FAILED,
    INTERRUPTED,
    OptimizeConfig,
    PlanConfig,
    in_words,
)
from esljax.experiment import (
    WITH_ERROR,
    Comparison,
    Judgment,
    Problem,
    compare,
    enable,
    make_problem,
    memory_of_a_device,
    ratio,
    usual_shapes,
)
from esljax.figures import plot_schedules, plot_speed_limit
from esljax.files import Checkpoints, Terminated, alone, storage
from esljax.optimization import Iteration
from esljax.results import concise
from esljax.sharding import member_mesh


def optimize_command(config: OptimizeConfig) -> int:
    """Run `esljax optimize` and return its exit code."""
    started = time.perf_counter()
    config.check()
    _join(config)
    enable(config.dtype)
    storage.make_folder(config.out, "out")
    # Every process computes everything; the first one prints and writes.
    first = jax.process_index() == 0
    console = rich.console.Console(quiet=config.quiet or not first)
    # The table has ten columns: a narrow terminal should break its lines rather than its numbers.
    console.width = max(console.width, 136)
    with alone(config.out, "out"):
        kept = config.out / "checkpoints"
        with _unfinished_run(config, kept, first):
            comparison = _compare(config, kept, console)
        wall = time.perf_counter() - started
        if first:
            _write(config, comparison, wall)
        _show(config, comparison, wall, console)
        if comparison.optimum.interrupted:
            return INTERRUPTED
        if first:
            shutil.rmtree(kept, ignore_errors=True)
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
    with _Progress(config, console) as progress, _ending():
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


@contextlib.contextmanager
def _unfinished_run(config: OptimizeConfig, kept: Path, first: bool) -> Iterator[None]:
    """Protect an unfinished run in `kept`; record a new one, and drop it again if it is rejected.

    **Raises:** `InputError` if there is an unfinished run and no --resume.
    """
    # Half a checkpoint has more than a number in its name; a folder that is only locked has none.
    unfinished = any(path.name.isdecimal() for path in kept.glob("*/*"))
    if unfinished and not config.resume:
        raise refuse(
            "out",
            "be a folder without an unfinished run, or be given with --resume to finish it",
            f"{config.out} holds one",
        )
    ours = first and not unfinished
    if ours:
        storage.write_toml(config.out / "config.toml", config.as_dict())
    try:
        yield
    except InputError:
        # A run that is rejected need not be finished; checkpoints of an earlier run stay.
        if ours:
            shutil.rmtree(kept, ignore_errors=True)
        raise


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """On SIGTERM outside of the stages that save, end at once: all there is to save is saved."""

    def end(*_: Any) -> None:
        raise Terminated("Ended by SIGTERM; the saved part is resumed by --resume.")

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


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
            *columns, console=console, transient=True, disable=config.quiet
        )
        shapes = len(usual_shapes())
        # A matching takes about two trials, a gradient about 2.3 forward runs, a judgment 1.3.
        total = (
            (2 * shapes + 4) * config.match_runs
            + 2.3 * config.iterations
            + 1.3 * (shapes + 1) * config.judge_runs
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


def _write(config: OptimizeConfig, comparison: Comparison, wall: float) -> None:
    judgments = comparison.judgments
    content = {
        "target_loss": comparison.target,
        "schedules": {name: _schedule(judgment) for name, judgment in judgments.items()},
        "config": config.as_dict(),
        "versions": storage.versions(),
        "wall_seconds": wall,
    }
    storage.write_json(config.out / "report.json", content)
    plot_schedules(judgments).savefig(config.out / "schedules.png", dpi=150)
    plot_speed_limit({name: judgment.report for name, judgment in judgments.items()}).savefig(
        config.out / "speed_limit.png", dpi=150
    )


def _schedule(judgment: Judgment) -> dict[str, Any]:
    report = judgment.report
    rates = judgment.schedule.values[:-1]
    return {
        **{name: float(getattr(report, name)) for name in WITH_ERROR},
        "final_loss": float(judgment.final_loss),
        "test_accuracy": float(judgment.test_accuracy),
        "learning_time": None if report.learning_time is None else float(report.learning_time),
        "noise_floor": None if report.noise_floor is None else float(report.noise_floor),
        "transport_converged": bool(report.converged),
        "learning_rates": [float(rate) for rate in rates],
        "standard_error": {
            **{name: float(getattr(report.standard_error, name)) for name in WITH_ERROR},
            "final_loss": float(judgment.standard_error.final_loss),
            "test_accuracy": float(judgment.standard_error.test_accuracy),
            # The rates are given, not estimated.
            "learning_time": 0.0,
        },
    }


def _show(
    config: OptimizeConfig, comparison: Comparison, wall: float, console: rich.console.Console
) -> None:
    console.print(_table(comparison))
    console.print(rich.markup.escape(_verdict(comparison)), highlight=False)
    console.print(
        f"{wall:.0f} s; report.json, config.toml, schedules.png and speed_limit.png are in "
        f"{config.out}/",
        highlight=False,
    )


def _table(comparison: Comparison) -> rich.table.Table:
    runs = next(iter(comparison.judgments.values())).entropy_productions.size
    title = (
        f"Matched final loss, {runs} held-out runs; digits in parentheses: standard error of the "
        "last digits"
    )
    table = rich.table.Table(
        title=title, title_justify="left", title_style="", box=None, pad_edge=False
    )
    table.add_column("schedule", no_wrap=True)
    for heading in (
        "Σ",
        "L²",
        "W2²",
        "gap",
        "temporal",
        "geometric",
        "Σ floor",
        "final loss",
        "accuracy",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, judgment in comparison.judgments.items():
        report, errors = judgment.report, judgment.standard_error
        table.add_row(
            in_words(name),
            *(
                concise(getattr(report, number), getattr(report.standard_error, number))
                for number in WITH_ERROR
            ),
            "unknown" if report.noise_floor is None else f"{float(report.noise_floor):.2g}",
            concise(judgment.final_loss, errors.final_loss),
            concise(judgment.test_accuracy, errors.test_accuracy),
        )
    return table


def _verdict(comparison: Comparison) -> str:
    """The result in sentences, with the reasons to doubt it."""
    optimum, optimized, usual = comparison.optimum, comparison.optimized, comparison.best_usual
    sentences = []
    if optimum.interrupted or optimum.message != "Ran all iterations.":
        sentences.append(optimum.message)
    sentences.extend(optimum.doubts)
    if optimized is not None and usual is not None:
        share, error = ratio(optimized, comparison.judgments[usual])
        report = optimized.report
        over = float(report.entropy_production / report.w2_squared)
        left = float(report.temporal / report.w2_squared)
        sentences.append(
            f"At the same final loss {comparison.target:.4g}, the optimized schedule produces "
            f"{share:.3f} ± {error:.3f} times the entropy of the best usual shape "
            f"({in_words(usual)}) and {over:.3f} times the limit W2²; {left:.2%} of W2² is left to "
            "timing, the rest is the bend of the path."
        )
    if optimized is not None and comparison.misses_target:
        sentences.append(
            f"Its held-out final loss {float(optimized.final_loss):.4g} misses the target by more "
            "than 1 %."
        )
    reports = [judgment.report for judgment in comparison.judgments.values()]
    if not all(bool(report.converged) for report in reports):
        sentences.append("Some transport problems did not converge: do not trust these numbers.")
    floors = [
        (report.noise_floor, report.entropy_production)
        for report in reports
        if report.noise_floor is not None
    ]
    if any(float(floor) > 0.05 * float(sigma) for floor, sigma in floors):
        sentences.append(
            "Injected noise alone makes up more than 5 % of some Σ (its floor): lower the "
            "temperature before comparing."
        )
    return " ".join(sentences)
