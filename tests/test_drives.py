"""Potentials that a drive moves: their runs, gradients in every way, and the
drives of least work."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from ensembles import MODES, weigh

import esljax as esl

KEY = jax.random.key(7)


def trap(center):
    return esl.Quadratic(1.0, center)


class Widening(eqx.Module):
    """A double well whose width is driven, with a parameter of its own."""

    barrier: Any

    def __call__(self, width):
        return esl.DoubleWell(self.barrier, width, 1.2)


# Runs


@pytest.mark.usefixtures("x64")
def test_every_step_reads_the_drive_at_its_own_time_and_never_outside_the_jumps():
    start = np.random.default_rng(0).normal(size=(4, 2))
    path = esl.simulate(
        esl.Driven(trap, esl.Linear(1.0, 3.0), before=50.0, after=-50.0),
        esl.Langevin(0.3),
        start,
        steps=6,
        snapshots=3,
        key=KEY,
    )
    truth = [start]
    for k in range(6):
        truth.append(truth[-1] - 0.3 * (truth[-1] - (1 + 2 * k / 6)))
    np.testing.assert_allclose(path.positions, truth[::2], rtol=1e-12)
    np.testing.assert_allclose(
        path.energies[-1], np.sum((truth[-1] - 3.0) ** 2, axis=1) / 2, rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
def test_the_work_of_jumps_alone_is_the_change_of_the_potential():
    start = np.random.default_rng(1).normal(size=(50, 2)) + 0.3
    driven = esl.Driven(Widening(0.7), esl.Knots([1.0, 2.0, 1.4]), before=0.8, after=1.9)
    path = esl.simulate(
        driven, esl.Langevin(0.0), start, steps=4, snapshots=4, key=KEY
    )  # nothing moves
    report = esl.free_energy(path, driven, entropy=esl.density.GaussianEntropy())
    truth = [
        np.mean([oracles.double_well(x, 0.7, width, 1.2) for x in start]) for width in (0.8, 1.9)
    ]
    np.testing.assert_allclose(report.energy[jnp.array([0, -1])], truth, rtol=1e-12)
    np.testing.assert_allclose(report.work, truth[1] - truth[0], rtol=1e-10)
    np.testing.assert_allclose(report.heat, 0, atol=1e-12)


class Following(esl.AbstractPotential):
    """A trap that moves by itself, without a drive: an outsider's potential."""

    speed: Any
    conservative = True

    def at(self, s):
        return esl.Quadratic(1.0, self.speed * s)

    def energy(self, position, batch=None):
        raise NotImplementedError

    def energy_and_gradient(self, position, batch=None):
        raise NotImplementedError

    def draw(self, key, members):
        raise NotImplementedError


class Jumping(esl.Quadratic):
    """A trap that is at rest but for a jump at the end."""

    def at_end(self):
        return esl.Quadratic(self.stiffness, self.center + 2.0)


