r"""Training runs given by a `RunConfig`: one alone, or many that share one compiled program.

Points of a study that share every shape share one program. Seed, rate, temperature, l2, epsilon
and schedule are data of that program: a schedule is only a table of rates. On a CPU the runs go one
after another (`width` 1): the members fill the vector units already, and the bits are those of a
run alone. On an accelerator they go side by side, as many as fit its memory.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esljax._checks import InputError, door
from esljax._types import Array, Float
from esljax.experiment.learning import OWN, own_files, potential_of
from esljax.experiment.problem import ACCURACY, Outcome, Problem
from esljax.experiment.settings import (
    DTYPES,
    MODEL_DTYPES,
    ProblemConfig,
    RunConfig,
    make_transport,
    usual_shapes,
)
from esljax.schedules import Constant, Knots
from esljax.simulation import HessianAdjoint
from esljax.transport import AbstractTransport

# The settings in which runs of one compiled program may differ.
NUMBERS = ("seed", "rate", "temperature", "l2", "epsilon", "schedule")


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


class Rows(NamedTuple):
    """The results of some points."""

    numbers: dict[str, np.ndarray]
    """Numbers by name (`number_names`), each (points,); NaN where a run failed."""
    converged: np.ndarray
    """Whether all transport problems of each point were solved, (points,)."""
    reasons: tuple[str, ...]
    """Why each point failed, "" where it did not."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Points of one shape for one call of their program: plain data that travels to a worker."""

    points: tuple[RunConfig, ...]
    length: int
    """The number of points that the program is compiled for; it pads to that and skips padding."""
    width: int
    """The number of runs side by side."""


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
def run(config: RunConfig) -> Outcome:
    """Make one run alone, in its own floating type: a `Study` stores the numbers of such runs.

    **Returns:** `Outcome`: the `SpeedLimit` report, the final loss and the test accuracy.
    **Raises:** `InputError` for settings that cannot run.

    **Example:**

        >>> import esljax as esl
        >>> config = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> outcome = esl.run(config)
        >>> bool(outcome.report.holds)
        True
    """
    config.check()
    with jax.enable_x64(DTYPES[config.dtype]):
        shape = shape_of(config)
        problem = _problem(shape, config.dtype, _present(shape))
        return _alone(problem, shape, jax.tree.map(lambda x: x[0], _numbers(problem, (config,))))


@door
def work(task: Task) -> Rows:
    """Run the points of a task and return their numbers, in this process or in a worker.

    A point whose numbers are not finite comes back with the reason. A failure of the whole task
    (memory, a wrong model) fails each of its points.
    """
    config = task.points[0]
    try:
        with jax.enable_x64(DTYPES[config.dtype]):
            shape = shape_of(config)
            problem = _problem(shape, config.dtype, _present(shape))
            length = -(-task.length // task.width) * task.width
            padded = (*task.points, *itertools.repeat(config, length - len(task.points)))
            wanted = np.arange(length) < len(task.points)
            answer = _many(
                problem, shape, _numbers(problem, padded), jnp.asarray(wanted), task.width
            )
            answer = {name: np.asarray(value)[: len(task.points)] for name, value in answer.items()}
    except Exception as error:
        # Anything a backend raises ends here: the points get the reason and the study continues.
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return failed(task, reason)
    converged = answer.pop("converged")
    answer = {name: value.astype(np.float64) for name, value in answer.items()}
    reasons = tuple(
        _reason({name: value[i] for name, value in answer.items()}) for i in range(len(task.points))
    )
    return Rows(answer, converged, reasons)


def failed(task: Task, reason: str) -> Rows:
    """The rows of a task that gave no numbers."""
    missing = np.full(len(task.points), np.nan)
    return Rows(
        dict.fromkeys(number_names(errors=task.points[0].jackknife > 0), missing),
        np.zeros(len(task.points), bool),
        (reason,) * len(task.points),
    )


def number_names(errors: bool) -> tuple[str, ...]:
    """The names of the numbers of a run, and of their standard errors if `errors`."""
    numbers = tuple(quantity.name for quantity in QUANTITIES)
    return (*numbers, *(f"{name}_error" for name in WITH_ERROR)) if errors else numbers


def shape_of(config: RunConfig) -> RunConfig:
    """The configuration with its numbers at their defaults: equal for runs of one program."""
    return dataclasses.replace(config, **{name: getattr(RunConfig, name) for name in NUMBERS})


def memory_of_a_run(config: RunConfig) -> int:
    """The bytes that one run takes, about, from its shapes alone; 0 if it cannot be made."""
    shape = shape_of(config)
    try:
        return _memory(shape, _present(shape))
    except InputError:
        # Its task will report why.
        return 0


def fitting_width(config: RunConfig, length: int, budget: float | None = None) -> int:
    """The number of runs that go side by side: one on a CPU, as many as fit on an accelerator.

    **Args:** `config`: one of the runs. `length`: the most. `budget`: bytes to fill; by default
    half the memory of the accelerator.
    """
    device = jax.devices()[0]
    if budget is None:
        if device.platform == "cpu":
            return 1
        # For a device that does not report its memory, half of that of the smallest accelerators.
        budget = float((device.memory_stats() or {}).get("bytes_limit", 8e9)) / 2
    return int(np.clip(budget // max(memory_of_a_run(config), 1), 1, length))


class _Numbers(NamedTuple):
    """The numbers in which runs of one program differ, one row a run."""

    rates: Float[Array, "*runs knots"]
    keys: Array
    temperature: Float[Array, "*runs"]
    l2: Float[Array, "*runs"]
    epsilon: Float[Array, "*runs"]


def _numbers(problem: Problem, points: tuple[RunConfig, ...]) -> _Numbers:
    """Rates as tables and seeds as keys: each row is a function of its own point alone."""

    def column(name):
        return jnp.asarray([getattr(point, name) for point in points], jnp.result_type(float))

    shapes = usual_shapes()
    tables = {
        name: problem.table(shapes[name]).values for name in {point.schedule for point in points}
    }
    rates = jnp.stack([tables[point.schedule] for point in points]) * column("rate")[:, None]
    keys = jnp.stack([jax.random.key(point.seed) for point in points])
    return _Numbers(rates, keys, column("temperature"), column("l2"), column("epsilon"))


def _one(problem: Problem, shape: RunConfig, numbers: _Numbers) -> Outcome:
    run_key, transport_key = jax.random.split(numbers.keys)
    problem = eqx.tree_at(
        lambda p: (p.temperature, p.potential.l2, p.transport),
        problem,
        (
            Constant(numbers.temperature),
            numbers.l2,
            make_transport(
                shape.transport, numbers.epsilon, shape.directions, shape.chunk, transport_key
            ),
        ),
    )
    return problem.run(Knots(numbers.rates, "linear"), run_key)


_alone = eqx.filter_jit(_one)


@eqx.filter_jit
def _many(
    problem: Problem, shape: RunConfig, numbers: _Numbers, wanted: Array, width: int
) -> dict[str, Array]:
    """Run all points of one shape, `width` side by side; skip batches that are all padding."""

    def one(numbers):
        return _answer(_one(problem, shape, numbers), shape.jackknife > 0)

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
        value = getattr(
            outcome if quantity.name in ("final_loss", "test_accuracy") else report, quantity.name
        )
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
