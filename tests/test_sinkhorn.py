"""The Sinkhorn divergence with a matrix and in blocks; test_transport has the contracts of all."""

import functools

import ensembles
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles_transport as oracles
import pytest
import scipy.special
from ott.geometry.geometry import Geometry
from ott.solvers.linear import solve
from ott.solvers.linear.acceleration import Momentum

import esljax as esl
import esljax.transport.sinkhorn as sinkhorn_module

clouds = functools.partial(ensembles.clouds, dtype=np.float64)
matrix_and_blocks = pytest.mark.parametrize("chunk", [None, 4])


# Values


@matrix_and_blocks
@pytest.mark.parametrize(("n", "m", "d"), [(6, 6, 2), (5, 9, 3)])
def test_it_is_the_debiased_entropic_cost(chunk, n, m, d, x64):
    x, y = clouds(n, m, d)
    solution = eqx.filter_jit(esl.SinkhornTransport(0.7, threshold=1e-10, chunk=chunk).solve)(
        jnp.asarray(x), jnp.asarray(y)
    )
    assert solution.converged
    np.testing.assert_allclose(solution.squared, oracles.sinkhorn_divergence(x, y, 0.7), rtol=1e-8)


def test_reference_o15(x64):
    transport = esl.SinkhornTransport(0.1, threshold=1e-6)
    coarse, fine = (
        transport.squared(*(oracles.quantile_midpoints(k, k + 1, n) for k in (0, 1)))
        for n in (100, 200)
    )
    # The tails that n midpoints cut off cost 1.26/n, at first order to all digits shown here, so
    # one extrapolation removes it.
    assert 5e-3 < 1.9999219 - fine < 8e-3
    np.testing.assert_allclose(2 * fine - coarse, 1.9999219, atol=2e-4)


@matrix_and_blocks
@pytest.mark.parametrize("epsilon", [0.5, 5.0])
def test_a_translation_costs_its_square_whatever_epsilon(chunk, epsilon):
    """For every law, and so for samples: the plan of x with x + a is that of x with itself."""
    x, _ = clouds(40, 1, dtype=np.float32)
    shift = np.array([0.3, -0.4, 1.2], np.float32)
    value, gradient = jax.value_and_grad(
        esl.SinkhornTransport(epsilon, threshold=1e-5, chunk=chunk).squared, 1
    )(x, x + shift)
    np.testing.assert_allclose(value, 1.69, rtol=1e-4)
    np.testing.assert_allclose(gradient, np.tile(2 * shift / 40, (40, 1)), atol=2e-5)


def test_it_tends_to_exact_and_reports_failure(x64):
    x, y = clouds(8, 8)
    np.testing.assert_allclose(
        esl.SinkhornTransport(0.005).squared(x, y), esl.ExactTransport().squared(x, y), rtol=1e-2
    )
    few = eqx.filter_jit(esl.SinkhornTransport(0.005, max_iterations=10).solve)(
        jnp.asarray(x), jnp.asarray(y)
    )
    assert np.isfinite(few.squared)
    assert not few.converged


@pytest.mark.parametrize("symmetric", [False, True], ids=["across", "within"])
def test_its_iterations_are_those_of_ott(symmetric, x64):
    """The same updates and the same measure of the error, so both stop after the same sweep."""
    x, y = clouds(30, 20)
    x = y if symmetric else x
    turns = (
        {"parallel_dual_updates": True, "momentum": Momentum(start=0, value=0.5)}
        if symmetric
        else {}
    )
    geometry = Geometry(cost_matrix=jnp.sum((x[:, None] - y) ** 2, axis=-1), epsilon=0.5)
    errors = solve(geometry, threshold=1e-9, **turns).errors
    # Just too low for the first look: an error taken to be half as large would stop there, and
    # leave g off by the error itself.
    threshold = 0.75 * float(errors[0])
    theirs = solve(geometry, threshold=threshold, **turns)
    assert errors[1] <= threshold
    for chunk in (None, 7):
        transport = esl.SinkhornTransport(
            0.5, threshold=threshold, chunk=chunk, acceleration="none"
        )
        g, reached = sinkhorn_module._potential(
            transport, jnp.asarray(x), jnp.asarray(y), symmetric
        )
        assert reached == 1
        np.testing.assert_allclose(g, theirs.g - theirs.g.mean(), rtol=1e-10, atol=1e-10)


