"""Velocities of one snapshot: contracts, closed forms of the affine one, and Σ along a run."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import systems

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

VELOCITIES = {
    "affine": lambda: esl.AffineVelocity(),
    "kernel": lambda: esl.KernelVelocity(
        landmarks=8, bandwidths=(0.5, 2.0), penalties=(1e-3, 1e-1), folds=2
    ),
    "network": lambda: esl.NetworkVelocity(
        key=jax.random.key(0), width=4, depth=1, iterations=4, rounds=2
    ),
    "exact maps": lambda: esl.TransportVelocity(esl.ExactTransport()),
    "Gaussian maps": lambda: esl.TransportVelocity(esl.GaussianTransport()),
    "paths": lambda: esl.PathVelocity(),
}
VARIATIONAL = ("affine", "kernel", "network")


def noise_once(answer):
    """The share of the variance of the terms that is left when the noise of the fits, half the mean
    square by which two of them disagree, counts once: (σ + b/2)/(σ + b)."""
    if answer.bound_contributions is None:
        return 1.0
    size = max(float(answer.squared), 0.0)
    bias = (float(answer.squared) - float(np.mean(answer.bound_contributions))) / 2
    return (size + bias / 2) / (size + bias)


def snapshot(seed, n=24, d=2, dtype=np.float32):
    """Members of a skewed law in skewed drift, seen before and after."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(n, d)) @ np.array([[1.0, 0.4], [-0.3, 0.8]])[:d, :d]
    drift = -(x**2) + np.roll(x, 1, axis=1)
    arrays = (x, drift, np.full((), 0.3), x - 0.1 * drift, x + 0.1 * drift, np.full((), 0.2))
    return esl.velocity.Snapshot(*(jnp.asarray(a, dtype) for a in arrays))


def estimate(velocity, snapshot):
    return velocity.estimate(snapshot, velocity.init(snapshot.positions))[0]


# The contract of every estimator


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("network", "kernel")))
        for name in VELOCITIES
    ],
)
def test_contract(name):
    velocity, traces = VELOCITIES[name](), 0
    given = [snapshot(seed) for seed in range(3)]

    @eqx.filter_jit
    def compiled(velocity, snapshot):
        nonlocal traces
        traces += 1
        return estimate(velocity, snapshot)

    answers = [compiled(velocity, one) for one in given]
    assert traces == 1
    # Training and the choice of a bandwidth amplify rounding, and nothing else.
    close = {"rtol": 1e-2, "atol": 1e-2} if name == "network" else {"rtol": 1e-3, "atol": 1e-3}
    chex.assert_trees_all_close(estimate(velocity, given[0]), answers[0], **close)
    stacked = jax.jit(jax.vmap(lambda one: estimate(velocity, one)))(
        jax.tree.map(lambda *x: jnp.stack(x), *given)
    )
    chex.assert_trees_all_close(stacked, jax.tree.map(lambda *x: jnp.stack(x), *answers), **close)
    assert {leaf.dtype for leaf in jax.tree.leaves(answers[0])} == {np.dtype(np.float32)}
    assert answers[0].values.shape == given[0].positions.shape
    assert answers[0].contributions.shape == (24,)
    np.testing.assert_allclose(answers[0].squared, np.mean(answers[0].contributions), rtol=1e-5)
    np.testing.assert_allclose(
        answers[0].standard_error.squared,
        np.sqrt(np.var(answers[0].contributions, ddof=1) / 24 * noise_once(answers[0])),
        rtol=1e-4,
    )
    assert ("lower bound" in str(answers[0])) == (name in VARIATIONAL)
    assert answers[0].note in str(answers[0])


