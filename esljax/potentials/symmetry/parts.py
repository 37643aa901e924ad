"""What a symmetry consists of: axes that turn together, in groups, and one way of turning them."""

import dataclasses
from typing import NamedTuple

from esljax._types import Array, Float, Int


class Turned(NamedTuple):
    """An axis of an array that a group turns."""

    key: str
    """The name of the array."""
    axis: int
    """Which axis, from 0."""
    inner: int | None = None
    """Where one axis indexes more than the units: how many numbers lie side by side for each unit.
    None if it indexes them alone."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that may change places, and perhaps their signs."""

    name: str
    axes: tuple[Turned, ...]
    """The axes that they index, which turn together."""
    signed: bool
    """Whether each unit may also change its sign."""
    units: int | None = None
    """How many units there are, where no axis indexes them alone; else None, and their axes say
    it."""


class Element(NamedTuple):
    """One element of the group: for each group of units their new order and their signs."""

    places: tuple[Int[Array, " h"], ...]
    """The unit of the given member that comes to each place, shape (h,) for each group."""
    signs: tuple[Float[Array, " h"], ...]
    """±1 for each place, shape (h,) for each group."""
