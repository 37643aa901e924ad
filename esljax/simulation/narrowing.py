r"""Recorded numbers of any type as floating arrays that keep the differences between members.

Members that lie far from 0 lose their differences where they are rounded: 10⁴ ± 10⁻⁴ is one number
in single precision. No distance between laws changes if all members are moved together, so they
are moved before they are rounded, in the type in which they came. Let lo ≤ hi be the range of one
coordinate over all members and snapshots. Where hi ≤ 2 lo (or, below 0, lo ≥ 2 hi), x - lo is exact
in any floating type (Sterbenz, Floating-Point Computation, 1974); elsewhere the members themselves
spread as far as they lie from 0, and moving them would save less than a bit.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from esljax._checks import as_array, as_real, known, refuse
from esljax._types import Array, Float

# Rounding that adds this share to the squared displacements changes Σ by up to its root, 1e-5.
NEGLIGIBLE = 1e-10
_WIDER = "compute in float64 (jax.config.update('jax_enable_x64', True), or --dtype float64)"


def narrowed(name: str, x: Any) -> tuple[Float[Array, "..."], Float[Array, " d"] | None]:
    """Return numbers of any kind as a floating array of single precision or more, and their origin.

    The origin is None where the numbers are as they were given, up to rounding; else they are taken
    relative to it. Under `jit`, which hides values, it is None.

    **Raises:** `InputError` for what is no array of real numbers, for masked entries, and for
    members that move by less than the type can hold.
    """
    array: Any = as_array(name, x, "be an array")
    if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.dtype.itemsize > 8:
        array = np.asarray(x)  # extended precision, which jax lacks
    plain = as_real(name, array, "be an array")
    readable = known(array) and array.ndim == 3 and array.size
    if not readable or not _holds_more(array.dtype, plain.dtype):
        return plain, None
    return _about_origin(name, np.asarray(array), plain)


def _holds_more(given: Any, target: Any) -> bool:
    """Whether a type holds numbers that the target rounds."""
    digits = jnp.finfo(target).nmant
    if jnp.issubdtype(given, jnp.integer):
        return np.iinfo(given).bits > digits
    return int(np.finfo(given).nmant if given.kind == "f" else jnp.finfo(given).nmant) > digits


def _about_origin(
    name: str, wide: np.ndarray, rounded: Float[Array, "snapshots n d"]
) -> tuple[Float[Array, "snapshots n d"], Float[Array, " d"] | None]:
    plain = np.asarray(rounded)
    target = plain.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = wide.min(axis=(0, 1)), wide.max(axis=(0, 1))
        ends = np.stack([low, high]).astype(target)
        if not np.isfinite(ends).all():
            return rounded, None
        near, far = np.minimum(*np.abs(ends)), np.maximum(*np.abs(ends))
        close = (np.sign(ends[0]) == np.sign(ends[1])) & (far <= 2 * near)
        moved, lost, left = _moved_and_lost(wide, plain, low, high, close, target)
    if not lost > NEGLIGIBLE * moved:
        return rounded, None
    if left > moved > 0:
        wider = "" if target == np.float64 else f": {_WIDER}"
        raise refuse(
            name,
            f"hold members that move by more than {target} resolves{wider}",
            f"moves them by {np.sqrt(moved):.3g} in a link, and rounding by {np.sqrt(left):.3g}",
        )
    if not close.any() or not moved > 0:
        return rounded, None
    origin = np.where(close, low, np.zeros((), low.dtype))
    shifted = np.empty(wide.shape, target)
    for j, snapshot in enumerate(wide):
        shifted[j] = _difference(snapshot, origin)
    return jnp.asarray(shifted), jnp.asarray(origin.astype(target))


def _moved_and_lost(
    wide: np.ndarray,
    plain: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    close: np.ndarray,
    target: Any,
) -> tuple[float, float, float]:
    """Return the mean squared displacement of a member in a link, how much rounding adds to it, and
    how much is left of that once the coordinates that lie close together are moved."""
    moved, rounded = 0.0, np.zeros(wide.shape[2], bool)
    for j, snapshot in enumerate(wide):
        # Numbers that were stored in fewer bits lose none.
        rounded |= (plain[j].astype(wide.dtype) != snapshot).any(axis=0)
        if j:
            step = np.asarray(_difference(snapshot, wide[j - 1]), np.float64)
            moved += float(np.sum(step**2))
    moved /= (len(wide) - 1) * wide.shape[1] if len(wide) > 1 else 1
    # Both ends of a link are rounded, each by a twelfth of the squared spacing.
    reach = np.maximum(np.abs(low.astype(target)), np.abs(high.astype(target)))
    spread = np.asarray(_difference(high, low), np.float64).astype(target)
    squares = [np.spacing(size).astype(np.float64) ** 2 / 6 for size in (reach, spread)]
    return (
        moved,
        float(np.sum(squares[0][rounded])),
        float(np.sum(np.where(close, squares[1], squares[0])[rounded])),
    )


def _difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x - y as floating numbers, exact before the last rounding where both are integers."""
    if x.dtype.kind not in "iu":
        return x - y
    # Modulo 2^bits no difference of either sign is lost.
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    ahead = np.maximum(x, y).astype(unsigned) - np.minimum(x, y).astype(unsigned)
    return np.where(x >= y, 1.0, -1.0) * ahead.astype(np.float64)
