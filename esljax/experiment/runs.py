r"""Training runs given by their settings: one alone, or many that share one compiled program.

Points of a study that share every shape share one program. Seed, rate, target, temperature, l2,
epsilon and schedule are data of that program: a schedule is only a table of rates. So are the
arrays of a problem from outside: its keywords share a program as far as they change arrays alone.
On a CPU the runs go one after another (`width` 1): the members fill the vector units already, and
the bits are those of a run alone. On an accelerator they go side by side, as many as fit.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esljax._checks import InputError, door
from esljax._types import Array
from esljax.experiment.found import Found, find_schedule, given_schedule
from esljax.experiment.learning import OWN, own_files, potential_of
from esljax.experiment.parcels import opened
from esljax.experiment.problem import ACCURACY, Outcome, Problem
from esljax.experiment.settings import (
    DTYPES,
    MODEL_DTYPES,
    OutsideConfig,
    ProblemConfig,
    RunConfig,
    ScheduleConfig,
    make_transport,
)
from esljax.experiment.sources import check_given, given_of, source_of
from esljax.files import describe
from esljax.schedules import Constant, Knots
from esljax.simulation import HessianAdjoint
from esljax.transport import AbstractTransport

# The settings in which runs of one compiled program may differ, of any problem.
_SCHEDULED = ("seed", "rate", *(field.name for field in dataclasses.fields(ScheduleConfig)))
NUMBERS = (*_SCHEDULED, "temperature", "l2", "epsilon")


class Quantity(NamedTuple):
    """A number that every run gives."""

    name: str
    """As in `SpeedLimit` or `Outcome`."""
    units: str
    words: str
    """The name in words, for labels."""


_SQUARED = "squared parameters"

QUANTITIES = (
    Quantity("entropy_production", _SQUARED, "entropy production Σ"),
    Quantity("length_squared", _SQUARED, "squared Wasserstein length L²"),
    Quantity("w2_squared", _SQUARED, "squared Wasserstein distance W2² between start and end"),
    Quantity("gap", _SQUARED, "gap Σ - W2²"),
    Quantity("temporal", _SQUARED, "temporal part of the gap"),
    Quantity("geometric", _SQUARED, "geometric part of the gap"),
    Quantity("learning_time", "squared parameters per unit of loss", "learning time U"),
    Quantity("final_loss", "units of the loss", "final training loss, mean of the members"),
    Quantity("test_accuracy", "1", "test accuracy, mean of the members"),
    Quantity("noise_floor", _SQUARED, "noise floor of Σ, for the exact transport"),
)
# Only some transports have a noise floor, and only classes an accuracy.
OPTIONAL = ("noise_floor", ACCURACY)
# The jackknife over members gives these an error.
WITH_ERROR = ("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric")
_WORDS = {ACCURACY: ("1", "test accuracy, mean of the members")}


class Columns(NamedTuple):
    """Which numbers a study stores of each run, beside those that every run has."""

    errors: bool = False
    """Whether some run has standard errors of its own."""
    metrics: tuple[str, ...] = (ACCURACY,)
    """The metrics of its problems."""
    loss: str = "nats per example"
    """The units of the final loss."""
    rate: bool = False
    """Whether the rate of some run is found, and not given."""
    knots: int = 0
    """The most knots of an optimized schedule."""

    def quantities(self) -> list[Quantity]:
        """The numbers of a run, in the order of the store."""
        metrics = [
            Quantity(name, *_WORDS.get(name, ("", f"{name}, mean of the members")))
            for name in self.metrics
        ]
        numbers = []
        for quantity in QUANTITIES:
            if quantity.name == ACCURACY:
                numbers += metrics
            elif quantity.name == "final_loss":
                numbers.append(quantity._replace(units=self.loss))
            else:
                numbers.append(quantity)
        if self.errors:
            numbers += [
                Quantity(f"{q.name}_error", q.units, f"standard error of {q.words}")
                for q in QUANTITIES
                if q.name in WITH_ERROR
            ]
        rate = "squared parameters per unit of loss and step"
        if self.rate:
            numbers.append(Quantity("rate", rate, "peak learning rate, found"))
        return numbers + [
            Quantity(knot_name(i), rate, f"knot {i} of the optimized schedule")
            for i in range(self.knots)
        ]

    def names(self) -> tuple[str, ...]:
        """The names of `quantities`."""
        return tuple(quantity.name for quantity in self.quantities())


class Rows(NamedTuple):
    """The results of some points."""

    numbers: dict[str, np.ndarray]
    """Numbers by name (`Columns.names`), each (points,); NaN where a run failed."""
    converged: np.ndarray
    """Whether all transport problems of each point were solved, (points,)."""
    reasons: tuple[str, ...]
    """Why each point failed, "" where it did not."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Points of one problem for one call of its program: plain data that travels to a worker."""

    points: tuple[Any, ...]
    """The settings of each: of the class `RunConfig`, or `OutsideConfig` beside a source."""
    length: int
    """The number of points that the program is compiled for; it pads to that and skips padding."""
    width: int
    """The number of runs side by side."""
    source: Any = None
    """What makes the problem, or its parcel; None for the built-in one."""
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The settings of the problem, beside a source."""


def make_problem(
    config: ProblemConfig,
    transport: AbstractTransport,
    jackknife: int = 0,
    mesh: Mesh | None = None,
    recompute: bool = False,
) -> Problem:
    """The learning problem of a configuration, in jax's present floating type.

    **Args:** `config`: data, network, ensemble and steps. `transport`: defines Σ and W2².
    `jackknife`: most groups for the standard errors of one run. `mesh`: the devices that share the
    members. `recompute`: whether the gradient keeps few states and recomputes the others.
    """
    potential, test = potential_of(config, config.load_data(), MODEL_DTYPES[config.model_dtype])
    return Problem(
        potential,
        test=test,
        temperature=config.temperature,
        transport=transport,
        members=config.members,
        steps=config.steps,
        snapshots=config.snapshots,
        jackknife=jackknife,
        mesh=mesh,
        gradient=HessianAdjoint(recompute=recompute),
    )


@door
def run(config: Any) -> Outcome:
    """Make one run alone, in its own floating type: a `Study` stores the numbers of such runs.

    **Args:** `config`: a `RunConfig`, or the `point` of a study of any problem.
    **Returns:** `Outcome`: the `SpeedLimit` report, the final loss and the metrics.
    **Raises:** `InputError` for settings that cannot run.

    **Example:**

        >>> import esljax as esl
        >>> config = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> outcome = esl.run(config)
        >>> bool(outcome.report.holds)
        True
    """
    check_given(config)
    config.check()
    task = task_of((config,), 1, 1, source_of(config))
    config = task.points[0]
    with jax.enable_x64(DTYPES[config.dtype]):
        made, shape = _made(task)
        seeds, rows = _columns(task.points)
        numbers = _on_device(seeds[0], None if rows is None else rows[0])
        found = given_schedule(made, config) or find_schedule(_placed(made, shape, numbers), config)
        return _alone(made, shape, numbers._replace(rates=found.table.values))


def task_of(points: tuple[Any, ...], length: int, width: int, source: Any) -> Task:
    """The task of some points of one problem, in classes that every process can import."""
    if source is None:
        return Task(points, length, width)
    names = [field.name for field in dataclasses.fields(OutsideConfig)]
    inside = tuple(
        OutsideConfig(**{name: getattr(point, name) for name in names}) for point in points
    )
    keywords = {name: getattr(points[0], name) for name in source.keywords}
    return Task(inside, length, width, source, keywords)


@door
def work(task: Task) -> Rows:
    """Run the points of a task and return their numbers, in this process or in a worker.

    A point whose numbers are not finite comes back with the reason. A failure of the whole task
    (memory, a wrong model) fails each of its points.
    """
    config = task.points[0]
    try:
        with jax.enable_x64(DTYPES[config.dtype]):
            problem, shape = _made(task)
            numbers = _numbers(task.points)
            found = [
                given_schedule(problem, point) or _found(problem, shape, numbers, i, point)
                for i, point in enumerate(task.points)
            ]
            answer = _answers(task, problem, shape, numbers, found)
    except Exception as error:
        # Anything a backend raises ends here: the points get the reason and the study continues.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if isinstance(error, InputError):
            reason = str(error)
        return failed(task, reason)
    converged = answer.pop("converged")
    answer = {name: value.astype(np.float64) for name, value in answer.items()}
    reasons = tuple(
        each if isinstance(each, str) else _reason({n: value[i] for n, value in answer.items()})
        for i, each in enumerate(found)
    )
    return Rows(answer | _of_schedules(found), converged, reasons)


def failed(task: Task, reason: str) -> Rows:
    """The rows of a task that gave no numbers."""
    count = len(task.points)
    return Rows({}, np.zeros(count, bool), (reason,) * count)


def number_names(errors: bool) -> tuple[str, ...]:
    """The names of the numbers of a run of the built-in problem at given rates."""
    return Columns(errors).names()


def knot_name(index: int) -> str:
    """The name of one knot of the optimized schedule in a store."""
    return f"knot_{index:03}"


def shape_of(config: RunConfig) -> RunConfig:
    """The configuration with its numbers at their defaults: equal for runs of one program."""
    return dataclasses.replace(config, **{name: getattr(RunConfig, name) for name in NUMBERS})


def program_of(config: Any) -> Any:
    """What the runs of one task have in common: their shape, or the keywords of their problem."""
    if isinstance(config, RunConfig):
        return shape_of(config)
    return config.dtype, tuple(given_of(config).items())


def memory_of_a_run(config: RunConfig) -> int:
    """The bytes that one run takes, about, from its shapes alone; 0 if it cannot be made."""
    shape = shape_of(config)
    try:
        return _memory(shape, _present(shape))
    except InputError:
        # Its task will report why.
        return 0


def memory_of_a_task(task: Task) -> int:
    """The bytes that one run of a task takes, about; 0 if its problem cannot be made."""
    if task.source is None:
        return memory_of_a_run(task.points[0])
    try:
        with jax.enable_x64(DTYPES[task.points[0].dtype]):
            return _made(task)[0].plan_memory(differentiated=False).total
    except Exception:
        # Its run will report why.
        return 0


def measured(task: Task) -> tuple[tuple[str, ...], bool, bool]:
    """The metrics of the problem of a task, whether it classifies, and whether its runs have
    standard errors of their own.

    **Raises:** whatever making the problem raises.
    """
    with jax.enable_x64(DTYPES[task.points[0].dtype]):
        problem = _made(task)[0]
    classifies = bool(getattr(problem.potential, "classifies", False))
    return tuple(problem.metrics), classifies, problem.jackknife > 0


def fitting_width(config: RunConfig, length: int, budget: float | None = None) -> int:
    """The number of runs that go side by side: one on a CPU, as many as fit on an accelerator.

    **Args:** `config`: one of the runs. `length`: the most. `budget`: bytes to fill; by default
    half the memory of the accelerator.
    """
    return width_of_a_task(Task((config,), length, 1), budget)


def width_of_a_task(task: Task, budget: float | None = None) -> int:
    """The number of runs of a task that go side by side, as `fitting_width` has it."""
    device = jax.devices()[0]
    if budget is None:
        if device.platform == "cpu":
            return 1
        # For a device that does not report its memory, half of that of the smallest accelerators.
        budget = float((device.memory_stats() or {}).get("bytes_limit", 8e9)) / 2
    return int(np.clip(budget // max(memory_of_a_task(task), 1), 1, task.length))


class _Numbers(NamedTuple):
    """The numbers in which runs of one program differ, one row a run.

    Temperature, l2 and ε are None for a problem from outside, which has its own.
    """

    rates: Any
    """Of each step and the end, (*runs, K+1)."""
    keys: Array
    temperature: Any = None
    l2: Any = None
    epsilon: Any = None


def _numbers(points: tuple[Any, ...]) -> _Numbers:
    """The numbers of some runs: each row is a function of its own point alone."""
    return _on_device(*_columns(points))


def _columns(points: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Seeds, and the other numbers if there are any."""
    # Seeds of more bits than these are refused.
    seeds = np.array([point.seed for point in points], np.uint32)
    if not isinstance(points[0], RunConfig):
        return seeds, None
    rows = [(point.temperature, point.l2, point.epsilon) for point in points]
    return seeds, np.array(rows, jnp.result_type(float))


