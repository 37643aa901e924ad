"""Potentials against central differences, closed forms in NumPy and SciPy, and hand-written networks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen, nnx

from esljax._checks import InputError
from esljax.models import MLP, mlp
from esljax.potentials import DoubleWell, FlaxLoss, FromFunction, Mixture, Quadratic

POSITION = np.array([0.7, -0.4, 1.3])
CENTER = np.array([0.3, 0.0, -1.0])
DIAGONAL = np.array([2.0, 0.5, 3.0])
MATRIX = np.array([[2.0, 0.9, 0.0], [-0.4, 1.0, 0.7], [0.3, 0.0, 0.5]])  # neither symmetric nor normal
MEANS = np.array([[0.0, 1.0, 0.5], [2.0, -1.0, 0.0]])


class Well(eqx.Module):
    """A callable with an array and a static number."""

    depth: jax.Array
    power: int = eqx.field(static=True, default=2)

    def __call__(self, position):
        return self.depth * jnp.sum(position**self.power) + position[0]


INPUTS = np.random.default_rng(0).exponential(size=(20, 4))
LABELS = np.arange(20) % 3
SIZES = (4, 5, 3)


class Tanh(linen.Module):
    """The network of `esljax.models` in the other API."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(jnp.tanh(linen.Dense(5)(x)))


MODELS = {"nnx factory": lambda: mlp(*SIZES), "nnx instance": lambda: MLP(SIZES, rngs=nnx.Rngs(0)), "linen": lambda: Tanh()}
every_model = pytest.mark.parametrize("model", MODELS)


def flax_loss(model="nnx factory", **options):
    return FlaxLoss(MODELS[model](), (INPUTS, LABELS), **{"l2": 0.3, **options})


def network_energy(potential, position, rows=slice(None)):
    outputs = oracles.mlp(layers_of(potential, position), INPUTS[rows])
    return oracles.cross_entropies(outputs, LABELS[rows]).mean() + 0.15 * np.sum(position**2)


def layers_of(potential, position):
    """Kernels and biases of an unraveled model, as NumPy arrays."""
    model = potential.unravel(jnp.asarray(position))
    if isinstance(model, nnx.Module):
        return [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in model.layers]
    return [(np.asarray(model["params"][name]["kernel"]), np.asarray(model["params"][name]["bias"])) for name in ("Dense_0", "Dense_1")]


# Each potential beside its closed form.
POTENTIALS = {
    "quadratic, scalar": (lambda: Quadratic(2.0, 0.5), lambda x: np.sum((x - 0.5) ** 2)),
    "quadratic, diagonal": (lambda: Quadratic(DIAGONAL, CENTER), lambda x: np.sum(DIAGONAL * (x - CENTER) ** 2) / 2),
    "quadratic, symmetric": (lambda: Quadratic(MATRIX + MATRIX.T, CENTER), lambda x: (x - CENTER) @ MATRIX @ (x - CENTER)),
    "double well": (lambda: DoubleWell(0.7, 1.5, 0.4), lambda x: oracles.double_well(x, 0.7, 1.5, 0.4)),
    "mixture": (lambda: Mixture(MEANS, [0.5, 2.0], [1.0, 3.0]), lambda x: oracles.mixture(x, MEANS, [0.5, 2.0], [1.0, 3.0])),
    "mixture, equal": (lambda: Mixture(MEANS), lambda x: oracles.mixture(x, MEANS, [1.0, 1.0], [1.0, 1.0])),
    "function": (lambda: FromFunction(lambda x: jnp.sum(x**4) + x[0]), lambda x: np.sum(x**4) + x[0]),
    "module": (lambda: FromFunction(Well(jnp.asarray(0.6))), lambda x: 0.6 * np.sum(x**2) + x[0]),
}
every = pytest.mark.parametrize("name", POTENTIALS)


# Contracts


@every
def test_energy_is_the_closed_form_and_the_gradient_its_difference(name, x64):
    make, formula = POTENTIALS[name]
    potential = make()
    energy, gradient = potential.energy_and_gradient(jnp.asarray(POSITION))
    np.testing.assert_allclose(energy, formula(POSITION), rtol=1e-12)
    np.testing.assert_allclose(potential.energy(jnp.asarray(POSITION)), formula(POSITION), rtol=1e-12)
    differences = [oracles.central_difference(formula, POSITION, direction) for direction in np.eye(3)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-7, atol=1e-9)


