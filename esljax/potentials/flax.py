"""The training loss of a Flax model as a potential of its raveled parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.errors import InvalidRngError
from jax.flatten_util import ravel_pytree

from esljax._checks import (
    InputError,
    as_float,
    check_choice,
    check_finite,
    check_fits,
    check_nonnegative,
    check_positive_int,
    first_sentence,
    in_words,
    refuse,
)
from esljax._types import Array, Float, Key, Scalar, Shaped
from esljax.potentials.base import AbstractPotential


class FlaxLoss(AbstractPotential):
    """Φ = mean over examples of loss(model_θ(input), label) + ½ l2 ‖θ‖², for a Flax model.

    **Args:**
    - `model`: a function `rngs -> nnx.Module` (every member is then built from random numbers of
      its own), an `nnx.Module`, or a `flax.linen.Module`. It must have no state besides its
      parameters: BatchNorm and Dropout are rejected. For models of other libraries use
      `FromFunction`.
    - `data`: `(inputs (m, ...), labels (m, ...))`.
    - `loss`: `"cross_entropy"`, in nats, whose labels are class indices; `"squared_error"`, the sum
      of the squared differences over the outputs of one example, without the factor ½; or
      `fn(outputs (m, ...), labels) -> (m,)`.
    - `l2`: weight decay, at least 0.
    - `batch_size`: examples per step and member, drawn with replacement, or None for all of them.
    - `dtype`: the floating type that the model computes in, such as `"bfloat16"` for the matrix
      units of a TPU or GPU; by default that of the positions. Positions, noise, loss, weight decay,
      work and transport keep the type of the positions in any case: the model sees rounded copies
      of the parameters and inputs, and its outputs and gradients are widened again.

    **Raises:** `InputError` for a model of another library, state, labels out of range, NaN in the
    data, or a model that does not accept the inputs.
    **Differentiation:** in the position, to any order that the model allows, and in `l2` and
    `inputs`.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> data = esl.datasets.two_moons(samples=50)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train, batch_size=8, l2=1e-4)
        >>> positions = potential.init(members=4, key=jax.random.key(0))
        >>> positions.shape, potential(positions).shape
        ((4, 17), (4,))
    """

    conservative: ClassVar[bool] = True
    inputs: Shaped[Array, "m ..."]
    """The inputs of all examples."""
    labels: Shaped[Array, "m ..."]
    """Their labels: class indices, or targets."""
    l2: Scalar
    """Weight decay, in units of Φ per θ²."""
    network: "_Network" = eqx.field(static=True)
    """The model, as a function of one flat position."""
    loss: Callable[[Array, Array], Array] = eqx.field(static=True)
    """Outputs and labels of m examples to m losses."""
    batch_size: int | None = eqx.field(static=True)
    """Examples per step and member; None for all of them."""
    dtype: Any = eqx.field(static=True)
    """The floating type of the model; None for that of the positions."""

    def __init__(
        self,
        model: Any,
        data: Any,
        *,
        loss: str | Callable[[Array, Array], Array] = "cross_entropy",
        l2: float = 0.0,
        batch_size: int | None = None,
        dtype: Any = None,
    ):
        inputs, labels = _examples(data)
        check_finite("data", inputs)
        check_finite("data", labels)
        check_nonnegative("l2", l2)
        if batch_size is not None:
            check_positive_int("batch_size", batch_size)
        if not callable(loss):
            check_choice("loss", loss, tuple(_LOSSES))
        if dtype is not None and (
            not isinstance(dtype, str | type | np.dtype) or not jnp.issubdtype(dtype, jnp.floating)
        ):
            raise refuse("dtype", "be a floating type such as 'bfloat16', or None", f"is {dtype!r}")
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.network = _network(model, inputs[:1])
        outputs = self.network.output_shape(inputs[:1])
        if loss == "cross_entropy":
            _check_labels(labels, outputs)
        if loss == "squared_error" and labels[0].size != np.prod(outputs[1:]):
            raise refuse(
                "data",
                f"have labels of {np.prod(outputs[1:])} numbers, one per output of the model",
                f"has labels of shape {labels.shape}",
            )
        self.inputs, self.labels, self.l2 = inputs, labels, as_float(l2)
        self.loss = loss if callable(loss) else _LOSSES[loss]
        losses = jax.eval_shape(
            self.loss,
            jax.ShapeDtypeStruct((len(labels), *outputs[1:]), jnp.result_type(float)),
            labels,
        )
        if losses.shape != labels.shape[:1]:
            raise refuse(
                "loss",
                f"return one number per example, shape {labels.shape[:1]}",
                f"returns shape {losses.shape}",
            )
        self.batch_size = batch_size

    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        inputs, labels = (
            (self.inputs, self.labels)
            if batch is None
            else (self.inputs[batch], self.labels[batch])
        )
        misfit = jnp.mean(self.loss(self._outputs(position, inputs), labels))
        return misfit + self.l2.astype(position.dtype) / 2 * jnp.sum(position**2)

    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        return jax.value_and_grad(self.energy)(position, batch)

    def draw(self, key: Key, members: int) -> Shaped[Array, "n b"] | None:
        """Indices of the examples of one step, (members, batch_size), independent and with
        replacement; None for all."""
        if self.batch_size is None:
            return None
        return jax.random.randint(key, (members, self.batch_size), 0, self.inputs.shape[0])

    def init(self, *, members: int, key: Key) -> Float[Array, "n d"]:
        """Independent random initializations, one raveled row per member.

        Member i is a function of `fold_in(key, i)` alone. A function `rngs -> nnx.Module` and a
        linen module run their own initializers. An `nnx.Module` instance no longer knows its
        initializers, so each of its arrays is redrawn entry by entry, with replacement, from the
        entries it holds: for the independent entries of Flax's default initializers that is their
        law, and constant arrays stay constant.

        **Args:** `members`: n ≥ 1. `key`: made by `jax.random.key`.
        **Returns:** shape (n, d).
        """
        check_positive_int("members", members)
        member: Any = jax.eval_shape(self.network.initialize, key)
        check_fits(
            "members",
            2 * members * member.size * member.dtype.itemsize,
            f"{members:,} members of {member.size:,} numbers",
            "take fewer members or a smaller network",
        )
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(members))
        return jax.vmap(self.network.initialize)(keys)

    def unravel(self, position: Float[Array, " d"]) -> Any:
        """The model with the parameters `position` (d,): an `nnx.Module`, or the variables of a
        linen module."""
        return self.network.unravel_model(position)

    def predict(self, positions: Float[Array, "*batch d"], inputs: Shaped[Array, "m ..."]) -> Array:
        """The model's outputs (..., m, classes) on `inputs` at positions (..., d)."""

        def apply(position):
            return self._outputs(position, inputs)

        for _ in range(positions.ndim - 1):
            apply = jax.vmap(apply)
        return apply(positions)

    def accuracy(self, positions: Float[Array, "*batch d"], data: Any) -> Float[Array, "*batch"]:
        """The share of the examples in `data` whose largest output is the label, one number for
        each position (..., d)."""
        inputs, labels = data
        return jnp.mean(
            jnp.argmax(self.predict(positions, inputs), axis=-1) == labels,
            axis=-1,
            dtype=positions.dtype,
        )

    def _outputs(self, position: Float[Array, " d"], inputs: Array) -> Array:
        inside = position.dtype if self.dtype is None else self.dtype
        return self.network.apply(position.astype(inside), inputs.astype(inside)).astype(
            position.dtype
        )


