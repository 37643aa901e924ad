"""Distances between Gaussian laws in closed form."""

import jax.numpy as jnp

from esljax._checks import as_float, check_positive, door, refuse
from esljax._numerics import product, sqrtm
from esljax._types import Scalar, ScalarLike
from esljax.gaussian.law import AnyLaw


@door
def w2_squared(start: AnyLaw, end: AnyLaw) -> Scalar:
    r"""The squared Wasserstein distance between two Gaussian laws, in closed form.

        W2² = |m₀ - m₁|² + tr C₀ + tr C₁ - 2 tr (C₀^½ C₁ C₀^½)^½

    **Args:** `start`, `end`: laws of the same d.
    **Returns:** shape (), in units of θ². Rounding leaves an error of the size of a trace times the
    machine precision, of either sign.
    **Raises:** `InputError` if the laws differ in d.
    **Differentiation:** forward and reverse, of every order; finite at equal laws, isotropic laws
    and point masses (where one-sided infinite slopes out of the null space count as 0).
    **Reference:** Dowson and Landau, J. Multivariate Anal. 12 (1982).
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.w2_squared(start, end)), 4)
        2.0
    """
    _check_same_size(start, end)
    return distance(start, end)


@door
def entropic_transport(start: AnyLaw, end: AnyLaw, *, epsilon: ScalarLike) -> Scalar:
    r"""The entropic transport cost between two Gaussian laws, in closed form.

        OT_ε = min_P ∫|x - y|² dP + ε KL(P | q₀ ⊗ q₁)
             = |m₀ - m₁|² + tr C₀ + tr C₁ - tr D + (ε/2) (d (1 - log ε) + log det(D + ε/2))
        D = (4 C₀^½ C₁ C₀^½ + (ε/2)²)^½

    **Args:** `start`, `end`: laws of the same d. `epsilon`: ε > 0, in units of θ².
    **Returns:** shape (), in units of θ²; W2² plus an entropic bias that vanishes as ε → 0.
    **Raises:** `InputError` if the laws differ in d or ε is not positive.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Janati, Muzellec, Peyré and Cuturi, NeurIPS 2020, Theorem 1 (their 2σ² is ε).
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.entropic_transport(start, end, epsilon=0.1)), 4)
        2.2348
    """
    _check_same_size(start, end)
    epsilon = as_float(epsilon)
    check_positive("epsilon", epsilon)
    return _entropic(start, end, epsilon)


@door
def sinkhorn_divergence(start: AnyLaw, end: AnyLaw, *, epsilon: ScalarLike) -> Scalar:
    r"""The debiased entropic transport cost between two Gaussian laws, in closed form.

        S_ε(q₀, q₁) = OT_ε(q₀, q₁) - ½ OT_ε(q₀, q₀) - ½ OT_ε(q₁, q₁)

    **Args:** `start`, `end`: laws of the same d. `epsilon`: ε > 0, in units of θ².
    **Returns:** shape (), in units of θ²; nonnegative, 0 at equal laws, and W2² as ε → 0. It is no
    metric.
    **Raises:** `InputError` if the laws differ in d or ε is not positive.
    **Differentiation:** forward and reverse, of every order.
    **Reference:** Janati et al., NeurIPS 2020; Feydy et al., AISTATS 2019.
    **Example:**

        >>> import esljax as esl
        >>> start, end = esl.gaussian.Law([0.0], [[1.0]]), esl.gaussian.Law([1.0], [[4.0]])
        >>> round(float(esl.gaussian.sinkhorn_divergence(start, end, epsilon=0.1)), 4)
        1.9999
    """
    _check_same_size(start, end)
    epsilon = as_float(epsilon)
    check_positive("epsilon", epsilon)
    return (
        _entropic(start, end, epsilon)
        - (_entropic(start, start, epsilon) + _entropic(end, end, epsilon)) / 2
    )


def distance(start: AnyLaw, end: AnyLaw) -> Scalar:
    """W2² of laws that are known to have the same d."""
    root = sqrtm(start.covariance)
    cross = sqrtm(product(product(root, end.covariance), root))
    return jnp.sum((start.mean - end.mean) ** 2) + jnp.trace(
        start.covariance + end.covariance - 2 * cross
    )


def _entropic(start: AnyLaw, end: AnyLaw, epsilon: Scalar) -> Scalar:
    half, identity = epsilon / 2, jnp.eye(start.mean.size)
    root = sqrtm(start.covariance)
    spread = sqrtm(product(product(4 * root, end.covariance), root) + half**2 * identity)
    entropy = (
        start.mean.size * (1 - jnp.log(epsilon)) + jnp.linalg.slogdet(spread + half * identity)[1]
    )
    return (
        jnp.sum((start.mean - end.mean) ** 2)
        + jnp.trace(start.covariance + end.covariance - spread)
        + half * entropy
    )


def _check_same_size(start: AnyLaw, end: AnyLaw) -> None:
    if start.mean.shape != end.mean.shape:
        raise refuse(
            "end",
            f"be a law of {start.mean.size} coordinates, as `start` is",
            f"has {end.mean.size}",
        )
