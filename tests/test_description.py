"""Descriptions of runs: everything that changes numbers counts, and nothing else does."""

import argparse
import dataclasses
import functools
import os
import runpy
import subprocess
import sys
import textwrap
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esljax as esl
from esljax.files.description import describe


def function(*held, power=2):
    return lambda x: (held, x**power)


def keyword(scale):
    def scaled(x, *, by=scale):
        return by * x

    return scaled


class Loss:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return self.scale * x


class Named(Loss):
    def __repr__(self):
        return "a loss"


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


def potential(power):
    """An instance without attributes; all its classes have the same name."""

    def steep(x):
        return jnp.sum(x**power)

    class Steep(esl.AbstractPotential):
        conservative = True

        def draw(self, key, steps):
            return jnp.zeros(steps)

        def energy(self, x, batch):
            return steep(x)

        def energy_and_gradient(self, x, batch):
            return jax.value_and_grad(steep)(x)

    return Steep()


def network(bend):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            return bend(self.layer(x))

    return esl.FlaxLoss(Network(nnx.Rngs(0)), (jnp.ones((4, 2)), jnp.array([0, 1, 0, 1])))


def script(text, name="__main__", **others):
    """The functions of a script, as a user writes them at the top of a file."""
    module = types.ModuleType(name)
    vars(module).update(others)
    exec(textwrap.dedent(text), vars(module))
    return module


def loading(text, **others):
    return script(
        "def objective(x):\n    return run(x)\ndef run(x):\n    return [SCALE * y for y in x]\n"
        + text,
        **others,
    ).objective


def backward(factor):
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, slope: (factor * slope,))
    return f


schedule = optax.piecewise_constant_schedule


def settings(scale):
    return script(f"SCALE = {scale}", "settings_of_mine")


through = "from jax import numpy\ndef objective(x):\n    return mine.SCALE * x"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (function(True, False, True), function(True, False, False)),
        (function(1, 2, 1), function(1, 2, 2)),
        (function(None, 0.5), function(0.5, None)),
        (function(1), function(True)),
        (function(1.0), function(1)),
        (function(1.0), function(1.0, power=4)),
        ([32, 16, 32], [32, 16, 16]),
        ((8, 4, 8), (8, 4, 4)),
        ([[1], [2]], [[1, 2]]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({1, 2}, {1, 3}),
        (schedule(1.0, {10: 0.5, 20: 0.1}), schedule(1.0, {10: 0.5, 20: 0.5})),
        (optax.adam(0.1), optax.adam(0.2)),
        (keyword(2.0), keyword(3.0)),
        (functools.partial(jnp.sum, axis=0), functools.partial(jnp.sum, axis=1)),
        (jax.vmap(jnp.sin, in_axes=0), jax.vmap(jnp.sin, in_axes=1)),
        (Loss(1.0), Loss(2.0)),
        (Loss(1.0).__call__, Loss(2.0).__call__),
        (Named(1.0), Named(2.0)),
        (Slotted(1.0), Slotted(2.0)),
        (Loss(np.zeros(5000)), Loss(np.r_[np.zeros(2500), 1, np.zeros(2499)])),
        (np.array([None, 1], object), np.array([None, 2], object)),
        (loading("SCALE = 1.0"), loading("SCALE = 2.0")),
        (loading("SCALE = 1.0"), loading("SCALE = 1.0\ndef run(x):\n    return x")),
        (script(through, mine=settings(1)).objective, script(through, mine=settings(2)).objective),
        (potential(4), potential(6)),
        (network(jnp.tanh), network(jnp.sin)),
        (backward(1.0), backward(2.0)),
        (esl.FromFunction(function(1.0)), esl.FromFunction(function(3.0))),
        (
            eqx.nn.MLP(2, 1, 4, 1, jax.nn.relu, key=jax.random.key(0)),
            eqx.nn.MLP(2, 1, 4, 1, jax.nn.tanh, key=jax.random.key(0)),
        ),
        (jnp.zeros(2), np.zeros(2)),
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.key(0), jax.random.key(0, impl="rbg")),
    ],
)
def test_different_runs_have_different_descriptions(one, other):
    assert describe(function(one)) != describe(function(other))
    assert describe(one) != describe(other)


@dataclasses.dataclass
class Knot:
    next: object = None
    name: str = ""


def ring(name):
    first = Knot(name=name)
    first.next = [first, Knot(first)]
    return first


def nested(depth):
    thing = []
    for _ in range(depth):
        thing = [thing]
    return thing


@pytest.mark.parametrize(
    "make",
    [
        lambda: function(1.0, [2, {3}]),
        lambda: esl.FromFunction(function(1.0)),
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        lambda: jax.jit(function(1.0)),
        lambda: eqx.filter_jit(function(1.0)),
        lambda: potential(4),
        lambda: network(jnp.tanh),
        lambda: ring("one"),
        lambda: loading("SCALE = 1.0\nOTHER = object()"),
        lambda: {"a": 1.0, 0: 2.0},
        lambda: nested(5000),
        lambda: Loss(Loss(esl.Langevin(0.1, 0.2))),
    ],
)
def test_equal_things_have_the_same_description(make):
    assert describe(make()) == describe(make())
    assert " at 0x" not in describe(make())


