"""The commands: what the library does, with files, a progress bar and exit codes around it."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from esljax._checks import InputError
from esljax.command.check import run_checks
from esljax.command.measure import measure_command
from esljax.command.optimize import optimize_command, plan_command
from esljax.command.settings import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    CheckConfig,
    MeasureConfig,
    OptimizeConfig,
    PlanConfig,
    from_toml,
)
from esljax.command.study import StudyConfig, study
from esljax.files import TERMINATED, Terminated


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
        return measure_command(config) if isinstance(config, MeasureConfig) else _check(config)
    except InputError as error:
        print(f"esljax: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(
            "esljax: interrupted before there was anything to judge; no report was written.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Terminated as stop:
        print(f"esljax: {stop}", file=sys.stderr)
        return TERMINATED
    except SystemExit as stop:  # tyro has said what was wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def _parse(
    arguments: list[str],
) -> OptimizeConfig | PlanConfig | MeasureConfig | StudyConfig | CheckConfig:
    defaults = {"optimize": OptimizeConfig(), "plan": PlanConfig(), "measure": MeasureConfig()}
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    for i, argument in enumerate(arguments if command in defaults else []):
        if argument == "--config" and i + 1 < len(arguments):
            defaults[command] = from_toml(Path(arguments[i + 1]), type(defaults[command]))
        elif argument.startswith("--config="):
            defaults[command] = from_toml(
                Path(argument.removeprefix("--config=")), type(defaults[command])
            )
    commands = (
        Annotated[OptimizeConfig, tyro.conf.subcommand("optimize", default=defaults["optimize"])]
        | Annotated[PlanConfig, tyro.conf.subcommand("plan", default=defaults["plan"])]
        | Annotated[MeasureConfig, tyro.conf.subcommand("measure", default=defaults["measure"])]
        | Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check", default=CheckConfig())]
    )
    description = "Learning as irreversible transport: how far is a training run from the epistemic speed limit?"
    return tyro.cli(
        commands,
        prog="esljax",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _check(config: CheckConfig) -> int:
    return DONE if run_checks(quiet=config.quiet) else FAILED