def _cross_entropy(outputs: Float[Array, "m c"], labels: Shaped[Array, " m"]) -> Float[Array, " m"]:
    chosen = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(outputs, axis=1) - chosen


def _squared_error(outputs: Array, labels: Array) -> Float[Array, " m"]:
    """The sum of the squares over the outputs, without the factor ½."""
    difference = outputs.reshape(labels.shape[0], -1) - labels.reshape(labels.shape[0], -1)
    return jnp.sum(difference**2, axis=1)


_LOSSES = {"cross_entropy": _cross_entropy, "squared_error": _squared_error}


@dataclasses.dataclass(frozen=True)
class _Network:
    """A Flax model as a function of one flat position. Equal models, equally initialized, compare
    equal and share compiled code."""

    merge: Callable[[Any, Any], Any]
    definition: Any
    unravel: Callable[[Array], Any]
    draw: Any

    def initialize(self, key: Key) -> Float[Array, " d"]:
        return ravel_pytree(self.draw(key))[0]

    def unravel_model(self, position: Array) -> Any:
        return self.merge(self.definition, self.unravel(position))

    def apply(self, position: Array, inputs: Array) -> Array:
        model = self.unravel_model(position)
        return (
            model(inputs) if isinstance(model, nnx.Module) else self.definition.apply(model, inputs)
        )

    def output_shape(self, inputs: Array) -> tuple[int, ...]:
        try:
            position = jax.eval_shape(self.initialize, jax.random.key(0))
            return jax.eval_shape(self.apply, position, inputs).shape
        except InvalidRngError as error:
            raise _stateful("a stream of random numbers") from error
        except (TypeError, ValueError) as error:
            raise refuse(
                "model",
                f"accept inputs of shape {inputs.shape}",
                f"fails on them: {first_sentence(error)}",
            ) from error