@jax.jit
def _on_device(seeds: Any, rows: Any) -> _Numbers:
    """Seeds as keys, and numbers as arrays, in one call: one by one they take longer than some
    runs. Of one run, both without a leading axis."""
    key_of = jax.random.key if jnp.ndim(seeds) == 0 else jax.vmap(jax.random.key)
    others = () if rows is None else jnp.moveaxis(rows, -1, 0)
    return _Numbers(None, key_of(seeds), *others)


def _found(
    problem: Problem, shape: RunConfig | None, numbers: _Numbers, i: int, point: Any
) -> Found | str:
    """The schedule of one point, or why there is none."""
    own = jax.tree.map(lambda x: x[i], numbers)
    try:
        return find_schedule(_placed(problem, shape, own), point)
    except InputError as error:
        return str(error)


def _answers(
    task: Task, problem: Problem, shape: RunConfig | None, numbers: _Numbers, found: list[Any]
) -> dict[str, np.ndarray]:
    """The numbers of the runs whose schedule was found, and NaN for the others."""
    count, length = len(task.points), -(-task.length // task.width) * task.width
    tables = [each.table.values for each in found if isinstance(each, Found)]
    # Points without a schedule are skipped, as padding is.
    nothing = tables[0] if tables else jnp.zeros(problem.steps + 1, jnp.result_type(float))
    rates = [each.table.values if isinstance(each, Found) else nothing for each in found]
    places = np.minimum(np.arange(length), count - 1)
    numbers = numbers._replace(rates=np.stack([np.asarray(rate) for rate in rates]))
    numbers = jax.tree.map(lambda x: x[places], numbers)
    wanted = np.zeros(length, bool)
    wanted[:count] = [isinstance(each, Found) for each in found]
    answer = _many(problem, shape, numbers, jnp.asarray(wanted), task.width)
    return {name: np.asarray(value)[:count] for name, value in answer.items()}


def _of_schedules(found: list[Any]) -> dict[str, np.ndarray]:
    """The rates and knots of the schedules that were found, by the names of the store."""
    rates = [each.rate if isinstance(each, Found) else np.nan for each in found]
    columns = {"rate": np.array(rates, np.float64)}
    knots = [each.knots if isinstance(each, Found) else () for each in found]
    for k in range(max(map(len, knots))):
        columns[knot_name(k)] = np.array(
            [each[k] if k < len(each) else np.nan for each in knots], np.float64
        )
    return columns


def _placed(problem: Problem, shape: RunConfig | None, numbers: _Numbers) -> Problem:
    """The problem of one run: the shared one with the numbers of this run."""
    if shape is None:
        return problem
    _, transport_key = jax.random.split(numbers.keys)
    transport = make_transport(
        shape.transport, numbers.epsilon, shape.directions, shape.chunk, transport_key
    )
    return eqx.tree_at(
        lambda p: (p.temperature, p.potential.l2, p.transport),
        problem,
        (Constant(numbers.temperature), numbers.l2, transport),
    )


def _one(problem: Problem, shape: RunConfig | None, numbers: _Numbers) -> Outcome:
    run_key, _ = jax.random.split(numbers.keys)
    return _placed(problem, shape, numbers).run(Knots(numbers.rates, "linear"), run_key)


_alone = eqx.filter_jit(_one)


@eqx.filter_jit
def _many(
    problem: Problem, shape: RunConfig | None, numbers: _Numbers, wanted: Array, width: int
) -> dict[str, Array]:
    """Run all points of one shape, `width` side by side; skip batches that are all padding."""

    def one(numbers):
        return _answer(_one(problem, shape, numbers), problem.jackknife > 0)

    def batch(numbers_and_wanted):
        numbers, wanted = numbers_and_wanted
        # A batch of one stays without `vmap`: the bits are then those of a run alone.
        some = (
            jax.vmap(one)
            if width > 1
            else lambda x: jax.tree.map(lambda y: y[None], one(jax.tree.map(lambda y: y[0], x)))
        )
        padding = jax.tree.map(
            lambda x: jnp.full(x.shape, np.nan if x.dtype != bool else False, x.dtype),
            jax.eval_shape(some, numbers),
        )
        return jax.lax.cond(jnp.any(wanted), some, lambda _: padding, numbers)

    batches = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), (numbers, wanted))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(batch, batches))


