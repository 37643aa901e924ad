"""The multilayer perceptron of `models.mlp`, a class of Flax."""

import itertools
from collections.abc import Sequence

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
