"""The settings of each command: frozen dataclasses whose fields are the flags and the keys of a TOML file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro

from esljax._checks import (
    check_choice,
    check_nonnegative,
    check_positive,
    check_positive_int,
    refuse,
)
from esljax._types import Array
from esljax.experiment import (
    CHOICES,
    LEAST,
    TrainingConfig,
    converted,
    make_transport,
    plain,
    read_toml,
)
from esljax.transport import AbstractTransport

# What the commands exit with.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class OptimizeConfig(TrainingConfig):
    """Compare the usual learning-rate schedules with one found by gradient, at matched final loss, against the epistemic speed limit.

    Exit codes: 0 done; 1 the optimized schedule misses the target loss; 2 bad input; 130 interrupted (if the optimization had begun,
    the best schedule so far is judged and written first); 143 told to end (SIGTERM), and saved. However it ends, --resume finishes it.
    """

    out: Path = Path("esljax-optimize")
    """Folder for report.json, config.toml, schedules.png and speed_limit.png; made if it does not exist."""
    target: float | None = None
    """Mean final training loss that all schedules must meet; by default that of the constant schedule at `rate`."""
    knots: int = 12
    """Knots of the optimized log learning rate."""
    iterations: int = 40
    """Gradient steps of the optimization."""
    judge_runs: int = 5
    """Held-out runs (initializations, batches and noise) that judge each schedule."""
    recompute: bool = False
    """Keep the states of about twice the root of the number of steps for the gradient and compute the others again, instead of keeping
    all."""
    match_runs: int = 2
    """Runs whose mean loss is matched to the target."""
    resume: bool = False
    """Finish the run of the same settings that was killed or interrupted in `out`; the numbers are those of a run that was not."""
    checkpoint_every: float = 60.0
    """Least seconds between two checkpoints, kept in `out` until the run is done."""
    devices: int | None = None
    """Devices that share the members; all of them by default."""
    distributed: bool = False
    """Run as one of several processes that share the members, found from the environment (Cloud TPU, SLURM) or by the next three."""
    coordinator: str | None = None
    """Address and port of the first process."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    config: Path | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> "OptimizeConfig":
        """Refuse what cannot run, before any computation, in one sentence."""
        for name in ("knots", "iterations", "judge_runs", "match_runs"):
            check_positive_int(name, getattr(self, name), LEAST[name])
        self.check_training()
        if self.target is not None and not 0 < self.target < np.inf:
            raise refuse("target", "be a positive loss", f"is {self.target}")
        check_nonnegative("checkpoint_every", self.checkpoint_every)
        for name, least in (("devices", 1), ("processes", 1), ("process", 0)):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name), least)
        for name in ("coordinator", "processes", "process"):
            if getattr(self, name) is not None and not self.distributed:
                raise refuse(name, "come with --distributed", "stands alone")
        _check_out(self.out)
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same run."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class PlanConfig(OptimizeConfig):
    """Foretell the memory that `esljax optimize` with these settings takes on each device. Nothing is run.

    Exit codes: 0 it fits; 2 it does not, with what to change, or bad input.
    """

    memory: float | None = None
    """Gigabytes of each device; by default those of the devices here."""

    def check(self) -> "PlanConfig":
        """Refuse what cannot run, in one sentence."""
        super().check()
        if self.memory is not None:
            check_positive("memory", self.memory)
        return self


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Hold a training run of your own against the epistemic speed limit.

    `recording` is an .npz file or a .zarr group of `positions` (snapshots, members, numbers) or `features`, and optionally `times`; or a
    folder of checkpoints (.npz, .safetensors, Orbax) laid out as member_000/step_000100.npz. Nothing pickled is ever loaded.

    Exit codes: 0 done; 1 the numbers are written but are not to be trusted (a transport problem did not converge, or Σ came out below
    W2²); 2 bad input; 130 interrupted, with nothing written.
    """

    recording: Annotated[Path | None, tyro.conf.Positional] = None
    """The run: a file of snapshots, or a folder of checkpoints."""
    out: Path = Path("esljax-measure")
    """Folder for report.json, config.toml and speed_limit.png; made if it does not exist."""
    project: str = "none"
    """Coordinates to measure in: 'none' for all; 'pca' for the principal components of all snapshots together; 'random' for a random
    orthonormal projection; or an .npz file with an array `matrix` (numbers, coordinates)."""
    coordinates: int = 10
    """How many coordinates 'pca' and 'random' keep."""
    transport: Literal["exact", "gaussian", "sliced", "sinkhorn"] = "exact"
    """Geometry of entropy production and distance."""
    epsilon: float = 1.0
    """Entropic regularization of the sinkhorn transport, in squared coordinates."""
    directions: int = 64
    """Directions of the sliced transport."""
    chunk: int = 0
    """Members whose distances the sinkhorn transport holds at a time; 0 for all, in memory for the square of their number."""
    velocity: Literal["none", "transport"] = "none"
    """What Σ is made from: 'none' for the chain of distances, 'transport' for velocities by the transport's maps between snapshots."""
    jackknife: int = 32
    """The most groups of members left out in turn for the standard errors, each of which repeats all transports; 0 for none."""
    debias: bool = True
    """Add Σ and W2² with their sampling bias removed by splitting the members, and an interval of the gap; from 8 members on."""
    seed: int = 0
    """Seed of the random projection and of the directions of the sliced transport."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type."""
    config: Path | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> "MeasureConfig":
        """Refuse what cannot run, before anything is read, in one sentence."""
        if self.recording is None:
            raise refuse(
                "recording", "be a file of snapshots or a folder of checkpoints", "is not given"
            )
        for name, least in (
            ("coordinates", 1),
            ("directions", 1),
            ("chunk", 0),
            ("jackknife", 0),
            ("seed", 0),
        ):
            check_positive_int(name, getattr(self, name), least)
        check_positive("epsilon", self.epsilon)
        if not np.isfinite(self.epsilon):
            raise refuse("epsilon", "be finite", f"is {self.epsilon}")
        for name in ("transport", "velocity", "dtype"):
            check_choice(name, getattr(self, name), CHOICES[name])
        if self.velocity == "transport" and self.transport == "sliced":
            raise refuse(
                "velocity",
                "be 'none' beside the sliced transport, which maps no member onto another",
                "is 'transport'",
            )
        _check_out(self.out)
        return self

    def make_transport(self, key: Array) -> AbstractTransport:
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same report."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Run the closed-form references through the public functions: print reference, computed value, error, and pass or fail.

    Exit codes: 0 all pass; 1 a failure; 2 bad input.
    """

    quiet: bool = False
    """Print failures only."""


Config = TypeVar("Config", OptimizeConfig, PlanConfig, MeasureConfig)


def from_toml(path: Path, kind: type[Config]) -> Config:
    """The settings of a TOML file over the defaults of one command.

    **Raises:** `InputError` for a missing or broken file, an unknown key, or a value of the wrong type.
    """
    content = read_toml(path)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "config"}
    return kind(**converted(content, fields, str(path)), config=path)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise refuse("out", "be a folder", f"is the file {out}")
