"""The settings of a training run: a frozen dataclass whose fields are flags and keys of TOML files.

Each kind of choice has one registry here, from names to what makes the thing. The flags of the
commands, the check of TOML files and the construction all read it, so one line adds a choice:

    DATASETS["mine"] = load_mine  # () -> Dataset
    TRANSPORTS["mine"] = lambda numbers: MyTransport(numbers.epsilon)
"""

import collections
import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax

from esljax._checks import InputError, check_choice, first_sentence, refuse
from esljax._types import Array, ScalarLike
from esljax.experiment.bounds import (
    AtLeast,
    Below,
    NameOr,
    Nonnegative,
    OneOf,
    Positive,
    check_fields,
    is_manner,
)
from esljax.experiment.learning import FILES, LOSSES, MODELS, PLACES, is_place
from esljax.experiment.spelling import Spelled, spelled
from esljax.files import holds_examples, is_table
from esljax.potentials import datasets
from esljax.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    Exponential,
    Linear,
    WarmupStableDecay,
)
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    SinkhornTransport,
    SlicedTransport,
    principal_directions,
    random_directions,
)
from esljax.velocity import AbstractVelocity, Maps, TransportVelocity


class TransportNumbers(NamedTuple):
    """The settings that a transport may be made from; most look at few of them."""

    epsilon: ScalarLike
    """Entropic regularization, in squared coordinates; may be traced."""
    directions: int
    """Number of directions to project on."""
    chunk: int
    """Members whose distances are held at a time; 0 for all."""
    key: Array
    """Of random directions; may be traced."""


def _transport_velocity(transport: AbstractTransport) -> AbstractVelocity:
    if not isinstance(transport, Maps):
        raise refuse(
            "velocity",
            f"be 'none' beside {transport.name}, which maps no member onto another",
            "is 'transport'",
        )
    return TransportVelocity(transport)


DATASETS: dict[str, Callable[[], datasets.Dataset]] = {
    "digits": datasets.digits,
    "wine": datasets.wine,
    "breast_cancer": datasets.breast_cancer,
    "diabetes": datasets.diabetes,
    "moons": datasets.two_moons,
    "teacher": datasets.teacher,
    "modular_addition": datasets.modular_addition,
}

TRANSPORTS: dict[str, Callable[[TransportNumbers], AbstractTransport]] = {
    "exact": lambda numbers: ExactTransport(),
    "gaussian": lambda numbers: GaussianTransport(),
    "sliced": lambda numbers: SlicedTransport(numbers.directions, numbers.key),
    "sinkhorn": lambda numbers: SinkhornTransport(numbers.epsilon, chunk=numbers.chunk or None),
}

# The shapes of learning-rate schedules, each with peak 1: those in common use, and those that rise.
SCHEDULES: dict[str, Callable[[], AbstractSchedule]] = {
    "constant": lambda: Constant(1.0),
    "linear_decay": lambda: Linear(1.0, 0.0),
    "cosine": lambda: Cosine(1.0),
    "warmup_stable_decay": lambda: WarmupStableDecay(1.0),
    "exponential_decay": lambda: Exponential(1.0, 0.1),
    "linear_rise": lambda: Linear(0.2, 1.0),
    "exponential_rise": lambda: Exponential(math.exp(-1.6), 1.0),
}


def usual_shapes() -> dict[str, AbstractSchedule]:
    """The learning-rate schedules in common use, and two that rise, with peak 1, by name.

    **Example:**

        >>> import esljax as esl
        >>> print(esl.usual_shapes()["cosine"])
        Cosine: peak 1, end 0
    """
    return Spelled({name: make() for name, make in SCHEDULES.items()})


# Not in common use: a search that ends at a rising rate is held against what a rise gains alone.
RISING = ("linear_rise", "exponential_rise")

# Whether jax must have 64-bit numbers enabled.
DTYPES: dict[str, bool] = {"float32": False, "float64": True}

# As `FlaxLoss` takes them; None is the type of everything else.
MODEL_DTYPES: dict[str, str | None] = {"same": None, "bfloat16": "bfloat16"}

# From positions (J+1, n, d), a number p of coordinates and a key to a matrix (d, p), or None.
PROJECTIONS: dict[str, Callable[[Array, int, Array], Array | None]] = {
    "none": lambda positions, coordinates, key: None,
    "pca": lambda positions, coordinates, key: principal_directions(positions, coordinates),
    "random": lambda positions, coordinates, key: random_directions(
        positions.shape[2], coordinates, key
    ),
}

# From the transport of a measurement to a velocity, or None for the chain of distances alone.
VELOCITIES: dict[str, Callable[[AbstractTransport], AbstractVelocity | None]] = {
    "none": lambda transport: None,
    "transport": _transport_velocity,
}

SEEDS = Below(2**32, "2**32", "where the keys of single precision repeat themselves")


