"""What the commands that search schedules share: their problem, devices and other processes."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from esljax._checks import cores_of_the_machine, first_sentence, memory_of_a_device, refuse
from esljax.command.settings import JobConfig
from esljax.experiment import Problem, given_of, make_problem, source_of
from esljax.files import watch_processes
from esljax.sharding import member_mesh
from esljax.simulation import HessianAdjoint


def join(config: JobConfig) -> None:
    """Find the other processes, if there are any and they have not been found."""
    if not config.distributed or jax.distributed.is_initialized():
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


# Cores that share a run wait for each other at its end. XLA calls 20 seconds too long and ends the
# process after 40, which is less than one busy core may delay the others in a long run.
_PATIENCE = " ".join(
    f"--xla_cpu_collective_call_{limit}_timeout_seconds=1000000"
    for limit in ("warn_stuck", "terminate")
)
# XLA ends a process at a flag that it does not know; jaxlib 0.10 and 0.12 know these.
_KNOWN_BEFORE = (0, 13)
_OF_XLA = "xla_force_host_platform_device_count"


def use_cores(config: JobConfig) -> None:
    """Let as many cores of a CPU as --devices asks for count as devices, before jax looks for them.

    By default a comparison takes two: XLA multiplies a stack of matrices on one core of a device,
    so that members are faster shared. The runs of a front are too short: with two cores it takes
    1.5 times as long. What the user has set for jax stands, and an accelerator is used as before.
    """
    settings: Any = jax.config
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = settings.jax_num_cpu_devices >= 0 or _OF_XLA in flags
    patient = jax.__version_info__ < _KNOWN_BEFORE
    unasked = config.cores if patient else 1
    asked = unasked if config.devices is None else config.devices
    if asked < 1 or chosen or config.distributed:
        return
    count = min(asked, cores_of_the_machine())
    # The process of a caller of `main` may have begun to use jax.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
        if count > 1 and patient:
            os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}".strip()


def problem_of(config: Any, key: Any) -> Problem:
    """The learning problem of the settings, built in or from outside, on no devices yet.

    **Args:** `key`: of the random directions of the built-in problem's transport.
    """
    source = source_of(config)
    if source is None:
        transport = config.make_transport(key)
        return make_problem(config, transport, recompute=config.recompute)
    problem = source.problem(**given_of(config))
    if config.recompute:
        return dataclasses.replace(problem, gradient=HessianAdjoint(recompute=True))
    return problem


def spread(problem: Problem, config: JobConfig) -> Problem:
    """The same problem on the devices of the settings, after a look at their memory.

    **Raises:** `InputError` if they cannot share its members, or if it does not fit.
    """
    if problem.mesh is None or config.devices is not None:
        problem = dataclasses.replace(problem, mesh=_mesh(config, problem.members))
    sharing = 1 if problem.mesh is None else problem.mesh.size
    problem.plan_memory(devices=sharing).check(memory_of_a_device(sharing))
    return problem


@contextlib.contextmanager
def blamed(config: Any) -> Iterator[None]:
    """Let an exception of the user's own problem end the command in a sentence with its line."""
    source = source_of(config)
    with contextlib.nullcontext() if source is None else source.blamed():
        yield


def _mesh(config: JobConfig, members: int) -> Mesh | None:
    """The devices of the settings, by default all there are, or as many cores of a CPU as share the
    members evenly; None for the only one."""
    count = jax.device_count()
    if config.devices is None and count == 1:
        return None
    if config.devices is None and not config.distributed and jax.default_backend() == "cpu":
        return member_mesh(math.gcd(count, members))
    if config.devices is not None and config.devices > count and jax.default_backend() == "cpu":
        raise refuse(
            "devices",
            f"be at most {count}, the cores that this process may use, or what XLA_FLAGS or "
            "JAX_NUM_CPU_DEVICES say",
            f"is {config.devices}",
        )
    mesh = member_mesh(config.devices)
    if members % mesh.size:
        raise refuse(
            "members",
            f"be a multiple of the {mesh.size} devices that share them",
            f"is {members}",
        )
    return mesh
