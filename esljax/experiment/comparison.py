r"""Schedules held against the speed limit at one final loss: same start and end, other timing.

With noise tied to the learning rate, a schedule is a change of clock of one path through the space
of laws; batches, whose noise is not tied to it, bend that path a little (`agreement` measures it).
Schedules are therefore compared fairly only where they end at the same place: each shape is scaled
until the mean final training loss is one common target. Then all are judged on keys
(initializations, batches, noise) that neither the scaling nor any optimization has seen.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    InputError,
    check_choice,
    check_fits,
    check_key,
    check_kind,
    check_positive,
    check_positive_int,
    door,
    refuse,
)
from esljax._types import Key, Keys, Scalar
from esljax.experiment import telling
from esljax.experiment.examining import Examination, examine
from esljax.experiment.judging import Judgment, final_loss, judge, outcome_of
from esljax.experiment.matching import Match, stable_rate
from esljax.experiment.problem import Problem
from esljax.experiment.saving import Leaves, leaves, save
from esljax.experiment.settings import RISING, in_words, usual_shapes
from esljax.experiment.spelling import spelled
from esljax.files import Checkpoints, session
from esljax.measures import Bracket, MinibatchNoise, average, constant_speed
from esljax.optimization import Iteration, Optimum
from esljax.optimization import optimize as _search
from esljax.results import table as text_table
from esljax.schedules import AbstractSchedule, Constant, Knots

FIGURES = ("schedules.png", "speed_limit.png")
_OPTIMIZED, _RETIMED = "optimized", "retimed"
_MADE = (_OPTIMIZED, _RETIMED)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Usual schedules and one found by gradient, judged at the same final loss."""

    rate: float
    """The constant learning rate from which every scaling and search started."""
    target: float
    """The mean final training loss that every schedule was scaled to."""
    judgments: Mapping[str, Judgment]
    """Each schedule's judgment, least Σ first. The searched one is named "optimized"; the one named
    "retimed" is the first shape passed at constant speed, in closed form. After an interruption
    only the schedules judged by then are here."""
    optimum: Optimum | None
    """The search by gradient and its history; None without a search."""
    left_out: tuple[str, ...] = ()
    """Which schedules were not judged and why, in sentences."""
    examination: Examination | None = None
    """The optimized schedule (without a search: the one with the least Σ) looked at more closely:
    the law's own W2², what the change of the loss proves of Σ, the errors of one run, and the noise
    of the batches. None after an interruption, and where members of that schedule diverge."""
    members: int = 0
    """n, of every run."""

    @property
    def bracket(self) -> Bracket | None:
        """Both sides of the W2² between the laws, for the schedule of `examination`."""
        return None if self.examination is None else self.examination.bracket

    @property
    def debiased_w2_squared(self) -> tuple[float, float] | None:
        """The lower side of `bracket`, without sampling bias, and its standard error over the
        held-out runs."""
        found: Any = self.bracket
        return None if found is None else (float(found.lower), float(found.lower_error))

    @property
    def batches(self) -> MinibatchNoise | None:
        """The noise of the batches along one held-out run of that schedule."""
        return None if self.examination is None else self.examination.batches

    @property
    def optimized(self) -> Judgment | None:
        """The judgment of the schedule found by gradient; None if it was not judged."""
        return self.judgments.get(_OPTIMIZED)

    @property
    def best_usual(self) -> str | None:
        """The schedule in common use with the least Σ: neither a rising shape nor one made here.
        None if none was judged."""
        apart = (*_MADE, *RISING)
        return next((name for name in self.judgments if name not in apart), None)

    @property
    def best_rising(self) -> str | None:
        """The rising shape with the least Σ; None if none was judged."""
        return next((name for name in self.judgments if name in RISING), None)

    @property
    def interrupted(self) -> bool:
        """Whether the search or the judging was ended early."""
        return self.optimum is not None and self.optimum.interrupted

    @property
    def misses_target(self) -> bool:
        """Whether the optimized schedule is more than 1 % off the target on the held-out keys."""
        optimized = self.optimized
        if self.optimum is None:
            return False
        return optimized is None or abs(float(optimized.final_loss) / self.target - 1) > 0.01

    def schedule(self, name: str = _OPTIMIZED) -> AbstractSchedule:
        """A schedule by name, scaled to the target, as a table of rates.

        **Raises:** `InputError` for a name that was not judged.
        """
        name = spelled(name, self.judgments)
        check_choice("name", name, tuple(self.judgments))
        return self.judgments[name].schedule

    def table(self) -> dict[str, np.ndarray]:
        """The numbers of all schedules as arrays in the order of `schedule`, and their standard
        errors, whose names end in `_error`."""
        content = telling.numbers(self)["schedules"]
        numbers = [
            name
            for name, value in next(iter(content.values())).items()
            if not isinstance(value, list | dict)
        ]
        columns = {"schedule": np.array(list(content))}
        for name in numbers:
            columns[name] = np.array([row[name] for row in content.values()])
            errors = [row["standard_error"].get(name) for row in content.values()]
            if None not in errors:
                columns[f"{name}_error"] = np.array(errors)
        return columns

    def plot(self) -> tuple[Any, Any]:
        """Draw the schedules, and the parts of Σ with the metric speed: two figures."""
        # Imported here: matplotlib takes long to load, and does not start everywhere.
        from esljax.figures import plot_schedules, plot_speed_limit

        reports = {name: judgment.report for name, judgment in self.judgments.items()}
        limit = telling.limit_in_figures(self)
        return plot_schedules(self.judgments), plot_speed_limit(reports, limit=limit)

    def save(self, folder: str | Path) -> None:
        """Write report.json, schedules.png, speed_limit.png and one JSON file for each schedule.

        **Raises:** `InputError` for a folder that cannot be written, and where a file would replace
        one that this package did not write.
        """
        save(self.leaves(), folder, {"rate": self.rate})

    def leaves(self) -> Leaves:
        """The files of this comparison: report.json, two figures, and the schedules."""
        figures = {name: lambda i=i: self.plot()[i] for i, name in enumerate(FIGURES)}
        schedules = {name: judgment.schedule for name, judgment in self.judgments.items()}
        return leaves("report.json", telling.numbers(self), figures, schedules)

    def __str__(self) -> str:
        lines = [telling.title(self), text_table(telling.rows(self)), *telling.sentences(self)]
        return "\n".join(lines)


