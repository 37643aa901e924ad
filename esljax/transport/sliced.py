"""The mean of one-dimensional distances over fixed directions."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_key, check_positive_int, door, plain_int
from esljax._numerics import product
from esljax._types import Array, Float, Key, Scalar
from esljax.transport.base import AbstractTransport, Solution, recentred, solution
from esljax.transport.exact import sorted_squared


class SlicedTransport(AbstractTransport):
    r"""d times the mean over fixed directions of the W2² of the projections. Any n, m.

        d · mean_k W2²(⟨u_k, x⟩, ⟨u_k, y⟩) ≤ W2²(x, y)

    The directions depend on `key` and d alone and come in orthonormal blocks of d. With
    `directions` a multiple of d the bound always holds; otherwise on average over keys. It is tight
    for a translation.

    **Args:** `directions`: their number, at least 1. `key`: the key to draw them from.
    **Raises:** `InputError` if `directions` is not a positive integer or `key` is not a key.
    **Differentiation:** forward and reverse, to every order, at the orders found: exact wherever no
    two projections coincide.
    **Reference:** Bonneel, Rabin, Peyré and Pfister, "Sliced and Radon Wasserstein barycenters of
    measures", JMIV 51, 22 (2015).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> transport = esl.SlicedTransport(directions=4, key=jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (5, 2))
        >>> round(float(transport.squared(x, x + 1.0)), 5)
        2.0
    """

    is_metric: ClassVar[bool] = True
    directions: int = eqx.field(static=True, converter=plain_int)
    key: Key

    def __check_init__(self):
        check_positive_int("directions", self.directions)
        check_key("key", self.key)

    def in_units(self, size: Scalar) -> "SlicedTransport":
        return self

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        d = x.shape[1]
        across = self._draw(d).astype(x.dtype)
        return solution(d * jnp.mean(sorted_squared(product(x, across), product(y, across))))

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int:
        projections = (13 if differentiated else 5) * n * self.directions
        return (6.5 if differentiated else 4) * n * d + projections

    def _draw(self, d: int) -> Float[Array, "d directions"]:
        """Return unit columns, orthonormal within each block of d; the same in every precision."""
        width = min(d, self.directions)
        blocks = -(-self.directions // width)
        normal = jax.random.normal(self.key, (blocks, d, width), jnp.float32).astype(
            jnp.result_type(float)
        )
        return jnp.concatenate(jnp.linalg.qr(normal)[0], axis=1)[:, : self.directions]
