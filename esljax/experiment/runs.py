r"""Training runs told by a `RunConfig`: one alone, or many that differ in numbers only, in one compiled program.

Points of a study that share every shape share one program, in which seed, rate, temperature, l2, epsilon and schedule are data: a schedule
is only a table of rates. The runs go one after another (`width` 1) on a CPU, where the members fill the vector units already and the bits
are then those of a run alone; side by side on an accelerator, as many as fit its memory.
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

from esljax._types import Array, Float
from esljax.experiment.comparison import Outcome, Problem, usual_shapes
from esljax.experiment.settings import RunConfig, TrainingConfig, make_transport
from esljax.potentials import FlaxLoss, mlp
from esljax.schedules import Constant, Knots
from esljax.simulation import HessianAdjoint
from esljax.transport import AbstractTransport

# What runs of one compiled program may differ in.
NUMBERS = ("seed", "rate", "temperature", "l2", "epsilon", "schedule")


class Quantity(NamedTuple):
    """A number that every run answers with: its name, unit, and name in words."""

    name: str
    units: str
    words: str


_SQUARED = "squared parameters"

QUANTITIES = (
    Quantity("entropy_production", _SQUARED, "entropy production Σ"),
    Quantity("length_squared", _SQUARED, "squared Wasserstein length L²"),
    Quantity("w2_squared", _SQUARED, "squared Wasserstein distance W2² between start and end"),
    Quantity("gap", _SQUARED, "gap Σ - W2²"),
    Quantity("temporal", _SQUARED, "temporal part of the gap"),
    Quantity("geometric", _SQUARED, "geometric part of the gap"),
    Quantity("learning_time", "squared parameters per unit of loss", "learning time U"),
    Quantity("final_loss", "nats per example", "final training loss, mean of the members"),
    Quantity("test_accuracy", "1", "test accuracy, mean of the members"),
    Quantity("noise_floor", _SQUARED, "noise floor of Σ, for the exact transport"),
)
# The jackknife over members gives these an error.
WITH_ERROR = ("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric")


class Rows(NamedTuple):
    """The results of some points: numbers by name, each (points,), and what went wrong with each point, "" where nothing did."""

    numbers: dict[str, np.ndarray]
    converged: np.ndarray
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Points of one shape for one call of the program compiled for it: plain data, which travels to a worker.

    `length` is what the program is compiled for; points missing to it are padding, and padding is not run.
    """

    points: tuple[RunConfig, ...]
    length: int
    width: int


def make_problem(
    config: TrainingConfig,
    transport: AbstractTransport,
    jackknife: int = 0,
    mesh: Mesh | None = None,
    recompute: bool = False,
) -> Problem:
    """The learning problem of a configuration, in jax's present floating type."""
    data = config.load_data()
    classes = int(max(data.train.labels.max(), data.test.labels.max())) + 1
    model = mlp(data.train.inputs.shape[1], *config.hidden, classes)
    return Problem(
        potential=FlaxLoss(
            model,
            data.train,
            batch_size=config.batch_size or None,
            l2=config.l2,
            dtype=None if config.model_dtype == "same" else config.model_dtype,
        ),
        test=data.test,
        temperature=config.temperature,
        transport=transport,
        members=config.members,
        steps=config.steps,
        snapshots=config.snapshots,
        jackknife=jackknife,
        mesh=mesh,
        gradient=HessianAdjoint(recompute=recompute),
    )


def run(config: RunConfig) -> Outcome:
    """One run alone, in its own floating type: a `Study` stores the numbers of such runs.

    **Returns:** `Outcome`: the `SpeedLimit` report, the final loss and the test accuracy.
    **Raises:** `InputError` for settings that cannot run.

    **Example:**

        >>> outcome = run(RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5))
        >>> bool(outcome.report.holds)
        True
    """
    config.check()
    with jax.enable_x64(config.dtype == "float64"):
        shape = shape_of(config)
        problem = _problem(shape, config.dtype)
        return _alone(problem, shape, jax.tree.map(lambda x: x[0], _numbers(problem, (config,))))


