r"""One point of a front: the schedule of a family with the least log E Φ(q₁) + λ log Σ.

Every gradient sees an initialization, batches and noise of its own; all families see the same. What
a search ends with is valued by runs that all families share, so that a search that was caught, by
noise or by the stability limit, can start again from a better family, or give way to it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esljax._checks import InputError
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.experiment.comparison import Watcher
from esljax.experiment.families import Family, fitted
from esljax.experiment.judging import outcome_of
from esljax.experiment.matching import match_endpoint
from esljax.experiment.problem import Problem
from esljax.schedules import AbstractSchedule, Constant, Knots
from esljax.sharding import replicate

# Rates up to this many times one that is clear of the stability limit: the limit itself is twice as
# high, and training bears more for a while.
CAP = 4.0
# Slopes of the front, from cheap to good: 1 % more Σ buys .42 % and .14 % less loss.
SLOPES = 0.42, 0.14
# Gradients of the first point of a search, and of each later one.
_FIRST, LATER = 60, 40
# Families have few numbers, which need fewer gradients.
_OF_FAMILIES = 0.6
# Few iterations must move the logarithm of a rate by 1 or 2; less, where a search starts again.
_STEP, _STEP_AGAIN = 0.15, 0.05
# A gradient of more than this many times the usual size is cut to it.
CUT = 10.0
# The part of the way back that a search goes where a gradient is not finite.
_BACK = 0.25
# Runs that value what a search ends with.
_RUNS = 4


class Point(NamedTuple):
    """A point of a search, as it is saved."""

    x: Any
    """The numbers of the family."""
    slope: Array
    """λ at the end of its search."""
    spikes: Array
    """The share of its last gradients that were cut."""
    lost: Array
    """The share of its gradients that were not taken, because one was not finite."""
    scale: Array
    """By what the schedule is multiplied to end at its target; NaN where nothing leads there."""
    losses: Float[Array, " R"]
    """The final losses of the runs that value it."""
    sigmas: Float[Array, " R"]
    """Their Σ, in squared parameters."""
    taken: Array
    """The number of the family whose point this is; -1 for the knots x."""


def empty(x: Any) -> Point:
    """A point of the shapes and types that are saved."""
    number, runs = jnp.zeros(()), jnp.zeros(_RUNS)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), x)
    return Point(x, number, number, number, number, runs, runs, jnp.asarray(-1))


class _Trace:
    """What a search has seen: the size of its gradients."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def factor(self, norm: float) -> float:
        """By what to multiply a gradient of that size."""
        usual = float(np.median(self.norms)) if len(self.norms) > 4 else np.inf
        self.norms.append(norm)
        return min(1.0, CUT * usual / norm) if norm > 0 else 1.0

    @property
    def spikes(self) -> float:
        """The share of gradients of the second half that were cut: the first may come from afar."""
        norms = np.array(self.norms[len(self.norms) // 2 :])
        return float(np.mean(norms > CUT * np.median(norms))) if norms.size else 0.0


@dataclasses.dataclass
class Search:
    """The searches of all points of a front and of its families."""

    problem: Problem
    key: Key
    match_key: Key
    slopes: np.ndarray
    targets: list[float] | None
    rate: float
    iterations: int
    watcher: Watcher

    def __post_init__(self) -> None:
        self.cap = CAP * self.rate
        self._keys: Keys = jax.random.split(self.match_key, _RUNS)

    def point(self, name: str, family: Family, p: int, before: Point | None, made: bool) -> Point:
        """One point of a family, from the numbers of the point before."""
        self.watcher.stage(f"{name} {p + 1}/{len(self.slopes)}")
        count = gradients(self.iterations, first=before is None, made=made)
        x = self._calm(family) if before is None else before.x
        return self._found(name, family, p, x, float(self.slopes[p]), count, _STEP)

    def again(
        self,
        name: str,
        family: Family,
        p: int,
        own: Point,
        others: Mapping[int, tuple[Family, Point]],
    ) -> Point:
        """The point of the front once more, where a family is better.

        The search starts from the best of them, and gives way to it if it does not reach it.
        """
        rival = min(others, key=lambda i: self._value(others[i][1], p), default=None)
        if rival is None or not self._beats(others[rival][1], own, p):
            return own
        of_family, theirs = others[rival]
        self.watcher.stage(f"again {name} {p + 1}/{len(self.slopes)}")
        schedule = of_family.make(theirs.x, self.cap)
        x = fitted(own.x.size, lambda s: theirs.scale * schedule(s), self.cap)
        count = gradients(self.iterations, first=False, made=True)
        found = self._found(name, family, p, x, float(theirs.slope), count, _STEP_AGAIN)
        best = min(found, own, key=lambda point: self._value(point, p))
        if not self._beats(theirs, best, p):
            return best
        return theirs._replace(x=best.x, taken=jnp.asarray(rival))

    def schedule(self, family: Family, point: Point) -> AbstractSchedule | None:
        """The schedule of a point, scaled to its target; None where nothing leads there."""
        schedule = family.make(point.x, self.cap)
        if self.targets is None:
            return schedule
        if not np.isfinite(float(point.scale)):
            return None
        return Knots(self.problem.table(schedule).values * point.scale, "linear")

    def _found(
        self, name: str, family: Family, p: int, x: Any, weight: float, count: int, step: float
    ) -> Point:
        """Descend from x for `count` gradients, and value the end."""
        calm = self._calm(family)
        optimizer = optax.adam(optax.cosine_decay_schedule(step, count), b1=0.8, b2=0.95)
        memory, trace = optimizer.init(x), _Trace()
        # All searches see the same keys, so that families differ by their shapes alone.
        key, kept = jax.random.fold_in(self.key, p), []
        for i in range(count):
            table, pull = jax.vjp(lambda x: self._table(family, x), x)
            given = table, jnp.asarray(weight), jax.random.fold_in(key, i)
            gradient, loss = _gradient(self.problem, *replicate(given, self.problem.mesh))
            of_x = pull(gradient)[0]
            norm = float(optax.tree.norm(of_x))
            if not np.isfinite(norm):
                # The run has left its stable range: part of the way back to where all is stable.
                x = jax.tree.map(lambda here, there: here + _BACK * (there - here), x, calm)
                continue
            self.watcher.trial(float(loss))
            factor = trace.factor(norm)
            updates, memory = optimizer.update(
                jax.tree.map(lambda leaf, factor=factor: factor * leaf, of_x), memory, x
            )
            x = optax.apply_updates(x, updates)
            kept.append(x)
            if self.targets is not None:
                # λ falls while the loss is above its target.
                weight *= float(np.clip((self.targets[p] / float(loss)) ** 0.5, 0.8, 1.25))
        # The mean of the last quarter has less noise than its last.
        last = kept[-max(1, count // 4) :] or [x]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *last)
        point = empty(mean)._replace(
            slope=jnp.asarray(weight),
            spikes=jnp.asarray(trace.spikes),
            lost=jnp.asarray(1 - len(kept) / count),
        )
        return self._valued(name, family, p, point)

    def _valued(self, name: str, family: Family, p: int, point: Point) -> Point:
        """The same numbers with their scale, losses and Σ at the p-th slope or target."""
        self.watcher.stage(f"valuing {name} {p + 1}/{len(self.slopes)}")
        table, scale = self.problem.table(family.make(point.x, self.cap)), jnp.asarray(1.0)
        if self.targets is not None:
            try:
                matched = match_endpoint(
                    self.problem,
                    table,
                    target=self.targets[p],
                    learning_time=float(jnp.sum(table.rates(self.problem.steps))),
                    keys=self._keys,
                    name=name,
                    watch=self.watcher.trial,
                )
            except InputError:
                nowhere = jnp.full(_RUNS, jnp.nan)
                return point._replace(scale=nowhere[0], losses=nowhere, sigmas=nowhere)
            top = jnp.argmax(table.values)
            scale = matched.values[top] / table.values[top]
            table = Knots(table.values * scale, "linear")
        runs = [outcome_of(self.problem, table, key) for key in self._keys]
        return point._replace(
            scale=scale,
            losses=jnp.stack([run.final_loss for run in runs]),
            sigmas=jnp.stack([run.report.entropy_production for run in runs]),
            taken=jnp.asarray(-1),
        )

    def _value(self, point: Point, p: int, runs: Any = slice(None)) -> float:
        """log loss + λ log Σ of a point, or log Σ at its target; infinite where it is nowhere."""
        loss = np.log(np.mean(np.asarray(point.losses)[runs]))
        sigma = np.log(np.mean(np.asarray(point.sigmas)[runs]))
        value = sigma if self.targets is not None else loss + self.slopes[p] * sigma
        return float(value) if np.isfinite(value) else np.inf

    def _beats(self, first: Point, second: Point, p: int) -> bool:
        """Whether a point is better than another by more than the error of their difference."""
        here, there = self._value(first, p), self._value(second, p)
        if not np.isfinite([here, there]).all():
            return here < there
        left = [np.delete(np.arange(_RUNS), run) for run in range(_RUNS)]
        differences = [self._value(first, p, runs) - self._value(second, p, runs) for runs in left]
        return bool(there - here > np.sqrt((_RUNS - 1) * np.var(differences)))

    def _calm(self, family: Family) -> Any:
        """Numbers of a family at which all is stable, where its search starts."""
        return empty(family.start(self.rate / CAP, self.cap)).x

    def _table(self, family: Family, x: Any) -> Array:
        return self.problem.table(family.make(x, self.cap)).values


def gradients(iterations: int, *, first: bool, made: bool) -> int:
    """How many gradients a search of a point takes, of the front itself or of a family."""
    count = iterations * _FIRST // LATER if first else iterations
    return count if made else max(2, int(_OF_FAMILIES * count))


@eqx.filter_jit
def _gradient(
    problem: Problem, table: Array, slope: Scalar, key: Key
) -> tuple[Float[Array, " knots"], Scalar]:
    """The gradient of log loss + λ log Σ in the table of rates, and the loss, of one run."""

    def objective(values: Array) -> tuple[Scalar, Scalar]:
        outcome = problem.run(Knots(values, "linear"), key)
        sigma = outcome.report.entropy_production
        return jnp.log(outcome.final_loss) + slope * jnp.log(sigma), outcome.final_loss

    return jax.grad(objective, has_aux=True)(table)


# How much steeper than the first slope the loss of constant rates must somewhere be.
_CLEARLY = 1.25
# Halvings of the learning rate that are tried, from twice the stable one.
_RUNGS = 9


def losses_to_reach(
    problem: Problem, rate: float, start: float, count: int, key: Key, watcher: Watcher
) -> list[float] | None:
    """Targets for a problem on which slopes have no minimum; None where they have.

    A constant rate, halved again and again, shows how loss and Σ trade. Without a rung that is
    clearly steeper than the first slope, to move nothing is best. Where the loss is still as steep
    at the stability limit, that limit alone would be the minimum. The targets go, log-spaced, from
    half way between start and best constant, in log loss, down to that. A loss that is not above 0
    has no logarithm, and counts as not reached; None where none is.
    """
    rates = rate * 2.0 ** (1 - np.arange(_RUNGS))
    runs = []
    for each in rates:
        runs.append(outcome_of(problem, problem.table(Constant(each)), key))
        watcher.trial(float(runs[-1].final_loss))
    loss = np.array([float(run.final_loss) for run in runs])
    loss[~(loss > 0)] = np.nan
    if np.isnan(loss[1:]).all():
        return None
    sigma = np.array([float(run.report.entropy_production) for run in runs])
    with np.errstate(all="ignore"):
        slopes = -np.diff(np.log(loss)) / np.diff(np.log(sigma))
    # From twice the stable rate to it, and from it to its half.
    beyond, at_limit = slopes[0], slopes[1]
    steep = np.nanmax(slopes[1:]) >= _CLEARLY * SLOPES[0]
    limited = at_limit > SLOPES[0] and not beyond > 0
    if steep and not limited:
        return None
    best = np.nanmin(loss[1:])
    return list(np.geomspace(np.sqrt(best * start), best, count))
