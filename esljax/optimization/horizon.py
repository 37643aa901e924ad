r"""How the gradient of a run grows with its number of steps, and where two noises stop to agree.

    ḡ_K = mean over keys of ∂f_K/∂controls,   spread_K = (Σ_r ‖g_r - ḡ‖² / (R - 1))^½ / ‖ḡ‖

A run of K steps multiplies a small change by the product of its Jacobians 1 - ηH. Above the edge of
stability the product grows exponentially with K and differently for each noise, while the value
itself may look its best: the gradient is then exact and of no use.
Reference: Metz, Freeman, Schoenholz, Kachman, "Gradients are not all you need" (2021)
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from esljax._checks import check_key, check_positive_int, door, refuse
from esljax._types import Float, Key
from esljax.optimization.lagrangian import Compiled, Objective, split
from esljax.optimization.probes import AGREE, compared
from esljax.results import StandardErrors, measured, table

# Below the edge the gradient with respect to a schedule grows at most with the learning time, K;
# 10 percent above it, a run of 50 steps has already an exponent of 7.
_EXPLOSIVE = 3.0


class GradientNorms(eqx.Module):
    """Gradients of one objective at H horizons, over R keys each."""

    steps: tuple[int, ...] = eqx.field(static=True)
    """The horizons K, in increasing order; H of them."""
    norm: Float[np.ndarray, " H"]
    """‖ḡ‖, the norm of the mean gradient, in units of the objective per unit of the controls."""
    spread: Float[np.ndarray, " H"]
    """Standard deviation of one gradient over ‖ḡ‖; below 1 the gradients of two noises agree."""
    largest: Float[np.ndarray, " H"]
    """The largest norm among the keys."""
    agreement: Float[np.ndarray, " H"]
    """Mean over all pairs of keys of g₁·g₂ / ½(‖g₁‖² + ‖g₂‖²), which is their cosine where they are
    equally long; NaN where gradients are 0."""
    value: Float[np.ndarray, " H"]
    """Mean of the objective over the keys."""
    standard_error: StandardErrors
    """Of `norm` and `value`, over the keys."""
    errors: str = eqx.field(static=True)
    """The source of the standard errors, in words."""

    @property
    def exploding(self) -> int | None:
        """The first horizon up to which a norm grows faster than K³, or is not finite, or None."""
        for i, steps in enumerate(self.steps):
            if not np.isfinite(self.largest[i]):
                return steps
            if i and self.largest[i - 1] > 0:
                growth = self.largest[i] / self.largest[i - 1]
                if growth > (steps / self.steps[i - 1]) ** _EXPLOSIVE:
                    return steps
        return None

    @property
    def disagreeing(self) -> int | None:
        """The first horizon at which two keys agree to less than 1/3 on average, or None."""
        return next(
            (
                steps
                for steps, agreement in zip(self.steps, self.agreement, strict=True)
                if agreement < AGREE
            ),
            None,
        )

    @property
    def verdict(self) -> str:
        """Up to which horizon a search by gradient can be trusted, in a sentence or two."""
        sentences = []
        if self.exploding is not None:
            i = self.steps.index(self.exploding)
            sentences.append(
                f"Gradients grow {self.largest[i] / self.largest[i - 1]:.2g} times from "
                f"{self.steps[i - 1]} to {self.steps[i]} steps: they explode."
                if np.isfinite(self.largest[i])
                else f"Gradients are not finite at {self.steps[i]} steps: they explode."
            )
        if self.disagreeing is not None:
            least = self.agreement[self.steps.index(self.disagreeing)]
            sentences.append(
                f"At {self.disagreeing} steps gradients of two noises agree to {least:.2g} only, "
                "where 1 is full agreement and 0 none."
            )
        if sentences:
            return " ".join([*sentences, "Lower the learning rate, or take fewer steps."])
        if not self.largest.all():
            still = self.steps[int(np.argmin(self.largest))]
            return f"Gradients are exactly 0 at {still} steps: nothing there says where to go."
        return f"Gradients of two noises agree and do not explode up to {self.steps[-1]} steps."

    def __str__(self) -> str:
        heading = ("steps", "value", "gradient norm", "spread / norm", "largest", "agreement")
        columns = zip(
            self.steps,
            zip(self.value, self.standard_error.value, strict=True),
            zip(self.norm, self.standard_error.norm, strict=True),
            self.spread,
            self.largest,
            self.agreement,
            strict=True,
        )
        rows = [
            (
                str(steps),
                measured(*value, digits=4),
                measured(*norm, digits=4),
                "not resolved" if np.isnan(spread) else f"{spread:.2g}",
                f"{largest:.3g}",
                "not resolved" if np.isnan(agreement) else f"{agreement:.2f}",
            )
            for steps, value, norm, spread, largest, agreement in columns
        ]
        return f"{table([heading, *rows], align='rrrrrr')}\n{self.verdict}"


@door
def gradient_norms(
    objective_of: Callable[[int], Objective],
    controls: object,
    *,
    steps: Sequence[int] = (50, 100, 200),
    key: Key,
    keys: int = 4,
) -> GradientNorms:
    """Measure the gradient of an objective against the number of steps of its run.

    Ask before a search: where the gradients of two noises do not agree, no optimizer finds a way.
    The Jacobian of a run of K steps at rate η and curvature k is (1 - ηk)^K, which grows for
    ηk > 2 and, where curvatures change along the path, may grow for less.

    **Args:**
    - `objective_of`: a function of K to the objective of a run of K steps, itself a function of
      `(controls, key)` as in `optimize`; residuals and auxiliaries are left out.
    - `controls`: where to take the gradient, any pytree; with respect to its floating leaves.
    - `steps`: the horizons K, each compiled once.
    - `key`: the noise r of every horizon is `fold_in(key, r)`.
    - `keys`: R ≥ 2, noises at each horizon.

    **Returns:** `GradientNorms`, which prints as a table with a verdict.
    **Raises:** `InputError` for no horizon, one that is no positive integer, fewer than 2 keys, or
    controls without a floating leaf.
    **Differentiation:** none; this is a loop on the host.

    **Example:** with a `Problem`, the objective of K steps is
    `lambda K: lambda rate, key: dataclasses.replace(problem, steps=K).run(rate, key).final_loss`.

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> potential = esl.Quadratic(1.0)
        >>> start = jax.random.normal(jax.random.key(0), (8, 1))
        >>> def objective_of(steps):
        ...     def loss(rate, key):
        ...         rule = esl.Langevin(rate, 1e-3)
        ...         path = esl.simulate(potential, rule, start, steps=steps, key=key)
        ...         return jnp.mean(potential(path.final))
        ...     return loss
        >>> norms = esl.optimization.gradient_norms(
        ...     objective_of, esl.Constant(0.05), steps=(20, 40), key=jax.random.key(1)
        ... )
        >>> print(norms.verdict)
        Gradients of two noises agree and do not explode up to 40 steps.
    """
    if not callable(objective_of):
        raise refuse(
            "objective_of", "be a function of the steps to an objective", f"is {objective_of!r}"
        )
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise refuse("steps", "be at least one number of steps", f"is {steps!r}")
    for count in steps:
        check_positive_int("steps", count)
    check_positive_int("keys", keys, 2)
    check_key("key", key)
    moving, fixed = split(controls)
    horizons = tuple(sorted({int(count) for count in steps}))
    numbers = [_of_horizon(objective_of(count), moving, fixed, key, keys) for count in horizons]
    norm, spread, largest, agreement, value, norm_error, value_error = np.array(numbers).T
    return GradientNorms(
        steps=horizons,
        norm=norm,
        spread=spread,
        largest=largest,
        agreement=agreement,
        value=value,
        standard_error=StandardErrors({"norm": norm_error, "value": value_error}),
        errors=f"spread over {keys} keys",
    )


def _of_horizon(
    objective: Objective, moving: object, fixed: object, key: Key, keys: int
) -> tuple[float, ...]:
    """The numbers of one horizon, in the order of `gradient_norms`."""
    compiled = Compiled(objective, fixed, None)
    values, gradients = [], []
    for r in range(keys):
        value, gradient = _value_and_gradient(compiled, moving, jax.random.fold_in(key, r))
        values.append(float(value))
        gradients.append(np.asarray(gradient, float))
    stacked = np.stack(gradients)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean = stacked.mean(axis=0)
        norm = np.linalg.norm(mean)
        deviation = np.sqrt(np.sum((stacked - mean) ** 2) / (keys - 1))
        along = np.zeros(keys) if norm == 0 else stacked @ mean / norm
        pairs = [compared(stacked[i], stacked[j])[0] for i in range(keys) for j in range(i)]
        # A gradient that is 0 has no direction.
        known = [agreement for agreement in pairs if not np.isnan(agreement)]
        return (
            float(norm),
            float(deviation / norm),
            float(np.max(np.linalg.norm(stacked, axis=1))),
            float(np.mean(known)) if known else np.nan,
            float(np.mean(values)),
            float(np.std(along, ddof=1) / np.sqrt(keys)),
            float(np.std(values, ddof=1) / np.sqrt(keys)),
        )


@eqx.filter_jit
def _value_and_gradient(compiled: Compiled, moving: object, key: Key):
    def of(moving):
        return compiled.evaluate(moving, key)[0]

    value, gradient = jax.value_and_grad(of)(moving)
    return value, ravel_pytree(gradient)[0]
