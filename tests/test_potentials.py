"""Potentials against central differences, closed forms in NumPy and SciPy, and hand-written
networks."""

import doctest
import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen, nnx

import esljax as esl
from esljax.potentials.models import MLP

POSITION = np.array([0.7, -0.4, 1.3])
CENTER = np.array([0.3, 0.0, -1.0])
DIAGONAL = np.array([2.0, 0.5, 3.0])
MATRIX = np.array(
    [[2.0, 0.9, 0.0], [-0.4, 1.0, 0.7], [0.3, 0.0, 0.5]]
)  # neither symmetric nor normal
MEANS = np.array([[0.0, 1.0, 0.5], [2.0, -1.0, 0.0]])


class Well(eqx.Module):
    """A callable with an array and a static number."""

    depth: jax.Array
    power: int = eqx.field(static=True, default=2)

    def __call__(self, position):
        return self.depth * jnp.sum(position**self.power) + position[0]


# Numbers that float32 holds, so that a potential made in single precision has the energy of a
# double one at a double position.
INPUTS = np.random.default_rng(0).exponential(size=(20, 4)).astype(np.float32).astype(np.float64)
LABELS = np.arange(20) % 3
SIZES = (4, 5, 3)


class Tanh(linen.Module):
    """The network of `esljax.models` in the other API."""

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(5)(x))
        return linen.Dense(3)(x)


MODELS = {
    "nnx factory": lambda: esl.potentials.mlp(*SIZES),
    "nnx instance": lambda: MLP(SIZES, rngs=nnx.Rngs(0)),
    "linen": lambda: Tanh(),
}
MEMBERS = 400


def flax_loss(model="nnx factory", **options):
    return esl.FlaxLoss(MODELS[model](), (INPUTS, LABELS), **{"l2": 0.25, **options})


class Network:
    """A potential, an ensemble of initializations, and where the kernels and biases sit in a
    position."""

    def __init__(self, model):
        self.model, self.potential = model, flax_loss(model)
        self.start = jax.jit(lambda key: self.potential.init(members=MEMBERS, key=key))(
            jax.random.key(7)
        )
        self.layout = layout(self.potential, self.start.shape[1])
        # Somewhere with biases, which the initializers set to zero.
        self.positions = np.asarray(self.start[:4], np.float64) + 1.5 * np.random.default_rng(
            2
        ).normal(size=(4, self.start.shape[1]))

    def layers(self, position):
        return [
            (np.asarray(position)[kernel], np.asarray(position)[bias])
            for kernel, bias in self.layout
        ]

    def energy(self, position, rows=slice(None)):
        outputs = oracles.mlp(self.layers(position), INPUTS[rows])
        return oracles.cross_entropies(outputs, LABELS[rows]).mean() + 0.125 * np.sum(position**2)


def layout(potential, d):
    """What `unravel` makes of 0, 1, ..., d - 1: the place in the position of every entry of every
    layer."""
    model = potential.unravel(jnp.arange(d, dtype=jnp.float32))
    if isinstance(model, nnx.Module):
        layers = [(layer.kernel[...], layer.bias[...]) for layer in model.layers]
    else:
        layers = [
            (model["params"][name]["kernel"], model["params"][name]["bias"])
            for name in ("Dense_0", "Dense_1")
        ]
    return [tuple(np.asarray(part).astype(int) for part in layer) for layer in layers]


# Of module scope, hence made before any test turns to double precision.
@pytest.fixture(scope="module", params=MODELS)
def network(request):
    return Network(request.param)


