"""A learning problem: anything that can be trained, with what is measured at the end of a run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esljax._checks import as_cloud, check_kind, check_positive_int, door, plain_int, refuse
from esljax._types import Array, ArrayLike, Float, Key, Scalar, ScalarLike
from esljax.experiment.memory import Plan, plan_memory
from esljax.measures import SpeedLimit, speed_limit
from esljax.potentials import AbstractPotential, check_potential
from esljax.schedules import AbstractSchedule, Knots, as_schedule
from esljax.sharding import replicate
from esljax.simulation import (
    AbstractGradient,
    AbstractRule,
    HessianAdjoint,
    Langevin,
    Trajectory,
    check_links,
    simulate,
)
from esljax.transport import AbstractTransport, ExactTransport

Metric = Callable[[Any, Array, Any], Array]
"""The potential, positions (n, d) and the test data to one number for each member, (n,)."""
Start = ArrayLike | Callable[[Key], Array]
"""Positions (n, d), or a function of a key to them."""

ACCURACY = "test_accuracy"


class Outcome(eqx.Module):
    """One run of a `Problem`."""

    report: SpeedLimit
    """Σ, L², W2² and the gap, in squared parameters."""
    final_loss: Scalar
    """E Φ(q₁): the mean of the members' training loss over all examples, shape ()."""
    metrics: dict[str, Scalar]
    """Means over the members of the problem's metrics, by name, each of shape ()."""

    @property
    def test_accuracy(self) -> Scalar | None:
        """The mean of the members' share of test examples classified correctly; None without that
        metric."""
        return self.metrics.get(ACCURACY)


