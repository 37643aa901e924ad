r"""The front of loss and Σ: the least entropy production at each final loss.

A point of the front minimizes, over all schedules η,

    log E Φ(q₁) + λ log Σ,

and λ is the slope of the front there: 1 % more Σ buys λ % less loss. It is a local minimum: where
nothing moves, log Σ has no lower bound. A front that is nowhere as steep as λ has no such point: a
ladder of constant rates shows it beforehand, and then the points have the least Σ at given losses.
They are found by continuation: each search starts from the schedule of the one before, and every
gradient sees an initialization, batches and noise of its own. Families of usual schedules are tuned
by the same gradient of the same objective, so that each is held against the front at its best.
Where a search ends above a family, it starts again from that one's schedule.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    InputError,
    check_key,
    check_kind,
    check_positive,
    check_positive_int,
    door,
    refuse,
)
from esljax._types import Float, Key, Keys
from esljax.experiment.comparison import Unwatched, Watcher
from esljax.experiment.families import Family, knots_of, usual_families
from esljax.experiment.judging import Judgment, judge
from esljax.experiment.matching import stable_rate
from esljax.experiment.problem import Problem
from esljax.experiment.saving import Leaves, leaves, save
from esljax.experiment.searching import (
    CUT,
    LATER,
    SLOPES,
    Point,
    Search,
    empty,
    gradients,
    losses_to_reach,
)
from esljax.experiment.settings import in_words
from esljax.files import Checkpoints, session
from esljax.results import StandardErrors, concise
from esljax.results import table as text_table
from esljax.schedules import AbstractSchedule

_NO_SLOPES = (
    f"Slopes of {SLOPES[0]:g} to {SLOPES[1]:g} have no minimum here, as a constant rate shows; its "
    "points have the least Σ at given losses instead, from half way (in log loss) between the "
    "start and the best constant rate to that. Give `targets` for others."
)
# Total variation of log η beyond one rise and one fall: a ragged schedule.
_RAGGED = 0.5
# A run of more than this many times the median loss has left the others.
_APART = 3.0
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
    iterations: int = LATER,
    watcher: Watcher | None = None,
    checkpoints: Checkpoints | None = None,
) -> Front:
    """Find the least Σ at each final loss, and hold families of usual schedules against it.

    **Args:**
    - `problem`: the learning problem, whose final losses are above 0.
    - `key`: the source of all keys: of the searches and, apart from them, of the judging.
    - `points`: P, with slopes λ from .42 to .14, or, where a ladder of constant rates shows no
      minimum at them, with losses that it reaches. - `knots`: of the searched learning rate.
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
    start = problem.positions(jax.random.split(judge_key)[0])
    start_loss = float(jnp.mean(problem.potential.at_start()(start)))
    if not start_loss > 0:
        raise refuse(
            "problem",
            "have losses above 0, whose logarithms are taken (add a constant to the potential)",
            f"starts at {start_loss:g}",
        )
    doubts = []
    if aims is None:
        watcher.stage("slopes")
        aims = losses_to_reach(problem, rate, start_loss, points, rate_key, watcher)
        if aims is not None:
            doubts.append(_NO_SLOPES)
    slopes = np.geomspace(*SLOPES, points if aims is None else len(aims))
    search = Search(
        problem,
        search_key,
        match_key,
        slopes=slopes,
        targets=aims,
        rate=rate,
        iterations=iterations,
        watcher=watcher,
    )
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
    free, places = knots_of(knots), range(len(slopes))
    # The front, then the families, then the front once more.
    all_of = [(_MADE, free), *families.items(), *[(_MADE, free)][: len(families)]]
    found: list[Point] = []
    with session(checkpoints, about) as saved:
        order = [(turn, p) for turn in range(len(all_of)) for p in places]

        def like(done: int) -> list[Point]:
            return [empty(all_of[turn][1].start(rate, search.cap)) for turn, _ in order[:done]]

        def at(turn: int, p: int) -> Point:
            return found[turn * len(slopes) + p]

        done, found = saved.restore(like) or (0, [])
        for turn, p in order[done:]:
            name, family = all_of[turn]
            before = at(turn, p - 1) if p > 0 else None
            if turn <= len(families):
                point = search.point(name, family, p, before, made=turn == 0)
            else:
                others = {i: (all_of[i][1], at(i, p)) for i in range(1, turn)}
                point = search.again(name, family, p, at(0, p), others)
            found.append(point)
            saved.offer(len(found), lambda: found, last=len(found) == len(order))
    held_out = _Judge(search, jax.random.split(judge_key, judge_runs), watcher, start_loss)

    def source(point: Point, p: int) -> _Found:
        """A point of the front, or the family's whose schedule stands there."""
        taken = int(point.taken)
        if taken < 0:
            return _Found(point, free)
        return _Found(at(taken, p), all_of[taken][1], all_of[taken][0])

    last = len(all_of) - 1 if families else 0
    made = held_out.front(_MADE, [source(at(last, p), p) for p in places])
    fronts = {}
    for turn, (name, family) in enumerate(families.items(), start=1):
        try:
            fronts[name] = held_out.front(name, [_Found(at(turn, p), family) for p in places])
        except InputError:
            doubts.append(f"{in_words(name)} is left out: it reaches none of the targets.")
    return dataclasses.replace(made, families=fronts, doubts=(*made.doubts, *doubts))


