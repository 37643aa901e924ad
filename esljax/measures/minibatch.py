r"""Minibatch noise: the share of a step that comes from the batch rather than from the gradient.

Two independent batches give gradients g₁, g₂ of one member with one mean, so without bias

    E[g₁·g₂] = E‖∇Φ‖²,     ½ E‖g₁ - g₂‖² = tr Cov(g),

where E‖g‖² alone would add the second to the first. Each step of rate η then spreads a member by
η² tr Cov(g), as injected noise spreads it by 2dTη; a chain whose assignments are the identity sees
that spread as if it were velocity. It is no part of Σ and is reported beside it.

That spread is the one of members that step by -ηg. A fitted field (`ProbabilityFlow`) averages the
noise of many members and spreads them less. A rule without a law may do anything with g, so its
spread is not known.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_key, check_kind, check_positive_int, door, known, refuse
from esljax._types import Array, Float, Key, Scalar
from esljax.potentials import AbstractPotential, check_potential
from esljax.results import StandardErrors, measured, renamed_error, table
from esljax.simulation import Trajectory


class MinibatchNoise(eqx.Module):
    """The gradient and the noise of its batches along a run. `print` shows a table.

    Numbers at snapshots are means over members.
    """

    times: Float[Array, " snapshots"]
    """The training times s_j of the snapshots, shape (J+1,), from 0 to 1."""
    gradient_squared: Float[Array, " snapshots"]
    """E‖∇Φ‖², without bias, shape (J+1,), in units of Φ² per θ²."""
    variance: Float[Array, " snapshots"]
    """tr Cov(g) of one batch, shape (J+1,), in the same units."""
    temperature: Float[Array, " snapshots"] | None
    """η tr Cov(g)/(2d), shape (J+1,), in units of the potential: the temperature at which injected
    noise would spread the members as much. None if the rule of the run claims no law."""
    floor: Scalar | None
    """Σ_j (Σ_{k∈j} η_k² tr Cov(g))/Δs_j, shape (), in units of θ²: the addition of batches to the
    chain's Σ if every member is its own best partner, and the most that they add to members that
    follow a fitted field. None if the rule of the run claims no law."""
    standard_error: StandardErrors
    """Standard errors over members of `gradient_squared`, `variance`, `temperature` and `floor`,
    each of the shape and units of its number."""
    errors: str = eqx.field(static=True, default="over members")
    """How the standard errors were taken, in words."""

    gradient_squared_error = renamed_error("gradient_squared")
    variance_error = renamed_error("variance")
    temperature_error = renamed_error("temperature")
    floor_error = renamed_error("floor")

    def __str__(self) -> str:
        if not known(self.variance) or np.ndim(self.variance) != 1:
            return repr(self)
        columns = {
            "E‖∇Φ‖²": "gradient_squared",
            "tr Cov(g)": "variance",
            "temperature": "temperature",
        }
        names = {label: name for label, name in columns.items() if getattr(self, name) is not None}
        rows: list[tuple[str, ...]] = [("s", *names)]
        for j, s in enumerate(self.times):
            cells = (
                measured(getattr(self, name)[j], self.standard_error.get(name)[j], digits=4)
                for name in names.values()
            )
            rows.append((f"{float(s):.3f}", *cells))
        return f"{table(rows, align='r' * len(rows[0]))}\n{self._on_the_floor()}"

    def _on_the_floor(self) -> str:
        if self.floor is None:
            return (
                "The rule claims no law, so the share of batches in the Σ of a chain is not known."
            )
        floor = measured(self.floor, self.standard_error.floor, digits=4)
        return f"Batches contribute up to {floor} to the Σ of a chain of members' paths."


@door
def minibatch_noise(
    trajectory: Trajectory, potential: AbstractPotential, *, key: Key, pairs: int = 4
) -> MinibatchNoise:
    """Measure the noise of the batches at the snapshots of one run.

    **Args:**
    - `trajectory`: one run of `simulate`, not observed.
    - `potential`: the Φ of the run, which draws batches.
    - `key`: the key of the batches, independent of that of the run.
    - `pairs`: how many pairs of batches each member draws at each snapshot; two gradients each.

    **Returns:** `MinibatchNoise`; `print` shows a table.
    **Raises:** `InputError` for a run of another kind, or a potential without batches.
    **Differentiation:** in the positions and the potential.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> inputs = jax.random.normal(jax.random.key(0), (40, 2))
        >>> data = (inputs, (inputs[:, 0] > 0).astype(int))
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data, batch_size=8)
        >>> start = potential.init(members=4, key=jax.random.key(1))
        >>> rule = esl.Langevin(0.1)
        >>> path = esl.simulate(potential, rule, start, steps=20, key=jax.random.key(2))
        >>> noise = esl.minibatch_noise(path, potential, key=jax.random.key(3))
        >>> bool(noise.floor > 0), noise.standard_error.variance.shape
        (True, (21,))
    """
    must = "be one run of simulate(...), not observed"
    check_kind("trajectory", trajectory, Trajectory, must)
    if trajectory.positions.ndim != 3 or trajectory.observed or trajectory.rates is None:
        raise refuse("trajectory", must, f"is a {trajectory}")
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
    links, members = trajectory.positions.shape[0] - 1, trajectory.positions.shape[1]

    def gradients(positions: Array, s: Array, key: Key) -> Array:
        acting = potential.at(s)
        return jax.vmap(acting.energy_and_gradient)(positions, acting.draw(key, members))[1]

    def at_snapshot(moment: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        j, positions, s = moment

        def pair(i: Array) -> tuple[Array, Array]:
            keys = [jax.random.fold_in(jax.random.fold_in(key, j), 2 * i + side) for side in (0, 1)]
            first, second = (gradients(positions, s, batch) for batch in keys)
            return jnp.sum(first * second, axis=1), jnp.sum((first - second) ** 2, axis=1) / 2

        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(pair, jnp.arange(pairs)))

    squared, variance = jax.lax.map(
        at_snapshot, (jnp.arange(links + 1), trajectory.positions, trajectory.times)
    )
    numbers = {"gradient_squared": squared, "variance": variance, **_spread(trajectory, variance)}

    def error(x: Array) -> Array:
        return jnp.std(x, axis=-1, ddof=1) / members**0.5

    means, errors = (jax.tree.map(f, numbers) for f in (lambda x: jnp.mean(x, axis=-1), error))
    return MinibatchNoise(
        times=trajectory.times,
        **means,
        standard_error=StandardErrors(errors),
        errors=f"over {members} members",
    )


def _spread(
    trajectory: Trajectory, variance: Float[Array, "snapshots n"]
) -> dict[str, Array | None]:
    """The share of each member in the numbers that need to know how a step uses its gradient."""
    law, (snapshots, _, d) = trajectory.law, trajectory.positions.shape
    if law is None:
        return {"temperature": None, "floor": None}
    links, eta = snapshots - 1, law.mobility
    # Trapezoids over the snapshots: half of each link's steps see the noise at its start.
    steps = jnp.sum(eta.reshape(links, -1) ** 2, axis=1) / jnp.diff(trajectory.times)
    acting = jnp.concatenate([eta[:: eta.shape[0] // links], eta[-1:]])
    return {
        "temperature": acting[:, None] * variance / (2 * d),
        "floor": jnp.sum(steps[:, None] * (variance[1:] + variance[:-1]) / 2, axis=0),
    }
