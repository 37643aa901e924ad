"""Fitted densities against SciPy's laws and each other's identities."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from ensembles import skewed

import esljax as esl

# Every class. Functions, so that no array is made before a test chooses its precision.
DENSITIES = {
    "gaussian": lambda: esl.density.GaussianDensity(),
    "kernels": lambda: esl.density.KDEDensity(),
    "kernels for a score": lambda: esl.density.KDEDensity(for_score=True),
    "histogram": lambda: esl.density.HistogramDensity(),
    "flow": lambda: esl.density.FlowDensity(jax.random.key(0), layers=1, width=2, steps=2),
}
# The flow compiles for tens of seconds.
every = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "flow" else ()) for name in DENSITIES],
)
SMOOTH = [name for name in DENSITIES if name != "histogram"]


@eqx.filter_jit
def evaluated(law, x):
    return jax.vmap(law.log_density)(x), jax.vmap(law.score)(x)


# Contracts


@every
@pytest.mark.usefixtures("quick_compilation")
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    density = DENSITIES[name]()
    x = jnp.stack([skewed(40, seed=seed) for seed in range(2)])
    alone = [evaluated(density.fit(rows), rows) for rows in x]
    chex.assert_trees_all_close(
        evaluated(density.estimate(x[0], density.init(x[0]))[0], x[0]),
        alone[0],
        rtol=1e-3,
        atol=1e-3,
    )
    together = eqx.filter_vmap(
        lambda rows: evaluated(density.estimate(rows, density.init(rows))[0], rows)
    )(x)
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=1e-3, atol=1e-3
    )


@every
@pytest.mark.usefixtures("quick_compilation")
def test_one_trace_serves_two_calls_and_the_precision_is_the_input_s(name):
    density = DENSITIES[name]()
    chex.clear_trace_counter()
    traced = eqx.filter_jit(
        chex.assert_max_traces(lambda density, x: density.estimate(x, density.init(x)), n=1)
    )
    for seed in range(2):
        law, state = traced(density, skewed(40, seed=seed))
        assert law.log_density(jnp.zeros(2)).dtype == law.score(jnp.zeros(2)).dtype == jnp.float32
        assert {
            leaf.dtype for leaf in jax.tree.leaves((eqx.filter(law, eqx.is_inexact_array), state))
        } == {np.dtype(np.float32)}


@every
@pytest.mark.usefixtures("quick_compilation")
def test_a_fit_starts_from_the_state_of_the_one_before_inside_a_scan(name):
    density = DENSITIES[name]()
    x = jnp.stack([skewed(40, seed=seed) for seed in range(2)])

    def step(state, rows):
        law, state = density.estimate(rows, state)
        return state, law.log_density(rows[0])

    scanned = jax.lax.scan(step, density.init(x[0]), x)[1]
    state, alone = density.init(x[0]), []
    for rows in x:
        law, state = density.estimate(rows, state)
        alone.append(law.log_density(rows[0]))
    np.testing.assert_allclose(scanned, alone, rtol=1e-3)
    if name == "flow":
        fresh = density.estimate(x[1], density.init(x[1]))[0].log_density(x[1, 0])
        assert abs(scanned[1] - fresh) > 1e-4


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "flow" else ()) for name in SMOOTH],
)
def test_the_score_is_the_slope_of_the_logarithm(name, x64):
    # Enough members for the correlation of the axes to survive shrinkage.
    x = skewed(400, dtype=np.float64)
    law = DENSITIES[name]().fit(x)
    for at in (x[0], x.mean(axis=0), x.max(axis=0) + 1.0):
        slope = [
            (law.log_density(at + step) - law.log_density(at - step)) / 2e-5
            for step in 1e-5 * jnp.eye(2)
        ]
        np.testing.assert_allclose(law.score(at), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [*SMOOTH[:3], "histogram"])
def test_the_density_adds_up_to_one(name, x64):
    """On a grid of 400² that reaches six widths out."""
    x = skewed(200, dtype=np.float64)
    law = DENSITIES[name]().fit(x)
    center, width = x.mean(axis=0), 12 * x.std(axis=0)
    axis = (jnp.arange(400) + 0.5) / 400 - 0.5
    grid = center + width * jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    total = jnp.sum(jnp.exp(jax.lax.map(law.log_density, grid, batch_size=4000))) * jnp.prod(
        width / 400
    )
    # The middle of a cell stands for it: exact for smooth laws, off by the cut edges of the box for
    # the histogram.
    np.testing.assert_allclose(total, 1.0, rtol=0.02 if name == "histogram" else 1e-3)


# Numbers


def test_the_gaussian_is_scipy_s(x64):
    x = np.random.default_rng(0).gamma(4.0, size=(50, 1))
    law = esl.density.GaussianDensity().fit(jnp.asarray(x))
    truth = scipy.stats.norm(x.mean(), x.std())
    np.testing.assert_allclose(law.log_density(jnp.array([3.0])), truth.logpdf(3.0), rtol=1e-12)
    np.testing.assert_allclose(
        law.score(jnp.array([3.0])), [(x.mean() - 3.0) / x.var()], rtol=1e-12
    )


def test_kernels_are_scipy_s(x64):
    x = np.asarray(skewed(2000, dtype=np.float64))
    law = esl.density.KDEDensity().fit(jnp.asarray(x))
    # SciPy divides the covariance by n - 1; shrinkage moves correlations by about 1/n.
    truth = scipy.stats.gaussian_kde(x.T, bw_method=float(law.bandwidth) * np.sqrt(1999 / 2000))
    at = x[:20] + 0.3
    np.testing.assert_allclose(
        jax.vmap(law.log_density)(jnp.asarray(at)), truth.logpdf(at.T), rtol=2e-3
    )


@pytest.mark.parametrize("modes", [1, 2])
def test_the_bandwidth_follows_the_modes(modes):
    """Near Silverman's rule for one Gaussian mode, and near that of one mode when there are two.

    The two are eight of their widths apart.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 1)) + (
        rng.choice([-4.0, 4.0], size=(2000, 1)) if modes == 2 else 0.0
    )
    law = esl.density.KDEDensity().fit(x.astype(np.float32))
    silverman = (4 / (3 * 2000 / modes)) ** 0.2
    assert 0.6 < float(law.bandwidth) * float(x.std()) / silverman < 1.6
    wide = esl.density.KDEDensity(for_score=True).fit(x.astype(np.float32))
    np.testing.assert_allclose(
        wide.bandwidth / law.bandwidth,
        (4 / 5 / 2000) ** (1 / 7) / (4 / 3 / 2000) ** (1 / 5),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["kernels for a score", "histogram"])
