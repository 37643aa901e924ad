"""Velocities by way of a density against laws whose velocity is known."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import esljax as esl

# Every class. Functions, so that no array is made before a test chooses its precision.
VELOCITIES = {
    "kde": lambda: esl.KDEVelocity(),
    "histogram": lambda: esl.HistogramVelocity(),
    "flow": lambda: esl.FlowVelocity(jax.random.key(0), steps=2),
}
# The flow compiles for tens of seconds.
every = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "flow" else ()) for name in VELOCITIES],
)


def snapshot(n=41, d=2, seed=0, dtype=np.float32):
    """A skewed, sheared cloud in a drift neither linear nor a gradient; a diffusion mixes axes."""
    rng = np.random.default_rng(seed)
    x = (
        np.column_stack([rng.gamma(4.0, size=n), *(rng.normal(size=(d - 1, n)) * 3.0)])
        @ (np.eye(d) + 0.5 * np.tri(d, k=-1)).T
    )
    drift = -x + np.roll(np.sin(x), 1, axis=1)
    diffusion = np.eye(d) * 0.2 + 0.1
    return esl.velocity.Snapshot(*(jnp.asarray(part, dtype) for part in (x, drift, diffusion)))


def once(velocity, given):
    return velocity.estimate(given, velocity.init(given.positions))[0]


# Contracts


@pytest.mark.slow
@pytest.mark.parametrize("name", VELOCITIES)
@pytest.mark.usefixtures("quick_compilation")
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    velocity = VELOCITIES[name]()
    given = [snapshot(seed=seed) for seed in range(2)]
    alone = [velocity(one.positions, one.drift, one.diffusion) for one in given]
    chex.assert_trees_all_close(once(velocity, given[0]), alone[0], rtol=1e-3, atol=1e-3)

    def stack(*parts):
        return jnp.stack(parts)

    together = eqx.filter_vmap(lambda one: once(velocity, one))(jax.tree.map(stack, *given))
    chex.assert_trees_all_close(together, jax.tree.map(stack, *alone), rtol=1e-3, atol=1e-3)


@every
@pytest.mark.usefixtures("quick_compilation")
def test_one_trace_serves_two_calls_and_the_precision_is_the_input_s(name):
    velocity = VELOCITIES[name]()
    chex.clear_trace_counter()
    traced = eqx.filter_jit(chex.assert_max_traces(once, n=1))
    for seed in range(2):
        answer = traced(velocity, snapshot(seed=seed))
        assert {leaf.dtype for leaf in jax.tree.leaves(answer)} == {np.dtype(np.float32)}
        assert answer.values.shape == (41, 2)
        assert answer.contributions.shape == (41,)


# Each compiles for twenty seconds: one by default, the others in the slow tier.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "kde" else pytest.mark.slow) for name in VELOCITIES],
)
@pytest.mark.usefixtures("quick_compilation")
def test_snapshots_follow_each_other_inside_a_scan(name):
    velocity = VELOCITIES[name]()
    given = [snapshot(seed=seed) for seed in range(2)]

    def step(state, one):
        answer, state = velocity.estimate(one, state)
        return state, answer.squared

    state = velocity.init(given[0].positions)
    scanned = jax.lax.scan(step, state, jax.tree.map(lambda *parts: jnp.stack(parts), *given))[1]
    for one, squared in zip(given, scanned, strict=True):
        answer, state = velocity.estimate(one, state)
        np.testing.assert_allclose(answer.squared, squared, rtol=1e-3)


@pytest.mark.parametrize("name", ["kde", "histogram"])
@pytest.mark.usefixtures("quick_compilation")
def test_the_shapes_of_a_diffusion_agree(name):
    """A scalar, a diagonal and a matrix agree; a matrix mixes the axes of the score."""
    velocity, given = VELOCITIES[name](), snapshot()
    answers = [
        velocity(given.positions, given.drift, d).squared
        for d in (0.3, 0.3 * jnp.ones(2), 0.3 * jnp.eye(2))
    ]
    np.testing.assert_allclose(answers[1:], answers[0], rtol=1e-4)
    unequal = [
        velocity(given.positions, given.drift, d).values
        for d in (jnp.array([0.3, 0.1]), jnp.diag(jnp.array([0.3, 0.1])))
    ]
    np.testing.assert_allclose(*unequal, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["kde", "histogram"])
@pytest.mark.usefixtures("quick_compilation")
def test_a_change_of_coordinates_changes_nothing(name):
    """Members in other units and in another place move alike.

    v scales, and the diffusion with its square.
    """
    velocity, given = VELOCITIES[name](), snapshot()
    here = velocity(given.positions, given.drift, given.diffusion)
    there = velocity(given.positions * 4 + 8, given.drift * 4, given.diffusion * 16)
    np.testing.assert_allclose(there.values, here.values * 4, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(there.squared, here.squared * 16, rtol=2e-3)


def test_a_member_is_not_judged_by_a_density_that_it_shaped():
    """One member moved far changes the velocities of the other two thirds only."""
    given = snapshot()
    moved = given.positions.at[0].add(2.0)
    for name in ("kde", "histogram"):
        velocity = VELOCITIES[name]()
        values = [
            velocity(x, given.drift, given.diffusion).values for x in (given.positions, moved)
        ]
        changed = np.any(np.asarray(values[0] != values[1]), axis=1)
        assert not changed[3::3].any()
        assert changed[0]
        assert changed[1::3].any()
        assert changed[2::3].any()


# Numbers


def of_two_modes():
    """E (∂ log q)² of ½ N(±2, ¼) by quadrature."""

    def side(x, m):
        return np.exp(-2 * (x - m) ** 2) / np.sqrt(np.pi / 2) / 2

    def slope(x):
        return -4 * ((x + 2) * side(x, -2) + (x - 2) * side(x, 2))

    return quad(lambda x: slope(x) ** 2 / (side(x, -2) + side(x, 2)), -6, 6, points=[-2, 0, 2])[0]


@pytest.mark.parametrize("name", ["kde", "histogram", pytest.param("flow", marks=pytest.mark.slow)])
def test_two_modes_that_diffuse_freely(name):
    """σ = 3.993714. The Gaussian closure answers .235; Silverman's bandwidth, .9."""
    truth = of_two_modes()
    np.testing.assert_allclose(truth, 3.993714, rtol=1e-6)
    velocity = esl.FlowVelocity(jax.random.key(0)) if name == "flow" else VELOCITIES[name]()
    ratios, errors = [], []
    for seed in range(1 if name == "flow" else 6):
        rng = np.random.default_rng(seed)
        x = (rng.choice([-2.0, 2.0], size=(2000, 1)) + 0.5 * rng.normal(size=(2000, 1))).astype(
            np.float32
        )
        answer = velocity(x, jnp.zeros_like(x), 1.0)
        ratios.append(float(answer.squared) / truth)
        errors.append(float(answer.standard_error.squared) / truth)
        assert float(esl.AffineVelocity()(x, jnp.zeros_like(x), 1.0).squared) < 0.1 * truth
    assert -0.1 < np.mean(ratios) - 1 < 3 * np.mean(errors) / np.sqrt(len(ratios))
    # `standard_error` is the spread over seeds.
    if name != "flow":
        assert 0.4 < np.std(ratios, ddof=1) / np.mean(errors) < 2.0


