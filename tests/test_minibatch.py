"""Minibatch noise against the law of a batch's mean, computed by NumPy from all the data."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

KEY = jax.random.key(0)
BATCH = 8


@pytest.fixture(scope="module")
def run():
    inputs = jax.random.normal(KEY, (40, 3))
    data = (inputs, (inputs[:, 0] + inputs[:, 1] ** 2 > 0.5).astype(jnp.int32))
    potential = esl.FlaxLoss(esl.potentials.mlp(3, 4, 2), data, batch_size=BATCH, l2=1e-2)
    path = esl.simulate(
        potential,
        esl.Langevin(0.2, 0.0),
        potential.init(members=16, key=KEY),
        steps=20,
        snapshots=4,
        key=jax.random.key(1),
    )
    return potential, path


def truth(potential, path):
    """‖∇Φ‖² and tr Cov(g) of a batch drawn with replacement, from the gradients of the single
    examples: (J+1, n) each."""

    @jax.jit
    def of_examples(position):
        return jax.vmap(lambda i: potential.energy_and_gradient(position, i[None])[1])(
            jnp.arange(len(potential.inputs))
        )

    each = np.array(
        [[of_examples(member) for member in snapshot] for snapshot in path.positions], float
    )
    mean = each.mean(axis=2)
    return np.sum(mean**2, axis=-1), np.sum((each - mean[:, :, None]) ** 2, axis=-1).mean(
        axis=2
    ) / BATCH


def test_gradient_and_noise_are_those_of_the_data(run):
    potential, path = run
    squared, variance = truth(potential, path)
    noise = esl.minibatch_noise(path, potential, key=jax.random.key(2), pairs=400)
    # Drawn batches leave an error beside that over members, so members are compared as they are:
    # with 400 pairs each.
    spread = np.asarray(noise.standard_error.gradient_squared)
    scatter = np.sqrt(
        2 * variance.mean(axis=1) * (2 * squared + variance).mean(axis=1) / (400 * 16)
    )
    assert np.all(np.abs(noise.gradient_squared - squared.mean(axis=1)) < 5 * scatter)
    np.testing.assert_allclose(noise.variance, variance.mean(axis=1), rtol=0.03)
    # A square of one batch's gradient would be off by the variance, which is many errors.
    assert np.all(variance.mean(axis=1) > 10 * scatter)
    np.testing.assert_allclose(spread, squared.std(axis=1, ddof=1) / 4, rtol=0.3)
    np.testing.assert_allclose(
        noise.standard_error.variance, variance.std(axis=1, ddof=1) / 4, rtol=0.3
    )


def test_the_floor_is_what_steps_spread(run):
    potential, path = run
    _, variance = truth(potential, path)
    per_snapshot = variance.mean(axis=1)
    # Four links of five steps of rate .2, each a quarter of the time.
    of_members = sum(5 * 0.2**2 * (a + b) / 2 / 0.25 for a, b in itertools.pairwise(variance))
    expected = of_members.mean()
    noise = esl.minibatch_noise(path, potential, key=jax.random.key(2), pairs=200)
    assert abs(float(noise.floor) - expected) < 0.03 * expected
    np.testing.assert_allclose(
        noise.temperature, 0.2 * per_snapshot / (2 * path.positions.shape[2]), rtol=0.05
    )
    error = noise.standard_error
    np.testing.assert_allclose(error.floor, of_members.std(ddof=1) / 4, rtol=0.3)
    np.testing.assert_allclose(
        error.temperature, error.variance * noise.temperature / noise.variance, rtol=1e-5
    )
    assert noise.errors == "over 16 members"


def test_print_and_the_former_names_of_errors(run):
    potential, path = run
    noise = esl.minibatch_noise(path, potential, key=jax.random.key(2), pairs=2)
    heading, *rows, last = str(noise).splitlines()
    assert heading.split() == ["s", "E‖∇Φ‖²", "tr", "Cov(g)", "temperature"]
    error = noise.standard_error
    for j, row in enumerate(rows):
        cells = [
            f"{float(getattr(noise, name)[j]):.4g} ± {float(getattr(error, name)[j]):.2g}"
            for name in ("gradient_squared", "variance", "temperature")
        ]
        assert " ".join(row.split()) == " ".join([f"{j / 4:.3f}", *cells])
    floor = f"{float(noise.floor):.4g} ± {float(error.floor):.2g}"
    assert last == f"Batches contribute up to {floor} to the Σ of a chain of members' paths."
    for name in ("gradient_squared", "variance", "temperature", "floor"):
        with pytest.warns(
            DeprecationWarning, match=rf"is now MinibatchNoise\.standard_error.{name}; the old name"
        ):
            old = getattr(noise, f"{name}_error")
        np.testing.assert_array_equal(old, getattr(error, name))


def test_the_spread_of_a_rule_without_a_law_is_not_known(run):
    potential, path = run
    options = {"key": jax.random.key(2), "pairs": 2}
    noise = esl.minibatch_noise(path, potential, **options)
    unlawful = esl.minibatch_noise(dataclasses.replace(path, lawful=False), potential, **options)
    np.testing.assert_array_equal(unlawful.variance, noise.variance)
    assert unlawful.floor is unlawful.temperature is unlawful.standard_error.floor is None
    heading, *_, last = str(unlawful).splitlines()
    assert heading.split() == ["s", "E‖∇Φ‖²", "tr", "Cov(g)"]
    assert (
        last == "The rule claims no law, so the share of batches in the Σ of a chain is not known."
    )


def test_what_has_no_batches_is_refused(run, refused):
    potential, path = run
    smooth = esl.simulate(
        esl.Quadratic(1.0), esl.Langevin(0.1), jnp.ones((4, 2)), steps=4, snapshots=2, key=KEY
    )
    refused(
        lambda: esl.minibatch_noise(smooth, esl.Quadratic(1.0), key=KEY),
        "Argument `potential` must draw batches",
    )
    refused(
        lambda: esl.minibatch_noise(path, potential, key=KEY, pairs=0),
        "Argument `pairs` must be an integer of at least 1",
    )
    refused(
        lambda: esl.minibatch_noise(path.positions, potential, key=KEY),
        "Argument `trajectory` must be one run",
    )
