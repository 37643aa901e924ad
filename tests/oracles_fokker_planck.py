"""The law of one-dimensional diffusion in a fixed potential, by finite volumes.

NumPy and SciPy only, never an import of the package. Scharfetter-Gummel fluxes between cells make
the exact equilibrium stationary; backward differences integrate the linear system that they give.
The error is of the order of the squared width of a cell.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad, simpson, solve_ivp
from scipy.sparse import diags
from scipy.special import ndtri
from scipy.stats import norm


@dataclass(frozen=True)
class Diffusion:
    """dθ = -Φ'(θ) dt + sqrt(2T) dW on `cells` between walls at `low` and `high`, from `density`."""

    energy: object
    temperature: float
    density: object
    low: float = -6.0
    high: float = 6.0
    cells: int = 1600

    @property
    def width(self):
        return (self.high - self.low) / self.cells

    @property
    def centers(self):
        return self.low + self.width * (np.arange(self.cells) + 0.5)

    def laws(self, times):
        """Return probabilities (times, cells) and velocities between cells (times, cells - 1)."""
        # Flux from i to i+1: T/h² (B(Δ) p_i - B(-Δ) p_{i+1}) with Bernoulli's B(x) = x/(eˣ - 1) and
        # Δ the step of Φ/T.
        rises = np.diff(self.energy(self.centers)) / self.temperature
        rate = self.temperature / self.width**2
        up, down = rate * bernoulli(rises), rate * bernoulli(-rises)
        diagonal = -np.concatenate([up, [0]]) - np.concatenate([[0], down])
        generator = diags([up, diagonal, down], [-1, 0, 1], format="csc")
        start = self.density(self.centers)
        start = start / start.sum()
        times = np.asarray(times, float)
        # SciPy's BDF leaves its table of differences uninitialized, and may read NaN in rows that
        # it has yet to write.
        with np.errstate(invalid="ignore"):
            solved = solve_ivp(
                lambda t, p: generator @ p,
                (0, times[-1]),
                start,
                "BDF",
                times,
                jac=generator,
                rtol=1e-8,
                atol=1e-14,
            )
        laws = solved.y.T
        if not np.all(np.isfinite(laws)):
            raise ArithmeticError("the oracle's integration failed")
        fluxes = up * laws[:, :-1] - down * laws[:, 1:]
        between = (laws[:, :-1] + laws[:, 1:]) / 2
        occupied = between > 1e-10
        return laws, np.where(occupied, fluxes * self.width / np.where(occupied, between, 1), 0)

    def rate(self, times):
        """E‖v‖² at these times; on a line this is also the squared metric speed of W2."""
        laws, velocities = self.laws(times)
        return np.sum(velocities**2 * (laws[:, :-1] + laws[:, 1:]) / 2, axis=1)

    def path(self, clock, points=201):
        """Return (D, L², W2²) of the path up to learning time `clock`.

        At a constant learning rate in unit training time Σ = D · clock.
        """
        # Evenly spaced in √t: the law moves fastest at first.
        roots = np.linspace(0, np.sqrt(clock), points)
        rate = self.rate(roots**2)
        dissipation = simpson(rate * 2 * roots, x=roots)
        length = simpson(np.sqrt(rate) * 2 * roots, x=roots)
        return dissipation, length**2, self.w2_squared(clock)

    def w2_squared(self, clock):
        """From the quantile functions, by the midpoint rule in the level."""
        laws, _ = self.laws([0.0, clock])
        edges = self.low + self.width * np.arange(self.cells + 1)
        ranks = [
            np.concatenate([[0], np.cumsum(np.maximum(law, 0))]) / np.sum(np.maximum(law, 0))
            for law in laws
        ]
        levels = (np.arange(200_000) + 0.5) / 200_000
        first, last = (np.interp(levels, *_increasing(rank, edges)) for rank in ranks)
        return float(np.mean((first - last) ** 2))


@dataclass(frozen=True)
class FallingCloud:
    """A cloud on top of the double well Φ = b((θ/w)² - 1)² that falls into both wells.

    It starts off center, so that the wells do not share it evenly.
    """

    barrier: float = 2.0
    width: float = 2.0
    temperature: float = 0.3
    clock: float = 1.5
    mean: float = 0.3
    deviation: float = 0.5

    def numbers(self):
        """(Σ, L², W2²) at a constant learning rate in unit training time."""

        def energy(x):
            return self.barrier * ((x / self.width) ** 2 - 1) ** 2

        law = Diffusion(energy, self.temperature, normal_density(self.mean, self.deviation), -6, 6)
        dissipation, length_squared, distance = law.path(self.clock)
        return self.clock * dissipation, length_squared, distance

    def start(self, members):
        """Evenly spread over the law, in random order: the start adds no noise of its own."""
        ranks = np.random.default_rng(0).permutation(members)
        return np.float32(self.mean + self.deviation * ndtri((ranks + 0.5) / members)[:, None])


def _increasing(ranks, edges):
    kept = np.concatenate([[True], np.diff(ranks) > 0])
    return ranks[kept], edges[kept]


def bernoulli(x):
    """x/(eˣ - 1)."""
    small = np.abs(x) < 1e-8
    return np.where(small, 1 - x / 2, x / np.expm1(np.where(small, 1, x)))


def normal_density(mean, deviation):
    return lambda x: norm.pdf(x, mean, deviation)


def mixture_rate(means, deviation, temperature):
    """E‖v‖² = T² E‖∇log q‖² of free diffusion from an even mixture of normals, by quadrature."""

    def parts(x):
        return norm.pdf(x, means, deviation)

    def integrand(x):
        slope = np.sum(parts(x) * (np.asarray(means) - x)) / deviation**2 / np.sum(parts(x))
        return np.mean(parts(x)) * slope**2

    reach = np.max(np.abs(means)) + 9 * deviation
    return temperature**2 * quad(integrand, -reach, reach, epsabs=0, epsrel=1e-10, limit=400)[0]
