"""Transport by other means: NumPy, SciPy and POT in float64. Never imports esljax."""

import numpy as np
import ot
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats


def squared_distances(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return ((x[:, None] - y) ** 2).sum(-1)


def assignment(x, y):
    cost = squared_distances(x, y)
    return cost[scipy.optimize.linear_sum_assignment(cost)].mean()


def linear_program(x, y):
    return ot.emd2([], [], squared_distances(x, y))


def one_dimensional(x, y):
    return ot.emd2_1d(np.asarray(x, np.float64), np.asarray(y, np.float64), metric="sqeuclidean")


def bures(x, y):
    """From the covariance matrices, by scipy's matrix square root: for n > d."""
    a, b, shift = _moments(x, y)
    root = scipy.linalg.sqrtm(a).real
    return shift + np.trace(a + b - 2 * scipy.linalg.sqrtm(root @ b @ root).real)


def bures_of_singular(x, y):
    """The same by eigenvalues, for singular covariances; good to the square root of rounding."""
    a, b, shift = _moments(x, y)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    return shift + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()


def bures_of_near(x, y):
    """The same, between optimally rotated clouds: relative precision for small increments."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    p, q = (x - x.mean(0)) / len(x) ** 0.5, (y - y.mean(0)) / len(y) ** 0.5
    u, _, vt = np.linalg.svd(p @ q.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + ((p - u @ vt @ q) ** 2).sum()


def entropic(x, y, epsilon, sweeps=5000):
    """min_P <C, P> + epsilon KL(P | ab) from the plan itself, and <C, P>."""
    cost = squared_distances(x, y)
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(sweeps):
        # Half of a step of both at once: slower than taking turns, but it does not stall between a
        # cloud and itself.
        new_f = -epsilon * (scipy.special.logsumexp((g - cost) / epsilon, axis=1) - np.log(m))
        new_g = -epsilon * (
            scipy.special.logsumexp((f[:, None] - cost) / epsilon, axis=0) - np.log(n)
        )
        change = max(np.abs(new_f - f).max(), np.abs(new_g - g).max())
        f, g = (f + new_f) / 2, (g + new_g) / 2
        if change < 1e-12:
            break
    exponent = (f[:, None] + g - cost) / epsilon
    plan = np.exp(exponent) / (n * m)
    linear = (cost * plan).sum()
    return linear + epsilon * (plan * exponent).sum(), linear


def sinkhorn_divergence(x, y, epsilon):
    return (
        entropic(x, y, epsilon)[0] - entropic(x, x, epsilon)[0] / 2 - entropic(y, y, epsilon)[0] / 2
    )


def quantile_midpoints(mean, std, n):
    """n points of equal weight for N(mean, std²), shape (n, 1)."""
    return mean + std * scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)[:, None]


def central_difference(fn, x, direction, h=1e-5):
    return (fn(x + h * direction) - fn(x - h * direction)) / (2 * h)


def _moments(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = (np.cov(z, rowvar=False, bias=True) for z in (x, y))
    return a, b, ((x.mean(0) - y.mean(0)) ** 2).sum()
