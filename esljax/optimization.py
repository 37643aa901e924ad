r"""Gradient optimization of any pytree of controls, under constraints, with fresh noise each time.

    minimize E f(controls)   subject to   E r(controls) ≤ 0,   E h(controls) = 0

by the augmented Lagrangian: minimize f + Σ (max(0, λ + μ r)² - λ²)/2μ + Σ (λ h + μ h²/2) for a
while, then move the multipliers to max(0, λ + μ r) and λ + μ h, and repeat. Candidates are compared
on keys that no gradient ever saw.
Reference: Hestenes (1969); Powell (1969); Nocedal and Wright, Numerical Optimization (2006), ch. 17
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
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
from esljax.results import StandardErrors, measured, renamed_error
from esljax.sharding import AnyMesh, find_mesh, replicate


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
    """Norm of the gradient of the augmented Lagrangian, whose objective is divided by its scale."""


class Optimum(eqx.Module):
    """The best controls found, and how far they can be trusted.

    `value` and `residuals` are means over the held-out keys, not the noisy numbers that the search
    saw; `history` has those. A value judged on the keys that chose among few candidates is
    optimistic by less than its standard error. For a claim, judge `controls` again on other keys.
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
    """λ: how much the value falls for each unit by which a residual may grow."""
    history: History
    """The iterations."""
    message: str = eqx.field(static=True)
    """How the search ended, in a sentence."""
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
        return (
            f"Optimum: value {value}, {constraints}{worst}, {len(self.history.value)} iterations. "
            f"{self.message}"
        )


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
    - `objective`: `objective(controls, key)` to a scalar; or `(scalar, residuals)`, a pytree of
      residuals, to be ≤ 0, or = 0 inside `Equality`; or `(scalar, residuals, auxiliary)`, the last
      for the callback. Make residuals relative: `loss/target - 1`.
    - `controls`: where to start, any pytree.
    - `key`: iteration i sees `fold_in(key, i)`, fresh noise each time.
    - `iterations`: gradient steps.
    - `optimizer`: any optax transformation; by default Adam with rate 0.15 falling to 0 on a cosine
      and short memories (β = .8, .95), right for controls on a log scale such as `Knots` and some
      tens of iterations. `optax.lbfgs()` suits objectives without noise.
    - `rounds`: how often a candidate is judged; in each round the multipliers move once in all.
    - `validation`: held-out keys for each judgment.
    - `tolerance`: residual up to which a constraint counts as satisfied.
    - `penalty`: μ, for an objective divided by its first value.
    - `callback`: sees an `Iteration` after each. `KeyboardInterrupt` ends the search with the best
      so far; anything else that the callback raises passes through.
    - `checkpoints`: where to save the search between iterations, so that it survives its process;
      see `Checkpoints`. A resumed search ends with the same bits as one that nothing disturbed.
    - `mesh`: the devices that every run in `objective` is spread over, such as `member_mesh()`, as
      if all of it stood under `jax.set_mesh`. By default each run lies where its own `mesh` or its
      `positions` are.

    **Returns:** `Optimum`. A value or gradient that is not finite, or explodes, ends the search:
    the best so far is returned and `message` names the iteration and the likely cause.
    **Raises:** `InputError` if `controls` has no floating leaf, or the first value or gradient is
    not finite.
    **Differentiation:** none; this is a loop on the host around one compiled step.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> objective = lambda x, key: (x - 3) ** 2
        >>> start = jnp.array(0.0)
        >>> optimum = esl.optimize(objective, start, key=jax.random.key(0), iterations=200)
        >>> round(float(optimum.controls), 1)
        3.0
    """
    check_positive_int("iterations", iterations)
    check_positive_int("rounds", rounds)
    check_positive_int("validation", validation)
    check_positive("penalty", penalty)
    check_nonnegative("tolerance", tolerance)
    check_key("key", key)
    if not callable(objective):
        raise refuse("objective", "be a function of (controls, key)", f"is {objective!r}")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise refuse("optimizer", "be an optax optimizer", f"is {optimizer!r}")
    optimizer = _default_optimizer(iterations) if optimizer is None else optimizer
    mesh = find_mesh(mesh, None)
    controls = jax.tree.map(
        lambda leaf: as_float(leaf) if isinstance(leaf, float | np.floating) else leaf, controls
    )
    # Laid out from the start as they will come back, so that each step compiles once.
    controls, key = replicate((controls, key), mesh)
    moving, fixed = eqx.partition(controls, eqx.is_inexact_array)
    if not jax.tree.leaves(moving):
        raise refuse("controls", "have at least one floating-point leaf to optimize", "has none")

    about = {
        "iterations": iterations,
        "rounds": rounds,
        "validation": validation,
        "tolerance": tolerance,
        "penalty": penalty,
        "objective": objective,
        "controls": controls,
        "optimizer": optimizer,
        "key": key,
    }
    compiled = _Compiled(objective, fixed, optax.with_extra_args_support(optimizer))
    # fold_in counts iterations from 0 up; the held-out keys sit behind the last of them.
    held_out = jax.vmap(lambda i: jax.random.fold_in(key, i))(iterations + jnp.arange(validation))
    within = jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()
    with within, session(checkpoints, about) as saved:
        equalities = compiled.equalities(moving)
        search = _Search(compiled, key, held_out, equalities, iterations, rounds, tolerance)
        state = search.start(moving, penalty, mesh)
        restored = saved.restore(state.like)
        state = search.with_first_multipliers(state, mesh) if restored is None else restored[1]
        steps = _saving(saved, search.run(state), iterations)
        message, interrupted = "Ran all iterations.", False
        try:
            for state, seen in steps:
                if callback is not None:
                    callback(search.report(state, seen))
        except _Trouble as trouble:
            message, state = str(trouble), search.judged(state, state.last_good)
        except KeyboardInterrupt:
            saved.offer(state.done, lambda: state, last=True)
            message, interrupted = _interrupted(state.done, iterations), True
            state = search.judged(state, state.moving)
    best = state.best
    return Optimum(
        controls=eqx.combine(best.controls, fixed),
        value=best.value,
        residuals=best.residuals,
        standard_error=StandardErrors(
            {"value": best.value_error, "residuals": best.residuals_error}
        ),
        errors=f"spread over {validation} held-out keys" if validation > 1 else "none",
        satisfied=bool(np.all(best.violations(search.equalities) <= tolerance)),
        multipliers=state.dual.multipliers * state.dual.scale,
        history=state.history,
        message=message,
        interrupted=interrupted,
    )


def _default_optimizer(iterations: int) -> optax.GradientTransformation:
    # Adam's usual β₂ = .999 remembers the first, largest gradients through a search of tens of
    # iterations and brakes its end.
    return optax.adam(optax.cosine_decay_schedule(0.15, iterations), b1=0.8, b2=0.95)


# --- The state of a search ------------------------------------------------------------------------


class _Dual(NamedTuple):
    """Multipliers and penalty of the augmented Lagrangian, for the objective divided by a scale."""

    multipliers: Array
    penalty: Array
    scale: Array

    def pulled(self, residuals: Array, equalities: np.ndarray) -> Array:
        """λ + μ r, which may push but not pull on an inequality."""
        pulled = self.multipliers + self.penalty * residuals
        return jnp.where(equalities, pulled, jnp.maximum(pulled, 0))

    def moved(self, residuals: Array, equalities: np.ndarray, share: float) -> "_Dual":
        """The multipliers a share of the way to λ + μ r."""
        return self._replace(
            multipliers=self._replace(penalty=share * self.penalty).pulled(residuals, equalities)
        )


class _Seen(NamedTuple):
    """The numbers of one step."""

    value: Array
    residuals: Array
    gradients: Any
    auxiliary: Any


class _Candidate(NamedTuple):
    """Controls and their numbers on the held-out keys."""

    controls: Any
    value: Array
    value_error: Array
    residuals: Array
    residuals_error: Array

    def violations(self, equalities: np.ndarray) -> np.ndarray:
        """By how much each constraint is violated, at least 0."""
        residuals = np.asarray(self.residuals)
        return np.where(equalities, np.abs(residuals), np.maximum(residuals, 0))

    def or_better(
        self, other: "_Candidate", equalities: np.ndarray, tolerance: float, dual: "_Dual"
    ) -> "_Candidate":
        """The smaller value among those that satisfy the constraints, or the smaller exact penalty.

        An order by violation alone would keep a poor candidate for being nearer to its constraints
        by next to nothing.
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


