"""Data sets that need no download: real ones from scikit-learn's wheel, generated ones for
controlled studies, and files of your own.

Each is a `Dataset` of a training and a test split; a split is `(inputs (m, ...), labels (m, ...))`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from esljax._checks import check_fits, check_nonnegative, check_positive_int, door, in_words, refuse
from esljax.files import is_table, read_examples
from esljax.potentials.splits import Dataset, Examples, Scaling, dataset, split

__all__ = [
    "Dataset",
    "Examples",
    "breast_cancer",
    "diabetes",
    "digits",
    "modular_addition",
    "read",
    "teacher",
    "two_moons",
    "wine",
]


# --- Real data ------------------------------------------------------------------------------------


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
    return split(pixels / 16, labels, test_fraction, np.random.default_rng(seed))


@door
def wine(test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """178 Italian wines: 13 measured properties and a label 0-2 for the cultivar.

    Each property has mean 0 and variance 1 over the training split.

    **Args:** `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for a fraction that leaves a split empty.
    **Reference:** Aeberhard and Forina, UCI Wine (1991).

    **Example:**

        >>> import esljax as esl
        >>> esl.datasets.wine().train.inputs.shape
        (142, 13)
    """
    check_positive_int("seed", seed, 0)
    from sklearn.datasets import load_wine

    return _of_columns(load_wine(return_X_y=True), test_fraction, seed)


@door
def breast_cancer(test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """569 tumors of the breast: 30 properties of the nuclei of their cells, and a label, 0 for
    malignant and 1 for benign.

    Each property has mean 0 and variance 1 over the training split.

    **Args:** `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for a fraction that leaves a split empty.
    **Reference:** Street, Wolberg and Mangasarian, Proc. SPIE 1905, 861 (1993).

    **Example:**

        >>> import esljax as esl
        >>> esl.datasets.breast_cancer().train.inputs.shape
        (455, 30)
    """
    check_positive_int("seed", seed, 0)
    from sklearn.datasets import load_breast_cancer

    return _of_columns(load_breast_cancer(return_X_y=True), test_fraction, seed)


@door
def diabetes(test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """442 patients with diabetes: 10 properties, and a number to predict, the progression of the
    disease after a year. A regression.

    The properties and the number each have mean 0 and variance 1 over the training split, so that a
    squared error of 1 is that of a constant.

    **Args:** `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples` with floating labels (m,).
    **Raises:** `InputError` for a fraction that leaves a split empty.
    **Reference:** Efron, Hastie, Johnstone and Tibshirani, Annals of Statistics 32, 407 (2004).

    **Example:**

        >>> import esljax as esl
        >>> data = esl.datasets.diabetes()
        >>> data.train.inputs.shape, data.classes is None
        ((354, 10), True)
    """
    check_positive_int("seed", seed, 0)
    from sklearn.datasets import load_diabetes

    return _of_columns(load_diabetes(return_X_y=True, scaled=False), test_fraction, seed)


# --- Generated data -------------------------------------------------------------------------------


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
    return split(inputs, labels, test_fraction, np.random.default_rng(seed))


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
    return split(
        inputs, np.argmax(np.tanh(inputs @ first) @ second, axis=1), test_fraction, generator
    )


@door
def modular_addition(modulus: int = 23, test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """All pairs of tokens (a, b) below `modulus`, labeled (a + b) mod `modulus`.

    The smallest task on which transformers are studied. The inputs are token ids, integers (m, 2).

    **Args:** `modulus`: the number of tokens and of classes; there are modulus² examples.
    `test_fraction`, `seed`: as in `digits`.
    **Returns:** `Dataset`, whose splits are `Examples` with integer inputs.
    **Raises:** `InputError` for arguments out of range.
    **Reference:** Power, Burda, Edwards, Babuschkin and Misra, arXiv:2201.02177 (2022), where the
    modulus is 97 and half of the pairs are held out.

    **Example:**

        >>> import esljax as esl
        >>> data = esl.datasets.modular_addition(modulus=7, test_fraction=0.5)
        >>> data.train.inputs.shape, data.classes
        ((25, 2), 7)
    """
    check_positive_int("modulus", modulus, 2)
    check_positive_int("seed", seed, 0)
    words = f"{modulus:,} × {modulus:,} pairs"
    check_fits("modulus", 32.0 * modulus * modulus, words, "take a smaller modulus")
    pairs = np.indices((modulus, modulus)).reshape(2, -1).T
    generator = np.random.default_rng(seed)
    return split(pairs, pairs.sum(axis=1) % modulus, test_fraction, generator)


# --- Your own -------------------------------------------------------------------------------------

# The share held out of a file that sets no test examples apart, and the seed of the shuffle.
_HELD_OUT, _SHUFFLE = 0.2, 0


@door
def read(
    path: str | Path,
    label: str = "",
    *,
    classes: bool | None = None,
    standardize_labels: bool = True,
) -> Dataset:
    """Your own examples, from an .npz of arrays or a table .csv or .tsv, as `--data` reads them.

    An .npz holds `inputs` (m, ...) and `labels` (m, ...), used as they are, and optionally
    `test_inputs` and `test_labels`. A table has a row of names; its column `label` holds the
    labels, all others are inputs. Its columns of numbers, floating labels included, get mean 0 and
    variance 1 over the training split.

    Labels that are integers or text are classes, numbered from 0 in sorted order; floating labels
    are numbers to predict. Without test examples, a fifth of the examples, chosen by a fixed
    shuffle, is held out.

    **Args:**
    - `path`: of the file. - `label`: the column of the labels of a table.
    - `classes`: whether the labels are classes, if not by the rule above: True takes whole floating
      numbers for classes, False takes integers for numbers to predict.
    - `standardize_labels`: False leaves the numbers to predict of a table as they are.

    **Returns:** `Dataset`, whose splits are `Examples`.
    **Raises:** `InputError` for a file that is not as above, with the line or the array that is
    wrong; for fewer than 3 examples without test ones, or fewer than 2 classes.

    **Example:**

        >>> import numpy as np
        >>> import esljax as esl
        >>> random = np.random.default_rng(0)
        >>> np.savez("mine.npz", inputs=random.normal(size=(50, 3)), labels=random.normal(size=50))
        >>> data = esl.datasets.read("mine.npz")
        >>> data.train.inputs.shape, data.test.labels.shape, data.classes
        ((40, 3), (10,), None)
    """
    stored = read_examples(path, label)
    m, together = len(stored.labels), stored.labels
    if stored.test_labels is not None:
        together = np.concatenate([together, stored.test_labels])
    together = together[:, 0] if together.shape[1:] == (1,) else together
    if classes is None:
        classes = together.dtype.kind in "iubU"
        _check_many(path, together, classes)
    together = _classes(path, together) if classes else _numbers(path, together)
    scaling = Scaling(is_table(path), is_table(path) and standardize_labels)
    if stored.test_inputs is not None:
        return dataset(stored.inputs, together[:m], stored.test_inputs, together[m:], scaling)
    if len(together) < 3:
        raise refuse("data", "have 3 examples or more", f"{path} has {len(together)}")
    generator = np.random.default_rng(_SHUFFLE)
    return split(stored.inputs, together, _HELD_OUT, generator, scaling)


def _check_many(path: Any, labels: np.ndarray, classes: bool) -> None:
    """Reject labels of which nobody knows whether they are classes or numbers to predict."""
    different = len(np.unique(labels)) if classes else 0
    if labels.dtype.kind in "iu" and different > max(10, len(labels) / 2):
        raise refuse(
            "loss",
            "be given for integer labels that are nearly all different: 'squared_error' if they "
            "are numbers to predict, 'cross_entropy' if they are classes",
            f"is left open for the {different} different labels of {path}",
        )


def _classes(path: Any, labels: np.ndarray) -> np.ndarray:
    must = "have one class for each example as labels, integers or text, for a cross entropy"
    if labels.ndim != 1:
        raise refuse("data", must, f"{path} has labels of shape {labels.shape}")
    if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
        odd = labels[np.flatnonzero(labels != np.round(labels))[0]]
        raise refuse("data", must, f"{path} has the label {odd:g}")
    names, indices = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise refuse("data", "have labels of two classes or more", f"{path} has one, {names[0]}")
    return indices


def _numbers(path: Any, labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind == "U":
        must = "have numbers as labels for a squared error"
        raise refuse("data", must, f"{path} has text, such as {in_words(str(labels.flat[0]))}")
    return labels.astype(float)


def _of_columns(columns: Any, test_fraction: float, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    inputs, labels = columns
    return split(inputs, labels, test_fraction, generator, Scaling(inputs=True, labels=True))


def _check_room(rows: int, columns: int, argument: str = "samples") -> None:
    words = f"{rows:,} rows of {columns:,} numbers"
    check_fits(argument, 16.0 * rows * columns, words, f"take fewer {argument}")
