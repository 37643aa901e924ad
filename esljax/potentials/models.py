"""The network of the command line and the examples. Any other Flax model works as well."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esljax.potentials.perceptron import MLP as MLP


def mlp(*sizes: int) -> Callable[[Any], Any]:
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

    def __call__(self, rngs: Any) -> Any:
        # Imported here: Flax takes half as long as jax.
        from esljax.potentials.perceptron import MLP

        return MLP(self.sizes, rngs=rngs)


def __getattr__(name: str) -> Any:
    """The network itself, which is imported when it is asked for."""
    if name == "MLP":
        from esljax.potentials.perceptron import MLP

        return MLP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