class _State(NamedTuple):
    """A search between two iterations: all that the next one needs, and all that is saved."""

    moving: Any
    """The floating leaves of the controls."""
    memory: Any
    """The state of the optimizer."""
    dual: _Dual
    best: _Candidate
    last_good: Any
    """The last controls whose value and gradient are known to be finite."""
    history: History

    @property
    def done(self) -> int:
        """How many iterations are done."""
        return len(self.history.value)

    def like(self, done: int) -> "_State":
        """A state of the same structure and shapes after `done` iterations."""
        count = self.best.residuals.size
        residuals = np.zeros((done, count), self.history.residuals.dtype)
        return self._replace(history=History(np.zeros(done), residuals, np.zeros(done)))


class _Trouble(Exception):
    """An iteration gave numbers that end the search; the message names them."""


# --- The transitions of a search ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Search:
    """The settings of a search and its transitions from state to state."""

    compiled: "_Compiled"
    key: Key
    held_out: Keys
    equalities: np.ndarray
    """Which of the residuals must be 0, the others at most 0; shape (c,)."""
    iterations: int
    rounds: int
    tolerance: float

    def start(self, moving: Any, penalty: float, mesh: AnyMesh | None) -> _State:
        """The state before the first iteration, with multipliers of 0."""
        best = _Candidate(moving, *self.compiled.judge(moving, self.held_out))
        # An objective that starts at 0 has no scale of its own.
        scale = jnp.where(best.value == 0, 1, jnp.abs(best.value))
        dual = _Dual(
            jnp.zeros_like(best.residuals), as_float(penalty).astype(best.value.dtype), scale
        )
        memory, dual = replicate((self.compiled.optimizer.init(moving), dual), mesh)
        nothing = np.zeros((0, best.residuals.size), best.residuals.dtype)
        history = History(np.zeros(0), nothing, np.zeros(0))
        return _State(moving, memory, dual, best, moving, history)

    def with_first_multipliers(self, state: _State, mesh: AnyMesh | None) -> _State:
        """The state with multipliers that suit the first gradients."""
        dual = self.compiled.first_multipliers(
            state.moving, state.memory, state.dual, self.equalities, jax.random.fold_in(self.key, 0)
        )
        return state._replace(dual=replicate(dual, mesh))

    def run(self, state: _State) -> Iterator[tuple[_State, _Seen]]:
        """The state after each iteration that is left, with the numbers of its step."""
        # The last iteration of each round.
        rounds = min(self.rounds, self.iterations)
        ends = set(np.linspace(0, self.iterations, rounds + 1).round().astype(int)[1:])
        while state.done < self.iterations:
            state, seen = self.after(state)
            if state.done in ends:
                state = self.judged(state, state.moving)
            yield state, seen

    def after(self, state: _State) -> tuple[_State, _Seen]:
        """The state after one more iteration, and the numbers of its step.

        **Raises:** `_Trouble` if they are of no use; `InputError` if they are the first.
        """
        i, history = state.done, state.history
        moved, memory, seen = self.compiled.step(
            state.moving, state.memory, state.dual, jax.random.fold_in(self.key, i)
        )
        value, residuals = float(seen.value), np.asarray(seen.residuals)
        norm = float(optax.tree.norm(seen.gradients))
        trouble = _trouble(i, value, residuals, norm, history.gradient_norm)
        if trouble and not i:
            raise refuse(
                "controls",
                "start where the objective and its gradient are finite",
                f"give: {trouble}",
            )
        if trouble:
            raise _Trouble(trouble)
        history = History(
            np.append(history.value, value),
            np.concatenate([history.residuals, residuals[None]]),
            np.append(history.gradient_norm, norm),
        )
        dual = state.dual.moved(seen.residuals, self.equalities, self.rounds / self.iterations)
        return _State(moved, memory, dual, state.best, state.moving, history), seen

    def judged(self, state: _State, moving: Any) -> _State:
        """The state with these controls as its best, if they are better on the held-out keys."""
        candidate = _Candidate(moving, *self.compiled.judge(moving, self.held_out))
        best = state.best.or_better(candidate, self.equalities, self.tolerance, state.dual)
        return state._replace(best=best)

    def report(self, state: _State, seen: _Seen) -> Iteration:
        """The iteration that led to a state, for a callback."""
        controls = eqx.combine(state.moving, self.compiled.fixed)
        return Iteration(state.done - 1, controls, seen.value, seen.residuals, seen.auxiliary)


