"""Work summed inside the run, exact for any drive, and the free energy that it gives."""

import dataclasses
import functools
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
from esljax.simulation import loop

KEY = jax.random.key(7)


def trap(center):
    return esl.Quadratic(1.0, center)


class Spring(esl.AbstractPotential):
    """λ b·θ with a batch b of one random number for each coordinate: its mean is 0."""

    strength: Any
    conservative = True

    def energy(self, position, batch=None):
        return self.strength * jnp.vdot(jnp.ones(2) if batch is None else batch, position)

    def energy_and_gradient(self, position, batch=None):
        return jax.value_and_grad(self.energy)(position, batch)

    def draw(self, key, members):
        return jax.random.normal(key, (members, 2))


# What the run sums


@pytest.mark.usefixtures("x64")
def test_the_work_of_a_batch_is_that_of_the_step_that_follows_the_change():
    drive, steps = np.array([1.0, 3.0, -2.0, 0.5]), 6
    potential = esl.Driven(Spring, esl.Knots(drive, "linear"), before=-1.0, after=2.0)
    start = np.random.default_rng(0).normal(size=(3, 2))
    path = esl.simulate(potential, esl.Langevin(0.2, 0.3), start, steps=steps, snapshots=3, key=KEY)
    whole = esl.simulate(
        potential, esl.Langevin(0.2, 0.3), start, steps=steps, snapshots=steps, key=KEY
    )
    values = [
        -1.0,
        *np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 4), drive),
        2.0,
    ]
    changes = np.diff(values)
    batches = [
        Spring(1.0).draw(jax.random.fold_in(jax.random.fold_in(KEY, k), 0), 3)
        for k in [*range(steps + 1), steps]
    ]
    positions = [*whole.positions, whole.positions[-1]]
    work = np.array(
        [
            change * np.sum(batch * position, axis=1)
            for change, batch, position in zip(changes, batches, positions, strict=True)
        ]
    )
    np.testing.assert_allclose(path.work, work.sum(axis=0), rtol=1e-12)
    # Entry 0 is the first jump; entries k > 0 end step k - 1; the last is the last jump.
    links = np.array([work[:3].sum(axis=0), work[3:5].sum(axis=0), work[5:].sum(axis=0)])
    np.testing.assert_allclose(path.work_of_links, links, rtol=1e-12)


def test_work_is_known_where_it_can_be():
    start = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    options = {"steps": 8, "snapshots": 4, "key": KEY}
    rule, moving = esl.Langevin(0.1, 0.1), esl.Driven(trap, esl.Linear(0.0, 1.0), after=3.0)
    still = esl.simulate(esl.Quadratic(1.0), rule, start, **options)
    moved = esl.simulate(moving, rule, start, **options)
    observed = esl.simulate(moving, rule, start, observe=lambda x: x[:1], **options)
    assert still.work_of_links.shape == moved.work_of_links.shape == (4, 6)
    np.testing.assert_array_equal(still.work, 0)
    np.testing.assert_array_equal(observed.work, moved.work)
    assert moved.work.dtype == jnp.float32
    assert esl.from_snapshots(moved.positions).work is None
    runs = jax.vmap(lambda key: esl.simulate(moving, rule, start, **{**options, "key": key}))(
        jax.random.split(KEY, 3)
    )
    assert runs.work.shape == (3, 6)
    stacked = esl.simulation.stack([moved, moved])
    np.testing.assert_array_equal(stacked.work[1], moved.work)


class Silent(esl.Quadratic):
    """A potential at rest that fails where its energy is asked for without a gradient."""

    def energy(self, position, batch=None):
        raise AssertionError("a potential at rest does no work")


def test_a_potential_at_rest_costs_nothing():
    path = esl.simulate(
        Silent(1.0), esl.Langevin(0.1), jnp.ones((2, 1)), steps=2, snapshots=1, key=KEY
    )
    np.testing.assert_array_equal(path.work, 0)


def test_a_run_with_checkpoints_has_the_work_of_one_without(tmp_path, refused, monkeypatch):
    start = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    moving = esl.Driven(trap, esl.Linear(0.0, 1.0), before=-1.0, after=3.0)

    def run(folder=None):
        saved = None if folder is None else esl.Checkpoints(folder, resume=True, every=0)
        return esl.simulate(
            moving,
            esl.Langevin(0.1, 0.1),
            start,
            steps=8,
            snapshots=4,
            key=KEY,
            checkpoints=saved,
        )

    whole = run()
    np.testing.assert_allclose(run(tmp_path / "new").work_of_links, whole.work_of_links, rtol=1e-6)
    np.testing.assert_allclose(run(tmp_path / "new").work_of_links, whole.work_of_links, rtol=1e-6)

    # A checkpoint of 0.1 described no work.
    def old(checkpoints, about):
        return original(checkpoints, {k: v for k, v in about.items() if k != "work"})

    original = loop.session
    with monkeypatch.context() as patch:
        patch.setattr(loop, "session", old)
        run(tmp_path / "old")
    refused(lambda: run(tmp_path / "old"), "`checkpoints` must hold the run .* whose work is")


