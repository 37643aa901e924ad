"""The Bures-Wasserstein distance of the sample moments."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from esljax._checks import door
from esljax._numerics import product
from esljax._types import Array, Float, Scalar
from esljax.sharding import keep
from esljax.transport.base import AbstractTransport, Solution, of_one_type, recentred, solution


class GaussianTransport(AbstractTransport):
    r"""The Bures-Wasserstein distance of the sample moments: W2² between Gaussians. Any n, m.

        W2² = |m_x - m_y|² + tr A + tr B - 2 tr(A^½ B A^½)^½  =  |m_x - m_y|² + min_O ‖X - O Y‖²

    For all laws it is a lower bound of W2² (Gelbrich). A and B are the population covariances
    (1/n), X and Y the centred clouds over √n and √m (so A = XᵀX), and O runs over rotations of the
    members: an orthogonal Procrustes problem, solved by the singular vectors of X Yᵀ. The second
    form needs no square root of a matrix, takes n < d as it takes n > d, and loses no accuracy to
    cancellation where x and y are close.

    **Differentiation:** forward and reverse by the envelope theorem, finite for isotropic,
    rank-deficient and equal clouds and for point masses. Second derivatives hold in general
    position; where singular values coincide they are NaN or raise an error.
    **Reference:** Bhatia, Jain and Lim, "On the Bures-Wasserstein distance between positive
    definite matrices", Expo. Math. 37, 165 (2019).

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> x = jnp.array([[-1.0], [1.0]])  # mean 0, standard deviation 1
        >>> y = jnp.array([[0.0], [0.0], [8.0], [8.0]])  # mean 4, standard deviation 4
        >>> round(float(esl.GaussianTransport().squared(x, y)), 4)
        25.0
    """

    is_metric: ClassVar[bool] = True
    # Two stacks of factorizations at a time can wait for each other forever: jaxlib 0.10 spreads
    # each over the threads that both occupy.
    in_turn: ClassVar[bool] = True
    moments_only: ClassVar[bool] = True
    of_distances: ClassVar[bool] = True

    def in_units(self, size: Scalar) -> "GaussianTransport":
        return self

    @door
    def solve(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Solution:
        x, y = recentred(x, y)
        mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
        shift = jnp.sum((mean_x - mean_y) ** 2)
        return solution(
            shift + _procrustes((x - mean_x) / len(x) ** 0.5, (y - mean_y) / len(y) ** 0.5)
        )

    @door
    def map(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """Return the affine image of each member of x, shape (n, d), with the moments of y.

        The images have the mean and the covariance of y.

        **Differentiation:** through the singular vectors: not finite where singular values coincide
        or vanish, unlike `squared`.
        """
        x, y = of_one_type(x, y)
        mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
        _, apart, _ = _aligned((x - mean_x) / len(x) ** 0.5, (y - mean_y) / len(y) ** 0.5)
        return x - mean_x + mean_y - len(x) ** 0.5 * apart

    def numbers_held(self, n: int, d: int, differentiated: bool) -> float | int:
        rows = min(n, d)
        return (6 * n * d + 8 * rows**2) if differentiated else (3 * n * d + 3 * rows**2)

    def numbers_waiting(self, n: int, d: int, differentiated: bool) -> float | int:
        # The residual and the slopes of a problem are marked to be kept for its derivative.
        return (8 if differentiated else 2) * n * d


@jax.custom_jvp
def _procrustes(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Scalar:
    """min_O ‖x - O y‖² = tr xᵀx + tr yᵀy - 2 ‖x yᵀ‖_*, over the O that rotate members.

    Clouds of unequal size count as if padded by zero rows.
    """
    return jnp.sum(_aligned(x, y)[0] ** 2)


@_procrustes.defjvp
@door
def _(primals, tangents):
    # The optimal O is stationary, so it may be held fixed; a derivative of the singular vectors
    # would be NaN where singular values coincide.
    residual, along_x, along_y = keep(_aligned(*primals))
    dx, dy = tangents
    return jnp.sum(residual**2), 2 * jnp.sum(along_x * dx) + 2 * jnp.sum(along_y * dy)


def _aligned(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> tuple[Array, Array, Array]:
    """Return the residual R = R_x - O R_y at the optimal O, and half the gradients of ‖R‖².

    The gradients are those in x = Q_x R_x and in y = Q_y R_y.
    """
    rows = max(min(x.shape), min(y.shape))
    (qx, rx), (qy, ry) = _factors(x, rows), _factors(y, rows)
    u, _, vt = jnp.linalg.svd(product(rx, ry.T))
    rotation = product(u, vt)
    residual = rx - product(rotation, ry)
    return residual, product(qx, residual), -product(qy, product(rotation.T, residual))


def _factors(x: Float[Array, "n d"], rows: int) -> tuple[Array, Array]:
    """Return Q and R with x = Q R and `rows` rows of R: fewer than n where n > d.

    The rows added to R are zero and move nothing.
    """
    n, d = x.shape
    q, r = jnp.linalg.qr(x) if n > d else (jnp.eye(n, dtype=x.dtype), x)
    added = rows - len(r)
    return jnp.pad(q, ((0, 0), (0, added))), jnp.pad(r, ((0, added), (0, 0)))
