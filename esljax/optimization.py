r"""Gradient optimization of any pytree of controls, under constraints, with fresh noise at every iteration.

    minimize E f(controls)   subject to   E r(controls) ≤ 0,   E h(controls) = 0

by the augmented Lagrangian: minimize f + Σ (max(0, λ + μ r)² - λ²)/2μ + Σ (λ h + μ h²/2) for a while, then move the multipliers to
max(0, λ + μ r) and λ + μ h, and repeat. Candidates are compared on keys that no gradient ever saw.
Source: Hestenes (1969), Powell (1969); Nocedal and Wright, Numerical Optimization (2006), ch. 17.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from esljax._checks import (
    as_float,
    check_key,
    check_nonnegative,
    check_positive,
    check_positive_int,
    refuse,
)
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.files import Checkpoints, session
from esljax.sharding import AnyMesh, find_mesh, replicate


class Equality(NamedTuple):
    """Wrap a residual in this to ask for = 0 instead of ≤ 0."""

    residual: Any


class Iteration(NamedTuple):
    """What a callback sees after each iteration."""

    iteration: int
    controls: Any
    value: Scalar
    residuals: Float[Array, " c"]
    auxiliary: Any


class History(eqx.Module):
    """The iterations as they went, on the noise of each; I of them."""

    value: Float[np.ndarray, " I"]
    residuals: Float[np.ndarray, "I c"]
    gradient_norm: Float[np.ndarray, " I"]


class Optimum(eqx.Module):
    """The best controls found, and how far they can be trusted.

    `value` and `residuals` are means over the held-out keys (their standard errors beside them: nan from one key), not the noisy numbers
    that the search saw; `history` has those. A value judged on the keys that chose among few candidates is optimistic by less than its
    standard error; for a claim, judge `controls` again on keys of your own.
    """

    controls: Any
    value: Scalar
    value_error: Scalar
    residuals: Float[Array, " c"]
    residuals_error: Float[Array, " c"]
    satisfied: bool = eqx.field(static=True)
    """Whether every constraint holds to within `tolerance` on the held-out keys."""
    multipliers: Float[Array, " c"]
    history: History
    message: str = eqx.field(static=True)
    interrupted: bool = eqx.field(static=True)

    def as_interrupted(self) -> "Optimum":
        """The same optimum, marked as interrupted after it was found."""
        return dataclasses.replace(self, interrupted=True)

    def __str__(self) -> str:
        worst = (
            f", largest residual {float(np.max(self.residuals)):.3g}" if self.residuals.size else ""
        )
        kept = "constraints satisfied" if self.satisfied else "constraints NOT satisfied"
        error = "" if np.isnan(float(self.value_error)) else f" ± {float(self.value_error):.2g}"
        return f"Optimum: value {float(self.value):.6g}{error}, {kept}{worst}, {len(self.history.value)} iterations. {self.message}"


Objective = Callable[[Any, Key], Any]


def optimize(
    objective: Objective,
    controls: Any,
    *,
    key: Key,
    iterations: int,
    optimizer: optax.GradientTransformation | None = None,
    rounds: int = 8,
    validation: int = 1,
    tolerance: float = 1e-3,
    penalty: float = 10.0,
    callback: Callable[[Iteration], None] | None = None,
    checkpoints: Checkpoints | None = None,
    mesh: AnyMesh | None = None,
) -> Optimum:
    """Minimize `objective` over the floating leaves of `controls` by gradient.

    **Args:**
    - `objective`: `objective(controls, key)` to a scalar; or `(scalar, residuals)`, a pytree of residuals, wanted ≤ 0, or
      = 0 inside `Equality`; or `(scalar, residuals, auxiliary)`, the last for the callback. Make residuals relative: `loss/target - 1`.
    - `controls`: where to start, any pytree. - `key`: iteration i sees `fold_in(key, i)`, fresh noise each time.
    - `iterations`: gradient steps.
    - `optimizer`: any optax transformation; by default Adam with rate 0.15 falling to 0 on a cosine and short memories (β = .8, .95), right
      for controls on a log scale such as `Knots` and some tens of iterations. `optax.lbfgs()` suits objectives without noise.
    - `rounds`: how often the multipliers move and a candidate is judged. - `validation`: held-out keys for each judgment.
    - `tolerance`: residual up to which a constraint counts as satisfied. - `penalty`: μ, for an objective divided by its first value.
    - `callback`: sees an `Iteration` after each; what it raises ends the search, and `KeyboardInterrupt` ends it with the best so far.
    - `checkpoints`: where to save the search between iterations, so that it survives its process; see `Checkpoints`. Taken up again it
      ends with the very bits of a search that nothing disturbed.
    - `mesh`: the devices that every run in `objective` is spread over, such as `member_mesh()`, as if all of it stood under
      `jax.set_mesh`. By default each run lies where its own `mesh` or its `positions` say.

    **Returns:** `Optimum`. A value or gradient that is not finite, or explodes, ends the search: the best so far is returned and `message`
    names the iteration and the likely cause.
    **Raises:** `InputError` if `controls` has no floating leaf, or the first value or gradient is already not finite.
    **Differentiation:** none; this is a loop on the host around one compiled step.

    **Example:**

        >>> import jax, jax.numpy as jnp
        >>> print(optimize(lambda x, key: (x - 3) ** 2, jnp.array(0.0), key=jax.random.key(0), iterations=200).satisfied)
        True
    """
    check_positive_int("iterations", iterations)
    check_positive_int("rounds", rounds)
    check_positive_int("validation", validation)
    check_positive("penalty", penalty)
    check_nonnegative("tolerance", tolerance)
    if not callable(objective):
        raise refuse("objective", "be a function of (controls, key)", f"is {objective!r}")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise refuse("optimizer", "be an optax optimizer", f"is {optimizer!r}")
    check_key("key", key)
    mesh = find_mesh(mesh, None)
    controls = jax.tree.map(
        lambda leaf: as_float(leaf) if isinstance(leaf, float | np.floating) else leaf, controls
    )
    # Laid out from the start as they will come back, so that each step compiles once.
    controls, key = replicate((controls, key), mesh)
    moving, fixed = eqx.partition(controls, eqx.is_inexact_array)
    if not jax.tree.leaves(moving):
        raise refuse("controls", "have at least one floating-point leaf to optimize", "has none")
    optimizer = _default_optimizer(iterations) if optimizer is None else optimizer
    search = _Search(objective, fixed, optax.with_extra_args_support(optimizer))

    # fold_in counts iterations from 0 up; the held-out keys sit behind the last of them.
    held_out = jax.vmap(lambda i: jax.random.fold_in(key, i))(iterations + jnp.arange(validation))
    run = {
        "iterations": iterations,
        "rounds": rounds,
        "validation": validation,
        "tolerance": tolerance,
        "penalty": penalty,
    }
    run |= {"objective": objective, "controls": controls, "optimizer": optimizer, "key": key}
    within = jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()
    with within, session(checkpoints, run) as saved:
        best = _Candidate(moving, *search.judge(moving, held_out))
        equalities = search.equalities(moving)
        # An objective that starts at 0 has no scale of its own.
        scale = jnp.where(best.value == 0, 1, jnp.abs(best.value))
        dual = _Dual(
            jnp.zeros_like(best.residuals), as_float(penalty).astype(best.value.dtype), scale
        )
        state, dual = replicate((search.optimizer.init(moving), dual), mesh)
        last_good, rows = moving, []
        message, interrupted = "Ran all iterations.", False
        kept = (moving, state, dual, best, last_good)
        restored = saved.restore(
            lambda done: (kept, _table([(0.0, best.residuals, 0.0)] * done, best))
        )
        if restored is None:
            done, dual = (
                0,
                replicate(
                    search.first_multipliers(
                        moving, state, dual, equalities, jax.random.fold_in(key, 0)
                    ),
                    mesh,
                ),
            )
        else:
            done, ((moving, state, dual, best, last_good), table) = restored
            rows = [
                (float(value), np.asarray(residuals), float(norm))
                for value, residuals, norm in zip(*table, strict=True)
            ]
        ends = set(
            np.linspace(0, iterations, min(rounds, iterations) + 1).round().astype(int)[1:] - 1
        )
        kept = (moving, state, dual, best, last_good)
        try:
            for i in range(done, iterations):
                moved, state, seen = search.step(moving, state, dual, jax.random.fold_in(key, i))
                value, residuals, norm = (
                    float(seen.value),
                    np.asarray(seen.residuals),
                    float(optax.tree.norm(seen.gradients)),
                )
                trouble = _trouble(i, value, residuals, norm, [row[2] for row in rows])
                if trouble and not rows:
                    raise refuse(
                        "controls",
                        "start where the objective and its gradient are finite",
                        f"give: {trouble}",
                    )
                if trouble:
                    message = trouble
                    best = best.or_better(
                        _Candidate(last_good, *search.judge(last_good, held_out)),
                        equalities,
                        tolerance,
                        dual,
                    )
                    break
                rows.append((value, residuals, norm))
                last_good = moving
                moving, dual = moved, dual.moved(seen.residuals, equalities, rounds / iterations)
                if callback is not None:
                    callback(
                        Iteration(
                            i,
                            eqx.combine(moving, fixed),
                            seen.value,
                            seen.residuals,
                            seen.auxiliary,
                        )
                    )
                if i in ends:
                    best = best.or_better(
                        _Candidate(moving, *search.judge(moving, held_out)),
                        equalities,
                        tolerance,
                        dual,
                    )
                done, kept = i + 1, (moving, state, dual, best, last_good)
                saved.offer(
                    done, lambda kept=kept: (kept, _table(rows, kept[3])), last=done == iterations
                )
        except KeyboardInterrupt:
            interrupted = True
            saved.offer(done, lambda: (kept, _table(rows[:done], best)), last=True)
            message = f"Interrupted after {len(rows)} of {iterations} iterations; this is the best so far."
            best = best.or_better(
                _Candidate(moving, *search.judge(moving, held_out)), equalities, tolerance, dual
            )
    return Optimum(
        controls=eqx.combine(best.controls, fixed),
        value=best.value,
        value_error=best.value_error,
        residuals=best.residuals,
        residuals_error=best.residuals_error,
        satisfied=bool(np.all(best.violations(equalities) <= tolerance)),
        multipliers=dual.multipliers * dual.scale,
        history=History(*_table(rows, best)),
        message=message,
        interrupted=interrupted,
    )


def _table(rows: list[tuple], best: "_Candidate") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the history as arrays, in the types that they were measured in, so that a checkpoint gives back the very bits."""
    values, residuals, norms = zip(*rows, strict=True) if rows else ((), (), ())
    # The number of residuals is said, for without rows it cannot be found.
    table = np.asarray(residuals, best.residuals.dtype).reshape(len(rows), best.residuals.size)
    return np.asarray(values, float), table, np.asarray(norms, float)