@runtime_checkable
class Watcher(Protocol):
    """Watches a comparison, for instance to show its progress.

    A comparison calls `stage` at the start of each stage, then the method of the stage's work.
    """

    def stage(self, name: str) -> None:
        """A stage begins: "rate", "target", "matching NAME", "optimizing", "judging NAME" or
        "examining optimized"."""
        ...

    def trial(self, loss: float) -> None:
        """Some runs with one scale of a schedule ended with this mean final training loss."""
        ...

    def iteration(self, iteration: Iteration) -> None:
        """A step of the search is done; its `auxiliary` holds W2² and the final loss."""
        ...

    def judged(self, judgment: Judgment) -> None:
        """A schedule has been judged."""
        ...


class Unwatched:
    """A watcher that does nothing."""

    def stage(self, name: str) -> None: ...

    def trial(self, loss: float) -> None: ...

    def iteration(self, iteration: Iteration) -> None: ...

    def judged(self, judgment: Judgment) -> None: ...


_LEAST = {"knots": 2, "iterations": 1, "match_runs": 1, "judge_runs": 2}


@door
def compare(
    problem: Problem,
    *,
    key: Key,
    shapes: Mapping[str, AbstractSchedule] | None = None,
    target: float | None = None,
    rate: float | None = None,
    optimize: bool = True,
    knots: int = 12,
    iterations: int = 40,
    match_runs: int = 2,
    judge_runs: int = 5,
    watcher: Watcher | None = None,
    checkpoints: Checkpoints | None = None,
) -> Comparison:
    """Compare the usual schedules with one found by gradient, at the same final loss.

    Every usual shape is scaled until its mean final training loss is the target. The first of them
    is re-timed to constant speed in closed form (`constant_speed`), which needs no search: a search
    is worth what it gains beyond that. A search by gradient starts at the mean rate of the first
    shape and looks for the schedule of least Σ at that loss. Both results are scaled likewise, on
    the same keys as all others. All are then judged on common keys that no earlier stage has seen.

    **Args:**
    - `problem`: the learning problem, whose final losses are above 0.
    - `key`: the source of all keys. `jax.random.split(key, 4)[0]` is left to the caller, for
      instance for the random directions of the problem's transport.
    - `shapes`: schedules by name, whose scale does not matter; by default `usual_shapes()`.
    - `target`: the mean final training loss; by default that of a constant schedule at `rate`.
    - `rate`: the constant learning rate per step. It sets the default target and the scale from
      which every search starts; by default `stable_rate(...)`, a rate clear of the stability limit.
    - `optimize`: whether to search at all.
    - `knots`: of the searched log learning rate. - `iterations`: gradient steps of the search.
    - `match_runs`: runs whose mean loss is matched. - `judge_runs`: held-out runs, at least 2.
    - `watcher`: called at each stage and after each piece of work.
    - `checkpoints`: where to save the stages; see `Checkpoints`. A resumed comparison ends with the
      same bits.

    **Returns:** `Comparison`. `KeyboardInterrupt` during the search ends the search alone, and
    after the first judgment it ends the judging; `optimum.interrupted` is then True.
    **Raises:** `InputError` if the constant schedule is unstable at `rate`, or if no shape can
    reach the target. Those that cannot, where others can, are left out, and the result says so.
    **Differentiation:** none; this is a loop on the host around compiled runs.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> data = esl.datasets.two_moons(100)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 4, 2), data.train)
        >>> problem = esl.Problem(potential, members=4, steps=10, snapshots=5, test=data.test)
        >>> shapes = {"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)}
        >>> result = esl.compare(
        ...     problem, rate=0.2, key=jax.random.key(0), shapes=shapes, iterations=4, judge_runs=2
        ... )
        >>> sorted(result.judgments)
        ['constant', 'cosine', 'optimized', 'retimed']
    """
    counts = {
        "knots": knots,
        "iterations": iterations,
        "match_runs": match_runs,
        "judge_runs": judge_runs,
    }
    shapes = usual_shapes() if shapes is None else dict(shapes)
    watcher = Unwatched() if watcher is None else watcher
    _check_settings(problem, rate, key, target, shapes, counts)
    for name, count in counts.items():
        # Of a knot value, slope and two moments of the search; of a run a key and its numbers.
        check_fits(name, 64.0 * count, f"{count:,} {name}", f"take fewer {name}")
    about = problem.parts()
    about |= {**counts, "rate": rate, "key": key, "target": target, "shapes": shapes}
    # The first key is the caller's, as documented.
    _, match_key, search_key, judge_key = jax.random.split(key, 4)
    match_keys = jax.random.split(match_key, match_runs)

    with session(_within(checkpoints, "matching"), about) as saved:
        rate, target, matched = _match_usual(
            problem, match_keys, shapes, rate, target, saved, watcher
        )
    left_out = [
        f"No scale of {in_words(name)} reaches the loss {target:.4g}: it is left out."
        for name in shapes
        if name not in matched
    ]
    match = Match(problem, rate * problem.steps, match_keys, watcher.trial)
    first = next(iter(matched.values()))
    start = Knots(jnp.full(knots, jnp.mean(first.values)))
    optimum = None
    try:
        watcher.stage(f"matching {_RETIMED}")
        matched[_RETIMED] = match(_retimed(problem, first, match.keys), _RETIMED, target)
    except InputError as error:
        left_out.append(f"The re-timed schedule is left out: {error}")
    if optimize:
        watcher.stage("optimizing")
        optimum = _search(
            _Objective(problem, jnp.asarray(target)),
            start,
            key=search_key,
            iterations=iterations,
            callback=watcher.iteration,
            checkpoints=_within(checkpoints, "search"),
            mesh=problem.mesh,
        )
    judgments, examination = {}, None
    try:
        if optimum is not None:
            searched = optimum.controls
            watcher.stage(f"matching {_OPTIMIZED}")
            found = searched
            # A schedule that cannot be scaled to the target is judged as it is.
            if bool(np.all(np.isfinite(searched.values))):
                try:
                    found = match(searched, _OPTIMIZED, target)
                except InputError as error:
                    left_out.append(f"The optimized schedule is judged as it is: {error}")
            matched = {_OPTIMIZED: found, **matched}
        judge_keys = jax.random.split(judge_key, judge_runs)
        for name, schedule in matched.items():
            watcher.stage(f"judging {name}")
            judgments[name] = judge(problem, schedule, judge_keys)
            watcher.judged(judgments[name])
        examined = _OPTIMIZED if optimum is not None else min(judgments, key=_sigma(judgments))
        watcher.stage(f"examining {examined}")
        examination = examine(problem, matched[examined], judge_keys)
    except KeyboardInterrupt:
        if not judgments:
            raise
        optimum = None if optimum is None else optimum.as_interrupted()
    ordered = {name: judgments[name] for name in sorted(judgments, key=_sigma(judgments))}
    said = tuple(left_out)
    return Comparison(rate, target, ordered, optimum, said, examination, problem.members)


