"""Clouds and settings that the tests of several rooms share."""

import jax.numpy as jnp
import numpy as np

import esljax as esl

# Every way to differentiate a run.
MODES = [
    esl.HessianAdjoint(),
    esl.HessianAdjoint(recompute=True),
    esl.Autodiff(),
    esl.Autodiff(recompute=True),
    esl.ForwardMode(),
]


def skewed(n, d=2, seed=0, dtype=np.float32):
    """Return (n, d) members of a law that is correlated, of unequal widths and skewed in x₁.

    So signs and axes matter.
    """
    rng = np.random.default_rng(seed)
    mix = np.eye(d) + 0.5 * np.tri(d, k=-1)
    return jnp.asarray(
        np.column_stack([rng.gamma(4.0, size=n), *(rng.normal(size=(d - 1, n)) * 3.0)]) @ mix.T,
        dtype,
    )


def exact_thirds(n, mean, covariance, dtype=np.float32):
    """Return (n, d) normal members, of which every third has exactly these moments.

    So have the other two thirds. The covariance is that of 1/n.
    """
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    for third in (slice(i, None, 3) for i in range(3)):
        centered = x[third] - x[third].mean(axis=0)
        root = np.linalg.cholesky(centered.T @ centered / len(centered))
        x[third] = np.linalg.solve(root, centered.T).T
    return (x @ np.linalg.cholesky(np.asarray(covariance)).T + mean).astype(dtype)


def clouds(n, m, d=3, dtype=np.float32, seed=0):
    """Return clouds (n, d) and (m, d) of unequal widths that lie apart."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 1.5 + 0.7
    return x.astype(dtype), y.astype(dtype)


def weigh(x):
    """Return the sum of x with weights that share no symmetry."""
    return jnp.sum(jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x)
