"""Findings about Σ: sampling noise, spacing, and velocities that the chain contradicts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")
TRAP = esl.Quadratic(jnp.array([0.5, 1.0, 1.5, 2.0]))


def fall(temperature, n=64, time=1.5, steps=200, snapshots=20, width=0.5, center=2.0, seed=1):
    start = center + width * jax.random.normal(jax.random.key(seed), (n, 4))
    rule = esl.Langevin(time / steps, temperature)
    key = jax.random.key(seed + 100)
    return esl.simulate(TRAP, rule, start, steps=steps, snapshots=snapshots, key=key)


def names(report):
    return [finding.name for finding in report.diagnose()]


def by_moments(path, potential=TRAP, **options):
    return esl.speed_limit(
        path,
        transport=esl.GaussianTransport(),
        velocity=esl.AffineVelocity(),
        potential=potential,
        **{"debias": True, "jackknife": 16, **options},
    )


# Sampling noise


@pytest.fixture(scope="module")
def slow():
    """A trap that relaxes by a little: Σ of the law is about .05, and that of samples ten times."""
    return fall(0.5, n=100, time=0.3, width=0.6, center=0.3)


def test_a_chain_of_samples_in_a_slow_trap_is_sampling_noise(slow):
    report = esl.speed_limit(slow, transport=esl.GaussianTransport(), debias=True, jackknife=16)
    (finding,) = report.diagnose()
    assert finding.name == "sampling noise"
    assert "fewer snapshots" in finding.change
    assert "more snapshots" not in finding.change
    assert "errs upward" in finding.evidence
    # Velocities of the same run are not made of links.
    report = by_moments(slow)
    assert not {"sampling noise", "Σ not converged in snapshot spacing"} & set(names(report))


@pytest.mark.parametrize("debias", [True, False])
def test_a_length_of_samples_is_sampling_noise(debias):
    """By the moments of its law L² of this trap is 4.24; 64 members give 13 to 14."""
    start = 0.05**0.5 * jax.random.normal(jax.random.key(0), (64, 4)) + 2 * jnp.eye(4)[0]
    rule, key = esl.Langevin(0.01, 0.5), jax.random.key(50)
    path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=200, snapshots=20, key=key)
    report = esl.speed_limit(path, transport=esl.GaussianTransport(), debias=debias, jackknife=16)
    (finding,) = report.diagnose()
    assert finding.name == "sampling noise"
    assert finding.evidence.startswith("The chain's L² is 12.")


@pytest.mark.parametrize("debias", [True, False])
def test_a_bend_of_samples_is_sampling_noise(debias):
    """Independent draws of one law that moves straight: no bend, and speeds that are resolved."""
    moving = 2 * jnp.arange(9.0)[:, None, None] * jnp.eye(16)[0]
    draws = jax.random.normal(jax.random.key(0), (9, 64, 16))
    for path, expected in ((draws + moving, ["sampling noise"]), (draws[:1] + moving, [])):
        report = esl.speed_limit(
            esl.from_snapshots(path), transport=esl.GaussianTransport(), debias=debias
        )
        assert report.length_resolved
        assert names(report) == expected
        assert all(one.evidence.startswith("The chain's L² - W2² is") for one in report.diagnose())


def test_without_a_debiased_chain_spacing_asks_for_it(slow):
    report = esl.speed_limit(slow, transport=esl.GaussianTransport(), jackknife=0)
    finding = next(one for one in report.diagnose() if one.name.startswith("Σ not converged"))
    assert finding.change.startswith("measure with debias=True")
    # A Σ that is not the chain's is not judged by the chain's spacing.
    report = by_moments(slow, debias=False, jackknife=0)
    assert "Σ not converged in snapshot spacing" not in names(report)


def test_spacing_is_found_beside_noise_that_does_not_explain_it():
    turning = jnp.stack([jnp.sin(1.5 * jnp.arange(5.0)), jnp.arange(5.0)], axis=1)[:, None, :]
    path = esl.from_snapshots(jax.random.normal(jax.random.key(0), (64, 2)) + turning)
    report = esl.speed_limit(path, transport=esl.GaussianTransport(), debias=True)
    (finding,) = report.diagnose()
    assert finding.name == "Σ not converged in snapshot spacing"
    assert finding.change.startswith("take more snapshots")


# Velocities and the chain

FAULTS = {
    "rates x 3": (lambda path: dataclasses.replace(path, rates=3 * path.rates), TRAP),
    "rates / 3": (lambda path: dataclasses.replace(path, rates=path.rates / 3), TRAP),
    "T x 5": (lambda path: dataclasses.replace(path, temperatures=5 * path.temperatures), TRAP),
    "stiffer": (lambda path: path, esl.Quadratic(3.0)),
    "softer": (lambda path: path, esl.Quadratic(jnp.array([0.2, 0.4, 0.6, 0.8]))),
    "elsewhere": (lambda path: path, esl.Quadratic(jnp.array([0.5, 1.0, 1.5, 2.0]), 1.0)),
}


@pytest.fixture(scope="module")
def warm():
    return [fall(0.1, seed=seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_did_not_move_the_run_is_found(warm, fault):
    change, potential = FAULTS[fault]
    # A wrong temperature adds a third to Σ, other faults more than half.
    for path in [fall(0.1, n=256, seed=seed) for seed in (1, 2, 3)] if fault == "T x 5" else warm:
        finding = next(
            one
            for one in by_moments(change(path), potential).diagnose()
            if one.name == "velocity and chain disagree"
        )
        assert "times the chain's debiased" in finding.evidence
        assert finding.causes[0].startswith("a potential, learning rates or temperatures")


@pytest.mark.parametrize(
    "velocity", [esl.AffineVelocity(), esl.KernelVelocity(), None], ids=["affine", "kernel", "maps"]
)
def test_what_moved_the_run_agrees_with_the_chain(warm, velocity):
    moments = isinstance(velocity, esl.AffineVelocity)
    transport = esl.GaussianTransport() if moments else esl.ExactTransport()
    velocity = esl.TransportVelocity(transport) if velocity is None else velocity
    for path in warm if moments else warm[:1]:
        options = {
            "transport": transport,
            "velocity": velocity,
            "potential": TRAP if velocity.needs_drift else None,
            "jackknife": 8 * moments,
        }
        report = esl.speed_limit(path, debias=True, **options)
        assert "velocity and chain disagree" not in names(report)
        if velocity.needs_drift:
            wrong = dataclasses.replace(path, rates=3 * path.rates)
            found = names(esl.speed_limit(wrong, debias=True, **options))
            assert "velocity and chain disagree" in found
