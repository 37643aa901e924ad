"""`esljax optimize`: the usual schedules against one found by gradient, with files, a progress bar and checkpoints around them."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.markup
import rich.progress
import rich.table
from jax.sharding import Mesh

from esljax._checks import InputError, refuse
from esljax.command.settings import DONE, FAILED, INTERRUPTED, OptimizeConfig, PlanConfig
from esljax.experiment import (
    WITH_ERROR,
    Judgment,
    Problem,
    enable,
    final_loss,
    judge,
    make_problem,
    match_endpoint,
    memory_of_a_device,
    ratio,
    usual_shapes,
)
from esljax.figures import plot_schedules, plot_speed_limit
from esljax.files import Checkpoints, Terminated, alone, session, storage
from esljax.measures import concise
from esljax.optimization import Iteration, Optimum, optimize
from esljax.schedules import Constant, Knots
from esljax.sharding import member_mesh


class _Result(NamedTuple):
    target: float
    judgments: dict[str, Judgment]
    optimum: Optimum


def optimize_command(config: OptimizeConfig) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    config.check()
    _join(config)
    enable(config.dtype)
    config.out.mkdir(parents=True, exist_ok=True)
    with alone(config.out, "out"):
        return _optimize(config, started)


def _optimize(config: OptimizeConfig, started: float) -> int:
    # Of several processes each computes all, and the first one speaks and writes.
    first = jax.process_index() == 0
    console = rich.console.Console(quiet=config.quiet or not first)
    # The table has ten columns: let a narrow terminal break its lines rather than its numbers.
    console.width = max(console.width, 136)
    kept = config.out / "checkpoints"
    # What is half written is no checkpoint, and what is only locked has none yet.
    unfinished = any(path.name.isdecimal() for path in kept.glob("*/*"))
    if unfinished and not config.resume:
        raise refuse(
            "out",
            "be a folder without an unfinished run, or be given with --resume to finish it",
            f"{config.out} holds one",
        )
    if first and not unfinished:
        storage.write_toml(config.out / "config.toml", config.as_dict())
    try:
        with _Progress(config, console) as progress, _ending():
            result = _compare(config, progress, kept)
    except InputError:
        # What cannot be run need not be finished either; what an earlier run has left is not ours to drop.
        if first and not unfinished:
            shutil.rmtree(kept, ignore_errors=True)
        raise
    wall = time.perf_counter() - started
    ordered = dict(
        sorted(result.judgments.items(), key=lambda item: float(item[1].report.entropy_production))
    )
    missed = (
        "optimized" not in ordered
        or abs(float(ordered["optimized"].final_loss) / result.target - 1) > 0.01
    )
    if first:
        storage.write_json(
            config.out / "report.json", _report(config, result.target, ordered, wall)
        )
        plot_schedules(ordered).savefig(config.out / "schedules.png", dpi=150)
        plot_speed_limit({name: judgment.report for name, judgment in ordered.items()}).savefig(
            config.out / "speed_limit.png", dpi=150
        )
    console.print(_table(ordered))
    console.print(rich.markup.escape(_verdict(ordered, result, missed)), highlight=False)
    console.print(
        f"{wall:.0f} s; report.json, config.toml, schedules.png and speed_limit.png are in {config.out}/",
        highlight=False,
    )
    if result.optimum.interrupted:
        return INTERRUPTED
    if first:
        shutil.rmtree(kept, ignore_errors=True)
    return FAILED if missed else DONE


def plan_command(config: PlanConfig) -> int:
    """Run the command and return its exit code."""
    config.check()
    enable(config.dtype)
    devices = config.devices or jax.device_count()
    planned = _problem(config, jax.random.key(config.seed)).plan_memory(devices=devices)
    if not config.quiet:
        print(planned)
    planned.check(memory_of_a_device() if config.memory is None else config.memory * 1e9)
    return DONE


def _problem(config: OptimizeConfig, key: Any, mesh: Mesh | None = None) -> Problem:
    return make_problem(config, config.make_transport(key), mesh=mesh, recompute=config.recompute)


def _join(config: OptimizeConfig) -> None:
    """Find the other processes, if there are any."""
    if not config.distributed:
        return
    told = {
        "coordinator_address": config.coordinator,
        "num_processes": config.processes,
        "process_id": config.process,
    }
    try:
        jax.distributed.initialize(
            **{name: value for name, value in told.items() if value is not None}
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise refuse(
            "distributed",
            "find the other processes from the environment or the flags",
            f"fails: {reason}",
        ) from error


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Told to end between two checkpoints, the process does so at once: what is saved is saved."""

    def end(*_: Any) -> None:
        raise Terminated("Told to end; what is saved goes on with --resume.")

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _compare(config: OptimizeConfig, progress: "_Progress", kept: Path) -> _Result:
    """Match every shape to the target, optimize the knots, judge all on held-out keys; each stage can be taken up where it ended."""
    data_key, match_key, search_key, judge_key = jax.random.split(jax.random.key(config.seed), 4)
    mesh = _mesh(config)
    problem = _problem(config, data_key, mesh)
    problem.plan_memory(devices=1 if mesh is None else mesh.size).check(memory_of_a_device())
    match_keys = jax.random.split(match_key, config.match_runs)
    judge_keys = jax.random.split(judge_key, config.judge_runs)
    learning_time = config.rate * config.steps
    settings = {
        name: value
        for name, value in config.as_dict().items()
        if name not in ("out", "quiet", "checkpoint_every")
    }

    def checkpoints(stage: str) -> Checkpoints:
        return Checkpoints(kept / stage, resume=config.resume, every=config.checkpoint_every)

    def match(shape: Any, name: str, target: float) -> Knots:
        progress.phase(f"matching {name}")
        return match_endpoint(
            problem,
            shape,
            target=target,
            learning_time=learning_time,
            keys=match_keys,
            name=name,
            watch=progress.trial,
        )

    shapes = usual_shapes()
    with session(checkpoints("matching"), settings) as saved:
        # The target is kept with the schedules that meet it: they cost as much to find again.
        like = Knots(jnp.ones(config.steps + 1), "linear")
        done, (target, matched) = saved.restore(lambda done: (jnp.zeros(()), [like] * done)) or (
            0,
            (None, []),
        )
        target = float(target) if config.target is None and target is not None else config.target
        if target is None:
            progress.phase("target")
            target = final_loss(problem, Constant(config.rate), match_keys)
            if not np.isfinite(target):
                raise refuse(
                    "rate",
                    "leave the constant schedule stable",
                    f"is {config.rate:g}: its final loss is {target}",
                )
        for name, shape in list(shapes.items())[done:]:
            matched.append(match(shape, name, target))
            saved.offer(
                len(matched),
                lambda: (jnp.asarray(target), matched),
                last=len(matched) == len(shapes),
            )
    matched = dict(zip(shapes, matched, strict=True))
    progress.phase("optimizing")
    knots = Knots(jnp.full(config.knots, jnp.mean(matched["constant"].values)))

    def objective(learning_rate: Knots, key: Any) -> Any:
        outcome = problem.run(learning_rate, key)
        sigma = outcome.report.entropy_production
        return (
            sigma,
            outcome.final_loss / target - 1,
            (outcome.report.w2_squared, outcome.final_loss),
        )

    optimum = optimize(
        objective,
        knots,
        key=search_key,
        iterations=config.iterations,
        callback=progress.iteration,
        checkpoints=checkpoints("search"),
    )
    judgments = {}
    try:
        finite = np.all(np.isfinite(optimum.controls.values))
        matched["optimized"] = (
            match(optimum.controls, "optimized", target) if finite else optimum.controls
        )
        for name in ("optimized", *shapes):
            progress.phase(f"judging {name}")
            judgments[name] = judge(problem, matched[name], judge_keys)
            progress.judged(judgments[name])
    except KeyboardInterrupt:
        if not judgments:
            raise
        optimum = optimum.as_interrupted()
    return _Result(target, judgments, optimum)


