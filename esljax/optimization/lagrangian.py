"""The augmented Lagrangian of an objective with constraints, and its compiled pieces.

    f/|f₀| + Σ (max(0, λ + μ r)² - λ²)/2μ + Σ (λ h + μ h²/2)

Reference: Hestenes (1969); Powell (1969); Nocedal and Wright, Numerical Optimization (2006), ch. 17
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from esljax._checks import as_float, refuse
from esljax._types import Array, Key, Keys
from esljax.optimization.result import Equality

Objective = Callable[[Any, Key], Any]


def split(controls: Any) -> tuple[Any, Any]:
    """Controls as their floating leaves, which move, and all else; Python floats become arrays.

    **Raises:** `InputError` if there is no floating leaf.
    """
    controls = jax.tree.map(
        lambda leaf: as_float(leaf) if isinstance(leaf, float | np.floating) else leaf, controls
    )
    moving, fixed = eqx.partition(controls, eqx.is_inexact_array)
    if not jax.tree.leaves(moving):
        raise refuse("controls", "have at least one floating-point leaf to optimize", "has none")
    return moving, fixed


class Dual(NamedTuple):
    """Multipliers and penalties of the augmented Lagrangian, for the objective over a scale."""

    multipliers: Array
    """λ, shape (c,)."""
    penalty: Array
    """μ of each residual, shape (c,)."""
    scale: Array
    pull: Array
    """Mean of λ + μ r over the present round: the force that each constraint really exerts."""

    def pulled(self, residuals: Array, equalities: np.ndarray) -> Array:
        """λ + μ r, which may push but not pull on an inequality."""
        pulled = self.multipliers + self.penalty * residuals
        return jnp.where(equalities, pulled, jnp.maximum(pulled, 0))

    def moved(self, residuals: Array, equalities: np.ndarray, share: float, count: int) -> "Dual":
        """The multipliers a share of the way to λ + μ r; `count` iterations of the round passed."""
        pull = self.pull + (self.pulled(residuals, equalities) - self.pull) / (count + 1)
        ahead = self._replace(penalty=share * self.penalty).pulled(residuals, equalities)
        return self._replace(multipliers=ahead, pull=pull)

    def only(self, which: int | None) -> "Dual":
        """The multiplier 1 of one residual and no penalty to speak of; None: the objective alone.

        Under it the compiled step gives the gradient of the objective, or of its sum with one
        residual.
        """
        none = jnp.zeros_like(self.multipliers)
        return self._replace(
            multipliers=none if which is None else none.at[which].set(1),
            penalty=jnp.full_like(self.penalty, 1e-6),
        )


class Seen(NamedTuple):
    """The numbers of one step."""

    value: Array
    residuals: Array
    gradients: Any
    """Of the augmented Lagrangian, before they are cut."""
    auxiliary: Any


class Compiled(eqx.Module):
    """The compiled pieces of a search."""

    objective: Objective
    fixed: Any
    """The controls without their floating leaves."""
    optimizer: Any

    def evaluate(self, moving: Any, key: Key) -> tuple[Array, Array, np.ndarray, Any]:
        """The value, residuals (c,), which of them are equalities (c,), and the auxiliary."""
        answer = self.objective(eqx.combine(moving, self.fixed), key)
        value, residuals, auxiliary = (
            (*answer, None)[:3] if isinstance(answer, tuple) else (answer, (), None)
        )
        parts = jax.tree.leaves(residuals, is_leaf=lambda leaf: isinstance(leaf, Equality))
        flat = [ravel_pytree(part)[0] for part in parts]
        kinds = [
            np.full(x.size, isinstance(part, Equality)) for part, x in zip(parts, flat, strict=True)
        ]
        value = jnp.asarray(value)
        if value.shape != ():
            raise refuse(
                "objective",
                "return a scalar, or (scalar, residuals)",
                f"returned shape {value.shape}",
            )
        stacked = jnp.concatenate([jnp.zeros(0, value.dtype), *flat]).astype(value.dtype)
        return value, stacked, np.concatenate([np.zeros(0, bool), *kinds]), auxiliary

    def equalities(self, moving: Any) -> np.ndarray:
        """Which residuals are equalities (c,), known from shapes alone."""
        kinds = []
        jax.eval_shape(
            lambda moving: kinds.append(self.evaluate(moving, jax.random.key(0))[2]), moving
        )
        return kinds[0]

    @eqx.filter_jit
    def judge(self, moving: Any, keys: Keys) -> tuple[Array, Array, Array, Array]:
        """Means and standard errors over the keys: of the value, then of the residuals."""
        values, residuals = jax.lax.map(lambda key: self.evaluate(moving, key)[:2], keys)
        count = keys.shape[0]

        def error(x):
            return (
                jnp.std(x, axis=0, ddof=1) / np.sqrt(count)
                if count > 1
                else jnp.full_like(x[0], jnp.nan)
            )

        return (
            jnp.mean(values, axis=0),
            error(values),
            jnp.mean(residuals, axis=0),
            error(residuals),
        )

    @eqx.filter_jit
    def step(
        self, moving: Any, memory: Any, dual: Dual, key: Key, limit: Array
    ) -> tuple[Any, Any, Seen]:
        """One step of the optimizer on the augmented Lagrangian, its gradient cut to a norm."""

        def lagrangian(moving):
            value, residuals, equalities, auxiliary = self.evaluate(moving, key)
            terms = (dual.pulled(residuals, equalities) ** 2 - dual.multipliers**2) / (
                2 * dual.penalty
            )
            return value / dual.scale + jnp.sum(terms), (value, residuals, auxiliary)

        (merit, (value, residuals, auxiliary)), gradients = jax.value_and_grad(
            lagrangian, has_aux=True
        )(moving)
        norm = jnp.linalg.norm(ravel_pytree(gradients)[0])
        # Exactly 1 for a gradient of the usual size, whose bits then stay as they are.
        factor = jnp.where(norm > limit, limit / norm, 1)
        cut = jax.tree.map(lambda x: x * factor.astype(x.dtype), gradients)
        updates, memory = self.optimizer.update(
            cut,
            memory,
            moving,
            value=merit,
            grad=cut,
            value_fn=lambda moving: lagrangian(moving)[0],
        )
        return (
            optax.apply_updates(moving, updates),
            memory,
            Seen(value, residuals, gradients, auxiliary),
        )
