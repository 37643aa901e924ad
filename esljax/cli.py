"""The commands: what the library does, with files, a progress bar and exit codes around it."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.markup
import rich.progress
import rich.table
import tyro

from esljax import storage
from esljax._checks import InputError, refuse
from esljax.comparison import Judgment, final_loss, judge, match_endpoint, ratio, usual_shapes
from esljax.configuration import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    CheckConfig,
    MeasureConfig,
    OptimizeConfig,
    enable,
    from_toml,
)
from esljax.measurement import measure
from esljax.optimization import Iteration, Optimum, optimize
from esljax.plotting import plot_schedules, plot_speed_limit
from esljax.references import run_checks
from esljax.report import concise
from esljax.runs import make_problem
from esljax.schedules import Constant, Knots
from esljax.study_cli import StudyConfig, study


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is one sentence on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = _parse(arguments)
        if isinstance(config, OptimizeConfig):
            return _optimize(config)
        if isinstance(config, StudyConfig):
            return study(config)
        return _measure(config) if isinstance(config, MeasureConfig) else _check(config)
    except InputError as error:
        print(f"esljax: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("esljax: interrupted before there was anything to judge; no report was written.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # tyro has said what was wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def _parse(arguments: list[str]) -> OptimizeConfig | MeasureConfig | StudyConfig | CheckConfig:
    defaults = {"optimize": OptimizeConfig(), "measure": MeasureConfig()}
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    for i, argument in enumerate(arguments if command in defaults else []):
        if argument == "--config" and i + 1 < len(arguments):
            defaults[command] = from_toml(Path(arguments[i + 1]), type(defaults[command]))
        elif argument.startswith("--config="):
            defaults[command] = from_toml(Path(argument.removeprefix("--config=")), type(defaults[command]))
    commands = (
        Annotated[OptimizeConfig, tyro.conf.subcommand("optimize", default=defaults["optimize"])]
        | Annotated[MeasureConfig, tyro.conf.subcommand("measure", default=defaults["measure"])]
        | Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check", default=CheckConfig())]
    )
    description = "Learning as irreversible transport: how far is a training run from the epistemic speed limit?"
    return tyro.cli(commands, prog="esljax", description=description, args=arguments, config=(tyro.conf.OmitSubcommandPrefixes,))


class _Result(NamedTuple):
    target: float
    judgments: dict[str, Judgment]
    optimum: Optimum


def _optimize(config: OptimizeConfig) -> int:
    started = time.perf_counter()
    config.check()
    enable(config.dtype)
    console = rich.console.Console(quiet=config.quiet)
    # The table has ten columns: let a narrow terminal break its lines rather than its numbers.
    console.width = max(console.width, 136)
    config.out.mkdir(parents=True, exist_ok=True)
    storage.write_toml(config.out / "config.toml", config.as_dict())
    with _Progress(config, console) as progress:
        result = _compare(config, progress)
    wall = time.perf_counter() - started
    ordered = dict(sorted(result.judgments.items(), key=lambda item: float(item[1].report.entropy_production)))
    storage.write_json(config.out / "report.json", _report(config, result.target, ordered, wall))
    plot_schedules(ordered).savefig(config.out / "schedules.png", dpi=150)
    plot_speed_limit({name: judgment.report for name, judgment in ordered.items()}).savefig(config.out / "speed_limit.png", dpi=150)
    console.print(_table(ordered))
    missed = "optimized" not in ordered or abs(float(ordered["optimized"].final_loss) / result.target - 1) > 0.01
    console.print(rich.markup.escape(_verdict(ordered, result, missed)), highlight=False)
    console.print(f"{wall:.0f} s; report.json, config.toml, schedules.png and speed_limit.png are in {config.out}/", highlight=False)
    if result.optimum.interrupted:
        return INTERRUPTED
    return FAILED if missed else DONE


def _compare(config: OptimizeConfig, progress: "_Progress") -> _Result:
    """Match every shape to the target, optimize the knots, judge all on held-out keys."""
    data_key, match_key, search_key, judge_key = jax.random.split(jax.random.key(config.seed), 4)
    problem = make_problem(config, config.make_transport(data_key))
    match_keys = jax.random.split(match_key, config.match_runs)
    judge_keys = jax.random.split(judge_key, config.judge_runs)
    learning_time = config.rate * config.steps
    target = config.target
    if target is None:
        progress.phase("target")
        target = final_loss(problem, Constant(config.rate), match_keys)
        if not np.isfinite(target):
            raise refuse("rate", "leave the constant schedule stable", f"is {config.rate:g}: its final loss is {target}")

    def match(shape: Any, name: str) -> Knots:
        progress.phase(f"matching {name}")
        return match_endpoint(problem, shape, target=target, learning_time=learning_time, keys=match_keys, name=name, watch=progress.trial)

    matched = {name: match(shape, name) for name, shape in usual_shapes().items()}
    progress.phase("optimizing")
    knots = Knots(jnp.full(config.knots, jnp.mean(matched["constant"].values)))

    def objective(learning_rate: Knots, key: Any) -> Any:
        outcome = problem.run(learning_rate, key)
        sigma = outcome.report.entropy_production
        return sigma, outcome.final_loss / target - 1, (outcome.report.w2_squared, outcome.final_loss)

    optimum = optimize(objective, knots, key=search_key, iterations=config.iterations, callback=progress.iteration)
    judgments = {}
    try:
        matched["optimized"] = match(optimum.controls, "optimized") if np.all(np.isfinite(optimum.controls.values)) else optimum.controls
        for name in ("optimized", *usual_shapes()):
            progress.phase(f"judging {name}")
            judgments[name] = judge(problem, matched[name], judge_keys)
            progress.judged(judgments[name])
    except KeyboardInterrupt:
        if not judgments:
            raise
        optimum = optimum.as_interrupted()
    return _Result(target, judgments, optimum)


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
        self.bar = rich.progress.Progress(*columns, console=console, transient=True, disable=config.quiet)
        shapes = len(usual_shapes())
        # A matching takes about two trials, a gradient about 2.3 forward runs, a judgment about 1.3.
        total = (2 * shapes + 4) * config.match_runs + 2.3 * config.iterations + 1.3 * (shapes + 1) * config.judge_runs
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
        numbers = f"Σ {float(seen.value):.4g}  W2² {float(w2_squared):.4g}  final loss {float(loss):.4f}"
        description = f"optimizing {seen.iteration + 1}/{self.config.iterations}"
        self.bar.update(self.task, advance=2.3, description=description, numbers=numbers)

    def judged(self, judgment: Judgment) -> None:
        report = judgment.report
        numbers = (
            f"Σ {float(report.entropy_production):.4g}  W2² {float(report.w2_squared):.4g}  final loss {float(judgment.final_loss):.4f}"
        )
        self.bar.update(self.task, advance=1.3 * self.config.judge_runs, numbers=numbers)


_NUMBERS = ("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric")


def _report(config: OptimizeConfig, target: float, judgments: Mapping[str, Judgment], wall: float) -> dict[str, Any]:
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
        **{name: float(getattr(report, name)) for name in _NUMBERS},
        "final_loss": float(judgment.final_loss),
        "test_accuracy": float(judgment.test_accuracy),
        "learning_time": None if report.learning_time is None else float(report.learning_time),
        "noise_floor": None if report.noise_floor is None else float(report.noise_floor),
        "transport_converged": bool(report.converged),
        "learning_rates": [float(rate) for rate in rates],
        "standard_error": {
            **{name: float(getattr(report.standard_error, name)) for name in _NUMBERS},
            "final_loss": float(judgment.final_loss_error),
            "test_accuracy": float(judgment.test_accuracy_error),
            # The rates are given, not estimated.
            "learning_time": 0.0,
        },
    }


def _table(judgments: Mapping[str, Judgment]) -> rich.table.Table:
    runs = next(iter(judgments.values())).entropy_productions.size
    title = f"Matched final loss, {runs} held-out runs; digits in parentheses: standard error of the last digits"
    table = rich.table.Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("schedule", no_wrap=True)
    for heading in ("Σ", "L²", "W2²", "gap", "temporal", "geometric", "Σ floor", "final loss", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, judgment in judgments.items():
        report = judgment.report
        table.add_row(
            name.replace("_", " "),
            *(concise(getattr(report, number), getattr(report.standard_error, number)) for number in _NUMBERS),
            "unknown" if report.noise_floor is None else f"{float(report.noise_floor):.2g}",
            concise(judgment.final_loss, judgment.final_loss_error),
            concise(judgment.test_accuracy, judgment.test_accuracy_error),
        )
    return table


def _verdict(judgments: Mapping[str, Judgment], result: _Result, missed: bool) -> str:
    said = []
    if result.optimum.interrupted or result.optimum.history.value.size < 1 or result.optimum.message != "Ran all iterations.":
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
        said.append(f"Its held-out final loss {float(judgments['optimized'].final_loss):.4g} misses the target by more than 1 %.")
    if not all(bool(judgment.report.converged) for judgment in judgments.values()):
        said.append("Some transport problems did not converge: do not trust these numbers.")
    floors = [(j.report.noise_floor, j.report.entropy_production) for j in judgments.values() if j.report.noise_floor is not None]
    if any(float(floor) > 0.05 * float(sigma) for floor, sigma in floors):
        said.append("Injected noise alone makes up more than 5 % of some Σ (its floor): lower the temperature before comparing.")
    return " ".join(said)


def _measure(config: MeasureConfig) -> int:
    started = time.perf_counter()
    config.check()
    enable(config.dtype)
    console = rich.console.Console(quiet=config.quiet)
    with console.status(f"measuring {rich.markup.escape(str(config.recording))}"):
        tell = None if config.quiet else lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True)
        report, said, content = measure(config, tell)
        figure = plot_speed_limit({"this run": report})
    wall = time.perf_counter() - started
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        storage.write_toml(config.out / "config.toml", config.as_dict())
        storage.write_json(
            config.out / "report.json", {**content, "config": config.as_dict(), "versions": storage.versions(), "wall_seconds": wall}
        )
        figure.savefig(config.out / "speed_limit.png", dpi=150)
    except OSError as error:
        raise refuse("out", "be a folder that can be written", f"{config.out} gives: {error.strerror}") from error
    written = f"{wall:.0f} s; report.json, config.toml and speed_limit.png are in {config.out}/"
    # The terminal breaks the lines, so that what is copied or piped has none but its own.
    findings = report.diagnose()
    found = "".join(f"- {finding}\n" for finding in findings)
    console.print(f"{said}\n{report}\n{found}{written}", markup=False, highlight=False, soft_wrap=True)
    # A gap below 0 by less than its errors is no violation; one below 0 without errors is.
    doubtful = not report.holds and report.standard_error is None
    return FAILED if doubtful or {"transport did not converge", "bound violated"} & {finding.name for finding in findings} else DONE


def _check(config: CheckConfig) -> int:
    return DONE if run_checks(quiet=config.quiet) else FAILED