@dataclasses.dataclass(frozen=True)
class NumbersConfig:
    """The settings of random and other numbers.

    `check_fields` reads the bounds in the annotations; the line below a field gives its meaning and
    unit.
    """

    seed: Annotated[int, AtLeast(0), SEEDS] = 0
    """Seed of all random numbers; on one machine and versions it fixes every result."""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """Floating-point type."""


@dataclasses.dataclass(frozen=True)
class GeneralConfig(NumbersConfig):
    """The settings of a training run beside its learning problem, whichever that is."""

    rate: Annotated[float, Positive()] = 0.25
    """Learning rate per step: all of a constant schedule, the peak of any other."""


@dataclasses.dataclass(frozen=True)
class EnsembleConfig:
    """The settings of the built-in problem's ensemble: its steps, noise and geometry."""

    members: Annotated[int, AtLeast(2)] = 32
    """Members of the ensemble, each with its own initialization, batches and noise."""
    steps: Annotated[int, AtLeast(1)] = 200
    """Training steps."""
    snapshots: Annotated[int, AtLeast(1)] = 20
    """Links between the snapshots of a run; must divide the steps."""
    temperature: Annotated[float, Nonnegative()] = 1e-7
    """Temperature of the injected noise, in units of the loss."""
    transport: Annotated[str, OneOf(TRANSPORTS)] = "exact"
    """Optimal transport that defines entropy production and distance."""
    epsilon: Annotated[float, Positive()] = 1.0
    """Entropic regularization of the sinkhorn transport, in squared parameters."""
    directions: Annotated[int, AtLeast(1)] = 64
    """Random directions of the sliced transport."""
    chunk: Annotated[int, AtLeast(0)] = 0
    """Members whose distances sinkhorn holds at a time; 0 for all, an n × n matrix in memory."""

    def make_transport(self, key: Array) -> AbstractTransport:
        """The transport of that name; `key` is of its random directions, if it has any."""
        return make_transport(self.transport, self.epsilon, self.directions, self.chunk, key)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The settings of the built-in problem's loss: data, network, batches and decay."""

    data: Annotated[str, NameOr(DATASETS, FILES, holds_examples)] = "digits"
    """Data set by name, or your own: an .npz of `inputs` and `labels`, or a table .csv."""
    label: str = ""
    """With a table: the column of the labels."""
    model: Annotated[str, NameOr(MODELS, PLACES, is_place)] = "mlp"
    """Network: mlp, or a factory (inputs, outputs) -> Flax model, as my_file.py:name."""
    hidden: tuple[Annotated[int, AtLeast(1)], ...] = (32,)
    """Widths of the hidden layers of the network."""
    loss: Annotated[str, NameOr(LOSSES, PLACES, is_place)] = "auto"
    """Loss: cross_entropy, squared_error, or a function (outputs, labels) -> (m,), as
    my_file.py:name; auto: by the labels, the first for classes, the second for numbers."""
    batch_size: Annotated[int, AtLeast(0)] = 256
    """Examples per step and member, drawn with replacement; 0 for all of them."""
    l2: Annotated[float, Nonnegative()] = 1e-4
    """Weight decay: the loss has l2/2 times the squared norm of the parameters added."""
    model_dtype: Annotated[str, OneOf(MODEL_DTYPES)] = "same"
    """Floating-point type that the network computes in; everything else uses `dtype`."""

    def load_data(self) -> datasets.Dataset:
        """The data set of that name, or of that file."""
        if self.data in DATASETS:
            return DATASETS[self.data]()
        # A loss of the user's own has the labels as they are.
        return datasets.read(
            self.data,
            self.label,
            classes=LOSSES.get(self.loss),
            standardize_labels=self.loss in LOSSES,
        )


# Fields come in the order of the bases from last to first.
@dataclasses.dataclass(frozen=True)
class ProblemConfig(EnsembleConfig, LossConfig):
    """The settings of the built-in problem."""

    def check_training(self) -> None:
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        check_fields(self)
        if self.steps % self.snapshots:
            raise refuse("snapshots", f"divide the {self.steps} steps", f"is {self.snapshots}")
        if self.label and not is_table(self.data):
            must = "be given with a table .csv or .tsv alone"
            raise refuse("label", must, f"is {self.label!r} for data {self.data!r}")
        if is_table(self.data) and not self.label:
            raise refuse("label", f"name the column of the labels of {self.data}", "is not given")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(GeneralConfig, ProblemConfig):
    """The settings of a training run of the built-in problem."""


