r"""The training loop of fitted densities and fields: gradient steps, judged by held-out data.

    p_{i+1} = p_i + u(∇loss(p_i)),      best = argmax of value(p_0), value(p_a), value(p_2a), ...

u is an optax optimizer, a the number of updates in a round. The whole loop is a `lax.scan`, so that
a fit runs inside `jit`, `vmap` and another scan, differentiates, and lowers for every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from esljax._types import Array, Scalar


def train(
    parameters: Any,
    slope: Callable[[Any, Array], Any],
    value: Callable[[Any], Scalar],
    optimizer: optax.GradientTransformation,
    *,
    rounds: int,
    updates: int = 1,
) -> tuple[Any, Scalar]:
    """Return the best of the parameters at the start and after each round, and their value.

    **Args:** `parameters`: a pytree of floating arrays, the start. `slope`: the gradient of the
    loss at some parameters; its second argument is the number of the update, shape (), for random
    numbers. `value`: how well some parameters do on held-out data, shape (); the greatest wins, the
    earliest of equals. `optimizer`: of optax, started anew. `rounds`: how often parameters are
    judged after the start. `updates`: in each round.
    **Returns:** parameters like the given ones, and a value of shape (). If the value of the start
    is NaN, the start itself is returned.
    **Differentiation:** forward and reverse, through all updates, which costs their memory.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from esljax.density import train
        >>> def value(p):
        ...     return -((p - 1.0) ** 2)
        >>> best, _ = train(
        ...     jnp.zeros(()), lambda p, _: 2 * (p - 1.1), value, optax.sgd(0.1), rounds=30
        ... )
        >>> bool(abs(best - 1.0) < 0.05)  # the loss is least at 1.1, the value greatest at 1
        True
    """

    def update(carry, i):
        learned, memory = carry
        steps, memory = optimizer.update(slope(learned, i), memory, learned)
        return (optax.apply_updates(learned, steps), memory), None

    def one_round(carry, numbers):
        learning, best, most = carry
        learning, _ = jax.lax.scan(update, learning, numbers)
        judged = value(learning[0])
        better = judged > most
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), learning[0], best)
        return (learning, best, jnp.where(better, judged, most)), None

    start = ((parameters, optimizer.init(parameters)), parameters, value(parameters))
    numbers = jnp.arange(rounds * updates).reshape(rounds, updates)
    (_, best, most), _ = jax.lax.scan(one_round, start, numbers)
    return best, most
