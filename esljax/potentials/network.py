"""A Flax model as a function of one flat position: which of its arrays move, which stay, and which
it draws anew.

    position (d,)  = its floating parameters, raveled
    constants      = whatever else it holds: integers, frozen parameters, running statistics
    random streams = refused if its outputs depend on them
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.errors import InvalidRngError
from jax.interpreters import partial_eval

from esljax._checks import InputError, as_array, failure, in_words, is_key, refuse
from esljax._types import Array, Float, Key
from esljax.potentials.base import floating_as
from esljax.potentials.own_models import parameters_of

MODELS = (
    "be a Flax module or a function rngs -> nnx.Module "
    "(for another library, FromFunction(fn) of the raveled parameters)"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters sit in a position. Equal layouts compare equal."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def ravel(self, parameters: Any) -> Float[Array, " d"]:
        """One row, of at least single precision: a step of 16 bits would be lost in rounding."""
        wide = jnp.result_type(*self.dtypes)
        dtype = wide if wide.itemsize >= 4 else jnp.result_type(float)
        leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(parameters)]
        return jnp.concatenate(leaves)

    def keys(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The names and shapes of the parameters, in the order of a position."""
        named = self.structure.unflatten([jax.ShapeDtypeStruct(x, int) for x in self.shapes])
        return tuple(
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(named)
        )

    def arrays(self, position: Float[Array, " d"]) -> list[Array]:
        """The parameters of a position, in their order and shapes and in its type."""
        pieces = jnp.split(position, np.cumsum([int(np.prod(x)) for x in self.shapes])[:-1])
        return [x.reshape(shape) for x, shape in zip(pieces, self.shapes, strict=True)]

    def unravel(self, position: Float[Array, " d"], dtype: Any) -> Any:
        """The parameters in `dtype`; if that is None, those of 16 bits in their own type and the
        others in that of the position."""
        types = [dtype or _inside(own, position.dtype) for own in self.dtypes]
        arrays = self.arrays(position.astype(dtype or position.dtype))
        return self.structure.unflatten(
            [x.astype(own) for x, own in zip(arrays, types, strict=True)]
        )

    def inside(self, dtype: Any) -> Any:
        """The type that the model computes in at positions of `dtype`."""
        return _inside(jnp.result_type(*self.dtypes), dtype)


@dataclasses.dataclass(frozen=True)
class Network:
    """A Flax model as a function of one flat position. Equal models, equally initialized, compare
    equal and share compiled code."""

    merge: Callable[[Any, Any, Any], Any]
    """Definition, parameters and the rest to a model, or to the variables of a linen module."""
    definition: Any
    layout: Layout
    draw: Callable[[Key], Any]
    """A key to the parameters of one member."""
    rest: Any
    """The structure of what does not move."""
    streams: tuple[tuple[tuple[int, ...], Any] | None, ...]
    """The shape and the generator of every random stream among the leaves of the rest; None for the
    arrays, which are the constants of `apply`."""

    def initialize(self, key: Key) -> Float[Array, " d"]:
        """The position of one member that `key` draws."""
        return self.layout.ravel(self.draw(key))

    def unravel_model(self, position: Array, constants: Any, dtype: Any = None) -> Any:
        """The model at a position, or the variables of a linen module."""
        return self._merged(self.layout.unravel(position, dtype), constants)

    def _merged(self, parameters: Any, constants: Any) -> Any:
        given = iter(constants)
        rest = self.rest.unflatten(
            [next(given) if stream is None else _unused(*stream) for stream in self.streams]
        )
        return self.merge(self.definition, parameters, rest)

    def apply(self, position: Array, constants: Any, inputs: Any, dtype: Any = None) -> Any:
        """The outputs of the model on a pytree of inputs with one leading axis."""
        model = self.unravel_model(position, constants, dtype)
        inside = self.layout.inside(position.dtype) if dtype is None else dtype
        return self.call(model, floating_as(inside, inputs))

    def apply_to(self, arrays: Sequence[Array], constants: Any, inputs: Any) -> Any:
        """The same from the parameters as arrays of one type, which the model computes in."""
        model = self._merged(self.layout.structure.unflatten(arrays), constants)
        return self.call(model, floating_as(jnp.result_type(*arrays), inputs))

    def call(self, model: Any, inputs: Any) -> Any:
        """The outputs of a model, or of the variables of a linen module."""
        if not isinstance(self.definition, linen.Module):
            return model(inputs)
        changing = sorted(set(model) - {"params"})
        outputs: Any = self.definition.apply(model, inputs, mutable=changing or False)
        # What a call changes, such as running statistics, ends with it.
        return outputs[0] if changing else outputs