# Each potential beside its closed form.
POTENTIALS = {
    "quadratic, scalar": (lambda: esl.Quadratic(2.0, 0.5), lambda x: np.sum((x - 0.5) ** 2)),
    "quadratic, diagonal": (
        lambda: esl.Quadratic(DIAGONAL, CENTER),
        lambda x: np.sum(DIAGONAL * (x - CENTER) ** 2) / 2,
    ),
    "quadratic, symmetric": (
        lambda: esl.Quadratic(MATRIX + MATRIX.T, CENTER),
        lambda x: (x - CENTER) @ MATRIX @ (x - CENTER),
    ),
    "double well": (
        lambda: esl.DoubleWell(0.7, 1.5, 0.4),
        lambda x: oracles.double_well(x, 0.7, 1.5, 0.4),
    ),
    "mixture": (
        lambda: esl.Mixture(MEANS, [0.5, 2.0], [1.0, 3.0]),
        lambda x: oracles.mixture(x, MEANS, [0.5, 2.0], [1.0, 3.0]),
    ),
    "mixture, equal": (
        lambda: esl.Mixture(MEANS),
        lambda x: oracles.mixture(x, MEANS, [1.0, 1.0], [1.0, 1.0]),
    ),
    "function": (
        lambda: esl.FromFunction(lambda x: jnp.sum(x**4) + x[0]),
        lambda x: np.sum(x**4) + x[0],
    ),
    "module": (
        lambda: esl.FromFunction(Well(jnp.asarray(0.6))),
        lambda x: 0.6 * np.sum(x**2) + x[0],
    ),
}
every = pytest.mark.parametrize("name", POTENTIALS)


# Contracts


@every
def test_energy_is_the_closed_form_and_the_gradient_its_difference(name, x64):
    make, formula = POTENTIALS[name]
    potential = make()
    energy, gradient = potential.energy_and_gradient(jnp.asarray(POSITION))
    np.testing.assert_allclose(energy, formula(POSITION), rtol=1e-12)
    np.testing.assert_allclose(
        potential.energy(jnp.asarray(POSITION)), formula(POSITION), rtol=1e-12
    )
    differences = [
        oracles.central_difference(formula, POSITION, direction) for direction in np.eye(3)
    ]
    np.testing.assert_allclose(gradient, differences, rtol=1e-7, atol=1e-9)


@every
def test_compiled_is_uncompiled_vmap_is_a_loop_and_float32_stays(name, x64):
    potential = POTENTIALS[name][0]()
    positions = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3)))
    loop = np.array([[potential.energy(x) for x in row] for row in positions])
    np.testing.assert_allclose(potential(positions), loop, rtol=1e-12)
    np.testing.assert_allclose(
        eqx.filter_jit(lambda p, x: p(x))(potential, positions), loop, rtol=1e-12
    )
    single = positions[0, 0].astype(jnp.float32)
    if name != "module":  # a user's function may widen what it is given
        energy, gradient = potential.energy_and_gradient(single)
        assert (energy.dtype, gradient.dtype) == (np.float32, np.float32)
    assert potential.draw(jax.random.key(0), 4) is None


@every
def test_gradient_in_every_leaf(name, x64):
    potential = POTENTIALS[name][0]()
    leaves, structure = jax.tree.flatten(potential)

    def energy(leaves):
        return structure.unflatten(leaves).energy(jnp.asarray(POSITION))

    gradient = jax.grad(energy)(leaves)
    for i, leaf in enumerate(leaves):
        direction = jnp.cos(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape)

        def moved(x, i=i):
            return energy([*leaves[:i], x, *leaves[i + 1 :]])

        np.testing.assert_allclose(
            jnp.sum(gradient[i] * direction),
            oracles.central_difference(moved, leaf, direction),
            rtol=1e-6,
            atol=1e-9,
        )


def test_a_matrix_need_not_be_symmetric(x64):
    potential = esl.Quadratic(MATRIX, CENTER)
    energy, slope = potential.energy_and_gradient(jnp.asarray(POSITION))
    np.testing.assert_allclose(slope, MATRIX @ (POSITION - CENTER), rtol=1e-14)
    np.testing.assert_allclose(
        energy, (POSITION - CENTER) @ MATRIX @ (POSITION - CENTER) / 2, rtol=1e-14
    )
    assert not potential.conservative
    assert esl.Quadratic(DIAGONAL).conservative


