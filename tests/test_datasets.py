"""Data sets: shapes, ranges, splits that are disjoint and complete, and seeds that fix them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

import esljax as esl

# Each with numbers unlike its defaults: (make, examples, features, classes).
DATASETS = {
    "digits": (esl.datasets.digits, 1797, 64, 10),
    "moons": (
        lambda **options: esl.datasets.two_moons(samples=203, noise=0.2, **options),
        203,
        2,
        2,
    ),
    "teacher": (
        lambda **options: esl.datasets.teacher(
            samples=301, features=7, classes=4, hidden=5, **options
        ),
        301,
        7,
        4,
    ),
    "wine": (esl.datasets.wine, 178, 13, 3),
    "breast_cancer": (esl.datasets.breast_cancer, 569, 30, 2),
}
every = pytest.mark.parametrize("name", DATASETS)


def rows(split):
    """The examples of a split as rows of features and label, in an order of their own."""
    table = np.column_stack([np.asarray(split.inputs, np.float64), np.asarray(split.labels)])
    return table[np.lexsort(table.T)]


@every
def test_shapes_types_and_classes(name):
    make, samples, features, classes = DATASETS[name]
    data = make(test_fraction=0.3)
    tests = round(0.3 * samples)
    assert (data.train.inputs.shape, data.test.inputs.shape) == (
        (samples - tests, features),
        (tests, features),
    )
    for split in data:
        assert split.labels.shape == split.inputs.shape[:1]
        assert split.inputs.dtype == np.float32
        assert jnp.issubdtype(split.labels.dtype, jnp.integer)
        assert set(np.unique(split.labels)) == set(range(classes))
        assert bool(jnp.all(jnp.isfinite(split.inputs)))
    assert len(make().test.labels) == round(0.2 * samples)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(data))


@every
def test_the_seed_fixes_everything(name):
    make = DATASETS[name][0]
    for one, other in zip(
        jax.tree.leaves(make(seed=3)), jax.tree.leaves(make(seed=3)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(make(seed=3).train.inputs, make(seed=4).train.inputs)


@every
def test_double_precision_where_it_is_asked_for(name, x64):
    assert DATASETS[name][0]().train.inputs.dtype == np.float64


def test_digits_are_all_there_once_and_shuffled():
    bunch = sklearn.datasets.load_digits()
    data = esl.datasets.digits(seed=5)
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), data.train, data.test)
    np.testing.assert_allclose(
        rows(together), rows(esl.datasets.Examples(bunch.data / 16, bunch.target)), rtol=1e-7
    )
    assert (float(together.inputs.min()), float(together.inputs.max())) == (0.0, 1.0)
    # The file runs 0, 1, ..., 9 again and again; a split without a shuffle would show it.
    assert not np.array_equal(data.test.labels[:10], bunch.target[:10])
    # Every class is held out in proportion: 5 standard errors of a hypergeometric count of about
    # 36.
    counts = np.bincount(data.test.labels, minlength=10)
    assert np.abs(counts - 0.2 * np.bincount(bunch.target)).max() < 5 * np.sqrt(180 * 0.2 * 0.8)


@pytest.mark.parametrize("name", ["moons", "teacher"])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_splits_are_disjoint_and_complete(name, fraction):
    """The same seed gives the same examples however they are split, and generated examples are all
    different."""
    data, other = (DATASETS[name][0](seed=6, test_fraction=x) for x in (fraction, 0.25))
    together, again = (
        jax.tree.map(lambda *parts: jnp.concatenate(parts), x.train, x.test) for x in (data, other)
    )
    np.testing.assert_array_equal(rows(together), rows(again))
    assert len({tuple(row) for row in rows(together)}) == DATASETS[name][1]


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "diabetes"])
def test_real_columns_are_all_there_once_and_standardized(name):
    """Up to one affine map for each column, known from the training split, as sklearn has them."""
    loader = getattr(sklearn.datasets, f"load_{name}")
    options = {"scaled": False} if name == "diabetes" else {}
    raw, labels = loader(return_X_y=True, **options)
    data = getattr(esl.datasets, name)(seed=2, test_fraction=0.3)
    columns = np.asarray(data.train.inputs, np.float64)
    np.testing.assert_allclose(columns.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(columns.std(axis=0), 1, rtol=1e-5)
    together = jax.tree.map(lambda *parts: np.concatenate(parts), data.train, data.test)
    raw = np.column_stack([raw, labels]) if name == "diabetes" else raw
    if name == "diabetes":
        assert data.classes is None
        predicted = np.asarray(data.train.labels, np.float64)
        np.testing.assert_allclose([predicted.mean(), predicted.var()], [0, 1], atol=1e-5)
        shown = np.column_stack(together)
    else:
        shown = together.inputs
    shown = np.asarray(shown, np.float64)
    # Each row of ours has one row of theirs with the same ranks and the same label.
    scaled = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    again = (shown - shown.mean(axis=0)) / shown.std(axis=0)
    nearest = ((again[:, None] - scaled) ** 2).sum(-1).argmin(axis=1)
    assert sorted(nearest) == list(range(len(raw)))
    np.testing.assert_allclose(again, scaled[nearest], atol=1e-4)
    if name != "diabetes":
        np.testing.assert_array_equal(together.labels, labels[nearest])


def test_modular_addition_has_every_pair_once():
    data = esl.datasets.modular_addition(modulus=7, test_fraction=0.4, seed=3)
    assert (len(data.train.labels), len(data.test.labels)) == (29, 20)
    pairs = np.concatenate([part.inputs for part in data])
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(7) for b in range(7)]
    labels = np.concatenate([part.labels for part in data])
    assert all((a + b - c) % 7 == 0 for (a, b), c in zip(pairs, labels, strict=True))
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(data))
    other = esl.datasets.modular_addition(modulus=7, test_fraction=0.4, seed=4)
    assert not np.array_equal(data.test.inputs, other.test.inputs)


def test_moons_are_two_half_circles():
    inputs, labels = esl.datasets.two_moons(samples=400, noise=0.0, test_fraction=0.1).train
    centers = np.array([[0.0, 0.0], [1.0, 0.5]])[labels]
    np.testing.assert_allclose(np.linalg.norm(inputs - centers, axis=1), 1, rtol=1e-5)
    assert bool(
        np.all(
            (np.asarray(inputs - centers)[:, 1] >= -1e-6)
            == (np.asarray(labels) == 0) | (np.abs(inputs - centers)[:, 1] < 1e-6)
        )
    )
    noisy = esl.datasets.two_moons(samples=4000, noise=0.2, seed=1, test_fraction=0.1).train
    radial = np.linalg.norm(noisy.inputs - np.array([[0.0, 0.0], [1.0, 0.5]])[noisy.labels], axis=1)
    # To first order in the noise the radius scatters by its standard deviation, to second its mean
    # moves by noise²/2.
    assert abs(radial.std() / 0.2 - 1) < 5 / np.sqrt(2 * 3600) + 0.02
    assert abs(radial.mean() - 1 - 0.02) < 5 * 0.2 / np.sqrt(3600)


def test_the_teacher_can_be_learned_and_its_inputs_are_standard_normal():
    inputs, labels = esl.datasets.teacher(samples=4000, features=6, classes=3).train
    assert abs(float(inputs.mean())) < 5 / np.sqrt(inputs.size)
    assert abs(float(inputs.var()) - 1) < 5 * np.sqrt(2 / inputs.size)
    # Labels depend on the inputs: the nearest neighbor knows them far above chance, 1/3 or the
    # largest class.
    first, second = np.asarray(inputs[:1500]), np.asarray(inputs[1500:3000])
    nearest = np.argmin(((second[:, None] - first) ** 2).sum(-1), axis=1)
    right = np.mean(np.asarray(labels[:1500])[nearest] == np.asarray(labels[1500:3000]))
    chance = np.bincount(labels).max() / len(labels)
    assert right > chance + 10 * np.sqrt(0.25 / 1500)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: esl.datasets.digits(test_fraction=0.0),
            r"`test_fraction` must leave both splits of 1797 examples non-empty, but is 0\.0\.",
        ),
        (
            lambda: esl.datasets.digits(test_fraction=1.0),
            r"`test_fraction` must leave both splits of 1797 examples non-empty, but is 1\.0\.",
        ),
        (
            lambda: esl.datasets.digits(test_fraction=np.nan),
            r"`test_fraction` must .*, but is nan\.",
        ),
        (
            lambda: esl.datasets.digits(seed=-1),
            r"`seed` must be an integer of at least 0, but is -1\.",
        ),
        (
            lambda: esl.datasets.two_moons(samples=1),
            r"`samples` must be an integer of at least 2, but is 1\.",
        ),
        (
            lambda: esl.datasets.two_moons(noise=-0.1),
            r"`noise` must be at least 0 and not NaN, but has the value -0\.1\.",
        ),
        (
            lambda: esl.datasets.two_moons(seed=0.5),
            r"`seed` must be an integer of at least 0, but is 0\.5\.",
        ),
        (
            lambda: esl.datasets.teacher(classes=1),
            r"`classes` must be an integer of at least 2, but is 1\.",
        ),
        (
            lambda: esl.datasets.teacher(features=0),
            r"`features` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.datasets.teacher(hidden=0),
            r"`hidden` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.datasets.modular_addition(modulus=1),
            r"`modulus` must be an integer of at least 2, but is 1\.",
        ),
        (
            lambda: esl.datasets.modular_addition(modulus=10**7),
            r"`modulus` must fit in the .* \(take a smaller modulus\)",
        ),
        (
            lambda: esl.datasets.wine(test_fraction=1.5),
            r"`test_fraction` must leave both splits of 178 examples non-empty, but is 1\.5\.",
        ),
        (
            lambda: esl.datasets.teacher(seed=-1),
            r"`seed` must be an integer of at least 0, but is -1\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)
