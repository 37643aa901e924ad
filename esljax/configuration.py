"""What the commands can be told: frozen dataclasses whose fields are the flags and the keys of a TOML file."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np
import tyro

from esljax import datasets
from esljax._checks import InputError, check_choice, check_nonnegative, check_positive, check_positive_int, refuse
from esljax._types import Array, ScalarLike
from esljax.sinkhorn import SinkhornTransport
from esljax.transport import AbstractTransport, ExactTransport, GaussianTransport, SlicedTransport

# What the commands exit with.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every training run has: data, network, ensemble, steps, noise, and the geometry that it is measured in."""

    data: Literal["digits", "moons", "teacher"] = "digits"
    """Data set: scikit-learn's digits, two moons, or a random teacher network."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the hidden layers of the network."""
    members: int = 32
    """Members of the ensemble, each with its own initialization, batches and noise."""
    steps: int = 200
    """Training steps."""
    snapshots: int = 20
    """Links between the snapshots of a run; must divide the steps."""
    batch_size: int = 256
    """Examples per step and member, drawn with replacement; 0 for all of them."""
    temperature: float = 1e-7
    """Temperature of the injected noise, in units of the loss."""
    l2: float = 1e-4
    """Weight decay: l2/2 times the squared norm of the parameters is added to the loss."""
    rate: float = 0.25
    """Learning rate per step: all of a constant schedule, the peak of another."""
    transport: Literal["exact", "gaussian", "sliced", "sinkhorn"] = "exact"
    """Geometry of entropy production and distance."""
    epsilon: float = 1.0
    """Entropic regularization of the sinkhorn transport, in squared parameters."""
    directions: int = 64
    """Directions of the sliced transport."""
    chunk: int = 0
    """Members whose distances the sinkhorn transport holds at a time; 0 for all, in memory for the square of their number."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same numbers on the same machine and versions."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type."""
    model_dtype: Literal["same", "bfloat16"] = "same"
    """Floating-point type that the network computes in; all else is in `dtype`."""

    def check_training(self) -> None:
        """Refuse a run that cannot be, before any computation, in one sentence."""
        for name in ("members", "steps", "snapshots", "batch_size", "directions", "chunk", "seed"):
            check_positive_int(name, getattr(self, name), _LEAST[name])
        if self.seed >= 2**32:
            raise refuse("seed", "be below 2**32, where the keys of single precision repeat themselves", f"is {self.seed}")
        for name in ("rate", "epsilon", "temperature", "l2"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise refuse(name, "be a number", f"is {getattr(self, name)!r}")
        for name in ("rate", "epsilon"):
            check_positive(name, getattr(self, name))
        for name in ("temperature", "l2"):
            check_nonnegative(name, getattr(self, name))
        for name in ("rate", "epsilon", "temperature", "l2"):
            if not np.isfinite(getattr(self, name)):
                raise refuse(name, "be finite", f"is {getattr(self, name)}")
        if self.steps % self.snapshots:
            raise refuse("snapshots", f"divide the {self.steps} steps", f"is {self.snapshots}")
        if not isinstance(self.hidden, tuple):
            raise refuse("hidden", "be a tuple of integers", f"is {self.hidden!r}")
        for width in self.hidden:
            check_positive_int("hidden", width)
        for name in ("data", "transport", "dtype", "model_dtype"):
            check_choice(name, getattr(self, name), _CHOICES[name])

    def load_data(self) -> datasets.Dataset:
        return {"digits": datasets.digits, "moons": datasets.two_moons, "teacher": datasets.teacher}[self.data]()

    def make_transport(self, key: Array) -> AbstractTransport:
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)