# Derivatives


class Widening(eqx.Module):
    """A double well whose width is driven, with a parameter of its own."""

    barrier: Any

    def __call__(self, width):
        return esl.DoubleWell(self.barrier, width, 1.2)


@eqx.filter_jit
def value_and_gradient(moving, mode):
    def value(moving):
        driven, rule, start = moving
        path = esl.simulate(driven, rule, start, steps=12, snapshots=3, key=KEY, gradient=mode)
        return weigh(path.work_of_links) + weigh(path.final**2)

    return eqx.filter_value_and_grad(value)(moving)


LEAVES = {
    "drive": lambda m: m[0].drive.parameters,
    "before": lambda m: m[0].before,
    "after": lambda m: m[0].after,
    "barrier": lambda m: m[0].family.barrier,
    "start": lambda m: m[2],
}


@pytest.mark.usefixtures("x64")
def test_work_differentiates_in_every_way_and_as_central_differences_do():
    drive = esl.Knots([1.1, 1.4, 0.9], "linear")
    moving = (
        esl.Driven(Widening(jnp.asarray(0.7)), drive, before=1.0, after=1.3),
        esl.Langevin(esl.Knots([0.05, 0.2, 0.1]), 0.3),
        jnp.asarray(np.random.default_rng(2).normal(size=(4, 2))),
    )
    value, truth = value_and_gradient(moving, MODES[0])
    for mode in MODES[1:]:
        other, gradient = value_and_gradient(moving, mode)
        np.testing.assert_allclose(other, value, rtol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)
    for leaf in LEAVES.values():
        direction = np.cos(1.0 + np.arange(leaf(moving).size)).reshape(leaf(moving).shape)

        def moved(x, leaf=leaf):
            return value_and_gradient(eqx.tree_at(leaf, moving, x), MODES[0])[0]

        slope = np.sum(leaf(truth) * direction)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(
            slope,
            oracles.central_difference(moved, leaf(moving), direction, 3e-6),
            rtol=1e-6,
            atol=1e-9,
        )


class Network(esl.AbstractPotential):
    """A loss whose intermediate results outweigh its parameters by far."""

    scale: Any
    conservative = True

    def energy(self, position, batch=None):
        weights = position.reshape(4, 4)
        inputs = jnp.cos(jnp.arange(1024.0)).reshape(256, 4)
        return jnp.mean(jnp.tanh(jnp.tanh(self.scale * inputs @ weights) @ weights) ** 2)

    def energy_and_gradient(self, position, batch=None):
        return jax.value_and_grad(self.energy)(position)

    def draw(self, key, members):
        return None


class Still(esl.Driven):
    """A drive whose work is not counted."""

    @property
    def moves(self):
        return False


def test_the_gradient_keeps_positions_and_no_intermediate_results_of_the_work():
    start = jax.ShapeDtypeStruct((8, 16), jnp.float32)

    def needed(kind):
        def value(end, start):
            path = esl.simulate(
                kind(Network, esl.Linear(1.0, end)),
                esl.Langevin(0.1),
                start,
                steps=100,
                snapshots=5,
                key=KEY,
            )
            return jnp.sum(path.final**2) + jnp.sum(path.work)

        program = jax.jit(jax.grad(value)).lower(jnp.float32(2.0), start)
        return program.compile().memory_analysis().temp_size_in_bytes

    # Kept for every step they would be 100 × 8 × 256 × 8 numbers, 6.5 MB.
    assert needed(esl.Driven) < needed(Still) + 0.5e6


# The search


