"""`esljax optimize` and `esljax plan`: a comparison with files, a progress bar and exit codes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    in_words,
)
from esljax.command.streams import legible, wide
from esljax.experiment import (
    QUANTITIES,
    WITH_ERROR,
    Comparison,
    Judgment,
    Problem,
    agreement,
    compare,
    enable,
    make_problem,
    ratio,
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
from esljax.results import concise
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
            if before is not None:
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


_SQUARED = "squared parameters"
# Of the numbers in report.json beyond those of every run.
UNITS = {quantity.name: quantity.units for quantity in QUANTITIES} | {
    "efficiency": "1",
    "dissipation": "nats per example",
    "identity_fraction": "1",
    "learning_rates": "squared parameters per nat and step",
    "debiased_w2_squared": _SQUARED,
    "batch_temperature": "nats per example",
    "batch_floor": _SQUARED,
}


# --- The report -----------------------------------------------------------------------------------


_FIGURES = ("schedules.png", "speed_limit.png")


def _write(config: OptimizeConfig, comparison: Comparison, wall: float, results: Results) -> None:
    judgments = comparison.judgments
    content = {
        "target_loss": comparison.target,
        "schedules": {name: _schedule(judgment) for name, judgment in judgments.items()},
        "optimized": _examined(comparison),
        "paths": agreement(judgments)._asdict() if len(judgments) > 1 else None,
        "units": UNITS,
        "wall_seconds": wall,
    }

    def schedules() -> Any:
        from esljax.figures import plot_schedules

        return plot_schedules(judgments)

    def speed_limit() -> Any:
        from esljax.figures import plot_speed_limit

        reports = {name: judgment.report for name, judgment in judgments.items()}
        return plot_speed_limit(reports, limit=_limit_in_figures(config, comparison))

    results.write(content, dict(zip(_FIGURES, (schedules, speed_limit), strict=True)))


def _schedule(judgment: Judgment) -> dict[str, Any]:
    report = judgment.report
    errors: Any = report.standard_error
    rates = judgment.schedule.values[:-1]
    return {
        **{name: float(getattr(report, name)) for name in WITH_ERROR},
        "efficiency": float(report.efficiency),
        "dissipation": _known(report.dissipation),
        "final_loss": float(judgment.final_loss),
        **{name: float(value) for name, value in judgment.metrics.items()},
        "learning_time": _known(report.learning_time),
        "noise_floor": _known(report.noise_floor),
        "identity_fraction": _known(report.identity_fraction),
        "transport_converged": bool(report.converged),
        "learning_rates": [float(rate) for rate in rates],
        "standard_error": {
            **{name: float(getattr(errors, name)) for name in WITH_ERROR},
            "dissipation": _known(errors.dissipation),
            "final_loss": float(judgment.standard_error.final_loss),
            **{name: float(judgment.standard_error.get(name)) for name in judgment.metrics},
            # The rates are given, not estimated.
            "learning_time": 0.0,
        },
    }


def _examined(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the optimized schedule alone."""
    debiased = comparison.debiased_w2_squared
    batches: Any = comparison.batches
    return {
        "debiased_w2_squared": None if debiased is None else debiased[0],
        "batch_temperature": None
        if batches is None
        else [float(temperature) for temperature in batches.temperature],
        "batch_floor": None if batches is None else float(batches.floor),
        "standard_error": {
            "debiased_w2_squared": None if debiased is None else debiased[1],
            "batch_floor": None if batches is None else float(batches.standard_error.floor),
        },
    }


def _known(value: Any) -> float | None:
    return None if value is None else float(value)


def _show(
    config: OptimizeConfig,
    comparison: Comparison,
    wall: float,
    console: rich.console.Console,
    results: Results,
) -> None:
    console.print(_table(comparison))
    lines = [
        _UNITS_OF_THE_TABLE,
        *_gains(comparison),
        *_on_the_limit(config, comparison),
        *_on_the_path(comparison),
        *_doubts(comparison),
        f"{wall:.0f} s; {results.places()}",
    ]
    for line in lines:
        console.print(rich.markup.escape(line), highlight=False)


def _table(comparison: Comparison) -> rich.table.Table:
    some = next(iter(comparison.judgments.values()))
    runs = some.entropy_productions.size
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
        "W2²/Σ",
        "U",
        "final loss",
        *(_HEADINGS.get(name, in_words(name)) for name in some.metrics),
    ):
        table.add_column(legible(heading), justify="right", no_wrap=True)
    for name, judgment in comparison.judgments.items():
        report, errors = judgment.report, judgment.standard_error
        table.add_row(
            in_words(name),
            *(
                concise(getattr(report, number), getattr(report.standard_error, number))
                for number in WITH_ERROR
            ),
            f"{float(report.efficiency):.3f}",
            "unknown" if report.learning_time is None else f"{float(report.learning_time):.4g}",
            concise(judgment.final_loss, errors.final_loss),
            *(concise(value, errors.get(name)) for name, value in judgment.metrics.items()),
        )
    return table


_HEADINGS = {"test_accuracy": "accuracy"}
_UNITS_OF_THE_TABLE = (
    "Units: squared parameters (Σ, L², W2² and the parts), the same per nat (U), nats (loss)."
)


