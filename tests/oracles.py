"""Independent truths to hold the package against: NumPy and SciPy, and no import of the package.

Constants are the reference numbers of the theory (closed forms and quadrature), named as there.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad, solve_ivp
from scipy.linalg import solve_continuous_lyapunov, sqrtm
from scipy.special import softmax
from scipy.stats import multivariate_normal

# --- Reference numbers ----------------------------------------------------------------------------

# Ornstein-Uhlenbeck, k = 1, T = .1, S₀ = 1, mean 2 e₁, η = 1 for unit time: {d: (Σ, L², W2²)}.
O1 = {1: (2.04312999, 1.87917202, 1.87819069), 10: (4.86733501, 4.40146852, 4.39715642)}

# Translation only: {x = kU: Σ/W2² = (x/2) coth(x/2)}.
O2 = {0.5: 1.0207470, 1.0: 1.0819767, 2.0: 1.3130353, 5.0: 2.5339183, 10.0: 5.0004540}

# The law of O1 with U = 2 in unit training time: {d: {mobility: Σ}}, {d: (D, L², W2²)} and, for
# d = 1, η* at s = 0, ½, 1.
O3_ENTROPY_PRODUCTION = {
    1: {
        "2": 4.5952533,
        "4(1-s)": 7.9919600,
        "2(1+cos πs)": 8.6114022,
        "∝ exp(-5s)": 17.965774,
        "4s": 3.9002495,
    },
    10: {
        "2": 10.611896,
        "4(1-s)": 18.767854,
        "2(1+cos πs)": 20.141747,
        "∝ exp(-5s)": 42.634841,
        "4s": 8.5662907,
    },
}
O3_PATH = {1: (2.2976266, 3.4379491, 3.4244691), 10: (5.3059480, 7.4011631, 7.3294684)}
O3_OPTIMUM = (0.84542908, 1.4918779, 6.7437645)

# Two modes k = (1, 10), mean (1, 1), T = 0, no width: {U: (D U, L², W2²)}.
O5 = {1.0: (5.4323323, 1.9224652, 1.3994856), 3.0: (16.496282, 2.9057372, 1.9029046)}

# Chains of J links through O1, d = 1: {J: Σ_chain}.
O12 = {1: 1.8781907, 2: 1.9989684, 4: 2.0318893, 8: 2.0403070, 16: 2.0424234, 64: 2.0430858}

# Bures distance of diag(1, 4) and the same turned by 45°.
O14 = 10 - 2 * np.sqrt(20.5)

# Entropic transport of N(0, 1) and N(1, 4), ε = .1: OT_ε and its debiased form.
O15 = (2.2347565, 1.9999219)


# --- Gaussian laws --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    entropy_production: float
    length_squared: float
    w2_squared: float
    housekeeping: float
    dissipation: float
    learning_time: float
    mean: np.ndarray
    covariance: np.ndarray


def gaussian_w2_squared(m0, c0, m1, c1):
    root = sqrtm(c0).real
    return float(np.sum((m0 - m1) ** 2) + np.trace(c0 + c1 - 2 * sqrtm(root @ c1 @ root).real))


def linear_drift(mean, covariance, stiffness, center, mobility, temperature):
    """Return moments and densities of linear drift by an adaptive integrator.

    `mobility` and `temperature` are functions of s in [0, 1].
    """
    d = len(mean)

    def parts(s, y):
        m, c = y[:d], y[d : d + d * d].reshape(d, d)
        eta, heat = mobility(s), temperature(s)
        dm = -eta * stiffness @ (m - center)
        dc = -eta * (stiffness @ c + c @ stiffness.T) + 2 * eta * heat * np.eye(d)
        velocity = -eta * (stiffness - heat * np.linalg.inv(c))
        gradient = solve_continuous_lyapunov(c, dc)
        total = dm @ dm + np.trace(velocity @ c @ velocity.T)
        metric = dm @ dm + np.trace(gradient @ c @ gradient)
        return dm, dc, total, metric, eta

    def rate(s, y):
        dm, dc, total, metric, eta = parts(s, y)
        return np.concatenate(
            [dm, dc.ravel(), [total, np.sqrt(metric), total - metric, total / eta, eta]]
        )

    start = np.concatenate([mean, covariance.ravel(), np.zeros(5)])
    end = solve_ivp(rate, (0, 1), start, method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    m, c = end[:d], end[d : d + d * d].reshape(d, d)
    total, length, housekeeping, dissipation, clock = end[d + d * d :]
    return Truth(
        total,
        length**2,
        gaussian_w2_squared(mean, covariance, m, c),
        housekeeping,
        dissipation,
        clock,
        m,
        c,
    )


def ornstein_uhlenbeck(k, temperature, width, shift, d, clock):
    """Return D (Σ on the clock [0, U], where η = 1), L² and W2² of the isotropic closed form."""

    def metric_squared(t):
        s = temperature / k + (width - temperature / k) * np.exp(-2 * k * t)
        return (k * shift * np.exp(-k * t)) ** 2 + d * ((temperature - k * s) ** 2 / s)

    end = temperature / k + (width - temperature / k) * np.exp(-2 * k * clock)
    dissipation = quad(metric_squared, 0, clock, epsabs=0, epsrel=1e-12)[0]
    length = quad(lambda t: np.sqrt(metric_squared(t)), 0, clock, epsabs=0, epsrel=1e-12)[0]
    return (
        dissipation,
        length**2,
        (shift - shift * np.exp(-k * clock)) ** 2 + d * (np.sqrt(width) - np.sqrt(end)) ** 2,
    )


# --- Derivatives and schedules --------------------------------------------------------------------


def central_difference(fn, x, direction, h=1e-5):
    return (fn(x + h * direction) - fn(x - h * direction)) / (2 * h)


def warmup_cosine(count, start, peak, warmup, steps, end):
    """Rise from `start` to `peak` in `warmup` counts, then fall as a cosine to `end` at `steps`."""
    fraction = np.clip((count - warmup) / (steps - warmup), 0, 1)
    return np.where(
        count < warmup,
        start + (peak - start) * count / warmup,
        end + (peak - end) * (1 + np.cos(np.pi * fraction)) / 2,
    )


# --- Potentials -----------------------------------------------------------------------------------


def double_well(position, barrier, width, stiffness):
    return (
        barrier * ((position[0] / width) ** 2 - 1) ** 2 + stiffness * np.sum(position[1:] ** 2) / 2
    )


def mixture(position, means, variances, weights):
    """Minus the log density of a mixture of isotropic Gaussians."""
    parts = [
        weight * multivariate_normal.pdf(position, mean, variance)
        for mean, variance, weight in zip(means, variances, weights, strict=True)
    ]
    return -np.log(np.sum(parts) / np.sum(weights))


def mlp(layers, inputs):
    """Outputs of a tanh network with layers [(kernel (in, out), bias (out,)), ...]."""
    *hidden, (kernel, bias) = layers
    for inward, offset in hidden:
        inputs = np.tanh(inputs @ inward + offset)
    return inputs @ kernel + bias


def cross_entropies(outputs, labels):
    return -np.log(softmax(outputs, axis=1)[np.arange(len(labels)), labels])


# --- Discrete steps and deterministic flows -------------------------------------------------------


def discrete_moments(mean, variance, k, temperature, rates):
    """Return mean and variance of θ ← θ - ηkθ + sqrt(2Tη) ξ after all `rates`, in one dimension.

    `temperature` is a number, or one number for each step.
    """
    for eta, heat in zip(rates, np.broadcast_to(temperature, np.shape(rates)), strict=True):
        mean, variance = (1 - eta * k) * mean, (1 - eta * k) ** 2 * variance + 2 * heat * eta
    return mean, variance


def noisy_descent(mean, covariance, stiffness, noise, rates, temperatures):
    """Return the means and covariances, one more than steps, of a law under
    θ ← θ - η (Kθ + ξ) + sqrt(2Tη) ζ, with ξ ~ N(0, noise)."""
    eye, means, covariances = np.eye(len(mean)), [np.asarray(mean)], [np.asarray(covariance)]
    for eta, heat in zip(rates, np.broadcast_to(temperatures, np.shape(rates)), strict=True):
        kept = eye - eta * stiffness
        means.append(kept @ means[-1])
        covariances.append(kept @ covariances[-1] @ kept.T + eta**2 * noise + 2 * heat * eta * eye)
    return np.array(means), np.array(covariances)


def noisy_mode(mean, variance, k, noise, eta, steps):
    """Return the same of one coordinate at a constant rate, in closed form."""
    kept, powers = 1 - eta * k, np.arange(steps + 1)
    rest = eta**2 * noise / (1 - kept**2)
    return kept**powers * mean, rest + kept ** (2 * powers) * (variance - rest)


def discrete_stationary_variance(k, temperature, eta):
    """O13: of the same step."""
    return temperature / (k * (1 - k * eta / 2))


def euler_truth(mean, covariance, stiffness, steps, rate, temperature):
    """Return what K Euler-Maruyama steps of linear drift -K(s) θ make of a Gaussian law.

    Moments are exact for the discrete map. The action of each step is its mobility times the mean
    of g² at its two ends, so that Σ = K² η² ∫g²; the gradient part solves A C + C A = V C + C Vᵀ.

    `stiffness` is a function of s in [0, 1] that returns K (d, d).
    """
    eye, m, c = np.eye(len(mean)), np.asarray(mean, float), np.asarray(covariance, float)
    whole, moving = [], []
    for i in range(steps + 1):
        k = stiffness(i / steps)
        slope = temperature * np.linalg.inv(c) - k
        gradient = solve_continuous_lyapunov(c, slope @ c + c @ slope.T)
        drift = np.sum((k @ m) ** 2)
        whole.append(drift + np.trace(slope @ c @ slope.T))
        moving.append(drift + np.trace(gradient @ c @ gradient))
        if i < steps:
            step = eye - rate * k
            m, c = step @ m, step @ c @ step.T + 2 * rate * temperature * eye
    clock = rate * steps
    action, metric, length = (
        clock * np.trapezoid(each, dx=1 / steps) for each in (whole, moving, np.sqrt(moving))
    )
    return Truth(
        clock * action,
        length**2,
        gaussian_w2_squared(np.asarray(mean, float), np.asarray(covariance, float), m, c),
        clock * (action - metric),
        action,
        clock,
        m,
        c,
    )


def linear_descent(positions, stiffness, center, rates):
    """Positions (K+1, n, d) of gradient descent on linear drift."""
    path = [np.asarray(positions)]
    for eta in rates:
        path.append(path[-1] - eta * (path[-1] - center) @ np.asarray(stiffness).T)
    return np.stack(path)


def optimal_discrete_rates(k, remaining, steps):
    """Return the rates of O3 in discrete steps: kη_j = 1/(N - j).

    With this N the mean shrinks to the fraction `remaining` in equal steps.
    """
    return 1 / (k * (steps / (1 - remaining) - np.arange(steps)))


def double_well_flow(positions, barrier, width, time):
    """Solve dθ/dt = -Φ'(θ) for Φ = b((θ/w)² - 1)², a Bernoulli equation.

    `time` broadcasts against the positions.
    """
    y = np.asarray(positions) / width
    return width * y / np.sqrt(y**2 + (1 - y**2) * np.exp(-8 * barrier * time / width**2))


def chain_of_pairs(path, times):
    """Return (Σ, L², W2²) of a chain (J+1, n, d) in which each member is its own best partner."""
    squares = np.mean(np.sum(np.diff(path, axis=0) ** 2, axis=2), axis=1)
    return (
        np.sum(squares / np.diff(times)),
        np.sum(np.sqrt(squares)) ** 2,
        np.mean(np.sum((path[-1] - path[0]) ** 2, axis=1)),
    )


def gaussian_chain(means, covariances, times):
    """(Σ, L², W2²) of a chain of Gaussian laws in the Bures distance."""
    pairs = list(zip(means, covariances, strict=True))
    squares = np.array([gaussian_w2_squared(*a, *b) for a, b in itertools.pairwise(pairs)])
    return (
        np.sum(squares / np.diff(times)),
        np.sum(np.sqrt(squares)) ** 2,
        gaussian_w2_squared(*pairs[0], *pairs[-1]),
    )


def ornstein_uhlenbeck_moments(k, temperature, width, shift, d, clock):
    """Means (..., d) and covariances (..., d, d) of O1 and O3 at the clock readings u."""
    clock = np.asarray(clock)
    mean = shift * np.exp(-k * clock)[..., None] * np.eye(d)[0]
    variance = temperature / k + (width - temperature / k) * np.exp(-2 * k * clock)
    return mean, variance[..., None, None] * np.eye(d)


# --- Free energies --------------------------------------------------------------------------------

# O6, moving trap Φ = (θ - λ)²/2 at T = 1, λ from 0 to 5 in unit time: {drive: (work, Σ, W2²)}. The
# best drive jumps by 5/3 at both ends.
O6 = {"linear": (9.1969860, 4.2022810, 3.3833821), "best": (25 / 3, 25 / 9, 25 / 9)}

# O7, stiffening trap Φ = λθ²/2 at T = 1, λ from 1 to 2 in unit time. Of the best drive: final
# width, work, λ just inside the ends.
O7 = (0.80901699, 0.40291836, 1.1909830, 1.7639320)


def stiffening_drive(s):
    """Return λ of O7: λ = (1 - σ dσ/ds)/σ².

    It moves the standard deviation σ at constant speed to the root of 4σ² - 2σ - 1.
    """
    speed = (1 + np.sqrt(5)) / 4 - 1
    width = 1 + speed * np.asarray(s)
    return (1 - width * speed) / width**2


def stiffening(time):
    """Return the stiffness λ(s) of O7 in t_f = `time` instead of 1, and the least Σ.

    The law starts at N(0, 1) in a trap of stiffness 1 that ends at 2. Its width moves at constant
    speed to the best end, so that Σ = L² = W2².
    """
    end = (1 / time + np.sqrt(1 / time**2 + 2 + 2 / time)) / (2 + 2 / time)
    speed = (end - 1) / time

    def stiffness(s):
        width = 1 + (end - 1) * s
        return (1 - width * speed) / width**2

    return stiffness, (end - 1) ** 2


def driven_books(stiffness, center, jumps):
    """Return work, D = Σ, final mean and standard deviation of dθ = -λ (θ - c) ds + √2 dW.

    The law starts at N(0, 1). λ(s) and c(s) are functions whose values before and after,
    ((λ, c), (λ, c)), may differ from those at the ends. Differences give the derivative of the
    potential.
    """

    def rate(s, y):
        mean, variance = y[:2]
        k, c = stiffness(s), center(s)
        h = 1e-5
        a, b = max(s - h, 0), min(s + h, 1)
        change = (
            energy((stiffness(b), center(b)), mean, variance)
            - energy((stiffness(a), center(a)), mean, variance)
        ) / (b - a)
        moved = -k * (mean - c)
        return [moved, 2 - 2 * k * variance, change, moved**2 + (1 - k * variance) ** 2 / variance]

    def energy(trap, mean, variance):
        return trap[0] * (variance + (mean - trap[1]) ** 2) / 2

    mean, variance, work, dissipated = solve_ivp(
        rate, (0, 1), [0, 1, 0, 0], rtol=1e-10, atol=1e-12
    ).y[:, -1]
    first = energy((stiffness(0), center(0)), 0, 1) - energy(jumps[0], 0, 1)
    last = energy(jumps[1], mean, variance) - energy((stiffness(1), center(1)), mean, variance)
    return work + first + last, dissipated, mean, np.sqrt(variance)


def driven_steps(stiffness, center, jumps):
    """Return the work of the same in K steps of 1/K, and mean and variance at the end.

    Moments are exact for the Euler-Maruyama step. The trap rests during a step and changes after
    it. `stiffness` and `center` hold their values at 0, 1/K, ..., 1.
    """
    steps = len(stiffness) - 1
    traps = [jumps[0], *zip(stiffness, center, strict=True), jumps[1]]
    mean, variance = 0.0, 1.0

    def energy(k, c):
        return k * (variance + (mean - c) ** 2) / 2

    work = energy(*traps[1]) - energy(*traps[0])
    for now, then in itertools.pairwise(traps[1:-1]):
        k, c = now
        mean += k / steps * (c - mean)
        variance = (1 - k / steps) ** 2 * variance + 2 / steps
        work += energy(*then) - energy(*now)
    return work + energy(*traps[-1]) - energy(*traps[-2]), mean, variance


def relaxing_mixture(weights, means, variances, k, temperature, clock):
    """Return energy, entropy and free energy at both ends, and D, of dθ = -kθ du + sqrt(2T) dW.

    The law starts as a mixture of Gaussians in one dimension. Each component relaxes on its own,
    and the rest is quadrature.
    """
    weights, means, variances = (np.asarray(x, float) for x in (weights, means, variances))
    grid = np.linspace(-12, 12, 6001)

    def law(u):
        decay = np.exp(-k * u)
        m, v = means * decay, temperature / k + (variances - temperature / k) * decay**2
        parts = weights * np.exp(-((grid[:, None] - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
        return parts.sum(axis=1), (parts * (m - grid[:, None]) / v).sum(axis=1)

    def mean(values):
        return np.trapezoid(values, grid)

    def rate(u):
        density, slope = law(u)
        velocity = -k * grid - temperature * slope / np.maximum(density, 1e-300)
        return mean(density * velocity**2)

    ends = []
    for u in (0, clock):
        density, _ = law(u)
        energy = mean(density * k * grid**2 / 2)
        entropy = -mean(density * np.log(np.maximum(density, 1e-300)))
        ends.append((energy, entropy, energy - temperature * entropy))
    return ends, quad(rate, 0, clock, epsrel=1e-9)[0]
