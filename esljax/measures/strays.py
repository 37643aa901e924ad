r"""Members that stand in each other's places at one snapshot, and are put back.

Let z_i be the members about the mean of their snapshot. At snapshot j member i is astray if it
leaves and comes back, both times far beyond the median motion of that link,

    ‖z_i(j+1) - z_i(j-1)‖² ≪ ‖z_i(j) - z_i(j-1)‖² and ‖z_i(j+1) - z_i(j)‖²

and others that do the same stand where it should be: one permutation of them explains both links.
Members that change places for good are not seen. Members that cross a barrier do the same, and no
snapshot tells one from the other. Neither is seen at the first and the last snapshot, nor among
members so close that their own motion carries them as far. More than some 3600 members are not
looked at.
"""

import numpy as np

# A permutation must explain all but this share of the motion of those astray, in both links.
UNEXPLAINED = 1 / 4
# The squared motion of a member astray, in medians of its link: 3.4 standard deviations on a line.
FAR = 25.0
# Beyond this share of the members, astray is no exception.
MOST = 0.25
# Assignments of so many members cubed take about ten seconds.
AFFORDABLE = 5e10


def put_back(positions: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the place of each member at each snapshot (J+1, n), the number of links that this
    changes, and the most members that were astray at one snapshot."""
    snapshots, members = positions.shape[:2]
    orders = np.tile(np.arange(members), (snapshots, 1))
    if members < 4 or members**3 > AFFORDABLE:
        return orders, 0, 0
    for j in range(1, snapshots - 1):
        before, here, after = positions[j - 1 : j + 2]
        if (orders[j - 1] != orders[0]).any():
            before = before[orders[j - 1]]
        suspects = _suspects(before, here, after)
        if 2 <= suspects.sum() <= MOST * members:
            before, here, after = _centered(np.stack([before, here, after]))
            orders[j] = _exchanged(before, here, after, suspects)
    changed = orders != np.arange(members)
    links = changed.any(axis=1)
    return orders, int((links[1:] | links[:-1]).sum()), int(changed.sum(axis=1).max())


def partners(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the place in `y` of the partner of each row of `x` in the best assignment."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(squares_between(x, y))[1]


def squares_between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the squared distance between each row of `x` and each of `y`."""
    squares = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0)


def _centered(clouds: np.ndarray) -> np.ndarray:
    apart = np.asarray(clouds, np.float64)
    apart = apart - apart.mean(axis=1, keepdims=True)
    size = np.abs(apart).max()
    return apart / size if np.isfinite(size) and size > 0 else np.zeros_like(apart)


def _motion(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the squared motion of each member about that of the mean. Infinite ones are no
    exception, so that their snapshot stays as it is."""
    with np.errstate(over="ignore", invalid="ignore"):
        apart = np.asarray(y - x, np.float64)
        apart -= apart.mean(axis=0)
        return np.einsum("ij,ij->i", apart, apart)


def _suspects(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return which members leave and come back."""
    there, back, in_all = _motion(before, here), _motion(here, after), _motion(before, after)
    far = (there > FAR * np.median(there)) & (back > FAR * np.median(back))
    return far & (in_all < UNEXPLAINED * np.minimum(there, back))


def _exchanged(
    before: np.ndarray, here: np.ndarray, after: np.ndarray, suspects: np.ndarray
) -> np.ndarray:
    """Return the place of each member at a snapshot where some may be astray."""
    given = np.arange(len(here))
    order = partners(before, here)
    # Cycles without a suspect are members whom their own motion carried past each other.
    kept = given.copy()
    for first in np.flatnonzero(suspects):
        member = first
        while kept[member] == member and order[member] != member:
            kept[member] = order[member]
            member = order[member]
    moved = kept != given
    if not moved.any() or moved.sum() > MOST * len(here) or (suspects & ~moved).any():
        return given
    for other in (before, after):
        explained = _motion(other[moved], here[kept[moved]]).sum()
        if not explained < UNEXPLAINED * _motion(other[moved], here[moved]).sum():
            return given
    return kept