def test_accelerated_iterations_end_at_the_same_place(x64):
    x, y = map(jnp.asarray, clouds(30, 20))

    def potential(iterations, **settings):
        transport = esl.SinkhornTransport(
            0.5, threshold=1e-6, max_iterations=iterations, **settings
        )
        found, reached = sinkhorn_module._potential(transport, x, y, False)
        return found, int(reached)

    for chunk in (None, 7):
        plain, reached = potential(1000, acceleration="none", chunk=chunk)
        assert reached
        for name in ("momentum", "anderson") if chunk is None else ("momentum",):
            # In half the sweeps.
            ways = [potential(80, acceleration=each, chunk=chunk) for each in ("none", name)]
            assert [reached for _, reached in ways] == [0, 1]
            np.testing.assert_allclose(ways[1][0], plain, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "momentum", "anderson"])
def test_converged_means_that_both_marginals_are_right(name, x64):
    """The plan of g and its partner has exact row sums; its column sums have to follow."""
    x, y = clouds(30, 20)
    epsilon, threshold = 0.05, 1e-5
    cost = np.sum((x[:, None] - y) ** 2, axis=-1)
    for chunk in (None,) if name == "anderson" else (None, 7):
        transport = esl.SinkhornTransport(
            epsilon, threshold=threshold, acceleration=name, chunk=chunk
        )
        g, reached = sinkhorn_module._potential(transport, jnp.asarray(x), jnp.asarray(y), False)
        plan = scipy.special.softmax((np.asarray(g) - cost) / epsilon, axis=1) / len(x)
        assert reached
        assert np.sum(np.abs(plan.sum(axis=0) - 1 / len(y))) <= 1.01 * threshold


@pytest.mark.parametrize("name", ["none", "momentum", "anderson"])
def test_its_iterations_do_not_depend_on_the_unit(name):
    """In float32 the squares of steps of 1e20 or 1e-30 are no numbers."""
    x, y = clouds(12, 9, dtype=np.float32)

    def solved(size):
        transport = esl.SinkhornTransport(size**2, acceleration=name)
        return eqx.filter_jit(transport.solve)(jnp.asarray(size * x), jnp.asarray(size * y))

    one = solved(1.0)
    assert one.converged
    for size in (2.0**-35, 2.0**35, 2.0**50):
        other = solved(size)
        assert other.converged
        np.testing.assert_allclose(float(other.squared) / size / size, one.squared, rtol=1e-6)


def test_acceleration_takes_single_precision_where_double_is_the_default(x64):
    x, y = clouds(12, 9)
    single = esl.SinkhornTransport(0.5, acceleration="anderson").squared(
        x.astype(np.float32), y.astype(np.float32)
    )
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, oracles.sinkhorn_divergence(x, y, 0.5), rtol=1e-4)


# Blocks


@pytest.mark.parametrize("chunk", [1, 4, 100])  # 4 divides neither size, 100 is over both
def test_blocks_give_the_numbers_of_the_matrix(chunk, x64):
    x, y = clouds(9, 14)

    def everything(chunk):
        def squared(epsilon, x, y):
            return esl.SinkhornTransport(epsilon, threshold=1e-10, chunk=chunk).squared(x, y)

        transport = esl.SinkhornTransport(0.4, threshold=1e-10, chunk=chunk)
        return jax.jit(
            lambda x, y: (jax.value_and_grad(squared, (0, 1, 2))(0.4, x, y), transport.map(x, y))
        )(x, y)

    for blocks, matrix in zip(
        *(jax.tree.leaves(everything(c)) for c in (chunk, None)), strict=True
    ):
        np.testing.assert_allclose(blocks, matrix, rtol=1e-8, atol=1e-10)


@matrix_and_blocks
def test_epsilon_has_a_gradient(chunk, x64):
    x, y = clouds(5, 7)

    def value(epsilon):
        return esl.SinkhornTransport(epsilon, threshold=1e-13, chunk=chunk).squared(x, y)

    both = jax.jit(
        lambda epsilon: (value(epsilon), jax.grad(value)(epsilon), jax.jacfwd(value)(epsilon))
    )
    _, reverse, forward = both(0.5)
    np.testing.assert_allclose(
        reverse, oracles.central_difference(lambda epsilon: both(epsilon)[0], 0.5, 1.0), rtol=1e-7
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)