@pytest.mark.usefixtures("x64")
def test_an_outsider_that_moves_runs_and_its_work_is_counted():
    start = np.random.default_rng(3).normal(size=(8, 2))
    following, driven = Following(jnp.array(2.0)), esl.Driven(trap, esl.Linear(0.0, 2.0))

    def measured(potential):
        path = esl.simulate(potential, esl.Langevin(0.2), start, steps=6, snapshots=3, key=KEY)
        books = esl.free_energy(path, potential, entropy=esl.density.GaussianEntropy())
        limit = esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=esl.AffineVelocity(),
            potential=potential,
            jackknife=0,
        )
        return path.positions, books.work, books.energy, limit.entropy_production

    for one, other in zip(measured(following), measured(driven), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    assert abs(measured(following)[1]) > 0.1
    assert following.moves
    assert driven.moves
    assert not esl.Quadratic(1.0).moves
    assert esl.plan_memory(following, start, steps=6, snapshots=3).total > 0


@pytest.mark.usefixtures("x64")
def test_the_work_of_an_outsider_that_only_jumps_is_counted():
    start, jumping = np.random.default_rng(3).normal(size=(8, 2)), Jumping(1.0)
    path = esl.simulate(jumping, esl.Langevin(0.0), start, steps=2, snapshots=2, key=KEY)
    books = esl.free_energy(path, jumping, entropy=esl.density.GaussianEntropy())
    truth = np.mean(np.sum((start - 2.0) ** 2 - start**2, axis=1)) / 2
    np.testing.assert_allclose(books.work, truth, rtol=1e-10)


def test_a_drive_has_no_energy_without_a_time(refused):
    driven, position = esl.Driven(trap, 1.0), jnp.ones(2)
    for call in (
        lambda: driven(position[None]),
        lambda: driven.energy(position),
        lambda: driven.energy_and_gradient(position),
        lambda: driven.draw(KEY, 3),
    ):
        refused(call, "A Driven potential has energies only at a time: use `potential.at")


# Gradients


def arguments():
    drive = esl.Knots([1.1, 1.4, 0.9], "linear")
    driven = esl.Driven(Widening(jnp.asarray(0.7)), drive, before=1.0, after=1.3)
    return (
        driven,
        esl.Langevin(esl.Knots([0.05, 0.2, 0.1]), esl.Linear(0.3, 0.1)),
        jnp.asarray(np.random.default_rng(2).normal(size=(6, 2))),
    )


@eqx.filter_jit
def value_and_gradient(driven, rule, positions, mode):
    def value(moving):
        driven, rule = moving
        path = esl.simulate(driven, rule, positions, steps=12, snapshots=3, key=KEY, gradient=mode)
        report = esl.free_energy(path, driven, entropy=esl.density.GaussianEntropy())

        return (
            weigh(path.final**2)
            + weigh(path.energies)
            + report.work
            + 2 * report.tempering
            - 3 * report.dissipation_by_balance
        )

    return eqx.filter_value_and_grad(value)((driven, rule))


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "quick_compilation")
def test_all_ways_of_differentiating_agree_in_the_drive_and_with_central_differences():
    driven, rule, positions = arguments()
    value, truth = value_and_gradient(driven, rule, positions, MODES[0])
    for mode in MODES[1:]:
        other, gradient = value_and_gradient(driven, rule, positions, mode)
        np.testing.assert_allclose(other, value, rtol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)

    leaves = [
        lambda d: d.drive.parameters,
        lambda d: d.before,
        lambda d: d.after,
        lambda d: d.family.barrier,
    ]
    for leaf in leaves:
        direction = np.cos(1.0 + np.arange(leaf(driven).size)).reshape(leaf(driven).shape)

        def moved(x, leaf=leaf):
            return value_and_gradient(eqx.tree_at(leaf, driven, x), rule, positions, MODES[0])[0]

        slope = np.sum(leaf(truth[0]) * direction)
        assert abs(slope) > 1e-4  # a leaf that nothing depends on would test nothing
        np.testing.assert_allclose(
            slope,
            oracles.central_difference(moved, leaf(driven), direction, 3e-6),
            rtol=1e-6,
            atol=1e-9,
        )


# Drives of least work

STEPS, SNAPSHOTS, MEMBERS = 400, 20, 20_000
GRID = np.linspace(0, 1, STEPS + 1)
# The potential; λ, c as functions of s; both before and after; the reference work, Σ, W2².
DRIVES = {
    "moving, linear": (
        lambda: esl.Driven(trap, esl.Linear(0.0, 5.0)),
        (np.ones_like, lambda s: 5 * np.asarray(s)),
        ((1, 0), (1, 5)),
        oracles.O6["linear"],
    ),
    "moving, best": (
        lambda: esl.Driven(trap, esl.Linear(5 / 3, 10 / 3), before=0.0, after=5.0),
        (np.ones_like, lambda s: 5 / 3 * (1 + np.asarray(s))),
        ((1, 0), (1, 5)),
        oracles.O6["best"],
    ),
    "stiffening, best": (
        lambda: esl.Driven(
            esl.Quadratic,
            esl.Knots(oracles.stiffening_drive(GRID), "linear"),
            before=1.0,
            after=2.0,
        ),
        (oracles.stiffening_drive, lambda s: 0 * np.asarray(s)),
        ((1, 0), (2, 0)),
        (oracles.O7[1], (1 - oracles.O7[0]) ** 2, (1 - oracles.O7[0]) ** 2),
    ),
}