def test_the_score_of_a_skewed_law(name):
    """(k - 1)/θ - 1 for the gamma law, on its bulk: the Gaussian's is off by 1.3 at θ = 1."""
    x = np.random.default_rng(0).gamma(4.0, size=(4000, 1)).astype(np.float32)
    law = DENSITIES[name]().fit(x)
    at = np.linspace(1.5, 7.5, 13)[:, None]
    error = np.asarray(jax.vmap(law.score)(jnp.asarray(at, jnp.float32))) - (3 / at - 1)
    assert np.sqrt(np.mean(error**2)) < 0.15


def test_a_histogram_counts(x64):
    """By hand: ⌈2 · 8^{1/3}⌉ = 4 bins of width 2 hold 5, 2, 0 and 1 members."""
    x = jnp.asarray([[0.0], [0.5], [1.0], [1.5], [1.9], [2.0], [3.0], [8.0]])
    law = esl.density.HistogramDensity().fit(x)
    np.testing.assert_array_equal(law.counts, [5, 2, 0, 1])
    for at, count in ((1.99, 5), (2.0, 2), (5.0, 0), (8.0, 1)):
        np.testing.assert_allclose(law.log_density(jnp.array([at])), np.log((count + 0.5) / 10 / 2))
    assert law.log_density(jnp.array([8.1])) == law.log_density(jnp.array([-0.1])) == -np.inf
    assert np.isfinite(law.score(jnp.array([9.0])))


