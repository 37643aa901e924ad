"""Entropies against closed forms and SciPy's laws."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from ensembles import skewed

import esljax as esl

# Every class. Functions, so that no array is made before a test chooses its precision.
ESTIMATORS = {
    "gaussian": lambda: esl.density.GaussianEntropy(),
    "neighbors": lambda: esl.density.NearestNeighborEntropy(),
    "kde": lambda: esl.density.KDEEntropy(),
    "histogram": lambda: esl.density.HistogramEntropy(),
    "flow": lambda: esl.density.FlowEntropy(jax.random.key(0), steps=2),
}
# The flow compiles for tens of seconds.
every = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "flow" else ()) for name in ESTIMATORS],
)


# Contracts


@every
@pytest.mark.usefixtures("quick_compilation")
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    entropy = ESTIMATORS[name]()
    x = jnp.stack([skewed(40, seed=seed) for seed in range(2)])
    alone = [entropy(rows) for rows in x]
    chex.assert_trees_all_close(entropy.estimate(x[0]), alone[0], rtol=2e-4, atol=2e-4)
    together = eqx.filter_vmap(entropy.estimate)(x)
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=2e-4, atol=2e-4
    )


@every
@pytest.mark.usefixtures("quick_compilation")
def test_one_trace_serves_two_calls_and_the_precision_is_the_input_s(name):
    entropy = ESTIMATORS[name]()
    chex.clear_trace_counter()
    traced = eqx.filter_jit(chex.assert_max_traces(lambda entropy, x: entropy.estimate(x), n=1))
    for seed in range(2):
        answer = traced(entropy, skewed(40, seed=seed))
        assert answer.contributions.dtype == jnp.float32
        assert answer.contributions.shape == (40,)
        np.testing.assert_allclose(answer.value, np.mean(answer.contributions), rtol=1e-6)


# Numbers


@pytest.mark.parametrize("d", [1, 2, 10])
def test_a_gaussian_law_is_estimated_without_bias(d, x64):
    """Over 400 ensembles of 20: the uncorrected estimate is low by about d(d + 3)/4n."""
    rng = np.random.default_rng(d)
    mix = np.eye(d) + 0.5 * np.tri(d, k=-1)
    x = jnp.asarray(rng.normal(size=(400, 20, d)) @ mix.T + 3.0)
    values = np.asarray(
        eqx.filter_jit(eqx.filter_vmap(lambda x: esl.density.GaussianEntropy().estimate(x).value))(
            x
        )
    )
    truth = scipy.stats.multivariate_normal(np.zeros(d), mix @ mix.T).entropy()
    error = values.std(ddof=1) / 20
    assert abs(values.mean() - truth) < 5 * error


# Truths in nats. Kernels and bins are granted .03 beside four standard errors, for smearing
# (measured over 8 seeds: up to .025).
LAWS = {
    "gamma": (lambda rng, n: rng.gamma(4.0, size=(n, 1)), scipy.stats.gamma(4.0).entropy()),
    "two modes": (
        lambda rng, n: rng.choice([-2.0, 2.0], size=(n, 1)) + 0.5 * rng.normal(size=(n, 1)),
        # The modes are eight of their widths apart: which one a member is in adds log 2.
        np.log(2) + scipy.stats.norm(scale=0.5).entropy(),
    ),
    "sheared": (
        lambda rng, n: (
            np.column_stack([rng.gamma(4.0, size=n), 3 * rng.normal(size=n)])
            @ np.array([[1.0, 0.5], [0.0, 1.0]])
        ),
        scipy.stats.gamma(4.0).entropy() + scipy.stats.norm(scale=3.0).entropy(),
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["neighbors", "kde", "histogram"])
def test_a_law_that_is_not_gaussian_is_estimated(name, law):
    """Where the Gaussian estimate is high by .07 to .7."""
    sample, truth = LAWS[law]
    positions = sample(np.random.default_rng(1), 2000).astype(np.float32)
    answer = ESTIMATORS[name]()(positions)
    bias = 0.03 if name in ("kde", "histogram") else 0.0
    assert abs(float(answer.value) - truth) < 4 * float(answer.standard_error.value) + bias


def test_a_change_of_units_moves_every_estimate_by_its_logarithm():
    positions = skewed(400)
    for name in ("gaussian", "neighbors", "kde", "histogram"):
        before, after = (
            ESTIMATORS[name]()(x).value for x in (positions, positions * jnp.array([3.0, 0.1]))
        )
        np.testing.assert_allclose(after - before, np.log(0.3), atol=2e-3, err_msg=name)


def test_the_neighbors_are_those_of_a_sorted_table(x64):
    """Against every pair sorted: the terms themselves, in coordinates that are white already."""
    rng = np.random.default_rng(0)
    x = rng.gamma(4.0, size=(50, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
    third = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), axis=1)[:, 3]
    answer = esl.density.NearestNeighborEntropy(3)(jnp.asarray(x))
    terms = (
        scipy.special.digamma(50)
        - scipy.special.digamma(3)
        + np.log(4 / 3 * np.pi)
        + 3 * np.log(third)
    )
    # The covariance of the frame is shrunk towards 1, which leaves a white cloud as it is.
    np.testing.assert_allclose(answer.contributions, terms, rtol=1e-10)


def test_a_kernel_entropy_leaves_its_own_member_out(x64):
    """Were a member counted at itself, the estimate would fall without end as kernels narrow.

    Here it would be too low by more than 1.
    """
    x = np.random.default_rng(0).gamma(4.0, size=(40, 1))
    law, left_out = esl.density.KDEDensity().with_left_out(jnp.asarray(x))
    width = float(law.bandwidth * law.frame.root[0, 0])
    table = scipy.stats.norm(scale=width).pdf(x - x.T)
    truth = -np.log((table.sum(1) - np.diag(table)) / 39)
    np.testing.assert_allclose(-left_out, truth, rtol=1e-10)
    np.testing.assert_allclose(
        esl.density.KDEEntropy()(jnp.asarray(x)).contributions, truth, rtol=1e-10
    )


def test_counts_are_corrected_for_their_number():
    """Seven members in the first of four bins and one in the last: by hand."""
    x = jnp.asarray([[0.0], [0.1], [0.2], [0.3], [0.4], [0.5], [0.6], [7.0]])
    # ⌈2 · 8^{1/3}⌉ = 4 bins of width 7/4.
    plug_in = -(7 / 8 * np.log(7 / 8) + 1 / 8 * np.log(1 / 8)) + np.log(7 / 4)
    np.testing.assert_allclose(esl.density.HistogramEntropy()(x).value, plug_in + 1 / 16, rtol=1e-6)


@pytest.mark.slow
def test_a_flow_bounds_the_entropy_from_above():
    """For two modes: within .06 of the truth, where the Gaussian estimate is high by .72."""
    sample, truth = LAWS["two modes"]
    answer = esl.density.FlowEntropy(jax.random.key(0))(
        sample(np.random.default_rng(1), 2000).astype(np.float32)
    )
    error = float(answer.standard_error.value)
    assert -5 * error < float(answer.value) - truth < 0.06 + 4 * error


# Input


def test_coincident_members_are_rejected_and_never_minus_infinity(refused):
    positions = jnp.concatenate([skewed(40), jnp.ones((4, 2))])
    refused(
        lambda: esl.density.NearestNeighborEntropy()(positions),
        "`positions` must be spread out .* leaves 4 without a density",
    )
    terms = eqx.filter_jit(esl.density.NearestNeighborEntropy().estimate)(positions).contributions
    assert np.isnan(terms[-4:]).all()
    assert np.isfinite(terms[:-4]).all()
    for name in ("gaussian", "kde", "histogram"):
        refused(
            lambda name=name: ESTIMATORS[name]()(jnp.ones((8, 1))), "`positions` must be spread out"
        )


def test_bad_arguments_are_rejected(refused):
    refused(
        lambda: esl.density.NearestNeighborEntropy(0),
        "`neighbors` must be an integer of at least 1",
    )
    refused(
        lambda: esl.density.NearestNeighborEntropy(4)(jnp.ones((4, 1))),
        "`positions` must hold more members than the 4 neighbors",
    )
    refused(
        lambda: esl.density.HistogramEntropy()(skewed(40, d=4)),
        "`positions` must have at most 3 coordinates",
    )
    refused(lambda: esl.density.FlowEntropy(0), "`key` must be made by `jax.random.key`")
    refused(
        lambda: esl.density.FlowEntropy(jax.random.key(0), steps=0),
        "`steps` must be an integer of at least 1",
    )


def test_bad_ensembles_are_rejected(refused):
    refused(
        lambda: esl.density.GaussianEntropy()(jnp.ones((4, 4, 4))),
        r"`positions` must have shape \(n, d\)",
    )
    refused(
        lambda: esl.density.GaussianEntropy()(jnp.ones((3, 1))),
        "`positions` must hold at least 4 members",
    )
    refused(
        lambda: esl.density.GaussianEntropy()(jnp.ones((4, 4))),
        "`positions` must hold more than 4 members",
    )
    refused(
        lambda: esl.density.GaussianEntropy()(jnp.full((4, 1), jnp.nan)),
        "`positions` must be finite",
    )


def test_an_entropy_prints_itself():
    assert str(esl.density.Entropy(jnp.array([1.0, 3.0]), "by hand")) == "H = 2 ± 1 nats (by hand)"
    assert str(esl.density.Entropy(jnp.array([1.0, 3.0]))) == "H = 2 ± 1 nats"
    lines = []
    jax.jit(lambda x: lines.append(str(esl.density.Entropy(x, "by hand"))))(jnp.zeros(2))
    assert lines[0].startswith("Entropy(")


def test_the_standard_error_is_named_after_its_number():
    entropy = esl.density.Entropy(jnp.array([1.0, 2.0, 3.0, 4.0]))
    truth = np.std([1, 2, 3, 4], ddof=1) / 2
    np.testing.assert_allclose(entropy.standard_error.value, truth, rtol=1e-6)
    assert "4 members" in entropy.errors
    with pytest.raises(AttributeError, match="there is one of: value"):
        _ = entropy.standard_error.note
