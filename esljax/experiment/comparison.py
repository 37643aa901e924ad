r"""Schedules held against the speed limit at matched endpoints: same start, same final loss, different timing.

A learning-rate schedule is a change of clock of one path through the space of laws, so schedules are compared fairly only where
they end at the same place: each shape is scaled until the mean final training loss is one common target, then all are judged on keys
(initializations, batches, noise) that neither the scaling nor any optimization has seen.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import Mesh

from esljax._checks import InputError, check_positive_int, refuse
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.experiment.memory import Plan, plan_memory
from esljax.measures import SpeedLimit, average, speed_limit
from esljax.potentials import Examples, FlaxLoss
from esljax.schedules import (
    AbstractSchedule,
    Constant,
    Cosine,
    Exponential,
    Knots,
    Linear,
    WarmupStableDecay,
    as_schedule,
)
from esljax.sharding import replicate
from esljax.simulation import AbstractGradient, HessianAdjoint, Langevin, simulate
from esljax.transport import AbstractTransport


def usual_shapes() -> dict[str, AbstractSchedule]:
    """The learning-rate schedules in common use, with peak 1: constant, linear decay, cosine, warmup-stable-decay, exponential decay."""
    return {
        "constant": Constant(1.0),
        "linear_decay": Linear(1.0, 0.0),
        "cosine": Cosine(1.0),
        "warmup_stable_decay": WarmupStableDecay(1.0),
        "exponential_decay": Exponential(1.0, 0.1),
    }


class Outcome(eqx.Module):
    """One run: its speed limit, the members' mean training loss E Φ(q₁) over all examples, and their mean test accuracy."""

    report: SpeedLimit
    final_loss: Scalar
    test_accuracy: Scalar


class Problem(eqx.Module):
    """A learning problem that differs from run to run only in the schedule and the key.

    **Args:** `potential`: the training objective. `test`: held-out examples. `temperature`: T, a schedule or a number. `transport`: the
    geometry of Σ and W2². `members`: n. `steps`: K. `snapshots`: J. `jackknife`: as in `speed_limit`.
    `mesh`: the devices that share the members. `gradient`: how to differentiate a run.
    """

    potential: FlaxLoss
    test: Examples
    temperature: AbstractSchedule = eqx.field(converter=as_schedule)
    transport: AbstractTransport
    members: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    snapshots: int = eqx.field(static=True)
    jackknife: int = eqx.field(static=True, default=0)
    mesh: Mesh | None = eqx.field(static=True, default=None)
    gradient: AbstractGradient = HessianAdjoint()

    def run(self, learning_rate: AbstractSchedule, key: Key) -> Outcome:
        """Train an ensemble from fresh initializations. Differentiable in `learning_rate`, by `gradient`."""
        start_key, path_key = jax.random.split(key)
        start = self.potential.init(members=self.members, key=start_key).astype(
            self.potential.inputs.dtype
        )
        rule = Langevin(learning_rate, self.temperature)
        path = simulate(
            self.potential,
            rule,
            start,
            steps=self.steps,
            snapshots=self.snapshots,
            key=path_key,
            gradient=self.gradient,
            mesh=self.mesh,
        )
        outcome = Outcome(
            report=speed_limit(path, transport=self.transport, jackknife=self.jackknife),
            final_loss=jnp.mean(self.potential(path.final)),
            test_accuracy=jnp.mean(self.potential.accuracy(path.final, self.test)),
        )
        return replicate(outcome, self.mesh)

    def plan_memory(self, *, devices: int = 1, differentiated: bool = True) -> Plan:
        """The memory that one run takes on each device, with its gradient if `differentiated`."""
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
        """The same rates as `schedule` at every step, in one form for all schedules, so that all share one compiled run."""
        schedule = schedule.over(self.steps)
        ends = schedule(jnp.ones((), jnp.result_type(float)))
        return Knots(jnp.append(schedule.rates(self.steps), ends), "linear")


class Judgment(eqx.Module):
    """A schedule judged on R held-out keys: means, standard errors over the keys, and the values of each key for paired comparisons."""

    schedule: Knots
    report: SpeedLimit
    final_loss: Scalar
    final_loss_error: Scalar
    test_accuracy: Scalar
    test_accuracy_error: Scalar
    entropy_productions: Float[Array, " R"]


@eqx.filter_jit
def _outcome(problem: Problem, table: Knots, key: Key) -> Outcome:
    """One compiled program serves every schedule and key; runs are minutes together, so their loop is on the host."""
    return problem.run(table, key)


def final_loss(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> float:
    """The mean final training loss E Φ(q₁) over `keys` (R,)."""
    table = problem.table(schedule)
    return float(np.mean([_outcome(problem, table, key).final_loss for key in keys]))


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

    The search starts at the scale where the learning time U = Σ η_k is `learning_time`: with little noise the loss depends on U alone.

    **Args:** `shape`: any schedule with U > 0. `target`: the loss. `keys`: (R,), common to all trials. `tolerance`: relative, on the loss.
    `watch`: is called with the loss of each trial.
    **Returns:** the scaled schedule as a table of `Knots`.
    **Raises:** `InputError` if no scale reaches the target before the run leaves the stable range of its step.
    """
    table = problem.table(shape)
    time = float(jnp.sum(table.rates(problem.steps)))
    if not time > 0:
        raise refuse(name, "have a positive sum of rates", f"has the sum {time:g}")
    first = np.log(learning_time / time)
    seen: list[tuple[float, float]] = []

    @functools.cache
    def excess(log_scale: float) -> float:
        loss = final_loss(problem, Knots(table.values * np.exp(log_scale), "linear"), keys)
        seen.append((log_scale, loss))
        watch(loss)
        if not np.isfinite(loss) or loss <= 0 or abs(log_scale - first) > 5:
            raise _unreachable(name, target, seen)
        # Zero within the tolerance ends the secant search at once.
        return 0.0 if abs(loss / target - 1) < tolerance else np.log(loss / target)

    at_start = excess(first)
    # Late in training the loss falls about as U to the power -1/2: the second point of the secant.
    result = (
        scipy.optimize.root_scalar(
            excess, x0=first, x1=first + np.clip(2 * at_start, -1, 1) + 1e-3, maxiter=12
        )
        if at_start
        else None
    )
    if result is not None and not abs(seen[-1][1] / target - 1) < tolerance:
        raise _unreachable(name, target, seen)
    return Knots(table.values * np.exp(seen[-1][0]), "linear")


def judge(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> Judgment:
    """Run a schedule on each of `keys` (R ≥ 2) and average, with standard errors over the keys."""
    check_positive_int("number of keys", keys.shape[0], 2)
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
        final_loss_error=error(outcomes.final_loss),
        test_accuracy=jnp.mean(outcomes.test_accuracy),
        test_accuracy_error=error(outcomes.test_accuracy),
        entropy_productions=outcomes.report.entropy_production,
    )


def ratio(first: Judgment, second: Judgment) -> tuple[float, float]:
    """Σ of the first over Σ of the second on the same keys, with the standard error of the paired ratios."""
    ratios = np.asarray(first.entropy_productions) / np.asarray(second.entropy_productions)
    return float(np.mean(ratios)), float(np.std(ratios, ddof=1) / np.sqrt(ratios.size))


def _unreachable(name: str, target: float, seen: list[tuple[float, float]]) -> InputError:
    losses = ", ".join(f"{loss:.4g}" for _, loss in seen)
    return refuse(
        "target",
        f"be a loss that {name} can reach",
        f"is {target:g}: scaling the rates gave the losses {losses}",
    )
