r"""Members whose values are known, put into an order that follows them, each counted once.

The label of a member is its place in a snapshot. Numbers about laws do not depend on it, but their
errors do: the jackknife leaves the same label out of every snapshot. Where a recording was
assembled from files in any order, the labels of two snapshots say nothing about each other although
the two clouds fit together, and the best assignment recovers them:

    mean‖x_i - y_π(i)‖² ≪ the same between halves of one snapshot, the given pairs explain nothing

A law that mixes within a link fails the first condition, since then no assignment is cheaper than
between independent members, and members that move by themselves fail the second. Where only some
members stand in each other's places, `strays` puts them back. Copies of a member are one
observation, and are measured once.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esljax._checks import known, refuse
from esljax.measures.evidence import Labels
from esljax.measures.report import SpeedLimit
from esljax.measures.strays import partners, put_back, squares_between
from esljax.simulation import Trajectory, on_devices
from esljax.velocity import AbstractVelocity

# Pairs this well correlated belong together, and nothing more is computed: at a correlation of .9
# the members' own motion is a fifth of the variance of their differences.
CORRELATED = 0.9
# Independent members of one law are matched at half to all of the cost between two of its halves.
# The ratio scatters where members lie along a line or a plane, and where they are few: by effective
# dimensions below 1.5, below 3, and above. Of 2400 runs that mix, each of 12 links and 4 to 130
# members in 1 to 8 dimensions, one of 16 members on a line fell below. Few members match by chance
# more often, so that the threshold falls with them.
CLOSE = ((1.5, 0.03), (3.0, 0.08), (np.inf, 0.25))
MANY = 32
# Labels that follow some members explain some of the motion: two neighbors of four that change
# places on a line leave a correlation of .6.
UNEXPLAINED = 0.5
# The given pairs must be this much worse than the best ones.
WORSE = 4.0
# The distance covariance of independent labels exceeds its mean by more than this number of
# standard deviations in some 1 of 1000 links.
INFORMATIVE = 4.0
# Rows of a test, coordinates of a test and permutations behind a standard deviation.
ROWS, DIRECTIONS, PERMUTATIONS = 128, 64, 60
# Links times members cubed: about ten seconds of assignments.
AFFORDABLE = 5e10


def canonical(
    trajectory: Trajectory, velocity: AbstractVelocity | None
) -> tuple[Trajectory, Labels | None]:
    """Return the run with labels that follow its members, each distinct member once.

    The order of the first snapshot stays. Where values are not known, under `jit` or on other
    processes, the run stays as it is.

    **Returns:** the run, and what was found; the same run and None if labels follow members and no
    two members are equal.
    **Raises:** `InputError` if `velocity` reads the members' own paths and labels do not follow
    them.
    """
    positions = trajectory.positions
    if not known(positions):
        return trajectory, None
    values = np.asarray(positions)
    runs = values if values.ndim == 4 else values[None]
    orders, broken, astray = zip(*(_orders(one) for one in runs), strict=True)
    followed = np.stack([_ordered(*pair) for pair in zip(runs, orders, strict=True)])
    kept = [_distinct(one) for one in followed]
    members = runs.shape[2]
    # Runs are stacked, so only copies in the same places leave.
    same = all(np.array_equal(kept[0], other) for other in kept)
    keep = kept[0] if same and len(kept[0]) >= 2 else np.arange(members)
    distinct = min(len(one) for one in kept)
    if not any(broken) and distinct == members:
        return trajectory, None
    if any(broken) and velocity is not None and velocity.between:
        raise refuse(
            "velocity",
            "read laws, as TransportVelocity(...) does, where labels do not follow members",
            f"is {type(velocity).__name__}, which reads the members' own paths",
        )
    counts = max(broken), distinct, members, max(astray)
    found = Labels(*(jnp.asarray(count) for count in counts))
    shape = values.shape[:-2]
    order = np.stack(orders)[..., keep].reshape(*shape, len(keep))
    return _reordered(trajectory, order), found


def with_labels(report: SpeedLimit, found: Labels | None) -> SpeedLimit:
    """Return the report with what was found, and without the numbers that need members' paths."""
    evidence = report.evidence
    if found is None or evidence is None:
        return report
    if int(found.links) > 0:
        found = dataclasses.replace(found, identity_fraction=report.identity_fraction)
        report = dataclasses.replace(report, identity_fraction=None, noise_floor=None)
    return dataclasses.replace(report, evidence=dataclasses.replace(evidence, labels=found))


def _reordered(trajectory: Trajectory, order: np.ndarray) -> Trajectory:
    """Return the run with its members in another order at each snapshot, on the same devices.

    The work along a link goes with the members at its end.
    """
    positions = np.asarray(trajectory.positions)
    positions = np.take_along_axis(positions, order[..., None], axis=-2)
    energies, work = trajectory.energies, trajectory.work_of_links
    changed = dataclasses.replace(
        trajectory,
        positions=jnp.asarray(positions),
        energies=None
        if energies is None
        else jnp.asarray(np.take_along_axis(np.asarray(energies), order, axis=-1)),
        work_of_links=None
        if work is None
        else jnp.asarray(np.take_along_axis(np.asarray(work), order[..., 1:, :], axis=-1)),
        final=jnp.asarray(
            np.take_along_axis(np.asarray(trajectory.final), order[..., -1, :, None], axis=-2)
        ),
        mesh=None,
    )
    mesh = trajectory.mesh
    return on_devices(changed, mesh) if isinstance(mesh, Mesh) else changed


