"""The law of a step: what moved the members, for the measures that need to know it."""

import equinox as eqx
import jax.numpy as jnp

from esljax._types import Array, Float


class Diffusion(eqx.Module):
    """Overdamped Langevin dynamics, as a rule claims it of its steps.

    In one step the law q of the members follows the velocity

        v = -mobility (∇Φ + temperature ∇log q).

    **Args:**
    - `mobility`: the factor of -∇Φ in one step, in units of θ² per unit of Φ; η for `Langevin`.
      Shape (), or (K,) for all steps of a run.
    - `temperature`: T, in units of Φ, of the same shape.
    - `injected`: the temperature of the noise that the members really receive. It spreads each of
      them by 2 d `injected` `mobility` in one step. The same as `temperature` for `Langevin`; 0 for
      `ProbabilityFlow`, whose members feel no noise.

    **Example:**

        >>> import esljax as esl
        >>> esl.simulation.Diffusion(mobility=0.1, temperature=0.5, injected=0.0).injected
        Array(0., dtype=float32, weak_type=True)
    """

    mobility: Float[Array, "*steps"] = eqx.field(converter=jnp.asarray)
    temperature: Float[Array, "*steps"] = eqx.field(converter=jnp.asarray)
    injected: Float[Array, "*steps"] = eqx.field(converter=jnp.asarray)
