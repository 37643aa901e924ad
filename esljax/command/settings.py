"""The settings of each command: dataclasses whose fields are flags and keys of a TOML file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import tyro

from esljax._checks import refuse
from esljax._types import Array
from esljax.experiment import (
    DTYPES,
    SEEDS,
    TRANSPORTS,
    VELOCITIES,
    AtLeast,
    Manner,
    Nonnegative,
    OneOf,
    Positive,
    TrainingConfig,
    check_fields,
    converted,
    make_transport,
    plain,
    read_toml,
)
from esljax.files import Selection, patterns
from esljax.transport import AbstractTransport
from esljax.velocity import AbstractVelocity

# The exit codes of the commands; that of SIGTERM and SIGHUP is `files.TERMINATED`.
DONE, FAILED, BAD_INPUT, NOT_WRITTEN, INTERRUPTED = 0, 1, 2, 3, 130


@dataclasses.dataclass(frozen=True)
class OptimizeConfig(TrainingConfig):
    """Compare the usual learning-rate schedules with one found by gradient.

    All are scaled to the same final loss and held against the epistemic speed limit.

    Exit codes: 0 done; 1 the optimized schedule misses the target loss; 2 bad input; 3 the numbers
    are printed, but not all files could be written; 130 interrupted (once the search has begun, the
    best schedule so far is judged and written first); 143 ended by SIGTERM or SIGHUP, after saving;
    or 75 another process of the run is gone. In the last four cases --resume finishes the run.
    """

    out: Path = Path("esljax-optimize")
    """Folder for report.json, config.toml and the figures; made if it does not exist."""
    target: Annotated[float, Positive()] | None = None
    """Mean final training loss of all schedules; by default that of the constant one at `rate`."""
    knots: Annotated[int, AtLeast(2)] = 12
    """Knots of the optimized log learning rate."""
    iterations: Annotated[int, AtLeast(1)] = 40
    """Gradient steps of the search."""
    judge_runs: Annotated[int, AtLeast(2)] = 5
    """Held-out runs (initializations, batches and noise) that judge each schedule."""
    recompute: bool = False
    """Keep only about 2√steps states for the gradient and recompute the others: saves memory."""
    match_runs: Annotated[int, AtLeast(1)] = 2
    """Runs whose mean final loss is matched to the target."""
    resume: Annotated[bool, Manner()] = False
    """Finish the interrupted run in `out`, with the results of a run never interrupted."""
    force: Annotated[bool, Manner()] = False
    """Replace what esljax wrote into `out` for another configuration, or of an unfinished run."""
    checkpoint_every: Annotated[float, Nonnegative(infinite=True)] = 60.0
    """Least time in seconds between two checkpoints, kept in `out` until the run is done."""
    devices: Annotated[int, AtLeast(1), Manner()] | None = None
    """Devices that share the members; by default all of them."""
    distributed: Annotated[bool, Manner()] = False
    """Run as one of several processes, found by the environment (Cloud TPU, SLURM) or flags."""
    coordinator: Annotated[str, Manner()] | None = None
    """With --distributed: address and port of the first process."""
    processes: Annotated[int, AtLeast(1), Manner()] | None = None
    """With --distributed: how many processes there are."""
    process: Annotated[int, AtLeast(0), Manner()] | None = None
    """With --distributed: which of them this is, from 0."""
    config: Annotated[Path, Manner()] | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> "OptimizeConfig":
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        self.check_training()
        for name in ("coordinator", "processes", "process"):
            if getattr(self, name) is not None and not self.distributed:
                raise refuse(name, "come with --distributed", "is given alone")
        _check_out(self.out)
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON hold them; reading them back gives the same run."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class PlanConfig(OptimizeConfig):
    """Predict the memory of `esljax optimize` with these settings on each device, without a run.

    Exit codes: 0 it fits; 2 it does not, with the change that would help, or bad input.
    """

    memory: Annotated[float, Positive(infinite=True), Manner()] | None = None
    """Memory of each device in gigabytes; by default that of the devices here."""


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Hold a training run of your own against the epistemic speed limit.

    The recording is an .npz file or a .zarr group of `positions` (snapshots, members, numbers) or
    of `features` of such a shape, and optionally `times`; or a folder of checkpoints, each .npz,
    or .safetensors, or Orbax, laid out as member_000/step_000100.npz. Of checkpoints the parameters
    are measured; what lies beside them and is left out is printed. No pickled data is loaded.

    Exit codes: 0 done; 1 the numbers are written but not to be trusted (a transport problem did
    not converge, or Σ is below W2²); 2 bad input; 3 the numbers are printed, but not all files
    could be written; 130 interrupted or 143 ended by SIGTERM or SIGHUP, with nothing written.
    """

    recording: Annotated[Path | None, tyro.conf.Positional] = None
    """The run: a file of snapshots, or a folder of checkpoints."""
    out: Path = Path("esljax-measure")
    """Folder for report.json, config.toml and speed_limit.png; made if it does not exist."""
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Measure only arrays whose key matches, as in --only 'params/*'; may be given again."""
    skip: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Leave out arrays whose key matches, as in --skip 'opt_state/*'; may be given again."""
    name: str | None = None
    """Names of the checkpoints that count, {} for their number: 'step_{}', 'member_{}/step_{}'."""
    project: str = "none"
    """Coordinates: 'none' (all), 'pca' or 'random', or an .npz with `matrix` (numbers, kept)."""
    coordinates: Annotated[int, AtLeast(1)] = 10
    """How many coordinates 'pca' and 'random' keep."""
    transport: Annotated[str, OneOf(TRANSPORTS)] = "exact"
    """Optimal transport that defines entropy production and distance."""
    epsilon: Annotated[float, Positive()] = 1.0
    """Entropic regularization of the sinkhorn transport, in squared coordinates."""
    directions: Annotated[int, AtLeast(1)] = 64
    """Random directions of the sliced transport."""
    chunk: Annotated[int, AtLeast(0)] = 0
    """Members whose distances sinkhorn holds at a time; 0 for all, an n × n matrix in memory."""
    velocity: Annotated[str, OneOf(VELOCITIES)] = "none"
    """Source of Σ: 'none', the chain of distances; 'transport', maps from snapshot to snapshot."""
    jackknife: Annotated[int, AtLeast(0)] = 32
    """Most groups of members left out in turn for the standard errors; 0 for no errors."""
    debias: bool = True
    """Add Σ and W2² without sampling bias and an interval of the gap, from 8 members on."""
    seed: Annotated[int, AtLeast(0), SEEDS] = 0
    """Seed of the random projection and of the directions of the sliced transport."""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """Floating-point type."""
    force: Annotated[bool, Manner()] = False
    """Replace what esljax wrote into `out` for another configuration."""
    config: Annotated[Path, Manner()] | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> "MeasureConfig":
        """**Raises:** `InputError`, before anything is read, for settings that cannot run."""
        if self.recording is None:
            raise refuse(
                "recording", "be a file of snapshots or a folder of checkpoints", "is not given"
            )
        check_fields(self)
        Selection(self.only, self.skip)
        patterns(self.name)
        self.make_velocity(self.make_transport(jax.random.key(0)))
        _check_out(self.out)
        return self

    def make_transport(self, key: Array) -> AbstractTransport:
        """The transport of that name; `key` is of its random directions, if it has any."""
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)

    def make_velocity(self, transport: AbstractTransport) -> AbstractVelocity | None:
        """The velocity of that name, or None. **Raises:** `InputError` if `transport` has none."""
        return VELOCITIES[self.velocity](transport)

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON hold them; reading them back gives the same report."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Compute closed-form reference numbers by the public functions and compare them.

    Prints each reference, the computed value, the error, and pass or fail.

    Exit codes: 0 all pass; 1 a failure; 2 bad input; 130 interrupted; 143 ended by SIGTERM or
    SIGHUP.
    """

    quiet: bool = False
    """Print failures only."""


Config = TypeVar("Config", OptimizeConfig, PlanConfig, MeasureConfig)


def from_toml(path: Path, kind: type[Config]) -> Config:
    """The settings of a TOML file over the defaults of one command.

    **Raises:** `InputError` for a file that cannot be read, an unknown key, or a wrong type.
    """
    content = read_toml(path)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "config"}
    return kind(**converted(content, fields, str(path)), config=path)


def _check_out(out: Path) -> None:
    try:
        is_file = out.exists() and not out.is_dir()
    except OSError as error:
        # A name that is too long, or a folder that must not be read.
        raise refuse(
            "out", "be a folder that can be written", f"{out} gives: {error.strerror}"
        ) from error
    if is_file:
        raise refuse("out", "be a folder", f"is the file {out}")