def test_the_mixture_is_normalized(x64):
    grid = np.linspace(-12, 14, 4001)[:, None]
    density = np.exp(-esl.Mixture([[0.0], [3.0]], [0.5, 2.0], [1.0, 5.0])(jnp.asarray(grid)))
    np.testing.assert_allclose(density.sum() * (grid[1, 0] - grid[0, 0]), 1, rtol=1e-12)


def test_a_module_keeps_its_arrays_differentiable_and_a_function_has_none():
    gradient = eqx.filter_grad(lambda p: p.energy(jnp.asarray(POSITION)))(
        esl.FromFunction(Well(jnp.asarray(0.6)))
    )
    np.testing.assert_allclose(gradient.fn.depth, np.sum(POSITION**2), rtol=1e-6)
    assert jax.tree.leaves(esl.FromFunction(jnp.sum)) == []


# Networks


def test_unravel_is_a_permutation_into_the_layers(network):
    assert network.start.shape == (MEMBERS, 4 * 5 + 5 + 5 * 3 + 3)
    assert [tuple(part.shape for part in layer) for layer in network.layout] == [
        ((4, 5), (5,)),
        ((5, 3), (3,)),
    ]
    places = np.concatenate([part.ravel() for layer in network.layout for part in layer])
    np.testing.assert_array_equal(np.sort(places), np.arange(network.start.shape[1]))


def test_energy_of_a_network_is_the_forward_pass_by_hand(network, x64):
    compiled = eqx.filter_jit(lambda potential, x, batch: potential.energy_and_gradient(x, batch))
    for position in network.positions:
        np.testing.assert_allclose(
            compiled(network.potential, position, None)[0], network.energy(position), rtol=1e-12
        )
    position, direction = network.positions[0], network.positions[1]
    _, gradient = compiled(network.potential, position, None)
    np.testing.assert_allclose(
        gradient @ direction,
        oracles.central_difference(network.energy, position, direction),
        rtol=1e-7,
    )
    rows = np.array([3, 3, 7, 11])
    np.testing.assert_allclose(
        compiled(network.potential, position, rows)[0], network.energy(position, rows), rtol=1e-12
    )


def test_predict_and_accuracy(network, x64):
    outputs = np.array([oracles.mlp(network.layers(x), INPUTS) for x in network.positions]).reshape(
        2, 2, 20, 3
    )
    positions, inputs = jnp.asarray(network.positions.reshape(2, 2, -1)), jnp.asarray(INPUTS)
    np.testing.assert_allclose(
        network.potential.predict(positions, inputs), outputs, rtol=1e-11, atol=1e-12
    )
    # The guesses of one position, so that another shares only some of them.
    guesses = outputs[0, 1].argmax(-1)
    truth = np.mean(outputs.argmax(-1) == guesses, axis=-1)
    assert truth[0, 1] == 1 > truth.min()
    np.testing.assert_allclose(
        network.potential.accuracy(positions, (inputs, jnp.asarray(guesses))), truth
    )


def test_members_are_independent_and_do_not_depend_on_how_many_there_are(network):
    few = network.potential.init(members=2, key=jax.random.key(7))
    np.testing.assert_allclose(network.start[:2], few, rtol=1e-6)
    assert len({tuple(row) for row in np.asarray(network.start)}) == MEMBERS
    other = network.potential.init(members=2, key=jax.random.key(8))
    assert np.abs(other - few).max() > 0.1