def _answer(outcome: Outcome, errors: bool) -> dict[str, Array]:
    report = outcome.report
    missing = jnp.full((), np.nan, outcome.final_loss.dtype)
    answer = {}
    for quantity in QUANTITIES:
        if quantity.name == ACCURACY:
            answer |= outcome.metrics
            continue
        value = getattr(outcome if quantity.name == "final_loss" else report, quantity.name)
        answer[quantity.name] = missing if value is None else value
    if errors:
        # With too few members for two groups there is no standard error.
        answer |= {
            f"{name}_error": getattr(report.standard_error, name, missing) for name in WITH_ERROR
        }
    return answer | {"converged": jnp.asarray(report.converged)}


def _reason(numbers: dict[str, float]) -> str:
    """Why a point has failed, "" if it has not."""
    bad = [
        name
        for name, value in numbers.items()
        if not np.isfinite(value) and name not in OPTIONAL and not name.endswith("_error")
    ]
    if not bad:
        return ""
    if "final_loss" in bad:
        return (
            f"diverged: the final loss is {numbers['final_loss']:g}; the likely cause is a "
            "learning rate that is too high"
        )
    return f"not finite: {', '.join(bad)}"


def _made(task: Task) -> tuple[Problem, RunConfig | None]:
    """The problem of a task, and the shape that its runs share if it is the built-in one."""
    config = task.points[0]
    if task.source is None:
        shape = shape_of(config)
        return _problem(shape, config.dtype, _present(shape)), shape
    source = opened(task.source)
    key = (id(source), tuple(task.keywords.items()), config.dtype)
    if key not in _MADE:
        while len(_MADE) >= _MOST_MADE:
            _MADE.popitem(last=False)
        # The source is kept beside its problem, so that no other one has its id meanwhile.
        _MADE[key] = (source, _alike(source.problem(**task.keywords)))
    return _MADE[key][1], None


