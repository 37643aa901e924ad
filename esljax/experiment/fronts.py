r"""The front of loss and Σ: the least entropy production at each final loss.

A point of the front minimizes, over all schedules η,

    log E Φ(q₁) + λ log Σ,

and λ is the slope of the front there: 1 % more Σ buys λ % less loss. It is a local minimum: where
nothing moves, log Σ has no lower bound. A front that is nowhere as steep as λ has no such point,
and the search then ends with a doubt. The points are found by continuation: each search starts from
the schedule of the one before, at a smaller λ, and every gradient sees an initialization, batches
and noise of its own. Families of usual schedules are tuned by the same gradient of the same
objective, so that each is held against the front at its best.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from esljax._checks import (
    InputError,
    check_key,
    check_kind,
    check_positive,
    check_positive_int,
    door,
    refuse,
)
from esljax._types import Array, Float, Key, Scalar
from esljax.experiment.comparison import Unwatched, Watcher
from esljax.experiment.families import Family, knots_of, usual_families
from esljax.experiment.judging import Judgment, judge
from esljax.experiment.matching import match_endpoint, stable_rate
from esljax.experiment.problem import Problem
from esljax.experiment.saving import Leaves, leaves, save
from esljax.experiment.settings import in_words
from esljax.files import Checkpoints, session
from esljax.results import StandardErrors, concise
from esljax.results import table as text_table
from esljax.schedules import AbstractSchedule, Knots

# Rates up to this many times one that is clear of the stability limit: the limit itself is twice as
# high, and training bears more for a while.
_CAP = 4.0
# Slopes of the front, from cheap to good: 1 % more Σ buys .42 % and .14 % less loss.
_SLOPES = 0.42, 0.14
# Gradients of the first point of a search, and of each later one.
_FIRST, _LATER = 60, 40
# Families have few numbers, which need fewer gradients.
_OF_FAMILIES = 0.6
# A gradient of more than this many times the usual size is cut to it.
_CUT = 10.0
# The part of the way back that a search goes where a gradient is not finite.
_BACK = 0.25
# Total variation of log η beyond one rise and one fall: a ragged schedule.
_RAGGED = 0.5
# A loss of more than this share of that at the start.
_HARDLY = 0.95
_MADE = "front"
FIGURE = "front.png"


@dataclasses.dataclass(frozen=True)
class Front:
    """The least Σ at each final loss, from little Σ to a low loss; `print` shows it.

    Numbers are means over held-out runs that no search has seen, with standard errors over them.
    """

    slopes: Float[np.ndarray, " P"]
    """λ of each point: the share of the loss that one more share of Σ buys there."""
    judgments: tuple[Judgment, ...]
    """Each point judged on the held-out keys."""
    schedules: tuple[AbstractSchedule, ...]
    """The P schedules, as the search made them."""
    rate: float
    """A constant learning rate that is clear of the stability limit."""
    cap: float
    """The largest rate that a search may try."""
    families: Mapping[str, "Front"] = dataclasses.field(default_factory=dict)
    """The fronts of usual families, each at its best, by name."""
    doubts: tuple[str, ...] = ()
    """Reasons not to believe a point, in sentences."""

    @property
    def final_loss(self) -> Float[np.ndarray, " P"]:
        """Mean final training loss of each point."""
        return np.array([float(each.final_loss) for each in self.judgments])

    @property
    def entropy_production(self) -> Float[np.ndarray, " P"]:
        """Σ of each point, in squared parameters."""
        return np.array([float(each.report.entropy_production) for each in self.judgments])

    @property
    def w2_squared(self) -> Float[np.ndarray, " P"]:
        """W2² between start and end of each point, in squared parameters."""
        return np.array([float(each.report.w2_squared) for each in self.judgments])

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The problem's metrics of each point, by name."""
        names = self.judgments[0].metrics
        return {
            name: np.array([float(each.metrics[name]) for each in self.judgments]) for name in names
        }

    @property
    def standard_error(self) -> StandardErrors:
        """Standard errors over the held-out runs of `final_loss`, `entropy_production`,
        `w2_squared` and each metric."""
        reports: list[Any] = [each.report.standard_error for each in self.judgments]
        own = [each.standard_error for each in self.judgments]
        return StandardErrors(
            {
                **{
                    name: np.array([float(getattr(error, name)) for error in reports])
                    for name in ("entropy_production", "w2_squared")
                },
                **{
                    name: np.array([float(getattr(error, name)) for error in own])
                    for name in ("final_loss", *self.judgments[0].metrics)
                },
            }
        )

    @property
    def knee(self) -> int:
        """The index of the point farthest below the chord from the first to the last point, in log
        loss and log Σ: beyond it loss gets dear, before it Σ is saved at little cost."""
        x, y = np.log(self.final_loss), np.log(self.entropy_production)
        along = np.array([x[-1] - x[0], y[-1] - y[0]])
        below = (x - x[0]) * along[1] - (y - y[0]) * along[0]
        # Positive on the side of less loss and less Σ.
        return int(np.argmax(np.sign(along[1]) * -below)) if len(x) > 2 else 0

    def entropy_production_at(self, loss: Any) -> Any:
        """Σ at a final loss, log-log linear between the points; NaN outside of their losses."""
        order = np.argsort(self.final_loss)
        x, y = np.log(self.final_loss[order]), np.log(self.entropy_production[order])
        return np.exp(np.interp(np.log(loss), x, y, left=np.nan, right=np.nan))

    def share(self, family: "Front") -> tuple[float, float] | None:
        """Σ of this front over that of another one at the same losses: mean and standard error.

        The mean is over the other's points whose losses this front has; the error is a jackknife
        over the held-out runs, which both share. None without such a point.
        """
        common = np.isfinite(self.entropy_production_at(family.final_loss))
        if not common.any():
            return None
        runs = self.judgments[0].final_losses.size

        def without(run: int) -> float:
            ours, theirs = self._of_runs(run), family._of_runs(run)
            # Points at the ends stay common: the line through the last two points goes on.
            return float(np.mean(_on_lines(theirs[0][common], *ours) / theirs[1][common]))

        left = np.array([without(run) for run in range(runs)])
        error = np.sqrt((runs - 1) * np.mean((left - left.mean()) ** 2))
        ratios = self.entropy_production_at(family.final_loss) / family.entropy_production
        return float(np.mean(ratios[common])), float(error)

    def _of_runs(self, without: int) -> tuple[np.ndarray, np.ndarray]:
        """Final losses and Σ (P,), means over the held-out runs but one."""
        losses, sigmas = (
            np.array([np.delete(np.asarray(x), without).mean() for x in each])
            for each in (
                [judgment.final_losses for judgment in self.judgments],
                [judgment.entropy_productions for judgment in self.judgments],
            )
        )
        return losses, sigmas

    def verdict(self) -> str:
        """The trade in a plain sentence."""
        knee, best = self.knee, int(np.argmin(self.final_loss))
        loss, sigma = self.final_loss, self.entropy_production
        if knee == best:
            knee = 0
        if not (loss[knee] > loss[best] and sigma[knee] < sigma[best]):
            return "No point of this front has less Σ for more loss."
        return (
            f"{100 * (loss[knee] / loss[best] - 1):.3g} % more loss ({loss[knee]:.4g} for "
            f"{loss[best]:.4g}) saves a factor {sigma[best] / sigma[knee]:.3g} of Σ."
        )

    def __str__(self) -> str:
        return "\n".join(itertools.chain(*self.lines()))

    def lines(self) -> tuple[list[str], list[str]]:
        """The rows of the table that `print` shows, and the sentences below it."""
        return self._table().splitlines(), list(self._sentences())

    def _table(self) -> str:
        errors: Any = self.standard_error
        names = list(self.metrics)
        rows = [("final loss", "Σ", "W2²", "temporal", "geometric", "U", *names, "learning rates")]
        for i, (judgment, schedule) in enumerate(zip(self.judgments, self.schedules, strict=True)):
            report = judgment.report
            of_report: Any = report.standard_error
            rates = np.asarray(judgment.schedule.values)
            # A schedule of many numbers, as one that was scaled to its target, at ten of them.
            own = np.asarray(getattr(schedule, "values", rates))
            shown = own[np.linspace(0, own.size - 1, min(own.size, 10)).round().astype(int)]
            rows.append(
                (
                    concise(self.final_loss[i], errors.final_loss[i]),
                    concise(self.entropy_production[i], errors.entropy_production[i]),
                    concise(self.w2_squared[i], errors.w2_squared[i]),
                    concise(report.temporal, of_report.temporal),
                    concise(report.geometric, of_report.geometric),
                    f"{float(rates[:-1].sum()):.4g}",
                    *(concise(self.metrics[n][i], getattr(errors, n)[i]) for n in names),
                    " ".join(f"{float(rate):.2g}" for rate in shown),
                )
            )
        return text_table(rows, "r" * (len(rows[0]) - 1) + "l")

    def _sentences(self) -> Iterator[str]:
        yield (
            f"Held-out means over {self.judgments[0].entropy_productions.size} runs; digits in "
            "parentheses: standard error of the last digits. Σ and W2² in squared parameters."
        )
        if len(self.judgments) > 2:
            yield (
                f"Its knee is at loss {self.final_loss[self.knee]:.4g}: the point farthest below "
                "the straight line from the first to the last in log loss and log Σ."
            )
        yield self.verdict()
        best = np.min(self.final_loss)
        for name, family in self.families.items():
            known, reached = self.share(family), np.min(family.final_loss)
            words = in_words(name)
            if known is None:
                yield f"{words}: no loss in common; it reaches {reached:.4g}, the front {best:.4g}."
            else:
                yield (
                    f"{words}, at its best: the front has {known[0]:.3f} ± {known[1]:.3f} times "
                    f"its Σ at the same loss; it reaches {reached:.4g}, the front {best:.4g}."
                )
        yield from self.doubts
        for family in self.families.values():
            yield from family.doubts

    def plot(self) -> Any:
        """Draw Σ against the final loss with all families, and the schedules along the front."""
        # Imported here: matplotlib takes long to load, and does not start everywhere.
        from esljax.figures import plot_front

        return plot_front(self)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, in types that JSON holds."""
        errors: Any = self.standard_error
        numbers = {
            "final_loss": self.final_loss,
            "entropy_production": self.entropy_production,
            "w2_squared": self.w2_squared,
            **self.metrics,
        }
        return {
            "slopes": self.slopes.tolist(),
            **{name: values.tolist() for name, values in numbers.items()},
            "standard_error": {name: getattr(errors, name).tolist() for name in numbers},
            "learning_rates": [
                np.asarray(each.schedule.values).tolist() for each in self.judgments
            ],
            "schedules": [schedule.as_dict() for schedule in self.schedules],
            "rate": self.rate,
            "cap": self.cap,
            "knee": self.knee,
            "verdict": self.verdict(),
            "doubts": list(self.doubts),
            "families": {name: family.as_dict() for name, family in self.families.items()},
        }

    def save(self, folder: str | Path) -> None:
        """Write front.json, front.png and one JSON file for each schedule of the front.

        **Raises:** `InputError` for a folder that cannot be written, and where a file would replace
        one that this package did not write.
        """
        save(self.leaves(), folder, {"rate": self.rate, "cap": self.cap})

    def leaves(self) -> Leaves:
        """The files of this front: front.json, a figure, and the schedules."""
        schedules = {name_of_point(i): schedule for i, schedule in enumerate(self.schedules)}
        return leaves("front.json", self.as_dict(), {FIGURE: self.plot}, schedules)


@door
def front(
    problem: Problem,
    *,
    key: Key,
    points: int = 5,
    knots: int = 10,
    targets: Sequence[float] | None = None,
    families: Mapping[str, Family] | None = None,
    judge_runs: int = 6,
    rate: float | None = None,
    iterations: int = _LATER,
    watcher: Watcher | None = None,
    checkpoints: Checkpoints | None = None,
) -> Front:
    """Find the least Σ at each final loss, and hold families of usual schedules against it.

    **Args:**
    - `problem`: the learning problem, whose final losses are above 0.
    - `key`: the source of all keys: of the searches and, apart from them, of the judging.
    - `points`: P, with slopes λ from .42 to .14. - `knots`: of the searched learning rate.
    - `targets`: final losses, from high to low, in place of slopes: λ then follows the target, and
      the schedule found is scaled to end there.
    - `families`: by name; by default `usual_families()`; an empty mapping for none.
    - `judge_runs`: held-out runs of each point, at least 2.
    - `rate`: a constant learning rate clear of the stability limit, found by default; searches try
      rates of up to four times it.
    - `iterations`: gradients of each point; half as many more at the first one, and .6 times as
      many for families.
    - `watcher`: called at each stage, and with the final loss of each gradient.
    - `checkpoints`: where to save the points; see `Checkpoints`. A resumed front ends with the same
      bits.

    **Returns:** `Front`.
    **Raises:** `InputError` for a problem whose losses are not above 0, or that has no stable rate,
    and where the front reaches none of the targets. What reaches some of them has fewer points.
    **Differentiation:** none; this is a loop on the host around one compiled gradient.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> hills = esl.Quadratic(jnp.array([4.0, 1.0, 0.2]))
        >>> problem = esl.Problem(
        ...     hills,
        ...     members=8,
        ...     steps=20,
        ...     snapshots=10,
        ...     temperature=1e-3,
        ...     transport=esl.GaussianTransport(),
        ...     start=lambda key: 2 + jax.random.normal(key, (8, 3)),
        ... )
        >>> found = esl.front(
        ...     problem, key=jax.random.key(0), points=2, knots=3, families={}, iterations=10
        ... )
        >>> found.final_loss.shape, len(found.schedules)
        ((2,), 2)
    """
    check_kind("problem", problem, Problem, "be a Problem(potential, ...)")
    check_key("key", key)
    for name, value, least in (
        ("points", points, 1),
        ("knots", knots, 2),
        ("judge_runs", judge_runs, 2),
        ("iterations", iterations, 2),
    ):
        check_positive_int(name, value, least)
    if rate is not None:
        check_positive("rate", rate)
    aims = None if targets is None else [float(target) for target in targets]
    if aims is not None:
        _check_targets(aims)
    families = usual_families() if families is None else dict(families)
    for name, family in families.items():
        check_kind(f"families[{name!r}]", family, Family, "be a Family(start, make)")
    watcher = Unwatched() if watcher is None else watcher
    rate_key, search_key, match_key, judge_key = jax.random.split(key, 4)
    if rate is None:
        watcher.stage("rate")
        rate = float(jnp.asarray(stable_rate(problem, rate_key, watcher.trial)))
    slopes = np.geomspace(*_SLOPES, points if aims is None else len(aims))
    search = _Search(
        problem,
        search_key,
        match_keys=jax.random.split(match_key, 2),
        judge_keys=jax.random.split(judge_key, judge_runs),
        slopes=slopes,
        targets=aims,
        rate=rate,
        iterations=iterations,
        watcher=watcher,
    )
    all_of = {_MADE: knots_of(knots), **families}
    about = {
        **problem.parts(),
        "key": key,
        "slopes": slopes,
        "targets": aims,
        "rate": rate,
        "knots": knots,
        "iterations": iterations,
        "families": families,
    }
    fronts: dict[str, Front] = {}
    missing = []
    with session(checkpoints, about) as saved:
        order = [(name, p) for name in all_of for p in range(len(slopes))]

        def like(done: int) -> list[Any]:
            starts = (all_of[name].start(rate, search.cap) for name, _ in order[:done])
            return [_Point(_floating(x), *jnp.zeros(3)) for x in starts]

        restored = saved.restore(like)
        done, found = (0, []) if restored is None else restored
        for turn, (name, family) in enumerate(all_of.items()):
            mine = []
            for p in range(len(slopes)):
                place = len(mine) + len(slopes) * turn
                if place >= done:
                    before = mine[-1].x if mine else None
                    found.append(search.point(name, family, p, before))
                    saved.offer(len(found), lambda: found, last=len(found) == len(order))
                mine.append(found[place])
            try:
                fronts[name] = search.judged(name, family, mine)
            except InputError:
                if name == _MADE:
                    raise
                missing.append(f"{in_words(name)} is left out: it reaches none of the targets.")
    made = fronts.pop(_MADE)
    return dataclasses.replace(made, families=fronts, doubts=(*made.doubts, *missing))


class _Point(NamedTuple):
    """A point of a search, as it is saved."""

    x: Any
    """The numbers of the family."""
    slope: Array
    """λ at the end of its search."""
    spikes: Array
    """The share of its gradients that were cut."""
    lost: Array
    """The share of its gradients that were not taken, because one was not finite."""


class _Trace:
    """What a search has seen: the size of its gradients."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def factor(self, norm: float) -> float:
        """By what to multiply a gradient of that size."""
        usual = float(np.median(self.norms)) if len(self.norms) > 4 else np.inf
        self.norms.append(norm)
        return min(1.0, _CUT * usual / norm) if norm > 0 else 1.0

    @property
    def spikes(self) -> int:
        """How many gradients were cut."""
        norms = np.array(self.norms)
        return int(np.sum(norms > _CUT * np.median(norms)))


