"""The network of the command line and the examples. Any other Flax model works as well."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from esljax._checks import check_fits, check_positive_int
from esljax._types import Array


class MLP(nnx.Module):
    """A multilayer perceptron with tanh between the layers.

    **Args:** `sizes`: the widths of all layers, from the inputs to the outputs. `rngs`: the random
    numbers of the initialization.
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        for size in sizes:
            check_positive_int("sizes", size)
        numbers = sum((inward + 1) * outward for inward, outward in itertools.pairwise(sizes))
        words = f"the {numbers:,} parameters of layers of {', '.join(map(str, sizes))}"
        check_fits("sizes", 4.0 * numbers, words, "take narrower layers")
        self.layers = nnx.List(
            [
                nnx.Linear(inward, outward, rngs=rngs)
                for inward, outward in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, x: Array) -> Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


def mlp(*sizes: int) -> Callable[[nnx.Rngs], MLP]:
    """A function `rngs -> MLP`, for `FlaxLoss`.

    **Args:** `sizes`: the widths of all layers, from the inputs to the outputs: `mlp(64, 32, 10)`
    has one hidden layer of 32.
    **Raises:** `InputError`, when the network is made, for widths that are not positive.

    **Example:**

        >>> import esljax as esl
        >>> data = esl.datasets.digits()
        >>> esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256).l2.shape
        ()
    """
    return _MakeMLP(sizes)


@dataclasses.dataclass(frozen=True)
class _MakeMLP:
    """Equal sizes compare equal, so that the networks share compiled code."""

    sizes: tuple[int, ...]

    def __call__(self, rngs: nnx.Rngs) -> MLP:
        return MLP(self.sizes, rngs=rngs)
