r"""Schedules held against the speed limit at one final loss: same start and end, other timing.

With noise tied to the learning rate, a schedule is a change of clock of one path through the space
of laws; batches, whose noise is not tied to it, bend that path a little (`agreement` measures it).
Schedules are therefore compared fairly only where they end at the same place: each shape is scaled
until the mean final training loss is one common target. Then all are judged on keys
(initializations, batches, noise) that neither the scaling nor any optimization has seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esljax._checks import (
    InputError,
    check_fits,
    check_key,
    check_positive,
    check_positive_int,
    refuse,
)
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.experiment.memory import Plan, plan_memory
from esljax.experiment.settings import RISING, SCHEDULES
from esljax.files import Checkpoints, session
from esljax.measures import (
    MinibatchNoise,
    SpeedLimit,
    average,
    constant_speed,
    minibatch_noise,
    speed_limit,
)
from esljax.optimization import Iteration, Optimum, optimize
from esljax.potentials import Examples, FlaxLoss
from esljax.results import StandardErrors, renamed_error
from esljax.schedules import AbstractSchedule, Constant, Knots, as_schedule
from esljax.sharding import replicate
from esljax.simulation import AbstractGradient, HessianAdjoint, Langevin, Trajectory, simulate
from esljax.transport import AbstractTransport


class Outcome(eqx.Module):
    """One run of a `Problem`."""

    report: SpeedLimit
    """Σ, L², W2² and the gap, in squared parameters."""
    final_loss: Scalar
    """E Φ(q₁): the mean of the members' training loss over all examples, shape ()."""
    test_accuracy: Scalar
    """The mean of the members' share of test examples classified correctly, shape ()."""


class Problem(eqx.Module):
    """A learning problem whose runs differ only in the learning-rate schedule and the key.

    **Differentiation:** `run` differentiates in the schedule, by `gradient`.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> from esljax.experiment import Problem
        >>> data = esl.datasets.two_moons(100)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 4, 2), data.train)
        >>> problem = Problem(
        ...     potential, data.test, 1e-6, esl.ExactTransport(), members=4, steps=10, snapshots=5
        ... )
        >>> outcome = problem.run(esl.Constant(0.1), jax.random.key(0))
        >>> bool(outcome.report.gap >= 0)
        True
    """

    potential: FlaxLoss
    """Φ, the training loss."""
    test: Examples
    """Held-out examples: inputs (m, ...) and labels (m,)."""
    temperature: AbstractSchedule = eqx.field(converter=as_schedule)
    """T, in units of the loss: a schedule or a number."""
    transport: AbstractTransport
    """The transport that defines Σ and W2²."""
    members: int = eqx.field(static=True)
    """n, members of the ensemble."""
    steps: int = eqx.field(static=True)
    """K, training steps of a run."""
    snapshots: int = eqx.field(static=True)
    """J, links between the J+1 snapshots of a run; divides K."""
    jackknife: int = eqx.field(static=True, default=0)
    """Most groups of members left out for the standard errors of one run; 0 for no errors."""
    mesh: Mesh | None = eqx.field(static=True, default=None)
    """The devices that share the members; None for the default device."""
    gradient: AbstractGradient = HessianAdjoint()
    """How a run is differentiated."""

    def run(self, learning_rate: AbstractSchedule, key: Key) -> Outcome:
        """Train an ensemble from fresh initializations and measure it."""
        path = self.path(learning_rate, key)
        outcome = Outcome(
            report=speed_limit(path, transport=self.transport, jackknife=self.jackknife),
            final_loss=jnp.mean(self.potential(path.final)),
            test_accuracy=jnp.mean(self.potential.accuracy(path.final, self.test)),
        )
        return replicate(outcome, self.mesh)

    def path(self, learning_rate: AbstractSchedule, key: Key) -> Trajectory:
        """The training run that `run` measures."""
        start_key, path_key = jax.random.split(key)
        start = self.potential.init(members=self.members, key=start_key).astype(
            self.potential.inputs.dtype
        )
        rule = Langevin(learning_rate, self.temperature)
        return simulate(
            self.potential,
            rule,
            start,
            steps=self.steps,
            snapshots=self.snapshots,
            key=path_key,
            gradient=self.gradient,
            mesh=self.mesh,
        )

    def plan_memory(self, *, devices: int = 1, differentiated: bool = True) -> Plan:
        """The memory of one run on each device, with its gradient if `differentiated`."""
        start = jax.eval_shape(
            lambda key: self.potential.init(members=self.members, key=key), jax.random.key(0)
        )
        return plan_memory(
            self.potential,
            jax.ShapeDtypeStruct(start.shape, self.potential.inputs.dtype),
            steps=self.steps,
            snapshots=self.snapshots,
            transport=self.transport,
            gradient=self.gradient,
            devices=devices,
            differentiated=differentiated,
        )

    def table(self, schedule: AbstractSchedule) -> Knots:
        """The rates of `schedule` at every step, in the one form that all compiled runs share."""
        schedule = schedule.over(self.steps)
        ends = schedule(jnp.ones((), jnp.result_type(float)))
        return Knots(jnp.append(schedule.rates(self.steps), ends), "linear")


