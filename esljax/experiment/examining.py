"""What a comparison says of one schedule beyond Σ: the law's own W2², and what else bounds Σ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError
from esljax._types import Array, Key, Keys
from esljax.experiment.judging import path_of
from esljax.experiment.problem import Problem
from esljax.measures import (
    Bracket,
    MinibatchNoise,
    minibatch_noise,
    observable_limit,
    speed_limit,
    w2_bracket,
)
from esljax.potentials import symmetry
from esljax.results import StandardErrors
from esljax.schedules import Knots
from esljax.sharding import replicate
from esljax.simulation import Trajectory, from_snapshots, stack
from esljax.transport import AbstractTransport, QuotientTransport

# From this many members on, halves of them are worth a distance.
_DEBIASED_FROM = 8
# Members that stand for all modulo a symmetry, where the debiased value hardly depends on them: of
# the digits run 42.7, 43.2, 43.4 and 43.7 at 16, 32, 64 and 128.
_STANDING = 64
# The cubes of units that all assignments of an examination may add up to: at 128 units 2.8 s.
_WORK = 1e10
# The most groups of members that leave in turn for the errors of one run.
_GROUPS = 32


class Examination(NamedTuple):
    """One schedule of a comparison, looked at more closely on the held-out runs."""

    bracket: Bracket | None
    """Both sides of the W2² between the laws, with errors over the runs: modulo the symmetry of the
    network, where it has one and members start from its own initialization, else without. None
    below 8 members."""
    observable_limit: tuple[float, float]
    """The Σ that the change of the loss alone proves, in squared parameters, and its standard error
    over the runs."""
    member_error: StandardErrors | None
    """Standard errors of the first run alone, by a jackknife over its members. None for fewer than
    3 members."""
    batches: MinibatchNoise | None
    """The noise of the batches along the first run. None without batches, and for a driven
    potential."""


def examine(problem: Problem, table: Knots, keys: Keys) -> Examination | None:
    """Run a schedule on each of `keys` (R ≥ 2) once more, and look at more than its Σ.

    None if members left the finite numbers, as those of a schedule that diverges do.
    """
    paths = [path_of(problem, table, key) for key in keys]
    if not all(bool(jnp.all(jnp.isfinite(path.positions))) for path in paths):
        return None
    limits = [observable_limit(path, problem.potential, jackknife=_GROUPS) for path in paths]
    proved = [float(limit.value) for limit in limits]
    ends = jnp.stack([path.positions[jnp.array([0, -1])] for path in paths])
    first = speed_limit(paths[0], transport=problem.transport, jackknife=_GROUPS)
    return Examination(
        bracket=_bracket(problem, replicate(ends, problem.mesh)),
        observable_limit=(
            float(np.mean(proved)),
            float(np.std(proved, ddof=1) / np.sqrt(len(proved))),
        ),
        member_error=first.standard_error,
        batches=_batches(problem, paths[0], keys[0]),
    )


def _bracket(problem: Problem, ends: Array) -> Bracket | None:
    """From the members at both ends of R runs, shape (R, 2, n, d)."""
    members, quotient = _modulo_symmetry(problem, len(ends))
    if members < _DEBIASED_FROM:
        return None
    transport = problem.transport if quotient is None else quotient
    ends = ends[:, :, :members]
    runs, compared = (
        stack([from_snapshots(one) for one in each]) for each in (ends, transport.coordinates(ends))
    )
    return w2_bracket(compared, speed_limit(runs, transport=transport, jackknife=0, debias=True))


def _modulo_symmetry(problem: Problem, runs: int) -> tuple[int, AbstractTransport | None]:
    """How many members to compare, and the transport modulo the symmetry of the network, if laws
    are invariant under one that is not too much work."""
    # Of positions, and of a function to them, nobody knows whether units are exchangeable.
    if problem.start is not None:
        return problem.members, None
    try:
        group = symmetry.of(problem.potential)
        transport = QuotientTransport(problem.transport, group)
    except InputError:  # no model, no symmetry, or a transport of more than distances
        return problem.members, None
    # Three distances between halves of the members: an assignment for each pair and group.
    each = 3 * runs * sum(float(h) ** 3 for h in group.sizes)
    half = min(problem.members, _STANDING) // 2
    half = min(half, int(np.sqrt(_WORK / each)))
    return (problem.members, None) if 2 * half < _DEBIASED_FROM else (2 * half, transport)


def _batches(problem: Problem, path: Trajectory, key: Key) -> MinibatchNoise | None:
    """The noise of the batches along one run, from batches that the run has not seen."""
    potential = problem.potential
    if potential.moves or potential.draw(key, 1) is None:
        return None
    batch_key = jax.random.fold_in(key, 1)
    noise = minibatch_noise(path, problem.potential, key=batch_key, pairs=2)
    return replicate(noise, problem.mesh)