# --- The stages -----------------------------------------------------------------------------------


def _check_settings(
    problem: Problem,
    rate: float | None,
    key: Key,
    target: float | None,
    shapes: Mapping[str, AbstractSchedule],
    counts: Mapping[str, int],
) -> None:
    check_kind("problem", problem, Problem, "be a Problem(potential, ...)")
    check_key("key", key)
    if rate is not None:
        check_positive("rate", rate)
    if target is not None:
        check_positive("target", target)
    for name, count in counts.items():
        check_positive_int(name, count, _LEAST[name])
    if not shapes or not shapes.keys().isdisjoint(_MADE):
        raise refuse(
            "shapes",
            f"hold at least one schedule, and none named {_OPTIMIZED!r} or {_RETIMED!r}",
            f"holds {', '.join(shapes) or 'none'}",
        )


def _match_usual(
    problem: Problem,
    keys: Keys,
    shapes: Mapping[str, AbstractSchedule],
    rate: float | None,
    target: float | None,
    saved: Any,
    watcher: Watcher,
) -> tuple[float, float, dict[str, Knots]]:
    """The rate, the target, and every usual shape that reaches it, scaled; saved after each.

    **Raises:** `InputError` if none does.
    """
    # Saved with the target, because computing it again costs as much as matching a shape.
    like = Knots(jnp.ones(problem.steps + 1), "linear")
    restored = saved.restore(lambda done: (jnp.zeros(2), [like] * done))
    done, (known, matched) = (0, (None, [])) if restored is None else restored
    if rate is None and known is not None:
        rate = float(known[0])
    if rate is None:
        watcher.stage("rate")
        # In the precision that is saved, so that a resumed comparison has the same bits.
        rate = float(jnp.asarray(stable_rate(problem, keys[0], watcher.trial)))
    if known is not None:
        target = float(known[1])
    found = target is None
    if target is None:
        watcher.stage("target")
        target = _target(problem, rate, keys)
    match = Match(problem, rate * problem.steps, keys, watcher.trial)
    unreached: list[InputError] = []
    for name, shape in list(shapes.items())[done:]:
        watcher.stage(f"matching {name}")
        try:
            matched.append(match(shape, name, target))
        except InputError as error:
            if found:
                _check_stable(problem, rate, target, keys)
            unreached.append(error)
            # In a checkpoint, a schedule without rates.
            matched.append(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), like))
        if len(unreached) < len(matched):
            # What no shape has reached yet may be refused in the end.
            saved.offer(
                len(matched),
                lambda: (jnp.asarray([rate, target]), matched),
                last=len(matched) == len(shapes),
            )
    reached = {
        name: schedule
        for name, schedule in zip(shapes, matched, strict=True)
        if bool(jnp.all(jnp.isfinite(schedule.values)))
    }
    if not reached:
        raise unreached[0]
    return rate, target, reached