@every
def test_compiled_is_uncompiled_vmap_is_a_loop_and_float32_stays(name, x64):
    potential = POTENTIALS[name][0]()
    positions = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3)))
    loop = np.array([[potential.energy(x) for x in row] for row in positions])
    np.testing.assert_allclose(potential(positions), loop, rtol=1e-12)
    np.testing.assert_allclose(eqx.filter_jit(lambda p, x: p(x))(potential, positions), loop, rtol=1e-12)
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
        moved = lambda x, i=i: energy([*leaves[:i], x, *leaves[i + 1 :]])  # noqa: E731
        np.testing.assert_allclose(
            jnp.sum(gradient[i] * direction), oracles.central_difference(moved, leaf, direction), rtol=1e-6, atol=1e-9
        )


def test_a_matrix_need_not_be_symmetric(x64):
    potential = Quadratic(MATRIX, CENTER)
    energy, slope = potential.energy_and_gradient(jnp.asarray(POSITION))
    np.testing.assert_allclose(slope, MATRIX @ (POSITION - CENTER), rtol=1e-14)
    np.testing.assert_allclose(energy, (POSITION - CENTER) @ MATRIX @ (POSITION - CENTER) / 2, rtol=1e-14)
    assert not potential.conservative
    assert Quadratic(DIAGONAL).conservative


def test_the_mixture_is_normalized(x64):
    grid = np.linspace(-12, 14, 4001)[:, None]
    density = np.exp(-Mixture([[0.0], [3.0]], [0.5, 2.0], [1.0, 5.0])(jnp.asarray(grid)))
    np.testing.assert_allclose(density.sum() * (grid[1, 0] - grid[0, 0]), 1, rtol=1e-12)


def test_a_module_keeps_its_arrays_differentiable_and_a_function_has_none():
    gradient = eqx.filter_grad(lambda p: p.energy(jnp.asarray(POSITION)))(FromFunction(Well(jnp.asarray(0.6))))
    np.testing.assert_allclose(gradient.fn.depth, np.sum(POSITION**2), rtol=1e-6)
    assert jax.tree.leaves(FromFunction(jnp.sum)) == []


# Networks


@every_model
def test_energy_of_a_network_is_the_forward_pass_by_hand(model, x64):
    potential = flax_loss(model)
    start = potential.init(members=3, key=jax.random.key(0))
    assert start.shape == (3, 4 * 5 + 5 + 5 * 3 + 3)
    # Somewhere with biases, which every initializer sets to zero.
    start = np.asarray(start, np.float64) + 0.1 * np.random.default_rng(2).normal(size=start.shape)
    for position in start:
        np.testing.assert_allclose(potential.energy(jnp.asarray(position)), network_energy(potential, position), rtol=1e-12)
    energy, gradient = potential.energy_and_gradient(jnp.asarray(start[0]))
    direction = np.random.default_rng(3).normal(size=gradient.shape)
    difference = oracles.central_difference(lambda x: network_energy(potential, x), start[0], direction)
    np.testing.assert_allclose(gradient @ direction, difference, rtol=1e-7)
    np.testing.assert_allclose(energy, network_energy(potential, start[0]), rtol=1e-12)
    rows = np.array([3, 3, 7, 11])
    np.testing.assert_allclose(potential.energy(jnp.asarray(start[0]), rows), network_energy(potential, start[0], rows), rtol=1e-12)


@every_model
def test_predict_and_accuracy(model, x64):
    potential = flax_loss(model)
    positions = np.asarray(potential.init(members=4, key=jax.random.key(1)), np.float64).reshape(2, 2, -1)
    outputs = np.array([[oracles.mlp(layers_of(potential, x), INPUTS[:9]) for x in row] for row in positions])
    np.testing.assert_allclose(potential.predict(jnp.asarray(positions), jnp.asarray(INPUTS[:9])), outputs, rtol=1e-11, atol=1e-12)
    truth = np.mean(outputs.argmax(-1) == LABELS[:9], axis=-1)
    assert len(np.unique(truth)) > 1
    np.testing.assert_allclose(potential.accuracy(jnp.asarray(positions), (jnp.asarray(INPUTS[:9]), LABELS[:9])), truth)