def test_a_search_over_drives_finds_the_least_work_and_not_the_gaps_between_snapshots():
    """Twenty-one knots and three snapshots. Trapezoids over the snapshots have no least value
    there: spikes between them, and at the ends, cost nothing. The truth is the least work of the
    discrete steps, and `driven_steps` repeats the work of the drive that was found."""
    start, steps = np.zeros((4, 1), np.float32), 40

    def work(drive, key):
        driven = esl.Driven(trap, drive, before=0.0, after=5.0)
        rule = esl.Langevin(1 / steps)
        path = esl.simulate(driven, rule, start, steps=steps, snapshots=2, key=key)
        return jnp.mean(path.work)

    ramp = esl.Knots(np.linspace(0.0, 5.0, 21), "linear")
    optimum = esl.optimize(work, ramp, key=KEY, iterations=40, rounds=2, optimizer=optax.lbfgs())
    grid = np.linspace(0, 1, steps + 1)
    found = np.interp(grid, np.linspace(0, 1, 21), np.asarray(optimum.controls.values))
    # A law of variance 1 does the same work in a trap of fixed stiffness.
    repeated, *_ = oracles.driven_steps(np.ones(steps + 1), found, ((1, 0), (1, 5)))
    np.testing.assert_allclose(optimum.value, repeated, rtol=1e-4)
    np.testing.assert_allclose(optimum.value, 8.2983193, rtol=2e-3)
    assert abs(oracles.O6["best"][0] - 8.2983193) < 0.005 * oracles.O6["best"][0]


# The equality


GRID = np.linspace(0, 1, 201)
PROCESSES = {
    "moving": (lambda: esl.Driven(trap, esl.Linear(0.0, 1.5)), 0.0),
    "stiffening": (
        lambda: esl.Driven(
            esl.Quadratic,
            esl.Knots(oracles.stiffening_drive(GRID), "linear"),
            before=1.0,
            after=2.0,
        ),
        np.log(2) / 2,
    ),
}


