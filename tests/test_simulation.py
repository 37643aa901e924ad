"""The ensemble tracker against NumPy, exact laws, and itself under every way of differentiating."""

import dataclasses
import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import systems
from ensembles import MODES, weigh

import esljax as esl

KEY = jax.random.key(7)
RNG = np.random.default_rng(5)


def rates_of(values) -> esl.Knots:
    """A schedule with exactly these rates at the steps of a run."""
    return esl.Knots(np.append(values, values[-1]), "linear")


# One step


@pytest.mark.usefixtures("x64")
def test_without_noise_it_is_gradient_descent():
    k, eta, steps = 0.7, 0.3, 12
    start = RNG.normal(size=(4, 3))
    path = esl.simulate(
        esl.Quadratic(k), esl.Langevin(eta), start, steps=steps, snapshots=steps, key=KEY
    )
    closed = start * (1 - eta * k) ** np.arange(steps + 1)[:, None, None]
    np.testing.assert_allclose(path.positions, closed, rtol=1e-12)
    np.testing.assert_allclose(path.energies, k * np.sum(closed**2, axis=2) / 2, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_every_step_reads_its_own_rate():
    system = systems.non_symmetric(6)
    rates = np.array([0.1, 0.4, 0.0, 0.2, 0.3, 0.05])
    start = RNG.normal(size=(3, 2))
    path = esl.simulate(
        system.potential, esl.Langevin(rates_of(rates)), start, steps=6, snapshots=2, key=KEY
    )
    truth = oracles.linear_descent(
        start, system.potential.stiffness, np.asarray(system.potential.center), rates
    )
    np.testing.assert_allclose(path.positions, truth[::3], rtol=1e-12)
    np.testing.assert_allclose(path.final, truth[-1], rtol=1e-12)
    np.testing.assert_allclose(path.rates, rates, rtol=1e-12)


def test_stationary_variance_of_the_discrete_step():
    k, temperature, eta, steps, members = 2.0, 0.3, 0.4, 16, 100_000
    truth = oracles.discrete_stationary_variance(k, temperature, eta)
    start = np.sqrt(truth) * np.random.default_rng(0).normal(size=(members, 1)).astype(np.float32)
    end = esl.simulate(
        esl.Quadratic(k), esl.Langevin(eta, temperature), start, steps=steps, snapshots=1, key=KEY
    ).final
    error = truth * np.sqrt(2 / members)
    # Noise without its factor 2 would be off by half, a step without the correction 1 - kη/2 by 40
    # %, and the tolerance is 2 %.
    assert abs(np.var(end) - truth) < 5 * error
    assert 10 * error < 0.1 * truth
    assert abs(np.mean(end)) < 5 * np.sqrt(truth / members)


def test_the_noise_is_normal_and_independent_across_steps_members_and_coordinates():
    members, d = 4000, 3
    path = esl.simulate(
        esl.Quadratic(0.0),
        esl.Langevin(0.5, 1.0),
        np.zeros((members, d), np.float32),
        steps=4,
        snapshots=4,
        key=KEY,
    )
    steps = np.diff(np.asarray(path.positions), axis=0)  # ξ itself: 2Tη = 1
    columns = steps.transpose(0, 2, 1).reshape(4 * d, members)
    correlation = columns @ columns.T / members
    np.testing.assert_allclose(correlation, np.eye(4 * d), atol=5 * np.sqrt(2 / members))
    neighbours = np.mean(steps[:, 1:] * steps[:, :-1], axis=(0, 1))
    np.testing.assert_allclose(neighbours, 0, atol=5 / np.sqrt(4 * members))
    kurtosis = np.mean(steps**4)
    assert abs(kurtosis - 3) < 5 * np.sqrt(96 / steps.size)


# Exact laws


@pytest.mark.parametrize("name", ["O1", "O3", "non-symmetric"])
def test_moments_follow_the_exact_law(name):
    # The step bias of the moments is below η/2 = .0013 relative, the standard error of 20000
    # members about five times that.
    members, steps = 20_000, 400
    system = {"O1": systems.ornstein_uhlenbeck, "O3": systems.cosine_decay}.get(
        name, lambda d, steps: systems.non_symmetric(steps)
    )(2 - (name != "non-symmetric"), steps)
    start = system.sample(members, jax.random.key(1))
    path = system.run(start, 4, KEY)
    laws = esl.gaussian.laws(
        system.law, system.potential, system.rule, steps=steps, times=np.arange(5) / 4
    )
    for positions, mean, covariance in zip(path.positions, laws.mean, laws.covariance, strict=True):
        spread = np.sqrt(np.diag(covariance))
        bias = 2 / steps
        np.testing.assert_allclose(
            np.mean(positions, axis=0), mean, atol=5 * spread.max() / np.sqrt(members) + bias
        )
        sample = np.cov(np.asarray(positions), rowvar=False).reshape(covariance.shape)
        np.testing.assert_allclose(
            sample, covariance, atol=5 * spread.max() ** 2 * np.sqrt(2 / members) + bias
        )


def test_weak_order_one():
    """Started in equilibrium, the variance departs from T by ηk/2 relative."""
    members, steps = 200_000, np.array([4, 8, 16, 32])
    start = np.random.default_rng(3).normal(size=(members, 1)).astype(np.float32)
    start = (start - start.mean()) / start.std()
    biases = []
    for count in steps:
        end = esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(2 / count, 1.0),
            start,
            steps=int(count),
            snapshots=1,
            key=KEY,
        ).final
        biases.append(np.var(np.asarray(end)) - 1)
    # To leading order the bias is η/2 (1 - e^{-4}); its next order bends the fit to 1.1, its
    # standard error (.0032 of .031) by .05.
    order = np.polyfit(np.log(1 / steps), np.log(biases), 1)[0]
    assert 0.85 < order < 1.35
    np.testing.assert_allclose(
        biases[-1],
        oracles.discrete_moments(0.0, 1.0, 1.0, 1.0, [2 / 32] * 32)[1] - 1,
        atol=5 * np.sqrt(2 / members),
    )


