"""Models of other people against gradient descent in plain JAX, and what is refused of them."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import esljax as esl
from esljax.experiment import Problem

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY, RATE, STEPS, M = jax.random.key(3), 0.1, 3, 12
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(M, 4)).astype(np.float32)
LABELS = GENERATOR.integers(0, 3, M)
IDS = GENERATOR.integers(0, 7, (M, 5))
IMAGES = GENERATOR.integers(0, 256, (M, 6, 6, 1)).astype(np.uint8)
SERIES = GENERATOR.normal(size=(M, 5, 4)).astype(np.float32)
TARGETS = GENERATOR.normal(size=(M, 3)).astype(np.float32)
PRESENT = GENERATOR.random((M, 5)) > 0.3
PRESENT[:, 0] = True
TOKENS = {"ids": IDS, "mask": PRESENT}


def cross_entropy(outputs, labels):
    chosen = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(outputs, axis=1) - chosen


def with_penalty(outputs, labels):
    logits, more = outputs
    return cross_entropy(logits, labels) + jnp.sum(more["hidden"] ** 2, axis=1)


def weighted(outputs, labels):
    return labels["weight"] * cross_entropy(outputs, labels["class"])


def masked(outputs, labels):
    return jnp.sum(jnp.where(labels["known"], (outputs - labels["target"]) ** 2, 0), axis=1)


class Embedded(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.embed(ids).mean(axis=1))


class Recurrent(nnx.Module):
    """Its cell draws a key for a carry of zeros."""

    def __init__(self, rngs):
        self.layer = nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs))

    def __call__(self, series):
        return self.layer(series)[:, -1]


class Convolved(nnx.Module):
    def __init__(self, rngs, frozen=False):
        self.layer, self.norm = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)
        if frozen:
            self.eval()

    def __call__(self, images):
        return self.out(nnx.relu(self.norm(self.layer(images / 255))).mean(axis=(1, 2)))


class Dropped(nnx.Module):
    def __init__(self, rngs, on=False):
        self.out, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        if not on:
            self.eval()

    def __call__(self, x):
        return self.drop(self.out(x))


class Attending(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        seen = tokens["mask"]
        hidden = self.attend(self.embed(tokens["ids"]), mask=seen[:, None, None, :])
        return self.out((hidden * seen[..., None]).sum(axis=1) / seen.sum(axis=1)[:, None])


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.out = self.embed

    def __call__(self, ids):
        return self.out.attend(self.embed(ids).mean(axis=1))


class Twofold(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        hidden = self.first(x)
        return self.last(hidden), {"hidden": hidden}


class Odd(nnx.Module):
    """Integers, an empty parameter, a number, and a state that no call changes."""

    def __init__(self, rngs):
        self.order, self.empty = nnx.Param(jnp.arange(4)[::-1]), nnx.Param(jnp.zeros((0, 3)))
        self.scale, self.mask = nnx.Param(jnp.asarray(2.0)), nnx.Variable(jnp.array([1, 0, 1, 1.0]))
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.scale * self.out(x[:, self.order[...]] * self.mask[...])


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        hidden = linen.Embed(7, 4)(tokens["ids"]) * tokens["mask"][..., None]
        return {"y": linen.Dense(3)(linen.BatchNorm(use_running_average=False)(hidden.mean(1)))}


def linear(rngs, **options):
    return nnx.Linear(4, 3, rngs=rngs, **options)


def half(rngs):
    return linear(rngs, param_dtype=jnp.bfloat16)


def of_y(outputs, labels):
    return cross_entropy(outputs["y"], labels)


# A model, its data, the loss, and the number of its coordinates.
MODELS = {
    "embedding of ids": (Embedded, IDS, LABELS, cross_entropy, 7 * 4 + 15),
    "recurrent": (Recurrent, SERIES, LABELS, cross_entropy, 96),
    "batch statistics of images": (Convolved, IMAGES, LABELS, cross_entropy, 40 + 8 + 15),
    "dropout off": (Dropped, INPUTS, LABELS, cross_entropy, 15),
    "attention with a mask": (Attending, TOKENS, LABELS, cross_entropy, 28 + 80 + 15),
    "tied": (Tied, IDS, IDS[:, 0], cross_entropy, 28),
    "a tuple of outputs": (Twofold, INPUTS, LABELS, with_penalty, 43),
    "weights": (linear, INPUTS, {"class": LABELS, "weight": TARGETS[:, 0]}, weighted, 15),
    "masked": (linear, INPUTS, {"target": TARGETS, "known": TARGETS > 0}, masked, 15),
    "half precision": (half, INPUTS, LABELS, cross_entropy, 15),
    "half precision of data": (linear, np.float16(INPUTS), LABELS, cross_entropy, 15),
    "odd parameters": (Odd, INPUTS, LABELS, cross_entropy, 16),
    "linen": (LinenNormed(), TOKENS, LABELS, of_y, 28 + 8 + 15),
}


def descended(model, inputs, labels, loss, key):
    """Plain gradient descent of one member, in single precision."""
    inputs = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == np.float16 else jnp.asarray(x), inputs
    )
    if isinstance(model, linen.Module):
        variables = model.init(key, inputs)
        parameters = {"params": variables.pop("params")}

        def outputs(parameters):
            return model.apply({**parameters, **variables}, inputs, mutable=list(variables))[0]
    else:

        def floating(path, variable):
            return isinstance(variable, nnx.Param) and variable[...].dtype.kind != "i"

        definition, state, rest = nnx.split(model(nnx.Rngs(key)), floating, ...)
        own, rest = nnx.to_pure_dict(state), nnx.to_pure_dict(rest)
        parameters = jax.tree.map(lambda x: x.astype(jnp.float32), own)
        kinds = {x.dtype for x in jax.tree.leaves(own)}
        inputs = inputs.astype(jnp.bfloat16) if kinds == {jnp.dtype("bfloat16")} else inputs

        def outputs(parameters):
            cast = jax.tree.map(lambda x, like: x.astype(like.dtype), parameters, own)
            found = nnx.merge(definition, cast, rest)(inputs)
            return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    slope = jax.jit(jax.grad(lambda parameters: loss(outputs(parameters), labels).mean()))
    for _ in range(STEPS):
        parameters = jax.tree.map(lambda x, g: x - RATE * g, parameters, slope(parameters))
    return ravel_pytree(parameters)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_gradient_descent(name):
    model, inputs, labels, loss, coordinates = MODELS[name]
    potential = esl.FlaxLoss(model, (inputs, labels), loss=loss)
    start = potential.init(members=2, key=KEY)
    assert (start.dtype, start.shape) == (jnp.float32, (2, coordinates))
    path = esl.simulate(
        potential, esl.Langevin(RATE), start, steps=STEPS, snapshots=1, key=jax.random.key(0)
    )
    labels = jax.tree.map(jnp.asarray, labels)
    expected = descended(model, inputs, labels, loss, jax.random.fold_in(KEY, 0))
    assert float(jnp.max(jnp.abs(expected - start[0]))) > 1e-2
    np.testing.assert_allclose(path.final[0], expected, atol=1e-5)


def test_running_statistics_are_dropped_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, "esljax"):
        potential = esl.FlaxLoss(Convolved, (IMAGES, LABELS))
    assert potential.dropped == ("BatchStat",)
    assert "drops the state BatchStat" in caplog.text
    assert esl.FlaxLoss(Embedded, (IDS, LABELS)).dropped == ()


def test_an_instance_keeps_its_running_statistics():
    model = Convolved(nnx.Rngs(0), frozen=True)
    model.norm.mean[...], model.norm.var[...] = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    potential = esl.FlaxLoss(model, (IMAGES, LABELS))
    own = ravel_pytree(nnx.to_pure_dict(nnx.state(model, nnx.Param)))[0]
    expected = cross_entropy(model(jnp.asarray(IMAGES)), jnp.asarray(LABELS)).mean()
    np.testing.assert_allclose(potential.energy(own), expected, rtol=1e-5)
    assert own.size == 40 + 8 + 15
    np.testing.assert_array_equal(potential.unravel(own).norm.mean[...], jnp.arange(4.0))


def test_only_the_trainable_part_moves():
    model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    potential = esl.FlaxLoss(model, (INPUTS, LABELS), trainable=nnx.LoRAParam)
    start = potential.init(members=2, key=KEY)
    assert start.shape == (2, 4 * 2 + 2 * 3)
    kernel = potential.unravel(start[0]).kernel[...]
    np.testing.assert_array_equal(kernel, model.kernel[...])


def test_half_precision_has_the_entropy_production_of_single():
    potentials = [esl.FlaxLoss(model, (INPUTS, LABELS)) for model in (half, linear)]
    # Flax draws other numbers in 16 bits, so both begin at those.
    start = potentials[0].init(members=4, key=KEY)

    def produced(potential):
        path = esl.simulate(potential, esl.Langevin(1e-3), start, steps=100, key=KEY)
        report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
        return float(report.entropy_production)

    assert abs(produced(potentials[0]) / produced(potentials[1]) - 1) < 0.02


def test_regression_has_metrics_of_its_own():
    potential = esl.FlaxLoss(linear, (INPUTS, TARGETS), loss="squared_error")

    def error(potential, positions, test):
        inputs, targets = test
        return jnp.abs(potential.predict(positions, inputs) - targets).mean(axis=(1, 2))

    settings = {"members": 2, "steps": 2, "snapshots": 1, "test": (INPUTS, TARGETS)}
    problem = functools.partial(Problem, potential, transport=esl.ExactTransport(), **settings)
    assert float(problem(metrics={"error": error}).run(0.1, KEY).metrics["error"]) > 0
    assert problem().metrics == {}


class Lazy(nnx.Module):
    def __init__(self, rngs):
        self.out, self.rngs = nnx.Linear(4, 3, rngs=rngs), rngs

    def __call__(self, x):
        if not hasattr(self, "scale"):
            self.scale = nnx.Param(jnp.ones(x.shape[-1]))
        return self.out(x * self.scale)


class Complex(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(3, jnp.complex64))

    def __call__(self, x):
        return x[:, :3] * jnp.abs(self.scale)


class Features(nnx.Module):
    """Random features that are no parameters, anew for every member."""

    def __init__(self, rngs):
        self.fixed = nnx.Variable(jax.random.normal(rngs(), (4, 3)))
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x @ self.fixed[...] * self.scale


class Bitwise(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.softmax(jax.lax.sin(x)))


class Mistaken(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x) + {"bias": 0.0}["weight"]


def mistaken(outputs, labels):
    return outputs @ labels


REFUSED = {
    "dropout on": (
        lambda: esl.FlaxLoss(lambda rngs: Dropped(rngs, on=True), (INPUTS, LABELS)),
        r"`model` must keep no state .*model.eval\(\).*also holds RngCount, RngKey, from which",
    ),
    "running statistics that nothing updates": (
        lambda: esl.FlaxLoss(lambda rngs: Convolved(rngs, frozen=True), (IMAGES, LABELS)),
        r"`model` must take its statistics from the batch, as .*model.train\(\).*on BatchStat",
    ),
    "parameters made in a call": (
        lambda: esl.FlaxLoss(Lazy, (INPUTS, LABELS)),
        r"`model` must create all of its parameters in __init__, but creates scale when it is",
    ),
    "complex": (
        lambda: esl.FlaxLoss(Complex, (INPUTS, LABELS)),
        r"`model` must have real parameters .*, but has some of dtype complex64",
    ),
    "constants drawn anew": (
        lambda: esl.FlaxLoss(Features, (INPUTS, LABELS)),
        r"`model` must hold the same constants for every member .*draws Variable",
    ),
    "nothing that moves": (
        lambda: esl.FlaxLoss(linear, (INPUTS, LABELS), trainable=nnx.LoRAParam),
        r"`model` must have at least one floating parameter, but has none",
    ),
    "integers for a model of floats": (
        lambda: esl.FlaxLoss(Bitwise, (np.ones((M, 4), np.uint8), LABELS)),
        r"`model` must accept inputs of shape \(1, 4\) of uint8 \(it takes floating ones, as "
        r"x.astype\('float32'\) makes\), but fails on them: .*test_models.py, line \d+: return",
    ),
    "a mistake in a model": (
        lambda: esl.FlaxLoss(Mistaken, (INPUTS, LABELS)),
        r"fails on them: KeyError: 'weight' \(test_models.py, line \d+: return self.out\(x\) \+",
    ),
    "a mistake in a loss": (
        lambda: esl.FlaxLoss(linear, (INPUTS, LABELS), loss=mistaken),
        r"`loss` must accept outputs \(12, 3\) and labels \(12,\), but fails on them: .*"
        r"\(test_models.py, line \d+: return outputs @ labels\)",
    ),
    "a tuple for a loss by name": (
        lambda: esl.FlaxLoss(Twofold, (INPUTS, LABELS)),
        r"`loss` must be a function of your own .* for outputs in a tuple, but is 'cross_entropy'",
    ),
    "labels in a dict for a loss by name": (
        lambda: esl.FlaxLoss(linear, (INPUTS, {"y": LABELS}), loss="squared_error"),
        r"`loss` must be a function of your own .* for labels in a dict, but is 'squared_error'",
    ),
    "parts of unequal length": (
        lambda: esl.FlaxLoss(Attending, ({"ids": IDS, "mask": PRESENT[:3]}, LABELS)),
        r"`data` must be two arrays .*'ids': \(12, 5\), 'mask': \(3, 5\)",
    ),
    "an old key": (
        lambda: esl.FlaxLoss(linear, (INPUTS, LABELS)).init(members=2, key=jax.random.PRNGKey(0)),
        r"`key` must be made by `jax.random.key`",
    ),
    "accuracy of numbers": (
        lambda: esl.FlaxLoss(linear, (INPUTS, TARGETS), loss="squared_error").accuracy(
            np.zeros((2, 15), np.float32), (INPUTS, TARGETS)
        ),
        r"`data` must have class indices as labels, one for each row of outputs, but has "
        r"\(12, 3\) for outputs \(12, 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_one_sentence(name, refused):
    call, sentence = REFUSED[name]
    refused(call, sentence)


def test_the_mistake_of_the_user_is_the_cause():
    with pytest.raises(esl.InputError) as caught:
        esl.FlaxLoss(Mistaken, (INPUTS, LABELS))
    assert isinstance(caught.value.__cause__, KeyError)
