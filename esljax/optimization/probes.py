"""What a search learns about its own noise: gradients and numbers of two keys at the same controls.

Two gradients g₁, g₂ of independent noises at the same controls tell signal from noise: E g₁·g₂ is
the square of the mean gradient, E ‖g₁ - g₂‖²/2 the variance of one gradient, and their agreement

    g₁·g₂ / ½(‖g₁‖² + ‖g₂‖²)

goes from 1, all signal, to 0, all noise. It is their cosine if they are equally long, and less if
not: gradients that explode all point along the control that moves the run first, at random sizes,
and their cosine is 1 or -1.
"""

from typing import NamedTuple

import numpy as np

from esljax._types import Float

# Below this agreement the variance of one gradient exceeds twice the square of its mean.
AGREE = 1 / 3
# One iteration's noise of a residual pulls by at most this share of the largest useful multiplier.
# On a quadratic under a constraint with residuals that scatter by .05 to 3, .2 brought the
# multiplier within a few tens of percent in 40 iterations where .5 still lost it in the noise.
_PULL_OF_NOISE = 0.2


class Probes(NamedTuple):
    """Two independent noises at the same controls, at the start and at the end of each round."""

    still: Float[np.ndarray, " p"]
    """1 for each entry of the controls whose gradients are exactly 0 at the start, else 0."""
    agreement: Float[np.ndarray, " judgments"]
    """Of the two gradients; NaN where both are 0 or they were not taken."""
    signal: Float[np.ndarray, " judgments"]
    """The mean gradient's norm, √max(0, g₁·g₂); NaN where it was not taken."""
    noise: Float[np.ndarray, " judgments"]
    """Standard deviation of one gradient, ‖g₁ - g₂‖/√2; NaN where it was not taken."""
    reference: Float[np.ndarray, " c"]
    """The largest useful multiplier of each residual: ‖∇f‖/‖∇r‖ at the start, at least 1."""
    squares: Float[np.ndarray, " 1+c"]
    """Squared deviations of the value and the residuals over keys at the same controls, summed."""
    freedom: Float[np.ndarray, "1"]
    """Degrees of freedom of `squares`."""

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation over keys of the value, then of each residual; shape (1+c,)."""
        return np.sqrt(self.squares / np.maximum(self.freedom, 1))

    def penalty(self, most: float) -> np.ndarray:
        """μ of each residual (c,): `most`, or less where the noise of the residual would drive λ.

        A residual that scatters by σ pulls by max(0, λ + μσξ), whose mean is not 0 even where the
        constraint is slack. With μ = 10, σ = 1 and an objective of 1, this noise pushed a slack
        constraint off by σ and left multipliers of 3 to 12 times the objective.
        """
        noise = self.spread[1:]
        bound = _PULL_OF_NOISE * self.reference
        return np.where(noise * most > bound, bound / np.where(noise > 0, noise, 1), most)

    def with_draws(self, draws: np.ndarray) -> "Probes":
        """These, with the numbers of a few keys at the same controls; shape (keys, 1+c)."""
        squares = np.sum((draws - np.mean(draws, axis=0)) ** 2, axis=0)
        return self._replace(
            squares=self.squares + squares, freedom=self.freedom + (len(draws) - 1)
        )

    def with_gradients(self, place: int, one: np.ndarray, other: np.ndarray) -> "Probes":
        """These, with two gradients (p,) taken at the end of a round, or at the start (0)."""
        agreement, signal, noise = compared(one, other)
        return self._replace(
            agreement=_put(self.agreement, place, agreement),
            signal=_put(self.signal, place, signal),
            noise=_put(self.noise, place, noise),
        )


def no_probes(entries: int, residuals: int, rounds: int) -> Probes:
    """Nothing known yet, in the shapes of all that will be."""
    untaken = np.full(rounds + 1, np.nan)
    return Probes(
        still=np.zeros(entries),
        agreement=untaken,
        signal=untaken,
        noise=untaken,
        reference=np.ones(residuals),
        squares=np.zeros(1 + residuals),
        freedom=np.zeros(1),
    )


def compared(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Agreement (NaN if both are 0), signal and noise of two gradients (p,)."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        size = max(float(np.max(np.abs(one))), float(np.max(np.abs(other))))
        # Squares of gradients beyond 1e154 overflow.
        one, other = (one / size, other / size) if size > 0 else (one, other)
        product = float(one @ other)
        squares = float(one @ one + other @ other)
        agreement = 2 * product / squares if squares > 0 else np.nan
        noise = np.linalg.norm(one - other) / np.sqrt(2)
        return agreement, size * float(np.sqrt(max(product, 0.0))), size * float(noise)


def _put(numbers: np.ndarray, place: int, number: float) -> np.ndarray:
    return np.concatenate([numbers[:place], [number], numbers[place + 1 :]])
