"""A curriculum: a drive that moves the weights of the examples of a loss."""

import equinox as eqx
import jax

from esljax._checks import as_float, check_finite, check_kind, refuse
from esljax._types import Array, ArrayLike, Float, ScalarLike
from esljax.potentials.flax import FlaxLoss


class Curriculum(eqx.Module):
    """The loss in which one number λ favors easy examples, or hard ones: a family for `Driven`.

        w_i(λ) = m e^(-λ h_i) / Σ_j e^(-λ h_j)

    h is the difficulty of each example. λ > 0 weighs easy examples more, λ < 0 hard ones, and at
    λ = 0 all count alike: a run that ends there (`Driven(..., after=0.0)`) is judged by the loss of
    all the data. The weights have mean 1 at every λ, so they take no part in the learning rate, and
    batches are unbiased. The work of the drive is that of every potential that moves:
    dΦ/dλ = -Cov(h, loss) under the weights, on the average over examples.

    **Args:** `potential`: a `FlaxLoss`; weights of its own multiply these. `difficulty`: h, shape
    (m,), in units of 1/λ, such as the ranks of the examples by the margin of a trained network,
    scaled to mean 0 and variance 1.
    **Raises:** `InputError` for another potential, another shape, or numbers that are not finite.
    **Differentiation:** in λ, and so in the drive through `simulate`, and in `difficulty`.
    **Reference:** Bengio, Louradour, Collobert and Weston, "Curriculum learning", ICML 2009.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> data = esl.datasets.two_moons(samples=50)
        >>> loss = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train, batch_size=8)
        >>> order = esl.Curriculum(loss, difficulty=jnp.linspace(-1, 1, 40))
        >>> easy_first = esl.Driven(order, esl.Linear(1.0, 0.0), after=0.0)
        >>> print(easy_first.at(0.0).weights[jnp.array([0, 39])].round(2))
        [2.29 0.31]
    """

    potential: FlaxLoss
    difficulty: Float[Array, " m"]
    """h, the difficulty of each example, shape (m,), in units of 1/λ."""

    def __init__(self, potential: FlaxLoss, difficulty: Float[ArrayLike, " m"]):
        check_kind("potential", potential, FlaxLoss, "be a FlaxLoss, whose examples have weights")
        self.potential = potential
        self.difficulty = as_float(difficulty, "difficulty")
        count = jax.tree.leaves(potential.inputs)[0].shape[0]
        if self.difficulty.shape != (count,):
            must = f"have shape ({count},), one number for each example"
            raise refuse("difficulty", must, f"has shape {self.difficulty.shape}")
        check_finite("difficulty", self.difficulty)

    def __call__(self, drive: ScalarLike) -> FlaxLoss:
        """The loss under the weights of one λ, shape ()."""
        weights = self.weights(drive)
        return eqx.tree_at(
            lambda loss: loss.weights, self.potential, weights, is_leaf=lambda x: x is None
        )

    def weights(self, drive: ScalarLike) -> Float[Array, " m"]:
        """w(λ), shape (m,), times the weights of the potential."""
        shares = jax.nn.softmax(-as_float(drive, "drive") * self.difficulty)
        weights = shares.size * shares
        own = self.potential.weights
        return weights if own is None else own * weights