def work(task: Task) -> Rows:
    """Run the points of a task and return their numbers; called in this process or in a worker.

    A point whose numbers are not finite comes back with the reason. What fails as a whole (memory, a wrong model) fails each point of it.
    """
    config = task.points[0]
    try:
        with jax.enable_x64(config.dtype == "float64"):
            shape = shape_of(config)
            problem = _problem(shape, config.dtype)
            length = -(-task.length // task.width) * task.width
            padded = (*task.points, *itertools.repeat(config, length - len(task.points)))
            asked = np.arange(length) < len(task.points)
            answer = _many(
                problem, shape, _numbers(problem, padded), jnp.asarray(asked), task.width
            )
            answer = {name: np.asarray(value)[: len(task.points)] for name, value in answer.items()}
    except Exception as error:
        # Anything a backend raises ends here: the point gets the reason and the study goes on.
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
    nothing = np.full(len(task.points), np.nan)
    return Rows(
        dict.fromkeys(names(task.points[0].jackknife > 0), nothing),
        np.zeros(len(task.points), bool),
        (reason,) * len(task.points),
    )


def names(errors: bool) -> tuple[str, ...]:
    """The numbers of a run by name, with the standard errors among them if there are any."""
    plain = tuple(quantity.name for quantity in QUANTITIES)
    return (*plain, *(f"{name}_error" for name in WITH_ERROR)) if errors else plain


def shape_of(config: RunConfig) -> RunConfig:
    """The configuration with its numbers at their defaults: equal for points that share a program."""
    return dataclasses.replace(config, **{name: getattr(RunConfig, name) for name in NUMBERS})


def memory(config: RunConfig) -> int:
    """About how many bytes one run takes while it runs, from its shapes alone."""
    return _memory(shape_of(config))


def fitting_width(config: RunConfig, length: int, budget: float | None = None) -> int:
    """How many runs go side by side: one on a CPU, and on an accelerator as many as half its memory (or `budget` bytes) holds."""
    device = jax.devices()[0]
    if budget is None:
        if device.platform == "cpu":
            return 1
        # Where a device does not tell, half of what the smallest accelerators have.
        budget = float((device.memory_stats() or {}).get("bytes_limit", 8e9)) / 2
    return int(np.clip(budget // max(memory(config), 1), 1, length))


class _Numbers(NamedTuple):
    """What runs of one program differ in, one row a run."""

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
    problem: Problem, shape: RunConfig, numbers: _Numbers, asked: Array, width: int
) -> dict[str, Array]:
    """The program of all points of one shape: `width` runs side by side, and batches that are all padding skipped."""

    def one(numbers):
        return _answer(_one(problem, shape, numbers), shape.jackknife > 0)

    def batch(numbers_and_asked):
        numbers, asked = numbers_and_asked
        # A batch of one is left as it is: the bits are then those of a run alone.
        some = (
            jax.vmap(one)
            if width > 1
            else lambda x: jax.tree.map(lambda y: y[None], one(jax.tree.map(lambda y: y[0], x)))
        )
        nothing = jax.tree.map(
            lambda x: jnp.full(x.shape, np.nan if x.dtype != bool else False, x.dtype),
            jax.eval_shape(some, numbers),
        )
        return jax.lax.cond(jnp.any(asked), some, lambda _: nothing, numbers)

    batches = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), (numbers, asked))
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
        # Too few members for two groups leave none to take.
        answer |= {
            f"{name}_error": getattr(report.standard_error, name, missing) for name in WITH_ERROR
        }
    return answer | {"converged": jnp.asarray(report.converged)}


def _reason(numbers: dict[str, float]) -> str:
    """Why a point has failed, or nothing."""
    # Other transports have no noise floor.
    bad = [
        name
        for name, value in numbers.items()
        if not np.isfinite(value) and name != "noise_floor" and not name.endswith("_error")
    ]
    if not bad:
        return ""
    if "final_loss" in bad:
        return f"diverged: the final loss is {numbers['final_loss']:g}; the likely cause is a learning rate that is too high"
    return f"not finite: {', '.join(bad)}"


@functools.lru_cache(maxsize=1024)
def _memory(shape: RunConfig) -> int:
    try:
        with jax.enable_x64(shape.dtype == "float64"):
            return _problem(shape, shape.dtype).plan_memory(differentiated=False).total
    except Exception:
        # What cannot even be made takes nothing; its task will say why.
        return 0


@functools.lru_cache(maxsize=16)
def _problem(shape: RunConfig, dtype: str) -> Problem:
    """A problem of that shape, whose numbers are replaced run by run. jax computes in `dtype` already; here it is a key of the cache."""
    return make_problem(shape, shape.make_transport(jax.random.key(0)), shape.jackknife)