@pytest.mark.parametrize("name", VELOCITIES)
@pytest.mark.parametrize("case", ["without noise", "point mass", "members that agree in part"])
def test_finite_values_and_gradients_at_the_edges(name, case):
    velocity, given = VELOCITIES[name](), snapshot(0)
    if case == "without noise":
        given = eqx.tree_at(lambda s: s.diffusion, given, jnp.zeros(()))
    elif case == "point mass":  # without noise: with it, a point has an infinite σ
        given = eqx.tree_at(lambda s: s.diffusion, given, jnp.zeros(()))
        given = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:1], x.shape) if x.ndim == 2 else x, given
        )
    else:
        # One value of the second coordinate and members in pairs: no covariance and a singular
        # kernel matrix.
        given = jax.tree.map(
            lambda x: jnp.repeat(x[:12], 2, axis=0).at[:, 1].set(1.0) if x.ndim == 2 else x, given
        )
    value, slopes = eqx.filter_jit(
        jax.value_and_grad(lambda given: estimate(velocity, given).squared)
    )(given)
    # A polar factor has no derivative where a singular value vanishes.
    chex.assert_tree_all_finite(value if name == "Gaussian maps" else (value, slopes))
    if case == "point mass":
        truth = given.drift[0] if name in VARIATIONAL else (given.after[0] - given.before[0]) / 0.2
        np.testing.assert_allclose(value, np.sum(np.asarray(truth) ** 2), rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "velocity",
    [esl.AffineVelocity(), pytest.param("kernel", marks=pytest.mark.slow)],
    ids=["affine", "kernel"],
)
def test_gradients_are_finite_differences(velocity):
    # One bandwidth and one penalty, so that the choice does not jump.
    velocity = (
        esl.KernelVelocity(landmarks=6, bandwidths=(1.0,), penalties=(1e-2,))
        if velocity == "kernel"
        else velocity
    )
    given, rng = snapshot(1, dtype=np.float64), np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), given)
    fn = eqx.filter_jit(
        lambda given: (
            estimate(velocity, given).squared
            + jnp.mean(estimate(velocity, given).gradient_contributions)
        )
    )

    def along(h):
        return fn(jax.tree.map(lambda x, u: x + h * u, given, direction))

    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    slopes = jax.grad(fn)(given)
    np.testing.assert_allclose(
        sum(
            jnp.vdot(*p)
            for p in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
        ),
        difference,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["affine", "kernel"])
@pytest.mark.parametrize(("n", "law"), [(40, "normal"), (200, "mixture")])
def test_cross_fitting_bounds_from_below(name, n, law):
    """The mean over repetitions is at most the truth, of the bound by the variance of the fit.

    A fit that is judged by its own members is above it by 2 d²/n and more. Two that are compared
    miss nothing but what the class cannot follow: of a normal law, affine fields miss nothing.
    """
    velocity = (
        esl.AffineVelocity()
        if name == "affine"
        else esl.KernelVelocity(landmarks=20, penalties=(1e-4, 1e-2))
    )

    def once(key):
        which, spread = jax.random.split(key)
        x = jax.random.normal(spread, (n, 3 if law == "normal" else 1))
        x = x if law == "normal" else x / 2 + 2 * jnp.sign(jax.random.normal(which, (n, 1)))
        found = estimate(velocity, esl.velocity.Snapshot(x, 0 * x, jnp.ones(())))
        return found.squared, jnp.mean(found.bound_contributions)

    truth = 3.0 if law == "normal" else 3.993714  # T² E‖∇log q‖² of free diffusion
    values, bounds = map(
        np.asarray,
        jax.jit(lambda keys: jax.lax.map(once, keys))(jax.random.split(jax.random.key(0), 100)),
    )
    assert np.mean(values) <= truth + 5 * np.std(values) / 10
    assert np.all(bounds < values)
    if (name, law) == ("affine", "normal"):
        assert abs(np.mean(values) - truth) < 5 * np.std(values) / 10
        # σ is d, and fits to 13 members scatter by almost as much.
        assert np.mean(bounds) < truth - 5 * np.std(bounds) / 10
    if (name, law) == ("affine", "mixture"):
        np.testing.assert_allclose(np.mean(values), 0.235294, atol=5 * np.std(values) / 10 + 0.01)