def test_details_that_change_no_number_do_not_count():
    assert describe(jnp.zeros(2)) == describe(np.zeros(2, np.float32))
    assert describe({"a": 1, "b": 2}) == describe({"b": 2, "a": 1})
    shared = [1.0]
    assert describe([shared, shared]) == describe([[1.0], [1.0]])
    # A global that no function loads.
    assert describe(loading("SCALE = 1.0")) == describe(loading("SCALE = 1.0\nUNUSED = 2"))
    assert describe(ring("one")) != describe(ring("other"))
    assert describe(3) == "3"
    assert describe(None) == "None"


def test_the_devices_do_not_count():
    """A run may resume on other devices, or on a single one, where there is no mesh at all."""
    places = (
        esl.member_mesh(),
        esl.member_mesh().abstract_mesh,
        jax.devices()[0],
        jnp.zeros(2).sharding,
        None,
    )
    assert len({describe(function(place)) for place in places}) == 1


def test_cached_values_do_not_count():
    class Lazy(Loss):
        @functools.cached_property
        def tripled(self):
            return 3 * self.scale

    lazy = Lazy(1.0)
    before = describe(lazy)
    assert lazy.tripled
    assert describe(lazy) == before
    compiled = jax.jit(function(1.0))
    before = describe(compiled)
    compiled(2.0)
    assert describe(compiled) == before


HASHED = """
import enum, functools, optax
from esljax.files.description import describe

NAMES = {"sgd", "adam", "lion", "muon"}

class Kind(enum.Enum):
    ONE = 1

class Rule:
    kinds = frozenset(["a", "b", "c", "d"])
    def __init__(self):
        self.one, self.other = 1, [Kind.ONE]
    def __call__(self, x):
        return x in {"e", "f", "g", "h"} or x in NAMES

def even(x):
    return odd(x) or x in FUNCTIONS

def odd(x):
    return even(x) and Rule

FUNCTIONS = {even, odd, len}
adam = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2"))(learning_rate=0.1)
descriptions = [describe(thing) for thing in (NAMES, Rule(), even, adam)]
if __name__ == "__main__":
    print(descriptions)
"""


def test_every_process_gives_the_same_description(tmp_path):
    """Sets of strings have a different order in every process."""
    path = tmp_path / "hashed.py"
    path.write_text(HASHED)
    ours = runpy.run_path(str(path))["descriptions"]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    theirs = subprocess.run(
        [sys.executable, path],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(ours) == theirs.stdout.strip()


def test_only_the_flags_that_a_function_reads_count():
    """A run is resumed with another flag; with another rate it is another run."""

    def objective(flags):
        return lambda x: flags.rate * x

    first, again, other = (
        argparse.Namespace(rate=rate, resume=resume)
        for rate, resume in ((0.1, False), (0.1, True), (0.2, True))
    )
    assert describe(objective(first)) == describe(objective(again)) != describe(objective(other))


using = "def objective(x):\n    return simulate(ExactTransport, x)"


def test_a_move_within_a_room_does_not_count(monkeypatch):
    """Checkpoints outlive files: functions and classes of the package count by their room."""

    def descriptions():
        parts = {"simulate": esl.simulate, "ExactTransport": esl.ExactTransport}
        local = type("Mine", (esl.AbstractTransport,), {"scale": 2.0})
        things = (*parts.values(), script(using, **parts).objective, local, esl.ExactTransport())
        return [describe(thing) for thing in things]

    before = descriptions()
    for name, room in (
        ("simulate", "simulation"),
        ("ExactTransport", "transport"),
        ("AbstractTransport", "transport"),
    ):
        thing, file = getattr(esl, name), f"esljax.{room}.elsewhere"
        monkeypatch.setitem(sys.modules, file, types.SimpleNamespace(**{name: thing}))
        monkeypatch.setattr(thing, "__module__", file)
    assert descriptions() == before


@pytest.mark.parametrize(
    ("thing", "digest"),
    [
        (esl.simulate, "0ce44a6e05e4"),
        (esl.ExactTransport, "9b21b7e5598e"),
        (esl.AbstractPotential, "82685552b938"),
        (np.arange(3.0), "b5cbb0f7c52e"),
        ({"a": [1, (2.0, None)]}, "692a2e3d2c5d"),
    ],
)
def test_checkpoints_of_0_1_are_resumed(thing, digest):
    """Digests made by version 0.1, when each room was a single file."""
    assert describe(thing).endswith(f" {digest}")


def test_an_optimizer_is_the_same_after_its_first_use():
    """The cosine of optax changes what it closes over."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 20))
    before = describe(optimizer)
    start = jnp.ones(2)
    optimizer.update(start, optimizer.init(start))
    assert describe(optimizer) == before
    assert describe(optax.adam(optax.cosine_decay_schedule(0.1, 21))) != before