def _default_optimizer(iterations: int) -> optax.GradientTransformation:
    # Adam's usual β₂ = .999 remembers the first, largest gradients through a search of tens of iterations and brakes its end.
    return optax.adam(optax.cosine_decay_schedule(0.15, iterations), b1=0.8, b2=0.95)


class _Dual(NamedTuple):
    multipliers: Array
    penalty: Array
    scale: Array

    def pulled(self, residuals: Array, equalities: np.ndarray) -> Array:
        """λ + μ r, which may push but not pull on an inequality."""
        pulled = self.multipliers + self.penalty * residuals
        return jnp.where(equalities, pulled, jnp.maximum(pulled, 0))

    def moved(self, residuals: Array, equalities: np.ndarray, share: float) -> "_Dual":
        return self._replace(
            multipliers=self._replace(penalty=share * self.penalty).pulled(residuals, equalities)
        )


class _Seen(NamedTuple):
    value: Array
    residuals: Array
    gradients: Any
    auxiliary: Any


class _Candidate(NamedTuple):
    """Controls and what the held-out keys say of them."""

    controls: Any
    value: Array
    value_error: Array
    residuals: Array
    residuals_error: Array

    def violations(self, equalities: np.ndarray) -> np.ndarray:
        residuals = np.asarray(self.residuals)
        return np.where(equalities, np.abs(residuals), np.maximum(residuals, 0))

    def or_better(
        self, other: "_Candidate", equalities: np.ndarray, tolerance: float, dual: "_Dual"
    ) -> "_Candidate":
        """The smaller value among those that satisfy the constraints; failing that, the smaller exact penalty.

        An order by violation alone would keep a poor candidate for being nearer to its constraints by next to nothing.
        """

        def rank(candidate: "_Candidate") -> tuple[bool, float]:
            violations = candidate.violations(equalities)
            violated = bool(np.any(~(violations <= tolerance)))
            # The penalty is exact if its slope exceeds the multipliers.
            slopes = np.maximum(2 * np.abs(np.asarray(dual.multipliers)), float(dual.penalty))
            return violated, float(candidate.value) + violated * float(dual.scale) * float(
                slopes @ violations
            )

        return other if np.isfinite(rank(other)[1]) and rank(other) < rank(self) else self