@dataclasses.dataclass(frozen=True)
class _DrawByFactory:
    factory: Callable[[nnx.Rngs], Any]

    def __call__(self, key: Key) -> Any:
        return _parameters(self.factory(nnx.Rngs(key)))[1]


@dataclasses.dataclass(frozen=True)
class _DrawByLinen:
    module: linen.Module
    inputs: tuple[tuple[int, ...], Any]

    def __call__(self, key: Key) -> Any:
        return self.module.init(key, jnp.zeros(*self.inputs))


@dataclasses.dataclass(frozen=True, eq=False)
class _RedrawEntries:
    """Each array anew from its own entries, drawn independently with replacement."""

    parameters: Any

    def __call__(self, key: Key) -> Any:
        leaves, structure = jax.tree.flatten(self.parameters)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [
                jax.random.choice(k, leaf.reshape(-1), leaf.shape)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )


def _network(model: Any, inputs: Array) -> _Network:
    if isinstance(model, linen.Module):
        draw = _DrawByLinen(model, (inputs.shape, inputs.dtype))
        variables = jax.eval_shape(draw, jax.random.key(0))
        if set(variables) != {"params"}:
            raise _stateful(", ".join(sorted(set(variables) - {"params"})))
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
        return _Network(_second, model, ravel_pytree(template)[1], draw)
    if isinstance(model, nnx.Module):
        definition, parameters = _parameters(model)
        return _Network(
            nnx.merge, definition, ravel_pytree(parameters)[1], _RedrawEntries(parameters)
        )
    example: Any = _built(model)
    if not isinstance(example, nnx.Module):
        verb = "is" if example is model else "returns"
        raise refuse("model", _MODELS, f"{verb} {in_words(example)}")
    definition, parameters = _parameters(example)
    factory: Any = model
    return _Network(nnx.merge, definition, ravel_pytree(parameters)[1], _DrawByFactory(factory))


_MODELS = (
    "be a Flax module or a function rngs -> nnx.Module "
    "(for another library, FromFunction(fn) of the raveled parameters)"
)


def _built(model: Any) -> Any:
    """The network that a function `rngs -> nnx.Module` makes; anything else as it is."""
    # Callable models of other libraries would fail on the random numbers somewhere within.
    if not callable(model) or isinstance(model, eqx.Module):
        return model
    try:
        return model(nnx.Rngs(0))
    except InputError:
        raise
    except Exception as error:
        raise refuse("model", _MODELS, f"fails on rngs: {first_sentence(error)}") from error


def _parameters(model: nnx.Module) -> tuple[Any, Any]:
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        kinds = {
            type(leaf).__name__
            for leaf in jax.tree.leaves(rest, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        }
        raise _stateful(", ".join(sorted(kinds)))
    return definition, nnx.to_pure_dict(parameters)


def _second(definition: Any, variables: Any) -> Any:
    return variables


def _stateful(kinds: str) -> Exception:
    return refuse(
        "model",
        "keep no state besides its parameters (replace BatchNorm by LayerNorm, leave Dropout out)",
        f"also holds {kinds}",
    )


def _examples(data: Any) -> tuple[Array, Array]:
    """Inputs and labels as arrays with one leading axis."""
    must = "be two arrays (inputs (m, ...), labels (m, ...)), such as digits().train"
    try:
        inputs, labels = (jnp.asarray(part) for part in data)
    except (TypeError, ValueError, RuntimeError) as error:
        parts = f" of {len(data)} parts" if isinstance(data, list | tuple) else ""
        raise refuse("data", must, f"is {in_words(data)}{parts}") from error
    if inputs.ndim < 1 or labels.shape[:1] != inputs.shape[:1] or inputs.shape[0] == 0:
        raise refuse("data", must, f"has shapes {inputs.shape} and {labels.shape}")
    return inputs, labels


def _check_labels(labels: Array, outputs: tuple[int, ...]) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.ndim != 1 or len(outputs) != 2:
        raise refuse(
            "data",
            "have integer labels (m,) for the outputs (m, classes) of a cross entropy",
            f"has labels {labels.dtype}{labels.shape}",
        )
    values = np.asarray(labels)
    if values.min() < 0 or values.max() >= outputs[1]:
        raise refuse(
            "data",
            f"have labels from 0 to {outputs[1] - 1}, one per output of the model",
            f"has labels from {values.min()} to {values.max()}",
        )