def _ordered(positions: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(positions, order[..., None], axis=-2)


def _distinct(positions: np.ndarray) -> np.ndarray:
    """Return the first member of each kind, in order."""
    first: dict[bytes, int] = {}
    starts: dict[bytes, list[int]] = {}
    members = positions.shape[1]
    for i in range(members):
        starts.setdefault(positions[0, i].tobytes(), []).append(i)
    for alike in starts.values():
        for i in alike:
            # Only members that start together need a second look.
            whole = positions[:, i].tobytes() if len(alike) > 1 else positions[0, i].tobytes()
            first.setdefault(whole, i)
    return np.array(sorted(first.values()))


# --- Labels ---------------------------------------------------------------------------------------


class _Link(NamedTuple):
    """What the labels of two neighboring snapshots say about each other."""

    broken: bool
    """Whether the two clouds fit together and the labels do not."""
    worse: float
    """The cost of the given pairs over that of the best; 1 where it was not computed."""


def _orders(positions: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the place of each member at each snapshot (J+1, n), the number of broken links, and
    the most members that stood in each other's places at one snapshot."""
    orders, broken = _shuffled(positions)
    # A guess upon a guess is none.
    return (orders, broken, positions.shape[1]) if broken else put_back(positions)


def _shuffled(positions: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the place of each member, and the number of links that explain nothing."""
    snapshots, members, d = positions.shape
    given = np.broadcast_to(np.arange(members), (snapshots, members))
    low = [j for j in range(snapshots - 1) if _correlation(*positions[j : j + 2]) < CORRELATED]
    if not low or members < 4:
        return given, 0
    if d > 4 * DIRECTIONS:
        # Random directions keep distances to a fifth, which no threshold here is close to.
        random = np.random.default_rng(0).normal(size=(d, DIRECTIONS)).astype(positions.dtype)
        positions = (positions - positions[0].mean(axis=0)) @ random
    links = {j: _link(*_centred(positions[j : j + 2])) for j in low}
    broken = [j for j in low if links[j].broken]
    if not broken:
        return given, 0
    if 2 * len(broken) > snapshots - 1:
        # Where most links are broken, so is one whose pairs are alike by chance.
        broken = [j for j in low if links[j].broken or links[j].worse > 1]
    if len(broken) * members**3 > AFFORDABLE:
        return given, len(broken)
    orders = [given[0]]
    for j in range(snapshots - 1):
        last = orders[-1]
        orders.append(partners(*_centred(positions[j : j + 2]))[last] if j in broken else last)
    return np.stack(orders), len(broken)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """tr cov(x, y)/√(tr cov(x) tr cov(y)) of the given pairs; 1 where a cloud is one point."""
    x, y = _in_one_unit(*(a - a.mean(axis=0) for a in (x, y)))
    size = np.sqrt(float(np.vdot(x, x))) * np.sqrt(float(np.vdot(y, y)))
    return float(np.vdot(x, y)) / size if np.isfinite(size) and size > 0 else 1.0


def _in_one_unit(*clouds: np.ndarray) -> list[np.ndarray]:
    """Both clouds in units in which their squares are numbers; as they are if they usually are."""
    size = max(np.abs(cloud).max() for cloud in clouds)
    return (
        list(clouds)
        if not 0 < size < np.inf or 1e-9 < size < 1e9
        else [cloud / size for cloud in clouds]
    )


def _centred(pair: np.ndarray) -> np.ndarray:
    """Both clouds about their means, in units in which their squares are numbers."""
    pair = np.asarray(pair, np.float64)
    apart = pair - pair.mean(axis=1, keepdims=True)
    return apart / np.abs(apart).max()


def _link(x: np.ndarray, y: np.ndarray) -> _Link:
    random = np.random.default_rng(0)
    rows = random.permutation(len(x))[:ROWS]
    given = np.mean(np.sum((x[rows] - y[rows]) ** 2, axis=1))
    best = _cheapest(x[rows], y)
    worse = given / max(best, 1e-300)
    # Copies of one member may lie in both halves.
    apart = random.permutation(np.unique(x, axis=0))
    # As many columns for each row as above: rows that may choose among many find closer partners.
    half = len(apart) // 2
    reference = (
        _cheapest(apart[: max(1, half * len(rows) // len(x))], apart[-half:]) if half else 0.0
    )
    dimensions = _effective_dimensions(x[rows])
    close = next(share for most, share in CLOSE if dimensions < most)
    close *= min(1.0, len(apart) / MANY) ** (2 if dimensions < CLOSE[1][0] else 1)
    fits = worse > WORSE and best < close * reference
    unexplained = _correlation(x[rows], y[rows]) < UNEXPLAINED
    return _Link(
        fits and unexplained and _dependence(x[rows], y[rows], random) < INFORMATIVE, worse
    )


def _effective_dimensions(x: np.ndarray) -> float:
    """Return (tr C)²/tr C² of the covariance C of members about 0."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(np.trace(gram) ** 2 / max(np.sum(gram**2), 1e-300))


def _cheapest(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.optimize import linear_sum_assignment

    cost = squares_between(x, y)
    return float(np.mean(cost[linear_sum_assignment(cost)]))


def _dependence(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> float:
    """How many standard deviations of random labels the distance covariance of the given ones is
    from the mean of random labels. It sees any dependence, a rotation by a right angle as well."""
    a, b = (np.sqrt(squares_between(z, z)) for z in (x, y))
    a = a - a.mean(axis=0) - a.mean(axis=1)[:, None] + a.mean()
    shuffled = [random.permutation(len(x)) for _ in range(PERMUTATIONS)]
    by_chance = np.array([np.vdot(a, b[np.ix_(order, order)]) for order in shuffled])
    spread = by_chance.std()
    return float(np.vdot(a, b) - by_chance.mean()) / spread if spread > 0 else 0.0