@pytest.mark.parametrize(
    ("name", "d"), [("kde", 1), ("kde", 2), ("kde", 10), ("histogram", 1), ("histogram", 2)]
)
@pytest.mark.parametrize("end", [False, True])
def test_an_ornstein_uhlenbeck_snapshot(name, d, end):
    """O1 at its start and at its end.

    Against the members' true velocities, so that the sampling of the members does not count.
    """
    (mean, variance) = (2 * np.exp(-1), 0.1 + 0.9 * np.exp(-2)) if end else (2.0, 1.0)
    ratios, errors = [], []
    for seed in range(3):
        center = mean * np.eye(d)[0]
        x = np.random.default_rng(seed).normal(size=(2000, d)) * np.sqrt(variance) + center
        true = -x + 0.1 * (x - center) / variance
        answer = VELOCITIES[name]()(x.astype(np.float32), -x.astype(np.float32), 0.1)
        sampled = np.sum(true**2, axis=1)
        ratios.append(float(answer.squared) / sampled.mean())
        errors.append(
            np.std(np.asarray(answer.contributions) - sampled) / np.sqrt(2000) / sampled.mean()
        )
    assert abs(np.mean(ratios) - 1) < 0.01 * (2 if d == 10 else 1) + 3 * np.mean(errors) / np.sqrt(
        3
    )


@pytest.mark.parametrize("name", ["kde", "histogram"])
def test_means_stay_below_and_follow_a_drift_that_is_not_linear(name):
    """The equilibrium p of a double well, displaced by .3: σ = ∫ p (Φ'(x + .3) - Φ'(x))².

    Affine fields miss a fifth of it.
    """

    def force(x):
        return -8 * x * (x**2 - 1)

    grid = np.linspace(-3, 3, 60001)
    weight = np.exp(-4 * (grid**2 - 1) ** 2)
    weight /= weight.sum()
    true = force(grid + 0.3) - force(grid)
    truth = np.sum(weight * true**2)
    x = np.random.default_rng(0).choice(grid, size=(2000, 1), p=weight) + 0.3
    answer = VELOCITIES[name]()(x.astype(np.float32), force(x).astype(np.float32), 0.5)
    error = float(answer.standard_error.squared)
    assert -0.1 * truth - 5 * error < float(answer.squared) - truth < 5 * error
    below = esl.AffineVelocity()(x.astype(np.float32), force(x).astype(np.float32), 0.5).squared
    assert float(below) < 0.9 * truth
    assert float(below) < float(answer.squared)


@pytest.mark.parametrize("name", ["kde", "histogram"])
def test_nothing_moves_at_equilibrium(name):
    """A Gaussian at rest, whose drift alone has σ = 1.

    σ̂ has no side on which it must lie; the bound lies below 0.
    """
    x = np.random.default_rng(0).normal(size=(2000, 1)).astype(np.float32)
    answer = VELOCITIES[name]()(x, -x, 1.0)
    assert abs(float(answer.squared)) < 5 * float(answer.standard_error.squared) + 0.005
    assert float(answer.standard_error.squared) < 0.03
    assert float(jnp.mean(answer.bound_contributions)) < 0


