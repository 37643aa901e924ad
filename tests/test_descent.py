"""Gradient descent with noise of batches on a quadratic: its exact law against recursions in NumPy
and closed forms, particles against the exact law, and the front of loss and Σ."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import esljax as esl
from esljax.gaussian import Independent, Law, descent, front

NON_NORMAL = np.array([[2.0, 0.9, 0.0], [-0.4, 1.0, 0.7], [0.3, 0.0, 0.5]])
COVARIANCE = np.array([[1.0, 0.3, 0.1], [0.3, 0.5, -0.2], [0.1, -0.2, 2.0]])
NOISE = np.array([[0.9, -0.4, 0.0], [-0.4, 0.5, 0.1], [0.0, 0.1, 0.2]])
MEAN, CENTER = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.0, -1.0])
SPECTRUM = np.array([2.0, 0.7, 0.1])
STEPS = 12


def rule():
    return esl.Langevin(esl.Linear(0.1, 0.3), esl.Cosine(0.2))


def matrix(x):
    return np.asarray(x) if np.ndim(x) == 2 else np.asarray(x) * np.eye(3)


def numbers(run):
    report = run.report
    return (
        report.entropy_production,
        report.length_squared,
        report.w2_squared,
        report.dissipation,
        run.final_loss,
    )


# --- The exact law --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_one_mode_at_a_constant_rate_is_the_closed_form(noise, x64):
    mean, variance = oracles.noisy_mode(1.5, 0.4, 2.0, noise, 0.15, 9)
    trap = esl.Quadratic(2.0, gradient_noise=noise)
    for start in (Independent([1.5], 0.4), Law([1.5], [[0.4]])):
        run = descent(start, trap, esl.Langevin(0.15), steps=9)
        squares = np.diff(mean) ** 2 + np.diff(np.sqrt(variance)) ** 2
        whole = (mean[-1] - 1.5) ** 2 + (np.sqrt(variance[-1]) - np.sqrt(0.4)) ** 2
        truth = (
            9 * squares.sum(),
            np.sqrt(squares).sum() ** 2,
            whole,
            (squares / 0.15).sum(),
            mean[-1] ** 2 + variance[-1],
        )
        np.testing.assert_allclose(numbers(run), truth, rtol=1e-12)
        np.testing.assert_allclose(run.laws.mean[:, 0], mean, rtol=1e-13)
        np.testing.assert_allclose(run.laws.covariance[:, 0, 0], variance, rtol=1e-13)


# Made within a test, in its precision.
CASES = {
    "independent": lambda: (Independent(MEAN, [1.0, 0.05, 0.3]), SPECTRUM, [0.5, 0.1, 0.0]),
    "independent, scalars": lambda: (Independent(MEAN, 0.2), 0.8, 0.3),
    "independent, a matrix of noise": lambda: (Independent(MEAN, 0.2), SPECTRUM, NOISE),
    "matrices": lambda: (Law(MEAN, COVARIANCE), NON_NORMAL, NOISE),
    "no noise": lambda: (Law(MEAN, COVARIANCE), SPECTRUM, None),
}


@pytest.mark.parametrize("links", [None, 4, 1])
@pytest.mark.parametrize("case", CASES)
def test_against_the_recursion(case, links, x64):
    law, stiffness, noise = CASES[case]()
    potential = esl.Quadratic(stiffness, CENTER, gradient_noise=noise)
    run = descent(law, potential, rule(), steps=STEPS, links=links)
    times = np.arange(STEPS) / STEPS
    rates, heats = 0.1 + 0.2 * times, 0.1 * (1 + np.cos(np.pi * times))
    added = 0.0 if noise is None else noise
    means, covariances = oracles.noisy_descent(
        MEAN - CENTER, law.covariance, matrix(stiffness), matrix(added), rates, heats
    )
    links = STEPS if links is None else links
    every = STEPS // links
    ends = np.arange(links + 1) / links
    sigma, length, whole = oracles.gaussian_chain(means[::every], covariances[::every], ends)
    loss = np.sum(matrix(stiffness) * (covariances[-1] + np.outer(means[-1], means[-1]))) / 2
    report = run.report
    found = (report.entropy_production, report.length_squared, report.w2_squared, run.final_loss)
    np.testing.assert_allclose(found, (sigma, length, whole, loss), rtol=1e-7)
    np.testing.assert_allclose(run.laws.mean, means[::every] + CENTER, rtol=1e-12)
    np.testing.assert_allclose(run.laws.covariance, covariances[::every], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(report.learning_time, rates.sum(), rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(report.speed * report.elapsed) ** 2, length, rtol=1e-7)
    assert (report.housekeeping, report.circulation) == (None, "invisible")


def symmetric_like(tree, seed):
    """Random numbers of the same shapes, and symmetric matrices, as covariances are."""
    random = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), tree)
    return jax.tree.map(lambda x: (x + x.T) / 2 if x.ndim == 2 else x, drawn)


@pytest.mark.parametrize("case", ["independent, scalars", "matrices"])
def test_gradients(case, x64):
    law, stiffness, noise = CASES[case]()
    leaves = (
        esl.Knots([0.1, 0.3, 0.05]),
        law,
        jnp.asarray(stiffness),
        jnp.asarray(noise),
        jnp.asarray(CENTER),
    )
    leaves = jax.tree.map(lambda x: jnp.asarray(x, float), leaves)

    @jax.jit
    def value(leaves):
        rate, law, stiffness, noise, center = leaves
        potential = esl.Quadratic(stiffness, center, gradient_noise=noise)
        run = descent(law, potential, esl.Langevin(rate, 0.1), steps=6, links=3)
        return sum(w * x for w, x in zip((1.0, 0.7, 1.3, 0.2, 3.0), numbers(run), strict=True))

    gradient = jax.jit(jax.grad(value))(leaves)
    for seed in range(3):
        direction = symmetric_like(leaves, seed)

        def along(t, direction=direction):
            return value(jax.tree.map(lambda *xv: xv[0] + t * xv[1], leaves, direction))

        slope = sum(
            jnp.sum(g * v)
            for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-6)
    forward = jax.jvp(value, (leaves,), (direction,))[1]
    np.testing.assert_allclose(forward, slope, rtol=1e-9)


def test_gradients_are_finite_from_a_point_mass():
    def value(rate, start):
        noisy = esl.Quadratic(SPECTRUM, gradient_noise=SPECTRUM)
        return descent(start, noisy, esl.Langevin(rate), steps=4).entropy_production

    for start in (Independent(MEAN, 0.0), Law(MEAN, np.zeros((3, 3)))):
        slope = jax.grad(value)(0.1, start)
        assert np.isfinite(slope)
        assert slope > 0


@pytest.mark.parametrize("kind", ["independent", "matrices"])
def test_small_links_lose_nothing_in_float32(kind):
    """A step of 1e-3 changes a law by 1e-3 of its width, and its square by 1e-6."""
    noisy, rule, mean = (
        esl.Quadratic([1.0, 0.3], gradient_noise=0.4),
        esl.Langevin(1e-3),
        [0.0, 0.0],
    )
    law = Independent(mean, [1.0, 0.5]) if kind == "independent" else Law(mean, COVARIANCE[:2, :2])
    run = descent(law, noisy, rule, steps=200)
    assert run.entropy_production.dtype == np.float32
    path = oracles.noisy_descent(
        np.zeros(2),
        np.asarray(law.covariance, float),
        np.diag([1.0, 0.3]),
        0.4 * np.eye(2),
        [1e-3] * 200,
        0.0,
    )
    truth = oracles.gaussian_chain(*path, np.arange(201) / 200)
    tolerance = 1e-5 if kind == "independent" else 1e-3
    np.testing.assert_allclose(numbers(run)[:3], truth, rtol=tolerance)


# --- Particles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise", [0.5, [0.5, 0.1, 0.0], NOISE], ids=["number", "diagonal", "matrix"]
)
def test_a_batch_is_one_draw(noise, x64):
    noisy = esl.Quadratic(SPECTRUM, CENTER, gradient_noise=noise)
    exact, position = esl.Quadratic(SPECTRUM, CENTER), jnp.asarray(MEAN)
    np.testing.assert_array_equal(noisy.energy(position), exact.energy(position))
    members = 40_000
    batches = noisy.draw(jax.random.key(3), members)
    energies, slopes = jax.vmap(noisy.energy_and_gradient, (None, 0))(position, batches)
    energy, slope = exact.energy_and_gradient(position)
    drawn, wide = np.asarray(slopes - slope), matrix(noise)
    spread = np.sqrt(np.diag(wide) / members)
    np.testing.assert_array_less(np.abs(drawn.mean(axis=0)), 5 * spread + 1e-12)
    sizes = np.sqrt((np.outer(np.diag(wide), np.diag(wide)) + wide**2) / members)
    np.testing.assert_array_less(np.abs(np.cov(drawn.T) - wide), 5 * sizes + 1e-12)
    # The energy of a batch has the gradient of the batch.
    np.testing.assert_allclose(energies, energy + drawn @ MEAN, rtol=1e-10)
    other = jax.vmap(noisy.energy, (None, 0))(position, noisy.draw(jax.random.key(4), 2))
    assert len(np.unique(np.append(energies[:2], other).round(9))) == 4


def test_all_ways_to_differentiate_a_noisy_run_agree(x64):
    start = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))

    @eqx.filter_jit
    def value(leaves, gradient):
        rate, noise, stiffness, start = leaves
        noisy, rule = (
            esl.Quadratic(stiffness, CENTER, gradient_noise=noise),
            esl.Langevin(rate, 0.2),
        )
        path = esl.simulate(
            noisy, rule, start, steps=4, snapshots=2, key=jax.random.key(1), gradient=gradient
        )
        return jnp.sum(jnp.sin(path.final)) + jnp.sum(path.energies[1])

    leaves = tuple(map(jnp.asarray, (0.2, [0.5, 0.1, 0.3], SPECTRUM, start)))
    slope = eqx.filter_jit(jax.grad(value))
    plain, adjoint = (slope(leaves, x) for x in (esl.Autodiff(), esl.HessianAdjoint(True)))
    for found, truth in zip(adjoint, plain, strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-12)

    def along(t):
        return value((leaves[0], leaves[1] + t, *leaves[2:]), esl.Autodiff())

    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(jnp.sum(plain[1]), difference, rtol=1e-6)


@pytest.fixture(scope="module")
def particles():
    """20 000 members beside their exact law."""
    law = Independent([1.0, -1.5, 2.0], [0.3, 0.0, 0.5])
    noisy = esl.Quadratic(SPECTRUM, gradient_noise=[2.0, 0.7, 0.1])
    rule = esl.Langevin(esl.WarmupStableDecay(0.4, start=0.05, end=0.05))
    random = np.random.default_rng(5).normal(size=(20_000, 3))
    start = jnp.asarray(law.mean + jnp.sqrt(law.variance) * random, jnp.float32)
    path = esl.simulate(noisy, rule, start, steps=40, snapshots=10, key=jax.random.key(6))
    return noisy, path, descent(law, noisy, rule, steps=40, links=10)


def test_particles_have_the_exact_law(particles):
    noisy, path, run = particles
    report = esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=20, debias=True)
    for name in ("entropy_production", "w2_squared"):
        away = float(report.best(name) - getattr(run, name))
        assert abs(away) < 5 * float(report.standard_error.get(f"debiased_{name}")), name
    losses = noisy(path.final)
    assert abs(float(losses.mean() - run.final_loss)) < 5 * float(losses.std()) / 20_000**0.5


def test_the_noise_of_batches_is_measured(particles):
    noisy, path, _ = particles
    noise = esl.minibatch_noise(path, noisy, key=jax.random.key(7), pairs=1)
    away = np.abs(noise.variance - 2.8)
    np.testing.assert_array_less(away, 5 * np.asarray(noise.standard_error.variance))


# --- The front ------------------------------------------------------------------------------------


def power_law(d, noise, power=1.0):
    spectrum = jnp.arange(1.0, d + 1) ** -power
    start = Independent(jnp.ones(d), 0.0)
    return start, esl.Quadratic(
        spectrum, gradient_noise=None if noise is None else noise * spectrum
    )


@pytest.mark.parametrize("power", [0.8, 1.5])
def test_with_noise_the_best_rate_warms_up_and_cools_down(power):
    found = front(*power_law(12, 1.0, power), steps=60, weights=[0.1, 0.2, 0.3, 0.4], knots=8)
    assert bool(jnp.all(found.converged))
    for rates in np.asarray(found.rates):
        top = rates.argmax()
        assert 0 < top < 7
        assert (np.diff(rates)[:top] > 0).all()
        assert (np.diff(rates)[top:] < 0).all()
        assert max(rates[0], rates[-1]) < rates[top] / 2
    # More Σ buys less loss, at the slope that the weights say.
    loss, sigma = np.log(found.final_loss), np.log(found.entropy_production)
    assert (np.diff(loss) > 0).all()
    assert (np.diff(sigma) < 0).all()
    slopes = -np.diff(loss) / np.diff(sigma)
    for slope, (low, high) in zip(slopes, itertools.pairwise(found.weights), strict=True):
        assert low < slope < high
    assert (found.w2_squared < found.entropy_production).all()


def test_without_noise_the_best_rate_rises():
    start, quiet = power_law(12, None)
    found = front(start, quiet, steps=60, targets=[0.3, 0.1], knots=6)
    assert bool(jnp.all(found.converged))
    np.testing.assert_allclose(found.final_loss, [0.3, 0.1], rtol=1e-3)
    assert (np.diff(found.rates, axis=1) > 0).all()


def test_a_point_is_stationary_and_below_the_usual_shapes(x64):
    start, noisy = power_law(12, 1.0)
    found = front(start, noisy, steps=60, weights=[0.3], knots=8)
    again = front(start, noisy, steps=60, targets=found.final_loss, knots=8)
    np.testing.assert_allclose(again.entropy_production, found.entropy_production, rtol=1e-6)
    np.testing.assert_allclose(again.weights, 0.3, rtol=1e-3)

    @eqx.filter_jit
    def objective(rate):
        run = descent(start, noisy, esl.Langevin(rate), steps=60)
        return jnp.log(run.final_loss) + 0.3 * jnp.log(run.entropy_production)

    (schedule,) = found.schedules
    value, slope = eqx.filter_value_and_grad(objective)(schedule)
    truth = jnp.log(found.final_loss[0]) + 0.3 * jnp.log(found.entropy_production[0])
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    assert float(jnp.linalg.norm(slope.parameters)) < 1e-5
    for shape in (esl.Constant, esl.Cosine, esl.WarmupStableDecay, lambda x: esl.Linear(x, 0.0)):
        peaks = [float(objective(shape(peak))) for peak in np.linspace(0.02, 1.0, 40)]
        inside = np.diff(np.sign(np.diff(peaks))).argmax() + 1
        assert peaks[inside] > float(value), "the local minimum, not the run that does not move"


def test_a_weight_without_a_minimum_is_said_and_harms_no_other():
    found = front(*power_law(12, 1.0), steps=60, weights=[0.3, 3.0, 0.2], knots=8)
    assert found.converged.tolist() == [True, False, True]
    alone = front(*power_law(12, 1.0), steps=60, weights=[0.3, 0.3, 0.2], knots=8)
    np.testing.assert_allclose(found.final_loss[2], alone.final_loss[2], rtol=1e-4)
    assert [("no minimum found" in line) for line in str(found).splitlines()[1:]] == [0, 1, 0]


# --- Bad input ------------------------------------------------------------------------------------


BAD = [
    (lambda: esl.Quadratic(1.0, gradient_noise=-1.0), "`gradient_noise` must be at least 0"),
    (lambda: esl.Quadratic(1.0, gradient_noise=[1.0, np.nan]), "`gradient_noise` must be finite"),
    (
        lambda: esl.Quadratic([1.0, 2.0], gradient_noise=[1.0, 2.0, 3.0]),
        r"`gradient_noise` must be a scalar or have shape \(2,\) or \(2, 2\), as d is 2",
    ),
    (
        lambda: esl.Quadratic(1.0, [1.0, 2.0], gradient_noise=np.eye(3)),
        r"`gradient_noise` must be a scalar or have shape \(2,\)",
    ),
    (
        lambda: esl.Quadratic(1.0, gradient_noise=np.ones((2, 3))),
        r"`gradient_noise` must be a scalar or have shape \(d,\)",
    ),
    (
        lambda: esl.Quadratic(1.0, gradient_noise=[[1.0, 0.5], [0.0, 1.0]]),
        "`gradient_noise` must be symmetric, but differs from its transpose by 0.5",
    ),
    (
        lambda: esl.Quadratic(1.0, gradient_noise=[[1.0, 2.0], [2.0, 1.0]]),
        "`gradient_noise` must be positive semidefinite, but has the eigenvalue -1",
    ),
    (lambda: Independent(1.0, 1.0), r"`mean` must have shape \(d,\)"),
    (lambda: Independent([1.0], [1.0, 2.0]), r"`variance` must be a number or have shape \(1,\)"),
    (lambda: Independent([1.0], -1.0), "`variance` must be at least 0"),
    (
        lambda: descent(Independent([1.0], 1.0), esl.Quadratic(1.0), rule(), steps=6, links=4),
        "`links` must divide the 6 steps, but is 4",
    ),
    (
        lambda: descent(
            Independent([1.0], 1.0), esl.Quadratic(1.0, gradient_noise=[1.0, 2.0]), rule(), steps=6
        ),
        r"`potential.gradient_noise` must be a number or have shape \(1,\)",
    ),
    (
        lambda: descent(Independent([1.0], 1.0), esl.Quadratic(1.0), esl.Langevin(-0.1), steps=6),
        "`rule.learning_rate` must be at least 0",
    ),
    (
        lambda: esl.gaussian.speed_limit(
            Independent([1.0], 1.0), esl.Quadratic(1.0, gradient_noise=1.0), rule(), steps=6
        ),
        r"`potential` must have no gradient noise in continuous training time \(`descent` counts",
    ),
    (lambda: front(*power_law(3, 1.0), steps=4, weights=[0.1], targets=[0.1]), "in place of"),
    (lambda: front(*power_law(3, 1.0), steps=4, weights=0.1), r"`weights` must have shape \(P,\)"),
    (lambda: front(*power_law(3, 1.0), steps=4, targets=[-1.0]), "`targets` must be greater than"),
    (lambda: front(*power_law(3, 1.0), steps=4, largest_rate=0.0), "`largest_rate` must be gr"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input(call, sentence):
    with pytest.raises(esl.InputError, match=sentence):
        call()


def test_the_limits_in_continuous_time_take_independent_coordinates(x64):
    one, other = Independent(MEAN, [0.5, 1.0, 0.2]), Law(MEAN, np.diag([0.5, 1.0, 0.2]))
    end = Law(CENTER, COVARIANCE)
    np.testing.assert_array_equal(
        esl.gaussian.w2_squared(one, end), esl.gaussian.w2_squared(other, end)
    )
    rule, trap = esl.Langevin(0.1, 0.1), esl.Quadratic(SPECTRUM)
    reports = [esl.gaussian.speed_limit(law, trap, rule, steps=10) for law in (one, other)]
    assert reports[0].entropy_production == reports[1].entropy_production