class _Found(NamedTuple):
    """A point of a front: its numbers, the family whose schedules they make, and that one's name
    where the point was taken from it."""

    point: Point
    family: Family
    taken_from: str | None = None


@dataclasses.dataclass
class _Judge:
    search: Search
    keys: Keys
    watcher: Watcher
    start_loss: float

    def front(self, name: str, points: list[_Found]) -> Front:
        """The front of a family, judged on the held-out keys, of the points that reach their
        targets.

        **Raises:** `InputError` if none does.
        """
        search = self.search
        slopes, schedules, judgments, doubts = [], [], [], []
        for p, found in enumerate(points):
            which = f"Point {p + 1} of {in_words(name)}"
            self.watcher.stage(f"judging {name} {p + 1}/{len(points)}")
            schedule = search.schedule(found.family, found.point)
            if schedule is None:
                doubts.append(
                    f"{which} is left out: no scale of its schedule reaches the loss "
                    f"{_targets(search)[p]:.4g}."
                )
                continue
            slopes.append(float(found.point.slope))
            schedules.append(schedule)
            judgments.append(judge(search.problem, schedule, self.keys))
            self.watcher.judged(judgments[-1])
            doubts += [f"{which} {doubt}" for doubt in self._doubts(found, schedule, judgments[-1])]
        if not judgments:
            raise refuse(
                "targets",
                f"be losses that {in_words(name)} can reach",
                "is " + ", ".join(f"{target:.4g}" for target in _targets(search)),
            )
        return Front(
            slopes=np.array(slopes),
            judgments=tuple(judgments),
            schedules=tuple(schedules),
            rate=search.rate,
            cap=search.cap,
            doubts=tuple(doubts),
        )

    def _doubts(
        self, found: _Found, schedule: AbstractSchedule, judgment: Judgment
    ) -> Iterator[str]:
        """The reasons not to believe a point, after its name."""
        point, after = found.point, float(judgment.final_loss)
        if after > _HARDLY * self.start_loss:
            yield (
                f"hardly trains (its loss is {after:.4g}, {self.start_loss:.4g} at the start): no "
                "minimum of log loss + λ log Σ was found at "
                f"λ = {float(point.slope):.2g}; give targets."
            )
        losses = np.asarray(judgment.final_losses)
        apart = losses > _APART * np.median(losses)
        if apart.any():
            yield (
                f"is not reliable: {apart.sum()} of its {losses.size} held-out runs ended at more "
                f"than {_APART:g} times the median loss."
            )
        if found.taken_from is not None:
            yield (
                f"is that of {in_words(found.taken_from)}: no search of free knots found a better "
                "one."
            )
            return
        ragged = raggedness(schedule, self.search.problem.steps)
        if ragged > _RAGGED:
            yield (
                f"is ragged (its log rates vary by {ragged:.2g} beyond one rise and one fall): "
                "noise, or rates too near the stability limit, drove it; take more iterations, "
                "fewer knots, or a larger slope."
            )
        if point.spikes > 0.1:
            yield (
                f"is near the stability limit: {float(point.spikes):.0%} of its last gradients "
                f"were more than {CUT:g} times the usual size, and were cut."
            )
        if point.lost > 0:
            yield (
                f"left the stable range: {float(point.lost):.0%} of its gradients were not finite, "
                "and the search went part of the way back each time."
            )


def _targets(search: Search) -> list[float]:
    return search.targets or []


def name_of_point(i: int) -> str:
    """The name of a point's schedule in the files of a front."""
    return f"point_{i}"


def gradients_of_front(
    points: int, iterations: int, families: Iterable[str]
) -> dict[str, list[int]]:
    """How many gradients each point of the front and then of each family takes, by name."""
    return {
        name: [gradients(iterations, first=p == 0, made=name == _MADE) for p in range(points)]
        for name in (_MADE, *families)
    }


def raggedness(schedule: AbstractSchedule, steps: int) -> float:
    """The total variation of log η beyond that of one rise to the largest rate and one fall."""
    rates = np.asarray(schedule.rates(steps), float)
    logs = np.log(np.maximum(rates, 1e-3 * rates.max()))
    once = 2 * logs.max() - logs[0] - logs[-1]
    return float(np.sum(np.abs(np.diff(logs))) - once)


def _on_lines(loss: np.ndarray, losses: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Σ at losses, log-log linear between points; the first and last lines go on beyond them."""
    order = np.argsort(losses)
    x, y, at = np.log(losses[order]), np.log(sigmas[order]), np.log(loss)
    if len(x) < 2:
        return np.exp(np.interp(at, x, y))
    place = np.clip(np.searchsorted(x, at), 1, len(x) - 1)
    # Two points may have one loss.
    apart = x[place] - x[place - 1]
    share = np.where(apart > 0, (at - x[place - 1]) / np.where(apart > 0, apart, 1), 0)
    return np.exp(y[place - 1] + share * (y[place] - y[place - 1]))


def _check_targets(targets: list[float]) -> None:
    falling = all(a > b for a, b in itertools.pairwise(targets))
    if not targets or not falling or targets[-1] <= 0:
        raise refuse("targets", "be final losses above 0, from high to low", f"is {targets}")