def test_the_score_of_a_histogram_is_that_of_a_parabola(x64):
    """A spline through counts whose logarithm is a parabola along each axis gives its slope.

    It is continuous at the edges of bins.
    """
    axis = np.arange(8) + 0.5
    logs = -((axis[:, None] - 3.0) ** 2) / 4 - (axis - 5.0) ** 2 / 6
    law = esl.density.HistogramDensity().fit(skewed(40, dtype=np.float64))
    table = (jnp.exp(jnp.asarray(logs)) - 0.5, jnp.array([1.0, 2.0]), jnp.array([0.5, 2.0]))
    law = eqx.tree_at(lambda law: (law.counts, law.lower, law.width), law, table)
    for u, v in ((2.2, 3.7), (4.0, 3.0), (4.0 - 1e-9, 6.999), (5.5, 2.5)):
        score = law.score(jnp.array([1.0 + 0.5 * u, 2.0 + 2.0 * v]))
        np.testing.assert_allclose(
            score, [-(u - 3.0) / 2 / 0.5, -(v - 5.0) / 3 / 2.0], rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("name", ["kernels for a score", "histogram"])
def test_local_means(name):
    """Of a noisy sine, and of a constant, which bins draw to 0 by half a member."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1)).astype(np.float32)
    values = np.column_stack(
        [np.sin(2 * x[:, 0]) + 0.3 * rng.normal(size=len(x)), np.full(len(x), 3.0)]
    ).astype(np.float32)
    smooth = DENSITIES[name]().fit(x).smooth(jnp.asarray(x), jnp.asarray(values))
    means = jax.vmap(smooth)(jnp.linspace(-1, 1, 21)[:, None])
    np.testing.assert_allclose(means[:, 0], np.sin(2 * np.linspace(-1, 1, 21)), atol=0.15)
    np.testing.assert_allclose(means[:, 1], 3.0, rtol=0.01 if name == "histogram" else 1e-5)


def test_a_short_flow_gains_on_its_start():
    """In one dimension, a skewed law: a few steps raise the likelihood of fresh members."""
    x, fresh = (
        np.random.default_rng(seed).gamma(1.0, size=(400, 1)).astype(np.float32)
        for seed in range(2)
    )
    density = esl.density.FlowDensity(jax.random.key(0), layers=1, width=4, steps=200)
    law = density.fit(x)
    gained = np.mean(jax.vmap(law.log_density)(fresh)) - np.mean(
        jax.vmap(esl.density.GaussianDensity().fit(x).log_density)(fresh)
    )
    # The exponential law has entropy 1, its Gaussian 1.419.
    assert gained > 0.2


# Numbers of the training loop


def descent(count):
    """Gradient descent by hand on (p - 1)² from 0: each step halves the distance."""
    return 1 - 0.5**count


@pytest.mark.parametrize(("peak", "best"), [(4, 4), (5, 6), (0, 0), (6, 6), (9, 6)])
def test_training_keeps_the_best_of_the_start_and_the_end_of_each_round(peak, best):
    """Three rounds of two updates, judged by the distance from the parameters of one count."""

    def value(p):
        return -jnp.abs(p["p"] - descent(peak))

    kept, most = esl.density.train(
        {"p": jnp.zeros(())},
        lambda p, i: jax.tree.map(lambda p: 2 * (p - 1), p),
        value,
        optax.sgd(0.25),
        rounds=3,
        updates=2,
    )
    np.testing.assert_allclose(kept["p"], descent(best), rtol=1e-6)
    np.testing.assert_allclose(most, -abs(descent(best) - descent(peak)), atol=1e-6)


def test_training_counts_its_updates_and_keeps_the_start_of_what_it_cannot_judge():
    def train(value, rounds):
        return esl.density.train(
            jnp.zeros(()), lambda p, i: -i.astype(p.dtype), value, optax.sgd(1.0), rounds=rounds
        )

    np.testing.assert_allclose(train(lambda p: p, 4), (6.0, 6.0))  # 0 + 1 + 2 + 3
    np.testing.assert_allclose(train(lambda p: p, 0), (0.0, 0.0))
    assert train(lambda p: p / p, 4)[0] == 0  # NaN at the start


def test_training_differentiates_in_both_modes():
    def trained(aim):
        return esl.density.train(
            jnp.zeros(()),
            lambda p, i: p - aim,
            lambda p: -((p - aim) ** 2),
            optax.sgd(0.5),
            rounds=3,
        )[0]

    # p = (1 - 2⁻³) aim.
    np.testing.assert_allclose(jax.grad(trained)(1.0), 0.875, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(trained, (1.0,), (1.0,))[1], 0.875, rtol=1e-6)


@pytest.mark.slow
def test_a_flow_of_one_step_is_its_start():
    x = skewed(40)
    density = esl.density.FlowDensity(jax.random.key(0), layers=1, width=2, steps=1)
    chex.assert_trees_all_equal(density.estimate(x, density.init(x))[1], density.init(x))


@pytest.mark.slow
def test_a_flow_keeps_the_parameters_likeliest_for_members_left_over():
    """Eighty members in five dimensions and far too many parameters.

    Fitted to the end, the flow loses to the Gaussian by nats.
    """
    x, fresh = (
        np.random.default_rng(seed).normal(size=(80, 5)).astype(np.float32) for seed in range(2)
    )
    law = esl.density.FlowDensity(jax.random.key(0), steps=300).fit(x)
    assert np.mean(jax.vmap(law.log_density)(fresh)) > -5 * 1.4189 - 1.0


# Input


def test_bad_input_is_rejected(refused):
    refused(
        lambda: esl.density.KDEDensity().fit(jnp.ones((4, 4, 4))),
        r"`positions` must have shape \(n, d\)",
    )
    refused(
        lambda: esl.density.KDEDensity().fit(jnp.ones((3, 1))),
        "`positions` must hold at least 4 members",
    )
    refused(
        lambda: esl.density.KDEDensity().fit(jnp.full((4, 1), jnp.nan)),
        "`positions` must be finite",
    )
    refused(
        lambda: esl.density.HistogramDensity().fit(skewed(40, d=4)),
        "`positions` must have at most 3 coordinates per member .* \\(40, 4\\)",
    )
    for name in ("gaussian", "kernels"):
        refused(
            lambda name=name: DENSITIES[name]().fit(jnp.ones((8, 2))),
            "`positions` must be spread out",
        )
    refused(lambda: esl.density.FlowDensity(0), "`key` must be made by `jax.random.key`")
    refused(
        lambda: esl.density.FlowDensity(jax.random.key(0), layers=0), "`layers` must be an integer"
    )
    refused(
        lambda: esl.density.FlowDensity(jax.random.key(0), width=0), "`width` must be an integer"
    )
    refused(
        lambda: esl.density.FlowDensity(jax.random.key(0), steps=0), "`steps` must be an integer"
    )
    refused(
        lambda: esl.density.FlowDensity(jax.random.key(0), learning_rate=0.0),
        "`learning_rate` must be greater than 0",
    )