def _gains(comparison: Comparison) -> Iterator[str]:
    """How much less Σ than the schedules in common use, and how much of that needs no search."""
    judgments, optimized = comparison.judgments, comparison.optimized
    usual, rising = comparison.best_usual, comparison.best_rising
    if optimized is None or usual is None:
        return
    yield (
        f"At the same final loss {comparison.target:.4g}, the optimized schedule produces "
        f"{_share(optimized, judgments[usual])} times the entropy of the best schedule in common "
        f"use ({in_words(usual)})."
    )
    others = [
        ("the best rising shape ({})", rising),
        (
            "the first shape passed at constant speed ({})",
            "retimed" if "retimed" in judgments else None,
        ),
    ]
    known = [(words.format(in_words(name)), judgments[name]) for words, name in others if name]
    if known:
        shares = ", ".join(f"{_share(each, judgments[usual])} by {words}" for words, each in known)
        adds = all(ratio(optimized, each)[0] < 1 for _, each in known)
        rest = "the rest is what the search adds" if adds else "the search adds nothing to that"
        yield f"Without a search: {shares}; {rest}."


def _on_the_limit(config: OptimizeConfig, comparison: Comparison) -> Iterator[str]:
    """What is left above W2², and what that W2² is."""
    optimized = comparison.optimized
    if optimized is None:
        return
    report = optimized.report
    over = float(report.entropy_production / report.w2_squared)
    left = float(report.temporal / report.w2_squared)
    yield (
        f"Its Σ is {over:.3f} times W2²; {left:.2%} of W2² is left to timing, the rest is the bend "
        "of the path."
    )
    share = _known(report.identity_fraction)
    paired = share is not None and share > 0.5
    if paired:
        yield (
            f"This W2² is the mean squared displacement of {config.members} members (each is its "
            f"own best partner in {share:.0%} of the links), an upper "
            "value of the squared distance between the laws."
        )
    if comparison.debiased_w2_squared is not None:
        value = concise(*comparison.debiased_w2_squared)
        yield f"Without sampling bias, from halves of the members, W2² is {value}" + (
            ": a lower value, because so few members do not resolve laws whose hidden units can be "
            "permuted."
            if paired
            else "."
        )


def _on_the_path(comparison: Comparison) -> Iterator[str]:
    """How far the schedules pass one path, and the noise that bends it."""
    judgments = comparison.judgments
    if len(judgments) > 1:
        same = agreement(judgments)
        yield (
            f"L² agrees over the schedules to {same.spread:.2%} (χ² of equality "
            f"{same.chi_squared:.3g} on {same.freedom} degrees of freedom): that far, schedules "
            "re-time one path."
        )
    known = [judgment.report.dissipation for judgment in judgments.values()]
    dissipations = [float(dissipation) for dissipation in known if dissipation is not None]
    if dissipations:
        least, most = min(dissipations), max(dissipations)
        yield f"The dissipated free energy D is {least:.4g} to {most:.4g} nats over the schedules."
    batches: Any = comparison.batches
    optimized = comparison.optimized
    if batches is not None:
        low, high = float(jnp.min(batches.temperature)), float(jnp.max(batches.temperature))
        yield (
            f"Along the optimized schedule, batches spread members as injected noise of "
            f"temperature {low:.2g} to {high:.2g} nats would, which is not tied to the rate; "
            f"in Σ they make up to {float(batches.floor):.2g}."
        )
    if optimized is not None and optimized.report.noise_floor is not None:
        yield f"Injected noise makes up to {float(optimized.report.noise_floor):.2g} of its Σ."


def _doubts(comparison: Comparison) -> Iterator[str]:
    """The reasons not to believe the table."""
    optimum, optimized = comparison.optimum, comparison.optimized
    if optimum is not None:
        if optimum.interrupted or optimum.message != "Ran all iterations.":
            yield optimum.message
        yield from optimum.doubts
    if comparison.left_out:
        yield comparison.left_out
    if optimized is not None and comparison.misses_target:
        yield (
            f"Its held-out final loss {float(optimized.final_loss):.4g} misses the target by more "
            "than 1 %."
        )
    reports = [judgment.report for judgment in comparison.judgments.values()]
    if not all(bool(report.converged) for report in reports):
        yield "Some transport problems did not converge: do not trust these numbers."
    floors = [
        (report.noise_floor, report.entropy_production)
        for report in reports
        if report.noise_floor is not None
    ]
    if any(float(floor) > 0.05 * float(sigma) for floor, sigma in floors):
        yield (
            "Injected noise alone makes up more than 5 % of some Σ (its floor): lower the "
            "temperature before comparing."
        )


def _share(first: Judgment, second: Judgment) -> str:
    mean, error = ratio(first, second)
    return f"{mean:.3f} ± {error:.3f}"


def _limit_in_figures(config: OptimizeConfig, comparison: Comparison) -> str:
    """The name of W2² in a figure: a displacement where each member is its own best partner."""
    name = f"$W_2^2$ of {config.members} members"
    reports = [judgment.report for judgment in comparison.judgments.values()]
    shares = [_known(report.identity_fraction) for report in reports]
    paired = all(share is not None and share > 0.5 for share in shares)
    return f"{name}: their displacement" if paired else name
