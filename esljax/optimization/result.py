"""What a search returns and what its user sees on the way."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from esljax._types import Array, Float, Scalar
from esljax.results import StandardErrors, in_short, measured, renamed_error
from esljax.schedules import AbstractSchedule


class Equality(NamedTuple):
    """A constraint residual = 0; a residual without this wrapper stands for ≤ 0.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> objective = lambda x, key: (x**2, esl.Equality(x - 2))
        >>> optimum = esl.optimize(objective, 1.0, key=jax.random.key(0), iterations=400)
        >>> round(float(optimum.controls), 1)
        2.0
    """

    residual: Any
    """An array, or a pytree of arrays."""


class Iteration(NamedTuple):
    """One iteration, as a callback sees it."""

    iteration: int
    """Its number, from 0."""
    controls: Any
    """The controls after its step."""
    value: Scalar
    """The objective before its step, on the noise of this iteration; shape ()."""
    residuals: Float[Array, " c"]
    """The c residuals before its step, on the same noise."""
    auxiliary: Any
    """The third part of the objective's return value; None if it has none."""


class History(eqx.Module):
    """The I iterations of a search, each on noise of its own."""

    value: Float[np.ndarray, " I"]
    """The objective before each step."""
    residuals: Float[np.ndarray, "I c"]
    """The c residuals before each step."""
    gradient_norm: Float[np.ndarray, " I"]
    """Norm of the gradient of the augmented Lagrangian, whose objective is divided by its scale,
    before the search cuts it."""


class Optimum(eqx.Module):
    """The best controls found, and how far they can be trusted.

    `value` and `residuals` are means over the held-out keys, not the noisy numbers that the search
    saw; `history` has those. A value judged on the keys that chose among few candidates is
    optimistic by less than its standard error. For a claim, judge `controls` again on other keys.
    `doubts` lists what speaks against the answer, and is empty after a healthy search.
    """

    controls: Any
    """The best controls, a pytree like the controls of the start."""
    value: Scalar
    """Mean of the objective over the held-out keys, shape ()."""
    residuals: Float[Array, " c"]
    """Mean of each residual over the held-out keys."""
    standard_error: StandardErrors
    """Of `value` and `residuals`, over the held-out keys; NaN with one key."""
    errors: str = eqx.field(static=True)
    """The source of the standard errors, in words."""
    satisfied: bool = eqx.field(static=True)
    """Whether every constraint holds to within `tolerance` on the held-out keys."""
    multipliers: Float[Array, " c"]
    """λ: how much the value falls for each unit by which a residual may grow. The mean pull of each
    constraint over the last round; 0 where the constraint is slack and its pull is noise."""
    history: History
    """The iterations."""
    agreement: Float[np.ndarray, " judgments"]
    """g₁·g₂ / ½(‖g₁‖² + ‖g₂‖²) of the gradients of two noises at the same controls: 1 if they are
    equal, their cosine if only their lengths are, near 0 if they are noise. At the start the least
    over the objective and each residual, then of the Lagrangian at the end of each round; NaN where
    both are 0 or the search did not come to it. It falls to 0 at an optimum under noise."""
    message: str = eqx.field(static=True)
    """How the search ended, in a sentence."""
    doubts: tuple[str, ...] = eqx.field(static=True)
    """Reasons not to believe the answer, a sentence or two each; empty if there are none."""
    interrupted: bool = eqx.field(static=True)
    """Whether Ctrl-C ended the search."""

    value_error = renamed_error("value")
    residuals_error = renamed_error("residuals")

    def as_interrupted(self) -> "Optimum":
        """The same optimum, marked as interrupted after it was found."""
        return dataclasses.replace(self, interrupted=True)

    def __str__(self) -> str:
        worst = (
            f", largest residual {float(np.max(self.residuals)):.3g}" if self.residuals.size else ""
        )
        constraints = "constraints satisfied" if self.satisfied else "constraints NOT satisfied"
        error = float(self.standard_error.value)
        value = measured(self.value, None if np.isnan(error) else error)
        summary = (
            f"Optimum: value {value}, {constraints}{worst}, {len(self.history.value)} iterations. "
            f"{self.message}"
        )
        doubts = (f"Doubt: {doubt}" for doubt in self.doubts)
        return "\n".join([summary, *_controls_in_lines(self.controls), *doubts])


# More controls than anyone reads; a network's have tens.
_MOST_LINES = 12


def _controls_in_lines(controls: Any) -> list[str]:
    """A line for each schedule and each array of the controls, by its place among them."""
    named, _ = jax.tree_util.tree_flatten_with_path(
        controls, is_leaf=lambda node: isinstance(node, AbstractSchedule)
    )
    lines = []
    for path, leaf in named:
        value = str(leaf) if isinstance(leaf, AbstractSchedule) else in_short(leaf)
        lines.append(f"Controls{jax.tree_util.keystr(path)}: {value}")
    more = len(lines) - _MOST_LINES
    return lines if more <= 1 else [*lines[:_MOST_LINES], f"... and {more} more controls"]