def test_initialization_has_the_law_of_the_initializers(network):
    """Kernels LeCun normal, of variance 1/inputs, or redrawn from an instance's own; biases 0. To 5
    standard errors over all entries."""
    instance = MLP(SIZES, rngs=nnx.Rngs(0))
    for layer, (kernel, bias) in enumerate(network.layout):
        entries = np.asarray(network.start, np.float64)[:, kernel.ravel()]
        own = np.asarray(instance.layers[layer].kernel[...]).ravel()
        drawn = network.model == "nnx instance"
        mean, variance = (own.mean(), own.var()) if drawn else (0.0, 1 / SIZES[layer])
        assert abs(entries.mean() - mean) < 5 * np.sqrt(variance / entries.size)
        squares = (entries - mean) ** 2
        assert abs(squares.mean() - variance) < 5 * squares.std() / np.sqrt(entries.size)
        if drawn:
            assert set(entries.ravel()) == set(own.astype(np.float64))
        assert not np.asarray(network.start)[:, bias].any()


def test_an_instance_keeps_its_constants():
    model = MLP(SIZES, rngs=nnx.Rngs(0))
    model.layers[0].bias[...] = jnp.full(5, 0.7)
    potential = esl.FlaxLoss(model, (INPUTS, LABELS))
    members = np.asarray(potential.init(members=3, key=jax.random.key(0)))
    biases = layout(potential, members.shape[1])[0][1]
    np.testing.assert_array_equal(members[:, biases], np.float32(0.7))
    assert not np.array_equal(members[0], members[1])


def test_batches():
    potential = flax_loss(batch_size=6)
    batches = potential.draw(jax.random.key(0), 5)
    assert batches.shape == (5, 6)
    assert len({tuple(row) for row in np.asarray(batches)}) == 5  # members draw their own
    assert not np.array_equal(batches, potential.draw(jax.random.key(1), 5))
    assert flax_loss().draw(jax.random.key(0), 5) is None
    # All 20 examples equally often: the chi-squared of 20 shares has mean 19 and standard deviation
    # sqrt(38).
    drawn = np.bincount(np.ravel(potential.draw(jax.random.key(2), 10_000)), minlength=20)
    assert len(drawn) == 20
    assert abs(np.sum((drawn - 3000) ** 2 / 3000) - 19) < 5 * np.sqrt(38)


def test_minibatch_energy_and_gradient_are_unbiased(x64):
    """4000 batches of 6. A batch that left one example out would shift the energy by 1/20 of its
    deviation: over 10 standard errors."""
    potential = flax_loss(batch_size=6)
    position = jnp.sin(10.0 * jnp.arange(43))
    compiled = eqx.filter_jit(
        lambda potential, batches: jax.vmap(potential.energy_and_gradient, (None, 0))(
            position, batches
        )
    )
    energies, gradients = compiled(potential, potential.draw(jax.random.key(9), 4000))
    whole, slope = eqx.filter_jit(lambda potential: potential.energy_and_gradient(position))(
        potential
    )
    error = energies.std(ddof=1) / np.sqrt(4000)
    assert abs(energies.mean() - whole) < 5 * error
    one = np.asarray(compiled(potential, jnp.arange(20)[:, None])[0])
    assert np.max(np.abs(one - one.mean())) / 20 > 10 * error
    along = gradients @ jnp.cos(jnp.arange(43.0))
    assert abs(along.mean() - slope @ jnp.cos(jnp.arange(43.0))) < 5 * along.std(ddof=1) / np.sqrt(
        4000
    )


def test_equal_models_share_compiled_code(network):
    first, second = network.potential, flax_loss(network.model)
    if (
        network.model == "nnx instance"
    ):  # each redraws from arrays of its own, which shared code would confuse
        assert jax.tree.structure(first) != jax.tree.structure(second)
        return
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    traces = []

    @eqx.filter_jit
    def energy(potential, position):
        traces.append(None)
        return potential.energy(position)

    assert energy(first, network.start[0]) == energy(second, network.start[0])
    assert len(traces) == 1
    other = esl.FlaxLoss(esl.potentials.mlp(4, 6, 3), (INPUTS, LABELS), l2=0.25)
    assert jax.tree.structure(first) != jax.tree.structure(other)


