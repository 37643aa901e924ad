"""The settings of each command: dataclasses whose fields are flags and keys of a TOML file."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import tyro

from esljax._checks import refuse
from esljax._types import Array
from esljax.experiment import (
    DTYPES,
    PROJECTIONS,
    SEEDS,
    TRANSPORTS,
    VELOCITIES,
    AtLeast,
    Manner,
    Nonnegative,
    NumbersConfig,
    OneOf,
    Positive,
    ProblemConfig,
    check_fields,
    check_given,
    make_transport,
    plain,
    usual_families,
)
from esljax.files import Selection, patterns
from esljax.transport import AbstractTransport
from esljax.velocity import AbstractVelocity

# The exit codes of the commands; that of SIGTERM and SIGHUP is `files.TERMINATED`.
DONE, FAILED, BAD_INPUT, NOT_WRITTEN, INTERRUPTED = 0, 1, 2, 3, 130


@dataclasses.dataclass(frozen=True)
class JobConfig(NumbersConfig):
    """The settings of a command that searches schedules, beside those of its learning problem.

    They are of the search, of devices and of files; `groups` tells which in the help.
    """

    cores: ClassVar[int] = 1
    """The cores of a CPU that share the members, unless `devices` says how many."""
    problem: str | None = None
    """Your own Problem, or a function whose keywords become flags: my_file.py:name, module:name."""
    rate: Annotated[float, Positive()] | None = None
    """Learning rate per step clear of the stability limit; found by default."""
    out: Path = Path("esljax")
    """Folder for the results; made if it does not exist."""
    resume: Annotated[bool, Manner()] = False
    """Finish the interrupted run in `out`, with the results of a run never interrupted."""
    force: Annotated[bool, Manner()] = False
    """Replace what esljax wrote into `out` for another configuration, or of an unfinished run."""
    checkpoint_every: Annotated[float, Nonnegative(infinite=True)] = 60.0
    """Least time in seconds between two checkpoints, kept in `out` until the run is done."""
    recompute: bool = False
    """Keep only about 2√steps states for the gradient and recompute the others: saves memory."""
    devices: Annotated[int, AtLeast(1), Manner()] | None = None
    """Devices that share the members; by default all there are. On a CPU, cores: 2 to optimize."""
    distributed: Annotated[bool, Manner()] = False
    """Run as one of several processes, found by the environment (Cloud TPU, SLURM) or flags."""
    coordinator: Annotated[str, Manner()] | None = None
    """With --distributed: address and port of the first process."""
    processes: Annotated[int, AtLeast(1), Manner()] | None = None
    """With --distributed: how many processes there are."""
    process: Annotated[int, AtLeast(0), Manner()] | None = None
    """With --distributed: which of them this is, from 0."""
    compilation_cache: Annotated[bool, Manner()] = True
    """Keep compiled programs in your folder for caches, or where ESLJAX_COMPILATION_CACHE says."""
    config: Annotated[Path, Manner()] | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> None:
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        check_fields(self)
        check_given(self)
        if isinstance(self, ProblemConfig):
            self.check_training()
        for name in ("coordinator", "processes", "process"):
            if getattr(self, name) is not None and not self.distributed:
                raise refuse(name, "come with --distributed", "is given alone")
        _check_out(self.out)

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON hold them; reading them back gives the same run."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(JobConfig):
    """Compare the usual learning-rate schedules with one found by gradient.

    All are scaled to the same final loss and held against the epistemic speed limit.

    Exit codes: 0 done; 1 the optimized schedule misses the target loss; 2 bad input; 3 the numbers
    are printed, but not all files could be written; 130 interrupted (once the search has begun, the
    best schedule so far is judged and written first); 143 ended by SIGTERM or SIGHUP, after saving;
    or 75 another process of the run is gone. In the last four cases --resume finishes the run.

    Example: esljax optimize --data moons --hidden 8 --members 16 --out moons
    """

    cores: ClassVar[int] = 2
    out: Path = Path("esljax-optimize")
    """Folder for report.json, config.toml, figures and schedules; made if it does not exist."""
    target: Annotated[float, Positive()] | None = None
    """Mean final training loss of all schedules; by default that of the constant one at `rate`."""
    knots: Annotated[int, AtLeast(2)] = 12
    """Knots of the optimized log learning rate."""
    iterations: Annotated[int, AtLeast(1)] = 40
    """Gradient steps of the search."""
    judge_runs: Annotated[int, AtLeast(2)] = 5
    """Held-out runs (initializations, batches and noise) that judge each schedule."""
    match_runs: Annotated[int, AtLeast(1)] = 2
    """Runs whose mean final loss is matched to the target."""

    @property
    def known_rate(self) -> float | None:
        """The rate, if it need not be found."""
        return self.rate


@dataclasses.dataclass(frozen=True)
class OptimizeConfig(ComparisonConfig, ProblemConfig):
    """The settings of `esljax optimize` for the built-in problem."""

    __doc__ = ComparisonConfig.__doc__

    rate: Annotated[float, Positive()] | None = None
    """Learning rate per step: all of a constant schedule, the peak of any other; by default 0.25
    for mlp on digits, moons and teacher, and found for anything else."""

    @property
    def known_rate(self) -> float | None:
        """The rate, if it need not be found."""
        usual = self.model == "mlp" and self.data in ("digits", "moons", "teacher")
        return 0.25 if self.rate is None and usual else self.rate


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Predict the memory of `esljax optimize` with these settings on each device, without a run.

    Exit codes: 0 it fits; 2 it does not, with the change that would help, or bad input.

    Example: esljax plan --members 4096 --devices 256 --memory 16 --recompute
    """

    memory: Annotated[float, Positive(infinite=True), Manner()] | None = None
    """Memory of each device in gigabytes; by default that of the devices here."""