@every_model
def test_unravel_round_trip(model):
    potential = flax_loss(model)
    position = potential.init(members=1, key=jax.random.key(5))[0]
    leaves = [array for layer in layers_of(potential, position) for array in layer]
    np.testing.assert_array_equal(np.sort(np.concatenate([x.ravel() for x in leaves])), np.sort(position))
    moved = [array for layer in layers_of(potential, position.at[0].add(100)) for array in layer]
    assert sum(int(np.sum(a != b)) for a, b in zip(leaves, moved, strict=True)) == 1


@every_model
def test_members_are_independent_and_do_not_depend_on_how_many_there_are(model):
    potential = flax_loss(model)
    many, few = (potential.init(members=n, key=jax.random.key(7)) for n in (6, 2))
    np.testing.assert_array_equal(many[:2], few)
    assert len({tuple(row) for row in np.asarray(many)}) == 6
    assert not np.array_equal(potential.init(members=2, key=jax.random.key(8)), few)
    np.testing.assert_array_equal(jax.jit(lambda key: potential.init(members=2, key=key))(jax.random.key(7)), few)


@every_model
def test_initialization_has_the_law_of_the_initializers(model):
    """Kernels: LeCun normal, of variance 1/inputs; biases zero. In 400 members of 20 + 15 entries; 5 standard errors."""
    potential = flax_loss(model)
    members = potential.init(members=400, key=jax.random.key(3))
    kernels = [[] for _ in SIZES[1:]]
    for position in members:
        for found, (kernel, bias) in zip(kernels, layers_of(potential, position), strict=True):
            found.append(kernel)
            assert not bias.any()
    for found, inputs in zip(kernels, SIZES, strict=False):
        entries = np.array(found).reshape(400, -1)
        if model == "nnx instance":  # redrawn from its own entries, each entry independently
            own = MLP(SIZES, rngs=nnx.Rngs(0)).layers[kernels.index(found)].kernel[...]
            mean, variance = float(own.mean()), float(own.var())
        else:
            mean, variance = 0.0, 1 / inputs
        assert abs(entries.mean() - mean) < 5 * np.sqrt(variance / entries.size)
        # The variance of the square of a standard normal is 2; of a truncated one or of few entries it is less.
        assert abs(((entries - mean) ** 2).mean() / variance - 1) < 5 * np.sqrt(2 / entries.size)


def test_an_instance_keeps_its_constants():
    model = MLP(SIZES, rngs=nnx.Rngs(0))
    model.layers[0].bias[...] = jnp.full(5, 0.7)
    potential = FlaxLoss(model, (INPUTS, LABELS))
    for position in potential.init(members=3, key=jax.random.key(0)):
        layers = layers_of(potential, position)
        np.testing.assert_array_equal(layers[0][1], np.float32(0.7))
        assert set(layers[0][0].ravel()) <= set(np.asarray(model.layers[0].kernel[...]).ravel())


def test_batches():
    potential = flax_loss(batch_size=6)
    batches = potential.draw(jax.random.key(0), 5)
    assert batches.shape == (5, 6)
    assert len({tuple(row) for row in np.asarray(batches)}) == 5  # members draw their own
    assert not np.array_equal(batches, potential.draw(jax.random.key(1), 5))
    assert flax_loss().draw(jax.random.key(0), 5) is None
    # All 20 examples equally often: the chi-squared of 20 shares has mean 19 and standard deviation sqrt(38).
    drawn = np.bincount(np.ravel(potential.draw(jax.random.key(2), 10_000)), minlength=20)
    assert len(drawn) == 20
    assert abs(np.sum((drawn - 3000) ** 2 / 3000) - 19) < 5 * np.sqrt(38)