@pytest.mark.usefixtures("x64")
def test_order_one_along_the_flow_of_the_double_well():
    wells, steps = systems.Wells(), np.array([50, 100, 200, 400])
    errors = []
    for count in steps:
        path = esl.simulate(
            wells.potential,
            esl.Langevin(wells.time / count),
            wells.start(9),
            steps=int(count),
            snapshots=2,
            key=KEY,
        )
        errors.append(np.abs(path.positions - wells.path(9, np.asarray(path.times))).max())
    order = np.polyfit(np.log(1 / steps), np.log(errors), 1)[0]
    assert 0.95 < order < 1.1
    assert errors[-1] < 5e-3


def test_temperature_fills_both_wells():
    """E θ² of the Gibbs law, by quadrature: T enters with the right weight far from linear
    drift."""
    members, temperature = 20_000, 0.5
    grid = np.linspace(-4, 4, 4001)
    weight = np.exp(-((grid**2 - 1) ** 2) / temperature)
    second, fourth = (np.sum(weight * grid**power) / np.sum(weight) for power in (2, 4))
    start = (
        np.random.default_rng(1)
        .choice(grid, size=(members, 1), p=weight / weight.sum())
        .astype(np.float32)
    )
    end = esl.simulate(
        esl.DoubleWell(), esl.Langevin(0.01, temperature), start, steps=100, snapshots=1, key=KEY
    ).final
    assert (
        abs(np.mean(np.asarray(end) ** 2) - second)
        < 5 * np.sqrt((fourth - second**2) / members) + 0.01
    )


# Results