# What the schedule of a run may be: a usual shape, or the one that a search by gradient finds.
OPTIMIZED = "optimized"
RUN_SCHEDULES: Mapping[str, Any] = collections.ChainMap[str, Any]({OPTIMIZED: None}, SCHEDULES)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The settings of the schedule of one run, and of how its rate is found."""

    schedule: Annotated[str, OneOf(RUN_SCHEDULES)] = "constant"
    """Shape of the learning rate over training time; `rate` is its peak. "optimized" is the shape
    of least Σ at the target, or at the loss of the constant schedule, found by gradient."""
    target: Annotated[float, Nonnegative()] = 0.0
    """Final training loss to reach in place of a given rate, which is found; 0 for none."""
    knots: Annotated[int, AtLeast(2)] = 12
    """Knots of the log learning rate of the optimized schedule."""
    iterations: Annotated[int, AtLeast(1)] = 40
    """Gradient steps of the search for the optimized schedule."""
    match_runs: Annotated[int, AtLeast(1)] = 2
    """Runs, on keys of their own, whose mean final loss is brought to the target."""

    def __post_init__(self):
        object.__setattr__(self, "schedule", spelled(self.schedule, RUN_SCHEDULES))


@dataclasses.dataclass(frozen=True)
class RunConfig(ScheduleConfig, TrainingConfig):
    """One training run to compare with the speed limit: a point of a `Study`.

    The fields are those of `TrainingConfig` and `ScheduleConfig`, and the one below.

    **Example:**

        >>> import esljax as esl
        >>> esl.RunConfig(data="moons", hidden=(4,), schedule="cosine", rate=0.5).members
        32
    """

    jackknife: Annotated[int, AtLeast(0)] = 0
    """Most groups of members left out in turn for the standard errors of one run; 0 for none."""

    def check(self) -> "RunConfig":
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        self.check_training()
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON hold them; reading them back gives the same run."""
        return plain(self)


@dataclasses.dataclass(frozen=True)
class OutsideConfig(ScheduleConfig, GeneralConfig):
    """The settings of one run of a problem from outside, beside the keywords of its function."""

    rate: Annotated[float, Nonnegative()] = 0.0
    """Learning rate per step: all of a constant schedule, the peak of any other; 0 for the largest
    of a few that leaves the constant schedule stable."""

    def check(self) -> "OutsideConfig":
        """**Raises:** `InputError`, before any computation, for settings that cannot run."""
        check_fields(self)
        return self

    def as_dict(self) -> dict[str, Any]:
        """The settings as TOML and JSON hold them; reading them back gives the same run."""
        return {name: value for name, value in plain(self).items() if value is not None}


# A device such as /dev/zero has no end. Lists of points, one by one, take tens of bytes a point.
_LONGEST_TOML = 1 << 28


def read_toml(path: Path, argument: str = "config") -> dict[str, Any]:
    """The content of a TOML file.

    **Args:** `argument`: the setting that names the file.
    **Raises:** `InputError` if it cannot be read or parsed.
    """
    try:
        # Some editors begin a file with the mark of its encoding.
        with path.open("rb") as file:
            content = file.read(_LONGEST_TOML + 1)
        if len(content) > _LONGEST_TOML:
            raise refuse(argument, "be a file of settings", f"{path} does not end within 256 MB")
        return tomllib.loads(content.decode("utf-8-sig"))
    except InputError:
        raise
    except OSError as error:
        raise refuse(argument, "be a readable file", f"{path} gives: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise refuse(
            argument, "be valid TOML, which is UTF-8", f"{path} is not: {error.reason}"
        ) from error
    except RecursionError as error:
        raise refuse(argument, "be valid TOML", f"{path} is nested too deep") from error
    except ValueError as error:
        # A path with a null, a syntax error, or an integer of thousands of digits.
        reason = first_sentence(error)
        raise refuse(argument, "be valid TOML", f"{path} is not: {reason}") from error


def plain(config: Any) -> dict[str, Any]:
    """The fields of a configuration in types that TOML and JSON hold, without its `Manner`s."""

    def value(x):
        if isinstance(x, Path):
            # A name that is not text in this locale is text in a file, which is UTF-8.
            return os.fsencode(x).decode(errors="replace")
        return [value(one) for one in x] if isinstance(x, tuple) else x

    return {
        field.name: value(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if not is_manner(field)
    }


def make_transport(
    name: str, epsilon: ScalarLike, directions: int, chunk: int, key: Array
) -> AbstractTransport:
    """The transport of that name; `epsilon` and `key` may be traced.

    **Raises:** `InputError` for a name that `TRANSPORTS` does not have.
    """
    check_choice("transport", name, tuple(TRANSPORTS))
    return TRANSPORTS[name](TransportNumbers(epsilon, directions, chunk, key))


def enable(dtype: str) -> None:
    """Make jax compute in `dtype` from here on; the commands call it, importing never does."""
    jax.config.update("jax_enable_x64", DTYPES[dtype])


def in_words(name: str) -> str:
    """The name of a setting or a schedule, for a reader."""
    return name.replace("_", " ")
