"""What the commands can be told: frozen dataclasses whose fields are the flags and the keys of a TOML file."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from esljax import datasets
from esljax._checks import InputError, check_choice, check_nonnegative, check_positive, check_positive_int, refuse
from esljax._types import Array
from esljax.transport import AbstractTransport, ExactTransport, GaussianTransport, SinkhornTransport, SlicedTransport


@dataclasses.dataclass(frozen=True)
class OptimizeConfig:
    """Compare the usual learning-rate schedules with one found by gradient, at matched final loss, against the epistemic speed limit.

    Exit codes: 0 done; 1 the optimized schedule misses the target loss; 2 bad input; 130 interrupted (if the optimization had begun,
    the best schedule so far is judged and written first).
    """

    out: Path = Path("esljax-optimize")
    """Folder for report.json, config.toml, schedules.png and speed_limit.png; made if it does not exist."""
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
    """Examples per step and member, drawn with replacement."""
    temperature: float = 1e-7
    """Temperature of the injected noise, in units of the loss."""
    l2: float = 1e-4
    """Weight decay: l2/2 times the squared norm of the parameters is added to the loss."""
    rate: float = 0.25
    """Learning rate of the constant schedule that sets the target, per step."""
    target: float | None = None
    """Mean final training loss that all schedules must meet; by default that of the constant schedule at `rate`."""
    knots: int = 12
    """Knots of the optimized log learning rate."""
    iterations: int = 40
    """Gradient steps of the optimization."""
    transport: Literal["exact", "gaussian", "sliced", "sinkhorn"] = "exact"
    """Geometry of entropy production and distance."""
    epsilon: float = 1.0
    """Entropic regularization of the sinkhorn transport, in squared parameters."""
    directions: int = 64
    """Directions of the sliced transport."""
    judge_runs: int = 5
    """Held-out runs (initializations, batches and noise) that judge each schedule."""
    match_runs: int = 2
    """Runs whose mean loss is matched to the target."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same report on the same machine and versions."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type."""
    config: Path | None = None
    """TOML file with any of these settings; flags override it."""
    quiet: bool = False
    """Print nothing but errors."""

    def check(self) -> "OptimizeConfig":
        """Refuse what cannot run, before any computation, in one sentence."""
        for name, least in _LEAST.items():
            check_positive_int(name, getattr(self, name), least)
        for name in ("rate", "epsilon"):
            check_positive(name, getattr(self, name))
        for name in ("temperature", "l2"):
            check_nonnegative(name, getattr(self, name))
        for name in ("rate", "epsilon", "temperature", "l2"):
            if not np.isfinite(getattr(self, name)):
                raise refuse(name, "be finite", f"is {getattr(self, name)}")
        if self.target is not None and not 0 < self.target < np.inf:
            raise refuse("target", "be a positive loss", f"is {self.target}")
        if self.steps % self.snapshots:
            raise refuse("snapshots", f"divide the {self.steps} steps", f"is {self.snapshots}")
        for width in self.hidden:
            check_positive_int("hidden", width)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.out.exists() and not self.out.is_dir():
            raise refuse("out", "be a folder", f"is the file {self.out}")
        return self

    def load_data(self) -> datasets.Dataset:
        return {"digits": datasets.digits, "moons": datasets.two_moons, "teacher": datasets.teacher}[self.data]()

    def make_transport(self, key: Array) -> AbstractTransport:
        if self.transport == "exact":
            return ExactTransport()
        if self.transport == "gaussian":
            return GaussianTransport()
        if self.transport == "sliced":
            return SlicedTransport(self.directions, key)
        return SinkhornTransport(self.epsilon)

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON know them; reading them back gives the same run."""
        settings = dataclasses.asdict(self)
        settings.pop("config")
        return {**settings, "out": str(self.out), "hidden": list(self.hidden)}


_CHOICES = {
    "data": ("digits", "moons", "teacher"),
    "transport": ("exact", "gaussian", "sliced", "sinkhorn"),
    "dtype": ("float32", "float64"),
}

_LEAST = {
    "members": 2,
    "steps": 1,
    "snapshots": 1,
    "batch_size": 1,
    "knots": 2,
    "iterations": 1,
    "directions": 1,
    "judge_runs": 2,
    "match_runs": 1,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Run the closed-form references through the public functions: print reference, computed value, error, and pass or fail.

    Exit codes: 0 all pass; 1 a failure; 2 bad input.
    """

    quiet: bool = False
    """Print failures only."""


def from_toml(path: Path) -> OptimizeConfig:
    """The settings of a TOML file over the defaults.

    **Raises:** `InputError` for a missing or broken file, an unknown key, or a value of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("config", "be a readable file", f"{path} gives: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse("config", "be valid TOML", f"{path} is not: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(OptimizeConfig) if field.name != "config"}
    for key, value in content.items():
        if key not in fields:
            raise InputError(f"Key `{key}` of {path} is unknown; the known keys are {', '.join(fields)}.")
        content[key] = _convert(key, value, getattr(OptimizeConfig, key), path)
    return OptimizeConfig(**content, config=path)


def _convert(key: str, value: Any, default: Any, path: Path) -> Any:
    if key in _CHOICES:
        check_choice(key, value, _CHOICES[key])
        return value
    kind = float if key == "target" else type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return tuple(value)
    if isinstance(default, Path) and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise refuse(key, f"be a {'list of integers' if kind is tuple else kind.__name__} in {path}", f"is {value!r}")
    return value


def enable(dtype: str) -> None:
    """Make jax compute in `dtype` from here on; called by the commands, never on import."""
    jax.config.update("jax_enable_x64", dtype == "float64")