@pytest.mark.parametrize("snapshots", [1, 3, 12])
def test_times_positions_energies_and_final(snapshots):
    potential = esl.DoubleWell(0.4, 1.1, 2.0)
    start = RNG.normal(size=(5, 3)).astype(np.float32)
    path = esl.simulate(
        potential,
        esl.Langevin(esl.Linear(0.1, 0.01), 0.05),
        start,
        steps=12,
        snapshots=snapshots,
        key=KEY,
    )
    every = esl.simulate(
        potential, esl.Langevin(esl.Linear(0.1, 0.01), 0.05), start, steps=12, snapshots=12, key=KEY
    )
    np.testing.assert_allclose(path.times, np.arange(snapshots + 1) / snapshots, rtol=1e-6)
    assert path.positions.shape == (snapshots + 1, 5, 3)
    assert path.rates.shape == path.temperatures.shape == (12,)
    np.testing.assert_allclose(path.rates, 0.1 - 0.09 * np.arange(12) / 12, rtol=1e-5)
    np.testing.assert_allclose(
        path.positions, every.positions[:: 12 // snapshots], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(path.positions[0], start)
    np.testing.assert_array_equal(path.positions[-1], path.final)
    np.testing.assert_allclose(path.energies, potential(path.positions), rtol=1e-5, atol=1e-6)
    assert not path.observed


class Radius(eqx.Module):
    scale: Any

    def __call__(self, position):
        return self.scale * jnp.stack([jnp.linalg.norm(position), position[0]])


def test_observed_features_are_those_of_the_positions():
    start = RNG.normal(size=(5, 3)).astype(np.float32)
    run = functools.partial(
        esl.simulate,
        esl.Quadratic(1.0),
        esl.Langevin(0.1, 0.05),
        start,
        steps=12,
        snapshots=4,
        key=KEY,
    )
    full, seen = run(), run(observe=Radius(jnp.array(2.0)))
    np.testing.assert_allclose(
        seen.positions, jax.vmap(jax.vmap(Radius(2.0)))(full.positions), rtol=1e-5
    )
    np.testing.assert_allclose(seen.final, full.final, rtol=1e-6)
    np.testing.assert_allclose(seen.energies, full.energies, rtol=1e-6)
    assert seen.observed
    assert str(seen) == "Trajectory: 5 members of 2 features, 12 steps, 5 snapshots"
    for gradient in (esl.HessianAdjoint(recompute=True), esl.ForwardMode(most=1)):
        slope = jax.grad(
            lambda scale, gradient=gradient: jnp.sum(
                run(observe=Radius(scale), gradient=gradient).positions
            )
        )(2.0)
        np.testing.assert_allclose(slope, np.sum(seen.positions) / 2, rtol=1e-4)


def test_energies_of_minibatches_are_those_that_the_next_step_sees():
    potential = network(batch_size=3, dtype=np.float32)
    start = potential.init(members=4, key=jax.random.key(2))
    path = esl.simulate(potential, esl.Langevin(0.0), start, steps=600, snapshots=600, key=KEY)
    # Nothing moves, so all that changes from row to row is the batch.
    assert np.ptp(np.asarray(path.energies), axis=0).min() > 0
    assert not np.any(path.energies[-1] == path.energies[0])
    error = np.std(path.energies, axis=0) / np.sqrt(601)
    assert np.all(np.abs(np.mean(path.energies, axis=0) - potential(start)) < 5 * error)


# Addressed noise


def test_the_noise_of_a_step_is_that_of_its_key():
    start, draws = jnp.zeros((5, 3)), []
    rule = esl.Langevin(0.1, 0.2)
    path = esl.simulate(esl.Quadratic(0.0), rule, start, steps=4, snapshots=4, key=KEY)
    for k in range(4):
        key = jax.random.fold_in(jax.random.fold_in(KEY, k), 1)
        draws.append(np.sqrt(2 * 0.2 * 0.1) * jax.random.normal(key, (5, 3)))
    np.testing.assert_allclose(path.positions[1:], np.cumsum(draws, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layout is for a CPU")
def test_noise_is_drawn_in_one_row():
    start, rule = jnp.zeros((40, 5)), esl.Langevin(0.1, 0.2)
    run = functools.partial(esl.simulate, esl.Quadratic(1.0), steps=4, snapshots=2)
    # The bits of the noise are the only integers of such sizes.
    program = jax.jit(run).lower(rule, start, key=KEY).compile().as_text()
    assert "u32[200]" in program
    assert "u32[40,5]" not in program


def network(batch_size=None, dtype=np.float64):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(12, 2)), dtype)
    return esl.FlaxLoss(
        esl.potentials.mlp(2, 3, 2),
        (inputs, jnp.asarray(rng.integers(0, 2, 12))),
        l2=0.1,
        batch_size=batch_size,
    )


def test_numbers_do_not_depend_on_snapshots_recomputation_or_more_members():
    potential, rule = network(4, np.float32), esl.Langevin(0.3, 0.01)
    start = potential.init(members=6, key=jax.random.key(2))
    run = functools.partial(esl.simulate, potential, rule, steps=24, key=KEY)
    truth = run(start, snapshots=4)
    for other in (
        run(start, snapshots=24),
        run(start, snapshots=2, gradient=esl.HessianAdjoint(recompute=True)),
        run(start, snapshots=2, gradient=esl.ForwardMode()),
    ):
        np.testing.assert_allclose(other.final, truth.final, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        run(start[:3], snapshots=4).positions, truth.positions[:, :3], rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(
        run(start, snapshots=4, key=jax.random.key(8)).final, truth.final, atol=1e-3
    )


def test_runs_side_by_side_draw_noise_only_at_a_temperature(monkeypatch):
    """By vmap over the learning rates, as a study runs them."""
    normal, drawn = jax.random.normal, []

    def counted(key, shape, dtype):
        jax.debug.callback(lambda: drawn.append(1))
        return normal(key, shape, dtype)

    start, key = jnp.ones((5, 2)), jax.random.key(0)
    monkeypatch.setattr(jax.random, "normal", counted)

    def final(rate, temperature):
        rule = esl.Langevin(rate, temperature=temperature)
        path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=4, snapshots=2, key=key)
        return path.final

    rates, nothing = jnp.array([0.1, 0.2, 0.3]), jnp.zeros(3)
    shared, own = (jax.jit(jax.vmap(final, in_axes=(0, axis))) for axis in (None, 0))
    warm = jnp.array([0.0, 1e-3, 0.0])
    # Runs of one key have one noise, whatever their temperatures are.
    for run, temperature, steps in (
        (shared, 0.0, 0),
        (shared, 1e-3, 4),
        (own, nothing, 0),
        (own, warm, 4),
    ):
        drawn.clear()
        found = jax.block_until_ready(run(rates, temperature))
        jax.effects_barrier()
        assert len(drawn) == steps, temperature
    one_by_one = [final(rate, each) for rate, each in zip(rates, warm, strict=True)]
    np.testing.assert_allclose(found, one_by_one, rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_devices_of_a_shard_map_have_noise_of_their_own_keys(checked):
    start, rule = jnp.ones((4, 2)), esl.Langevin(0.1, 0.2)
    run = functools.partial(esl.simulate, esl.Quadratic(1.0), rule, steps=4, snapshots=2)

    def of_a_device(start):
        key = jax.random.fold_in(KEY, jax.lax.axis_index("members"))
        return run(start, key=key).final

    across = jax.sharding.PartitionSpec("members")
    mesh = esl.member_mesh(1)
    many = jax.shard_map(
        of_a_device, mesh=mesh, in_specs=across, out_specs=across, check_vma=checked
    )
    alone = run(start, key=jax.random.fold_in(KEY, 0), mesh=mesh).final
    np.testing.assert_allclose(jax.jit(many)(start), alone, rtol=1e-6)


def test_members_and_steps_have_noise_and_batches_of_their_own():
    potential = network(4, np.float32)
    batches = np.asarray(potential.draw(jax.random.key(0), 5))
    assert len({tuple(row) for row in batches}) == 5
    start = jnp.broadcast_to(potential.init(members=1, key=jax.random.key(2)), (3, 17))
    for rule in (esl.Langevin(0.3), esl.Langevin(1e-6, 1.0)):
        path = np.asarray(
            esl.simulate(potential, rule, start, steps=2, snapshots=2, key=KEY).positions
        )
        first, second = path[1] - path[0], path[2] - path[1]
        for one, other in [(first[0], first[1]), (first[1], first[2]), (first[0], second[0])]:
            assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


# Gradients

SYSTEMS = {
    "double well": lambda: (esl.DoubleWell(0.7, 0.9, 2.0), RNG.normal(size=(3, 2))),
    "non-symmetric": lambda: (
        esl.Quadratic(np.array([[1.0, 2.0], [-1.5, 0.7]]), np.array([0.5, -1.0])),
        RNG.normal(size=(3, 2)),
    ),
    "minibatches": lambda: (
        network(4),
        network(4).init(members=2, key=jax.random.key(2)).astype(float),
    ),
}


def scalar_of(path) -> Any:
    """Every differentiable number of a trajectory, with weights that share no symmetry."""
    return (
        weigh(path.positions)
        + weigh(jnp.sin(path.energies))
        + weigh(path.final**2)
        + weigh(path.rates)
        + weigh(path.temperatures)
    )


@eqx.filter_jit
def value_and_gradient(arguments, gradient):
    @eqx.filter_value_and_grad
    def value(arguments):
        potential, rule, positions = arguments
        return scalar_of(
            esl.simulate(
                potential, rule, positions, steps=12, snapshots=3, key=KEY, gradient=gradient
            )
        )

    return value(arguments)


def arguments_of(name):
    potential, positions = SYSTEMS[name]()
    rule = esl.Langevin(esl.Knots([0.05, 0.2, 0.1]), esl.Linear(0.3, 0.1))
    return jax.tree.map(
        lambda x: jnp.asarray(x, float) if eqx.is_inexact_array(x) else x,
        (potential, rule, jnp.asarray(positions)),
    )


@pytest.mark.usefixtures("x64", "quick_compilation")
@pytest.mark.parametrize(
    "name", [pytest.param("double well", marks=pytest.mark.slow), "non-symmetric", "minibatches"]
)
def test_all_ways_of_differentiating_agree_with_each_other_and_with_central_differences(name):
    arguments = arguments_of(name)
    results = [value_and_gradient(arguments, mode) for mode in MODES]
    truth = results[0]
    for other in results[1:]:
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())

    moving, fixed = eqx.partition(arguments, eqx.is_inexact_array)
    value = jax.jit(
        lambda moving: value_and_gradient(eqx.combine(moving, fixed), esl.HessianAdjoint())[0]
    )
    rng, leaves = np.random.default_rng(11), len(jax.tree.leaves(moving))
    for chosen in range(
        leaves
    ):  # each leaf alone: both schedules, the positions, every parameter of the potential
        directions = [
            rng.normal(size=x.shape) * (i == chosen) for i, x in enumerate(jax.tree.leaves(moving))
        ]
        direction = jax.tree.unflatten(jax.tree.structure(moving), directions)
        h = 3e-6
        shifted = [
            value(jax.tree.map(lambda x, u, step=step: x + step * u, moving, direction))
            for step in (h, -h)
        ]
        slope = sum(
            np.sum(g * u) for g, u in zip(jax.tree.leaves(truth[1]), directions, strict=True)
        )
        difference = (shifted[0] - shifted[1]) / (2 * h)
        assert abs(slope) > 1e-4  # a leaf that nothing depends on would test nothing
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64", "quick_compilation")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("non-symmetric", esl.Autodiff(recompute=True)),
        ("minibatches", esl.Autodiff()),
        ("minibatches", esl.ForwardMode()),
    ],
)
def test_forward_mode(name, mode):
    potential, rule, positions = arguments_of(name)

    def ends(values):
        run = esl.simulate(
            potential,
            rule.replace(learning_rate=esl.Knots(values)),
            positions,
            steps=12,
            snapshots=3,
            key=KEY,
            gradient=mode,
        )
        return run.final

    values = jnp.array([0.05, 0.2, 0.1])
    jacobian = jax.jacfwd(ends)(values)
    reverse = jax.jacrev(functools.partial(_ends_by_adjoint, potential, rule, positions))(values)
    np.testing.assert_allclose(jacobian, reverse, rtol=1e-9, atol=1e-11)
    direction = jnp.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(
        jax.jvp(ends, (values,), (direction,))[1], jacobian @ direction, rtol=1e-9, atol=1e-11
    )


