r"""How to differentiate through a run: the values of `simulate(..., gradient=...)`.

The cost of a run is its forces. The reverse sweep needs, at every step, the product of the force's Jacobian with a cotangent. For a force
that is a gradient the Jacobian is the Hessian, which is symmetric, so the product is a directional derivative,

    J(θ)ᵀ w = H(θ) w = d/dε ∇Φ(θ + ε w),

and needs neither the intermediate results of the model nor a second reverse sweep through it. The primitive is the whole kick η∇Φ(θ), not
the gradient: its derivative in η is w·∇Φ, a number that the directional derivative has on its way, so no gradient is kept either.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from esljax._checks import refuse
from esljax._types import Array, Float, Key
from esljax.potentials import AbstractPotential


class AbstractGradient(eqx.Module):
    """A way to differentiate a run."""

    recompute: eqx.AbstractVar[bool]
    """Whether to keep about 2√K states and recompute the others, instead of keeping all K."""

    @abc.abstractmethod
    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        """Energies (n,) and `scale` times the gradients (n, d), on the batches that `key` addresses."""

    @abc.abstractmethod
    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`run`, a function of one pytree of arrays, with this way of differentiating the whole of it."""


class HessianAdjoint(AbstractGradient):
    """Reverse mode by Hessian-vector products: the cheapest gradient in many numbers.

    Keeps the positions of every step, or with `recompute=True` about 2√K of them at the price of running forward twice.
    Supports `jax.grad` and `jax.vjp`; forward mode is refused by JAX (use `ForwardMode`).
    """

    recompute: bool = eqx.field(static=True, default=False)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        return _adjoint_kick((potential, positions, scale), key)

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return run


class Autodiff(AbstractGradient):
    """JAX's own differentiation of every operation. Forward and reverse, any order; reverse mode keeps what the model computed at every
    step, or with `recompute=True` about 2√K times as much."""

    recompute: bool = eqx.field(static=True, default=False)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return run


class ForwardMode(AbstractGradient):
    """Tangents pushed along the run, one for each number that it is differentiated in: memory does not grow with the number of steps.

    `jax.jvp`, `jax.jacfwd` and `jax.grad` all work, and all compute the Jacobian of the snapshots in the perturbed numbers forward, so
    this is for few controls. More than `most` of them raise `InputError` (an initial ensemble of n·d numbers, say).
    """

    most: int = eqx.field(static=True, default=256)
    recompute: bool = eqx.field(static=True, default=False, init=False)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @jax.custom_jvp
        def forward(inputs):
            return run(inputs)

        def jvp(primals, tangents):
            ((inputs,), (tangents,)) = primals, tangents
            leaves, structure = jax.tree.flatten(inputs)
            directions = structure.flatten_up_to(tangents)
            moved = [
                i
                for i, direction in enumerate(directions)
                if not isinstance(direction, SymbolicZero)
            ]
            controls, unravel = ravel_pytree([leaves[i] for i in moved])
            direction, _ = ravel_pytree([directions[i] for i in moved])
            if controls.size > self.most:
                raise refuse(
                    "gradient",
                    "not be ForwardMode for so many numbers",
                    f"would push {controls.size} tangents, over {self.most}",
                )

            def of_controls(values):
                replaced = dict(zip(moved, unravel(values), strict=True))
                return run(
                    structure.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
                )

            outputs = of_controls(controls)
            jacobian = jax.jacfwd(of_controls)(controls)
            return outputs, jax.tree.map(
                lambda block: jnp.dot(block, direction.astype(block.dtype), precision="highest"),
                jacobian,
            )

        forward.defjvp(jvp, symbolic_zeros=True)
        return forward


def _kick(
    potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, batches: Any
) -> tuple[Array, Array]:
    energies, gradients = jax.vmap(potential.energy_and_gradient)(positions, batches)
    return energies, scale * gradients


@eqx.filter_custom_vjp
def _adjoint_kick(arguments, key):
    potential, positions, scale = arguments
    return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))


@_adjoint_kick.def_fwd
def _adjoint_kick_forward(perturbed, arguments, key):
    potential, positions, scale = arguments
    batches = potential.draw(key, positions.shape[0])
    return _kick(potential, positions, scale, batches), batches


@_adjoint_kick.def_bwd
def _adjoint_kick_backward(batches, cotangents, perturbed, arguments, key):
    energy_bar, kick_bar = cotangents

    def paired(arguments):
        """Σ_i (ē_i Φ(θ_i) + η w_i·∇Φ(θ_i)), whose gradient is ē ∇Φ + η H w: one reverse sweep over one directional derivative."""
        potential, positions, scale = arguments

        def energies(positions):
            return jax.vmap(potential.energy)(positions, batches)

        if kick_bar is None:
            return jnp.vdot(energy_bar, energies(positions))
        values, slopes = jax.jvp(energies, (positions,), (kick_bar,))
        return scale * jnp.sum(slopes) + (0 if energy_bar is None else jnp.vdot(energy_bar, values))

    def paired_with_drift(arguments):
        """The same for a drift that is no gradient: its own derivative, not that of the energy's."""
        potential, positions, scale = arguments
        outputs = _kick(potential, positions, scale, batches)
        return sum(
            jnp.vdot(bar, x) for bar, x in zip(cotangents, outputs, strict=True) if bar is not None
        )

    return eqx.filter_grad(paired if arguments[0].conservative else paired_with_drift)(arguments)