def test_other_losses(x64):
    targets = np.random.default_rng(4).normal(size=(20, 3))
    position = np.sin(10.0 * np.arange(43))

    def largest(outputs, labels):
        return jnp.abs(outputs - labels).max(axis=1)

    squares, maxima = (
        esl.FlaxLoss(esl.potentials.mlp(*SIZES), (INPUTS, targets), loss=loss)
        for loss in ("squared_error", largest)
    )
    outputs = oracles.mlp(
        [(position[kernel], position[bias]) for kernel, bias in layout(squares, 43)], INPUTS
    )
    np.testing.assert_allclose(
        squares.energy(jnp.asarray(position)),
        np.mean(np.sum((outputs - targets) ** 2, axis=1)),
        rtol=1e-11,
    )
    np.testing.assert_allclose(
        maxima.energy(jnp.asarray(position)),
        np.abs(outputs - targets).max(axis=1).mean(),
        rtol=1e-11,
    )


def test_regression_on_one_number():
    """Labels (m,) meet outputs (m, 1) without being spread over each other."""
    labels = INPUTS[:, 0] + 1
    potential = esl.FlaxLoss(esl.potentials.mlp(4, 1), (INPUTS, labels), loss="squared_error")
    np.testing.assert_allclose(potential.energy(jnp.zeros(5)), np.mean(labels**2), rtol=1e-6)


def test_float32_positions_meet_float64_data(x64):
    energy, gradient = flax_loss().energy_and_gradient(jnp.ones(43, jnp.float32))
    assert (energy.dtype, gradient.dtype) == (np.float32, np.float32)


# Bad input


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.out, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.out(x))


class LinenRunning(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.BatchNorm(use_running_average=True)(x))


class LinenDropout(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=False)(x))


