"""RKHS and network fields: where affine ones fail, where there is nothing to find, along a run."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_fokker_planck
import pytest
from ensembles import exact_thirds
from scipy.linalg import solve_continuous_lyapunov

import esljax as esl

FLEXIBLE = {
    "kernel": lambda: esl.KernelVelocity(),
    "network": lambda: esl.NetworkVelocity(key=jax.random.key(7)),
}


def test_the_oracle_solves_ornstein_uhlenbeck():
    solved = oracles_fokker_planck.Diffusion(
        lambda x: x**2 / 2, 0.1, oracles_fokker_planck.normal_density(2, 1), -5, 9
    )
    np.testing.assert_allclose(solved.path(1.0), oracles.O1[1], rtol=5e-4)
    coarse = oracles_fokker_planck.Diffusion(
        lambda x: x**2 / 2, 0.1, oracles_fokker_planck.normal_density(2, 1), -5, 9, 800
    )
    errors = [np.array(one.path(1.0)) / oracles.O1[1] - 1 for one in (coarse, solved)]
    np.testing.assert_allclose(
        errors[0] / errors[1], 4, rtol=0.05
    )  # second order in the width of a cell
    np.testing.assert_allclose(
        oracles_fokker_planck.mixture_rate([-2, 2], 0.5, 1.0), 3.993714, rtol=1e-6
    )


@pytest.mark.parametrize("name", FLEXIBLE)
def test_modes_that_diffuse(name):
    """Within 10 % where the affine fields see 6 %."""
    n, heat = 2000, 0.3
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(n, 1)) / 2 + rng.choice([-2.0, 2.0], (n, 1))).astype(np.float32)
    truth = oracles_fokker_planck.mixture_rate([-2, 2], 0.5, heat)
    velocity = FLEXIBLE[name]()(x, 0 * x, heat)
    np.testing.assert_allclose(velocity.squared, truth, rtol=0.1)
    np.testing.assert_allclose(
        esl.AffineVelocity()(x, 0 * x, heat).squared, 0.235294 * heat**2, rtol=0.1
    )
    assert velocity.bound == "lower"


# O9: stiffness, diffusion and E‖v‖² of rotation in a trap, and of linearized stochastic gradients
# with anisotropic noise.
CIRCULATION = {
    "rotation": (np.array([[1.0, 2.0], [-2.0, 1.0]]), 0.5 * np.eye(2), 4.0),
    "stochastic gradients": (np.array([[2.0, 0.5], [0.5, 1.0]]), np.diag([0.3, 0.1]), 0.017857143),
}


@pytest.mark.parametrize("case", CIRCULATION)
@pytest.mark.parametrize(
    "velocity", [esl.AffineVelocity(), esl.KernelVelocity()], ids=["affine", "kernel"]
)
def test_stationary_circulation_is_all_housekeeping(velocity, case):
    """From members with exact moments."""
    stiffness, diffusion, truth = CIRCULATION[case]
    x = exact_thirds(4200, [0.0, 0.0], solve_continuous_lyapunov(stiffness, 2 * diffusion))
    result = velocity(x, -x @ stiffness.T.astype(np.float32), diffusion.astype(np.float32))
    np.testing.assert_allclose(result.squared, truth, rtol=0.05)
    assert abs(float(jnp.mean(result.gradient_contributions))) < 0.05 * truth


@pytest.mark.parametrize("case", CIRCULATION)
def test_stationary_circulation_of_plain_samples(case):
    """Within 5 %, with enough members to resolve it.

    For stochastic gradients the drift and the score, 40 times σ each, all but cancel.
    """
    stiffness, diffusion, truth = CIRCULATION[case]
    covariance = solve_continuous_lyapunov(stiffness, 2 * diffusion)
    x = np.random.default_rng(0).normal(size=(400_000, 2)) @ np.linalg.cholesky(covariance).T
    velocity = esl.AffineVelocity()(
        x.astype(np.float32), (-x @ stiffness.T).astype(np.float32), diffusion.astype(np.float32)
    )
    assert float(velocity.standard_error.squared) < 0.02 * truth
    np.testing.assert_allclose(velocity.squared, truth, rtol=0.05)
    apart = velocity.contributions - velocity.gradient_contributions
    np.testing.assert_allclose(jnp.mean(apart), truth, rtol=0.05)  # all of it housekeeping


def test_a_mixture_in_a_trap_has_no_housekeeping():
    """Two modes in a plane, dθ = -θ du + sqrt(2 D) dW: the velocity is a gradient.

    What is fitted to the rest finds noise alone, where fields that are chosen apart differ by 2 %.
    """
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(1200, 2)) / 2 + rng.choice([-1.5, 1.5], (1200, 1))).astype(np.float32)
    velocity = esl.KernelVelocity(landmarks=60)(x, -x, 0.3)
    whole, gradient = (
        float(jnp.mean(each)) for each in (velocity.contributions, velocity.gradient_contributions)
    )
    assert whole > 1.03 * float(esl.AffineVelocity()(x, -x, 0.3).squared)
    assert abs(whole - gradient) < 0.01 * whole


def test_a_gaussian_near_rest_has_no_bias_and_no_blow_up():
    """σ is a hundredth of that of its drift; 200 members, 100 times.

    The bound is below 0 in nearly every run.
    """
    variance, shift, heat = 0.12, 0.02, 0.1
    truth = shift**2 + (heat / variance - 1) ** 2 * variance

    def one(key):
        x = shift + variance**0.5 * jax.random.normal(key, (200, 1))
        given = esl.velocity.Snapshot(x, -x, jnp.full((), heat))
        answer = esl.KernelVelocity().estimate(given, None)[0]
        return (
            answer.squared,
            answer.standard_error.squared,
            jnp.mean(answer.bound_contributions),
        )

    keys = jax.random.split(jax.random.key(11), 100)
    sigma, error, bound = np.array(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    spread = np.std(sigma, ddof=1)
    assert abs(np.mean(sigma) - truth) < 0.5 * spread
    assert np.mean(bound) < truth - 0.5 * spread
    # Fields that win by chance and blow up spread σ by .05.
    assert spread < 0.02
    assert np.mean(np.abs(sigma - truth) < 3 * error) > 0.9


@pytest.mark.parametrize(
    "name",
    ["affine", *(pytest.param(x, marks=[pytest.mark.slow] * (x == "network")) for x in FLEXIBLE)],
)
def test_nothing_moves_at_equilibrium(name):
    x = (np.random.default_rng(1).normal(size=(2000, 2)) * 0.5**0.5).astype(np.float32)
    velocity = (esl.AffineVelocity() if name == "affine" else FLEXIBLE[name]())(x, -x, 0.5)
    # The fits of thirds err by about 3d²/n of the scale T k d = 1.
    assert abs(float(velocity.squared)) < 5 * float(velocity.standard_error.squared) + 5 * 8 / 2000
    apart = velocity.contributions - velocity.gradient_contributions
    assert abs(float(jnp.mean(apart))) < 5 * float(jnp.std(apart)) / 2000**0.5 + 5 * 8 / 2000


@pytest.mark.parametrize("seed", range(3))
def test_few_members_do_not_explode(seed):
    x = np.random.default_rng(seed).normal(size=(50, 5)).astype(np.float32)
    x[:, 0] += 2
    velocity = esl.KernelVelocity()(x, -x, 0.1)
    assert 0.5 < float(velocity.squared) / (4 + 5 * 0.81) < 1.5


@pytest.mark.slow
def test_double_well_with_noise():
    """Σ, L² and W2² within 3 % of the Fokker-Planck equation; the cloud falls into two wells."""
    cloud = oracles_fokker_planck.FallingCloud()
    truth = cloud.numbers()
    potential, rule = (
        esl.DoubleWell(cloud.barrier, cloud.width),
        esl.Langevin(cloud.clock / 600, cloud.temperature),
    )

    def run(seed):
        return esl.simulate(
            potential, rule, cloud.start(2000), steps=600, snapshots=40, key=jax.random.key(seed)
        )

    # One run scatters by 2 % in each number, so the mean of three.
    report = esl.speed_limit(
        [run(seed) for seed in range(3)],
        transport=esl.ExactTransport(),
        velocity=esl.KernelVelocity(),
        potential=potential,
    )
    measured = (report.entropy_production, report.length_squared, report.w2_squared)
    np.testing.assert_allclose(measured, truth, rtol=0.03)
    assert abs(float(report.housekeeping)) < 1e-6
    # Affine fields see one broad cloud and miss most of it; the chain of empirical laws adds the
    # noise of every link.
    assert report.entropy_production_chain > 1.1 * report.entropy_production
    moments = {
        "transport": esl.GaussianTransport(),
        "velocity": esl.AffineVelocity(),
        "potential": potential,
    }
    assert esl.speed_limit(run(0), jackknife=0, **moments).entropy_production < 0.9 * truth[0]


def test_few_members_in_one_dimension_do_not_fool_the_cross_validation():
    """Thirds of 16 Gaussian members, whose best field is affine.

    The best of 25 kernels must not win by chance and blow up.
    """
    keys = jax.random.split(jax.random.key(7), 60)

    def draw(key):
        return 1.2131 + 0.65683 * jax.random.normal(key, (50, 1))

    ratios = jax.jit(
        lambda keys: jax.lax.map(
            lambda key: esl.KernelVelocity()(draw(key), -draw(key), 0.1).squared / 1.7257, keys
        )
    )(keys)
    assert float(jnp.min(ratios)) > 0
    assert abs(float(jnp.mean(ratios)) - 1) < 5 * float(jnp.std(ratios)) / 60**0.5
