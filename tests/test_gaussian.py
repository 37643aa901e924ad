"""The exact Gaussian laws against the reference numbers, an independent integrator, and the
inequalities they must obey."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

import esljax as esl
from esljax._numerics import exponential, lyapunov, sqrtm
from esljax.gaussian import (
    Law,
    entropic_transport,
    laws,
    optimal_learning_rate,
    sinkhorn_divergence,
    speed_limit,
    w2_squared,
)

pytestmark = pytest.mark.usefixtures("x64")


class Trap(eqx.Module):
    stiffness: Any = 1.0
    center: Any = 0.0


class Rule(eqx.Module):
    learning_rate: Any
    temperature: Any


def constant_rule(mobility=1.0, temperature=0.1):
    return Rule(esl.Constant(mobility), esl.Constant(temperature))


def start(d):
    return Law(2.0 * np.eye(d)[0], np.eye(d))


def agree(value, printed, digits=8):
    """To half a unit of the last printed digit, and no looser than the printed digits allow."""
    assert abs(float(value) - printed) <= 0.5000001 * 10.0 ** (
        np.floor(np.log10(abs(printed))) + 1 - digits
    ), (float(value), printed)


class Mobility(eqx.Module):
    """constant + slope s + wave cos πs + decay e^{-5s}: every row of O3 in one class, so that they
    share one compilation."""

    constant: Any
    slope: Any = 0.0
    wave: Any = 0.0
    decay: Any = 0.0

    def __call__(self, s):
        return (
            self.constant
            + self.slope * s
            + self.wave * jnp.cos(jnp.pi * s)
            + self.decay * jnp.exp(-5 * s)
        )


def mobility_of(row):
    return Mobility(*(jnp.asarray(x, float) for x in row))


MOBILITIES = {
    "2": (2.0, 0.0, 0.0, 0.0),
    "4(1-s)": (4.0, -4.0, 0.0, 0.0),
    "2(1+cos πs)": (2.0, 0.0, 2.0, 0.0),
    "∝ exp(-5s)": (0.0, 0.0, 0.0, 10 / (1 - np.exp(-5))),
    "4s": (0.0, 4.0, 0.0, 0.0),
}
NON_NORMAL = np.array([[2.0, 0.9, 0.0], [-0.4, 1.0, 0.7], [0.3, 0.0, 0.5]])
COVARIANCE = np.array([[1.0, 0.3, 0.1], [0.3, 0.5, -0.2], [0.1, -0.2, 2.0]])
MEAN = np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("d", [1, 10])
def test_ornstein_uhlenbeck(d):
    report = speed_limit(start(d), Trap(), Rule(esl.Constant(0.01), esl.Constant(0.1)), steps=100)
    sigma, length_squared, distance = oracles.O1[d]
    agree(report.entropy_production, sigma, 9)
    agree(report.length_squared, length_squared, 9)
    agree(report.w2_squared, distance, 9)
    truth = oracles.ornstein_uhlenbeck(1.0, 0.1, 1.0, 2.0, d, 1.0)
    np.testing.assert_allclose(
        (report.dissipation, report.length_squared, report.w2_squared), truth, rtol=1e-11
    )
    assert abs(report.housekeeping) < 1e-14
    assert bool(report.converged)
    assert report.standard_error is None
    np.testing.assert_allclose(report.speed[0] ** 2, 4 + d * 0.81, rtol=1e-5)
    assert bool(jnp.all(jnp.diff(report.times) > 0))


@pytest.mark.parametrize("x", oracles.O2)
def test_translation(x):
    report = speed_limit(Law([2.0], [[0.1]]), Trap(), constant_rule(x), steps=1)
    agree(report.entropy_production / report.w2_squared, oracles.O2[x])


@pytest.mark.parametrize("d", [1, 10])
@pytest.mark.parametrize("mobility", MOBILITIES)
def test_schedules_change_only_the_clock(mobility, d):
    report = speed_limit(
        start(d), Trap(), Rule(mobility_of(MOBILITIES[mobility]), esl.Constant(0.1)), steps=1
    )
    agree(report.entropy_production, oracles.O3_ENTROPY_PRODUCTION[d][mobility])
    agree(report.dissipation, oracles.O3_PATH[d][0])
    agree(report.length_squared, oracles.O3_PATH[d][1])
    agree(report.w2_squared, oracles.O3_PATH[d][2])
    np.testing.assert_allclose(report.learning_time, 2, rtol=1e-12)
    truth = oracles.ornstein_uhlenbeck(1.0, 0.1, 1.0, 2.0, d, 2.0)
    np.testing.assert_allclose(
        (report.dissipation, report.length_squared, report.w2_squared), truth, rtol=1e-11
    )


@pytest.mark.parametrize("d", [1, 10])
def test_optimal_learning_rate(d):
    rate = optimal_learning_rate(start(d), Trap(), temperature=0.1, learning_time=2.0, steps=50)
    if d == 1:
        np.testing.assert_allclose(
            [50 * rate(s) for s in (0.0, 0.5, 1.0)], oracles.O3_OPTIMUM, rtol=2e-8
        )
    report = speed_limit(start(d), Trap(), Rule(rate, esl.Constant(0.1)), steps=50)
    np.testing.assert_allclose(report.entropy_production, oracles.O3_PATH[d][1], rtol=1e-6)
    np.testing.assert_allclose(report.entropy_production, report.length_squared, rtol=1e-10)
    np.testing.assert_allclose(report.learning_time, 2, rtol=2e-6)


def test_optimal_learning_rate_of_a_translation_is_the_closed_form():
    rate = optimal_learning_rate(
        Law([1.0], [[0.0]]), Trap(2.0, 3.0), temperature=0.0, learning_time=0.7, steps=10, knots=33
    )
    r, s = 1 - np.exp(-1.4), np.linspace(0, 1, 33)
    np.testing.assert_allclose(rate.values, r / (2 * (1 - r * s)) / 10, rtol=1e-9)


@pytest.mark.parametrize("time", oracles.O5)
def test_two_modes_without_width(time):
    report = speed_limit(
        Law([1.0, 1.0], np.zeros((2, 2))),
        Trap(np.array([1.0, 10.0])),
        constant_rule(time, 0.0),
        steps=1,
    )
    sigma, length_squared, distance = oracles.O5[time]
    agree(report.entropy_production, sigma)
    agree(report.length_squared, length_squared)
    agree(report.w2_squared, distance)


def test_stationary_rotation_is_all_housekeeping():
    trap = Trap(np.array([[1.0, -2.0], [2.0, 1.0]]))
    report = speed_limit(Law([0.0, 0.0], 0.5 * np.eye(2)), trap, constant_rule(3.0, 0.5), steps=1)
    np.testing.assert_allclose(report.entropy_production, 4 * 3.0**2, rtol=1e-12)
    assert report.circulation == "resolved"
    np.testing.assert_allclose(report.metric_action, 0, atol=1e-12)
    assert report.best("entropy_production") == report.entropy_production
    np.testing.assert_allclose(report.housekeeping, 4 * 3.0**2, rtol=1e-12)
    np.testing.assert_allclose((report.w2_squared, report.length_squared), 0, atol=1e-12)
    gradient = eqx.filter_grad(
        lambda rule: speed_limit(Law([0.0, 0.0], 0.5 * np.eye(2)), trap, rule, steps=1).gap
    )(constant_rule(3.0, 0.5))
    np.testing.assert_allclose(gradient.learning_rate.value, 24, rtol=1e-9)


def test_chain_rises_to_the_entropy_production():
    path = laws(start(1), Trap(), constant_rule(), steps=1, times=jnp.linspace(0, 1, 65))
    for links, truth in oracles.O12.items():
        snapshots = jax.tree.map(lambda x, links=links: x[:: 64 // links], path)
        chain = [
            w2_squared(*(jax.tree.map(lambda x, i=i: x[i], snapshots) for i in (j, j + 1)))
            for j in range(links)
        ]
        agree(links * sum(chain), truth)


def test_bures():
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    wide = np.diag([1.0, 4.0])
    np.testing.assert_allclose(
        w2_squared(Law(np.zeros(2), wide), Law(np.zeros(2), turn @ wide @ turn.T)),
        oracles.O14,
        rtol=1e-12,
    )
    other = np.array([[0.4, 0.1, 0.0], [0.1, 0.9, 0.3], [0.0, 0.3, 0.2]])
    truth = oracles.gaussian_w2_squared(MEAN, COVARIANCE, 0 * MEAN, other)
    np.testing.assert_allclose(
        w2_squared(Law(MEAN, COVARIANCE), Law(0 * MEAN, other)), truth, rtol=1e-9
    )


def test_entropic():
    pair = Law([0.0], [[1.0]]), Law([1.0], [[4.0]])
    agree(entropic_transport(*pair, epsilon=0.1), oracles.O15[0])
    agree(sinkhorn_divergence(*pair, epsilon=0.1), oracles.O15[1])
    assert abs(sinkhorn_divergence(pair[1], pair[1], epsilon=0.1)) < 1e-14
    np.testing.assert_allclose(
        sinkhorn_divergence(*pair, epsilon=1e-4), w2_squared(*pair), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("stiffness", "rate", "heat"),
    [
        (NON_NORMAL, (0.0, 0.0, 0.0, 0.3), (0.2, 0.0, 0.0, 0.0)),
        (NON_NORMAL, (0.02, 0.28, 0.0, 0.0), (0.26, 0.0, 0.24, 0.0)),
        (np.diag([0.5, 2.0, 6.0]), (0.2, 0.0, 0.0, 0.0), (0.01, 0.0, 0.0, 0.5)),
    ],
    ids=["non-normal", "non-normal, cooled", "diagonal, cooled"],
)
def test_against_an_adaptive_integrator(stiffness, rate, heat):
    center = np.array([0.3, 0.0, -1.0])
    arguments = (
        Law(MEAN, COVARIANCE),
        Trap(stiffness, center),
        Rule(*(mobility_of(x) for x in (rate, heat))),
    )
    report = speed_limit(*arguments, steps=10)

    def numbers(a, b, c, r):
        return lambda s: a + b * s + c * np.cos(np.pi * s) + r * np.exp(-5 * s)

    truth = oracles.linear_drift(
        MEAN, COVARIANCE, stiffness, center, numbers(*(10 * x for x in rate)), numbers(*heat)
    )
    for name in (
        "entropy_production",
        "length_squared",
        "w2_squared",
        "dissipation",
        "learning_time",
    ):
        np.testing.assert_allclose(
            getattr(report, name), getattr(truth, name), rtol=1e-8, err_msg=name
        )
    np.testing.assert_allclose(report.housekeeping, truth.housekeeping, rtol=1e-7, atol=1e-9)
    assert (report.housekeeping > 1e-3) == (stiffness is NON_NORMAL)
    path = laws(*arguments, steps=10, times=[1.0, 0.0])
    np.testing.assert_allclose(path.mean[0], truth.mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(path.covariance[0], truth.covariance, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(path.mean[1], MEAN)


def test_corners_of_schedules_are_ends_of_panels():
    """A piecewise-linear clock equals the run on the same clock that `laws` restarts at the
    corner."""
    law, trap, heat = start(1), Trap(), esl.Constant(0.1)
    whole = speed_limit(law, trap, Rule(esl.Knots([0.5, 3.0, 0.2, 1.0], "linear"), heat), steps=1)
    parts, sigma, length = law, 0.0, 0.0
    for rates in itertools.pairwise((0.5, 3.0, 0.2, 1.0)):
        part = speed_limit(parts, trap, Rule(esl.Linear(*(r / 3 for r in rates)), heat), steps=1)
        sigma, length = sigma + 3 * part.entropy_production, length + jnp.sqrt(part.length_squared)
        path = laws(
            parts, trap, Rule(esl.Linear(*(r / 3 for r in rates)), heat), steps=1, times=[1.0]
        )
        parts = Law(path.mean[0], path.covariance[0])
    np.testing.assert_allclose(
        (whole.entropy_production, whole.length_squared), (sigma, length**2), rtol=1e-11
    )
    ramp = speed_limit(law, trap, Rule(esl.WarmupStableDecay(2.0, 0.13, 0.29), heat), steps=1)
    np.testing.assert_allclose(ramp.learning_time, 2 * (1 - 0.13 / 2 - 0.29 / 2), rtol=1e-12)


def test_narrow_start_and_stiff_direction_are_resolved():
    for law, trap in ((Law([1.0], [[1e-5]]), Trap()), (start(1), Trap(120.0))):
        coarse, fine = (
            speed_limit(law, trap, constant_rule(), steps=1, panels=panels) for panels in (64, 256)
        )
        np.testing.assert_allclose(coarse.entropy_production, fine.entropy_production, rtol=1e-8)
        np.testing.assert_allclose(coarse.w2_squared, fine.w2_squared, rtol=1e-8)


def matches_differences(f, point, direction, gradient, rtol=1e-6, step=1e-5):
    """A gradient against the central difference of `f` along one direction; both are trees."""

    def moved(t):
        return f(jax.tree.map(lambda x, v: x + t * v, point, direction))

    slope = sum(
        jnp.sum(g * v)
        for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(
        slope, (moved(step) - moved(-step)) / (2 * step), rtol=rtol, atol=rtol
    )


def random_like(tree, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=jnp.shape(x))), tree)


def test_gradients():
    @jax.jit
    def numbers(leaves):
        rule, mean, root, stiffness, center = leaves
        report = speed_limit(
            Law(mean, root @ root.T), Trap(stiffness, center), rule, steps=1, panels=4
        )
        return (
            report.entropy_production
            + 0.3 * report.dissipation
            + 0.7 * report.length_squared
            + 1.3 * report.w2_squared
        )

    gradient = jax.jit(jax.grad(numbers))
    tangent = jax.jit(lambda x, v: jax.jvp(numbers, (x,), (v,))[1])
    for stiffness, covariance in ((np.eye(3), np.eye(3)), (NON_NORMAL, COVARIANCE)):
        root = jnp.linalg.cholesky(jnp.asarray(covariance))
        leaves = (
            Rule(esl.Linear(0.8, 0.3), esl.Constant(0.2)),
            jnp.asarray(MEAN),
            root,
            jnp.asarray(stiffness),
            jnp.zeros(3),
        )
        reverse = gradient(leaves)
        for seed in range(3):
            direction = random_like(leaves, seed)
            matches_differences(numbers, leaves, direction, reverse)
        forward = tangent(leaves, direction)
        pairs = zip(jax.tree.leaves(reverse), jax.tree.leaves(direction), strict=True)
        np.testing.assert_allclose(forward, sum(jnp.sum(g * v) for g, v in pairs), rtol=1e-10)


def test_gradient_of_the_optimum():
    @jax.jit
    def later(leaves):
        mean, time = leaves
        return optimal_learning_rate(
            Law(mean, jnp.eye(1)),
            Trap(),
            temperature=0.1,
            learning_time=time,
            steps=1,
            knots=5,
            panels=8,
        )(0.8)

    leaves = jnp.array([2.0]), jnp.array(2.0)
    matches_differences(later, leaves, random_like(leaves), jax.jit(jax.grad(later))(leaves))


def test_gradient_with_respect_to_a_covariance_of_zero():
    """Without heat Σ is linear in the covariance, also at zero: dΣ/dC = ∫ η² (K e^{-Ku})ᵀ K e^{-Ku}
    ds."""
    rule, trap = constant_rule(1.0, 0.0), Trap(2.0)
    gradient = jax.grad(
        lambda c: speed_limit(Law([1.0, 0.0], c), trap, rule, steps=1).entropy_production
    )(jnp.zeros((2, 2)))
    np.testing.assert_allclose(gradient, (1 - np.exp(-4.0)) * np.eye(2), rtol=1e-9, atol=1e-12)
    report = jax.grad(lambda c: speed_limit(Law([1.0, 0.0], c), trap, rule, steps=1).gap)(
        jnp.zeros((2, 2))
    )
    assert bool(jnp.all(jnp.isfinite(report)))


def test_derivatives_of_the_distance():
    def distance(pair):
        a, b = ((x + x.T) / 2 for x in pair)
        return w2_squared(Law(a[0], a), Law(b[1], b))

    value, gradient, hessian = (
        jax.jit(distance),
        jax.jit(jax.grad(distance)),
        jax.jit(jax.hessian(lambda a, b: distance((a, b)))),
    )
    # The second derivative at equal laws is the metric: ⟨B, M⟩ with M C + C M = B.
    b = np.array([[0.2, 0.1, 0.0], [0.1, -0.3, 0.5], [0.0, 0.5, 1.0]])
    metric = jax.jit(
        jax.grad(jax.grad(lambda t, c: w2_squared(Law(MEAN, c), Law(MEAN, c + t * b))))
    )
    for matrix in (np.eye(3), COVARIANCE, np.diag([1.0, 1.0, 4.0])):
        pair = jnp.asarray(matrix), jnp.asarray(matrix + 0.3)
        direction = random_like(pair)
        matches_differences(value, pair, direction, gradient(pair))
        matches_differences(
            lambda a, pair=pair: gradient((a, pair[1]))[0][0, 1],
            pair[0],
            direction[0],
            hessian(*pair)[0, 1],
        )
        still = jax.grad(lambda c, matrix=matrix: w2_squared(Law(MEAN, c), Law(MEAN, matrix)))(
            pair[0]
        )
        np.testing.assert_allclose(still, 0, atol=1e-13)
        np.testing.assert_allclose(
            metric(0.0, matrix), np.sum(b * oracles.solve_continuous_lyapunov(matrix, b)), rtol=1e-8
        )


@pytest.mark.parametrize(
    "function", [sqrtm, lambda a: lyapunov(a, a @ a)], ids=["sqrtm", "lyapunov"]
)
def test_matrix_functions(function):
    differentiated = [
        jax.jit(transform(function)) for transform in (jax.jacfwd, jax.jacrev, jax.hessian)
    ]
    for matrix in (np.zeros((2, 2)), np.eye(2), np.diag([1.0, 0.0])):
        root = sqrtm(jnp.asarray(matrix))
        np.testing.assert_allclose(root @ root, matrix, atol=1e-15)
        b = matrix * np.array([[1.0, 0.5], [0.5, 0.3]])
        solution = lyapunov(jnp.asarray(matrix), jnp.asarray(b))
        np.testing.assert_allclose(solution @ matrix + matrix @ solution, b, atol=1e-14)
        for derivative in differentiated:
            assert bool(jnp.all(jnp.isfinite(derivative(jnp.asarray(matrix)))))


def test_exponential():
    for scale in (0.0, 1e-3, 1.0, 2 / np.linalg.norm(NON_NORMAL, 2)):
        for sign in (1, -1):
            np.testing.assert_allclose(
                exponential(jnp.asarray(sign * scale * NON_NORMAL)),
                expm(sign * scale * NON_NORMAL),
                rtol=1e-13,
                atol=1e-14,
            )


rates = st.floats(0.05, 2.0)


@settings(max_examples=20, deadline=None, database=None)
@given(
    knots=st.lists(rates, min_size=4, max_size=4),
    heat=st.lists(st.floats(0.01, 2.0), min_size=2, max_size=2),
    seed=st.integers(0, 10**6),
)
def test_speed_limit_holds(knots, heat, seed):
    random = np.random.default_rng(seed)
    factor, spring = random.normal(size=(2, 2, 2))
    law = Law(random.normal(size=2), factor @ factor.T + 0.01 * np.eye(2))
    report = speed_limit(law, Trap(spring), Rule(esl.Knots(knots), esl.Linear(*heat)), steps=1)
    rounding = 1e-9 * (1 + report.entropy_production)
    for part in (report.housekeeping, report.temporal, report.geometric):
        assert part >= -rounding
    assert report.learning_time * report.dissipation >= report.length_squared - rounding
    convex = spring @ spring.T + 0.1 * np.eye(2)
    report = speed_limit(law, Trap(convex), Rule(esl.Knots(knots), esl.Constant(heat[0])), steps=1)
    x = np.linalg.eigvalsh(convex)[0] * report.learning_time
    assert abs(report.housekeeping) <= rounding
    assert (
        report.learning_time * report.dissipation
        >= x / 2 / np.tanh(x / 2) * report.w2_squared - rounding
    )


def test_float32():
    narrow = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        (start(10), Trap(), Rule(esl.Cosine(4.0), esl.Constant(0.1))),
    )
    report = speed_limit(*narrow, steps=1)
    wide = speed_limit(start(10), Trap(), Rule(esl.Cosine(4.0), esl.Constant(0.1)), steps=1)
    for name in (
        "entropy_production",
        "length_squared",
        "w2_squared",
        "dissipation",
        "learning_time",
        "times",
        "speed",
    ):
        value = getattr(report, name)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, getattr(wide, name), rtol=3e-5, atol=1e-5, err_msg=name)


def test_the_law_and_the_potential_set_the_precision():
    law, trap = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (start(1), Trap()))
    assert (
        speed_limit(law, trap, constant_rule(), steps=1, panels=4).entropy_production.dtype
        == jnp.float32
    )


def test_gradient_at_rest_is_zero():
    """All of the metric speed is exactly 0 here, where a bare square root has no derivative."""

    def length_squared(mean):
        return speed_limit(
            Law(mean, jnp.zeros((1, 1))), Trap(), constant_rule(1.0, 0.0), steps=1, panels=4
        ).length_squared

    assert jax.jit(jax.grad(length_squared))(jnp.zeros(1)) == 0


def test_jit_and_vmap():
    def report(rule, law):
        return speed_limit(law, Trap(NON_NORMAL[:2, :2]), rule, steps=7)

    many = jax.vmap(lambda x: Rule(esl.Linear(0.1 * x, 0.05), esl.Constant(0.2 * x)))(
        jnp.array([0.5, 1.0, 2.0])
    )
    batched = jax.vmap(report, (0, None))(many, start(2))
    for i in range(3):
        one = report(jax.tree.map(lambda x, i=i: x[i], many), start(2))
        compiled = jax.jit(report)(jax.tree.map(lambda x, i=i: x[i], many), start(2))
        for a, b, c in zip(*map(jax.tree.leaves, (one, compiled, batched)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
            np.testing.assert_allclose(a, c[i], rtol=1e-12)


def test_a_law_that_is_no_number_has_no_length():
    """Under `jit` it cannot be refused, and a length of 0 would pass for a law that rests."""

    @jax.jit
    def length_squared(mean):
        return speed_limit(Law(mean, [[1.0]]), Trap(), constant_rule(), steps=1).length_squared

    assert float(length_squared(jnp.array([2.0]))) > 0
    assert np.isnan(length_squared(jnp.array([np.nan])))


def test_too_stiff_is_nan_where_it_cannot_be_refused():
    value = jax.jit(
        lambda k: speed_limit(start(1), Trap(k), constant_rule(), steps=1).entropy_production
    )(jnp.array(1e4))
    assert bool(jnp.isnan(value))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: Law(1.0, [[1.0]]),
            r"Argument `mean` must have shape \(d,\), but has shape \(\)\.",
        ),
        (
            lambda: Law([1.0], [1.0]),
            r"Argument `covariance` must have shape \(1, 1\), .* has shape \(1,\)\.",
        ),
        (
            lambda: Law([1.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
            "Argument `covariance` must be symmetric, but differs from its transpose by 0.5",
        ),
        (
            lambda: Law([1.0], [[-1.0]]),
            "Argument `covariance` must be positive semidefinite, but has the eigenvalue -1",
        ),
        (lambda: Law([np.nan], [[1.0]]), "Argument `mean` must be finite"),
        (
            lambda: w2_squared(start(1), start(2)),
            "Argument `end` must be a law of 1 coordinates, as `start` is, but has 2",
        ),
        (
            lambda: sinkhorn_divergence(start(1), start(1), epsilon=0.0),
            "Argument `epsilon` must be greater than 0",
        ),
        (
            lambda: speed_limit(start(2), Trap(np.ones(3)), constant_rule(), steps=1),
            "Argument `potential.stiffness` must be a number or",
        ),
        (
            lambda: speed_limit(start(2), Trap(1.0, np.ones(3)), constant_rule(), steps=1),
            "Argument `potential.center` must be a number or",
        ),
        (
            lambda: speed_limit(start(2), Trap(), constant_rule(), steps=0),
            "Argument `steps` must be an integer of at least 1",
        ),
        (
            lambda: speed_limit(start(2), Trap(), constant_rule(-1.0), steps=1),
            "Argument `rule.learning_rate` must be at least 0",
        ),
        (
            lambda: speed_limit(start(2), Trap(), constant_rule(1.0, -1.0), steps=1),
            "Argument `rule.temperature` must be at least 0",
        ),
        (
            lambda: speed_limit(
                start(2), Trap(), Rule(Mobility(jnp.ones(2)), esl.Constant(0.1)), steps=1
            ),
            "`rule.learning_rate` must be a schedule of one number",
        ),
        (
            lambda: speed_limit(Law([1.0], [[0.0]]), Trap(), constant_rule(), steps=1),
            "Argument `law` must have a positive definite covariance",
        ),
        (
            lambda: speed_limit(start(1), Trap(1e4), constant_rule(), steps=1),
            "Argument `panels` must be at least 5001 for this stiffness",
        ),
        (
            lambda: laws(start(1), Trap(), constant_rule(), steps=1, times=0.5),
            r"Argument `times` must have shape \(J,\)",
        ),
        (
            lambda: laws(start(1), Trap(), constant_rule(), steps=1, times=[1.5]),
            "Argument `1 - times` must be at least 0",
        ),
        (
            lambda: optimal_learning_rate(
                start(1), Trap(), temperature=0.1, learning_time=0.0, steps=1
            ),
            "`learning_time` must be greater",
        ),
        (
            lambda: optimal_learning_rate(
                Law([0.0], [[0.0]]), Trap(), temperature=0.0, learning_time=1.0, steps=1
            ),
            "Argument `law` must not be stationary",
        ),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(esl.InputError, match=sentence):
        call()


def test_what_has_no_linear_drift_is_one_sentence(refused):
    refused(
        lambda: speed_limit(start(2), esl.DoubleWell(), constant_rule(), steps=1),
        "Argument `potential` must have a stiffness and a center, .* but is a DoubleWell",
    )
    refused(
        lambda: speed_limit(start(2), Trap(), esl.Constant(0.1), steps=1),
        "Argument `rule` must have a learning rate and a temperature, .* but is a Constant",
    )
