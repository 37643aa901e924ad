"""An accelerator against the CPU of its machine: numbers to rounding, equal bits, planned memory.

pytest -m gpu -n 1
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no accelerator"),
]

KEY = jax.random.key(0)
RATES = jnp.array([0.1, 0.2, 0.3])
TRANSPORTS = {
    "exact": esl.ExactTransport(),
    "gaussian": esl.GaussianTransport(),
    "sliced": esl.SlicedTransport(10, jax.random.key(1)),
    "sinkhorn": esl.SinkhornTransport(1.0),
    "sinkhorn in blocks": esl.SinkhornTransport(1.0, chunk=16),
}


def on(platform, function, *arguments):
    """Return the result of the function, compiled for the first device of a platform."""
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        result = jax.jit(function)(*jax.device_put(arguments, device))
        assert {x.device for x in jax.tree.leaves(result)} == {device}
        return jax.tree.map(np.asarray, result)


def same_on_both(function, *arguments, rounding):
    here, there = (
        jax.tree.leaves(on(platform, function, *arguments)) for platform in (None, "cpu")
    )
    for one, other in zip(here, there, strict=True):
        assert np.all(np.isfinite(other))
        assert np.abs(one - other).max() <= rounding * np.abs(other).max()


@pytest.fixture
def full_precision():
    """Multiply as a CPU does: by default each device rounds in its own way."""
    with jax.default_matmul_precision("highest"):
        yield


def run(potential, start, rates, steps=20, snapshots=10):
    return esl.simulate(
        potential,
        esl.Langevin(esl.Knots(rates), 1e-3),
        start,
        steps=steps,
        snapshots=snapshots,
        key=KEY,
    )


def network(members=16):
    potential = esl.FlaxLoss(
        esl.models.mlp(64, 32, 10), esl.datasets.digits().train, batch_size=256, l2=1e-4
    )
    return potential, potential.init(members=members, key=KEY)


def test_trajectories_of_a_trap_are_those_of_the_cpu():
    start = jax.random.normal(KEY, (16, 5))
    same_on_both(
        lambda start: run(esl.Quadratic(jnp.linspace(1.0, 3.0, 5)), start, RATES).positions,
        start,
        rounding=1e-6,
    )


def test_trajectories_of_networks_are_those_of_the_cpu(full_precision):
    potential, start = network()
    same_on_both(lambda start: run(potential, start, RATES).positions, start, rounding=1e-5)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_distances_and_their_gradients_are_those_of_the_cpu(name):
    x, y = (jax.random.normal(jax.random.key(seed), (64, 10)) + seed for seed in range(2))
    same_on_both(jax.value_and_grad(TRANSPORTS[name].squared, (0, 1)), x, y, rounding=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, transport in TRANSPORTS.items() if transport.is_metric]
)
def test_small_increments_are_those_of_the_cpu(name):
    """One coarse product would drown the increment of snapshots that are far from the origin."""
    x = jax.random.normal(KEY, (64, 10)) + 10

    # Not a method, which is part of a program's name: a transport may hold arrays.
    def squared(x, y):
        return TRANSPORTS[name].squared(x, y)

    same_on_both(squared, x, x + 0.01 * jnp.sin(x), rounding=1e-3)


def test_the_gradient_of_the_gap_is_that_of_the_cpu(full_precision):
    potential, start = network()

    def gap(rates, start):
        return esl.speed_limit(
            run(potential, start, rates), transport=esl.ExactTransport(), jackknife=0
        ).gap

    same_on_both(jax.value_and_grad(gap), RATES, start, rounding=1e-3)


def test_a_run_and_its_gradient_have_the_same_bits_twice():
    potential, start = network()
    program = jax.jit(
        jax.value_and_grad(
            lambda rates: jnp.mean(potential(run(potential, start, rates, steps=100).final))
        )
    )
    first, second = program(RATES), program(RATES)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("members", [64, 512])
def test_the_planned_memory_is_what_the_compiler_asks_for(members):
    potential, start = network(members)
    transport = esl.GaussianTransport()

    def gap(rates):
        return esl.speed_limit(
            run(potential, start, rates, steps=100), transport=transport, jackknife=0
        ).gap

    needed = jax.jit(jax.grad(gap)).lower(RATES).compile().memory_analysis().temp_size_in_bytes
    planned = esl.plan_memory(potential, start, steps=100, snapshots=10, transport=transport).total
    # Every compiler fuses in its own way; a plan answers whether a run fits.
    assert 1 / 2 < planned / needed < 2


def test_a_hundred_thousand_members_are_transported():
    n, shift = 100_000, 0.5
    x, y = (jax.random.normal(jax.random.key(seed), (n, 10)) + seed * shift for seed in range(2))
    transport = esl.SinkhornTransport(2.0, chunk=1024)
    solved = jax.jit(lambda transport, x, y: transport.solve(x, y))(transport, x, y)
    assert solved.converged
    # The divergence of two equal clouds that a shift separates is the shift squared, but for the
    # sample means.
    assert abs(solved.squared - 10 * shift**2) < 5 * np.sqrt(4 * 10 * shift**2 * 2 / n) + 10 * 2 / n
