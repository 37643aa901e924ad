"""Schedules judged on keys that nothing has seen, and compared key by key."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_positive_int, door
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.experiment.problem import ACCURACY, Outcome, Problem
from esljax.measures import SpeedLimit, average
from esljax.results import StandardErrors, renamed_error
from esljax.schedules import AbstractSchedule, Knots
from esljax.sharding import replicate
from esljax.simulation import Trajectory


class Judgment(eqx.Module):
    """A schedule judged on R held-out keys: means over the keys, with standard errors."""

    schedule: Knots
    """The schedule that was judged, with a rate for each step."""
    report: SpeedLimit
    """Means of Σ, L², W2² and the gap, in squared parameters, with standard errors of its own."""
    final_loss: Scalar
    """Mean final training loss, shape ()."""
    metrics: dict[str, Scalar]
    """Means of the problem's metrics, by name, each of shape ()."""
    standard_error: StandardErrors
    """Of `final_loss` and of each metric, over the keys."""
    errors: str = eqx.field(static=True)
    """The source of the standard errors, in words."""
    entropy_productions: Float[Array, " R"]
    """Σ of each key, in squared parameters, for paired comparisons."""
    final_losses: Float[Array, " R"]
    """The final training loss of each key, for paired comparisons."""

    @property
    def test_accuracy(self) -> Scalar | None:
        """Mean test accuracy; None without that metric."""
        return self.metrics.get(ACCURACY)

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


@door
def judge(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> Judgment:
    """Run a schedule on each of `keys` (R ≥ 2) and average, with standard errors over the keys."""
    count = keys.shape[0]
    check_positive_int("number of keys", count, 2)
    table = problem.table(schedule)
    outcomes = jax.tree.map(
        lambda *runs: jnp.stack(runs), *(outcome_of(problem, table, key) for key in keys)
    )

    def error(x):
        return jnp.std(x, ddof=1) / np.sqrt(x.size)

    return Judgment(
        schedule=table,
        report=average(outcomes.report),
        final_loss=jnp.mean(outcomes.final_loss),
        metrics={name: jnp.mean(values) for name, values in outcomes.metrics.items()},
        standard_error=StandardErrors(
            {
                "final_loss": error(outcomes.final_loss),
                **{name: error(values) for name, values in outcomes.metrics.items()},
            }
        ),
        errors=f"spread over {count} independent runs",
        entropy_productions=outcomes.report.entropy_production,
        final_losses=outcomes.final_loss,
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


@door
def final_loss(problem: Problem, schedule: AbstractSchedule, keys: Keys) -> float:
    """The mean final training loss E Φ(q₁) of a schedule over `keys` (R,)."""
    table = problem.table(schedule)
    return float(np.mean([outcome_of(problem, table, key).final_loss for key in keys]))


def outcome_of(problem: Problem, table: Knots, key: Key) -> Outcome:
    """The numbers of a run, by two compiled programs for all schedules and keys; a run is long
    enough to loop on the host."""
    return _measured(problem, path_of(problem, table, key))


def path_of(problem: Problem, table: Knots, key: Key) -> Trajectory:
    """The run of one schedule and key."""
    # Laid out alike, whoever made them: else jax compiles the program once for each layout.
    return _path(problem, *replicate((table, key), problem.mesh))


@eqx.filter_jit
def _path(problem: Problem, table: Knots, key: Key) -> Trajectory:
    """The one program that holds the loop over training time; all else works on its snapshots."""
    return problem.path(table, key)


@eqx.filter_jit
def _measured(problem: Problem, path: Trajectory) -> Outcome:
    return problem.measured(path)
