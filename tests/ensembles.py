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


def clouds(n, m, d=3, dtype=np.float32, seed=0):
    """Return clouds (n, d) and (m, d) of unequal widths that lie apart."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 1.5 + 0.7
    return x.astype(dtype), y.astype(dtype)


def weigh(x):
    """Return the sum of x with weights that share no symmetry."""
    return jnp.sum(jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x)