# Closed forms


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "diffusion",
    [0.2, np.array([0.2, 0.5]), np.array([[0.4, 0.1], [0.1, 0.3]])],
    ids=["scalar", "diagonal", "matrix"],
)
def test_affine_is_exact_for_its_own_moments(diffusion):
    """Linear drift -K θ of a normal law: v = -K (θ - c) - D ∇log q, and its gradient part.

    From members whose thirds have exact moments, so that all three fits are one field. D is smaller
    in a fit by (m - d - 2)/m, with m members in a third, because the inverse of a sample covariance
    is too large by that on the average; here it is not, and the field is known to rounding.
    """
    stiffness, covariance = np.array([[1.0, 2.0], [-1.5, 0.7]]), np.array([[1.0, 0.3], [0.3, 0.5]])
    n = 4002
    x = exact_thirds(n, [2.0, 1.0], covariance)
    velocity = esl.AffineVelocity()(x, -x @ stiffness.T, diffusion)
    matrix = diffusion * np.eye(2) if np.ndim(diffusion) < 2 else diffusion
    mean = -stiffness @ [2.0, 1.0]

    def slopes(matrix):
        """The slope of the best field, and of the best gradient."""
        slope = -stiffness + matrix @ np.linalg.inv(covariance)
        symmetric = oracles.solve_continuous_lyapunov(
            covariance, slope @ covariance + covariance @ slope.T
        )
        return slope, symmetric

    found = velocity.squared, np.mean(velocity.gradient_contributions)
    fitted = slopes(matrix * (n / 3 - 4) / (n / 3))
    for value, slope, exact in zip(found, fitted, slopes(matrix), strict=True):
        # 2 E[w·b] + 2 tr(D ∇w) - E‖w‖² of this field.
        linear = np.trace(slope @ (matrix - covariance @ stiffness.T))
        square = np.trace(slope @ covariance @ slope.T)
        np.testing.assert_allclose(value, mean @ mean + 2 * linear - square, rtol=1e-10)
        # So close to the optimum it is the truth.
        best = mean @ mean + np.trace(exact @ covariance @ exact.T)
        np.testing.assert_allclose(value, best, rtol=1e-4)
    np.testing.assert_allclose(velocity.values, mean + (x - [2.0, 1.0]) @ fitted[0].T, atol=1e-10)
    np.testing.assert_allclose(velocity.divergence, np.trace(fitted[0]), rtol=1e-10)
    # One field: none disagree, and the bound is the estimate.
    np.testing.assert_allclose(
        velocity.bound_contributions, velocity.contributions, rtol=1e-8, atol=1e-8
    )


def exact_thirds(n, mean, covariance):
    """Normal members, of which every third one, from each of the first three on, has exactly these
    moments.

    The covariance is that of 1/n.
    """
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    for third in (slice(i, None, 3) for i in range(3)):
        centered = x[third] - x[third].mean(axis=0)
        x[third] = np.linalg.solve(
            np.linalg.cholesky(centered.T @ centered / len(centered)), centered.T
        ).T
    return x @ np.linalg.cholesky(np.asarray(covariance)).T + mean


def test_differences_of_laws_and_of_paths():
    given = snapshot(2)
    moved = (np.asarray(given.after) - given.before) / 0.2
    np.testing.assert_allclose(estimate(esl.PathVelocity(), given).values, moved, rtol=1e-6)
    # Translated together, each member goes to itself, in both transports.
    shift = jnp.array([0.3, -0.1])
    translated = esl.velocity.Snapshot(
        given.positions,
        before=given.positions - shift,
        after=given.positions + shift,
        elapsed=jnp.asarray(0.5),
    )
    for name in ("exact maps", "Gaussian maps", "paths"):
        velocity = estimate(VELOCITIES[name](), translated)
        np.testing.assert_allclose(
            velocity.values, np.broadcast_to(shift / 0.25, (24, 2)), rtol=1e-3
        )
        np.testing.assert_allclose(velocity.squared, 16 * 0.1, rtol=1e-3)
    # Members that trade places move no mass, but they move.
    traded = esl.velocity.Snapshot(
        given.positions,
        before=given.positions,
        after=given.positions[::-1],
        elapsed=jnp.asarray(0.5),
    )
    assert estimate(VELOCITIES["exact maps"](), traded).squared < 1e-9
    assert estimate(esl.PathVelocity(), traded).squared > 1
    still = eqx.tree_at(lambda s: s.elapsed, translated, jnp.zeros(()))
    assert estimate(esl.PathVelocity(), still).squared == 0