class _Search(eqx.Module):
    """The compiled pieces."""

    objective: Objective
    fixed: Any
    optimizer: Any

    def evaluate(self, moving: Any, key: Key) -> tuple[Array, Array, np.ndarray, Any]:
        """Value, residuals (c,), which of them are equalities (c,), auxiliary."""
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
        found = []
        jax.eval_shape(
            lambda moving: found.append(self.evaluate(moving, jax.random.key(0))[2]), moving
        )
        return found[0]

    @eqx.filter_jit
    def judge(self, moving: Any, keys: Keys) -> tuple[Array, Array, Array, Array]:
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
    def step(self, moving: Any, state: Any, dual: _Dual, key: Key) -> tuple[Any, Any, _Seen]:
        def lagrangian(moving):
            value, residuals, equalities, auxiliary = self.evaluate(moving, key)
            terms = (dual.pulled(residuals, equalities) ** 2 - dual.multipliers**2) / (
                2 * dual.penalty
            )
            return value / dual.scale + jnp.sum(terms), (value, residuals, auxiliary)

        (merit, (value, residuals, auxiliary)), gradients = jax.value_and_grad(
            lagrangian, has_aux=True
        )(moving)
        updates, state = self.optimizer.update(
            gradients,
            state,
            moving,
            value=merit,
            grad=gradients,
            value_fn=lambda moving: lagrangian(moving)[0],
        )
        return (
            optax.apply_updates(moving, updates),
            state,
            _Seen(value, residuals, gradients, auxiliary),
        )

    def first_multipliers(
        self, moving: Any, state: Any, dual: _Dual, equalities: np.ndarray, key: Key
    ) -> _Dual:
        """The least-squares multipliers, min_λ ‖∇f + Σ λ ∇r‖, so that the search starts along the constraints that hold already.

        The gradients of f and of each residual come from the compiled step itself, with multipliers (0, ...), (1, 0, ...), and so on.
        """
        weak, none = jnp.full_like(dual.penalty, 1e-6), jnp.zeros_like(dual.multipliers)
        units = [none, *(none.at[i].set(1) for i in range(none.size))]
        seen = [
            self.step(moving, state, dual._replace(multipliers=unit, penalty=weak), key)[2]
            for unit in units
        ]
        of_value, *sums = (np.asarray(ravel_pytree(each.gradients)[0]) for each in seen)
        if not sums or not np.all(np.isfinite([of_value, *sums])):
            return dual
        multipliers = np.linalg.lstsq(np.stack([x - of_value for x in sums], axis=1), -of_value)[0]
        # A residual that is flat at the start asks for any multiplier; what the penalty makes of a residual of 10 is more than enough.
        multipliers = np.clip(multipliers, -10 * float(dual.penalty), 10 * float(dual.penalty))
        return dual._replace(
            multipliers=jnp.asarray(
                np.where(equalities, multipliers, np.maximum(multipliers, 0)), dual.penalty.dtype
            )
        )


# A gradient this many times the usual one comes from a run that leaves the stable range of its step, not from a steep objective. Near an
# optimum the usual one is all but nothing, so it counts for no less than the first.
_EXPLOSION = 1e6


def _trouble(
    iteration: int, value: float, residuals: np.ndarray, norm: float, norms: list[float]
) -> str | None:
    if not np.isfinite(value) or not np.all(np.isfinite(residuals)):
        what = "the objective or a residual is not finite"
    elif not np.isfinite(norm):
        what = "the gradient is not finite"
    elif norms and norm > _EXPLOSION * max(np.median(norms), norms[0]) > 0:
        what = f"the gradient exploded to {norm:.3g}"
    else:
        return None
    return (
        f"Stopped at iteration {iteration}: {what}; the likely cause is a learning rate above the stability limit "
        "2/(largest curvature) at some step. This is the best so far."
    )