@dataclasses.dataclass(frozen=True)
class RunConfig(TrainingConfig):
    """One training run held against the speed limit: a point of a `Study`.

    **Example:**

        >>> RunConfig(data="moons", hidden=(4,), schedule="cosine", rate=0.5).members
        32
    """

    schedule: Literal["constant", "linear_decay", "cosine", "warmup_stable_decay", "exponential_decay"] = "constant"
    """Shape of the learning rate over training time; `rate` is its peak."""
    jackknife: int = 0
    """The most groups of members left out in turn for standard errors of this one run, each of which repeats all transports; 0 for none."""

    def check(self) -> "RunConfig":
        """Refuse what cannot run, before any computation, in one sentence."""
        self.check_training()
        check_choice("schedule", self.schedule, _CHOICES["schedule"])
        check_positive_int("jackknife", self.jackknife, 0)
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same run."""
        return _settings(self)


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
            check_positive_int(name, getattr(self, name), _LEAST[name])
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
        return _settings(self)


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


_CHOICES = {
    "data": ("digits", "moons", "teacher"),
    "transport": ("exact", "gaussian", "sliced", "sinkhorn"),
    "velocity": ("none", "transport"),
    "schedule": ("constant", "linear_decay", "cosine", "warmup_stable_decay", "exponential_decay"),
    "dtype": ("float32", "float64"),
    "model_dtype": ("same", "bfloat16"),
}

# What may be left out has no default to tell its type.
_OPTIONAL = {"target": float, "recording": Path, "memory": float, "devices": int, "coordinator": str, "processes": int, "process": int}

# What says how a command runs, not what it computes.
_MANNER = ("memory", "config", "resume", "devices", "distributed", "coordinator", "processes", "process")

_LEAST = {
    "members": 2,
    "steps": 1,
    "snapshots": 1,
    "batch_size": 0,
    "knots": 2,
    "iterations": 1,
    "directions": 1,
    "chunk": 0,
    "judge_runs": 2,
    "match_runs": 1,
    "seed": 0,
}


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
            raise refuse("recording", "be a file of snapshots or a folder of checkpoints", "is not given")
        for name, least in (("coordinates", 1), ("directions", 1), ("chunk", 0), ("jackknife", 0), ("seed", 0)):
            check_positive_int(name, getattr(self, name), least)
        check_positive("epsilon", self.epsilon)
        if not np.isfinite(self.epsilon):
            raise refuse("epsilon", "be finite", f"is {self.epsilon}")
        for name in ("transport", "velocity", "dtype"):
            check_choice(name, getattr(self, name), _CHOICES[name])
        if self.velocity == "transport" and self.transport == "sliced":
            raise refuse("velocity", "be 'none' beside the sliced transport, which maps no member onto another", "is 'transport'")
        _check_out(self.out)
        return self

    def make_transport(self, key: Array) -> AbstractTransport:
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same report."""
        return _settings(self)


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


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. **Raises:** `InputError` if it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("config", "be a readable file", f"{path} gives: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse("config", "be valid TOML", f"{path} is not: {error}") from error


def converted(content: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], place: str) -> dict[str, Any]:
    """The values of a table as the fields of a configuration want them. **Raises:** `InputError` for an unknown key or a wrong type."""
    for key in content:
        if key not in fields:
            raise InputError(f"Key `{key}` of {place} is unknown; the known keys are {', '.join(fields)}.")
    return {key: convert(key, value, fields[key].default, place) for key, value in content.items()}


def convert(key: str, value: Any, default: Any, place: str) -> Any:
    """A value as the field `key` wants it, which is told by its default. **Raises:** `InputError` for a wrong type."""
    if key in _CHOICES:
        check_choice(key, value, _CHOICES[key])
        return value
    kind = _OPTIONAL.get(key, Path if isinstance(default, Path) else type(default))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is tuple and isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return tuple(value)
    if type(value) is not kind:
        said = {tuple: "list of integers", str: "string", Path: "string"}.get(kind, kind.__name__)
        raise refuse(key, f"be a {said} in {place}", f"is {value!r}")
    return value


def _settings(config: Any) -> dict[str, Any]:
    """What a configuration holds, in types that TOML and JSON know; how and from where it is run is not part of it."""
    plain = lambda value: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value  # noqa: E731
    return {name: plain(value) for name, value in dataclasses.asdict(config).items() if name not in _MANNER}


def make_transport(name: str, epsilon: ScalarLike, directions: int, chunk: int, key: Array) -> AbstractTransport:
    """The transport of that name; `epsilon` and `key`, which few of them look at, may be traced."""
    if name == "exact":
        return ExactTransport()
    if name == "gaussian":
        return GaussianTransport()
    if name == "sliced":
        return SlicedTransport(directions, key)
    return SinkhornTransport(epsilon, chunk=chunk or None)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise refuse("out", "be a folder", f"is the file {out}")


def enable(dtype: str) -> None:
    """Make jax compute in `dtype` from here on; called by the commands, never on import."""
    jax.config.update("jax_enable_x64", dtype == "float64")