def test_bad_input(refused):
    x = np.zeros((8, 2), np.float32)
    for velocity in (esl.AffineVelocity(), esl.KernelVelocity()):
        refused(
            lambda velocity=velocity: velocity(x[:3], x[:3], 1.0),
            "`positions` must hold at least 4 members, but holds 3",
        )
        refused(
            lambda velocity=velocity: velocity(x[0], x, 1.0),
            r"`positions` must have shape \(n, d\)",
        )
        refused(
            lambda velocity=velocity: velocity(x, x[:, :1], 1.0),
            r"`drift` must have shape \(8, 2\), as `positions` has",
        )
        refused(
            lambda velocity=velocity: velocity(x, x, np.ones(3)),
            r"`diffusion` must be a scalar, \(2,\) or \(2, 2\), but has shape \(3,\)",
        )
        refused(
            lambda velocity=velocity: velocity(x, np.full_like(x, np.nan), 1.0),
            "`drift` must be finite",
        )
    refused(
        lambda: esl.PathVelocity()(x, x, 1.0),
        "be an estimator that works on one snapshot, but is PathVelocity",
    )


# Along a run


def by_velocities(system, start):
    return esl.speed_limit(
        system.run(start, 20, jax.random.key(1)),
        transport=esl.GaussianTransport(),
        velocity=esl.AffineVelocity(),
        potential=system.potential,
        jackknife=8,
    )


@pytest.mark.parametrize("d", [1, 10])
def test_ornstein_uhlenbeck(d):
    """O1 within 3 %; the chain, one link at a time, stays below by the motion within links."""
    system, n = systems.ornstein_uhlenbeck(d, 400), 20_000
    x = exact_thirds(n, 2 * np.eye(d)[0], np.eye(d)).astype(np.float32)
    report = by_velocities(system, x)
    np.testing.assert_allclose(report.entropy_production, system.entropy_production, rtol=0.03)
    np.testing.assert_allclose(
        [report.length_squared, report.w2_squared],
        [system.length_squared, system.w2_squared],
        rtol=0.03,
    )
    np.testing.assert_allclose(report.dissipation, report.entropy_production, rtol=1e-3)  # η = 1
    np.testing.assert_allclose(
        report.entropy_production_chain, report.entropy_production, rtol=0.03
    )
    assert abs(float(report.housekeeping)) < 1e-3 * system.entropy_production
    assert "AffineVelocity" in report.source


def test_housekeeping_is_what_a_chain_does_not_see():
    system = systems.non_symmetric(400)
    x = exact_thirds(20_000, np.asarray(system.law.mean), np.asarray(system.law.covariance)).astype(
        np.float32
    )
    report = by_velocities(system, x)
    truth = oracles.linear_drift(
        np.asarray(system.law.mean),
        np.asarray(system.law.covariance),
        np.asarray(system.potential.stiffness),
        np.asarray(system.potential.center),
        lambda s: 1.0,
        lambda s: 0.2,
    )
    np.testing.assert_allclose(report.entropy_production, truth.entropy_production, rtol=0.03)
    np.testing.assert_allclose(report.housekeeping, truth.housekeeping, rtol=0.05)
    np.testing.assert_allclose(
        report.entropy_production - report.housekeeping, report.entropy_production_chain, rtol=0.03
    )


def test_unmatched_pairs_are_rejected(refused):
    system = systems.ornstein_uhlenbeck(1, 8)
    path = system.run(system.sample(8, jax.random.key(0)), 4, jax.random.key(1))

    def call(**kwargs):
        return lambda: esl.speed_limit(path, **{"potential": system.potential, **kwargs})

    affine, kernel = esl.AffineVelocity(), esl.KernelVelocity()
    refused(
        call(transport=esl.ExactTransport(), velocity=affine),
        r"be GaussianTransport\(\) beside AffineVelocity",
    )
    refused(
        call(transport=esl.ProjectedTransport(esl.ExactTransport(), np.eye(1)), velocity=affine),
        r"be GaussianTransport\(\) beside AffineVelocity",
    )
    refused(
        call(transport=esl.ExactTransport(), velocity=kernel, potential=None),
        "whose gradient KernelVelocity needs",
    )
    refused(
        call(transport=esl.MappedTransport(esl.ExactTransport(), jnp.tanh), velocity=kernel),
        "is KernelVelocity in a MappedTransport",
    )
    refused(
        call(transport=esl.ExactTransport(), velocity=None), "be given together with a velocity"
    )
    refused(call(transport=esl.ExactTransport(), velocity="kernel"), "be a velocity estimator")