def test_minibatch_energy_and_gradient_are_unbiased(x64):
    """4000 batches of 6. A batch that left an example out would shift the energy by 1/20 of its deviation: over 10 standard errors."""
    potential = flax_loss(batch_size=6)
    position = jnp.asarray(potential.init(members=1, key=jax.random.key(0))[0]) * 3
    batches = potential.draw(jax.random.key(9), 4000)
    energies, gradients = jax.jit(jax.vmap(potential.energy_and_gradient, (None, 0)))(position, batches)
    whole, slope = potential.energy_and_gradient(position)
    error = energies.std(ddof=1) / np.sqrt(4000)
    assert abs(energies.mean() - whole) < 5 * error
    one = np.asarray(jax.vmap(potential.energy, (None, 0))(position, jnp.arange(20)[:, None]))
    assert np.max(np.abs(one - one.mean())) / 20 > 10 * error
    direction = np.random.default_rng(0).normal(size=position.shape)
    along = gradients @ direction
    assert abs(along.mean() - slope @ direction) < 5 * along.std(ddof=1) / np.sqrt(4000)


@every_model
def test_equal_models_share_compiled_code(model):
    first, second = flax_loss(model), flax_loss(model)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    traces = []

    @eqx.filter_jit
    def energy(potential, position):
        traces.append(None)
        return potential.energy(position)

    position = first.init(members=1, key=jax.random.key(0))[0]
    assert energy(first, position) == energy(second, position)
    assert len(traces) == 1
    other = FlaxLoss(mlp(4, 6, 3), (INPUTS, LABELS), l2=0.3)
    assert jax.tree.structure(first) != jax.tree.structure(other)


def test_other_losses(x64):
    targets = np.random.default_rng(4).normal(size=(20, 3))
    potential = FlaxLoss(mlp(*SIZES), (INPUTS, targets), loss="squared_error")
    position = np.asarray(potential.init(members=1, key=jax.random.key(0))[0], np.float64)
    outputs = oracles.mlp(layers_of(potential, position), INPUTS)
    np.testing.assert_allclose(potential.energy(jnp.asarray(position)), np.mean(np.sum((outputs - targets) ** 2, axis=1)), rtol=1e-11)
    potential = FlaxLoss(mlp(*SIZES), (INPUTS, targets), loss=lambda outputs, labels: jnp.abs(outputs - labels).max(axis=1))
    np.testing.assert_allclose(potential.energy(jnp.asarray(position)), np.abs(outputs - targets).max(axis=1).mean(), rtol=1e-11)


def test_float32_positions_meet_float64_data(x64):
    potential = flax_loss()
    position = potential.init(members=1, key=jax.random.key(0))[0].astype(jnp.float32)
    energy, gradient = potential.energy_and_gradient(position)
    assert (energy.dtype, gradient.dtype) == (np.float32, np.float32)


# Bad input


class WithState(nnx.Module):
    def __init__(self, kind, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.extra = nnx.BatchNorm(5, rngs=rngs) if kind == "BatchNorm" else nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.extra(self.first(x)))


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.BatchNorm(use_running_average=False)(x))


class LinenDropout(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=False)(x))