class Judgment(eqx.Module):
    """A schedule judged on R held-out keys: means over the keys, with standard errors."""

    schedule: Knots
    """The schedule that was judged, with a rate for each step."""
    report: SpeedLimit
    """Means of Σ, L², W2² and the gap, in squared parameters, with standard errors of its own."""
    final_loss: Scalar
    """Mean final training loss, shape ()."""
    test_accuracy: Scalar
    """Mean test accuracy, shape ()."""
    standard_error: StandardErrors
    """Of `final_loss` and `test_accuracy`, over the keys."""
    errors: str = eqx.field(static=True)
    """The source of the standard errors, in words."""
    entropy_productions: Float[Array, " R"]
    """Σ of each key, in squared parameters, for paired comparisons."""

    final_loss_error = renamed_error("final_loss")
    test_accuracy_error = renamed_error("test_accuracy")


class Agreement(NamedTuple):
    """How far the paths of several schedules agree: a change of clock leaves L² as it is."""

    spread: float
    """The largest L² less the least, as a share of their mean."""
    chi_squared: float
    """Σ (L² - mean)²/error² over the schedules, with the mean weighted by the errors."""
    freedom: int
    """The degrees of freedom of `chi_squared`, and its mean if the paths are one."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Usual schedules and one found by gradient, judged at the same final loss."""

    target: float
    """The mean final training loss that every schedule was scaled to."""
    judgments: Mapping[str, Judgment]
    """Each schedule's judgment, least Σ first. The searched one is named "optimized"; the one named
    "retimed" is the first shape passed at constant speed, in closed form. After an interruption
    only the schedules judged by then are here."""
    optimum: Optimum
    """The search by gradient and its history."""
    left_out: str = ""
    """Why the re-timed schedule was not judged, a sentence; "" if it was."""
    debiased_w2_squared: tuple[float, float] | None = None
    """W2² of the optimized schedule without its sampling bias, in squared parameters, and its
    standard error over the held-out runs. None below 8 members, and after an interruption."""
    batches: MinibatchNoise | None = None
    """The noise of the batches along one held-out run of the optimized schedule. None without
    batches, and after an interruption."""

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
    def misses_target(self) -> bool:
        """Whether the optimized schedule is more than 1 % off the target on the held-out keys."""
        optimized = self.optimized
        return optimized is None or abs(float(optimized.final_loss) / self.target - 1) > 0.01