def _ends_by_adjoint(potential, rule, positions, values):
    return esl.simulate(
        potential,
        rule.replace(learning_rate=esl.Knots(values)),
        positions,
        steps=12,
        snapshots=3,
        key=KEY,
    ).final


def test_what_a_way_cannot_do_it_refuses():
    start = RNG.normal(size=(4, 3)).astype(np.float32)

    def energy(x, mode):
        return jnp.sum(
            esl.simulate(
                esl.DoubleWell(), esl.Langevin(0.1), x, steps=4, snapshots=2, key=KEY, gradient=mode
            ).energies
        )

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: energy(x, esl.HessianAdjoint()), (start,), (start,))
    with pytest.raises(
        esl.InputError,
        match=r"^ForwardMode would push 12 tangents, but `most` allows 11: raise `most` or use",
    ):
        jax.grad(energy)(start, esl.ForwardMode(most=11))
    chex.assert_trees_all_close(
        jax.grad(energy)(start, esl.ForwardMode(most=12)),
        jax.grad(energy)(start, esl.HessianAdjoint()),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", [*MODES[:1], *MODES[2:3], MODES[4]])
def test_gradient_is_finite_without_noise_and_without_motion(mode):
    start = RNG.normal(size=(3, 2)).astype(np.float32)

    def value(rate, temperature):
        run = esl.simulate(
            esl.DoubleWell(),
            esl.Langevin(rate, temperature),
            start,
            steps=4,
            snapshots=2,
            key=KEY,
            gradient=mode,
        )
        return scalar_of(run)

    for at in [(0.1, 0.0), (0.0, 0.1), (0.0, 0.0)]:
        chex.assert_tree_all_finite(jax.grad(value, (0, 1))(*at))


def test_second_derivatives_through_autodiff():
    start = RNG.normal(size=(3, 2)).astype(np.float32)

    def value(rate):
        return jnp.sum(
            esl.simulate(
                esl.Quadratic(1.0),
                esl.Langevin(rate),
                start,
                steps=2,
                snapshots=1,
                key=KEY,
                gradient=esl.Autodiff(),
            ).final
            ** 2
        )

    # (1 - η)⁴ |θ|²
    np.testing.assert_allclose(jax.hessian(value)(0.1), 12 * 0.9**2 * np.sum(start**2), rtol=1e-5)


# Transformations, types, memory


def test_vmap_is_a_loop_and_jit_changes_nothing():
    start = RNG.normal(size=(4, 2)).astype(np.float32)

    def run(key):
        return esl.simulate(
            esl.DoubleWell(), esl.Langevin(0.1, 0.1), start, steps=8, snapshots=4, key=key
        )

    keys = jax.random.split(KEY, 3)
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[run(key) for key in keys])
    chex.assert_trees_all_close(jax.vmap(run)(keys), loop, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.jit(run)(KEY), run(KEY), rtol=1e-5, atol=1e-6)
    rates = jnp.array([0.1, 0.2])
    swept = jax.vmap(
        lambda rate: (
            esl.simulate(
                esl.DoubleWell(), esl.Langevin(rate), start, steps=4, snapshots=2, key=KEY
            ).final
        )
    )(rates)
    np.testing.assert_allclose(
        swept[1],
        esl.simulate(
            esl.DoubleWell(), esl.Langevin(0.2), start, steps=4, snapshots=2, key=KEY
        ).final,
        rtol=1e-5,
    )
    assert (
        str(jax.vmap(run)(keys))
        == "Trajectory: 3 runs, each 4 members of 2 coordinates, 8 steps, 5 snapshots"
    )


