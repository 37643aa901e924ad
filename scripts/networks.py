"""The two small networks of the experiments, on handwritten digits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import esljax as esl


class SmallCNN(nnx.Module):
    """A convolution 3 × 3 of stride 2 with 8 channels, tanh, and a linear layer: d = 810.

    The convolution is a product with the patches of the image: that is the same function, and a
    tenth of the time on a CPU, where convolutions whose kernels differ by member are slow.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.convolution = nnx.Linear(9, channels, rngs=rngs)
        self.readout = nnx.Linear(9 * channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        image = x.reshape(-1, 8, 8)
        patches = [image[:, i : i + 5 : 2, j : j + 5 : 2] for i in range(3) for j in range(3)]
        hidden = jnp.tanh(self.convolution(jnp.stack(patches, axis=-1)))
        return self.readout(hidden.reshape(len(image), -1))


MODELS: Mapping[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "MLP": esl.models.mlp(64, 16, 10),
    "CNN": lambda rngs: SmallCNN(8, rngs=rngs),
}


def loss(model: str, examples: int, batch: int | None = None, squares: bool = False) -> Any:
    """The training loss of a model on the first digits of the training set.

    **Args:** `batch`: examples a step, None for all. `squares`: squared error on labels that are
    one in 10 numbers, instead of cross entropy.
    """
    inputs, labels = esl.datasets.digits().train
    inputs, labels = inputs[:examples], labels[:examples]
    kind = "squared_error" if squares else "cross_entropy"
    labels = np.eye(10, dtype=np.float32)[np.asarray(labels)] if squares else labels
    return esl.FlaxLoss(MODELS[model], (inputs, labels), loss=kind, batch_size=batch)


@jax.jit
def sharpness(potential: Any, positions: Any) -> jax.Array:
    """The largest curvature over all examples, a mean over four members, by power iteration."""

    def of_member(x):
        def iterate(vector, _):
            turned = jax.jvp(jax.grad(potential.energy), (x,), (vector,))[1]
            return turned / jnp.linalg.norm(turned), jnp.linalg.norm(turned)

        first = jax.random.normal(jax.random.key(0), x.shape)
        return jax.lax.scan(iterate, first / jnp.linalg.norm(first), length=20)[1][-1]

    return jnp.mean(jax.lax.map(of_member, positions[:4]))
