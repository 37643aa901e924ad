r"""Functions of matrices whose derivatives survive equal and vanishing eigenvalues.

    sqrtm(a) = S with S S = a               dS = lyapunov(S, da)
    lyapunov(c, b) = L with L c + c L = b   dL = lyapunov(c, db - L dc - dc L)

An eigenvector is not differentiable where eigenvalues meet, but these functions of the matrix are. So the eigen-decomposition stays in
the primal, and the derivatives are the equations themselves, differentiated: they call these functions again, hence every order exists.
Reference: Higham, Functions of Matrices (2008), section 3.
"""

import jax
import jax.numpy as jnp

from esljax._types import Array, Float


@jax.custom_jvp
def sqrtm(a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The symmetric square root of a symmetric positive semidefinite matrix; negative eigenvalues, which are rounding, count as 0.

    **Differentiation:** forward and reverse, of every order. Along directions in which the root has no derivative (out of the null
    space) the derivative is 0.
    """
    values, vectors = jnp.linalg.eigh(a)
    return product(vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors.T)


@sqrtm.defjvp
def _(primals, tangents):
    root = sqrtm(*primals)
    return root, lyapunov(root, *tangents)


def lyapunov(c: Float[Array, "d d"], b: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """The L with L c + c L = b, for symmetric positive semidefinite c and one or several b.

    Components of b between eigenvectors whose eigenvalues add to 0 (to rounding) do not enter: L is 0 there.

    **Differentiation:** forward and reverse, of every order.
    """

    def solve(_, b):
        values, vectors = jnp.linalg.eigh(c)
        sums = jnp.maximum(values[:, None], 0) + jnp.maximum(values, 0)
        solvable = sums > values.size * jnp.finfo(values.dtype).eps * sums.max()
        inside = product(product(vectors.T, b), vectors)
        return product(
            product(vectors, jnp.where(solvable, inside / jnp.where(solvable, sums, 1), 0)),
            vectors.T,
        )

    # A linear solve is a primitive that differentiates and transposes itself by its equation; a custom_jvp would be inlined, down to the
    # eigenvectors, when the derivative of a derivative linearizes it.
    return jax.lax.custom_linear_solve(
        lambda x: product(x, c) + product(c, x), b, solve, symmetric=True
    )


def exponential(a: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """e^a for matrices of norm up to 2: Taylor's series of a/4, squared twice.

    Matrix products only: `jax.scipy.linalg.expm` is four times as slow on stacks of small matrices, and two of its batched LU
    factorizations in one program wait for each other forever on a machine of two cores (jax 0.10.2). The norm of a/4 is at most
    1/2, so the terms after the fourteenth add less than 1e-16.

    **Differentiation:** forward and reverse, of every order.
    """
    scaled, identity = a / 4, jnp.eye(a.shape[-1], dtype=a.dtype)
    result = identity + scaled / 14
    for j in range(13, 0, -1):
        result = identity + product(scaled, result) / j
    for _ in range(2):
        result = product(result, result)
    return result


def average(x: Float[Array, "n d"]) -> Float[Array, " d"]:
    """The mean, taken from the first member, so that members that all agree have no width: a width from rounding would be divided by."""
    return x[0] + jnp.mean(x - x[0], axis=0)


def shrunk_covariance(x: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """The sample covariance (1/n), shrunk towards a multiple of the identity by the oracle-approximating rule; positive definite unless
    all members agree.

    **Differentiation:** forward and reverse, of every order.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 58, 5016 (2010).
    """
    n, d = x.shape
    centred = x - average(x)
    covariance = product(centred.T, centred) / n
    if d == 1:
        return covariance
    trace, square = jnp.trace(covariance), jnp.sum(covariance**2)
    spread = square - trace**2 / d
    excess = ((1 - 2 / d) * square + trace**2) / (n + 1 - 2 / d)
    weight = jnp.where(excess < spread, excess / jnp.where(spread > 0, spread, 1), 1.0)
    return (1 - weight) * covariance + weight * trace / d * jnp.eye(d, dtype=x.dtype)


def product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a b at the highest precision: one bfloat16 pass of an accelerator is off by tens of percent on the distance of matched pairs."""
    return jnp.matmul(a, b, precision="highest")


def safe_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return √x for x that is nonnegative but for rounding: 0 where x ≤ 0, NaN where x is NaN.

    **Differentiation:** forward and reverse; the slope at 0, which is infinite, is taken as 0.
    """
    vanishes = x <= 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def safe_divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x/y, and 0 where y ≤ 0; NaN where y is NaN.

    **Differentiation:** forward and reverse; the slope where y ≤ 0 is 0.
    """
    vanishes = y <= 0
    return jnp.where(vanishes, 0, x / jnp.where(vanishes, 1, y))
