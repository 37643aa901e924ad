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
# # How far is a training run from the epistemic speed limit?
#
# Training moves a whole ensemble of networks from its initial law $q_0$ to a final law $q_1$.
# Its entropy production $\Sigma = \int_0^1 \mathbb{E}\|v_s\|^2\,ds$ cannot be less than
# $W_2^2(q_0, q_1)$. This notebook trains an ensemble on real digits, measures both sides, and lets
# the gradient of $\Sigma$ find a better schedule.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import esljax as esl

smoke = bool(os.environ.get("ESLJAX_SMOKE"))  # the tests run this notebook in a small size
members, steps, iterations = (4, 20, 2) if smoke else (32, 200, 40)

# %% [markdown]
# ## An ensemble of networks
# Every member has its own initialization, its own minibatches and its own noise. One row of `start`
# is one network, raveled.

# %%
data = esl.datasets.digits()
potential = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
key = jax.random.key(0)
start = potential.init(members=members, key=key)
start.shape

# %%
path = esl.simulate(
    potential, esl.Langevin(learning_rate=0.25, temperature=1e-7), start, steps=steps, key=key
)
print(path)
print("test accuracy", potential.accuracy(path.final, data.test).mean())

# %% [markdown]
# ## Both sides of the inequality
# A chain of exact transport distances between the snapshots gives $\Sigma$, the length $L^2$ and
# the distance $W_2^2$ in one geometry, so that $\Sigma \ge L^2 \ge W_2^2$ holds on the sample
# itself. With so few members in so many dimensions each is its own best partner: $W_2^2$ is then
# their mean squared displacement, an upper value of the distance between the laws. The gap splits
# into a temporal part, which a better timing would save, and a geometric part, which only another
# path could save.

# %%
transport = esl.ExactTransport()
constant = esl.speed_limit(path, transport=transport)
print(constant)

# %% [markdown]
# ## A schedule by gradient
# Minimize $\Sigma$, subject to a final training loss no higher than the constant schedule reaches.

# %%
target = float(potential(path.final).mean())


def train(learning_rate, key):
    start_key, path_key = jax.random.split(key)
    start = potential.init(members=members, key=start_key)
    return esl.simulate(
        potential, esl.Langevin(learning_rate, 1e-7), start, steps=steps, key=path_key
    )


def objective(learning_rate, key):
    path = train(learning_rate, key)
    sigma = esl.speed_limit(path, transport=transport, jackknife=0).entropy_production
    return sigma, potential(path.final).mean() / target - 1


optimum = esl.optimize(
    objective, esl.Knots(jnp.full(12, 0.25)), key=jax.random.key(1), iterations=iterations
)
print(optimum)

# %% [markdown]
# ## Judged on a run that the search has not seen
# The best schedule starts slowly, where the force is strong, and speeds up as the force fades: here
# the opposite of the usual decays. At the very end it may fall, because batches add noise that
# grows with the rate; out of a saddle, where forces grow, the best rate falls throughout. It does
# not reach a lower loss; it reaches the same loss with less entropy production. Much of the gain
# needs no search: `esl.constant_speed(constant)` re-times the constant schedule in closed form.

# %%
held_out = train(optimum.controls, jax.random.key(2))
optimized = esl.speed_limit(held_out, transport=transport)
print(optimized)

# %%
figure, (rates, speeds) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
rates.plot(jnp.arange(steps) / steps, path.rates, label="constant")
rates.plot(jnp.arange(steps) / steps, held_out.rates, label="optimized", color="black")
rates.set(xlabel="training time $s$", ylabel="learning rate per step")
rates.legend(frameon=False)
speeds.plot(constant.times, constant.speed, label="constant")
speeds.plot(optimized.times, optimized.speed, label="optimized", color="black")
speeds.set(xlabel="training time $s$", ylabel=r"metric speed $\ell(s)$", ylim=(0, None))
plt.show()