@dataclasses.dataclass(frozen=True)
class OutsidePlanConfig(PlanSettings, ComparisonConfig):
    """The settings of `esljax plan` for a problem from outside."""

    __doc__ = PlanSettings.__doc__


@dataclasses.dataclass(frozen=True)
class PlanConfig(PlanSettings, OptimizeConfig):
    """The settings of `esljax plan` for the built-in problem."""

    __doc__ = PlanSettings.__doc__


# The families that are held against a front, by the names of their flag.
FAMILIES = {**usual_families(), "none": None}


@dataclasses.dataclass(frozen=True)
class OutsideFrontConfig(JobConfig):
    """Find the trade of loss and entropy production: the least Σ at each final loss.

    Beside the front of free schedules stand families of usual ones, each at its best, all judged on
    runs that no search has seen. The schedules are saved, for use at any number of steps.

    Exit codes: 0 done; 2 bad input; 3 the numbers are printed, but not all files could be written;
    130 interrupted; 143 ended by SIGTERM or SIGHUP; or 75 another process of the run is gone. In
    the last three cases --resume finishes the run from the points that are saved.

    Example: esljax front --data moons --steps 100 --families cosine --out moons
    """

    out: Path = Path("esljax-front")
    """Folder for front.json, config.toml, the figure and the schedules; made if not there."""
    points: Annotated[int, AtLeast(1)] = 5
    """Points of the front, from little entropy production to a low loss."""
    targets: tuple[Annotated[float, Positive()], ...] = ()
    """Final losses of the points, from high to low; by default their slopes are fixed instead."""
    knots: Annotated[int, AtLeast(2)] = 10
    """Knots of the searched learning rate."""
    families: tuple[Annotated[str, OneOf(FAMILIES)], ...] = tuple(usual_families())
    """Usual schedules to hold against the front, by name; 'none' for none."""
    iterations: Annotated[int, AtLeast(2)] = 40
    """Gradients of each point; half as many more at the first, .6 times as many for families."""
    judge_runs: Annotated[int, AtLeast(2)] = 6
    """Held-out runs (initializations, batches and noise) that judge each point."""

    def check(self) -> None:
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        super().check()
        if "none" in self.families and len(self.families) > 1:
            raise refuse("families", "be names, or 'none' alone", f"is {' '.join(self.families)}")
        falling = all(a > b for a, b in itertools.pairwise(self.targets))
        if not falling:
            given = " ".join(f"{target:g}" for target in self.targets)
            raise refuse("targets", "be final losses from high to low", f"is {given}")