def _saving(saved: Any, rounds: Iterator[tuple[_State, _Seen]], iterations: int) -> Iterator:
    """The same rounds, each offered to the checkpoints once its user has finished with it."""
    for state, seen in rounds:
        yield state, seen
        saved.offer(state.done, lambda state=state: state, last=state.done == iterations)


class _Compiled(eqx.Module):
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
    def step(self, moving: Any, memory: Any, dual: _Dual, key: Key) -> tuple[Any, Any, _Seen]:
        """One step of the optimizer on the augmented Lagrangian."""

        def lagrangian(moving):
            value, residuals, equalities, auxiliary = self.evaluate(moving, key)
            terms = (dual.pulled(residuals, equalities) ** 2 - dual.multipliers**2) / (
                2 * dual.penalty
            )
            return value / dual.scale + jnp.sum(terms), (value, residuals, auxiliary)

        (merit, (value, residuals, auxiliary)), gradients = jax.value_and_grad(
            lagrangian, has_aux=True
        )(moving)
        updates, memory = self.optimizer.update(
            gradients,
            memory,
            moving,
            value=merit,
            grad=gradients,
            value_fn=lambda moving: lagrangian(moving)[0],
        )
        return (
            optax.apply_updates(moving, updates),
            memory,
            _Seen(value, residuals, gradients, auxiliary),
        )

    def first_multipliers(
        self, moving: Any, memory: Any, dual: _Dual, equalities: np.ndarray, key: Key
    ) -> _Dual:
        """The least-squares multipliers, min_λ ‖∇f + Σ λ ∇r‖.

        With them the search starts along the constraints that hold already. The gradients of f and
        of each residual come from the compiled step itself, with multipliers (0, ...),
        (1, 0, ...), and so on.
        """
        weak, none = jnp.full_like(dual.penalty, 1e-6), jnp.zeros_like(dual.multipliers)
        units = [none, *(none.at[i].set(1) for i in range(none.size))]
        seen = [
            self.step(moving, memory, dual._replace(multipliers=unit, penalty=weak), key)[2]
            for unit in units
        ]
        of_value, *sums = (np.asarray(ravel_pytree(each.gradients)[0]) for each in seen)
        if not sums or not np.all(np.isfinite([of_value, *sums])):
            return dual
        multipliers = np.linalg.lstsq(np.stack([x - of_value for x in sums], axis=1), -of_value)[0]
        # A residual that is flat at the start fits any multiplier; the pull of the penalty on a
        # residual of 10 is more than enough.
        multipliers = np.clip(multipliers, -10 * float(dual.penalty), 10 * float(dual.penalty))
        return dual._replace(
            multipliers=jnp.asarray(
                np.where(equalities, multipliers, np.maximum(multipliers, 0)), dual.penalty.dtype
            )
        )


# A gradient this many times the usual one comes from a run that leaves the stable range of its
# step, not from a steep objective. Near an optimum the usual one all but vanishes, so it counts for
# no less than the first.
_EXPLOSION = 1e6


def _trouble(
    iteration: int, value: float, residuals: np.ndarray, norm: float, norms: np.ndarray
) -> str | None:
    """Why the numbers of an iteration end the search; None if they do not."""
    if not np.isfinite(value) or not np.all(np.isfinite(residuals)):
        reason = "the objective or a residual is not finite"
    elif not np.isfinite(norm):
        reason = "the gradient is not finite"
    elif norms.size and norm > _EXPLOSION * max(np.median(norms), norms[0]) > 0:
        reason = f"the gradient exploded to {norm:.3g}"
    else:
        return None
    return (
        f"Stopped at iteration {iteration}: {reason}; the likely cause is a learning rate above "
        "the stability limit 2/(largest curvature) at some step. This is the best so far."
    )


def _interrupted(done: int, iterations: int) -> str:
    return f"Interrupted after {done} of {iterations} iterations; this is the best so far."
