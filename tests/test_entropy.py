"""Entropies against closed forms and SciPy's laws."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from esljax.entropy import Entropy, GaussianEntropy

ESTIMATORS = {
    "gaussian": lambda: GaussianEntropy(),
}
every = pytest.mark.parametrize("name", ESTIMATORS)


def skewed(n, d=2, seed=0):
    """Correlated, of unequal widths, and skewed in the first coordinate, so that signs and axes matter."""
    rng = np.random.default_rng(seed)
    mix = np.eye(d) + 0.5 * np.tri(d, k=-1)
    return jnp.asarray(np.column_stack([rng.gamma(4.0, size=n), *(rng.normal(size=(d - 1, n)) * 3.0)]) @ mix.T, jnp.float32)


# Contracts


@every
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    entropy = ESTIMATORS[name]()
    x = jnp.stack([skewed(40, seed=seed) for seed in range(2)])
    alone = [entropy(rows) for rows in x]
    chex.assert_trees_all_close(entropy.estimate(x[0]), alone[0], rtol=2e-4, atol=2e-4)
    together = eqx.filter_vmap(entropy.estimate)(x)
    chex.assert_trees_all_close(together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=2e-4, atol=2e-4)


@every
def test_one_trace_serves_two_calls_and_the_precision_is_the_input_s(name):
    entropy = ESTIMATORS[name]()
    traced = eqx.filter_jit(chex.assert_max_traces(lambda entropy, x: entropy.estimate(x), n=1))
    for seed in range(2):
        answer = traced(entropy, skewed(40, seed=seed))
        assert answer.contributions.dtype == jnp.float32
        assert answer.contributions.shape == (40,)
        np.testing.assert_allclose(answer.value, np.mean(answer.contributions), rtol=1e-6)


# Numbers


@pytest.mark.parametrize("d", [1, 2, 10])
def test_a_gaussian_law_is_met_without_bias(d, x64):
    """Over 400 ensembles of 20: the uncorrected estimate is low by about d(d + 3)/4n."""
    rng = np.random.default_rng(d)
    mix = np.eye(d) + 0.5 * np.tri(d, k=-1)
    x = jnp.asarray(rng.normal(size=(400, 20, d)) @ mix.T + 3.0)
    values = np.asarray(eqx.filter_jit(eqx.filter_vmap(lambda x: GaussianEntropy().estimate(x).value))(x))
    truth = scipy.stats.multivariate_normal(np.zeros(d), mix @ mix.T).entropy()
    error = values.std(ddof=1) / 20
    assert abs(values.mean() - truth) < 5 * error


def test_bad_ensembles_are_refused(refused):
    refused(lambda: GaussianEntropy()(jnp.ones((4, 4, 4))), r"`positions` must have shape \(n, d\)")
    refused(lambda: GaussianEntropy()(jnp.ones((3, 1))), "`positions` must hold at least 4 members")
    refused(lambda: GaussianEntropy()(jnp.ones((4, 4))), "`positions` must hold more than 4 members")
    refused(lambda: GaussianEntropy()(jnp.full((4, 1), jnp.nan)), "`positions` must be finite")


def test_an_entropy_prints_itself():
    assert str(Entropy(jnp.array([1.0, 3.0]), "by hand")) == "H = 2 ± 1 nats (by hand)"
    said = []
    jax.jit(lambda x: said.append(str(Entropy(x, "by hand"))))(jnp.zeros(2))
    assert said[0].startswith("Entropy(")
