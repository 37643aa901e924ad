"""Systems whose laws are known: a potential, a rule, a start and the numbers that must come out."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

import esljax as esl
from esljax.gaussian import Law


@dataclass(frozen=True)
class LinearSystem:
    """Linear drift from a Gaussian start: the law stays Gaussian."""

    potential: esl.Quadratic
    rule: esl.Langevin
    law: Law
    steps: int
    entropy_production: float
    length_squared: float
    w2_squared: float
    dissipation: float
    learning_time: float

    def sample(self, members: int, key: Any) -> jax.Array:
        root = jnp.linalg.cholesky(self.law.covariance)
        return (
            self.law.mean
            + jax.random.normal(key, (members, self.law.mean.size), self.law.mean.dtype) @ root.T
        )


def ornstein_uhlenbeck(d: int, steps: int) -> LinearSystem:
    """O1: k = 1, T = .1, from N(2e₁, I), for U = 1 at a constant rate."""
    sigma, length_squared, distance = (
        oracles.O1[d] if d in oracles.O1 else oracles.ornstein_uhlenbeck(1.0, 0.1, 1.0, 2.0, d, 1.0)
    )
    rule = esl.Langevin(esl.Constant(1 / steps), 0.1)
    return LinearSystem(
        esl.Quadratic(1.0), rule, _start(d), steps, sigma, length_squared, distance, sigma, 1.0
    )


def cosine_decay(d: int, steps: int) -> LinearSystem:
    """O3: the same for U = 2, on a cosine."""
    dissipation, length_squared, distance = oracles.O3_PATH[d]
    rule = esl.Langevin(esl.Cosine(4 / steps), 0.1)
    sigma = oracles.O3_ENTROPY_PRODUCTION[d]["2(1+cos πs)"]
    return LinearSystem(
        esl.Quadratic(1.0),
        rule,
        _start(d),
        steps,
        sigma,
        length_squared,
        distance,
        dissipation,
        2.0,
    )


def non_symmetric(steps: int) -> LinearSystem:
    """A drift with circulation, K ≠ Kᵀ, from an anisotropic start for U = 1."""
    stiffness, center = np.array([[1.0, 2.0], [-1.5, 0.7]]), np.array([0.5, -1.0])
    law = Law(np.array([2.0, 1.0]), np.array([[1.0, 0.3], [0.3, 0.5]]))
    truth = oracles.linear_drift(
        np.asarray(law.mean),
        np.asarray(law.covariance),
        stiffness,
        center,
        lambda s: 1.0,
        lambda s: 0.2,
    )
    rule = esl.Langevin(esl.Constant(1 / steps), 0.2)
    return LinearSystem(
        esl.Quadratic(stiffness, center),
        rule,
        law,
        steps,
        truth.entropy_production,
        truth.length_squared,
        truth.w2_squared,
        truth.dissipation,
        truth.learning_time,
    )


@dataclass(frozen=True)
class Translation:
    """Gradient descent of a point in Φ = k θ²/2.

    `optimal_rates` spend the least Σ on shrinking it to the fraction `remaining`.
    """

    k: float = 1.5
    start: float = 3.0
    remaining: float = 0.2
    steps: int = 16

    @property
    def potential(self) -> esl.Quadratic:
        return esl.Quadratic(self.k)

    @property
    def optimal_rates(self) -> np.ndarray:
        return oracles.optimal_discrete_rates(self.k, self.remaining, self.steps)

    @property
    def w2_squared(self) -> float:
        return (self.start * (1 - self.remaining)) ** 2


@dataclass(frozen=True)
class Wells:
    """Members on a line that fall into two wells without noise.

    Their order on the line never changes, so the flow is the transport.
    """

    barrier: float = 0.5
    width: float = 1.5
    time: float = 0.6

    @property
    def potential(self) -> esl.DoubleWell:
        return esl.DoubleWell(self.barrier, self.width)

    def start(self, members: int) -> np.ndarray:
        return np.linspace(-2.9, 2.3, members)[:, None]

    def path(self, members: int, times: np.ndarray) -> np.ndarray:
        """Positions (J+1, n, 1) of the gradient flow at constant mobility."""
        return oracles.double_well_flow(
            self.start(members),
            self.barrier,
            self.width,
            self.time * np.asarray(times)[:, None, None],
        )


def _start(d: int) -> Law:
    return Law(2.0 * np.eye(d)[0], np.eye(d))