@dataclasses.dataclass
class _Search:
    problem: Problem
    key: Key
    match_keys: Array
    judge_keys: Array
    slopes: np.ndarray
    targets: list[float] | None
    rate: float
    iterations: int
    watcher: Watcher

    def __post_init__(self) -> None:
        self.cap = _CAP * self.rate
        start = self.problem.positions(jax.random.split(self.judge_keys[0])[0])
        self._start_loss = float(jnp.mean(self.problem.potential.at_start()(start)))
        if not self._start_loss > 0:
            raise refuse(
                "problem",
                "have losses above 0, whose logarithms are taken (add a constant to the potential)",
                f"starts at {self._start_loss:g}",
            )

    def point(self, name: str, family: Family, p: int, before: Any) -> _Point:
        """One point of a family, from the numbers of the point before."""
        self.watcher.stage(f"{name} {p + 1}/{len(self.slopes)}")
        calm = _floating(family.start(self.rate / _CAP, self.cap))
        x = calm if before is None else _floating(before)
        count = _gradients(self.iterations, first=before is None, made=name == _MADE)
        # Few iterations must move the logarithm of a rate by 1 or 2.
        optimizer = optax.adam(optax.cosine_decay_schedule(0.15, count), b1=0.8, b2=0.95)
        memory, trace, weight = optimizer.init(x), _Trace(), float(self.slopes[p])
        # All searches see the same keys, so that families differ by their shapes alone.
        key, kept = jax.random.fold_in(self.key, p), []
        for i in range(count):
            table, pull = jax.vjp(lambda x: self._table(family, x), x)
            gradient, loss = _gradient(
                self.problem, table, jnp.asarray(weight), jax.random.fold_in(key, i)
            )
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
        numbers = weight, trace.spikes / count, 1 - len(kept) / count
        return _Point(mean, *(jnp.asarray(number) for number in numbers))

    def judged(self, name: str, family: Family, points: list[_Point]) -> Front:
        """The front of a family, judged on the held-out keys, of the points that reach their
        targets.

        **Raises:** `InputError` if none does.
        """
        slopes, schedules, judgments, doubts = [], [], [], []
        unreached: list[InputError] = []
        for p, point in enumerate(points):
            which = f"Point {p + 1} of {in_words(name)}"
            self.watcher.stage(f"judging {name} {p + 1}/{len(points)}")
            schedule = family.make(point.x, self.cap)
            if self.targets is not None:
                try:
                    schedule = match_endpoint(
                        self.problem,
                        schedule,
                        target=self.targets[p],
                        learning_time=float(jnp.sum(schedule.rates(self.problem.steps))),
                        keys=self.match_keys,
                        name=name,
                        watch=self.watcher.trial,
                    )
                except InputError as error:
                    unreached.append(error)
                    doubts.append(
                        f"{which} is left out: no scale of its schedule reaches the loss "
                        f"{self.targets[p]:.4g}."
                    )
                    continue
            slopes.append(float(point.slope))
            schedules.append(schedule)
            judgments.append(judge(self.problem, schedule, self.judge_keys))
            self.watcher.judged(judgments[-1])
            doubts += [f"{which} {doubt}" for doubt in self._doubts(point, schedule, judgments[-1])]
        if not judgments:
            raise unreached[0]
        return Front(
            slopes=np.array(slopes),
            judgments=tuple(judgments),
            schedules=tuple(schedules),
            rate=self.rate,
            cap=self.cap,
            doubts=tuple(doubts),
        )

    def _table(self, family: Family, x: Any) -> Array:
        return self.problem.table(family.make(x, self.cap)).values

    def _doubts(
        self, point: _Point, schedule: AbstractSchedule, judgment: Judgment
    ) -> Iterator[str]:
        """The reasons not to believe a point, after its name."""
        before, after = self._start_loss, float(judgment.final_loss)
        if after > _HARDLY * before:
            yield (
                f"hardly trains (its loss is {after:.4g}, {before:.4g} at the start): no minimum "
                f"of log loss + λ log Σ was found at λ = {float(point.slope):.2g}; give targets."
            )
        ragged = raggedness(schedule, self.problem.steps)
        if ragged > _RAGGED:
            yield (
                f"is ragged (its log rates vary by {ragged:.2g} beyond one rise and one fall): "
                "noise, or rates too near the stability limit, drove it; take more iterations, "
                "fewer knots, or a larger slope."
            )
        if point.spikes > 0.1:
            yield (
                f"is near the stability limit: {float(point.spikes):.0%} of its gradients were "
                f"more than {_CUT:g} times the usual size, and were cut."
            )
        if point.lost > 0:
            yield (
                f"left the stable range: {float(point.lost):.0%} of its gradients were not finite, "
                "and the search went part of the way back each time."
            )