def test_new_numbers_do_not_compile_anew():
    calls = []

    def spied(position):
        calls.append(None)
        return jnp.sum(position**2) / 2

    potential, start = esl.FromFunction(spied), np.ones((2, 2), np.float32)
    for rate, temperature in [(0.1, 0.0), (0.2, 0.3)]:
        esl.simulate(
            potential, esl.Langevin(rate, temperature), start, steps=4, snapshots=2, key=KEY
        )
        if rate == 0.1:
            traced = len(calls)
    assert len(calls) == traced


@pytest.mark.usefixtures("x64")
def test_single_precision_stays_single():
    start = RNG.normal(size=(3, 17)).astype(np.float32)
    for potential in (esl.DoubleWell(), network(4, np.float32)):
        path = esl.simulate(
            potential,
            esl.Langevin(esl.Knots([0.1, 0.2]), 0.1),
            start,
            steps=4,
            snapshots=2,
            key=KEY,
        )
        assert {x.dtype for x in jax.tree.leaves(path)} == {np.dtype(np.float32)}
        slope = jax.grad(
            lambda x, potential=potential: jnp.sum(
                esl.simulate(potential, esl.Langevin(0.1), x, steps=4, snapshots=2, key=KEY).final
            )
        )(start)
        assert slope.dtype == np.float32


