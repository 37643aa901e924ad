"""The limit that one observable sets to Σ, against quadrature of exact moments."""

from typing import Any

import ensembles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import systems
from scipy.integrate import quad

import esljax as esl
from esljax.measures import observable_limit

KEY = jax.random.key(0)


def of_ornstein_uhlenbeck(power, k=1.0, T=0.1, spread=1.0, mean=2.0):
    """∫(dE[r]/dt)²/E[r'²] dt over unit time, for r = θ²/2 and for r = θ."""

    def rate(t):
        m, S = mean * np.exp(-k * t), T / k + (spread - T / k) * np.exp(-2 * k * t)
        slope, growth = -k * m, -2 * k * (spread - T / k) * np.exp(-2 * k * t)
        if power == 1:
            return slope**2
        return (m * slope + growth / 2) ** 2 / (m**2 + S)

    return quad(rate, 0, 1)[0]


@pytest.mark.parametrize("power", [1, 2])
def test_it_is_the_integral_of_exact_moments_and_below_sigma(power):
    system = systems.ornstein_uhlenbeck(1, 100)
    path = system.run(system.sample(20_000, KEY), 20, jax.random.key(1))
    r = esl.Quadratic(1.0) if power == 2 else esl.FromFunction(lambda x: x[0])
    limit: Any = observable_limit(path, r)
    truth = of_ornstein_uhlenbeck(power)
    # 20 links and steps of .01 leave less than 1 %.
    assert abs(limit.value - truth) < 5 * limit.error + 0.01 * truth
    assert limit.value < system.entropy_production
    np.testing.assert_allclose(jnp.sum(limit.links), limit.value, rtol=1e-5)


def test_gradient_flow_is_proved_whole(x64):
    """O5: two modes without noise, where each member's own velocity is -∇Φ."""
    potential = esl.Quadratic(jnp.array([1.0, 10.0]))
    start = jnp.array([[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    path = esl.simulate(
        potential, esl.Langevin(1 / 4000), start, steps=4000, snapshots=400, key=KEY
    )
    limit = observable_limit(path, potential, jackknife=0)
    np.testing.assert_allclose(limit.value, 5.4323323, rtol=1e-3)
    assert limit.error is None


def test_errors_are_those_of_repetitions():
    system = systems.ornstein_uhlenbeck(1, 20)

    def one(key):
        start_key, path_key = jax.random.split(key)
        path = system.run(system.sample(64, start_key), 10, path_key)
        limit = observable_limit(path, system.potential)
        return limit.value, limit.error

    values, errors = map(np.asarray, jax.lax.map(one, jax.random.split(KEY, 400)))
    # The spread of a spread over 400 runs is 3.5 %, that of the mean error less.
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), np.std(values), rtol=0.2)


def test_the_bias_of_few_members_is_taken_off():
    """At rest nothing is proved, though means of few members change all the time."""
    rest = esl.Quadratic(1.0)

    def one(key):
        start_key, path_key = jax.random.split(key)
        start = jax.random.normal(start_key, (16, 1))
        path = esl.simulate(
            rest, esl.Langevin(0.2, 1.0), start, steps=10, snapshots=10, key=path_key
        )
        kinds = (observable_limit(path, rest, jackknife=groups).value for groups in (16, 0))
        return jnp.stack(list(kinds))

    corrected, plain = np.asarray(jax.lax.map(one, jax.random.split(KEY, 1000))).T
    assert np.mean(plain) > 0.1
    assert abs(np.mean(corrected)) < 0.2 * np.mean(plain)


def test_a_driven_potential_is_held_along_each_link(x64):
    """A trap that moves past members proves nothing by that: only what members did counts."""
    driven = esl.Driven(lambda center: esl.Quadratic(1.0, center), esl.Linear(0.0, 5.0))
    still = np.broadcast_to(ensembles.clouds(8, 8)[0], (5, 8, 3)).copy()
    still[..., 0] += 1e-3 * np.arange(5)[:, None]  # standing runs are refused
    path = esl.from_snapshots(still)
    assert observable_limit(path, driven, jackknife=0).value < 2e-5


def test_it_differentiates(x64):
    positions = np.random.default_rng(0).normal(size=(4, 6, 2))

    def value(scale):
        path = esl.from_snapshots(positions * scale)
        return observable_limit(path, esl.Quadratic(jnp.array([1.0, 3.0])), jackknife=3).value

    # Doubled positions move with four times the Σ.
    np.testing.assert_allclose(jax.grad(value)(1.0), 2 * value(1.0), rtol=1e-8)


def test_refusals(refused):
    path = esl.from_snapshots(np.random.default_rng(0).normal(size=(3, 4, 2)))
    features = esl.from_snapshots(
        np.zeros((3, 4, 2)) + np.arange(3.0)[:, None, None], observed=True
    )
    refused(
        lambda: observable_limit(features, esl.Quadratic(1.0)), "trajectory.*one run of positions"
    )
    function: Any = lambda x: x  # noqa: E731
    refused(lambda: observable_limit(path, function), "observable.*FromFunction")
    refused(lambda: observable_limit(path, esl.Quadratic(1.0), jackknife=-1), "jackknife")