def name_of_point(i: int) -> str:
    """The name of a point's schedule in the files of a front."""
    return f"point_{i}"


def gradients_of_front(points: int, iterations: int, families: int) -> list[list[int]]:
    """How many gradients each point of the front and then of each family takes."""
    return [
        [_gradients(iterations, first=p == 0, made=i == 0) for p in range(points)]
        for i in range(1 + families)
    ]


def _gradients(iterations: int, *, first: bool, made: bool) -> int:
    count = iterations * _FIRST // _LATER if first else iterations
    return count if made else max(2, int(_OF_FAMILIES * count))


def raggedness(schedule: AbstractSchedule, steps: int) -> float:
    """The total variation of log η beyond that of one rise to the largest rate and one fall."""
    rates = np.asarray(schedule.rates(steps), float)
    logs = np.log(np.maximum(rates, 1e-3 * rates.max()))
    once = 2 * logs.max() - logs[0] - logs[-1]
    return float(np.sum(np.abs(np.diff(logs))) - once)


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


def _floating(x: Any) -> Any:
    """The same numbers in jax's present floating type."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), x)


def _on_lines(loss: np.ndarray, losses: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Σ at losses, log-log linear between points; the first and last lines go on beyond them."""
    order = np.argsort(losses)
    x, y, at = np.log(losses[order]), np.log(sigmas[order]), np.log(loss)
    if len(x) < 2:
        return np.exp(np.interp(at, x, y))
    place = np.clip(np.searchsorted(x, at), 1, len(x) - 1)
    share = (at - x[place - 1]) / (x[place] - x[place - 1])
    return np.exp(y[place - 1] + share * (y[place] - y[place - 1]))


def _check_targets(targets: list[float]) -> None:
    falling = all(a > b for a, b in itertools.pairwise(targets))
    if not targets or not falling or targets[-1] <= 0:
        raise refuse("targets", "be final losses above 0, from high to low", f"is {targets}")
