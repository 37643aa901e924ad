r"""Functions of matrices and guarded scalars, differentiable where textbook formulas are not.

    sqrtm(a) = S with S S = a               dS = lyapunov(S, da)
    lyapunov(c, b) = L with L c + c L = b   dL = lyapunov(c, db - L dc - dc L)
    safe_root(x) = √x, 0 for x ≤ 0          safe_divide(x, y) = x/y, 0 for y ≤ 0

An eigenvector is not differentiable where eigenvalues meet, but these functions of the matrix are.
The eigendecomposition therefore stays in the primal, and the derivatives solve the differentiated
equations. They call the same functions again, so every order exists. A guarded scalar replaces its
argument before the singular operation: a `where` around the result alone gives NaN gradients.

Reference: Higham, Functions of Matrices (2008), section 3.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from esljax._checks import door
from esljax._types import Array, ArrayLike, Float, Scalar

# --- Scalars and products -------------------------------------------------------------------------


def product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return a b at the highest precision.

    One bfloat16 pass of an accelerator is off by tens of percent on the distance of matched pairs.
    """
    return jnp.matmul(a, b, precision="highest")


def safe_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return √x for x that is nonnegative but for rounding: 0 where x ≤ 0, NaN where x is NaN.

    **Differentiation:** forward and reverse; the slope at 0, which is infinite, is taken as 0.
    """
    vanishes = x <= 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def safe_divide(x: Float[ArrayLike, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x/y, and 0 where y ≤ 0; NaN where y is NaN.

    **Differentiation:** forward and reverse; the slope where y ≤ 0 is 0.
    """
    vanishes = y <= 0
    return jnp.where(vanishes, 0, x / jnp.where(vanishes, 1, y))


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the power of two at or below |x|, which divides without rounding; 1 where x is 0."""
    _, exponent = jnp.frexp(jnp.where(x != 0, x, 1))
    return jnp.ldexp(jnp.ones_like(x), exponent - 1)


def moderating_unit(largest: Scalar, most: float) -> Scalar:
    """Return the power of two that brings the largest of some numbers between 1 and `most`.

    1 where it is there: then no small number among them is divided down to 0.
    """
    power = power_of_two(largest)
    return jnp.where(power < 1, power, jnp.maximum(power / most, 1))


def debiased_variance(
    value: Float[Array, "*runs"], variance: Float[Array, "*runs"], bias: Float[Array, "*runs"]
) -> Float[Array, "*runs"]:
    """Return the variance of a square μ² without its bias, from that of the square with it.

        variance · (μ² + b/2)/(μ² + b)

    The variance of a square is in proportion to the square itself, `value` + `bias`, however small
    that came out; without its bias it is in proportion to the truth and half the bias. Where there
    is no bias nothing is taken off.

    **Args:** `value`: the square without its bias, which may come out below 0. `variance`: of the
    square with it. `bias`: what was taken off; below 0 it is noise, and counts as none.
    """
    bias = jnp.maximum(bias, 0)
    # Below a tenth of the bias a square shows the noise of its own groups.
    rate = safe_divide(variance, jnp.maximum(value + bias, bias / 10))
    return jnp.where(bias > 0, rate * (jnp.maximum(value, 0) + bias / 2), variance)


# --- Functions of matrices ------------------------------------------------------------------------


@jax.custom_jvp
def sqrtm(a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Return the symmetric square root of a symmetric positive semidefinite matrix.

    Negative eigenvalues, which are rounding, count as 0.

    **Differentiation:** forward and reverse, of every order. Along directions in which the root has
    no derivative (out of the null space) the derivative is 0.
    """
    values, vectors = jnp.linalg.eigh(a)
    return product(vectors * safe_root(values), vectors.T)


@sqrtm.defjvp
@door
def _(primals, tangents):
    root = sqrtm(*primals)
    return root, lyapunov(root, *tangents)


