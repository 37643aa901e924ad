"""The commands: the library with files, a progress bar and exit codes around it."""

import os
import sys
from typing import Annotated, Any, get_args

import jax
import tyro

from esljax._checks import InputError
from esljax.command.check import run_checks
from esljax.command.flags import flat, subcommand
from esljax.command.front import front_command
from esljax.command.job import use_cores
from esljax.command.measure import measure_command
from esljax.command.optimize import optimize_command, plan_command
from esljax.command.settings import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    CheckConfig,
    ComparisonConfig,
    JobConfig,
    MeasureConfig,
    OutsideFrontConfig,
    OutsidePlanConfig,
    PlanConfig,
)
from esljax.command.streams import patient
from esljax.command.study import RunStudyConfig, StudyConfig, study
from esljax.files import TERMINATED, Terminated, deaf, ended, programs, storage


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
    elif _is_of_devices(error):
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
    computes = config.command if isinstance(config, StudyConfig) else config
    if isinstance(computes, JobConfig | MeasureConfig | CheckConfig | RunStudyConfig):
        remark = programs.keep_programs(computes.compilation_cache)
        if remark:
            print(f"esljax: {remark}", file=sys.stderr)
    if isinstance(config, PlanConfig | OutsidePlanConfig):
        return plan_command(config)
    if isinstance(config, ComparisonConfig | OutsideFrontConfig):
        use_cores(config)
    if isinstance(config, ComparisonConfig):
        return optimize_command(config)
    if isinstance(config, OutsideFrontConfig):
        return front_command(config)
    if isinstance(config, StudyConfig):
        return study(config)
    return measure_command(config) if isinstance(config, MeasureConfig) else _check(config)


def _is_of_devices(error: BaseException) -> bool:
    """Whether jax does not find the devices that it is to use."""
    if isinstance(error, RuntimeError):
        return "nable to initialize backend" in str(error)
    # An assertion of jax without words, where nothing that JAX_PLATFORMS names is installed.
    if not isinstance(error, AssertionError) or error.args:
        return False
    try:
        jax.devices()
    except AssertionError:
        return True
    return False


def _without_devices(error: BaseException) -> str:
    named = os.environ.get("JAX_PLATFORMS")
    reason = " ".join(str(error).split()).split(" (set JAX_PLATFORMS", 1)[0].rstrip(".")
    reason = reason or "the jax that is installed has no such devices"
    asked = "the devices of this machine" if named is None else f"JAX_PLATFORMS={named}"
    return f"jax cannot use {asked}: {reason}."


def _parse(arguments: list[str]) -> Any:
    """The settings of the command that the arguments give."""
    kinds = {}
    commands: Any = (
        Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check", default=CheckConfig())]
    )
    for command in ("measure", "plan", "front", "optimize"):
        parsed, kind = subcommand(command, arguments)
        kinds[get_args(parsed)[0]] = kind
        commands = parsed | commands
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
    return flat(kinds[type(config)], config) if type(config) in kinds else config


def _check(config: CheckConfig) -> int:
    return DONE if run_checks(quiet=config.quiet) else FAILED