class Traced(NamedTuple):
    """A network and what one traced pass shows of it."""

    network: Network
    constants: tuple[Array, ...]
    """The arrays that do not move, in the order that `Network.apply` takes."""
    dropped: tuple[str, ...]
    """The kinds of state that the outputs do not depend on, such as running statistics."""
    outputs: Any
    """The outputs for one example, as shapes."""


def trace(model: Any, inputs: Any, trainable: Any = None) -> Traced:
    """Take a model apart and trace it once.

    **Args:** `model`, `trainable`: as `FlaxLoss` takes them. `inputs`: a pytree of one example,
    with leading axes of length 1.
    **Raises:** `InputError` for what is no model, fails on the inputs, or depends on random numbers
    or on state that no step of a run updates.
    """
    trainable = nnx.Param if trainable is None else trainable
    if isinstance(model, linen.Module):
        if trainable is not nnx.Param:
            raise refuse("trainable", "be left out for a linen module", f"is {in_words(trainable)}")
        leaves, structure = jax.tree.flatten(inputs)
        draw = _DrawByLinen(model, structure, tuple((x.shape, x.dtype) for x in leaves))
        parts, again = draw.parts(0), draw.parts
    elif isinstance(model, nnx.Module):
        parts, again = _nnx_parts(model, trainable), None
        draw = _RedrawEntries(parts.parameters)
    else:
        draw = _DrawByFactory(model, trainable)
        parts, again = draw.parts(0), draw.parts
    leaves, rest = jax.tree.flatten(parts.rest)
    parameters, structure = jax.tree.flatten(parts.parameters)
    layout = Layout(
        structure,
        tuple(tuple(x.shape) for x in parameters),
        tuple(jax.dtypes.canonicalize_dtype(x.dtype) for x in parameters),
    )
    streams = tuple((x.shape, jax.random.key_impl(x)) if is_key(x) else None for x in leaves)
    net = Network(parts.merge, parts.definition, layout, draw, rest, streams)
    outputs, used, changed = _traced_pass(net, leaves, inputs)
    _check_state(parts, leaves, used, changed, again)
    idle = {
        name
        for name, stream, use in zip(parts.names, streams, used, strict=True)
        if stream is None and not use and not name.startswith(("Rng", "Param"))
    }
    constants = tuple(
        jnp.asarray(x) for x, stream in zip(leaves, streams, strict=True) if stream is None
    )
    return Traced(net, constants, tuple(sorted(idle)), outputs)


# --- Models taken apart ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A model taken apart."""

    merge: Callable[[Any, Any, Any], Any]
    definition: Any
    parameters: Any
    """The floating parameters; None in the places of the others."""
    rest: Any
    """What does not move: the other parameters, and the state besides them."""
    names: tuple[str, ...]
    """What each leaf of the rest is: the type of its variable, or its collection."""
    paths: tuple[tuple, ...]
    """Where it is."""


@dataclasses.dataclass(frozen=True)
class _DrawByFactory:
    factory: Callable[..., Any]
    trainable: Any

    def __call__(self, key: Key) -> Any:
        return _nnx_parts(_called(self.factory, nnx.Rngs(key)), self.trainable).parameters

    def parts(self, seed: int) -> _Parts:
        return _nnx_parts(_built(self.factory, seed), self.trainable)


@dataclasses.dataclass(frozen=True)
class _DrawByLinen:
    module: linen.Module
    structure: Any
    inputs: tuple[tuple[tuple[int, ...], Any], ...]

    def __call__(self, key: Key) -> Any:
        return _linen_split(self.variables(key))[0]

    def variables(self, key: Key) -> Any:
        zeros = self.structure.unflatten([jnp.zeros(*each) for each in self.inputs])
        return linen.meta.unbox(self.module.init(key, zeros))

    def parts(self, seed: int) -> _Parts:
        try:
            shapes = jax.eval_shape(self.variables, jax.random.key(0))
            parameters, rest = _linen_split(shapes)
            if jax.tree.leaves(rest):
                rest = _linen_split(jax.jit(self.variables)(jax.random.key(seed)))[1]
        except Exception as error:
            zeros = self.structure.unflatten([jax.ShapeDtypeStruct(*x) for x in self.inputs])
            raise _fails(zeros, error) from error
        paths = tuple(_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest))
        names = tuple("Param" if path[0] == "params" else str(path[0]) for path in paths)
        return _Parts(_joined, self.module, _real(parameters), rest, names, paths)


