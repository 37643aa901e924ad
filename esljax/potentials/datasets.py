"""Data sets that need no download: real digits from scikit-learn's wheel, and generated ones for
controlled studies.

Each is a `Dataset` of a training and a test split; a split is `(inputs (m, p), labels (m,))`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esljax._checks import check_fits, check_nonnegative, check_positive_int, door, refuse
from esljax._types import Array, Float, Shaped


class Examples(NamedTuple):
    """m examples: `inputs` (m, p) and `labels` (m,)."""

    inputs: Float[Array, "m p"]
    """One row for each example."""
    labels: Shaped[Array, " m"]
    """Class indices, from 0."""


class Dataset(NamedTuple):
    """A training and a test split."""

    train: Examples
    """The examples that the loss averages over."""
    test: Examples
    """The examples held out."""


@door
def digits(test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """The 1797 handwritten digits of 8 × 8 pixels that come with scikit-learn, as 64 numbers in
    [0, 1] and a label 0-9.

    **Args:** `test_fraction`: share of the examples held out, in (0, 1). `seed`: of the shuffle
    before the split.
    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for a fraction that leaves a split empty.
    **Reference:** Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits (1998).

    **Example:**

        >>> import esljax as esl
        >>> esl.datasets.digits().train.inputs.shape
        (1438, 64)
    """
    check_positive_int("seed", seed, 0)
    # Imported on first use: it takes half as long as all the rest together.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return _split(pixels / 16, labels, test_fraction, np.random.default_rng(seed))


@door
def two_moons(
    samples: int = 1000, noise: float = 0.1, test_fraction: float = 0.2, seed: int = 0
) -> Dataset:
    """Two interleaved half circles in the plane, label 0 or 1.

    **Args:** `samples`: examples in both splits together. `noise`: standard deviation of the
    Gaussian scatter. `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for arguments out of range.

    **Example:**

        >>> import esljax as esl
        >>> esl.datasets.two_moons(samples=50).test.labels.shape
        (10,)
    """
    check_positive_int("samples", samples, 2)
    check_nonnegative("noise", noise)
    check_positive_int("seed", seed, 0)
    _check_room(samples, 2)
    from sklearn.datasets import make_moons

    inputs, labels = make_moons(samples, noise=noise, random_state=seed)
    return _split(inputs, labels, test_fraction, np.random.default_rng(seed))


@door
def teacher(
    samples: int = 2000,
    features: int = 20,
    classes: int = 3,
    hidden: int = 8,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Teacher-student: standard normal inputs, labeled by the largest output of a random tanh
    network with `hidden` units.

    **Args:** `samples`: examples in both splits together. `features`: p. `classes`: number of
    labels. `hidden`: units of the teacher. `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for arguments out of range.
    **Reference:** Gardner and Derrida, J. Phys. A 22, 1983 (1989), for the teacher-student setting.

    **Example:**

        >>> import esljax as esl
        >>> esl.datasets.teacher(samples=50, features=4).train.inputs.shape
        (40, 4)
    """
    for name, value, least in [
        ("samples", samples, 2),
        ("features", features, 1),
        ("classes", classes, 2),
        ("hidden", hidden, 1),
        ("seed", seed, 0),
    ]:
        check_positive_int(name, value, least)
    _check_room(samples, features + hidden + classes)
    _check_room(features, hidden, "features")
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples, features))
    first = generator.standard_normal((features, hidden)) / np.sqrt(features)
    second = generator.standard_normal((hidden, classes))
    return _split(
        inputs, np.argmax(np.tanh(inputs @ first) @ second, axis=1), test_fraction, generator
    )


def _check_room(rows: int, columns: int, argument: str = "samples") -> None:
    words = f"{rows:,} rows of {columns:,} numbers"
    check_fits(argument, 16.0 * rows * columns, words, f"take fewer {argument}")


def _split(inputs, labels, test_fraction: float, generator: np.random.Generator) -> Dataset:
    tests = round(test_fraction * len(inputs)) if 0 < test_fraction < 1 else 0
    if not 0 < tests < len(inputs):
        raise refuse(
            "test_fraction",
            f"leave both splits of {len(inputs)} examples non-empty",
            f"is {test_fraction!r}",
        )
    order = generator.permutation(len(inputs))
    inputs, labels = (
        jnp.asarray(inputs[order], jnp.result_type(float)),
        jnp.asarray(labels[order], jnp.int32),
    )
    return Dataset(
        train=Examples(inputs[tests:], labels[tests:]),
        test=Examples(inputs[:tests], labels[:tests]),
    )
