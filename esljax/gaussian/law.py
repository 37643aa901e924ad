r"""Gaussian laws: any covariance, or independent coordinates."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from esljax._checks import as_float, check_finite, check_nonnegative, known, refuse
from esljax._types import Array, Float


class Law(eqx.Module):
    """The Gaussian law N(mean, covariance).

    **Args:** `mean`: shape (d,), in units of θ. `covariance`: shape (d, d), symmetric positive
    semidefinite; zero is a point mass.
    **Raises:** `InputError` for wrong shapes and, where the values are known, for a matrix that is
    no covariance.

    **Example:**

        >>> import esljax as esl
        >>> esl.gaussian.Law([2.0, 0.0], [[1.0, 0.3], [0.3, 0.5]]).mean.shape
        (2,)
    """

    mean: Float[Array, " d"]
    """m, shape (d,), in units of θ; of several laws, such as those of `laws`, (J, d)."""
    covariance: Float[Array, "d d"]
    """C, shape (d, d), in units of θ²; of several laws (J, d, d)."""

    def __init__(self, mean: Any, covariance: Any):
        mean, covariance = as_float(mean), as_float(covariance)
        if mean.ndim != 1 or mean.size < 1:
            raise refuse("mean", "have shape (d,)", f"has shape {mean.shape}")
        if covariance.shape != 2 * mean.shape:
            raise refuse(
                "covariance",
                f"have shape {2 * mean.shape}, as the mean has {mean.size} entries",
                f"has shape {covariance.shape}",
            )
        check_finite("mean", mean)
        check_finite("covariance", covariance)
        if known(covariance):
            matrix = np.asarray(covariance)
            rounding = np.sqrt(np.finfo(matrix.dtype).eps) * np.abs(matrix).max()
            if np.abs(matrix - matrix.T).max() > rounding:
                raise refuse(
                    "covariance",
                    "be symmetric",
                    f"differs from its transpose by {np.abs(matrix - matrix.T).max():g}",
                )
            if np.linalg.eigvalsh(matrix).min() < -rounding:
                raise refuse(
                    "covariance",
                    "be positive semidefinite",
                    f"has the eigenvalue {np.linalg.eigvalsh(matrix).min():g}",
                )
        dtype = jnp.result_type(mean, covariance)
        self.mean, self.covariance = mean.astype(dtype), covariance.astype(dtype)


class Independent(eqx.Module):
    """The Gaussian law of independent coordinates, N(mean, diag(variance)).

    The discrete law of `descent` then costs d numbers a step and not d². Every function of this
    room that takes a `Law` takes it.

    **Args:** `mean`: shape (d,), in units of θ. `variance`: a number or shape (d,), at least 0, in
    units of θ².
    **Raises:** `InputError` for wrong shapes and, where the values are known, for a variance that
    is negative or not finite.

    **Example:**

        >>> import esljax as esl
        >>> print(esl.gaussian.Independent([2.0, 0.0], 0.5).covariance)
        [[0.5 0. ]
         [0.  0.5]]
    """

    mean: Float[Array, "*steps d"]
    """m, shape (d,), in units of θ; of the laws of several steps (J, d)."""
    variance: Float[Array, "*steps d"]
    """The diagonal of C, shape (d,), in units of θ²; of the laws of several steps (J, d)."""

    def __init__(self, mean: Any, variance: Any):
        mean, variance = as_float(mean), as_float(variance)
        if mean.ndim != 1 or mean.size < 1:
            raise refuse("mean", "have shape (d,)", f"has shape {mean.shape}")
        if variance.shape not in ((), mean.shape):
            must = f"be a number or have shape {mean.shape}, as the mean has {mean.size} entries"
            raise refuse("variance", must, f"has shape {variance.shape}")
        check_finite("mean", mean)
        check_finite("variance", variance)
        check_nonnegative("variance", variance)
        dtype = jnp.result_type(mean, variance)
        self.mean = mean.astype(dtype)
        self.variance = jnp.broadcast_to(variance, mean.shape).astype(dtype)

    @property
    def covariance(self) -> Float[Array, "*steps d d"]:
        """C as a matrix, shape (d, d), in units of θ²; of the laws of several steps (J, d, d)."""
        return jnp.vectorize(jnp.diag, signature="(d)->(d,d)")(self.variance)


AnyLaw = Law | Independent
"""A Gaussian law, however its covariance is stored."""