def lyapunov(c: Float[Array, "d d"], b: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Return the L with L c + c L = b, for symmetric positive semidefinite c and one or several b.

    L is 0 between eigenvectors whose eigenvalues add to 0 up to rounding.

    **Differentiation:** forward and reverse, of every order.
    """

    def solve(_, b):
        values, vectors = jnp.linalg.eigh(c)
        sums = jnp.maximum(values[:, None], 0) + jnp.maximum(values, 0)
        solvable = sums > values.size * jnp.finfo(values.dtype).eps * sums.max()
        inside = product(product(vectors.T, b), vectors)
        solved = safe_divide(inside, jnp.where(solvable, sums, 0))
        return product(product(vectors, solved), vectors.T)

    # A linear solve is a primitive that differentiates and transposes itself by its equation. A
    # custom_jvp would be inlined, down to the eigenvectors, when the derivative of a derivative
    # linearizes it.
    return jax.lax.custom_linear_solve(
        lambda x: product(x, c) + product(c, x), b, solve, symmetric=True
    )


def exponential(a: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Return e^a for matrices of norm up to 2: the Taylor series of a/4, squared twice.

    Matrix products only: `jax.scipy.linalg.expm` is four times as slow on stacks of small matrices,
    and two of its batched LU factorizations in one program wait for each other forever on a machine
    of two cores (jax 0.10.2). The norm of a/4 is at most 1/2, so the terms after the fourteenth add
    less than 1e-16.

    **Differentiation:** forward and reverse, of every order.
    """
    scaled, identity = a / 4, jnp.eye(a.shape[-1], dtype=a.dtype)
    result = identity + scaled / 14
    for j in range(13, 0, -1):
        result = identity + product(scaled, result) / j
    for _ in range(2):
        result = product(result, result)
    return result


# --- Moments of an ensemble -----------------------------------------------------------------------


def average(x: Float[Array, "n *rest"]) -> Float[Array, " *rest"]:
    """Return the mean over the first axis, computed relative to the first member.

    Members that all agree then have exactly zero width; a width that is mere rounding would pass
    for one and be divided by.
    """
    return x[0] + jnp.mean(x - x[0], axis=0)


def shrunk_covariance(x: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """Return the sample covariance (1/n), shrunk towards a multiple of the identity.

    The weight is that of the oracle-approximating rule. The result is positive definite unless all
    members agree.

    **Differentiation:** forward and reverse, of every order.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance
    estimation", IEEE TSP 58, 5016 (2010).
    """
    n, d = x.shape
    centered = x - average(x)
    covariance = product(centered.T, centered) / n
    if d == 1:
        return covariance
    trace, square = jnp.trace(covariance), jnp.sum(covariance**2)
    spread = square - trace**2 / d
    excess = ((1 - 2 / d) * square + trace**2) / (n + 1 - 2 / d)
    weight = jnp.where(excess < spread, safe_divide(excess, spread), 1.0)
    return (1 - weight) * covariance + weight * trace / d * jnp.eye(d, dtype=x.dtype)


def whitening(x: Float[Array, "n d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Return the mean m of an ensemble and a W such that W(θ - m) has covariance 1.

    The covariance is 1 up to the shrinkage; directions without width stay narrow.

    **Differentiation:** forward and reverse, of every order.
    """
    d = x.shape[1]
    covariance = shrunk_covariance(x)
    size = jnp.trace(covariance) / d
    wide = size > 0
    size = jnp.where(wide, size, 1)
    identity = jnp.eye(d, dtype=x.dtype)
    # Members that all agree have no covariance to factorize, nor a derivative of its factor.
    relative = jnp.where(wide, covariance / size, identity)
    root = jnp.linalg.cholesky(relative + 4 * d * jnp.finfo(x.dtype).eps * identity)
    return average(x), solve_triangular(root, identity, lower=True) / jnp.sqrt(size)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive integer, in their order, by trial up to its root."""
    low = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    high = [number // i for i in reversed(low) if i * i != number]
    return low + high
