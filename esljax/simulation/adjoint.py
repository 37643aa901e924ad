r"""How to differentiate through a run: the values of `simulate(..., gradient=...)`.

The cost of a run is its forces. The backward pass needs, at every step, the product of the force's
Jacobian with a cotangent. For a force that is a gradient the Jacobian is the Hessian, which is
symmetric, so the product is a directional derivative,

    J(θ)ᵀ w = H(θ) w = d/dε ∇Φ(θ + ε w),

and needs neither the intermediate results of the model nor a second backward pass through it. The
primitive is the whole kick η∇Φ(θ), not the gradient: its derivative in η is w·∇Φ, a number that the
directional derivative computes on its way, so no gradient is stored either.
"""

import abc
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from esljax._checks import InputError, door, plain_int
from esljax._numerics import divisors, product
from esljax._types import Array, Float, Key
from esljax.potentials import AbstractPotential


class AbstractGradient(eqx.Module):
    """A way to differentiate a run.

    A subclass is an `equinox.Module` with a field `recompute` and two methods: `kick` computes the
    forces of one step, with derivatives of its choice, and `wrap` may change how the whole run is
    differentiated. All ways give the same numbers.

    **Example:** plain automatic differentiation.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> class Plain(esl.AbstractGradient):
        ...     recompute: bool = False
        ...
        ...     def kick(self, potential, positions, scale, key):
        ...         batches = potential.draw(key, len(positions))
        ...         energies, slopes = jax.vmap(potential.energy_and_gradient)(positions, batches)
        ...         return energies, scale * slopes
        ...
        ...     def wrap(self, run):
        ...         return run
        >>> def spread(rate):
        ...     return jnp.sum(esl.simulate(
        ...         esl.Quadratic(1.0), esl.Langevin(rate), jnp.ones((2, 1)), steps=1, snapshots=1,
        ...         key=jax.random.key(0), gradient=Plain()).final)
        >>> float(jax.grad(spread)(0.25))
        -2.0
    """

    recompute: eqx.AbstractVar[bool]
    """Whether to store about 2√K states and recompute the others, instead of storing all K."""

    @abc.abstractmethod
    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        """Energies (n,) and `scale` times the gradients (n, d), on the batches that `key`
        addresses."""

    @abc.abstractmethod
    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`run`, a function of one pytree of arrays, with this way of differentiating all of it."""


class HessianAdjoint(AbstractGradient):
    """Reverse mode by Hessian-vector products: the cheapest gradient in many numbers.

    **Args:** `recompute`: whether to store about 2√K positions, at the price of running forward
    twice, instead of the positions of every step.
    **Differentiation:** `jax.grad` and `jax.vjp`; JAX rejects forward mode (use `ForwardMode`).

    **Example:**

        >>> import esljax as esl
        >>> esl.HessianAdjoint(recompute=True).recompute
        True
    """

    recompute: bool = eqx.field(static=True)

    def __init__(self, recompute: bool = False, *, checkpoint: bool | None = None):
        self.recompute = _renamed("HessianAdjoint", recompute, checkpoint)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        # To jax_debug_key_reuse, a key that enters a custom derivative is used twice.
        bits, kind = jax.random.key_data(key), jax.random.key_impl(key)
        return _adjoint_kick((potential, positions, scale), bits, kind)

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return run


class Autodiff(AbstractGradient):
    """JAX's own differentiation of every operation.

    **Args:** `recompute`: whether reverse mode stores the model's intermediate results of about 2√K
    steps instead of all K.
    **Differentiation:** forward and reverse, of any order.

    **Example:**

        >>> import esljax as esl
        >>> esl.Autodiff().recompute
        False
    """

    recompute: bool = eqx.field(static=True)

    def __init__(self, recompute: bool = False, *, checkpoint: bool | None = None):
        self.recompute = _renamed("Autodiff", recompute, checkpoint)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return run


class ForwardMode(AbstractGradient):
    """Tangents pushed along the run, one for each number that it is differentiated in: memory does
    not grow with the number of steps.

    This is for few controls, because every transformation computes the whole Jacobian of the
    snapshots in the perturbed numbers.

    **Args:** `most`: the most tangents to push; more of them, such as the n·d numbers of an initial
    ensemble, raise `InputError`.
    **Differentiation:** `jax.jvp`, `jax.jacfwd` and `jax.grad`.

    **Example:**

        >>> import esljax as esl
        >>> esl.ForwardMode(most=16).most
        16
    """

    most: int = eqx.field(static=True, converter=plain_int, default=256)
    recompute: bool = eqx.field(static=True, default=False, init=False)

    def kick(
        self, potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, key: Key
    ) -> tuple[Array, Array]:
        return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @jax.custom_jvp
        def forward(inputs):
            return run(inputs)

        @door
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
                raise InputError(
                    f"ForwardMode would push {controls.size} tangents, but `most` allows "
                    f"{self.most}: raise `most` or use HessianAdjoint()."
                )

            def of_controls(values):
                replaced = dict(zip(moved, unravel(values), strict=True))
                return run(
                    structure.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)])
                )

            outputs = of_controls(controls)
            jacobian = jax.jacfwd(of_controls)(controls)
            return outputs, jax.tree.map(
                lambda block: product(block, direction.astype(block.dtype)), jacobian
            )

        forward.defjvp(jvp, symbolic_zeros=True)
        return forward


def group_length(steps: int, snapshots: int) -> int:
    """How many steps are recomputed at a time, of K steps with J links between snapshots.

    The divisor of K/J nearest to √K on a log scale: storing the ends of all groups and the inside
    of one costs about 2√K states.
    """
    link = steps // snapshots
    return min(divisors(link), key=lambda c: abs(np.log(c / np.sqrt(steps))))


def _renamed(gradient: str, recompute: bool, checkpoint: bool | None) -> bool:
    """The value of `recompute`, which was called `checkpoint` in 0.1."""
    if checkpoint is None:
        return recompute
    names = f"{gradient}(checkpoint=) is now {gradient}(recompute=)"
    warnings.warn(
        f"{names}; the old name goes with the next release.", DeprecationWarning, stacklevel=5
    )
    return checkpoint


def _kick(
    potential: AbstractPotential, positions: Float[Array, "n d"], scale: Array, batches: Any
) -> tuple[Array, Array]:
    # A potential that computes in 16 bits, or in 64, moves members of their own precision.
    energies, gradients = jax.tree.map(
        lambda x: x.astype(positions.dtype),
        jax.vmap(potential.energy_and_gradient)(positions, batches),
    )
    return energies, scale * gradients


@eqx.filter_custom_vjp
def _adjoint_kick(arguments, bits, kind):
    potential, positions, scale = arguments
    key = jax.random.wrap_key_data(bits, impl=kind)
    return _kick(potential, positions, scale, potential.draw(key, positions.shape[0]))


@_adjoint_kick.def_fwd
def _adjoint_kick_forward(perturbed, arguments, bits, kind):
    potential, positions, scale = arguments
    key = jax.random.wrap_key_data(bits, impl=kind)
    batches = potential.draw(key, positions.shape[0])
    return _kick(potential, positions, scale, batches), batches


@_adjoint_kick.def_bwd
@door
def _adjoint_kick_backward(batches, cotangents, perturbed, arguments, bits, kind):
    energy_bar, kick_bar = cotangents

    def paired(arguments):
        """Σ_i (ē_i Φ(θ_i) + η w_i·∇Φ(θ_i)), whose gradient is ē ∇Φ + η H w: one backward pass over
        one directional derivative."""
        potential, positions, scale = arguments

        def energies(positions):
            return jax.vmap(potential.energy)(positions, batches)

        if kick_bar is None:
            return jnp.vdot(energy_bar, energies(positions))
        values, slopes = jax.jvp(energies, (positions,), (kick_bar,))
        return scale * jnp.sum(slopes) + (0 if energy_bar is None else jnp.vdot(energy_bar, values))

    def paired_with_drift(arguments):
        """The same for a drift that is no gradient, by the derivative of the drift itself."""
        potential, positions, scale = arguments
        outputs = _kick(potential, positions, scale, batches)
        return sum(
            jnp.vdot(bar, x) for bar, x in zip(cotangents, outputs, strict=True) if bar is not None
        )

    return eqx.filter_grad(paired if arguments[0].conservative else paired_with_drift)(arguments)
