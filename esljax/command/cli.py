"""The commands: the library with files, a progress bar and exit codes around it."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
from esljax.command.streams import patient
from esljax.command.study import StudyConfig, study
from esljax.experiment import choices
from esljax.files import TERMINATED, Terminated, deaf, ended, storage


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is one sentence on standard error.

    Nothing that is printed can end the command, and SIGTERM and SIGHUP end it as Ctrl-C does: what
    is saved stays, and one line says so.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with patient(), ended():
        try:
            return _run(arguments)
        except BaseException as error:
            # A second signal cannot interrupt the answer to the first.
            with deaf():
                code = _answer(error)
            if code is None:
                raise
            return code


def _answer(error: BaseException) -> int | None:
    """Say in one line what has ended a command, and return its exit code; None for a fault."""
    if isinstance(error, InputError):
        words, code = str(error), BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        words = "interrupted before there was anything to judge; no report was written."
        code = INTERRUPTED
    elif isinstance(error, Terminated):
        words, code = str(error), TERMINATED
    elif isinstance(error, SystemExit):  # tyro has printed its error, or the help
        return error.code if isinstance(error.code, int) else BAD_INPUT
    elif isinstance(error, RuntimeError) and "nable to initialize backend" in str(error):
        words, code = _without_devices(error), BAD_INPUT
    else:
        return None
    print(f"esljax: {words}", file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"esljax {storage.versions()['esljax']}")
        return DONE
    config = _parse(arguments)
    if isinstance(config, PlanConfig):
        return plan_command(config)
    if isinstance(config, OptimizeConfig):
        return optimize_command(config)
    if isinstance(config, StudyConfig):
        return study(config)
    return measure_command(config) if isinstance(config, MeasureConfig) else _check(config)


def _without_devices(error: RuntimeError) -> str:
    named = os.environ.get("JAX_PLATFORMS")
    reason = " ".join(str(error).split()).split(" (set JAX_PLATFORMS", 1)[0].rstrip(".")
    asked = "the devices of this machine" if named is None else f"JAX_PLATFORMS={named}"
    return f"jax cannot use {asked}: {reason}."


def _parse(
    arguments: list[str],
) -> OptimizeConfig | PlanConfig | MeasureConfig | StudyConfig | CheckConfig:
    kinds = {"optimize": OptimizeConfig, "plan": PlanConfig, "measure": MeasureConfig}
    flags = {command: _flags(kind) for command, kind in kinds.items()}
    defaults = {command: kind() for command, kind in flags.items()}
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    path = _config(arguments) if command in flags else None
    if path is not None:
        defaults[command] = _as(flags[command], from_toml(path, kinds[command]))
    commands: Any = (
        Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check", default=CheckConfig())]
    )
    for command in reversed(flags):
        marker = tyro.conf.subcommand(command, default=defaults[command])
        commands = Annotated[flags[command], marker] | commands
    config = tyro.cli(
        commands,
        prog="esljax",
        description=(
            "Learning as irreversible transport: how far is a training run from the epistemic "
            "speed limit?"
        ),
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    settings = {flags[command]: kind for command, kind in kinds.items()}
    return _as(settings[type(config)], config) if type(config) in settings else config


def _config(arguments: list[str]) -> Path | None:
    """The TOML file that the flags name: its settings are the defaults of the other flags."""
    path = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            path = Path(arguments[i + 1])
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
    return path


Settings = TypeVar("Settings", bound=OptimizeConfig | MeasureConfig)


def _flags(kind: type[Settings]) -> type[Settings]:
    """The same settings with the choices of each registry as a `Literal`, which tyro reads.

    Made at each call, because a registry may have grown since the class was declared.
    """
    fields: list[tuple[str, Any, Any]] = [
        (field.name, Literal[choices(field.type)], dataclasses.field(default=field.default))
        for field in dataclasses.fields(kind)
        if choices(field.type)
    ]
    namespace = {"__doc__": kind.__doc__}
    return dataclasses.make_dataclass(
        kind.__name__, fields, bases=(kind,), namespace=namespace, frozen=True
    )


def _as(kind: type[Settings], settings: OptimizeConfig | MeasureConfig) -> Settings:
    """The same settings as an instance of another class with the same fields."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)}
    return kind(**values)


def _check(config: CheckConfig) -> int:
    return DONE if run_checks(quiet=config.quiet) else FAILED
