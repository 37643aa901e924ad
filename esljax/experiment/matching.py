"""Schedules brought to one final loss, so that they can be compared: each shape is scaled."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, door, refuse
from esljax._types import Array, Float, Key, Keys, Scalar
from esljax.experiment.judging import final_loss
from esljax.experiment.problem import Problem
from esljax.potentials import AbstractPotential
from esljax.schedules import AbstractSchedule, Constant, Knots
from esljax.sharding import replicate


def _ignored(loss: float) -> None: ...


@dataclasses.dataclass(frozen=True)
class Match:
    """Scales a shape to a target on keys common to all shapes."""

    problem: Problem
    learning_time: float
    """U at which each search starts."""
    keys: Keys
    watch: Callable[[float], Any] = _ignored
    """Called with the loss of each trial."""

    def __call__(self, shape: AbstractSchedule, name: str, target: float) -> Knots:
        return match_endpoint(
            self.problem,
            shape,
            target=target,
            learning_time=self.learning_time,
            keys=self.keys,
            name=name,
            watch=self.watch,
        )


@door
def match_endpoint(
    problem: Problem,
    shape: AbstractSchedule,
    *,
    target: float,
    learning_time: float,
    keys: Keys,
    name: str = "shape",
    tolerance: float = 1e-3,
    watch: Callable[[float], Any] = _ignored,
) -> Knots:
    """Scale a schedule until its mean final training loss over `keys` is `target`.

    The search starts at the scale where the learning time U = Σ η_k is `learning_time`, because
    with little noise the loss depends on U alone.

    **Args:** `shape`: any schedule with U > 0. `target`: the loss. `learning_time`: U, in squared
    parameters per unit of loss. `keys`: (R,), common to all trials. `name`: of the shape, for
    messages. `tolerance`: relative, on the loss; where the loss jumps with the scale, as it does
    near the stability limit, or is least there, ten times it. `watch`: called with the loss of each
    trial.
    **Returns:** the scaled schedule as a table of `Knots`.
    **Raises:** `InputError` if no scale reaches the target before the run leaves the stable range
    of its step.

    A secant search comes first. Where it leaves the range in which the loss falls with the scale,
    as from a start near the least loss, the target is bracketed from below and bisected.
    """
    table = problem.table(shape)
    time = float(jnp.sum(table.rates(problem.steps)))
    if not time > 0:
        raise refuse(name, "have a positive sum of rates", f"has the sum {time:g}")
    first = float(np.log(learning_time / time))
    trials: dict[float, float] = {}

    @functools.cache
    def excess(log_scale: float) -> float:
        """log(loss/target), and exactly 0 within the tolerance, which ends a search at once."""
        loss = final_loss(problem, Knots(table.values * np.exp(log_scale), "linear"), keys)
        trials[float(log_scale)] = loss
        watch(loss)
        if not np.isfinite(loss):
            return np.inf
        if loss < 0:
            raise _Unreachable
        if loss == 0:
            return -np.inf
        return 0.0 if abs(loss / target - 1) < tolerance else float(np.log(loss / target))

    try:
        log_scale = _by_secant(excess, first)
        if log_scale is None or _rises(trials):
            log_scale = _by_bracket(excess, list(trials))
    except _Unreachable:
        log_scale, loss = _closest(trials, target)
        if not _off(loss, target) < _NEARLY * tolerance:
            raise _unreachable(name, target, list(trials.items())) from None
    return Knots(table.values * np.exp(log_scale), "linear")


def _rises(trials: dict[float, float]) -> bool:
    """Whether some loss is higher at a larger scale, beyond noise: the run was not stable there,
    and a root may be on the wrong side of the least loss."""
    losses = [loss for _, loss in sorted(trials.items())]
    return any(later > 1.01 * earlier for earlier, later in itertools.pairwise(losses))


def _closest(trials: dict[float, float], target: float) -> tuple[float, float]:
    """The scale whose loss is closest to the target, among those up to that of the least loss:
    beyond it the run is not stable."""
    edge = min(trials, key=lambda scale: (not np.isfinite(trials[scale]), trials[scale]))
    stable = {scale: loss for scale, loss in trials.items() if scale <= edge}
    return min(stable.items(), key=lambda trial: _off(trial[1], target))


def _off(loss: float, target: float) -> float:
    """How far a loss is from the target, relative to it."""
    return abs(loss / target - 1) if np.isfinite(loss) else np.inf


# Tolerances of a match where none closer exists.
_NEARLY = 10.0


class _Unreachable(Exception):
    """No scale leads to the target."""


# Secant searches that stray further than this, in log scale, are lost.
_FAR = 5.0
# The most trials of a search for a bracket, and within it.
_MOST_TRIALS = 16


def _by_secant(excess: Callable[[float], float], first: float) -> float | None:
    """The root of the excess; None where the secant leaves the range of a falling loss."""
    # Imported here because it takes a sixth of the time of `import esljax`.
    from scipy.optimize import root_scalar

    last = first

    def within(log_scale: float) -> float:
        nonlocal last
        if not abs(log_scale - first) <= _FAR:
            raise _Lost
        last, value = log_scale, excess(log_scale)
        if not np.isfinite(value):
            raise _Lost
        return value

    try:
        at_start = within(first)
        if not at_start:
            return first
        # Late in training the loss falls about as U to the power -1/2: the second point.
        second = first + np.clip(2 * at_start, -1, 1) + 1e-3
        root_scalar(within, x0=first, x1=second, maxiter=12)
    except _Lost:
        return None
    return last if excess(last) == 0 else None


class _Lost(Exception):
    """A search has left the range where it can succeed."""


def _walked(excess: Callable[[float], float], tried: list[float]) -> float:
    """A scale below the target: the loss falls with the scale, and rises where the run is no longer
    stable, so walk to its least value.

    **Raises:** `_Unreachable` if that is above the target.
    """
    double = float(np.log(2))
    best, step = min(tried, key=excess), double
    if not np.isfinite(excess(best)):
        # Beyond all stable scales: from the other side of their edge.
        high, step = min(tried), double
        while not np.isfinite(excess(high - step)):
            high, step = high - step, 2 * step
            if step > 32 * _FAR:
                raise _Unreachable
        best = high - step
        while high - best > 2 * double:
            middle = (best + high) / 2
            best, high = (middle, high) if np.isfinite(excess(middle)) else (best, middle)
        step = double
    for _ in range(_MOST_TRIALS):
        if excess(best) <= 0:
            return best
        near = min((best - step, best + step), key=excess)
        if excess(near) < excess(best):
            best = near
        elif step < 0.2:
            break
        else:
            step /= 2
    raise _Unreachable


def _by_bracket(excess: Callable[[float], float], tried: list[float]) -> float:
    """The root of the excess between a scale above the target and the next one below it.

    **Raises:** `_Unreachable` if no scale leads below the target, or none above it.
    """
    below = [scale for scale in tried if excess(scale) <= 0]
    if not below:
        below = [_walked(excess, tried)]
    high = min(below)
    above = [scale for scale in tried if scale < high and excess(scale) > 0]
    low, step = max(above, default=high), float(np.log(2))
    while excess(low) <= 0:
        high, low = low, low - step
        step *= 2
        if step > 32 * _FAR:
            raise _Unreachable
    for _ in range(2 * _MOST_TRIALS):
        middle = (low + high) / 2
        value = excess(middle)
        if value == 0:
            return middle
        low, high = (middle, high) if value > 0 else (low, middle)
    raise _Unreachable


@door
def stable_rate(problem: Problem, key: Key, watch: Callable[[float], Any] = _ignored) -> float:
    """The largest of a few constant learning rates that keeps clear of the stability limit.

    The rates are 2^i/λ, i = 3, ..., -8, with λ the largest curvature at the start. One is clear of
    the limit if members stay finite and end lower than they started, and if its product with the
    largest curvature at the end of the run is at most 1, half of what the step of a quadratic
    bears: training sharpens, and above the limit gradients through a run are noise.

    **Args:** `key`: of the one run of each trial. `watch`: called with the final loss of each.
    **Returns:** the rate, per step.
    **Raises:** `InputError` if none of them is clear of it.
    """
    curvature = float(_curvature_at_start(problem, key))
    if not (np.isfinite(curvature) and curvature > 0):
        raise refuse(
            "rate",
            "be given for a potential without curvature at the start",
            f"is None, and the largest curvature is {curvature:g}",
        )
    tried = []
    for power in range(3, -9, -1):
        rate = 2.0**power / curvature
        before, after, sharpness = map(float, _curvature_at_end(problem, jnp.asarray(rate), key))
        watch(after)
        tried.append(rate)
        if np.isfinite(after) and after < before and rate * sharpness <= 1:
            return rate
    raise refuse(
        "rate",
        "be given where no constant rate of a few is stable",
        f"is None, and {', '.join(f'{rate:.2g}' for rate in tried)} are not",
    )


@eqx.filter_jit
def _curvature_at_start(problem: Problem, key: Key) -> Scalar:
    start = problem.positions(jax.random.split(key)[0])
    return _largest_curvature(problem.potential.at_start(), start)


@eqx.filter_jit
def _curvature_at_end(problem: Problem, rate: Scalar, key: Key) -> tuple[Scalar, Scalar, Scalar]:
    """Mean loss at the start and the end of a run, and the largest curvature at its end."""
    path, potential = problem.path(Constant(rate), key), problem.potential.at_end()
    start = path.positions[0]
    answer = (
        jnp.mean(potential(start)),
        jnp.mean(potential(path.final)),
        _largest_curvature(potential, path.final),
    )
    return replicate(answer, problem.mesh)


def _largest_curvature(potential: AbstractPotential, positions: Float[Array, "n d"]) -> Scalar:
    """The largest eigenvalue of the Hessian, by size, of the first members, by power iteration."""

    def force(position):
        return potential.energy_and_gradient(position)[1]

    def of_member(position):
        def iterate(vector, _):
            turned = jax.jvp(force, (position,), (vector,))[1]
            size = jnp.linalg.norm(turned)
            return turned / jnp.where(size > 0, size, 1), size

        first = jax.random.normal(jax.random.key(0), position.shape, position.dtype)
        first = first / jnp.linalg.norm(first)
        # Twenty products find the largest of spectra as wide as those of networks to a few percent.
        return jax.lax.scan(iterate, first, length=20)[1][-1]

    return jnp.max(jax.lax.map(of_member, positions[:4]))


def _unreachable(name: str, target: float, trials: list[tuple[float, float]]) -> InputError:
    losses = ", ".join(f"{loss:.4g}" for _, loss in trials)
    return refuse(
        "target",
        f"be a loss that {name} can reach",
        f"is {target:g}: scaling the rates gave the losses {losses}",
    )