def memory(steps, gradient, snapshots=20):
    start = jnp.ones((64, 250), jnp.float32)

    def value(rate):
        return jnp.sum(
            esl.simulate(
                esl.DoubleWell(),
                esl.Langevin(rate, 0.1),
                start,
                steps=steps,
                snapshots=snapshots,
                key=KEY,
                gradient=gradient,
            ).energies
        )

    return jax.jit(jax.grad(value)).lower(0.01).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_grows_with_the_root_of_the_steps():
    state = 64 * 250 * 4
    few, many = (memory(steps, esl.HessianAdjoint(recompute=True)) for steps in (100, 1600))
    assert many < 6 * few
    assert many < 250 * state  # 2√K = 80 states, the snapshots, and what one step needs
    assert memory(1600, esl.HessianAdjoint()) > 1600 * state  # what it saves


@pytest.mark.slow
def test_memory_of_the_other_ways():
    state = 64 * 250 * 4
    assert memory(1600, esl.Autodiff(recompute=True)) < 6 * memory(
        100, esl.Autodiff(recompute=True)
    )
    assert memory(1600, esl.ForwardMode()) < 100 * state


@pytest.mark.parametrize(
    ("steps", "snapshots", "length"),
    [(1600, 20, 40), (100, 20, 5), (200, 20, 10), (7, 7, 1), (1024, 1, 32), (14, 2, 7)],
)
def test_groups(steps, snapshots, length):
    assert esl.simulation.group_length(steps, snapshots) == length


# Bad input

GOOD = {
    "rule": esl.Langevin(0.1, 0.1),
    "positions": np.ones((3, 2), np.float32),
    "steps": 10,
    "snapshots": 5,
    "gradient": None,
}


class Rule(esl.AbstractRule):
    """Gradient descent from outside, but for what a test changes."""

    learning_rate: esl.AbstractSchedule = esl.Constant(0.1)
    temperature: esl.AbstractSchedule = esl.Constant(0.0)
    table: Any = eqx.field(static=True, default=None)
    answer: Any = eqx.field(static=True, default=None)

    def controls(self, steps):
        rates = self.learning_rate.rates(steps), self.temperature.rates(steps)
        return rates if self.table else esl.simulation.Controls(*rates)

    def step(self, positions, kick, control, key):
        energies, kicks = kick(positions, control.learning_rate)
        return self.answer(positions - kicks, energies)


class OneKick(esl.AbstractGradient):
    """The same kick for all members."""

    recompute: bool = False

    def kick(self, potential, positions, scale, key):
        energies, kicks = esl.Autodiff().kick(potential, positions, scale, key)
        return energies, kicks[0]

    def wrap(self, run):
        return run


class SharedBatch(esl.AbstractPotential):
    """One batch of as many examples as there are members, for all of them."""

    conservative = True

    def energy(self, position, batch=None):
        return jnp.sum(position**2)

    def energy_and_gradient(self, position, batch=None):
        return jax.value_and_grad(self.energy)(position)

    def draw(self, key, members):
        return jax.random.randint(key, (3,), 0, 10)


class Lawful(Rule):
    """The same with a law from outside."""

    claim: Any = eqx.field(static=True, default=None)
    answer: Any = eqx.field(static=True, default=lambda x, energies: (x, energies))

    def law(self, control):
        return self.claim(control)


