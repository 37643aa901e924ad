r"""The Gaussian density with the moments of the members.

log q̂(θ) = -½ ‖y‖² - ½ d log 2π - log|L|,    ∇log q̂(θ) = -L⁻ᵀ y,    y = L⁻¹(θ - θ̄)
"""

import math
from typing import Any, ClassVar

import jax.numpy as jnp

from esljax._checks import door
from esljax._types import Array, Float, Scalar
from esljax.density.base import AbstractDensity, AbstractLogDensity, Frame


class GaussianDensity(AbstractDensity):
    """The Gaussian with the mean and the covariance of the members.

    Correlations are shrunk by the oracle-approximating rule, which allows n < d.

    **Differentiation:** forward and reverse, of every order, in the members and in x.
    **Reference:** Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance
    estimation", IEEE TSP 58, 5016 (2010).

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> law = esl.density.GaussianDensity().fit(jnp.array([[-1.0], [-1.0], [1.0], [1.0]]))
        >>> round(float(law.score(jnp.array([2.0]))[0]), 4)  # mean 0, variance 1
        -2.0
    """

    note: ClassVar[str] = "Gaussian, correlations shrunk by the oracle-approximating rule"

    def init(self, positions: Float[Array, "n d"]) -> None:
        return None

    def estimate(
        self, positions: Float[Array, "n d"], state: Any
    ) -> tuple[AbstractLogDensity, Any]:
        return _Gaussian(Frame.of(positions)), state


class _Gaussian(AbstractLogDensity):
    frame: Frame

    @door
    def log_density(self, x: Float[Array, " d"]) -> Scalar:
        y = self.frame.into(x)
        return -(jnp.sum(y**2) + len(y) * math.log(2 * math.pi)) / 2 - self.frame.log_volume

    @door
    def score(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.frame.gradient(-self.frame.into(x))