@runtime_checkable
class Watcher(Protocol):
    """Watches a comparison, for instance to show its progress.

    A comparison calls `stage` at the start of each stage, then the method of the stage's work.
    """

    def stage(self, name: str) -> None:
        """A stage begins: "target", "matching NAME", "optimizing", "judging NAME" or
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


class _Unwatched:
    """A watcher that does nothing."""

    def stage(self, name: str) -> None: ...

    def trial(self, loss: float) -> None: ...

    def iteration(self, iteration: Iteration) -> None: ...

    def judged(self, judgment: Judgment) -> None: ...


_OPTIMIZED, _RETIMED = "optimized", "retimed"
_MADE = (_OPTIMIZED, _RETIMED)
# From this many members on, halves of them are worth a distance.
_DEBIASED_FROM = 8
# Only the same problem resumes a checkpoint; its mesh may differ, to resume on other devices.
_PARTS = [field.name for field in dataclasses.fields(Problem) if field.name != "mesh"]
_LEAST = {"knots": 2, "iterations": 1, "match_runs": 1, "judge_runs": 2}


def compare(
    problem: Problem,
    *,
    rate: float,
    key: Key,
    target: float | None = None,
    shapes: Mapping[str, AbstractSchedule] | None = None,
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
    shape and looks for the schedule of least Σ at that loss. Both results are scaled likewise. All
    are then judged on common keys that no earlier stage has seen.

    **Args:**
    - `problem`: the learning problem.
    - `rate`: the constant learning rate per step. It sets the default target and the scale from
      which every search starts.
    - `key`: the source of all keys. `jax.random.split(key, 4)[0]` is left to the caller, for
      instance for the random directions of the problem's transport.
    - `target`: the mean final training loss; by default that of a constant schedule at `rate`.
    - `shapes`: schedules by name, whose scale does not matter; by default `usual_shapes()`.
    - `knots`: of the searched log learning rate. - `iterations`: gradient steps of the search.
    - `match_runs`: runs whose mean loss is matched. - `judge_runs`: held-out runs, at least 2.
    - `watcher`: called at each stage and after each piece of work.
    - `checkpoints`: where to save the stages; see `Checkpoints`. A resumed comparison ends with the
      same bits.

    **Returns:** `Comparison`. `KeyboardInterrupt` during the search ends the search alone, and
    after the first judgment it ends the judging; `optimum.interrupted` is then True.
    **Raises:** `InputError` if the constant schedule is unstable at `rate`, or if a shape cannot
    reach the target.
    **Differentiation:** none; this is a loop on the host around compiled runs.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> from esljax.experiment import Problem, compare
        >>> data = esl.datasets.two_moons(100)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 4, 2), data.train)
        >>> problem = Problem(
        ...     potential, data.test, 1e-6, esl.ExactTransport(), members=4, steps=10, snapshots=5
        ... )
        >>> shapes = {"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)}
        >>> result = compare(
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
    watcher = _Unwatched() if watcher is None else watcher
    _check_settings(rate, key, target, shapes, counts)
    for name, count in counts.items():
        # Of a knot value, slope and two moments of the search; of a run a key and its numbers.
        check_fits(name, 64.0 * count, f"{count:,} {name}", f"take fewer {name}")
    about = {name: getattr(problem, name) for name in _PARTS}
    about |= {**counts, "rate": rate, "key": key, "target": target, "shapes": shapes}
    # The first key is the caller's, as documented.
    _, match_key, search_key, judge_key = jax.random.split(key, 4)
    match = _Match(problem, rate * problem.steps, jax.random.split(match_key, match_runs), watcher)

    with session(_within(checkpoints, "matching"), about) as saved:
        target, matched = _match_usual(match, shapes, target, rate, saved)
    first = next(iter(matched.values()))
    start = Knots(jnp.full(knots, jnp.mean(first.values)))
    left_out = ""
    try:
        matched[_RETIMED] = match(_retimed(problem, first, match.keys), _RETIMED, target)
    except InputError as error:
        left_out = f"The re-timed schedule is left out: {error}"
    watcher.stage("optimizing")
    optimum = optimize(
        _objective(problem, target),
        start,
        key=search_key,
        iterations=iterations,
        callback=watcher.iteration,
        checkpoints=_within(checkpoints, "search"),
    )
    judgments, debiased, batches = {}, None, None
    try:
        searched = optimum.controls
        # A schedule that is not finite cannot be scaled to the target; it is judged as it is.
        finite = bool(np.all(np.isfinite(searched.values)))
        matched[_OPTIMIZED] = match(searched, _OPTIMIZED, target) if finite else searched
        judge_keys = jax.random.split(judge_key, judge_runs)
        for name in (_OPTIMIZED, *(name for name in matched if name != _OPTIMIZED)):
            watcher.stage(f"judging {name}")
            judgments[name] = judge(problem, matched[name], judge_keys)
            watcher.judged(judgments[name])
        watcher.stage(f"examining {_OPTIMIZED}")
        debiased = _debiased_w2_squared(problem, matched[_OPTIMIZED], judge_keys)
        batches = _batches(problem, matched[_OPTIMIZED], judge_keys[0])
    except KeyboardInterrupt:
        if not judgments:
            raise
        optimum = optimum.as_interrupted()
    ordered = sorted(judgments.items(), key=lambda item: float(item[1].report.entropy_production))
    return Comparison(target, dict(ordered), optimum, left_out, debiased, batches)


def usual_shapes() -> dict[str, AbstractSchedule]:
    """The learning-rate schedules in common use, and two that rise, with peak 1, by name."""
    return {name: make() for name, make in SCHEDULES.items()}


def match_endpoint(
    problem: Problem,
    shape: AbstractSchedule,
    *,
    target: float,
    learning_time: float,
    keys: Keys,
    name: str = "shape",
    tolerance: float = 1e-3,
    watch: Callable[[float], Any] = lambda loss: None,
) -> Knots:
    """Scale a schedule until its mean final training loss over `keys` is `target`.

    The search starts at the scale where the learning time U = Σ η_k is `learning_time`, because
    with little noise the loss depends on U alone.

    **Args:** `shape`: any schedule with U > 0. `target`: the loss. `learning_time`: U, in squared
    parameters per unit of loss. `keys`: (R,), common to all trials. `name`: of the shape, for
    messages. `tolerance`: relative, on the loss. `watch`: called with the loss of each trial.
    **Returns:** the scaled schedule as a table of `Knots`.
    **Raises:** `InputError` if no scale reaches the target before the run leaves the stable range
    of its step.
    """
    # Imported here because it takes a sixth of the time of `import esljax`.
    from scipy.optimize import root_scalar

    table = problem.table(shape)
    time = float(jnp.sum(table.rates(problem.steps)))
    if not time > 0:
        raise refuse(name, "have a positive sum of rates", f"has the sum {time:g}")
    first = np.log(learning_time / time)
    trials: list[tuple[float, float]] = []

    @functools.cache
    def excess(log_scale: float) -> float:
        loss = final_loss(problem, Knots(table.values * np.exp(log_scale), "linear"), keys)
        trials.append((log_scale, loss))
        watch(loss)
        if not np.isfinite(loss) or loss <= 0 or abs(log_scale - first) > 5:
            raise _unreachable(name, target, trials)
        # Zero within the tolerance ends the secant search at once.
        return 0.0 if abs(loss / target - 1) < tolerance else np.log(loss / target)

    at_start = excess(first)
    # Late in training the loss falls about as U to the power -1/2: the second point of the secant.
    result = (
        root_scalar(excess, x0=first, x1=first + np.clip(2 * at_start, -1, 1) + 1e-3, maxiter=12)
        if at_start
        else None
    )
    if result is not None and not abs(trials[-1][1] / target - 1) < tolerance:
        raise _unreachable(name, target, trials)
    return Knots(table.values * np.exp(trials[-1][0]), "linear")


def final_loss(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> float:
    """The mean final training loss E Φ(q₁) of a schedule over `keys` (R,)."""
    table = problem.table(schedule)
    return float(np.mean([_outcome(problem, table, key).final_loss for key in keys]))


def judge(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> Judgment:
    """Run a schedule on each of `keys` (R ≥ 2) and average, with standard errors over the keys."""
    count = keys.shape[0]
    check_positive_int("number of keys", count, 2)
    table = problem.table(schedule)
    outcomes = jax.tree.map(
        lambda *runs: jnp.stack(runs), *(_outcome(problem, table, key) for key in keys)
    )

    def error(x):
        return jnp.std(x, ddof=1) / np.sqrt(x.size)

    return Judgment(
        schedule=table,
        report=average(outcomes.report),
        final_loss=jnp.mean(outcomes.final_loss),
        test_accuracy=jnp.mean(outcomes.test_accuracy),
        standard_error=StandardErrors(
            {name: error(getattr(outcomes, name)) for name in ("final_loss", "test_accuracy")}
        ),
        errors=f"spread over {count} independent runs",
        entropy_productions=outcomes.report.entropy_production,
    )


def ratio(first: Judgment, second: Judgment) -> tuple[float, float]:
    """Σ of the first over Σ of the second, paired key by key.

    **Args:** `first`, `second`: judgments on the same keys.
    **Returns:** the mean of the R ratios and its standard error.
    """
    ratios = np.asarray(first.entropy_productions) / np.asarray(second.entropy_productions)
    return float(np.mean(ratios)), float(np.std(ratios, ddof=1) / np.sqrt(ratios.size))


def agreement(judgments: Mapping[str, Judgment]) -> Agreement:
    """Compare the L² of schedules that end at the same loss.

    If a schedule only re-timed one path, all would be equal but for their errors. χ² takes the
    errors as independent; common keys make the differences smaller, so it errs below.

    **Args:** `judgments`: at least two, by name, on common keys.
    """
    reports = [judgment.report for judgment in judgments.values()]
    lengths = np.array([float(report.length_squared) for report in reports])
    errors: list[Any] = [report.standard_error for report in reports]
    weights = np.array([float(error.length_squared) for error in errors]) ** -2
    mean = np.sum(weights * lengths) / np.sum(weights)
    return Agreement(
        spread=float(np.ptp(lengths) / mean),
        chi_squared=float(np.sum(weights * (lengths - mean) ** 2)),
        freedom=lengths.size - 1,
    )


# --- The stages -----------------------------------------------------------------------------------


def _check_settings(
    rate: float,
    key: Key,
    target: float | None,
    shapes: Mapping[str, AbstractSchedule],
    counts: Mapping[str, int],
) -> None:
    check_positive("rate", rate)
    check_key("key", key)
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


@dataclasses.dataclass(frozen=True)
class _Match:
    """Scales a shape to a target on keys common to all shapes."""

    problem: Problem
    learning_time: float
    keys: Keys
    watcher: Watcher

    def __call__(self, shape: AbstractSchedule, name: str, target: float) -> Knots:
        self.watcher.stage(f"matching {name}")
        return match_endpoint(
            self.problem,
            shape,
            target=target,
            learning_time=self.learning_time,
            keys=self.keys,
            name=name,
            watch=self.watcher.trial,
        )


def _match_usual(
    match: _Match,
    shapes: Mapping[str, AbstractSchedule],
    target: float | None,
    rate: float,
    saved: Any,
) -> tuple[float, dict[str, Knots]]:
    """The target, and every usual shape scaled to it; saved after each shape."""
    # Saved with the target, because computing it again costs as much as matching a shape.
    like = Knots(jnp.ones(match.problem.steps + 1), "linear")
    restored = saved.restore(lambda done: (jnp.zeros(()), [like] * done))
    done, (saved_target, matched) = (0, (None, [])) if restored is None else restored
    if target is None:
        target = _target(match, rate) if saved_target is None else float(saved_target)
    for name, shape in list(shapes.items())[done:]:
        matched.append(match(shape, name, target))
        saved.offer(
            len(matched),
            lambda: (jnp.asarray(target), matched),
            last=len(matched) == len(shapes),
        )
    return target, dict(zip(shapes, matched, strict=True))


def _target(match: _Match, rate: float) -> float:
    """The mean final training loss of the constant schedule."""
    match.watcher.stage("target")
    target = final_loss(match.problem, Constant(rate), match.keys)
    if not np.isfinite(target):
        raise refuse(
            "rate",
            "leave the constant schedule stable",
            f"is {rate:g}: its final loss is {target}",
        )
    return target


def _objective(problem: Problem, target: float) -> Callable[[Knots, Key], Any]:
    """Σ, under the constraint that the final loss is at most the target."""

    def objective(learning_rate: Knots, key: Key) -> Any:
        outcome = problem.run(learning_rate, key)
        sigma = outcome.report.entropy_production
        return (
            sigma,
            outcome.final_loss / target - 1,
            (outcome.report.w2_squared, outcome.final_loss),
        )

    return objective


def _retimed(problem: Problem, table: Knots, keys: Keys) -> Knots:
    """The schedule of constant speed along the mean of some runs of another schedule."""
    reports = [_outcome(problem, table, key).report for key in keys]
    if len(reports) == 1:
        return constant_speed(reports[0])
    return constant_speed(average(jax.tree.map(lambda *runs: jnp.stack(runs), *reports)))


def _debiased_w2_squared(problem: Problem, table: Knots, keys: Keys) -> tuple[float, float] | None:
    """W2² without sampling bias over the runs of some keys, and its standard error."""
    if problem.members < _DEBIASED_FROM:
        return None
    squares = np.array([float(_debiased(problem, table, key)) for key in keys])
    return float(np.mean(squares)), float(np.std(squares, ddof=1) / np.sqrt(squares.size))


@eqx.filter_jit
def _batches(problem: Problem, table: Knots, key: Key) -> MinibatchNoise | None:
    """The noise of the batches along one run, from batches that the run has not seen."""
    if problem.potential.batch_size is None:
        return None
    path = problem.path(table, key)
    batch_key = jax.random.fold_in(key, 1)
    noise = minibatch_noise(path, problem.potential, key=batch_key, pairs=2)
    return replicate(noise, problem.mesh)


@eqx.filter_jit
def _debiased(problem: Problem, table: Knots, key: Key) -> Scalar:
    path = problem.path(table, key)
    report = speed_limit(path, transport=problem.transport, jackknife=0, debias=True)
    return replicate(report.debiased_w2_squared, problem.mesh)


@eqx.filter_jit
def _outcome(problem: Problem, table: Knots, key: Key) -> Outcome:
    """One compiled program for all schedules and keys; a run is long enough to loop on the host."""
    return problem.run(table, key)


def _within(checkpoints: Checkpoints | None, stage: str) -> Checkpoints | None:
    """The checkpoints of one stage, in a folder of its own."""
    if checkpoints is None:
        return None
    return dataclasses.replace(checkpoints, folder=Path(checkpoints.folder) / stage)


def _unreachable(name: str, target: float, trials: list[tuple[float, float]]) -> InputError:
    losses = ", ".join(f"{loss:.4g}" for _, loss in trials)
    return refuse(
        "target",
        f"be a loss that {name} can reach",
        f"is {target:g}: scaling the rates gave the losses {losses}",
    )