@dataclasses.dataclass(frozen=True, eq=False)
class _RedrawEntries:
    """Each array anew from its own entries, drawn independently with replacement."""

    parameters: Any

    def __call__(self, key: Key) -> Any:
        leaves, structure = jax.tree.flatten(self.parameters)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [
                jax.random.choice(k, jnp.ravel(leaf), leaf.shape) if leaf.size else leaf
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )


def _nnx_parts(model: nnx.Module, trainable: Any) -> _Parts:
    try:
        definition, chosen, others = nnx.split(model, trainable, ...)
    except Exception as error:
        must = "be an nnx filter, such as nnx.LoRAParam, that leaves a model whole"
        raise refuse("trainable", must, f"fails: {failure(error)}") from error
    parameters, fixed = eqx.partition(_arrays(nnx.to_pure_dict(chosen)), _is_floating)
    rest = fixed, _arrays(nnx.to_pure_dict(others))
    kinds = {
        tuple(path): type(variable).__name__
        for state in (chosen, others)
        for path, variable in nnx.to_flat_state(state)
    }
    paths = [_keys(path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(rest)]
    # A variable may hold a whole tree, whose leaves are below its path.
    names = [
        next(kinds[path[:i]] for i in range(len(path), 0, -1) if path[:i] in kinds)
        for path in paths
    ]
    parameters = _real(parameters)
    return _Parts(_merged, definition, parameters, rest, tuple(names), tuple(paths))


def _merged(definition: Any, parameters: Any, rest: Any) -> Any:
    fixed, others = rest
    return nnx.merge(definition, eqx.combine(parameters, fixed), others)


def _linen_split(variables: Any) -> tuple[Any, Any]:
    moves = jax.tree_util.tree_map_with_path(
        lambda path, x: path[0].key == "params" and _is_floating(x), variables
    )
    return eqx.partition(variables, moves)


def _joined(definition: Any, parameters: Any, rest: Any) -> Any:
    del definition
    return eqx.combine(parameters, rest)


def _built(model: Any, seed: int) -> nnx.Module:
    """The network that a function `rngs -> nnx.Module` makes."""
    # Callable models of other libraries would fail on the random numbers somewhere within.
    if not callable(model) or isinstance(model, eqx.Module):
        raise refuse("model", MODELS, f"is {in_words(model)}")
    try:
        made = _called(model, nnx.Rngs(seed))
    except InputError:
        raise
    except Exception as error:
        raise refuse("model", MODELS, f"fails on rngs: {failure(error)}") from error
    if not isinstance(made, nnx.Module):
        raise refuse("model", MODELS, f"returns {in_words(made)}")
    return made


def _called(factory: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    """`factory(rngs)`, by name where it takes them by name alone, as the layers of nnx do."""
    parameter = parameters_of(factory).get("rngs")
    by_name = parameter is not None and parameter.kind is parameter.KEYWORD_ONLY
    return factory(rngs=rngs) if by_name else factory(rngs)


def _real(parameters: Any) -> Any:
    """The parameters, if there are any and all are real."""
    leaves = jax.tree.leaves(parameters)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            must = "have real parameters (two real arrays in the place of a complex one)"
            raise refuse("model", must, f"has some of dtype {leaf.dtype}")
    if not sum(int(np.prod(leaf.shape)) for leaf in leaves):
        raise refuse("model", "have at least one floating parameter", "has none")
    return parameters


def _arrays(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x if is_key(x) else as_array("model", x, "hold arrays alone in its variables"),
        tree,
    )


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


# --- One traced pass ------------------------------------------------------------------------------


def _traced_pass(net: Network, leaves: list, inputs: Any) -> tuple[Any, list[bool], set]:
    """Shapes of the outputs for these inputs, whether they depend on each leaf of the rest, and the
    paths of the variables that a call replaces."""
    changed = set()

    def outputs(position, leaves, inputs):
        parameters = net.layout.unravel(position, None)
        model = net.merge(net.definition, parameters, net.rest.unflatten(leaves))
        before = _held(model)
        found = net.call(model, floating_as(net.layout.inside(position.dtype), inputs))
        after = _held(model)
        for path in after.keys() - before.keys():
            if after[path][0]:
                must = "create all of its parameters in __init__"
                raise refuse("model", must, f"creates {'.'.join(map(str, path))} when it is called")
        changed.update(
            path for path in before if after.get(path, (None,))[-1] is not before[path][-1]
        )
        return found

    position = jax.eval_shape(net.initialize, jax.random.key(0))
    try:
        program, shapes = jax.make_jaxpr(outputs, return_shape=True)(position, leaves, inputs)
    except InputError:
        raise
    except InvalidRngError as error:
        raise _stateful("a stream of random numbers") from error
    except Exception as error:
        again = functools.partial(jax.eval_shape, outputs, position, leaves)
        raise _fails(inputs, error, again) from error
    for leaf in jax.tree.leaves(shapes):
        if leaf.shape[:1] != (1,):
            was = f"returns shape {leaf.shape} for one example"
            raise refuse("model", "return outputs (m, ...) for m examples", was)
    # What is left when all is taken away that no output needs: a stream that an unused mask or a
    # carry of zeros is drawn from counts as not drawn.
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return shapes, list(used[1 : 1 + len(leaves)]), changed


def _held(model: Any) -> dict[tuple, tuple[bool, Any]]:
    """The variables of an nnx module by their paths: whether each is a parameter, and its value."""
    if not isinstance(model, nnx.Module):
        return {}
    state = nnx.state(model)
    kinds = {tuple(path): isinstance(each, nnx.Param) for path, each in nnx.to_flat_state(state)}
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    keyed = {_keys(path): leaf for path, leaf in leaves}
    return {path: (kinds.get(path, False), leaf) for path, leaf in keyed.items()}


def _keys(path: tuple) -> tuple:
    return tuple(getattr(key, "key", None) for key in path)


def _check_state(parts: _Parts, leaves: list, used: list[bool], changed: set, again: Any) -> None:
    """Reject outputs that depend on what no step of a run updates."""
    needed = [i for i, use in enumerate(used) if use]
    drawn = sorted({parts.names[i] for i in needed if _is_random(parts.names[i], leaves[i])})
    if drawn:
        raise _stateful(f"{', '.join(drawn)}, from which it draws random numbers")
    moving = sorted({parts.names[i] for i in needed if parts.paths[i] in changed})
    if moving:
        raise _stateful(f"{', '.join(moving)}, which each call changes")
    if again is None or not needed:  # an instance keeps what it holds
        return
    running = sorted({parts.names[i] for i in needed} & {"BatchStat", "batch_stats"})
    if running:
        must = (
            "take its statistics from the batch, as BatchNorm(use_running_average=False) and "
            "model.train() do (or be an nnx.Module instance whose running statistics are final)"
        )
        raise refuse("model", must, f"depends on {running[0]}, which no step of a run updates")
    other = jax.tree.leaves(again(1).rest)
    anew = {parts.names[i] for i in needed if not np.array_equal(leaves[i], other[i])}
    if anew:
        must = "hold the same constants for every member (an nnx.Module instance keeps its own)"
        raise refuse("model", must, f"draws {', '.join(sorted(anew))} that do not move")


def _is_random(name: str, leaf: Any) -> bool:
    return is_key(leaf) or name in ("RngKey", "RngCount")


def _stateful(kinds: str) -> InputError:
    return refuse(
        "model",
        "keep no state besides its parameters (leave Dropout out, or call model.eval())",
        f"also holds {kinds}",
    )


def _fails(inputs: Any, error: Exception, again: Callable | None = None) -> InputError:
    shapes = jax.tree.map(lambda x: tuple(x.shape), inputs)
    one = hasattr(inputs, "shape")
    must = f"accept inputs of shape{'' if one else 's'} {shapes}"
    if again is not None and _takes_floats(inputs, again):
        kinds = sorted({str(x.dtype) for x in jax.tree.leaves(inputs) if not _is_floating(x)})
        must += f" of {', '.join(kinds)} (it takes floating ones, as x.astype('float32') makes)"
    return refuse("model", must, f"fails on them: {failure(error)}")


def _takes_floats(inputs: Any, again: Callable[[Any], Any]) -> bool:
    """Whether a model that failed takes the same inputs if none are integers."""
    if all(_is_floating(x) for x in jax.tree.leaves(inputs)):
        return False
    single = jnp.result_type(float)
    try:
        again(
            jax.tree.map(
                lambda x: x if _is_floating(x) else jax.ShapeDtypeStruct(x.shape, single), inputs
            )
        )
    except Exception:  # whatever a model from outside raises
        return False
    return True


def _unused(shape: tuple[int, ...], generator: Any) -> Array:
    """A random stream in the place of one that is not drawn from."""
    return jnp.broadcast_to(jax.random.key(0, impl=generator), shape)


def _inside(own: Any, dtype: Any) -> Any:
    """The type in which a model of 16 bits computes is its own."""
    return own if own.itemsize < 4 else dtype