def _mesh(config: OptimizeConfig) -> Mesh | None:
    """The devices asked for, or all there are; None for one."""
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
        # A matching takes about two trials, a gradient about 2.3 forward runs, a judgment about 1.3.
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

    def phase(self, name: str) -> None:
        self.bar.update(self.task, description=name.replace("_", " "))

    def trial(self, loss: float) -> None:
        self.bar.update(self.task, advance=self.config.match_runs, numbers=f"final loss {loss:.4f}")

    def iteration(self, seen: Iteration) -> None:
        w2_squared, loss = seen.auxiliary
        numbers = (
            f"Σ {float(seen.value):.4g}  W2² {float(w2_squared):.4g}  final loss {float(loss):.4f}"
        )
        description = f"optimizing {seen.iteration + 1}/{self.config.iterations}"
        self.bar.update(self.task, advance=2.3, description=description, numbers=numbers)

    def judged(self, judgment: Judgment) -> None:
        report = judgment.report
        numbers = f"Σ {float(report.entropy_production):.4g}  W2² {float(report.w2_squared):.4g}  final loss {float(judgment.final_loss):.4f}"
        self.bar.update(self.task, advance=1.3 * self.config.judge_runs, numbers=numbers)


def _report(
    config: OptimizeConfig, target: float, judgments: Mapping[str, Judgment], wall: float
) -> dict[str, Any]:
    return {
        "target_loss": target,
        "schedules": {name: _schedule(judgment) for name, judgment in judgments.items()},
        "config": config.as_dict(),
        "versions": storage.versions(),
        "wall_seconds": wall,
    }


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
            "final_loss": float(judgment.final_loss_error),
            "test_accuracy": float(judgment.test_accuracy_error),
            # The rates are given, not estimated.
            "learning_time": 0.0,
        },
    }


