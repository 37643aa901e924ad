# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An experiment, from a hypothesis to a verdict
#
# Five experiments of this site ask what the speed limit $\Sigma \ge L^2 \ge W_2^2$ says about
# training. This notebook walks through one of them in a small size: do trained networks follow the
# law of linear models? `scripts/experiment_speed_limits.py` is the same study with more keys, two
# networks, longer runs and the networks' own spectra.
#
# An experiment here has four parts, in this order: a hypothesis, the analysis that will decide,
# the runs, and a verdict with an interval. The analysis is written down before the runs.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student

import esljax as esl

smoke = bool(os.environ.get("ESLJAX_SMOKE"))  # the tests run this notebook in a small size

# %% [markdown]
# ## The hypothesis
# Seroussi, Alemi, Helias and Ringel ([arXiv 2307.14653](https://arxiv.org/abs/2307.14653)) solve
# gradient flow of a linear model with curvatures $k^{-\alpha}$ and residuals $k^{-\delta}$. With
# $a = (1 - \delta)/\alpha$ and many modes, the two parts of the gap are numbers that depend on $a$
# alone: the timing, $\Sigma/L^2$, and the bend of the path, $L^2/W_2^2$.


# %%
def law(a):
    return (1 + a) ** 2 / (4 * a), a * 2**a / ((1 + a) * (2**a - 1))


timing, bend = law(0.5)
print(f"a = .5: Σ/L² = {timing:.5f}, L²/W2² = {bend:.5f}, Σ/W2² = {timing * bend:.5f}")

# %% [markdown]
# The hypothesis: **trained networks follow this law, with a fitted exponent.**
#
# ## The analysis that decides
# Each run gives two numbers, and the law has one parameter. So $a$ is fitted to the timing, and the
# bend is a test: its ratio to the bend of the law at this $a$ should be 1. Over several keys the
# ratio has a 95 % t-interval. *Confirmed* if it lies within .95 to 1.05, *refuted* if it lies
# outside, *undecided* otherwise. All keys count.
#
# ## First, the instrument
# Does the package give the law where it holds? Here is the exact path of modes with $\lambda t$
# from $10^{-6}$ to $10^6$, as snapshots at unequal times, measured like any recording.

# %%
with jax.enable_x64(True):
    curvature = np.exp(np.arange(-np.log(1e6), np.log(1e6), 0.25))
    size = np.sqrt(curvature ** (-0.5 - 1))
    times = np.append(0, np.geomspace(1e-9, 1, 200 if smoke else 2000))
    moved = -size * np.expm1(-np.outer(times, curvature))
    path = esl.from_snapshots(np.stack([moved, -moved], axis=1), times)
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    ratio = float(report.entropy_production / report.w2_squared)
print(f"measured Σ/W2² = {ratio:.5f}, the law {timing * bend:.5f}")

# %% [markdown]
# ## The runs
# Ensembles of small networks on digits, all data in each step, squared error as in the law. The
# members of an ensemble of this size do not resolve a law in 1210 dimensions, so the numbers are
# those of the members' paths; the report says so.

# %%
data = esl.datasets.digits().train
inputs, labels = data.inputs[:200], np.eye(10, dtype=np.float32)[np.asarray(data.labels[:200])]
potential = esl.FlaxLoss(esl.models.mlp(64, 16, 10), (inputs, labels), loss="squared_error")
steps = 20 if smoke else 400
problem = esl.Problem(potential, members=4 if smoke else 8, steps=steps, snapshots=steps)
reports = [
    problem.run(esl.Constant(0.004), jax.random.key(seed)).report
    for seed in range(2 if smoke else 5)
]
print(reports[0])

# %% [markdown]
# ## The verdict


# %%
def fitted(timing):
    return brentq(lambda a: law(a)[0] - timing, 1e-9, 1) if timing > 1 else 1.0


timings = np.array([float(one.entropy_production / one.length_squared) for one in reports])
bends = np.array([float(one.length_squared / one.w2_squared) for one in reports])
exponents = np.array([fitted(timing) for timing in timings])
ratios = bends / law(exponents)[1]
half = student.ppf(0.975, ratios.size - 1) * ratios.std(ddof=1) / np.sqrt(ratios.size)
low, high = ratios.mean() - half, ratios.mean() + half
word = "undecided"
if low > 0.95 and high < 1.05:
    word = "confirmed"
elif high < 0.95 or low > 1.05:
    word = "refuted"
print(f"fitted a = {exponents.mean():.3f}")
print(f"bend over the law's: {ratios.mean():.3f}, from {low:.3f} to {high:.3f}: {word}")

# %%
figure, axes = plt.subplots(figsize=(4.5, 3.2))
axes.plot(*law(np.linspace(0.1, 1, 100)), color="0.3", label="the law, a from .1 to 1")
axes.plot(timings, bends, "o", color="#0072B2", label="networks, one dot a key")
axes.set(xlabel="timing, Σ/L²", ylabel="bend, L²/W2²")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What would change it
# More keys narrow the interval; longer runs reach modes that have not begun here; and a network
# whose kernel changes need not follow a linear model at all. The full study takes the eigenvalues
# of each network at initialization, trains the linear model that they describe, and compares the
# two: see the page *Speed limits for deep learning*.