@dataclasses.dataclass(frozen=True)
class FrontConfig(OutsideFrontConfig, ProblemConfig):
    """The settings of `esljax front` for the built-in problem."""

    __doc__ = OutsideFrontConfig.__doc__

    hidden: tuple[Annotated[int, AtLeast(1)], ...] = (16,)
    """Widths of the hidden layers of the network."""
    batch_size: Annotated[int, AtLeast(0)] = 8
    """Examples per step and member, drawn with replacement; 0 for all of them."""
    l2: Annotated[float, Nonnegative()] = 0.0
    """Weight decay: the loss has l2/2 times the squared norm of the parameters added."""
    members: Annotated[int, AtLeast(2)] = 8
    """Members of the ensemble, each with its own initialization, batches and noise."""
    temperature: Annotated[float, Nonnegative()] = 0.0
    """Temperature of the injected noise, in units of the loss."""


# Whether `measure` reads a recording in blocks.
STREAMS: dict[str, None] = dict.fromkeys(("auto", "yes", "no"))


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Hold a training run of your own against the epistemic speed limit.

    The recording is an .npz file or a .zarr group of `positions` (snapshots, members, numbers) or
    of `features` of such a shape, and optionally `times`; or a folder of checkpoints, each .npz,
    or .safetensors, or Orbax, laid out as member_000/step_000100.npz. Of checkpoints the parameters
    are measured; what lies beside them and is left out is printed. No pickled data is loaded.

    Exit codes: 0 done; 1 the numbers are written but not to be trusted (a transport problem did
    not converge, or Σ is below W2²); 2 bad input; 3 the numbers are printed, but not all files
    could be written; 130 interrupted or 143 ended by SIGTERM or SIGHUP, with no numbers written; a
    recording that was read in blocks goes on from there when the same command is given again.

    Example: esljax measure checkpoints --only 'params/*' --project pca
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
    symmetry: Path | None = None
    """TOML file of axes that permutations of units turn together: members count modulo them."""
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
    stream: Annotated[str, OneOf(STREAMS)] = "auto"
    """Read in blocks, not into memory: 'yes', 'no', or 'auto', beyond a quarter of the memory."""
    force: Annotated[bool, Manner()] = False
    """Replace what esljax wrote into `out` for another configuration."""
    compilation_cache: Annotated[bool, Manner()] = True
    """Keep compiled programs in your folder for caches, or where ESLJAX_COMPILATION_CACHE says."""
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
        needs = self.needs_members()
        if self.stream == "yes" and needs is not None:
            name, must = needs
            raise refuse(name, f"be {must} with --stream yes", f"is {getattr(self, name)!r}")
        if self.symmetry is not None and self.project != "none":
            must = "be 'none' modulo a symmetry, which acts on all parameters"
            raise refuse("project", must, f"is {self.project!r}")
        _check_out(self.out)
        return self

    def needs_members(self) -> tuple[str, str] | None:
        """The setting that needs the members themselves, and what would not; None if the distances
        between them are enough."""
        transport = self.make_transport(jax.random.key(0))
        if not transport.of_distances:
            return "transport", "'exact', 'sinkhorn' or 'gaussian'"
        if self.symmetry is not None:
            return "symmetry", "None"
        if self.project not in PROJECTIONS:
            return "project", "'none', 'pca' or 'random'"
        return None if self.velocity == "none" else ("velocity", "'none'")

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

    Example: esljax check --quiet
    """

    compilation_cache: Annotated[bool, Manner()] = True
    """Keep compiled programs in your folder for caches, or where ESLJAX_COMPILATION_CACHE says."""
    quiet: bool = False
    """Print failures only."""


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
