"""Symmetries of networks: found in their programs, made by hand, and tried."""

import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import esljax as esl
from esljax.potentials.symmetry.coupling import coupled

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

HIDDEN = [("layers/0/kernel", 1), ("layers/0/bias", 0), ("layers/1/kernel", 0)]
KEYS = {"layers/0/bias": (4,), "layers/0/kernel": (2, 4), "layers/1/bias": (2,)}
KEYS["layers/1/kernel"] = (4, 2)
MOONS = esl.datasets.two_moons(samples=50).train


def loss_of(*sizes):
    return esl.FlaxLoss(esl.models.mlp(*sizes), MOONS)


@pytest.fixture(scope="module")
def shallow():
    return loss_of(2, 4, 2)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(2, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.n, self.c = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        return self.c(x + jnp.tanh(self.b(self.n(x))))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.b = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.c = nnx.Linear(6 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.gelu(self.a(x.reshape(-1, 8, 8, 1))), (2, 2), strides=(2, 2))
        return self.c(jnp.tanh(self.b(x)).reshape(len(x), -1))


class Attending(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(
            num_heads=3, in_features=6, qkv_features=12, decode=False, rngs=rngs
        )
        self.out = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, ids):
        return self.out(jnp.mean(self.attend(self.embed(ids)), axis=1))


# What is found: for each group its units, its arrays and whether they flip, by hand.


def found(potential):
    symmetry = esl.symmetry.of(potential)
    return {
        (size, group.signed, frozenset((axis.key, axis.axis) for axis in group.axes))
        for size, group in zip(symmetry.sizes, symmetry.groups, strict=True)
    }


def test_hidden_units_flip_behind_tanh(shallow):
    assert found(shallow) == {(4, True, frozenset(HIDDEN))}
    assert esl.symmetry.of(shallow).exact


def test_a_driven_loss_has_the_symmetry_of_its_model(shallow):
    assert found(esl.Driven(lambda _: shallow, 0.0)) == found(shallow)


def test_deeper_layers_share_arrays():
    symmetry = esl.symmetry.of(loss_of(2, 4, 5, 2))
    assert symmetry.sizes == (4, 5)
    assert not symmetry.exact
    assert symmetry.only("layers/1").exact


def test_a_residual_stream_is_one_group_without_signs():
    stream = {("a/bias", 0), ("a/kernel", 1), ("b/bias", 0), ("b/kernel", 0), ("b/kernel", 1)}
    stream |= {("c/kernel", 0), ("n/bias", 0), ("n/scale", 0)}
    assert found(esl.FlaxLoss(Residual, MOONS)) == {(6, False, frozenset(stream))}


def test_channels_pass_pools_and_flattening():
    inputs, labels = esl.datasets.digits().train
    potential = esl.FlaxLoss(Convolutional, (inputs[:64], labels[:64]))
    first = {("a/bias", 0), ("a/kernel", 3), ("b/kernel", 2)}
    second = {("b/bias", 0), ("b/kernel", 3), ("c/kernel", 0)}
    assert found(potential) == {(4, False, frozenset(first)), (6, True, frozenset(second))}
    symmetry = esl.symmetry.of(potential)
    (behind,) = (axis for axis in symmetry.groups[1].axes if axis.key == "c/kernel")
    assert behind.inner == 1


def test_heads_of_attention_and_their_numbers():
    ids = jax.random.randint(jax.random.key(0), (20, 5), 0, 7)
    labels = jax.random.randint(jax.random.key(1), (20,), 0, 5)
    groups = found(esl.FlaxLoss(Attending, (ids, labels)))
    heads = {("attend/out/kernel", 0)} | {
        (f"attend/{name}/{kind}", axis)
        for name in ("query", "key", "value")
        for kind, axis in (("kernel", 1), ("bias", 0))
    }
    keys = {(f"attend/{name}/kernel", 2) for name in ("query", "key")}
    keys |= {(f"attend/{name}/bias", 1) for name in ("query", "key")}
    assert (3, True, frozenset(heads)) in groups
    assert (4, True, frozenset(keys)) in groups
    stream = {("embed/embedding", 1)}
    stream |= {(f"attend/{name}/kernel", 0) for name in ("query", "key", "value")}
    assert (6, True, frozenset(stream)) in groups


# Operations, by what they know of places.

PROGRAMS = {
    "a nonlinearity": (lambda w, v: jnp.tanh(w) @ v, True),
    "a normalization": (lambda w, v: jax.nn.softmax(w) @ v, True),
    "an order": (lambda w, v: jnp.sort(w) @ v, False),
    "a sum so far": (lambda w, v: jnp.cumsum(w) @ v, False),
    "a part": (lambda w, v: w[:3] @ v[:3], False),
    "a number by its place": (lambda w, v: jnp.sum(w * v) + w[0], False),
    "another order": (lambda w, v: w[::-1] @ v, False),
    "two halves": (lambda w, v: jnp.concatenate([w[2:], w[:2]]) @ v, False),
    "weights by place": (lambda w, v: jnp.sum(w * v * jnp.arange(4)), False),
    "equal weights": (lambda w, v: jnp.sum(w * v * jnp.ones(4)), True),
    "the place of the largest": (lambda w, v: jnp.argmax(w) + jnp.sum(v * w), False),
    "a loop": (
        lambda w, v: jax.lax.scan(lambda c, _: (jnp.tanh(c * w), None), v, None, 3)[0].sum(),
        True,
    ),
    "a shape and back": (lambda w, v: jnp.tanh(w.reshape(2, 2)).reshape(4) @ v, True),
    "an output": (lambda w, v: w * v, False),
    "one of the two": (lambda w, v: jnp.sum(w) + v, False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations(name):
    """A permutation of both arrays leaves the output alone, or it does not; so must be found."""
    function, symmetric = PROGRAMS[name]
    w, v = jax.random.normal(jax.random.key(0), (2, 4))
    order = jnp.array([2, 3, 1, 0])
    same = np.allclose(function(w, v), function(w[order], v[order]), atol=1e-6)
    assert same == symmetric
    groups = coupled(lambda arrays: function(*arrays), [jax.ShapeDtypeStruct((4,), "float32")] * 2)
    together = any({(0, 0, None), (1, 0, None)} <= set(group.axes) for group in groups)
    # A split axis turns in parts alone.
    assert together == (symmetric and name != "a shape and back")
    for group in groups:
        turned = [turned_by(group, place, array) for place, array in enumerate((w, v))]
        np.testing.assert_allclose(function(*turned), function(w, v), rtol=1e-5)


def turned_by(group, place, array):
    """An array of a program with the units of a found group in the reverse order."""
    array = np.asarray(array)
    for _, axis, inner in (x for x in group.axes if x[0] == place):
        length = array.shape[axis]
        shape = (-1, group.size, inner) if inner else (1, length, 1)
        order = np.arange(length).reshape(shape)[:, ::-1].ravel()
        array = np.take(array, order, axis)
    return array


# Layers, as programs of a few arrays: what is found as {(size, (array, axis, side by side), ...)}.


def attention(e, q, k, v, o):
    """Three heads of two numbers, written by hand with dense layers."""
    heads = [jnp.tanh(e @ w).reshape(5, 3, 2) for w in (q, k, v)]
    weights = jax.nn.softmax(jnp.einsum("thi,shi->hts", *heads[:2]))
    return jnp.einsum("hts,shi->thi", weights, heads[2]).reshape(5, 6) @ o


def normalized(w, scale, v):
    """Two groups of three channels, each normalized by itself."""
    groups = (X @ w).reshape(5, 2, 3)
    groups = (groups - groups.mean(2, keepdims=True)) / groups.std(2, keepdims=True)
    return (groups.reshape(5, 6) * scale) @ v


def gated(w, r, v):
    """A cell whose three gates are one array."""
    state = jnp.zeros((5, 4))
    for _ in range(2):
        a, b, c = jnp.split(X @ w + state @ r, 3, axis=1)
        state = jnp.tanh(a) * state + b * jax.nn.sigmoid(c)
    return state @ v


def gated_by_slices(w, v):
    both = X @ w
    return (both[:, :4] * jax.nn.sigmoid(both[:, 4:])) @ v


def of_both_signs(w, v):
    units = X @ w
    return jnp.concatenate([jax.nn.relu(units), jax.nn.relu(-units)], axis=1) @ v


def by_channel(w, k, v):
    """Two channels of the convolution for each of three of the image, by itself."""
    image = jnp.tanh(X @ w).reshape(1, 5, 1, 3)
    found = jax.lax.conv_general_dilated(
        image, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    return found.reshape(5, 6) @ v


def averaged(w, unused, v):
    """Running statistics are updated, and nothing needs them."""
    jnp.zeros(4).at[1].set(jnp.sum(unused))
    units = X @ w
    jnp.zeros(4).at[:].set(units.mean(0))
    return units @ v


X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
LAYERS = {
    "heads": (
        attention,
        [(5, 7), (7, 6), (7, 6), (7, 6), (6, 2)],
        {(3, (1, 1, 2), (2, 1, 2), (3, 1, 2), (4, 0, 2)), (2, (1, 1, 1), (2, 1, 1))},
    ),
    "groups of channels": (
        normalized,
        [(7, 6), (6,), (6, 2)],
        {(2, (0, 1, 3), (1, 0, 3), (2, 0, 3)), (3, (0, 1, 1), (1, 0, 1), (2, 0, 1))},
    ),
    "gates in one array": (
        gated,
        [(7, 12), (4, 12), (4, 2)],
        {(4, (0, 1, 1), (1, 0, None), (1, 1, 1), (2, 0, None))},
    ),
    "gates by slices": (gated_by_slices, [(7, 8), (4, 2)], {(4, (0, 1, 1), (1, 0, None))}),
    "units beside themselves": (of_both_signs, [(7, 4), (8, 2)], {(4, (0, 1, None), (1, 0, 1))}),
    "channels by themselves": (
        by_channel,
        [(7, 3), (1, 1, 1, 6), (6, 2)],
        {(3, (0, 1, None), (1, 3, 2), (2, 0, 2)), (2, (1, 3, 1), (2, 0, 1))},
    ),
    "what no output needs": (averaged, [(7, 4), (4, 4), (4, 2)], {(4, (0, 1, None), (2, 0, None))}),
    "a choice between programs": (
        lambda w, v: jax.lax.cond(jnp.sum(w) > 0, jnp.tanh, jnp.sin, X @ w) @ v,
        [(7, 4), (4, 2)],
        {(4, (0, 1, None), (1, 0, None))},
    ),
    "neighbors": (lambda w, v: (X @ w * jnp.roll(X @ w, 1, -1)) @ v, [(7, 4), (4, 2)], set()),
    "a reduction of one's own": (
        lambda w: jax.lax.reduce(X @ w, 1.0, lambda a, b: a * jnp.cos(b) + b, (1,)),
        [(7, 4)],
        set(),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    function, shapes, expected = LAYERS[name]
    given = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    groups = coupled(lambda arrays: function(*arrays), given)
    found = {(group.size, *sorted(group.axes, key=str)) for group in groups}
    assert {(size, *sorted(axes, key=str)) for size, *axes in expected} <= found
    assert expected or not found
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for group in groups:
        turned = [turned_by(group, place, array) for place, array in enumerate(arrays)]
        np.testing.assert_allclose(function(*turned), function(*arrays), rtol=1e-3, atol=1e-5)


# By trial


class Narrow(nnx.Module):
    """Layers of two units, behind an activation that is not odd."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(7)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.leaky_relu(layer(x), 0.3)
        return x, x > 0


class Dead(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.b(nnx.relu(self.a(x))) - 100)


def test_two_units_do_not_pass_because_none_of_them_moved():
    """Of two units a random order is the identity every second time, and no sign flips every
    fourth time. Outputs may be masks, too."""
    potential = esl.FlaxLoss(Narrow, MOONS, loss=lambda outputs, _: outputs[0][:, 0])
    symmetry = esl.symmetry.of(potential)
    assert symmetry.sizes == (2,) * 6
    assert not any(group.signed for group in symmetry.groups)


def test_a_trial_of_outputs_that_are_all_0_is_refused(refused):
    refused(lambda: esl.symmetry.of(esl.FlaxLoss(Dead, MOONS)), "have outputs other than 0")


def test_groups_that_a_trial_refuses_are_named(shallow, refused):
    sentence = "within `tolerance` 1e-12: group 'layers/0' moves outputs by .*e-0[78] of them"
    refused(lambda: esl.symmetry.of(shallow, tolerance=1e-12), sentence)


# By hand


def test_by_hand_is_what_is_found(shallow):
    symmetry = esl.symmetry.permutations({"hidden": HIDDEN}, signs=("hidden",), keys=KEYS)
    assert symmetry.sizes == (4,)
    assert "signed permutations of 4 units" in str(symmetry)
    assert symmetry.check(shallow).moved[0] < 1e-6


def test_random_elements_act_as_matrices_do():
    symmetry = esl.symmetry.permutations({"hidden": HIDDEN}, signs=("hidden",), keys=KEYS)
    element = symmetry.draw(jax.random.key(1))
    turned = symmetry.arrays(symmetry.act(element, jnp.arange(22.0)))
    given = symmetry.arrays(jnp.arange(22.0))
    matrix = np.zeros((4, 4))
    matrix[np.arange(4), np.asarray(element.places[0])] = element.signs[0]
    assert set(np.unique(matrix)) == {-1.0, 0.0, 1.0}
    np.testing.assert_allclose(turned["layers/0/bias"], matrix @ given["layers/0/bias"])
    np.testing.assert_allclose(turned["layers/0/kernel"], given["layers/0/kernel"] @ matrix.T)
    np.testing.assert_allclose(turned["layers/1/kernel"], matrix @ given["layers/1/kernel"])
    np.testing.assert_allclose(turned["layers/1/bias"], given["layers/1/bias"])


def test_a_flattened_axis_turns_in_blocks():
    """Channels come last here, and first in other frameworks."""
    for inner, blocks in ((1, (2, 3)), (2, (3, 2))):
        symmetry = esl.symmetry.permutations(
            {"channels": [("bias", 0), ("dense", 0, inner)]}, keys={"bias": (3,), "dense": (6, 1)}
        )
        element = symmetry.draw(jax.random.key(0))
        dense = symmetry.arrays(symmetry.act(element, jnp.arange(9.0)))["dense"].reshape(blocks)
        axis = 1 if inner == 1 else 0
        expected = np.take(np.arange(3.0, 9).reshape(blocks), element.places[0], axis=axis)
        np.testing.assert_array_equal(dense, expected)


def test_heads_by_hand_have_a_number_and_a_file():
    """Where no axis is theirs alone. Names may be in any script, and axes integers of NumPy."""
    axes = [("in 𝜃", np.int64(0), 2), ("out", 1, 2)]
    symmetry = esl.symmetry.permutations(
        {"heads": axes}, sizes={"heads": 3}, keys={"in 𝜃": (18,), "out": (1, 6)}
    )
    element = symmetry.draw(jax.random.key(0))
    turned = symmetry.arrays(symmetry.act(element, jnp.arange(24.0)))
    order = np.asarray(element.places[0])
    expected = np.arange(18.0).reshape(3, 3, 2)[:, order].ravel()
    np.testing.assert_array_equal(turned["in 𝜃"], expected)
    np.testing.assert_array_equal(
        turned["out"][0], np.arange(18.0, 24).reshape(3, 2)[order].ravel()
    )
    content = tomllib.loads(symmetry.to_toml())
    read = esl.symmetry.permutations(content["permutations"], sizes=content["sizes"])
    assert read.at(symmetry.keys) == symmetry


def with_axes(*axes, **more):
    return lambda potential: esl.symmetry.permutations({"hidden": axes}, **more).check(potential)


BROKEN = {
    "lacks": (with_axes(HIDDEN[0], HIDDEN[2]), "it lacks axis 0 of `layers/0/bias`.$"),
    "lacks two": (
        with_axes(HIDDEN[0]),
        "it lacks axis 0 of `layers/0/bias`, it lacks axis 0 of `layers/1/kernel`.$",
    ),
    "too much": (
        with_axes(*HIDDEN, ("layers/2/kernel", 0)),
        "axis 0 of `layers/2/kernel` does not belong to it",
    ),
    "wrong axis": (
        with_axes(*HIDDEN[:2], ("layers/1/kernel", 1)),
        "axis 1 of `layers/1/kernel` does not belong to it, it lacks axis 0 of `layers/1/kernel`.$",
    ),
    "fixed": (with_axes(("layers/2/bias", 0)), "and none of `layers/2/bias` may turn at all"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_symmetry_is_refused_with_its_array(name, refused):
    """All layers have one width, so that no shape tells them apart."""
    call, sentence = BROKEN[name]
    refused(lambda: call(loss_of(2, 4, 4, 2)), f"group 'hidden' moves them by .*, {sentence}")


def test_signs_that_are_no_symmetry_are_refused(refused):
    class Rectified(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.layers[0](x)))

    potential = esl.FlaxLoss(Rectified, MOONS)
    call = with_axes(*HIDDEN, signs=("hidden",))
    refused(lambda: call(potential), "with the signs of its units in `layers/0/kernel`, though not")
    assert found(potential) == {(4, False, frozenset(HIDDEN))}


def hand(axes, **more):
    return lambda: esl.symmetry.permutations({"hidden": axes} if axes else {}, **more)


REFUSED = {
    "no groups": (hand(()), "groups.*empty"),
    "no axes": (hand([("a",)]), "list of .key, axis."),
    "text": (hand("ab"), "list of .key, axis."),
    "twice": (hand([("a", 0), ("a", 0)]), "turn axis 0 of `a` 2 times"),
    "signs": (hand([("a", 0)], signs="hidden"), "signs.*names of the groups"),
    "sizes": (hand([("a", 0)], sizes={"b": 2}), "sizes.*numbers of units of the groups hidden"),
    "sizes of another kind": (hand([("a", 0)], sizes=[2]), "sizes.*numbers of units"),
    "sizes that do not fit": (
        hand([("a", 0, 2)], sizes={"hidden": 3}, keys={"a": (4,)}),
        "3 as `sizes` says, but axis 0 of `a` has length 4",
    ),
    "no size": (hand([("a", 0, 2)], keys={"a": (4,)}), "say in `sizes` how many units"),
    "a sign of no name": (hand([("a", 0)], signs=[["hidden"]]), "signs.*names of the groups"),
    "signs of another kind": (hand([("a", 0)], signs=3), "signs.*list of names of the groups"),
    "negative": (hand([("a", -1)]), "axes counted from 0"),
    "all lengths": (
        hand([("a", 0), ("b", 0)], keys={"a": (3,), "b": (4,)}),
        "3 as axis 0 of `a` has, but axis 0 of `b` has length 4",
    ),
    "keys of another kind": (hand([("a", 0)], keys=5), "keys.*names and shapes.*an int"),
    "arrays for keys": (hand([("a", 0)], keys={"a": np.ones(3)}), "keys.*names and shapes"),
    "no element": (
        lambda: hand([("a", 0)], keys={"a": (3,)})().act(3, jnp.ones(3)),
        "element.*of 3 units, but is an int",
    ),
    "an element of another": (
        lambda: hand([("a", 0)], keys={"a": (3,)})().act(
            hand([("a", 0)], keys={"a": (4,)})().identity("float32"), jnp.ones(3)
        ),
        "element.*of 3 units, but has 4",
    ),
    "no array": (hand([("a", 0)], keys={"b": (3,)}), "turns `a`"),
    "no axis": (hand([("a", 1)], keys={"a": (3,)}), "no axis 1"),
    "lengths": (hand([("a", 0), ("b", 0)], keys={"a": (3,), "b": (4,)}), "length"),
    "blocks": (hand([("a", 0), ("b", 0, 2)], keys={"a": (3,), "b": (4,)}), "length 4"),
    "no model": (lambda: esl.symmetry.of(esl.Quadratic(1.0)), "have a model"),
    "no shapes": (lambda: hand([("a", 0)])().sizes, "know the shapes"),
    "no group": (lambda: hand([("a", 0)])().only("b"), "among the groups 'hidden'"),
    "members": (
        lambda: hand([("a", 0)], keys={"a": (3,)})().arrays(jnp.ones(4)),
        "members of 3 numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_symmetries_are_refused(name, refused):
    call, sentence = REFUSED[name]
    refused(call, sentence)


def test_a_model_without_hidden_units_is_refused(refused):
    refused(lambda: esl.symmetry.of(loss_of(2, 2)), "units that may change places")
