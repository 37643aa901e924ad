"""Labeled examples in a training and a test split, and what is done to them before they are used.

Labels that are integers are classes, floating ones are numbers to predict.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from esljax._checks import refuse
from esljax._types import Array, Shaped


class Examples(NamedTuple):
    """m examples: `inputs` (m, ...) and `labels` (m, ...)."""

    inputs: Shaped[Array, "m ..."]
    """One row for each example, (m, p), or an image and the like; token ids are integers."""
    labels: Shaped[Array, "m ..."]
    """Class indices from 0, (m,); or floating numbers to predict, (m,) or (m, k)."""


class Dataset(NamedTuple):
    """A training and a test split."""

    train: Examples
    """The examples that the loss averages over."""
    test: Examples
    """The examples held out."""

    @property
    def classes(self) -> int | None:
        """The number of classes; None where the labels are numbers to predict."""
        if not jnp.issubdtype(self.train.labels.dtype, jnp.integer):
            return None
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1


class Scaling(NamedTuple):
    """The columns that get mean 0 and variance 1 in the training split, and the same map in the
    test split. A column that is the same in all training examples becomes 0."""

    inputs: bool = False
    labels: bool = False
    """Of numbers to predict; labels of classes stay what they are."""


AS_THEY_ARE = Scaling()


def split(
    inputs: Any,
    labels: Any,
    test_fraction: float,
    generator: np.random.Generator,
    scaling: Scaling = AS_THEY_ARE,
) -> Dataset:
    """The examples in two splits at random.

    **Raises:** `InputError` for a fraction that leaves a split empty.
    """
    tests = round(test_fraction * len(inputs)) if 0 < test_fraction < 1 else 0
    if not 0 < tests < len(inputs):
        raise refuse(
            "test_fraction",
            f"leave both splits of {len(inputs)} examples non-empty",
            f"is {test_fraction!r}",
        )
    order = generator.permutation(len(inputs))
    test, train = order[:tests], order[tests:]
    return dataset(inputs[train], labels[train], inputs[test], labels[test], scaling)


def dataset(
    inputs: Any, labels: Any, test_inputs: Any, test_labels: Any, scaling: Scaling = AS_THEY_ARE
) -> Dataset:
    """Two splits as arrays of jax: floating numbers in its present type, whole ones as int32, and
    8-bit integers and booleans as they are."""
    if scaling.inputs:
        inputs, test_inputs = _scaled(inputs, test_inputs)
    if scaling.labels and np.issubdtype(labels.dtype, np.floating):
        labels, test_labels = _scaled(labels, test_labels)
    return Dataset(
        train=Examples(_array(inputs), _array(labels)),
        test=Examples(_array(test_inputs), _array(test_labels)),
    )


def _scaled(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, spread = train.mean(axis=0), train.std(axis=0)
    # The standard deviation of equal numbers is the rounding of their mean, not 0.
    spread = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)
    return (train - mean) / spread, (test - mean) / spread


def _array(values: np.ndarray) -> Array:
    kind = values.dtype.kind
    if kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            return jnp.asarray(values, jnp.result_type(float))
    return jnp.asarray(values, jnp.int32 if kind in "iu" and values.itemsize > 1 else None)