def _table(judgments: Mapping[str, Judgment]) -> rich.table.Table:
    runs = next(iter(judgments.values())).entropy_productions.size
    title = f"Matched final loss, {runs} held-out runs; digits in parentheses: standard error of the last digits"
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
    for name, judgment in judgments.items():
        report = judgment.report
        table.add_row(
            name.replace("_", " "),
            *(
                concise(getattr(report, number), getattr(report.standard_error, number))
                for number in WITH_ERROR
            ),
            "unknown" if report.noise_floor is None else f"{float(report.noise_floor):.2g}",
            concise(judgment.final_loss, judgment.final_loss_error),
            concise(judgment.test_accuracy, judgment.test_accuracy_error),
        )
    return table


def _verdict(judgments: Mapping[str, Judgment], result: _Result, missed: bool) -> str:
    said = []
    if (
        result.optimum.interrupted
        or result.optimum.history.value.size < 1
        or result.optimum.message != "Ran all iterations."
    ):
        said.append(result.optimum.message)
    usual = [name for name in judgments if name != "optimized"]
    if "optimized" in judgments and usual:
        optimized, best = judgments["optimized"], usual[0]
        share, error = ratio(optimized, judgments[best])
        over = float(optimized.report.entropy_production / optimized.report.w2_squared)
        left = float(optimized.report.temporal / optimized.report.w2_squared)
        said.append(
            f"At the same final loss {result.target:.4g}, the optimized schedule produces {share:.3f} ± {error:.3f} times the entropy of "
            f"the best usual shape ({best.replace('_', ' ')}) and {over:.3f} times the limit W2²; "
            f"{left:.2%} of W2² is left to timing, the rest is the bend of the path."
        )
    if missed and "optimized" in judgments:
        said.append(
            f"Its held-out final loss {float(judgments['optimized'].final_loss):.4g} misses the target by more than 1 %."
        )
    if not all(bool(judgment.report.converged) for judgment in judgments.values()):
        said.append("Some transport problems did not converge: do not trust these numbers.")
    floors = [
        (j.report.noise_floor, j.report.entropy_production)
        for j in judgments.values()
        if j.report.noise_floor is not None
    ]
    if any(float(floor) > 0.05 * float(sigma) for floor, sigma in floors):
        said.append(
            "Injected noise alone makes up more than 5 % of some Σ (its floor): lower the temperature before comparing."
        )
    return " ".join(said)
