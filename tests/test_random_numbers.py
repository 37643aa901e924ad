"""Keys that draw in line: the random numbers of jax, bit for bit."""

import contextlib
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.potentials import drawn_in_line

KEYS = [jax.random.key(0), jax.random.key(2**32 - 1), jax.random.fold_in(jax.random.key(3), 7)]
SHAPES = [(), (0,), (7,), (2, 3, 4), (30, 101)]
USES = {
    "normal": jax.random.normal,
    "randint": lambda key, shape: jax.random.randint(key, shape, 0, 1437),
    "8 bits": lambda key, shape: jax.random.bits(key, shape, "uint8"),
    "16 bits": lambda key, shape: jax.random.bits(key, shape, "uint16"),
    "32 bits": lambda key, shape: jax.random.bits(key, shape, "uint32"),
    "split": lambda key, shape: jax.random.key_data(jax.random.split(key, shape)),
    "of members": lambda key, shape: jax.vmap(lambda one: jax.random.normal(one, shape))(
        jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(3))
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "x64"])
def test_the_bits_are_those_of_jax(use, wide):
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        for key in KEYS:
            for shape in SHAPES:
                draw = jax.jit(lambda key, shape=shape: use(key, shape))
                np.testing.assert_array_equal(draw(drawn_in_line(key)), draw(key))


def test_sixty_four_bits_too(x64):
    for shape in SHAPES:
        of_jax, in_line = (
            jax.random.bits(key, shape, "uint64") for key in (KEYS[1], drawn_in_line(KEYS[1]))
        )
        np.testing.assert_array_equal(of_jax, in_line)


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1])
def test_numbers_are_folded_in_as_jax_does(number):
    for key in KEYS:
        one, other = (jax.random.fold_in(each, number) for each in (key, drawn_in_line(key)))
        np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(other))


def test_the_noise_of_a_run_is_that_of_its_key():
    """As a program that draws by jax alone finds it, so that no number depends on this module."""
    key, members, d = jax.random.key(5), 6, 3
    start = np.zeros((members, d), np.float32)
    rule = esl.Langevin(0.5, 1.0)  # noise of amplitude 1
    path = esl.simulate(esl.Quadratic(0.0), rule, start, steps=4, snapshots=4, key=key)
    for k, step in enumerate(np.diff(path.positions, axis=0)):
        # As `simulate` documents it, and 1 for the noise.
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, k), 1), (members, d))
        np.testing.assert_allclose(step, noise, atol=1e-6)


class Mixing(esl.AbstractRule):
    """Members that are moved by what the key of a step gives beside a key of one's own."""

    own: jax.Array
    draw: Callable = eqx.field(static=True)
    learning_rate: esl.AbstractSchedule = esl.Constant(0.1)
    temperature: esl.AbstractSchedule = esl.Constant(0.0)

    def controls(self, steps):
        return esl.simulation.Controls(jnp.full(steps, 0.1), jnp.zeros(steps))

    def step(self, positions, kick, control, key):
        energies, _ = kick(positions, control.learning_rate)
        return self.draw(key, self.own, positions.shape).astype(positions.dtype), energies


def replaced_in_a_loop(key, own, shape):
    return jax.lax.scan(lambda one, _: (key, jax.random.normal(one, shape)), own, None, 2)[1].sum(0)


MIXED = {
    "either": lambda key, own, shape: jax.random.normal(
        jax.lax.cond(jax.random.bernoulli(key), lambda: key, lambda: own), shape
    ),
    "choice": lambda key, own, shape: jax.random.normal(
        jnp.where(jax.random.bernoulli(key), key, own), shape
    ),
    "both": lambda key, own, shape: jax.vmap(lambda one: jax.random.normal(one, shape))(
        jnp.stack([key, own])
    ).sum(0),
    "loop": replaced_in_a_loop,
    # jax knows this law for its own generator alone.
    "poisson": lambda key, own, shape: jax.random.poisson(key, 3.0, shape),
}


@pytest.mark.parametrize("draw", MIXED.values(), ids=MIXED)
def test_the_key_of_a_step_is_one_of_jax(draw):
    """A rule from outside mixes it with keys of its own, and so may a potential."""
    key, own, start = jax.random.key(5), jax.random.key(9), jnp.zeros((4, 2))
    rule = Mixing(own=own, draw=draw)
    path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=3, snapshots=3, key=key)
    for k, found in enumerate(path.positions[1:]):
        of_step = jax.random.fold_in(jax.random.fold_in(key, k), 1)
        np.testing.assert_allclose(found, draw(of_step, own, start.shape), atol=1e-6)


def test_programs_grow_by_as_much_with_each_key_behind_a_key():
    """Rounds that XLA repeated for every number drawn made compilers of jax 0.12 not end."""

    def operations(depth):
        def draw(key):
            key = esl.potentials.drawn_in_line(key)
            for _ in range(depth):
                key = jax.random.split(key, 4)[1]
            return jax.vmap(lambda key: jax.random.normal(key, (3,)))(jax.random.split(key, 4))

        return jax.jit(draw).lower(jax.random.key(0)).compile().as_text().count(" xor(")

    counts = np.array([operations(depth) for depth in range(4)])
    assert counts[0] > 0
    assert np.ptp(np.diff(counts)) <= 2, counts


def test_no_key_is_used_twice():
    start, key = jnp.ones((4, 2)), jax.random.key(5)
    potential = esl.Quadratic(1.0, gradient_noise=0.1)

    def final(temperature):
        rule = esl.Langevin(0.1, temperature)
        path = esl.simulate(potential, rule, start, steps=4, snapshots=2, key=key)
        return jnp.sum(path.final)

    expected = jax.value_and_grad(final)(0.1)
    with jax.debug_key_reuse(True):
        found = jax.jit(jax.value_and_grad(final))(0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_keys_of_gradient_noise_are_those_of_jax():
    key = jax.random.key(0)
    assert esl.Quadratic(1.0, gradient_noise=0.1).draw(key, 3).dtype == key.dtype


def test_on_a_cpu_nothing_is_drawn_in_a_loop():
    def loops(platform, of):
        draw = jax.jit(lambda key: jax.random.normal(of(key), (100,)))
        lowered = draw.trace(jax.random.key(0)).lower(lowering_platforms=(platform,))
        return "stablehlo.while" in lowered.as_text()

    assert loops("cpu", lambda key: key)
    assert not loops("cpu", drawn_in_line)
    # Elsewhere jax's own way is the faster one, a kernel of its own on a GPU.
    for platform in ("cuda", "tpu"):
        assert not loops(platform, drawn_in_line)


def test_other_generators_stay_what_they_are():
    for impl in ("rbg", "unsafe_rbg"):
        key = jax.random.key(1, impl=impl)
        assert drawn_in_line(key).dtype == key.dtype
    assert drawn_in_line(drawn_in_line(KEYS[0])).dtype == drawn_in_line(KEYS[0]).dtype
    with jax.threefry_partitionable(False):
        assert drawn_in_line(KEYS[0]).dtype == KEYS[0].dtype
