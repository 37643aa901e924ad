r"""Velocities by affine fields, in closed form.

w(θ) = E[b] + (B + D) C⁻¹ (θ - E[θ]),    B = Cov(b, θ), C = Cov(θ)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from esljax._numerics import average, lyapunov, product, safe_divide, shrunk_covariance
from esljax._types import Array, Float, Scalar
from esljax.velocity.base import (
    AbstractField,
    AbstractVariationalVelocity,
    Snapshot,
    diffusion_matrix,
    resolved,
)


class AffineVelocity(AbstractVariationalVelocity):
    r"""The best affine field: exact for Gaussian laws in linear drift, else a lower bound.

        w(θ) = E[b] + (B + D) C⁻¹ (θ - E[θ]),    B = Cov(b, θ), C = Cov(θ)

    The best gradient has the symmetric slope A with A C + C A = (B + D) + (B + D)ᵀ instead. With
    fewer than 2(d + 2) members in a third, the covariance is shrunk towards a multiple of the
    identity by the oracle-approximating rule, which allows n < d and biases σ. Where the law is
    multimodal σ̂ and the bound are far below σ: they are those of the best affine field.

    **Differentiation:** forward and reverse, of every order.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance
    estimation", IEEE TSP 58, 5016 (2010).

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> x = jax.random.normal(jax.random.key(0), (2000, 1)) + 2.0
        >>> velocity = esl.AffineVelocity()(x, -x, 0.5)  # v = -θ + ½ (θ - 2), so σ = 4 + ¼
        >>> bool(abs(velocity.squared - 4.25) < 5 * velocity.standard_error.squared)
        True
    """

    moments_only: ClassVar[bool] = True
    note: ClassVar[str] = "affine fields"

    def in_units(self, size: Scalar) -> "AffineVelocity":
        return self

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def fit(self, snapshot: Snapshot, gradient: bool, state: Any) -> tuple[AbstractField, Any]:
        x, b = snapshot.positions, snapshot.drift
        n, d = x.shape
        center, offset = average(x), jnp.mean(b, axis=0)
        centered = x - center
        covariance = product(centered.T, centered) / n if resolved(n, d) else shrunk_covariance(x)
        crossed = product((b - offset).T, centered) / n + diffusion_matrix(snapshot.diffusion, d)
        slope = (
            lyapunov(covariance, crossed + crossed.T)
            if gradient
            else _right_solve(crossed, covariance)
        )
        return _AffineField(center, offset, slope), None


class _AffineField(AbstractField):
    center: Float[Array, " d"]
    offset: Float[Array, " d"]
    slope: Float[Array, "d d"]

    def evaluate(
        self, positions: Float[Array, "m d"], diffusion: Float[Array, "..."]
    ) -> tuple[Array, Array, Array]:
        values = self.offset + product(positions - self.center, self.slope.T)
        spread = jnp.sum(diffusion_matrix(diffusion, len(self.center)) * self.slope)
        everywhere = jnp.ones_like(values[:, 0])
        return values, spread * everywhere, jnp.trace(self.slope) * everywhere


def _right_solve(b: Float[Array, "d d"], c: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Return b c⁻¹ for a symmetric positive semidefinite c, and 0 in the null space of c.

    The eigenvectors stay in the primal: see `_numerics`.
    """

    def solve(_, b):
        values, vectors = jnp.linalg.eigh(c)
        solvable = values > values.size * jnp.finfo(values.dtype).eps * values.max()
        inverse = safe_divide(1.0, jnp.where(solvable, values, 0))
        return product(product(b, vectors) * inverse, vectors.T)

    return jax.lax.custom_linear_solve(lambda x: product(x, c), b, solve, symmetric=True)