NETWORK = esl.potentials.mlp(*SIZES)
NAN_INPUTS = np.where(np.arange(80).reshape(20, 4) == 13, np.nan, INPUTS)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: esl.Quadratic(np.ones((2, 3))),
            r"`stiffness` must be a scalar or have shape \(d,\) or \(d, d\), but has shape "
            r"\(2, 3\)\.",
        ),
        (
            lambda: esl.Quadratic(np.ones((1, 2, 2))),
            r"`stiffness` must be a scalar or .* has shape \(1, 2, 2\)\.",
        ),
        (
            lambda: esl.Quadratic(1.0, np.ones((2, 2))),
            r"`center` must be a scalar or have shape \(d,\), but has shape \(2, 2\)\.",
        ),
        (
            lambda: esl.Quadratic(np.ones(2), np.ones(3)),
            r"`center` must have shape \(2,\) like the stiffness, but has shape \(3,\)\.",
        ),
        (
            lambda: esl.Quadratic([1.0, np.nan]),
            r"`stiffness` must be finite, but has 1 entries that are not, the first at index "
            r"\(1,\)\.",
        ),
        (lambda: esl.DoubleWell(barrier=0.0), r"`barrier` must be greater than 0, but is 0\."),
        (lambda: esl.DoubleWell(width=-1.0), r"`width` must be greater than 0, but is -1\."),
        (
            lambda: esl.Mixture([1.0]),
            r"`means` must have shape \(c, d\), one row per component, but has shape \(1,\)\.",
        ),
        (
            lambda: esl.Mixture(MEANS, np.ones(3)),
            r"`variances` must be a scalar or have shape \(2,\), but has shape \(3,\)\.",
        ),
        (lambda: esl.Mixture(MEANS, 0.0), r"`variances` must be greater than 0, but is 0\."),
        (
            lambda: esl.Mixture(MEANS, 1.0, [1.0, -1.0]),
            r"`weights` must be greater than 0, but is an array with minimum -1\.",
        ),
        (
            lambda: esl.FromFunction(3.0),
            r"`fn` must be a function of one position \(d,\), but is 3\.0\.",
        ),
        (
            lambda: esl.FlaxLoss(lambda rngs: WithDropout(rngs), (INPUTS, LABELS)),
            r"`model` must keep no state .* also holds Rng",
        ),
        (
            lambda: esl.FlaxLoss(LinenRunning(), (INPUTS, LABELS)),
            r"`model` must take its statistics from the batch, .* depends on batch_stats, which",
        ),
        (
            lambda: esl.FlaxLoss(LinenDropout(), (INPUTS, LABELS)),
            r"`model` must keep no state .* also holds a stream of random numbers\.",
        ),
        (
            lambda: esl.FlaxLoss(3.0, (INPUTS, LABELS)),
            r"`model` must be a Flax module or a function rngs -> nnx.Module .*, but is a float\.",
        ),
        (
            lambda: esl.FlaxLoss(lambda rngs: 3, (INPUTS, LABELS)),
            r"`model` must be a Flax module or .*, but returns an int\.",
        ),
        (
            lambda: esl.FlaxLoss(esl.potentials.mlp(7, 3), (INPUTS, LABELS)),
            r"`model` must accept inputs of shape \(1, 4\), but fails on them: ",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, LABELS + 1)),
            r"`data` must have labels from 0 to 2, .*, but has labels from 1 to 3\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, LABELS - 1)),
            r"`data` must have labels from 0 to 2, .*, but has labels from -1 to 1\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, LABELS + 0.0)),
            r"`data` must have integer labels \(m,\) .*, but has labels float32\(20,\)\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, LABELS[:5])),
            r"`data` must be two arrays \(inputs .*, but has shapes \(20, 4\) and \(5,\)\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS[:0], LABELS[:0])),
            r"`data` must be two arrays \(inputs .*, but has shapes \(0, 4\) and \(0,\)\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS,)),
            r"`data` must be two arrays \(inputs .*, but is a tuple of 1 parts\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (NAN_INPUTS, LABELS)),
            r"`data` must be finite, .* the first at index \(3, 1\)\.",
        ),
        (
            lambda: flax_loss(batch_size=0),
            r"`batch_size` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: flax_loss(l2=-0.1),
            r"`l2` must be at least 0 and not NaN, but has the value -0\.1\.",
        ),
        (
            lambda: flax_loss(loss="hinge"),
            r"`loss` must be one of 'cross_entropy', 'squared_error', but is 'hinge'\.",
        ),
        (
            lambda: flax_loss().init(members=0, key=jax.random.key(0)),
            r"`members` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.FlaxLoss(
                NETWORK, (INPUTS, np.where(LABELS > 1, np.nan, 0.0)), loss="squared_error"
            ),
            r"`data` must be finite, .* the first at index \(2,\)\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, np.ones((20, 2))), loss="squared_error"),
            r"`data` must have labels of 3 numbers, one per output of the model, but has "
            r"labels of shape \(20, 2\)\.",
        ),
        (
            lambda: esl.FlaxLoss(NETWORK, (INPUTS, LABELS + 0.0), loss="squared_error"),
            r"`data` must have labels of 3 numbers, one per output of the model, but has "
            r"labels of shape \(20,\)\.",
        ),
        (
            lambda: esl.FlaxLoss(
                NETWORK, (INPUTS, LABELS), loss=lambda outputs, labels: jnp.mean(outputs)
            ),
            r"`loss` must return one number per example, shape \(20,\), but returns shape \(\)\.",
        ),
        (
            lambda: esl.potentials.mlp(4, 0, 3)(nnx.Rngs(0)),
            r"`sizes` must be an integer of at least 1, but is 0\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)


@pytest.mark.parametrize("file", ["base", "analytic", "driven", "flax", "datasets", "models"])
def test_examples(file):
    module = importlib.import_module(f"esljax.potentials.{file}")
    assert doctest.testmod(module).failed == 0
