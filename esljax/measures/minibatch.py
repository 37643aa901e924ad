r"""Minibatch noise: how much of a step is the batch rather than the gradient.

Two independent batches give gradients g₁, g₂ of one member with one mean, so without bias

    E[g₁·g₂] = E‖∇Φ‖²,     ½ E‖g₁ - g₂‖² = tr Cov(g),

where E‖g‖² alone would add the second to the first. Each step of rate η then spreads a member by η² tr Cov(g), as injected noise spreads it
by 2dTη; a chain whose assignments are the identity sees that spread as if it were velocity. It is no part of Σ and is reported beside it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esljax._checks import check_key, check_positive_int, known, refuse
from esljax._types import Array, Float, Key, Scalar
from esljax.potentials import AbstractPotential, check_potential
from esljax.simulation import Trajectory


class MinibatchNoise(eqx.Module):
    """The gradient and the noise of its batches along a run. Numbers at snapshots are means over members."""

    times: Float[Array, " snapshots"]
    gradient_squared: Float[Array, " snapshots"]
    """E‖∇Φ‖², without bias, in units of Φ² per θ²."""
    variance: Float[Array, " snapshots"]
    """tr Cov(g) of one batch, in the same units."""
    gradient_squared_error: Float[Array, " snapshots"]
    """Standard error of `gradient_squared` over members."""
    variance_error: Float[Array, " snapshots"]
    """Standard error of `variance` over members."""
    temperature: Float[Array, " snapshots"]
    """η tr Cov(g)/(2d): the temperature at which injected noise would spread the members as much."""
    temperature_error: Float[Array, " snapshots"]
    """Standard error of `temperature` over members."""
    floor: Scalar
    """Σ_j (Σ_{k∈j} η_k² tr Cov(g))/Δs_j: what batches add to the chain's Σ if every member is its own best partner."""
    floor_error: Scalar
    """Standard error of `floor` over members."""

    def __str__(self) -> str:
        if not known(self.floor) or self.floor.ndim:
            return repr(self)
        lines = [f"{'s':>6}{'E‖∇Φ‖²':>24}{'tr Cov(g)':>24}{'temperature':>24}"]
        for j, s in enumerate(self.times):
            cells = (
                (getattr(self, name)[j], getattr(self, f"{name}_error")[j])
                for name in ("gradient_squared", "variance", "temperature")
            )
            lines.append(
                f"{float(s):>6.3f}"
                + "".join(
                    f"{f'{float(value):.4g} ± {float(error):.2g}':>24}" for value, error in cells
                )
            )
        floor = f"Batches contribute up to {float(self.floor):.4g} ± {float(self.floor_error):.2g} to the Σ of a chain of members' paths."
        return "\n".join([*lines, floor])


def minibatch_noise(
    trajectory: Trajectory, potential: AbstractPotential, *, key: Key, pairs: int = 4
) -> MinibatchNoise:
    """Measure the noise of the batches at the snapshots of one run.

    **Args:** `trajectory`: one run of `simulate`, not observed. `potential`: the run's Φ, which draws batches. `key`: of the batches,
    independent of the run's. `pairs`: how many pairs of batches each member draws at each snapshot; two gradients each.
    **Returns:** `MinibatchNoise`; `print` shows a table.
    **Raises:** `InputError` for a run of another kind, or a potential without batches.
    **Differentiation:** in the positions and the potential.

    **Example:**

        >>> noise = minibatch_noise(path, potential, key=jax.random.key(2))
        >>> print(noise)
    """
    if (
        not isinstance(trajectory, Trajectory)
        or trajectory.positions.ndim != 3
        or trajectory.observed
        or trajectory.rates is None
    ):
        raise refuse("trajectory", "be one run of simulate(...), not observed", "is not")
    check_potential("potential", potential)
    check_key("key", key)
    check_positive_int("pairs", pairs)
    if potential.at(0.0).draw(key, 1) is None:
        raise refuse(
            "potential",
            "draw batches (batch_size=...)",
            "sees all data at once and has no such noise",
        )
    return _measure(trajectory, potential, key, pairs)


@eqx.filter_jit
def _measure(trajectory: Trajectory, potential: Any, key: Key, pairs: int) -> MinibatchNoise:
    links, members, d = trajectory.positions.shape[0] - 1, *trajectory.positions.shape[1:]
    rates: Any = trajectory.rates

    def gradients(positions, s, key):
        acting = potential.at(s)
        return jax.vmap(acting.energy_and_gradient)(positions, acting.draw(key, members))[1]

    def at_snapshot(xs):
        j, positions, s = xs

        def pair(i):
            first, second = (
                gradients(
                    positions, s, jax.random.fold_in(jax.random.fold_in(key, j), 2 * i + side)
                )
                for side in (0, 1)
            )
            return jnp.sum(first * second, axis=1), jnp.sum((first - second) ** 2, axis=1) / 2

        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(pair, jnp.arange(pairs)))

    squared, variance = jax.lax.map(
        at_snapshot, (jnp.arange(links + 1), trajectory.positions, trajectory.times)
    )
    # Trapezoids over the snapshots: half of each link's steps see the noise at its start.
    steps = jnp.sum(rates.reshape(links, -1) ** 2, axis=1) / jnp.diff(trajectory.times)
    floors = jnp.sum(steps[:, None] * (variance[1:] + variance[:-1]) / 2, axis=0)

    def error(x):
        return jnp.std(x, axis=-1, ddof=1) / members**0.5

    last = jnp.concatenate([rates[:: rates.shape[0] // links], rates[-1:]])
    mean = jnp.mean(variance, axis=1)
    return MinibatchNoise(
        times=trajectory.times,
        gradient_squared=jnp.mean(squared, axis=1),
        variance=mean,
        gradient_squared_error=error(squared),
        variance_error=error(variance),
        temperature=last * mean / (2 * d),
        temperature_error=last * error(variance) / (2 * d),
        floor=jnp.mean(floors),
        floor_error=error(floors),
    )
