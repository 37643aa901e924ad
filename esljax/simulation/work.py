r"""Work on the members, summed exactly while a run steps.

During step k the potential rests at Φ_k = Φ(·; k/K) and members move; after it, members rest and
the potential changes to Φ_{k+1}. Each member then receives its change,

    W = [Φ_0 - Φ_before](θ_0) + Σ_k [Φ_{k+1} - Φ_k](θ_{k+1}) + [Φ_after - Φ_K](θ_K),

which is the work of the process that was simulated, for any drive and any number of snapshots: with
heat Σ_k [Φ_k(θ_{k+1}) - Φ_k(θ_k)] the first law holds exactly (Sekimoto, Prog. Theor. Phys. Suppl.
130, 17 (1998)).
"""

import equinox as eqx
import jax

from esljax._types import Array, Float, Key
from esljax.potentials import AbstractPotential


# The backward pass evaluates the potentials again: the intermediate results of a model, stored for
# every step, would outweigh the positions.
@eqx.filter_checkpoint(prevent_cse=False)
def work_of_change(
    before: AbstractPotential, after: AbstractPotential, positions: Float[Array, "n d"], key: Key
) -> Float[Array, " n"]:
    """[Φ_after - Φ_before] of each member, on the batches that its next step sees.

    These batches are independent of the members, so the work is unbiased.
    """
    batches = after.draw(key, positions.shape[0])

    def energies(potential: AbstractPotential) -> Float[Array, " n"]:
        return jax.vmap(potential.energy)(positions, batches)

    # One method gives both, so a potential that rests does no work, not even by rounding.
    return (energies(after) - energies(before)).astype(positions.dtype)
