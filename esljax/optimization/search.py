"""The state of a search and its transitions, from one iteration to the next."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from esljax._checks import refuse
from esljax._types import Array, Key, Keys
from esljax.optimization.lagrangian import Compiled, Dual, Seen
from esljax.optimization.probes import Probes, compared, no_probes
from esljax.optimization.result import History, Iteration
from esljax.sharding import AnyMesh, replicate


class Candidate(NamedTuple):
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
        self, other: "Candidate", equalities: np.ndarray, tolerance: float, least: float, dual: Dual
    ) -> "Candidate":
        """The smaller value among those that satisfy the constraints, or the smaller exact penalty.

        An order by violation alone would keep a poor candidate for being nearer to its constraints
        by next to nothing. `least` is the least slope of the penalty.
        """

        def rank(candidate: "Candidate") -> tuple[bool, float]:
            violations = candidate.violations(equalities)
            violated = bool(np.any(~(violations <= tolerance)))
            # The penalty is exact if its slope exceeds the multipliers.
            slopes = np.maximum(2 * np.abs(np.asarray(dual.multipliers)), least)
            return violated, float(candidate.value) + violated * float(dual.scale) * float(
                slopes @ violations
            )

        return other if np.isfinite(rank(other)[1]) and rank(other) < rank(self) else self


class State(NamedTuple):
    """A search between two iterations: all that the next one needs, and all that is saved."""

    moving: Any
    """The floating leaves of the controls."""
    memory: Any
    """The state of the optimizer."""
    dual: Dual
    best: Candidate
    last_good: Any
    """The last controls whose value and gradient are known to be finite."""
    probes: Probes
    history: History

    @property
    def done(self) -> int:
        """How many iterations are done."""
        return len(self.history.value)

    def like(self, done: int) -> "State":
        """A state of the same structure and shapes after `done` iterations."""
        count = self.best.residuals.size
        residuals = np.zeros((done, count), self.history.residuals.dtype)
        return self._replace(history=History(np.zeros(done), residuals, np.zeros(done)))


class Trouble(Exception):
    """An iteration gave numbers that end the search; the message names them."""


@dataclasses.dataclass(frozen=True)
class Search:
    """The settings of a search and its transitions from state to state."""

    compiled: Compiled
    key: Key
    validation: int
    equalities: np.ndarray
    """Which of the residuals must be 0, the others at most 0; shape (c,)."""
    iterations: int
    rounds: int
    tolerance: float
    penalty: float
    cuts: bool
    """Whether gradients far above the usual size are cut."""
    mesh: AnyMesh | None

    @property
    def held_out(self) -> Keys:
        """The keys of every judgment: fold_in counts iterations up from 0, then these."""
        counts = self.iterations + jnp.arange(self.validation)
        return jax.vmap(lambda i: jax.random.fold_in(self.key, i))(counts)

    def probing(self, place: int) -> Key:
        """The key of a probe, behind the held-out ones."""
        return jax.random.fold_in(self.key, self.iterations + self.validation + place)

    @property
    def ends(self) -> list[int]:
        """How many iterations are done at the start and at the end of each round."""
        rounds = min(self.rounds, self.iterations)
        return [int(x) for x in np.linspace(0, self.iterations, rounds + 1).round()]

    def start(self, moving: Any) -> State:
        """The state before the first iteration, with multipliers of 0."""
        best = Candidate(moving, *self.compiled.judge(moving, self.held_out))
        # An objective that starts at 0 has no scale of its own.
        scale = jnp.where(best.value == 0, 1, jnp.abs(best.value))
        none = jnp.zeros_like(best.residuals)
        dual = Dual(none, jnp.full_like(none, self.penalty), scale, none)
        memory, dual = replicate((self.compiled.optimizer.init(moving), dual), self.mesh)
        nothing = np.zeros((0, best.residuals.size), best.residuals.dtype)
        history = History(np.zeros(0), nothing, np.zeros(0))
        entries = sum(leaf.size for leaf in jax.tree.leaves(moving))
        probes = no_probes(entries, best.residuals.size, len(self.ends) - 1)
        return State(moving, memory, dual, best, moving, probes, history)

    def probed(self, state: State) -> State:
        """The state with two noises compared, and multipliers and penalties that suit them.

        The multipliers are those of least squares, min_λ ‖∇f + Σ λ ∇r‖: with them the search starts
        along the constraints that hold already.
        """
        keys = jax.random.fold_in(self.key, 0), self.probing(0)
        one, other = (self._gradients(state, key) for key in keys)
        means = (one[1] + other[1]) / 2
        probes = state.probes._replace(still=np.all((one[1] == 0) & (other[1] == 0), axis=0) * 1.0)
        probes = probes.with_draws(np.stack([one[0], other[0]])).with_gradients(
            0, one[1][0], other[1][0]
        )
        probes = _with_held_out(probes, state.best, self.validation, [one[0], other[0]])
        if not np.all(np.isfinite(means)):
            # The first iteration names what is not finite.
            return state._replace(probes=state.probes)
        of_value, of_residuals = means[0], means[1:]
        each = [compared(x, y)[0] for x, y in zip(one[1], other[1], strict=True)]
        known = [agreement for agreement in each if not np.isnan(agreement)]
        agreement = probes.agreement.copy()
        agreement[0] = min(known, default=np.nan)
        norms = np.linalg.norm(of_residuals, axis=1)
        useful = np.linalg.norm(of_value) / np.where(norms > 0, norms, np.inf)
        probes = probes._replace(agreement=agreement, reference=np.maximum(useful, 1))
        dual = state.dual
        if self.equalities.size:
            lstsq = np.linalg.lstsq(of_residuals.T, -of_value)[0]
            # A residual that is flat at the start fits any multiplier; the pull of the penalty on a
            # residual of 10 is more than enough.
            lstsq = np.clip(lstsq, -10 * self.penalty, 10 * self.penalty)
            # A constraint that is slack at the start begins without a pull. A penalty that noise
            # keeps small would need many iterations to take it back.
            slack = lstsq + self.penalty * (one[0] + other[0])[1:] / 2 <= 0
            pushing = np.where(slack, 0, np.maximum(lstsq, 0))
            dual = dual._replace(
                multipliers=jnp.asarray(
                    np.where(self.equalities, lstsq, pushing), dual.scale.dtype
                ),
                penalty=jnp.asarray(probes.penalty(self.penalty), dual.scale.dtype),
            )
        return state._replace(dual=replicate(dual, self.mesh), probes=probes)

    def _gradients(self, state: State, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """The value and residuals (1+c,) on one key, and the gradient of each; shape (1+c, p).

        They come from the compiled step itself, under one multiplier after the other.
        """
        seen = [
            self._step(state, state.dual.only(which), key)[2]
            for which in (None, *range(self.equalities.size))
        ]
        of_value, *sums = (_flat(each.gradients) for each in seen)
        numbers = np.append(float(seen[0].value), np.asarray(seen[0].residuals, float))
        return numbers, np.stack([of_value, *(x - of_value for x in sums)])

    def _step(self, state: State, dual: Dual, key: Key) -> tuple[Any, Any, Seen]:
        limit = CUT * usual(state.history.gradient_norm, state.probes) if self.cuts else np.inf
        return self.compiled.step(
            state.moving, state.memory, dual, key, jnp.asarray(limit, jnp.result_type(float))
        )

    def run(self, state: State) -> Iterator[tuple[State, Seen]]:
        """The state after each iteration that is left, with the numbers of its step."""
        while state.done < self.iterations:
            before = state
            state, seen = self.after(state)
            if state.done in self.ends:
                state = self.judged(self._compared(before, state, seen), state.moving)
            yield state, seen

    def after(self, state: State) -> tuple[State, Seen]:
        """The state after one more iteration, and the numbers of its step.

        **Raises:** `Trouble` if they are of no use; `InputError` if they are the first.
        """
        i, history = state.done, state.history
        moved, memory, seen = self._step(state, state.dual, jax.random.fold_in(self.key, i))
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
            raise Trouble(trouble)
        history = History(
            np.append(history.value, value),
            np.concatenate([history.residuals, residuals[None]]),
            np.append(history.gradient_norm, norm),
        )
        since = i - max(end for end in self.ends if end <= i)
        dual = state.dual.moved(
            seen.residuals, self.equalities, self.rounds / self.iterations, since
        )
        return State(moved, memory, dual, state.best, state.moving, state.probes, history), seen

    def _compared(self, before: State, state: State, seen: Seen) -> State:
        """The state with the last step of a round held against another noise at its controls."""
        place = self.ends.index(state.done)
        other = self._step(before, before.dual, self.probing(place))[2]
        numbers = [
            np.append(float(each.value), np.asarray(each.residuals, float))
            for each in (seen, other)
        ]
        gradients = _flat(seen.gradients), _flat(other.gradients)
        probes = state.probes.with_gradients(place, *gradients)
        if np.all(np.isfinite(numbers)):
            probes = probes.with_draws(np.stack(numbers))
        penalty = jnp.asarray(probes.penalty(self.penalty), state.dual.scale.dtype)
        return state._replace(
            probes=probes, dual=replicate(state.dual._replace(penalty=penalty), self.mesh)
        )

    def judged(self, state: State, moving: Any) -> State:
        """The state with these controls as its best, if they are better on the held-out keys."""
        candidate = Candidate(moving, *self.compiled.judge(moving, self.held_out))
        best = state.best.or_better(
            candidate, self.equalities, self.tolerance, self.penalty, state.dual
        )
        return state._replace(best=best)

    def report(self, state: State, seen: Seen) -> Iteration:
        """The iteration that led to a state, for a callback."""
        controls = eqx.combine(state.moving, self.compiled.fixed)
        return Iteration(state.done - 1, controls, seen.value, seen.residuals, seen.auxiliary)


def _with_held_out(probes: Probes, start: Candidate, keys: int, others: list[np.ndarray]) -> Probes:
    """The probes with the judgment of the start, which a single key gives beside two others."""
    numbers = np.append(float(start.value), np.asarray(start.residuals, float))
    if keys == 1:
        apart = numbers - np.mean(others, axis=0)
        return probes._replace(
            squares=probes.squares + apart**2 * 2 / 3, freedom=probes.freedom + 1
        )
    errors = np.append(float(start.value_error), np.asarray(start.residuals_error, float))
    return probes._replace(
        squares=probes.squares + errors**2 * keys * (keys - 1), freedom=probes.freedom + keys - 1
    )


def _flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], float)


# --- Gradients of unusual size --------------------------------------------------------------------

# A gradient this many times the usual one comes from a run that leaves the stable range of its
# step, not from a steep objective. Near an optimum the usual one all but vanishes, so it counts for
# no less than the first.
_EXPLOSION = 1e6
# Adam remembers a gradient this many times the usual one through some fifty iterations, in which it
# hardly moves.
CUT = 10.0


def usual(norms: np.ndarray, probes: Probes) -> float:
    """The usual norm of a gradient: the median so far, or more if the first or latest are larger.

    It is no less than that of the objective alone at the start, which the first multipliers take
    away where they can, and which comes back when a constraint turns slack or active. Infinite
    before the first iteration.
    """
    if not norms.size:
        return np.inf
    alone = float(np.nan_to_num(probes.signal[0]))
    size = max(float(np.median(norms)), float(np.median(norms[-5:])), float(norms[0]), alone)
    return size if size > 0 else np.inf


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