@pytest.mark.parametrize("name", ["kde", "histogram"])
def test_a_drift_that_scatters_about_its_mean_moves_nothing_more(name):
    """The drift of a projected law is no function of its positions.

    Only its mean at each place moves the law: σ = 1, where the score plugged in would answer 5.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 1)).astype(np.float32)
    answer = VELOCITIES[name]()(x, 1 - x + 2 * rng.normal(size=x.shape), 1.0)
    assert abs(float(answer.squared) - 1) < 4 * float(answer.standard_error.squared)
    assert float(answer.standard_error.squared) < 0.12


def test_few_members_in_many_dimensions_fall_back_on_their_moments():
    """A Gaussian displaced in 10 dimensions, of which 400 members determine only the moments.

    The answer is the affine one.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 10)).astype(np.float32)
    answer, affine = (
        velocity(x, 1 - x, 1.0) for velocity in (esl.KDEVelocity(), esl.AffineVelocity())
    )
    np.testing.assert_allclose(affine.squared, 10, rtol=0.1)
    np.testing.assert_allclose(answer.squared, affine.squared, rtol=0.02)


@pytest.mark.parametrize("name", ["kde", "histogram"])
@pytest.mark.parametrize("n", [4, 9, 45, 48])
def test_few_members_are_answered_by_their_affine_field(name, n):
    """No third with fewer than four members to spare is asked for a density.

    On a line where thirds are too small to determine a covariance of two coordinates.
    """
    given = snapshot(n=n, d=2 if n > 24 else 1)
    answer, affine = (
        velocity(given.positions, given.drift, given.diffusion)
        for velocity in (VELOCITIES[name](), esl.AffineVelocity())
    )
    assert np.isfinite(float(answer.squared))
    if name == "kde" or n < 48:  # the histogram of 16 members is no better than their moments
        assert np.isclose(answer.squared, affine.squared, rtol=1e-5) == (n < 48)


@pytest.mark.parametrize("name", ["kde", "histogram"])
@pytest.mark.usefixtures("quick_compilation")
def test_a_mixture_that_relaxes_is_estimated_without_bias_and_with_its_error(name):
    """Modes of 3 : 7 that have half merged, dθ = -θ du + sqrt(.2) dW, from 200 members, 50 times.

    Against the members' own velocities, so that the sampling of the members does not count in the
    mean; the error claimed is the spread over runs, which 50 runs know within a tenth.
    """
    u, repetitions = 0.5, 50
    means, variance = np.array([-2.0, 2.0]) * np.exp(-u), 0.1 + 0.15 * np.exp(-2 * u)

    def true(x):
        odds = 3 / 7 * jnp.exp((means[0] - means[1]) * (x - means.mean()) / variance)
        near = (means[0] * odds + means[1]) / (1 + odds)
        return -x + 0.1 * (x - near) / variance

    def one(key):
        keys = jax.random.split(key)
        x = jnp.where(jax.random.uniform(keys[0], (200, 1)) < 0.3, *means)
        x = x + variance**0.5 * jax.random.normal(keys[1], x.shape)
        answer = once(VELOCITIES[name](), esl.velocity.Snapshot(x, -x, jnp.full((), 0.1)))
        return answer.squared, answer.standard_error.squared, jnp.mean(true(x) ** 2)

    keys = jax.random.split(jax.random.key(3), repetitions)
    sigma, error, sampled = np.array(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    spread = np.std(sigma, ddof=1)
    assert abs(np.mean(sigma - sampled)) < 0.3 * spread
    assert 0.7 < np.mean(error) / spread < 1.4


def test_each_estimator_describes_itself():
    given = snapshot()
    for name in ("kde", "histogram"):
        velocity = VELOCITIES[name]()
        answer = velocity(given.positions, given.drift, given.diffusion)
        assert (answer.bound, answer.gradient_contributions) == ("lower", None)
        assert answer.divergence is not None
        assert velocity.needs_drift
        assert not velocity.moments_only
    assert "leave-one-out" in str(esl.KDEVelocity()(given.positions, given.drift, given.diffusion))
    assert "bins" in str(answer)


# Input


def test_bad_input_is_rejected(refused):
    refused(lambda: esl.FlowVelocity(0), "`key` must be made by `jax.random.key`")
    refused(
        lambda: esl.FlowVelocity(jax.random.key(0), steps=0),
        "`steps` must be an integer of at least 1",
    )
    given = snapshot(d=4)
    refused(
        lambda: esl.HistogramVelocity()(given.positions, given.drift, given.diffusion),
        "`positions` must have at most 3 coordinates",
    )
    for name in ("kde", "histogram"):
        refused(
            lambda name=name: once(
                VELOCITIES[name](), esl.velocity.Snapshot(given.positions[:, :2])
            ),
            "`snapshot` must carry `drift`, `diffusion` for this estimator, but has no",
        )