def halved(control):
    return esl.simulation.Diffusion(control.learning_rate / 2, 0.3, injected=0.1)


BAD = {
    r"`rule` must return a Diffusion or None from `law`, but Lawful.law returns": {
        "rule": Lawful(claim=lambda control: control.learning_rate)
    },
    r"`rule` must claim one temperature of each step .*, but claims numbers of shape \(2,\)": {
        "rule": Lawful(claim=lambda c: esl.simulation.Diffusion(c.learning_rate, jnp.ones(2), 0.0))
    },
    "`mobility of the law` must be at least 0": {
        "rule": Lawful(claim=lambda c: esl.simulation.Diffusion(-c.learning_rate, 0.0, 0.0))
    },
    r"`positions` must be finite, but has 1 entries that are not, the first at index \(1, 0\)": {
        "positions": np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32)
    },
    r"`positions` must have shape \(n, d\), one row per member, but has shape \(3,\)": {
        "positions": np.ones(3, np.float32)
    },
    "`positions` must hold at least 2 members, but holds 1": {
        "positions": np.ones((1, 2), np.float32)
    },
    "`positions` must have at least one coordinate": {"positions": np.ones((3, 0), np.float32)},
    "`positions` must hold floating-point numbers, .*, but has dtype int32": {
        "positions": np.ones((3, 2), np.int32)
    },
    "`steps` must be an integer of at least 1, but is 0": {"steps": 0},
    "`steps` must be an integer of at least 1, but is 10.0": {"steps": 10.0},
    "`snapshots` must be an integer of at least 1, but is 0": {"snapshots": 0},
    r"`snapshots` must divide the 10 steps \(such as 2 or 5\), but is 3": {"snapshots": 3},
    "`snapshots` must divide the 10 steps .*, but is 20": {"snapshots": 20},
    "`learning_rate` must be at least 0 and not NaN, but has the value -0.1": {
        "rule": esl.Langevin(-0.1, 0.1)
    },
    "`learning_rate` must be finite": {"rule": esl.Langevin(np.nan, 0.1)},
    "`learning_rate` must be one number at each training time": {
        "rule": esl.Langevin(esl.Constant(np.ones(3)), 0.1)
    },
    "`temperature` must be at least 0 and not NaN, but has the value": {
        "rule": esl.Langevin(0.1, esl.Linear(0.1, -0.1))
    },
    "`temperature` must be finite": {"rule": esl.Langevin(0.1, np.inf)},
    r"`rule` must be a rule such as Langevin\(learning_rate, temperature\), but is a float": {
        "rule": 0.1
    },
    "`rule` must be a rule": {"rule": esl.Langevin},
    r"`gradient` must be HessianAdjoint\(\), Autodiff\(\) or ForwardMode\(\), but is 'reverse'": {
        "gradient": "reverse"
    },
    r"`potential` must be a potential such as Quadratic\(1.0\), .*, but is a function": {
        "potential": lambda x: 0.0
    },
    r"`potential` must accept members of 2 coordinates, but fails on them": {
        "potential": esl.Quadratic(np.eye(3))
    },
    r"`rule` must return Controls from `controls`, but Rule.controls returns \(an array": {
        "rule": Rule(table=True)
    },
    r"`rule` must return positions of shape \(\d, 2\) and energies of shape \(\d,\) from `step`, "
    "but Rule.step returns an array of shape": {"rule": Rule(answer=lambda x, energies: x)},
    r"from `step`, but Rule.step returns \(an array of shape \(\d, 2\), an array of shape \(\)\)": {
        "rule": Rule(answer=lambda x, energies: (x, jnp.mean(energies)))
    },
    r"`gradient` must return energies of shape \(\d,\) and kicks of shape \(\d, 2\) from `kick`, "
    r"but OneKick.kick returns \(an array of shape \(\d,\), an array of shape \(2,\)\)": {
        "gradient": OneKick()
    },
    r"`potential` must draw batches with a leading axis of length `members`, but draws shapes "
    r"\[\(3,\)\] for one member": {"potential": SharedBatch()},
    "`key` must be made by `jax.random.key`": {"key": 0},
    "`observe` must be a function of one member": {"observe": 3},
    r"`observe` must return shape \(p,\) for one member, but returns shape \(\)": {
        "observe": jnp.sum
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence, refused):
    arguments = {"potential": esl.Quadratic(1.0), "key": KEY, **GOOD, **BAD[sentence]}
    potential, rule, positions = (
        arguments.pop(name) for name in ("potential", "rule", "positions")
    )
    refused(lambda: esl.simulate(potential, rule, positions, **arguments), sentence)


