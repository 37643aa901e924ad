"""The settings of a training run: a frozen dataclass whose fields are the flags and the keys of a TOML file."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from esljax._checks import (
    InputError,
    check_choice,
    check_nonnegative,
    check_positive,
    check_positive_int,
    refuse,
)
from esljax._types import Array, ScalarLike
from esljax.potentials import datasets
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    SinkhornTransport,
    SlicedTransport,
)


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
            check_positive_int(name, getattr(self, name), LEAST[name])
        if self.seed >= 2**32:
            raise refuse(
                "seed",
                "be below 2**32, where the keys of single precision repeat themselves",
                f"is {self.seed}",
            )
        for name in ("rate", "epsilon", "temperature", "l2"):
            if isinstance(getattr(self, name), bool) or not isinstance(
                getattr(self, name), int | float
            ):
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
            check_choice(name, getattr(self, name), CHOICES[name])

    def load_data(self) -> datasets.Dataset:
        return {
            "digits": datasets.digits,
            "moons": datasets.two_moons,
            "teacher": datasets.teacher,
        }[self.data]()

    def make_transport(self, key: Array) -> AbstractTransport:
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)


@dataclasses.dataclass(frozen=True)
class RunConfig(TrainingConfig):
    """One training run held against the speed limit: a point of a `Study`.

    **Example:**

        >>> RunConfig(data="moons", hidden=(4,), schedule="cosine", rate=0.5).members
        32
    """

    schedule: Literal[
        "constant", "linear_decay", "cosine", "warmup_stable_decay", "exponential_decay"
    ] = "constant"
    """Shape of the learning rate over training time; `rate` is its peak."""
    jackknife: int = 0
    """The most groups of members left out in turn for standard errors of this one run, each of which repeats all transports; 0 for none."""

    def check(self) -> "RunConfig":
        """Refuse what cannot run, before any computation, in one sentence."""
        self.check_training()
        check_choice("schedule", self.schedule, CHOICES["schedule"])
        check_positive_int("jackknife", self.jackknife, 0)
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same run."""
        return plain(self)


CHOICES = {
    "data": ("digits", "moons", "teacher"),
    "transport": ("exact", "gaussian", "sliced", "sinkhorn"),
    "velocity": ("none", "transport"),
    "schedule": ("constant", "linear_decay", "cosine", "warmup_stable_decay", "exponential_decay"),
    "dtype": ("float32", "float64"),
    "model_dtype": ("same", "bfloat16"),
}

# What may be left out has no default to tell its type.
OPTIONAL = {
    "target": float,
    "recording": Path,
    "memory": float,
    "devices": int,
    "coordinator": str,
    "processes": int,
    "process": int,
}

# What says how a command runs, not what it computes.
MANNER = (
    "memory",
    "config",
    "resume",
    "devices",
    "distributed",
    "coordinator",
    "processes",
    "process",
)

LEAST = {
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


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. **Raises:** `InputError` if it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("config", "be a readable file", f"{path} gives: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse("config", "be valid TOML", f"{path} is not: {error}") from error


def converted(
    content: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], place: str
) -> dict[str, Any]:
    """The values of a table as the fields of a configuration want them. **Raises:** `InputError` for an unknown key or a wrong type."""
    for key in content:
        if key not in fields:
            raise InputError(
                f"Key `{key}` of {place} is unknown; the known keys are {', '.join(fields)}."
            )
    return {key: convert(key, value, fields[key].default, place) for key, value in content.items()}


def convert(key: str, value: Any, default: Any, place: str) -> Any:
    """A value as the field `key` wants it, which is told by its default. **Raises:** `InputError` for a wrong type."""
    if key in CHOICES:
        check_choice(key, value, CHOICES[key])
        return value
    kind = OPTIONAL.get(key, Path if isinstance(default, Path) else type(default))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if (
        kind is tuple
        and isinstance(value, list)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    ):
        return tuple(value)
    if type(value) is not kind:
        said = {tuple: "list of integers", str: "string", Path: "string"}.get(kind, kind.__name__)
        raise refuse(key, f"be a {said} in {place}", f"is {value!r}")
    return value


def plain(config: Any) -> dict[str, Any]:
    """What a configuration holds, in types that TOML and JSON know; how and from where it is run is not part of it."""

    def plain(value):
        return (
            str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
        )

    return {
        name: plain(value)
        for name, value in dataclasses.asdict(config).items()
        if name not in MANNER
    }


def make_transport(
    name: str, epsilon: ScalarLike, directions: int, chunk: int, key: Array
) -> AbstractTransport:
    """The transport of that name; `epsilon` and `key`, which few of them look at, may be traced."""
    if name == "exact":
        return ExactTransport()
    if name == "gaussian":
        return GaussianTransport()
    if name == "sliced":
        return SlicedTransport(directions, key)
    return SinkhornTransport(epsilon, chunk=chunk or None)


def enable(dtype: str) -> None:
    """Make jax compute in `dtype` from here on; called by the commands, never on import."""
    jax.config.update("jax_enable_x64", dtype == "float64")
