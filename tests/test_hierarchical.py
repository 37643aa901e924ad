"""Pairs of very many members: an upper value close to the exact one, by SciPy's assignments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ensembles import clouds
from oracles_transport import assignment

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")
KEY = jax.random.key(2)


@pytest.mark.parametrize(("n", "d", "off"), [(700, 2, 0.01), (1000, 40, 0.04), (257, 3, 0.02)])
def test_it_is_a_little_above_the_exact_value(n, d, off):
    x, y = clouds(n, n, d, dtype=np.float32)
    exact = assignment(x.astype(float), y.astype(float))
    found = float(esl.HierarchicalTransport(KEY, leaf=128).squared(x, y))
    assert exact * (1 - 1e-5) < found < exact * (1 + off)


@pytest.mark.parametrize("n", [1, 5, 65, 191])
def test_pairs_are_one_to_one(n):
    x, y = map(jnp.asarray, clouds(n, n, 3, dtype=np.float32))
    transport = esl.HierarchicalTransport(KEY, leaf=16, passes=2)
    solved, places = transport.paired(x, y)
    np.testing.assert_array_equal(np.sort(places), np.arange(n))
    np.testing.assert_allclose(solved.squared, np.mean(np.sum((x - y[places]) ** 2, 1)), rtol=1e-5)
    np.testing.assert_array_equal(transport.map(x, y), y[places])


def test_up_to_one_leaf_and_on_a_line_it_is_exact():
    x, y = clouds(60, 60, 5, dtype=np.float32)
    exact = esl.ExactTransport().squared(x, y)
    np.testing.assert_allclose(esl.HierarchicalTransport(KEY).squared(x, y), exact, rtol=1e-6)
    few = esl.HierarchicalTransport(KEY, leaf=4, passes=1)
    line = esl.ExactTransport().squared(x[:, :1], y[:, :1])
    np.testing.assert_allclose(few.squared(x[:, :1], y[:, :1]), line, rtol=1e-6)


def test_every_pass_lowers_the_value():
    x, y = clouds(512, 512, 6, dtype=np.float32)
    values = [
        float(esl.HierarchicalTransport(KEY, leaf=32, passes=passes).squared(x, y))
        for passes in (1, 3, 9)
    ]
    exact = float(esl.ExactTransport().squared(x, y))
    assert values[0] > values[1] > values[2] > exact


def test_members_that_are_their_own_partners_stay_so():
    """Snapshots of one run: no halving of clouds finds these pairs, and none may lose them."""
    x, _ = clouds(400, 1, 8, dtype=np.float32)
    step = 0.01 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    found = esl.HierarchicalTransport(KEY, leaf=32, passes=1).squared(x, x + step)
    np.testing.assert_allclose(found, np.mean(np.sum(step**2, 1)), rtol=1e-4)


@pytest.mark.parametrize("size", [2.0**-70, 2.0**-45, 2.0**40, 2.0**55])
def test_pairs_do_not_depend_on_the_unit(size):
    """In float32 the cubes that make directions are no numbers at 1e13 and 1e-13, and squares
    are 0 at 1e-21."""
    x, y = map(jnp.asarray, clouds(101, 101, 3, dtype=np.float32))
    transport = esl.HierarchicalTransport(KEY, leaf=16, passes=2)
    solved, places = transport.paired(size * x, size * y)
    one, expected = transport.paired(x, y)
    np.testing.assert_array_equal(places, expected)
    assert solved.converged
    if size > 1e-15:  # else the value itself is too small a number
        np.testing.assert_allclose(solved.squared / size / size, one.squared, rtol=1e-6)


def test_squares_beyond_the_numbers_are_not_solved_in_silence():
    x, y = map(jnp.asarray, clouds(64, 64, 3, dtype=np.float32))
    solved = esl.HierarchicalTransport(KEY, leaf=16, passes=2).solve(1e20 * x, 1e20 * y)
    assert not solved.converged
    assert np.isnan(solved.squared)


def test_its_gradient_is_that_of_its_pairs():
    x, y = map(jnp.asarray, clouds(100, 100, 3, dtype=np.float32))
    transport = esl.HierarchicalTransport(KEY, leaf=16)
    partners = transport.map(x, y)
    gradient = jax.jit(jax.grad(transport.squared))(x, y)
    np.testing.assert_allclose(gradient, 2 * (x - partners) / 100, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: esl.HierarchicalTransport(0), "`key` must be made by"),
        (
            lambda: esl.HierarchicalTransport(KEY, leaf=0),
            r"`leaf` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.HierarchicalTransport(KEY, passes=0),
            r"`passes` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.HierarchicalTransport(KEY).squared(np.ones((3, 2)), np.ones((4, 2))),
            r"`y` must hold 3 members, as `x` does, but holds 4\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)