def test_under_a_transformation_bad_values_come_out_as_nan():
    start = np.ones((3, 2), np.float32)
    end = jax.jit(
        lambda rate: (
            esl.simulate(
                esl.Quadratic(1.0), esl.Langevin(rate, 0.1), start, steps=4, snapshots=2, key=KEY
            ).final
        )
    )(-0.1)
    assert np.isnan(end).all()


# Laws


def test_a_trajectory_keeps_the_law_of_its_rule():
    start, schedule = np.ones((3, 2), np.float32), esl.Linear(0.1, 0.3)
    options = {"steps": 4, "snapshots": 2, "key": KEY}

    def run(rule):
        return esl.simulate(esl.Quadratic(1.0), rule, start, **options)

    path = run(esl.Langevin(schedule, 0.5))
    for name, truth in (
        ("mobility", schedule.rates(4)),
        ("temperature", np.full(4, 0.5)),
        ("injected", np.full(4, 0.5)),
    ):
        np.testing.assert_allclose(getattr(path.law, name), truth, rtol=1e-6)
    flow = run(esl.ProbabilityFlow(schedule, 0.5, esl.AffineVelocity())).law
    np.testing.assert_array_equal(flow.injected, 0)
    np.testing.assert_allclose(flow.temperature, 0.5)
    outside = run(Lawful(claim=halved))
    np.testing.assert_allclose(outside.rates, 0.05, rtol=1e-6)
    np.testing.assert_allclose(outside.law.mobility, 0.05, rtol=1e-6)
    np.testing.assert_allclose((outside.temperatures[0], outside.law.injected[0]), (0.3, 0.1))
    unlawful = run(Rule(answer=lambda x, energies: (x, energies)))
    assert unlawful.law is None
    np.testing.assert_allclose(unlawful.rates, 0.1)
    assert esl.from_snapshots(path.positions).law is None


def test_the_law_is_made_of_the_arrays_of_the_trajectory():
    start = np.ones((3, 2), np.float32)
    path = esl.simulate(
        esl.Quadratic(1.0), esl.Langevin(0.1, 0.5), start, steps=4, snapshots=2, key=KEY
    )
    faster = dataclasses.replace(path, rates=3 * path.rates)
    np.testing.assert_array_equal(faster.law.mobility, 3 * path.law.mobility)
    by_hand = esl.Trajectory(
        times=path.times,
        positions=path.positions,
        energies=path.energies,
        rates=path.rates,
        temperatures=path.temperatures,
        final=path.final,
        observed=False,
    )
    for ours, theirs in zip(jax.tree.leaves(by_hand.law), jax.tree.leaves(path.law), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    warmer = dataclasses.replace(by_hand, temperatures=2 * path.temperatures)
    np.testing.assert_array_equal(warmer.law.injected, 2 * path.temperatures)


def test_measures_know_a_rule_by_its_law_alone(refused):
    """D, U and the floor of a law from outside are its own; of a rule without one they are None."""
    start = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)

    def run(rule):
        return esl.simulate(esl.Quadratic(1.0), rule, start, steps=4, snapshots=2, key=KEY)

    def report(path, **options):
        return esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0, **options)

    outside, unlawful = run(Lawful(claim=halved)), run(Rule(answer=lambda *moved: moved))
    np.testing.assert_allclose(report(outside).learning_time, 4 * 0.05, rtol=1e-6)
    # 2 d Σ_j Σ_{k∈j} T η/Δs with d = 2 and two links of two steps.
    np.testing.assert_allclose(report(outside).noise_floor, 2 * 2 * 4 * 0.05 * 0.1 / 0.5, rtol=1e-6)
    unknown = report(unlawful)
    assert unknown.dissipation is unknown.learning_time is unknown.noise_floor is None
    np.testing.assert_allclose(unknown.entropy_production, report(outside).entropy_production)
    assert "which the rule does not state" in unknown.verdict()
    velocity = esl.TransportVelocity(esl.ExactTransport())
    followed = report(unlawful, velocity=velocity)
    assert followed.dissipation is None
    np.testing.assert_allclose(
        followed.entropy_production,
        report(outside, velocity=velocity).entropy_production,
        rtol=1e-4,
    )
    refused(
        lambda: report(unlawful, velocity=esl.KDEVelocity(), potential=esl.Quadratic(1.0)),
        "must be TransportVelocity.* for a run whose rule claims no law",
    )


@pytest.mark.parametrize("gradient", [esl.HessianAdjoint, esl.Autodiff])
def test_recompute_was_called_checkpoint(gradient):
    message = rf"{gradient.__name__}\(checkpoint=\) is now {gradient.__name__}\(recompute=\)"
    for recompute in (True, False):
        with pytest.warns(DeprecationWarning, match=message):
            assert gradient(checkpoint=recompute) == gradient(recompute=recompute)