@functools.cache
def driven(name, members=4000):
    start = jax.random.normal(jax.random.key(3), (members, 1))
    return esl.simulate(
        PROCESSES[name][0](),
        esl.Langevin(1 / 200, 1.0),
        start,
        steps=200,
        snapshots=2,
        key=KEY,
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_work_alone_gives_the_difference_of_free_energies(name):
    found, truth = esl.jarzynski(driven(name)), PROCESSES[name][1]
    error = found.standard_error
    assert abs(found.free_energy_change - truth) < 5 * error.free_energy_change
    # Mean work, which is not the free energy, would be seen.
    assert found.work - truth > 10 * error.free_energy_change
    assert found.dissipated_work > 10 * error.dissipated_work
    assert abs(found.bias) < error.free_energy_change


def numpy_jarzynski(work, temperature):
    """ΔF, its jackknife error and bias, and the effective members, from work (runs, n)."""
    n = work.shape[1]

    def change(work):
        return -temperature * np.log(np.mean(np.exp(-work / temperature)))

    whole = change(work)
    left = np.array([change(np.delete(work, i, axis=1)) for i in range(n)])
    weights = np.exp(-work / temperature)
    return (
        whole,
        np.sqrt((n - 1) * np.var(left)),
        (n - 1) * (np.mean(left) - whole),
        weights.sum() ** 2 / (weights**2).sum(),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("runs", [1, 3])
def test_its_numbers_are_those_of_numpy_and_runs_are_pooled(runs):
    rng, temperature = np.random.default_rng(5), 0.7
    start = np.sqrt(temperature) * rng.normal(size=(9, 1))
    paths = [
        esl.simulate(
            esl.Driven(trap, esl.Linear(0.0, 2.0)),
            esl.Langevin(0.05, temperature),
            start,
            steps=20,
            snapshots=4,
            key=jax.random.key(i),
        )
        for i in range(runs)
    ]
    found = esl.jarzynski(paths[0] if runs == 1 else paths)
    work = np.array([path.work for path in paths])
    numbers = (
        found.free_energy_change,
        found.standard_error.free_energy_change,
        found.bias,
        found.effective_members,
    )
    np.testing.assert_allclose(numbers, numpy_jarzynski(work, temperature), rtol=1e-10)
    np.testing.assert_allclose(found.work, work.mean(), rtol=1e-12)
    means = work.mean(axis=0)
    np.testing.assert_allclose(
        found.standard_error.work, means.std(ddof=1) / np.sqrt(9), rtol=1e-10
    )
    assert found.members == 9 * runs
    of_runs = "" if runs == 1 else " of each of 3 runs"
    assert found.errors == f"jackknife over 9 members{of_runs}"


def test_few_members_show_their_bias():
    """Sixteen members of a trap that dissipates more than its temperature: ΔF = 0 comes out above
    0, and the jackknife sees more than half of that."""
    driven = esl.Driven(trap, esl.Linear(0.0, 2.5))

    @jax.jit
    def one(i):
        keys = jax.random.split(jax.random.fold_in(KEY, i))
        start = jax.random.normal(keys[0], (16, 1))
        path = esl.simulate(
            driven,
            esl.Langevin(0.02, 1.0),
            start,
            steps=50,
            snapshots=1,
            key=keys[1],
        )
        found = esl.jarzynski(path)
        return found.free_energy_change, found.bias

    changes, biases = jax.lax.map(one, jnp.arange(1500))
    mean, error = np.mean(changes), np.std(changes) / np.sqrt(1500)
    assert mean > 10 * error
    assert 0.5 * mean < np.mean(biases) < mean
    assert abs(mean - np.mean(biases)) > 3 * error  # what it does not see


def test_it_prints_its_numbers_and_how_far_to_trust_them():
    text = str(esl.jarzynski(driven("stiffening")))
    assert text.startswith("free energy by the Jarzynski equality; standard errors: jackknife over")
    for label in ("ΔF ", "work ⟨W⟩", "dissipated ⟨W⟩ - ΔF", "bias of ΔF", "effective members"):
        assert label in text
    assert "of 4000 members; its bias is" in text
    far = esl.simulate(
        esl.Driven(trap, esl.Linear(0.0, 6.0)),
        esl.Langevin(0.02, 1.0),
        jax.random.normal(KEY, (100, 1)),
        steps=50,
        snapshots=1,
        key=KEY,
    )
    assert "too few to trust its error and its bias" in esl.jarzynski(far).verdict()


def test_one_member_far_below_the_others_leaves_a_finite_error():
    path = driven("moving", 8)
    work = path.work_of_links.at[:, 3].add(-25.0)
    found = esl.jarzynski(dataclasses.replace(path, work_of_links=work))
    np.testing.assert_allclose(found.effective_members, 1, rtol=1e-5)
    truth = numpy_jarzynski(np.asarray(jnp.sum(work, axis=0), np.float64)[None], 1.0)
    np.testing.assert_allclose(found.standard_error.free_energy_change, truth[1], rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_it_differentiates_in_the_drive():
    start = np.random.default_rng(1).normal(size=(12, 1))

    def change(end):
        path = esl.simulate(
            esl.Driven(esl.Quadratic, esl.Linear(1.0, end)),
            esl.Langevin(0.05, 1.0),
            start,
            steps=20,
            snapshots=2,
            key=KEY,
        )
        return esl.jarzynski(path).free_energy_change

    h = 1e-5
    slope = (change(2.0 + h) - change(2.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(change)(2.0), slope, rtol=1e-7)
    assert abs(slope) > 0.1


class Unlawful(esl.AbstractRule):
    """Gradient descent that claims nothing."""

    learning_rate: esl.AbstractSchedule = esl.Constant(0.1)
    temperature: esl.AbstractSchedule = esl.Constant(1.0)

    def controls(self, steps):
        return esl.simulation.Controls(
            self.learning_rate.rates(steps), self.temperature.rates(steps)
        )

    def step(self, positions, kick, control, key):
        energies, kicks = kick(positions, control.learning_rate)
        return positions - kicks, energies


REFUSED = {
    "must hold the work on its members": lambda path: esl.from_snapshots(path.positions),
    "must hold the work on its members, .*, but was recorded, or": lambda path: dataclasses.replace(
        path, work_of_links=None
    ),
    "must come from a rule with a law": Unlawful(),
    "must have one constant temperature above 0, but has temperature 0": esl.Langevin(0.1),
    "must have one constant temperature above 0, but has temperatures from 0.625": esl.Langevin(
        0.1, esl.Linear(1.0, 0.5)
    ),
    "must hold members that feel the noise of their temperature": esl.ProbabilityFlow(
        0.1, 1.0, esl.AffineVelocity()
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_runs_for_which_the_equality_does_not_hold_are_refused(sentence, refused):
    case = REFUSED[sentence]
    rule = case if isinstance(case, esl.AbstractRule) else esl.Langevin(0.1, 1.0)
    start = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    moving = esl.Driven(trap, esl.Linear(0.0, 1.0))
    path = esl.simulate(moving, rule, start, steps=4, snapshots=2, key=KEY)
    path = path if case is rule else case(path)
    refused(lambda: esl.jarzynski(path), sentence)


def test_under_a_transformation_a_run_for_which_it_does_not_hold_gives_nan():
    start = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)

    @jax.jit
    def change(first, last):
        path = esl.simulate(
            esl.Driven(trap, esl.Linear(0.0, 1.0)),
            esl.Langevin(0.1, esl.Linear(first, last)),
            start,
            steps=4,
            snapshots=2,
            key=KEY,
        )
        return esl.jarzynski(path).free_energy_change

    assert np.isnan(change(0.0, 0.0))
    assert np.isnan(change(1.0, 0.5))
    assert np.isfinite(change(1.0, 1.0))