def test_blocks_of_unequal_problems_under_vmap_are_a_loop(x64):
    """They end after different numbers of iterations; those that are done must stay as they are."""
    x, y = clouds(6, 7)
    scales = np.array([0.1, 1.0, 3.0])

    @jax.jit
    def run(scale):
        return jax.value_and_grad(
            lambda x: esl.SinkhornTransport(0.5, threshold=1e-2, chunk=4).squared(x, y)
        )(scale * x)

    alone = jax.tree.map(lambda *of: np.stack(of), *(run(scale) for scale in scales))
    for one, other in zip(
        jax.tree.leaves(jax.vmap(run)(scales)), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_block_is_no_larger_than_the_problem():
    x, y = clouds(9, 9, dtype=np.float32)
    whole = esl.SinkhornTransport(1.0, chunk=9).squared(x, y)
    assert esl.SinkhornTransport(1.0, chunk=10**9).squared(x, y) == whole


def test_the_threshold_may_be_a_number_of_an_array():
    plain = esl.SinkhornTransport(1.0, threshold=0.125)
    for kind in (np.float32, jnp.float32):
        transport = esl.SinkhornTransport(1.0, threshold=kind(0.125))
        assert type(transport.threshold) is float
        assert transport.threshold == plain.threshold


def test_blocks_hold_no_matrix():
    """Compiled, not run: a few blocks, which double with n and are no quarter of one matrix."""
    transport = esl.SinkhornTransport(1.0, chunk=256)

    def temporary(fn, n):
        cloud = jax.ShapeDtypeStruct((n, 10), np.float32)
        return jax.jit(fn).lower(cloud, cloud).compile().memory_analysis().temp_size_in_bytes

    for fn in (jax.value_and_grad(transport.squared, (0, 1)), lambda x, y: transport.map(x, y)):
        small, large = temporary(fn, 2000), temporary(fn, 4000)
        assert large < 4000 * 4000 * 4 / 4
        assert 1.8 < large / small < 2.2


def test_blocks_of_float32_lower_for_a_tpu_without_float64(x64):
    """Where double precision is allowed, nothing in between asks for it.

    A TPU emulates it, and compiles for minutes.
    """
    x, y = clouds(12, 9, dtype=np.float32)
    transport = esl.SinkhornTransport(jnp.float32(0.5), chunk=4)
    lowered = (
        jax.jit(jax.grad(transport.squared, (0, 1)))
        .trace(x, y)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert dots
    assert all(line.count("HIGHEST") == 2 for line in dots)
    assert "f64" not in lowered


@pytest.mark.parametrize(
    "derivative",
    [
        lambda transport, x: jax.hessian(transport.squared)(x, x),
        lambda transport, x: jax.grad(
            lambda x: jnp.sum(jax.grad(transport.squared)(x, x + 1) ** 2)
        )(x),
        lambda transport, x: jax.grad(lambda y: jnp.sum(transport.map(x, y)))(x),
        lambda transport, x: jax.jvp(lambda x: transport.map(x, x), (x,), (x,)),
    ],
    ids=["forward over reverse", "reverse over reverse", "map in reverse", "map forward"],
)
def test_blocks_refuse_derivatives_of_the_potential(derivative, refused):
    x = jnp.asarray(clouds(3, 3)[0])
    derivative(esl.SinkhornTransport(0.5), x)
    with pytest.raises(
        esl.InputError,
        match="`chunk` must be None for second derivatives and for derivatives of `map`, but is 2",
    ):
        derivative(esl.SinkhornTransport(0.5, chunk=2), x)


# Bad input and documentation


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: esl.SinkhornTransport(0.0), r"`epsilon` must be greater than 0, but is 0\."),
        (lambda: esl.SinkhornTransport(-1.0), r"`epsilon` must be greater than 0, but is -1\."),
        (
            lambda: esl.SinkhornTransport([1.0, 2.0]),
            r"`epsilon` must be one number, but has shape \(2,\)\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, threshold=0.0),
            r"`threshold` must be greater than 0, but is 0\.",
        ),
        (lambda: esl.SinkhornTransport(np.inf), r"`epsilon` must be finite, but is inf\."),
        (lambda: esl.SinkhornTransport("half"), "`epsilon` must be a number or"),
        (
            lambda: esl.SinkhornTransport(1.0, threshold=None),
            "`threshold` must be one number greater than 0, not traced by jax, but is None",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, threshold=np.array([1e-3, 1e-2])),
            "`threshold` must be one number greater than 0",
        ),
        (
            lambda: jax.jit(lambda t: esl.SinkhornTransport(1.0, threshold=t).threshold)(1e-3),
            "`threshold` must be one number greater than 0, not traced by jax",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, max_iterations=0),
            r"`max_iterations` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, acceleration="fast"),
            r"`acceleration` must be one of 'anderson', 'momentum', 'none', but is 'fast'\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, acceleration="anderson", chunk=8),
            r"`acceleration` must be 'momentum' or 'none' with a `chunk`, but is 'anderson'\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, chunk=0),
            r"`chunk` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, chunk=64.0),
            r"`chunk` must be an integer of at least 1, but is 64\.0\.",
        ),
        (
            lambda: esl.SinkhornTransport(1.0, chunk=True),
            r"`chunk` must be an integer of at least 1, but is True\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)
