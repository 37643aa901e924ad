"""The commands: what the library does, with files, a progress bar and exit codes around it."""

import sys
import time
from pathlib import Path
from typing import Annotated

import rich.console
import rich.markup
import rich.progress
import rich.table
import tyro

from esljax import storage
from esljax._checks import InputError, refuse
from esljax.checkpoints import TERMINATED, Terminated
from esljax.configuration import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    CheckConfig,
    MeasureConfig,
    OptimizeConfig,
    PlanConfig,
    enable,
    from_toml,
)
from esljax.measurement import measure
from esljax.optimize_cli import optimize_command, plan_command
from esljax.plotting import plot_speed_limit
from esljax.references import run_checks
from esljax.study_cli import StudyConfig, study


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is one sentence on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = _parse(arguments)
        if isinstance(config, PlanConfig):
            return plan_command(config)
        if isinstance(config, OptimizeConfig):
            return optimize_command(config)
        if isinstance(config, StudyConfig):
            return study(config)
        return _measure(config) if isinstance(config, MeasureConfig) else _check(config)
    except InputError as error:
        print(f"esljax: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("esljax: interrupted before there was anything to judge; no report was written.", file=sys.stderr)
        return INTERRUPTED
    except Terminated as stop:
        print(f"esljax: {stop}", file=sys.stderr)
        return TERMINATED
    except SystemExit as stop:  # tyro has said what was wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def _parse(arguments: list[str]) -> OptimizeConfig | PlanConfig | MeasureConfig | StudyConfig | CheckConfig:
    defaults = {"optimize": OptimizeConfig(), "plan": PlanConfig(), "measure": MeasureConfig()}
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    for i, argument in enumerate(arguments if command in defaults else []):
        if argument == "--config" and i + 1 < len(arguments):
            defaults[command] = from_toml(Path(arguments[i + 1]), type(defaults[command]))
        elif argument.startswith("--config="):
            defaults[command] = from_toml(Path(argument.removeprefix("--config=")), type(defaults[command]))
    commands = (
        Annotated[OptimizeConfig, tyro.conf.subcommand("optimize", default=defaults["optimize"])]
        | Annotated[PlanConfig, tyro.conf.subcommand("plan", default=defaults["plan"])]
        | Annotated[MeasureConfig, tyro.conf.subcommand("measure", default=defaults["measure"])]
        | Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check", default=CheckConfig())]
    )
    description = "Learning as irreversible transport: how far is a training run from the epistemic speed limit?"
    return tyro.cli(commands, prog="esljax", description=description, args=arguments, config=(tyro.conf.OmitSubcommandPrefixes,))


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
