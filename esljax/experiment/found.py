r"""The schedule of one run, where some of it is found: its rate by matching, its shape by gradient.

The keys of the search are a function of the seed of the run, and the run itself sees none of them.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import refuse
from esljax._types import Key, Scalar
from esljax.experiment.judging import final_loss
from esljax.experiment.matching import Match, stable_rate
from esljax.experiment.problem import Problem, table_of
from esljax.experiment.settings import OPTIMIZED, usual_shapes
from esljax.optimization import optimize
from esljax.schedules import AbstractSchedule, Constant, Knots

# Far from the numbers that `split` folds into the same key.
_APART = 1 << 30


class Found(NamedTuple):
    """The schedule of a run."""

    table: Knots
    """Its rate at each step."""
    rate: float
    """Its peak: the factor of a usual shape, or the largest rate of an optimized one."""
    knots: tuple[float, ...] = ()
    """The log-linear knots of an optimized schedule, in the units of the rate."""


class LeastSigma(eqx.Module):
    """Σ of a run, and its final loss relative to a target, to be at most 0.

    A pytree, so that searches of equal shapes share one program.
    """

    problem: Problem
    target: Scalar

    def __call__(self, learning_rate: AbstractSchedule, key: Key) -> tuple[Scalar, Scalar]:
        outcome = self.problem.run(learning_rate, key)
        return outcome.report.entropy_production, outcome.final_loss / self.target - 1


def given_schedule(problem: Problem, config: Any) -> Found | None:
    """The schedule of a run with the settings `config` where nothing of it is to be found, else
    None. It depends on the steps of `problem` alone, and has the bits of `rate` times the shape of
    peak 1."""
    if config.target or config.schedule == OPTIMIZED or not config.rate > 0:
        return None
    return Found(_scaled(_shape(problem, config.schedule), config.rate), config.rate)


def find_schedule(problem: Problem, config: Any) -> Found:
    """The schedule of a run of `problem` with the settings `config`.

    **Raises:** `InputError` if its target cannot be reached, or no rate leaves it stable.
    """
    given = given_schedule(problem, config)
    if given is not None:
        return given
    match_key, search_key = jax.random.split(
        jax.random.fold_in(jax.random.key(config.seed), _APART)
    )
    rate = config.rate or _usual_rate(problem)
    if not config.target and config.schedule != OPTIMIZED:
        return Found(_scaled(_shape(problem, config.schedule), rate), rate)
    keys = jax.random.split(match_key, config.match_runs)
    match = Match(problem, rate * problem.steps, keys)
    if config.schedule != OPTIMIZED:
        matched = match(usual_shapes()[config.schedule], config.schedule, config.target)
        return Found(matched, _factor(matched, _shape(problem, config.schedule)))
    return _optimized(problem, config, rate, match, search_key)


def _optimized(problem: Problem, config: Any, rate: float, match: Match, key: Key) -> Found:
    """The schedule of least Σ at the target, which by default is what the constant one reaches."""
    target = config.target
    if target:
        rate = float(match(Constant(1.0), "constant", target).values[0])
    else:
        target = final_loss(problem, Constant(rate), match.keys)
        if not (np.isfinite(target) and target > 0):
            raise refuse(
                "rate",
                "lead the constant schedule to a positive loss, the target of the optimized one",
                f"is {rate:g}, which leads to {target:g}",
            )
    optimum = optimize(
        LeastSigma(problem, jnp.asarray(target, jnp.result_type(float))),
        Knots(jnp.full(config.knots, rate)),
        key=key,
        iterations=config.iterations,
        mesh=problem.mesh,
    )
    if optimum.interrupted:
        raise KeyboardInterrupt
    searched = optimum.controls
    if not np.all(np.isfinite(searched.values)):
        raise refuse(
            "schedule", "be found by a search that stays finite", f"is lost: {optimum.message}"
        )
    matched = match(searched, OPTIMIZED, float(target))
    knots = Knots(searched.values * _factor(matched, problem.table(searched)))
    values = tuple(np.asarray(knots.values, np.float64).tolist())
    return Found(problem.table(knots), max(values), values)


def _shape(problem: Problem, name: str) -> Knots:
    return _shape_of(name, problem.steps, jnp.result_type(float))


@functools.lru_cache(maxsize=64)
def _shape_of(name: str, steps: int, dtype: Any) -> Knots:
    """The table of a usual shape, in jax's present type; a third of a tiny run goes into one."""
    return table_of(usual_shapes()[name], steps)


def _scaled(table: Knots, factor: float) -> Knots:
    return Knots(table.values * jnp.asarray(factor, table.values.dtype), "linear")


def _factor(matched: Knots, table: Knots) -> float:
    """The factor between a table and the shape that it was scaled from, where that is largest."""
    place = int(jnp.argmax(table.values))
    return float(matched.values[place] / table.values[place])


@functools.lru_cache(maxsize=16)
def _rate_of(about: "_ById") -> float:
    return float(jnp.asarray(stable_rate(about.problem, jax.random.key(0))))


class _ById(NamedTuple):
    problem: Problem

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.problem is other.problem


def _usual_rate(problem: Problem) -> float:
    """The largest of a few rates that leaves the constant schedule stable: one for all seeds."""
    return _rate_of(_ById(problem))