class Problem(eqx.Module):
    """A learning problem whose runs differ only in the learning-rate schedule and the key.

    **Args:**
    - `potential`: Φ, the training loss: any potential (`FlaxLoss`, `FromFunction`, `Driven`, ...).
      The final loss of a driven one is that of its end.
    - `members`: n, members of the ensemble. - `steps`: K. - `snapshots`: J links, which divide K.
    - `transport`: defines Σ and W2²; `ExactTransport()` by default.
    - `temperature`: T in units of the loss, a schedule or a number.
    - `rule`: a function of two schedules, learning rate and temperature, to a rule; `Langevin`.
    - `start`: where runs start: positions (n, d), or a function of a key to them; by default
      `potential.init(members=n, key=key)`, fresh initializations in every run.
    - `metrics`: by name, functions `fn(potential, positions (n, d), test) -> (n,)`, such as an
      error on held-out data; by default the accuracy where the labels are classes and there is
      `test`, and none elsewhere.
    - `test`: held-out data, in any form that the metrics read.
    - `jackknife`: most groups of members left out for the standard errors of one run; 0 for none.
    - `mesh`: the devices that share the members; None for the default device.
    - `gradient`: how a run is differentiated; `HessianAdjoint()` by default.

    **Raises:** `InputError`, before any run, for parts that do not fit together.
    **Differentiation:** `run` differentiates in the schedule, by `gradient`.

    **Example:** least squares on a line, from members that start apart.

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 20)
        >>> fit = esl.FromFunction(lambda line: jnp.mean((line[0] + line[1] * x - 2 * x) ** 2))
        >>> problem = esl.Problem(
        ...     fit,
        ...     members=8,
        ...     steps=20,
        ...     start=lambda key: jax.random.normal(key, (8, 2)),
        ...     metrics={"slope": lambda potential, lines, test: lines[:, 1]},
        ... )
        >>> outcome = problem.run(esl.Constant(0.2), jax.random.key(0))
        >>> bool(outcome.report.gap >= 0), sorted(outcome.metrics)
        (True, ['slope'])
    """

    potential: AbstractPotential
    members: int = eqx.field(static=True, converter=plain_int)
    steps: int = eqx.field(static=True, converter=plain_int)
    snapshots: int = eqx.field(static=True, converter=plain_int)
    transport: AbstractTransport
    temperature: AbstractSchedule
    rule: Callable[[AbstractSchedule, AbstractSchedule], AbstractRule]
    start: Any
    metrics: dict[str, Metric]
    test: Any
    jackknife: int = eqx.field(static=True, converter=plain_int)
    mesh: Mesh | None = eqx.field(static=True)
    gradient: AbstractGradient

    @door
    def __init__(
        self,
        potential: AbstractPotential,
        *,
        members: int,
        steps: int,
        snapshots: int = 20,
        transport: AbstractTransport | None = None,
        temperature: AbstractSchedule | ScalarLike = 0.0,
        rule: Callable[[AbstractSchedule, AbstractSchedule], AbstractRule] = Langevin,
        start: Start | None = None,
        metrics: Mapping[str, Metric] | None = None,
        test: Any = None,
        jackknife: int = 0,
        mesh: Mesh | None = None,
        gradient: AbstractGradient | None = None,
    ):
        check_potential("potential", potential)
        check_positive_int("members", members, 2)
        check_links(steps, snapshots)
        self.transport = ExactTransport() if transport is None else transport
        must = "be a transport such as ExactTransport()"
        check_kind("transport", self.transport, AbstractTransport, must)
        self.temperature = as_schedule(temperature, "temperature")
        _check_rule(rule, self.temperature)
        check_positive_int("jackknife", jackknife, 0)
        self.potential, self.rule, self.test = potential, rule, test
        self.members, self.steps, self.snapshots = members, steps, snapshots
        self.start = _start(potential, start)
        self.jackknife, self.mesh = jackknife, mesh
        self.gradient = HessianAdjoint() if gradient is None else gradient
        self.metrics = _usual_metrics(potential, test) if metrics is None else dict(metrics)
        self._check_shapes()

    @door
    def run(self, learning_rate: AbstractSchedule | ScalarLike, key: Key) -> Outcome:
        """Train an ensemble from its start and measure it."""
        return self.measured(self.path(learning_rate, key))

    @door
    def measured(self, path: Trajectory) -> Outcome:
        """The numbers of a training run of `path`."""
        potential = self.potential.at_end()
        outcome = Outcome(
            report=speed_limit(path, transport=self.transport, jackknife=self.jackknife),
            final_loss=jnp.mean(potential(path.final)),
            metrics={
                name: jnp.mean(metric(potential, path.final, self.test))
                for name, metric in self.metrics.items()
            },
        )
        return replicate(outcome, self.mesh)

    @door
    def path(self, learning_rate: AbstractSchedule | ScalarLike, key: Key) -> Trajectory:
        """The training run that `run` measures."""
        start_key, path_key = jax.random.split(key)
        return simulate(
            self.potential,
            self.rule(as_schedule(learning_rate, "learning_rate"), self.temperature),
            self.positions(start_key),
            steps=self.steps,
            snapshots=self.snapshots,
            key=path_key,
            gradient=self.gradient,
            mesh=self.mesh,
        )

    def positions(self, key: Key) -> Float[Array, "n d"]:
        """Where the run of a key starts, in jax's present floating type."""
        start, potential = self.start, self.potential
        if start is None:
            start = potential.init(members=self.members, key=key)  # pyright: ignore
        elif callable(start):
            start = start(key)
        return jnp.asarray(start, jnp.result_type(float))

    @door
    def plan_memory(self, *, devices: int = 1, differentiated: bool = True) -> Plan:
        """The memory of one run on each device, with its gradient if `differentiated`."""
        return plan_memory(
            self.potential,
            jax.eval_shape(self.positions, jax.random.key(0)),
            steps=self.steps,
            snapshots=self.snapshots,
            transport=self.transport,
            gradient=self.gradient,
            devices=devices,
            differentiated=differentiated,
        )

    @door
    def table(self, schedule: AbstractSchedule) -> Knots:
        """The rates of `schedule` at every step, in the one form that all compiled runs share."""
        return table_of(schedule, self.steps)

    def parts(self) -> dict[str, Any]:
        """Everything that fixes the numbers of its runs, by name. Not the mesh: a checkpoint may be
        resumed on other devices."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "mesh")
        return {name: getattr(self, name) for name in names}

    def _check_shapes(self) -> None:
        start = jax.eval_shape(self.positions, jax.random.key(0))
        if len(start.shape) != 2 or start.shape[0] != self.members:
            raise refuse(
                "start",
                f"have or return shape ({self.members}, d), one row per member",
                f"has or returns shape {start.shape}",
            )
        for name, metric in self.metrics.items():
            argument = f"metrics[{name!r}]"
            if not callable(metric):
                raise refuse(
                    argument, "be a function fn(potential, positions, test)", f"is {metric!r}"
                )
            of_run = functools.partial(metric, self.potential.at_end())
            answer = eqx.filter_eval_shape(of_run, start, self.test)
            if getattr(answer, "shape", None) != (self.members,):
                shape = getattr(answer, "shape", type(answer).__name__)
                raise refuse(
                    argument,
                    f"return one number per member, shape ({self.members},)",
                    f"returns {shape}",
                )


def table_of(schedule: AbstractSchedule, steps: int) -> Knots:
    """The rates of `schedule` at each of so many steps and at the end."""
    schedule = schedule.over(steps)
    ends = schedule(jnp.ones((), jnp.result_type(float)))
    return Knots(jnp.append(schedule.rates(steps), ends), "linear")


def _start(potential: AbstractPotential, start: Start | None) -> Any:
    if start is None and not hasattr(potential, "init"):
        raise refuse(
            "start",
            "be given for a potential that does not initialize members itself: positions (n, d), "
            "or a function of a key to them",
            "is None",
        )
    return start if start is None or callable(start) else jnp.asarray(as_cloud("start", start))


def _check_rule(rule: Any, temperature: AbstractSchedule) -> None:
    must = (
        "be a function of two schedules, learning rate and temperature, to a rule: as Langevin is"
    )
    if not callable(rule):
        raise refuse("rule", must, f"is {rule!r}")
    made = rule(as_schedule(0.1), temperature)
    if not isinstance(made, AbstractRule):
        raise refuse("rule", must, f"returns {type(made).__name__}")


def _usual_metrics(potential: Any, test: Any) -> dict[str, Metric]:
    classifies = getattr(potential, "classifies", False)
    return {ACCURACY: _accuracy} if test is not None and classifies else {}


def _accuracy(potential: Any, positions: Array, test: Any) -> Array:
    return potential.accuracy(positions, test)
