"""Weights of examples, and the drive that moves them."""

import doctest

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import esljax as esl
from esljax.potentials import curriculum

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.normal(size=(12, 2)), RNG.integers(0, 2, 12)
WEIGHTS, HARD = RNG.uniform(0.1, 3, 12), RNG.normal(size=12)


def loss(**given):
    return esl.FlaxLoss(esl.models.mlp(2, 3, 2), (INPUTS, LABELS), l2=0.1, **given)


def of_examples(position):
    """The loss of each example, by a potential of that example alone."""
    alone = [
        esl.FlaxLoss(esl.models.mlp(2, 3, 2), (INPUTS[i : i + 1], LABELS[i : i + 1]))
        for i in range(12)
    ]
    return np.array([float(one.energy(position)) for one in alone])


@pytest.fixture
def position(x64):
    return jnp.sin(3.0 * jnp.arange(17.0))


def test_weights_multiply_the_loss_of_each_example(position):
    own, decay = of_examples(position), 0.05 * np.sum(np.asarray(position) ** 2)
    np.testing.assert_allclose(
        loss(weights=WEIGHTS).energy(position), np.mean(WEIGHTS * own) + decay, rtol=1e-12
    )
    np.testing.assert_allclose(
        loss(weights=WEIGHTS).energy(position, jnp.array([3, 3, 7])),
        np.mean((WEIGHTS * own)[[3, 3, 7]]) + decay,
        rtol=1e-12,
    )
    # Whole numbers are as many copies.
    twice = esl.FlaxLoss(
        esl.models.mlp(2, 3, 2),
        (np.concatenate([INPUTS, INPUTS[:4]]), np.concatenate([LABELS, LABELS[:4]])),
        l2=0.1,
    )
    counted = loss(weights=np.where(np.arange(12) < 4, 2.0, 1.0) * 12 / 16)
    for one, other in zip(
        twice.energy_and_gradient(position), counted.energy_and_gradient(position), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_batches_of_a_weighted_loss_are_unbiased(position):
    weighted = loss(weights=WEIGHTS, batch_size=3)
    batches = weighted.draw(KEY, 20_000)
    energies = jax.vmap(weighted.energy, (None, 0))(position, batches)
    error = energies.std() / np.sqrt(len(energies))
    assert abs(energies.mean() - weighted.energy(position)) < 5 * error
    assert abs(weighted.energy(position) - loss().energy(position)) > 10 * error


def test_a_drive_tilts_the_weights_and_does_the_work_of_the_covariance(position):
    order = esl.Curriculum(loss(), HARD)
    tilted = np.exp(-0.7 * HARD)
    np.testing.assert_allclose(order.weights(0.7), 12 * tilted / tilted.sum(), rtol=1e-12)
    np.testing.assert_allclose(order(0.0).energy(position), loss().energy(position), rtol=1e-12)
    own = esl.Curriculum(loss(weights=WEIGHTS), HARD)
    np.testing.assert_allclose(own.weights(0.7), WEIGHTS * order.weights(0.7), rtol=1e-12)
    shares, losses = tilted / tilted.sum(), of_examples(position)
    covariance = shares @ (HARD * losses) - (shares @ HARD) * (shares @ losses)
    slope = jax.grad(lambda drive: order(drive).energy(position))(0.7)
    np.testing.assert_allclose(slope, -covariance, rtol=1e-9)


def run(drive, order, gradient=None):
    driven = esl.Driven(order, drive, after=0.0)
    start = jnp.asarray(np.random.default_rng(1).normal(size=(4, 17)))
    path = esl.simulate(
        driven, esl.Langevin(0.4), start, steps=6, snapshots=6, key=KEY, gradient=gradient
    )
    return driven, path


def test_work_is_the_change_of_the_weights_at_members_that_rest(position):
    driven, path = run(esl.Linear(1.5, -0.5), esl.Curriculum(loss(), HARD))
    at = [driven.at(k / 6) for k in range(7)]
    truth = sum(at[k + 1](path.positions[k + 1]) - at[k](path.positions[k + 1]) for k in range(6))
    truth += loss()(path.final) - at[6](path.final)
    np.testing.assert_allclose(path.work, truth, rtol=1e-9)
    assert np.abs(truth).min() > 1e-3


@pytest.mark.usefixtures("x64")
def test_the_drive_of_a_minibatch_run_has_a_gradient():
    order, end = esl.Curriculum(loss(batch_size=5), HARD), loss()

    @eqx.filter_jit
    def value(values, gradient):
        _, path = run(esl.Knots(values, "linear"), order, gradient)
        return jnp.mean(end(path.final)) + jnp.mean(jnp.sum(path.work_of_links, axis=0))

    values, direction = jnp.array([1.0, 0.3, -0.4]), np.array([0.5, -1.0, 0.8])
    slopes = [jax.grad(value)(values, mode) for mode in (esl.HessianAdjoint(), esl.Autodiff())]
    np.testing.assert_allclose(*slopes, rtol=1e-9)
    truth = oracles.central_difference(
        lambda x: value(x, esl.HessianAdjoint()), values, direction, 1e-6
    )
    np.testing.assert_allclose(slopes[0] @ direction, truth, rtol=1e-6)
    assert abs(truth) > 1e-4


BAD = {
    r"`weights` must have shape \(12,\), one for each example, but has shape \(3,\)": lambda: loss(
        weights=np.ones(3)
    ),
    r"`weights` must be .*at least 0": lambda: loss(weights=-WEIGHTS),
    r"`weights` must .*finite": lambda: loss(weights=WEIGHTS * np.nan),
    r"`difficulty` must have shape \(12,\), one number for each example": lambda: esl.Curriculum(
        loss(), np.ones(4)
    ),
    r"`difficulty` must .*finite": lambda: esl.Curriculum(loss(), HARD * np.inf),
    r"`potential` must be a FlaxLoss": lambda: esl.Curriculum(esl.Quadratic(1.0), HARD),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence, refused):
    refused(BAD[sentence], sentence)


def test_examples():
    assert doctest.testmod(curriculum).failed == 0