NETWORK = mlp(*SIZES)
NAN_INPUTS = np.where(np.arange(80).reshape(20, 4) == 13, np.nan, INPUTS)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Quadratic(np.ones((2, 3))), r"`stiffness` must be a scalar or have shape \(d,\) or \(d, d\), but has shape \(2, 3\)\."),
        (lambda: Quadratic(np.ones((1, 2, 2))), r"`stiffness` must be a scalar or .* has shape \(1, 2, 2\)\."),
        (lambda: Quadratic(1.0, np.ones((2, 2))), r"`center` must be a scalar or have shape \(d,\), but has shape \(2, 2\)\."),
        (lambda: Quadratic(np.ones(2), np.ones(3)), r"`center` must have shape \(2,\) like the stiffness, but has shape \(3,\)\."),
        (lambda: Quadratic([1.0, np.nan]), r"`stiffness` must be finite, but has 1 entries that are not, the first at index \(1,\)\."),
        (lambda: DoubleWell(barrier=0.0), r"`barrier` must be greater than 0, but is 0\."),
        (lambda: DoubleWell(width=-1.0), r"`width` must be greater than 0, but is -1\."),
        (lambda: Mixture([1.0]), r"`means` must have shape \(c, d\), one row per component, but has shape \(1,\)\."),
        (lambda: Mixture(MEANS, np.ones(3)), r"`variances` must be a scalar or have shape \(2,\), but has shape \(3,\)\."),
        (lambda: Mixture(MEANS, 0.0), r"`variances` must be greater than 0, but is 0\."),
        (lambda: Mixture(MEANS, 1.0, [1.0, -1.0]), r"`weights` must be greater than 0, but is an array with minimum -1\."),
        (lambda: FromFunction(3.0), r"`fn` must be a function of one position \(d,\), but is 3\.0\."),
        (
            lambda: FlaxLoss(lambda rngs: WithState("BatchNorm", rngs), (INPUTS, LABELS)),
            r"`model` must keep no state .* also holds BatchStat",
        ),
        (lambda: FlaxLoss(lambda rngs: WithState("Dropout", rngs), (INPUTS, LABELS)), r"`model` must keep no state .* also holds Rng"),
        (lambda: FlaxLoss(WithState("BatchNorm", nnx.Rngs(0)), (INPUTS, LABELS)), r"`model` must keep no state .* also holds BatchStat"),
        (lambda: FlaxLoss(LinenBatchNorm(), (INPUTS, LABELS)), r"`model` must keep no state .* also holds batch_stats\."),
        (lambda: FlaxLoss(LinenDropout(), (INPUTS, LABELS)), r"`model` must "),
        (lambda: FlaxLoss(3.0, (INPUTS, LABELS)), r"`model` must be a Flax module or a function rngs -> nnx.Module, but is a float\."),
        (lambda: FlaxLoss(lambda rngs: 3, (INPUTS, LABELS)), r"`model` must be a Flax module or .*, but returned int\."),
        (lambda: FlaxLoss(mlp(7, 3), (INPUTS, LABELS)), r"`model` must accept inputs of shape \(1, 4\), but fails on them: "),
        (lambda: FlaxLoss(NETWORK, (INPUTS, LABELS + 1)), r"`data` must have labels from 0 to 2, .*, but has labels from 1 to 3\."),
        (lambda: FlaxLoss(NETWORK, (INPUTS, LABELS - 1)), r"`data` must have labels from 0 to 2, .*, but has labels from -1 to 1\."),
        (lambda: FlaxLoss(NETWORK, (INPUTS, LABELS + 0.0)), r"`data` must have integer labels \(m,\) .*, but has labels float32\(20,\)\."),
        (lambda: FlaxLoss(NETWORK, (INPUTS, LABELS[:5])), r"`data` must be \(inputs .*, but has shapes \(20, 4\) and \(5,\)\."),
        (lambda: FlaxLoss(NETWORK, (INPUTS[:0], LABELS[:0])), r"`data` must be \(inputs .*, but has shapes \(0, 4\) and \(0,\)\."),
        (lambda: FlaxLoss(NETWORK, (INPUTS,)), r"`data` must be \(inputs .*, but "),
        (lambda: FlaxLoss(NETWORK, (NAN_INPUTS, LABELS)), r"`data` must be finite, .* the first at index \(3, 1\)\."),
        (lambda: flax_loss(batch_size=0), r"`batch_size` must be an integer of at least 1, but is 0\."),
        (lambda: flax_loss(l2=-0.1), r"`l2` must be at least 0 and not NaN, but has the value -0\.1\."),
        (lambda: flax_loss(loss="hinge"), r"`loss` must be one of 'cross_entropy', 'squared_error', but is 'hinge'\."),
        (lambda: flax_loss().init(members=0, key=jax.random.key(0)), r"`members` must be an integer of at least 1, but is 0\."),
        (
            lambda: FlaxLoss(NETWORK, (INPUTS, np.where(LABELS > 1, np.nan, 0.0)), loss="squared_error"),
            r"`data` must be finite, .* the first at index \(2,\)\.",
        ),
        (
            lambda: FlaxLoss(NETWORK, (INPUTS, np.ones((20, 2))), loss="squared_error"),
            r"`data` must have 3 numbers per label, .*, but has labels of shape \(20, 2\)\.",
        ),
        (lambda: mlp(4, 0, 3)(nnx.Rngs(0)), r"`sizes` must be an integer of at least 1, but is 0\."),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert str(caught.value).count(". ") == 0
    assert "\n" not in str(caught.value)
