"""Systems whose laws are known at every time, members of these laws, and their exact numbers.

In a trap of stiffness k about 0, members of a Gaussian mixture stay one: in a time t every mean is
multiplied by the decay e^(-∫k dt), and so are the differences of a member from its mean, to which
Gaussian noise is added. Members are drawn by these transitions, from snapshot to snapshot, so that
no step has a length and no number an error of it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import esljax as esl

TIMES = (0.3, 1.0, 3.0, 10.0)
"""The learning times U at which every system is measured."""
_NODES, _TIMES = 40, 400


class Stiffness(esl.AbstractSchedule):
    """The stiffness whose trap of temperature 1 widens at constant speed from 1 to its final width.

    The drive of least work in the time `duration` (Schmiedl and Seifert, PRL 98, 108301 (2007)):
    the path is a geodesic at constant speed, so Σ = L² = W2².
    """

    duration: Any

    def width(self, s: Any) -> Any:
        return 1 + self.speed * self.duration * s

    @property
    def speed(self) -> Any:
        t = self.duration
        return ((1 / t + (1 / t**2 + 2 + 2 / t) ** 0.5) / (2 + 2 / t) - 1) / t

    def __call__(self, s):
        return (1 - self.width(s) * self.speed) / self.width(s) ** 2


@dataclasses.dataclass(frozen=True)
class System:
    """Members from a mixture of Gaussians N(means_i, variance I), in a trap about 0."""

    temperature: float
    means: np.ndarray
    weights: np.ndarray
    variance: float
    stiffening: bool = False

    @property
    def d(self) -> int:
        return self.means.shape[1]

    def potential(self, duration: Any) -> esl.AbstractPotential:
        if not self.stiffening:
            return esl.Quadratic(1.0)
        return esl.Driven(esl.Quadratic, Stiffness(duration))

    def start(self, key: Any, n: int) -> Any:
        which, noise = jax.random.split(key)
        component = jax.random.choice(
            which, len(self.weights), (n,), p=jnp.asarray(self.weights, jnp.float32)
        )
        spread = jax.random.normal(noise, (n, self.d)) * self.variance**0.5
        return jnp.asarray(self.means, jnp.float32)[component] + spread

    def stiffness(self, duration: float, s: np.ndarray) -> np.ndarray:
        return Stiffness(duration)(s) if self.stiffening else np.ones_like(s)

    def laws(self, duration: float, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far the means have shrunk at each of the times s, and the variance of a component."""
        if self.stiffening:
            trap = Stiffness(duration)
            width = trap.width(s)
            # ∫k dt by the width: its rate of change is -k width + T/width.
            return width * np.exp(-s * duration / width), width**2
        rest, shrunk = self.temperature, np.exp(-duration * s)
        return shrunk, rest + (self.variance - rest) * shrunk**2

    def transitions(self, duration: float, links: int) -> tuple[np.ndarray, np.ndarray]:
        """The decay along each link, and the deviation of the noise that it adds."""
        shrunk, variance = self.laws(duration, np.linspace(0, 1, links + 1))
        decay = shrunk[1:] / shrunk[:-1]
        return decay, np.sqrt(variance[1:] - decay**2 * variance[:-1])

    def run(self, duration: Any, transitions: Any, n: int, key: Any) -> esl.Trajectory:
        """n members at J + 1 even times, as overdamped Langevin dynamics moves them."""
        decay, noise = transitions
        start_key, *keys = jax.random.split(key, len(decay) + 1)
        positions = [self.start(start_key, n)]
        for a, b, link in zip(decay, noise, keys, strict=True):
            kicks = jax.random.normal(link, (n, self.d))
            positions.append(a * positions[-1] + b * kicks)
        rates = jnp.full(len(keys), duration / len(keys))
        return esl.Trajectory(
            times=jnp.linspace(0, 1, len(positions)),
            positions=jnp.stack(positions),
            energies=None,
            rates=rates,
            temperatures=jnp.full_like(rates, self.temperature),
            final=positions[-1],
            observed=False,
        )

    def moments(self, shrunk: float, variance: float) -> tuple[np.ndarray, np.ndarray]:
        mean = self.weights @ self.means
        apart = self.means - mean
        between = (apart.T * self.weights) @ apart
        return shrunk * mean, shrunk**2 * between + variance * np.eye(self.d)


def _trap(temperature: float, mean: np.ndarray, stiffening: bool = False) -> System:
    return System(temperature, mean[None], np.ones(1), 1.0, stiffening)


SYSTEMS: dict[str, System] = {
    "trap": _trap(1.0, np.zeros(1), stiffening=True),
    "ou1": _trap(0.1, 2 * np.eye(1)[0]),
    "ou5": _trap(0.1, 2 * np.eye(5)[0]),
    # Three hills, their centers two to three standard deviations apart, off the middle of the trap.
    "mixture": System(
        0.5,
        np.array([[1.5, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.5, 1.0]]),
        np.array([0.5, 0.3, 0.2]),
        0.25,
    ),
}
"""`trap` stiffens, in one dimension; `ou1` and `ou5` are Ornstein-Uhlenbeck processes in one and
five; `mixture` relaxes in three."""