_MADE: collections.OrderedDict[Any, tuple[Any, Problem]] = collections.OrderedDict()
_KNOWN: collections.OrderedDict[str, Any] = collections.OrderedDict()
_MOST_MADE = 16


def _alike(problem: Problem) -> Problem:
    """The same problem, on the functions of an earlier one that differs in its arrays alone.

    A function that makes problems makes new lambdas each time, and a program is compiled for each
    of them; those of the same code, closures and globals do the same.
    """
    arrays, rest = eqx.partition(problem, eqx.is_array)
    hollow = jax.tree.map(lambda x: f"{x.dtype}{x.shape}", arrays)
    about = describe((hollow, rest))
    if about not in _KNOWN:
        while len(_KNOWN) >= _MOST_MADE:
            _KNOWN.popitem(last=False)
        _KNOWN[about] = (jax.tree.structure(arrays), rest)
    structure, known = _KNOWN[about]
    return eqx.combine(structure.unflatten(jax.tree.leaves(arrays)), known)


def _present(shape: RunConfig) -> tuple:
    """What the user's files of a run hold now."""
    named = {name: [getattr(shape, name)] for name in OWN}
    return tuple(own_files(named).items())


@functools.lru_cache(maxsize=1024)
def _memory(shape: RunConfig, files: tuple) -> int:
    try:
        with jax.enable_x64(DTYPES[shape.dtype]):
            return _problem(shape, shape.dtype, files).plan_memory(differentiated=False).total
    except Exception:
        # The problem cannot be made: its task will report why.
        return 0


@functools.lru_cache(maxsize=16)
def _problem(shape: RunConfig, dtype: str, files: tuple) -> Problem:
    """A problem of that shape, whose numbers are replaced run by run.

    jax computes in `dtype` already, and `files` are `_present`; both are only keys of the cache.
    """
    return make_problem(shape, shape.make_transport(jax.random.key(0)), shape.jackknife)
