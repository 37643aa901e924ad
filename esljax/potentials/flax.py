"""The training loss of a Flax model as a potential of its raveled parameters."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    InputError,
    as_count,
    as_float,
    as_jax,
    as_real,
    check_choice,
    check_finite,
    check_fits,
    check_key,
    check_nonnegative,
    door,
    failure,
    in_words,
    refuse,
)
from esljax._types import Array, Float, Key, Scalar, Shaped
from esljax.potentials.base import AbstractPotential, floating_as
from esljax.potentials.keys import drawn_in_line


class FlaxLoss(AbstractPotential):
    """Φ = mean over examples of w · loss(model_θ(input), label) + ½ l2 ‖θ‖², for a Flax model.

    **Args:**
    - `model`: a function `rngs -> nnx.Module` (every member is then built from random numbers of
      its own), an `nnx.Module`, or a `flax.linen.Module`. Its floating parameters are the position;
      whatever else it holds stays as it is. Its outputs may not depend on random numbers, so that
      Dropout must be off (`model.eval()`). BatchNorm takes the statistics of each batch
      (`model.train()`); running ones never enter a position, and an `nnx.Module` that uses them
      keeps those it holds. For models of other libraries use `FromFunction`.
    - `data`: `(inputs (m, ...), labels (m, ...))`. Either may be a pytree of arrays with one
      leading axis, such as `{"ids": ids, "mask": mask}`, that the model or the loss takes as one
      argument. Floating arrays are cast to the type that the model computes in; token ids, masks
      and 8-bit images stay what they are.
    - `loss`: `"cross_entropy"`, in nats, whose labels are class indices; `"squared_error"`, the sum
      of the squared differences over the outputs of one example, without the factor ½; or
      `fn(outputs (m, ...), labels) -> (m,)`, which also takes outputs and labels that are pytrees,
      such as targets with the weights of the examples.
    - `l2`: weight decay, at least 0.
    - `batch_size`: examples per step and member, drawn with replacement, or None for all of them.
    - `dtype`: the floating type that the model computes in, such as `"bfloat16"` for the matrix
      units of a TPU or GPU; by default that of its parameters if those have 16 bits, and that of
      the positions otherwise. Positions, noise, loss, weight decay, work and transport are of at
      least single precision in any case: the model sees rounded copies of the parameters and
      inputs, and its outputs and gradients are widened again.
    - `weights`: w, one number of at least 0 for each example, shape (m,); None for 1. They are not
      normalized: with mean 1, Φ is a weighted average, and so without bias is that of a batch,
      whose examples are drawn alike. `Curriculum` lets a drive move them.
    - `trainable`: the nnx filter of the variables that move, such as `nnx.LoRAParam`; by default
      `nnx.Param`, all parameters. The others are frozen; pass an `nnx.Module` then: a function
      would draw them anew.

    **Raises:** `InputError` for a model of another library, one that draws random numbers or
    depends on state that no step updates, labels out of range, NaN in the data, weights of another
    shape or below 0, or a model that does not accept the inputs.
    **Differentiation:** in the position, to any order that the model allows, and in `l2`, `inputs`
    and `weights`.

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
    inputs: Any
    """The inputs of all examples: an array (m, ...), or a pytree of them."""
    labels: Any
    """Their labels: class indices, targets, or a pytree of arrays (m, ...)."""
    l2: Scalar
    """Weight decay, in units of Φ per θ²."""
    weights: Float[Array, " m"] | None
    """What the loss of each example counts, shape (m,), without units; None for 1."""
    constants: tuple[Array, ...]
    """What the model holds besides the position: frozen and integer parameters, and its state."""
    network: Any = eqx.field(static=True)
    """The model, as a function of one flat position: a `Network`."""
    loss: Callable[[Any, Any], Array] = eqx.field(static=True)
    """Outputs and labels of m examples to m losses."""
    batch_size: int | None = eqx.field(static=True)
    """Examples per step and member; None for all of them."""
    dtype: Any = eqx.field(static=True)
    """The floating type of the model; None for that of its parameters and the positions."""
    dropped: tuple[str, ...] = eqx.field(static=True)
    """The kinds of state that the outputs do not depend on and no run keeps, such as the running
    statistics of BatchNorm (`BatchStat`)."""

    def __init__(
        self,
        model: Any,
        data: Any,
        *,
        loss: str | Callable[[Any, Any], Array] = "cross_entropy",
        l2: float = 0.0,
        batch_size: int | None = None,
        dtype: Any = None,
        weights: Any = None,
        trainable: Any = None,
    ):
        # Imported here: Flax takes half as long as jax.
        from esljax.potentials.network import trace

        self.inputs, self.labels = _examples(data)
        self.weights = None if weights is None else _weights(weights, _count(self.inputs))
        self.l2 = as_float(l2, "l2")
        check_nonnegative("l2", self.l2)
        self.batch_size = None if batch_size is None else as_count("batch_size", batch_size)
        if not callable(loss):
            check_choice("loss", loss, tuple(_LOSSES))
        self.dtype = _floating_type(dtype)
        one = jax.tree.map(lambda x: x[:1], self.inputs)
        self.network, self.constants, self.dropped, outputs = trace(model, one, trainable)
        if not callable(loss):
            _check_plain(loss, outputs, self.labels)
        if loss == "cross_entropy":
            _check_labels(self.labels, outputs.shape)
        if loss == "squared_error" and self.labels[0].size != np.prod(outputs.shape[1:]):
            raise refuse(
                "data",
                f"have labels of {np.prod(outputs.shape[1:])} numbers, one per output of the model",
                f"has labels of shape {self.labels.shape}",
            )
        self.loss = loss if callable(loss) else _LOSSES[loss]
        _check_loss(self.loss, outputs, self.labels)
        if self.dropped:
            # The sentence is no warning: those that make errors of warnings asked for batches.
            _LOGGER.warning(
                "FlaxLoss drops the state %s of its model: the outputs use that of each batch, and "
                "no run updates it.",
                ", ".join(self.dropped),
            )

    @property
    def parameter_keys(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return self.network.layout.keys()

    @property
    def outputs_by_array(self) -> Callable[[Sequence[Array], Any], Any]:
        def outputs(arrays: Sequence[Array], inputs: Any) -> Any:
            return self.network.apply_to(arrays, self.constants, inputs)

        return outputs

    @door
    def probes(self, key: Key, count: int) -> tuple[Float[Array, " d"], Any]:
        """A random initialization and examples, with noise of their size added to both.

        Initial biases are 0, and images are where they are dark: at numbers that are special, more
        leaves a model alone than elsewhere.
        """
        of_start, of_rows, of_noise = jax.random.split(key, 3)
        arrays = self.network.layout.arrays(self.network.initialize(of_start))
        rows = jax.random.randint(of_rows, (count,), 0, _count(self.inputs))
        inputs = jax.tree.map(lambda x: x[rows], self.inputs)
        noisy = [
            _with_noise(x, jax.random.fold_in(of_noise, i), 0.3)
            for i, x in enumerate([*arrays, *jax.tree.leaves(inputs)])
        ]
        position = jnp.concatenate([jnp.ravel(x) for x in noisy[: len(arrays)]])
        return position, jax.tree.structure(inputs).unflatten(noisy[len(arrays) :])

    @door
    def energy(self, position: Float[Array, " d"], batch: Any = None) -> Scalar:
        inputs, labels, weights = self.inputs, self.labels, self.weights
        if batch is not None:
            inputs, labels, weights = jax.tree.map(lambda x: x[batch], (inputs, labels, weights))
        losses = self.loss(self._outputs(position, inputs), floating_as(position.dtype, labels))
        losses = losses.astype(position.dtype)
        misfit = jnp.mean(losses if weights is None else weights.astype(position.dtype) * losses)
        return misfit + self.l2.astype(position.dtype) / 2 * jnp.sum(position**2)

    @door
    def energy_and_gradient(
        self, position: Float[Array, " d"], batch: Any = None
    ) -> tuple[Scalar, Float[Array, " d"]]:
        return jax.value_and_grad(self.energy)(position, batch)

    @door
    def draw(self, key: Key, members: int) -> Shaped[Array, "n b"] | None:
        """Indices of the examples of one step, (members, batch_size), independent and with
        replacement; None for all."""
        if self.batch_size is None:
            return None
        return jax.random.randint(
            drawn_in_line(key), (members, self.batch_size), 0, _count(self.inputs)
        )

    @door
    def init(self, *, members: int, key: Key) -> Float[Array, "n d"]:
        """Independent random initializations, one raveled row per member.

        Member i is a function of `fold_in(key, i)` alone. A function `rngs -> nnx.Module` and a
        linen module run their own initializers. An `nnx.Module` instance no longer knows its
        initializers, so each of its arrays is redrawn entry by entry, with replacement, from the
        entries it holds: for the independent entries of Flax's default initializers that is their
        law, and constant arrays stay constant.

        **Args:** `members`: n ≥ 1. `key`: made by `jax.random.key`.
        **Returns:** shape (n, d), of at least single precision, also for parameters of 16 bits.
        """
        members = as_count("members", members)
        check_key("key", key)
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
        return self.network.unravel_model(position, self.constants)

    @door
    def predict(self, positions: Float[Array, "*batch d"], inputs: Any) -> Any:
        """The model's outputs (..., m, classes) on `inputs` at positions (..., d); a pytree of them
        if the model returns one."""
        positions, inputs = as_real("positions", positions), _rows("inputs", inputs)

        def apply(position):
            return self._outputs(position, inputs)

        for _ in range(positions.ndim - 1):
            apply = jax.vmap(apply)
        return apply(positions)

    @property
    def classifies(self) -> bool:
        """Whether the labels are classes, so that `accuracy` means something."""
        return self.loss is _cross_entropy

    @door
    def accuracy(self, positions: Float[Array, "*batch d"], data: Any) -> Float[Array, "*batch"]:
        """The share of the labels in `data` that are the largest output, one number for each
        position (..., d).

        **Raises:** `InputError` unless the labels are class indices, one for each row of outputs.
        """
        positions = as_real("positions", positions)
        inputs, labels = _examples(data)
        outputs = self.predict(positions, inputs)
        shape = getattr(labels, "shape", ())
        classes = hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)
        batch = positions.shape[:-1]
        if not classes or getattr(outputs, "shape", ())[:-1] != batch + shape:
            was = f"has {_in_shapes(labels)} for outputs {_in_shapes(outputs, len(batch))}"
            raise refuse("data", "have class indices as labels, one for each row of outputs", was)
        right = (jnp.argmax(outputs, axis=-1) == labels).reshape(*batch, -1)
        return jnp.mean(right, axis=-1, dtype=positions.dtype)

    def _outputs(self, position: Float[Array, " d"], inputs: Any) -> Any:
        outputs = self.network.apply(position, self.constants, inputs, self.dtype)
        return floating_as(position.dtype, outputs)