def bures(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """W2² of Gaussians with these means and covariances."""
    (m, a), (o, b) = one, other
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values)) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(np.sum((m - o) ** 2) + np.trace(a) + np.trace(b) - 2 * crossed)


def _affine(system: System, k: float, shrunk: float, variance: float) -> float:
    """E‖w‖² of the best affine field, which is the velocity of the Gaussian of the same moments."""
    mean, covariance = system.moments(shrunk, variance)
    slope = -k * np.eye(system.d) + system.temperature * np.linalg.inv(covariance)
    return float(np.sum((k * mean) ** 2) + np.trace(slope @ covariance @ slope))


def _exact(system: System, k: float, shrunk: float, variance: float) -> float:
    """E‖v‖² of v = -k θ - T ∇log q, by the quadrature of Gauss and Hermite about each component."""
    x, w = np.polynomial.hermite_e.hermegauss(_NODES)
    # The law is Gaussian, and independent, along directions in which all means agree.
    means = shrunk * system.means
    along = np.ptp(means, axis=0) > 0
    d = int(along.sum())
    grid = np.stack([g.ravel() for g in np.meshgrid(*[x] * d)], axis=-1)
    mass = np.prod(np.meshgrid(*[w / w.sum()] * d), axis=0).ravel()
    total = 0.0
    for center, weight in zip(means[:, along], system.weights, strict=True):
        at = center + np.sqrt(variance) * grid
        apart = means[None, :, along] - at[:, None]
        logits = np.log(system.weights) - np.sum(apart**2, axis=2) / (2 * variance)
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        score = np.einsum("ac,acd->ad", share, apart) / variance
        total += weight * mass @ np.sum((-k * at - system.temperature * score) ** 2, axis=1)
    offset = means[0, ~along]
    alone = (k - system.temperature / variance) ** 2 * variance
    return total + float(np.sum((k * offset) ** 2) + alone * (~along).sum())


def _simpson(y: np.ndarray) -> float:
    weights = np.full(len(y), 2 / 3)
    weights[1::2], weights[[0, -1]] = 4 / 3, 1 / 3
    return float(weights @ y / (len(y) - 1))


def relaxation(d: int) -> System:
    """The Ornstein-Uhlenbeck process of `ou1` and `ou5` in d dimensions."""
    return _trap(0.1, 2 * np.eye(d)[0])


def truth(name: str | System, duration: float, links: int, kind: str) -> dict[str, float]:
    """The numbers that an estimator should give on the average.

    **Args:** `name`: of `SYSTEMS`, or a system. `kind`: "affine" for the best affine field, "field"
    for the velocity itself, "chain" for the chain of `links` links between the laws. W2² is that of
    the moments.
    """
    system = name if isinstance(name, System) else SYSTEMS[name]
    s = np.linspace(0, 1, _TIMES + 1)
    k, (shrunk, variance) = system.stiffness(duration, s), system.laws(duration, s)
    moments = [system.moments(*law) for law in zip(shrunk, variance, strict=True)]
    distance = bures(moments[0], moments[-1])
    rate: Callable[..., float] = _exact if kind == "field" and len(system.weights) > 1 else _affine
    squares = np.array([rate(system, *at) for at in zip(k, shrunk, variance, strict=True)])
    sigma, length = duration**2 * _simpson(squares), duration * _simpson(np.sqrt(squares))
    # Also of a chain: its interval of the gap reaches to what its spacing hides.
    gap = sigma - distance
    if kind == "chain":
        pairs = itertools.pairwise(moments[:: _TIMES // links])
        apart = np.array([bures(*pair) for pair in pairs])
        sigma, length = float(links * apart.sum()), float(np.sqrt(apart).sum())
    numbers = {
        "entropy_production": sigma,
        "w2_squared": distance,
        "gap": gap,
        "length_squared": length**2,
        "temporal": sigma - length**2,
        "geometric": length**2 - distance,
    }
    # A difference of equal numbers is 0.
    return {number: round(value, 12) for number, value in numbers.items()}


def members_of(law: esl.gaussian.Law, n: int, key: Any) -> Any:
    """n independent members of a Gaussian law, shape (n, d)."""
    values, vectors = np.linalg.eigh(np.asarray(law.covariance, float))
    root = jnp.asarray(vectors * np.sqrt(np.maximum(values, 0)), jnp.float32)
    return law.mean + jax.random.normal(key, (n, law.mean.size)) @ root.T


def over_keys(
    one: Callable[[Any], dict[str, Any]], seed: Sequence[int], keys: int
) -> dict[str, list[float]]:
    """The numbers of `one(key)` for every key, one run after the other in one program.

    **Args:** `seed`: whole numbers that make the first key; runs with the same are paired.
    """
    key = functools.reduce(jax.random.fold_in, seed, jax.random.key(20))
    rows = eqx.filter_jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, keys))
    return {name: np.asarray(values, float).tolist() for name, values in rows.items()}