def _target(problem: Problem, rate: float, keys: Keys) -> float:
    """The mean final training loss of the constant schedule."""
    target = final_loss(problem, Constant(rate), keys)
    if not np.isfinite(target):
        raise refuse(
            "rate",
            "leave the constant schedule stable",
            f"is {rate:g}: its final loss is {target}",
        )
    if not target > 0:
        raise refuse(
            "problem",
            "have final losses above 0, (add a constant to the potential)",
            f"ends at {target:g} with the constant schedule",
        )
    return target


def _check_stable(problem: Problem, rate: float, target: float, keys: Keys) -> None:
    """Reject a rate at which the constant schedule, the source of the target, diverges."""
    starts = [problem.positions(jax.random.split(key)[0]) for key in keys]
    potential: Any = problem.potential.at_end()
    start = float(np.mean([potential(positions) for positions in starts]))
    if not target < start:
        raise refuse(
            "rate",
            "leave the constant schedule stable",
            f"is {rate:g}: the loss goes from {start:.4g} to {target:.4g} (lower the rate)",
        )


def _sigma(judgments: Mapping[str, Judgment]) -> Callable[[str], float]:
    return lambda name: float(judgments[name].report.entropy_production)


class _Objective(eqx.Module):
    """Σ, under the constraint that the final loss is at most the target.

    A module, and no function of its own, so that the data and the target are arguments of the
    compiled search: another seed finds another target, and the same program.
    """

    problem: Problem
    target: Scalar

    def __call__(self, learning_rate: Knots, key: Key) -> Any:
        outcome = self.problem.run(learning_rate, key)
        sigma = outcome.report.entropy_production
        return (
            sigma,
            outcome.final_loss / self.target - 1,
            (outcome.report.w2_squared, outcome.final_loss),
        )


def _retimed(problem: Problem, table: Knots, keys: Keys) -> Knots:
    """The schedule of constant speed along the mean of some runs of another schedule."""
    reports = [outcome_of(problem, table, key).report for key in keys]
    if len(reports) == 1:
        return constant_speed(reports[0])
    return constant_speed(average(jax.tree.map(lambda *runs: jnp.stack(runs), *reports)))


def _within(checkpoints: Checkpoints | None, stage: str) -> Checkpoints | None:
    """The checkpoints of one stage, in a folder of its own."""
    if checkpoints is None:
        return None
    return dataclasses.replace(checkpoints, folder=Path(checkpoints.folder) / stage)
