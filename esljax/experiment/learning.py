"""Data, model and loss of a configuration as one potential: built-in choices or the user's own.

    data    a name of `DATASETS`, or a file .npz, .csv or .tsv
    model   "mlp", or the place of a factory: "my_file.py:name", "package.module:name"
    loss    "auto", a name that `FlaxLoss` knows, or the place of a function

Where the loss is left open, the labels decide: classes have a cross entropy, numbers to predict a
squared error.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from esljax._checks import check_fits, in_words, refuse
from esljax._types import Array
from esljax.experiment.sources import load
from esljax.files import EXAMPLES, digest, holds_examples
from esljax.potentials import Dataset, Examples, FlaxLoss, Sizes, mlp, own_model, takes

# The settings that may name a file of the user's.
OWN = ("data", "model", "loss")
BUILT_IN, OPEN = "mlp", "auto"
MODELS = {BUILT_IN: mlp}
# Whether the labels of a loss are classes; None where they decide.
LOSSES: dict[str, bool | None] = {OPEN: None, "cross_entropy": True, "squared_error": False}
FILES = f"a file {', '.join(EXAMPLES[:-1])} or {EXAMPLES[-1]}"
PLACES = "the place of your own: my_file.py:name or package.module:name"
_FACTORY = "be 'mlp', or the place of a factory, as my_file.py:name or package.module:name"
_LOSS = (
    f"be {', '.join(map(repr, LOSSES))}, or the place of a function (outputs, labels) -> (m,), as "
    "my_file.py:name"
)


def is_place(value: Any) -> bool:
    """Whether a setting is the place of an object of the user's."""
    return isinstance(value, str) and ":" in value


def potential_of(config: Any, data: Dataset, dtype: Any = None) -> tuple[FlaxLoss, Examples]:
    """The training loss of a configuration, and the test data as its model takes them.

    **Raises:** `InputError` for data, a model and a loss that do not fit together, with the user's
    line where it is at fault.
    """
    loss = _loss(config.loss, data)
    classes = data.classes
    numbers = math.prod(data.train.labels.shape[1:])
    outputs = numbers if classes is None or loss == "squared_error" else classes
    if config.model == BUILT_IN:
        data = Dataset(*(_as_numbers(part, _vocabulary(data)) for part in data))
        model = mlp(data.train.inputs.shape[1], *config.hidden, outputs)
    else:
        model = _own(config, data, outputs)
    potential = FlaxLoss(
        model,
        data.train,
        loss=loss,
        batch_size=config.batch_size or None,
        l2=config.l2,
        dtype=dtype,
    )
    return potential, data.test


def own_files(settings: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The user's files that the values of the settings `data`, `model` and `loss` name, and a
    digest of what each holds now.

    **Raises:** `InputError` for one that cannot be read.
    """
    files = {
        file: argument
        for argument, values in settings.items()
        for value in values
        if (file := _file_of(argument, value)) is not None
    }
    return {file: digest(argument, file) for file, argument in files.items()}


def _file_of(argument: str, value: str) -> str | None:
    if argument == "data":
        return value if holds_examples(value) else None
    where, _, name = value.rpartition(":")
    return where if name and where.endswith(".py") else None


def _loss(name: str, data: Dataset) -> Any:
    if is_place(name):
        loss = load("loss", name, _LOSS)
        if not callable(loss):
            raise refuse("loss", _LOSS, f"{name} is {in_words(loss)}")
        return loss
    if name == OPEN:
        return "squared_error" if data.classes is None else "cross_entropy"
    if name == "cross_entropy" and data.classes is None:
        raise refuse("loss", "be 'squared_error' for numbers to predict", f"is {name!r}")
    return name


def _own(config: Any, data: Dataset, outputs: int) -> Any:
    factory = load("model", config.model, _FACTORY)
    if config.hidden != type(config).hidden and not takes(factory, "hidden"):
        must = f"be left out beside {config.model}, which has no parameter of that name"
        raise refuse("hidden", must, f"is {' '.join(map(str, config.hidden))}")
    shape = data.train.inputs.shape[1:]
    inputs = shape[0] if len(shape) == 1 else shape
    sizes = Sizes(inputs, outputs, _vocabulary(data), config.hidden)
    return own_model(factory, sizes, config.model)


def _vocabulary(data: Dataset) -> int | None:
    """The number of tokens; None where the inputs are no token ids."""
    if data.train.inputs.dtype != jnp.int32:
        return None
    least = min(int(part.inputs.min()) for part in data)
    if least < 0:
        raise refuse(
            "data",
            "have token ids of at least 0 where inputs are integers (save numbers as float32)",
            f"has {least}",
        )
    return max(int(part.inputs.max()) for part in data) + 1


def _as_numbers(part: Examples, vocabulary: int | None) -> Examples:
    """The examples as rows of floating numbers, for a network without an embedding: one-hot tokens,
    8-bit pixels in [0, 1]."""
    inputs, m = part.inputs, len(part.inputs)
    if vocabulary is not None:
        words = f"{m:,} examples of {inputs[0].size:,} tokens among {vocabulary:,}, one-hot"
        advice = "give --model with an embedding"
        check_fits("data", 4.0 * inputs.size * vocabulary, words, advice)
        return part._replace(inputs=jax.nn.one_hot(inputs, vocabulary).reshape(m, -1))
    return part._replace(inputs=_floating(inputs).reshape(m, -1))


def _floating(inputs: Array) -> Array:
    floating = inputs.astype(jnp.result_type(float, inputs.dtype))
    return floating / 255 if inputs.dtype == jnp.uint8 else floating