@pytest.mark.parametrize("name", DRIVES)
def test_the_references_are_what_the_equations_of_the_moments_say(name):
    _, (stiffness, center), jumps, (work, sigma, distance) = DRIVES[name]
    found = oracles.driven_books(stiffness, center, jumps)
    np.testing.assert_allclose(found[:2], (work, sigma), rtol=1e-6)
    np.testing.assert_allclose(found[2] ** 2 + (found[3] - 1) ** 2, distance, rtol=1e-6)
    if name.startswith("stiffening"):
        np.testing.assert_allclose(found[3], oracles.O7[0], rtol=1e-7)
        np.testing.assert_allclose(stiffness(np.array([0, 1])), oracles.O7[2:], rtol=1e-7)


@pytest.mark.parametrize("name", DRIVES)
def test_members_do_the_work_and_produce_the_entropy_of_the_references(name):
    make, (stiffness, center), jumps, (work, sigma, distance) = DRIVES[name]
    driven, start = make(), jax.random.normal(jax.random.key(3), (MEMBERS, 1))
    path = esl.simulate(
        driven, esl.Langevin(1 / STEPS, 1.0), start, steps=STEPS, snapshots=SNAPSHOTS, key=KEY
    )
    books = esl.free_energy(
        path, driven, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    )
    limit = esl.speed_limit(
        path, transport=esl.GaussianTransport(), velocity=esl.AffineVelocity(), potential=driven
    )
    error = books.standard_error
    discrete, *_ = oracles.driven_steps(stiffness(GRID), center(GRID), jumps)
    # Trapezoids would miss the discrete work by the finite step's share, which is below a percent.
    assert abs(discrete - work) < 0.01 * work
    assert abs(books.work - discrete) < 5 * error.work < 0.05 * work
    np.testing.assert_allclose(books.work, jnp.mean(path.work), rtol=1e-5)
    assert abs(books.residual) < 3 * error.residual
    assert (
        abs(books.entropy_production_by_balance - sigma) < 5 * error.entropy_production_by_balance
    )
    assert abs(limit.entropy_production - sigma) < 5 * limit.standard_error.entropy_production
    assert abs(limit.w2_squared - distance) < 5 * limit.standard_error.w2_squared
    assert abs(limit.gap - (sigma - distance)) < 5 * limit.standard_error.gap


@pytest.mark.slow
def test_the_search_over_a_drive_finds_the_jumps():
    """Members in one point at T = 0: the work on the mean, whose least value and drive are those of
    O6."""
    start, steps = np.zeros((4, 1), np.float32), 40

    def work(drive, key):
        driven = esl.Driven(trap, drive, before=0.0, after=5.0)
        path = esl.simulate(
            driven, esl.Langevin(1 / steps), start, steps=steps, snapshots=steps, key=key
        )
        return esl.free_energy(path, driven, entropy=esl.density.GaussianEntropy()).work

    ramp = esl.Knots(np.linspace(0.0, 5.0, 5), "linear")
    optimum = esl.optimize(work, ramp, key=KEY, iterations=40, rounds=2, optimizer=optax.lbfgs())
    assert work(ramp, KEY) > 9
    np.testing.assert_allclose(optimum.value, oracles.O6["best"][0], rtol=5e-3)
    np.testing.assert_allclose(optimum.controls.values, np.linspace(5 / 3, 10 / 3, 5), atol=0.15)


# Bad input

BAD = {
    "`family` must be a function of the drive to a potential, but is an int": lambda: esl.Driven(
        3, 1.0
    ),
    r"`family\(drive\)` must be a potential .*, but is a ShapeDtypeStruct": lambda: esl.Driven(
        lambda x: x**2, 1.0
    ),
    r"`after` must be one number, but has shape \(2,\)": lambda: esl.Driven(
        trap, 1.0, after=np.ones(2)
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence, refused):
    refused(BAD[sentence], sentence)