def _cross_entropy(outputs: Float[Array, "m c"], labels: Shaped[Array, " m"]) -> Float[Array, " m"]:
    chosen = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(outputs, axis=1) - chosen


def _squared_error(outputs: Array, labels: Array) -> Float[Array, " m"]:
    """The sum of the squares over the outputs, without the factor ½."""
    labels = labels.reshape(labels.shape[0], -1).astype(outputs.dtype)
    return jnp.sum((outputs.reshape(labels.shape) - labels) ** 2, axis=1)


_LOSSES = {"cross_entropy": _cross_entropy, "squared_error": _squared_error}
_LOGGER = logging.getLogger("esljax")


# --- Data -----------------------------------------------------------------------------------------


def _examples(data: Any) -> tuple[Any, Any]:
    """Inputs and labels, each an array or a pytree of arrays, with one leading axis."""
    must = "be two arrays (inputs (m, ...), labels (m, ...)), such as digits().train"
    try:
        inputs, labels = data
    except (TypeError, ValueError) as error:
        raise refuse("data", must, f"is {_of_parts(data)}") from error
    parts = []
    for part in (inputs, labels):
        try:
            parts.append(_rows("data", part))
        except InputError as error:
            if "masked" in str(error) or "from" in str(error):
                raise
            raise refuse("data", must, f"is {_of_parts(data)}") from error
    lengths = {x.shape[:1] for x in jax.tree.leaves(parts)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        shapes = f"has shapes {' and '.join(_in_shapes(x) for x in parts)}"
        plain = all(hasattr(x, "shape") for x in parts)
        raise refuse("data", must, shapes if plain else f"is {_of_parts(data)} and {shapes}")
    for leaf in jax.tree.leaves(parts):
        check_finite("data", leaf)
    return parts[0], parts[1]


def _rows(argument: str, part: Any) -> Any:
    """An array, or a dict or tuple of arrays (or another pytree), as arrays of jax.

    A list is one array, as NumPy reads it, and so is a tuple that holds no arrays.
    """
    leaves, structure = jax.tree.flatten(part, is_leaf=lambda x: isinstance(x, list))
    several = leaves and not jax.tree_util.treedef_is_leaf(structure)
    if several and isinstance(part, tuple) and not any(hasattr(x, "__array__") for x in leaves):
        several = False
    if not several:
        return as_jax(argument, part)
    return structure.unflatten([as_jax(argument, leaf) for leaf in leaves])


def _with_noise(x: Array, key: Key, size: float) -> Array:
    """A floating array with normal noise of that part of its root mean square, or of 1 if it is
    0."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    mean = jnp.sqrt(jnp.mean(x**2))
    return x + size * jnp.where(mean > 0, mean, 1) * jax.random.normal(key, x.shape, x.dtype)


def _weights(weights: Any, count: int) -> Float[Array, " m"]:
    weights = as_float(weights, "weights")
    if weights.shape != (count,):
        raise refuse(
            "weights", f"have shape ({count},), one for each example", f"has shape {weights.shape}"
        )
    check_finite("weights", weights)
    check_nonnegative("weights", weights)
    return weights


def _count(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _of_parts(data: Any) -> str:
    parts = f" of {len(data)} parts" if isinstance(data, list | tuple) else ""
    return f"{in_words(data)}{parts}"


def _in_shapes(tree: Any, skipped: int = 0) -> str:
    """The shapes of a pytree of arrays, without some leading axes."""
    return str(jax.tree.map(lambda x: tuple(x.shape[skipped:]), tree))


# --- Checks ---------------------------------------------------------------------------------------


def _floating_type(dtype: Any) -> Any:
    kinds = str | type | np.dtype
    try:
        if dtype is None:
            return None
        if isinstance(dtype, kinds) and jnp.issubdtype(dtype, jnp.floating):
            return jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:  # a word that names no type
        pass
    raise refuse("dtype", "be a floating type such as 'bfloat16', or None", f"is {dtype!r}")


def _check_plain(loss: str, outputs: Any, labels: Any) -> None:
    """Reject pytrees beside the losses that are known by name."""
    for what, tree in (("outputs", outputs), ("labels", labels)):
        if not hasattr(tree, "shape"):
            must = f"be a function of your own (outputs, labels) -> (m,) for {what} in {{}}"
            raise refuse("loss", must.format(in_words(tree)), f"is {loss!r}")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        must = "be a function of your own (outputs, labels) -> (m,) unless outputs are floating"
        raise refuse("loss", must, f"is {loss!r} for outputs of dtype {outputs.dtype}")


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


def _check_loss(loss: Callable[[Any, Any], Array], outputs: Any, labels: Any) -> None:
    """Reject a loss that fails on the outputs or gives anything but one number per example."""
    m = _count(labels)
    single = jnp.result_type(float)

    def of_all(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct((m, *x.shape[1:]), single if floating else x.dtype)

    try:
        losses = jax.eval_shape(loss, jax.tree.map(of_all, outputs), floating_as(single, labels))
    except InputError:
        raise
    except Exception as error:
        shapes = f"{_in_shapes(jax.tree.map(of_all, outputs))} and labels {_in_shapes(labels)}"
        raise refuse(
            "loss", f"accept outputs {shapes}", f"fails on them: {failure(error)}"
        ) from error
    shape = getattr(losses, "shape", None)
    was = f"returns {in_words(losses)}" if shape is None else f"returns shape {shape}"
    if shape != (m,):
        raise refuse("loss", f"return one number per example, shape ({m},)", was)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise refuse("loss", "return floating numbers", f"returns dtype {losses.dtype}")
