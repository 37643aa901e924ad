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
            lambda: esl.datasets.teacher(seed=-1),
            r"`seed` must be an integer of at least 0, but is -1\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)
