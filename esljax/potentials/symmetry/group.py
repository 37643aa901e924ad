r"""Permutations, and sign flips, of the units of a network: a group that acts on its parameters.

    (g θ) = θ with the units of every group in another order, along each axis that they index
    d_G(θ, θ') = min_g ‖θ - g θ'‖

The group acts by isometries, so d_G is a metric on its orbits. The best order of one group is an
assignment: its cost adds up over the units, rows of incoming weights, bias and outgoing weights
together. Groups that share no array are independent of each other, and d_G is exact. Otherwise each
is ordered in turn while the others stay, until none gains: an upper value of d_G.

Reference: Hecht-Nielsen, "On the algebraic structure of feedforward network weight spaces" (1990);
Ainsworth, Hayase and Srinivasa, "Git Re-Basin", ICLR 2023, for the alternating assignments.
"""

import dataclasses
import json
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import check_key, door, in_words, refuse
from esljax._types import Array, ArrayLike, Float, Key
from esljax.potentials.base import AbstractPotential
from esljax.potentials.symmetry.parts import Element, Group, Turned
from esljax.potentials.symmetry.trying import Trial, trial

Keys = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Symmetry:
    """A group that leaves a network alone and acts on its parameters. `print` shows it.

    Made by `esljax.symmetry.of` and `esljax.symmetry.permutations`.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> import jax.numpy as jnp
        >>> arrays = {"into": (2, 3), "out": (3, 1)}
        >>> symmetry = esl.symmetry.permutations(
        ...     {"hidden": [("into", 1), ("out", 0)]}, keys=arrays
        ... )
        >>> turned = symmetry.act(symmetry.draw(jax.random.key(1)), jnp.arange(9.0))
        >>> for array in symmetry.arrays(turned).values():
        ...     print(array)
        [[2. 1. 0.]
         [5. 4. 3.]]
        [[8.]
         [7.]
         [6.]]
    """

    groups: tuple[Group, ...]
    """The groups of units."""
    keys: Keys | None = None
    """The names and shapes of all arrays, in the order in which a member is raveled; None until
    `at` binds them."""

    @property
    def exact(self) -> bool:
        """Whether no array is turned twice, so that one assignment for each group finds d_G."""
        held = Counter(axis.key for group in self.groups for axis in group.axes)
        return max(held.values()) == 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many units each group has."""
        shapes = self._shapes
        return tuple(_size(group, shapes) for group in self.groups)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.keys is None:
            must = "know the shapes of its arrays (symmetry.at(path.keys), or keys= as it is made)"
            raise refuse("symmetry", must, "knows none")
        return dict(self.keys)

    def at(self, keys: Any) -> "Symmetry":
        """Return the symmetry of members that are raveled in the order of these arrays.

        **Args:** `keys`: the names and shapes of all arrays, as `Trajectory.keys`,
        `Recording.keys` or `potential.parameter_keys` hold them.
        **Raises:** `InputError`, with the array, for one that is not there, and for axes that are
        not there or of different sizes; and for anything but names and shapes.
        """
        try:
            bound = tuple(
                (str(key), tuple(map(operator.index, shape))) for key, shape in dict(keys).items()
            )
        except (TypeError, ValueError) as error:
            must = "be the names and shapes of all arrays, as potential.parameter_keys holds them"
            was = f"is {in_words(keys)}"
            was += " that holds other things" if isinstance(keys, Iterable) else ""
            raise refuse("keys", must, was) from error
        shapes = dict(bound)
        for group in self.groups:
            _check_axes(group, shapes)
        return dataclasses.replace(self, keys=bound)

    def only(self, *names: str) -> "Symmetry":
        """Return the part of the symmetry that turns these groups alone.

        Fewer groups may be independent where all are not: every second layer of a deep network has
        an exact distance. It is no less than that of all groups.
        """
        for name in names:
            if name not in {group.name for group in self.groups}:
                listed = ", ".join(repr(group.name) for group in self.groups)
                raise refuse("names", f"be among the groups {listed}", f"hold {name!r}")
        chosen = tuple(group for group in self.groups if group.name in names)
        if not chosen:
            raise refuse("names", "name at least one group", "name none")
        return dataclasses.replace(self, groups=chosen)

    @door
    def check(
        self, potential: AbstractPotential, *, draws: int = 3, tolerance: float = 1e-5
    ) -> Trial:
        """Try the symmetry: random elements act on random members, and outputs must stay.

        **Args:** `potential`: of the model, a `FlaxLoss` or one `Driven` from such. `draws`:
        members, inputs and elements that are drawn for each group. `tolerance`: the largest change
        of outputs, relative to the largest output, that counts as rounding.
        **Returns:** `Trial`; `print` shows it.
        **Raises:** `InputError` for what is no symmetry, with the arrays that break it: those that
        the traced model turns otherwise.

        **Example:**

            >>> import esljax as esl
            >>> data = esl.datasets.two_moons(samples=50)
            >>> potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train)
            >>> trial = esl.symmetry.of(potential).check(potential)
            >>> trial.groups, trial.moved[0] < trial.tolerance
            (('layers/0',), True)
        """
        return trial(self, potential, draws, tolerance)

    def draw(self, key: Key) -> Element:
        """Return a uniformly random element of the group.

        **Args:** `key`: made by `jax.random.key`.
        """
        check_key("key", key)
        places, signs = [], []
        for group, h, own in zip(
            self.groups, self.sizes, jax.random.split(key, len(self.groups)), strict=True
        ):
            order, flips = jax.random.split(own)
            places.append(jax.random.permutation(order, h))
            drawn = 2 * jax.random.bernoulli(flips, shape=(h,)).astype(jnp.result_type(float)) - 1
            signs.append(drawn if group.signed else jnp.ones_like(drawn))
        return Element(tuple(places), tuple(signs))

    @door
    def act(self, element: Element, position: Float[ArrayLike, " d"]) -> Float[Array, " d"]:
        """Return g θ for one member θ, shape (d,).

        **Differentiation:** in the position, to every order: g is linear.
        """
        arrays = self.arrays(jnp.asarray(position))
        held = tuple(len(x) for x in element.places) if isinstance(element, Element) else None
        if held != self.sizes:
            must = f"be an element of this symmetry, of {_listed(self.sizes)} units"
            was = f"is {in_words(element)}" if held is None else f"has {_listed(held)}"
            raise refuse("element", must, was)
        parts = zip(self.groups, self.sizes, element.places, element.signs, strict=True)
        for group, h, places, signs in parts:
            for axis in group.axes:
                array = arrays[axis.key]
                around = _around(axis, h, array.shape)
                turned = array.reshape(around)[:, places]
                if group.signed:
                    turned = turned * signs.astype(array.dtype)[:, None]
                arrays[axis.key] = turned.reshape(array.shape)
        return jnp.concatenate([array.ravel() for array in arrays.values()])

    def arrays(self, position: Float[Array, " d"]) -> dict[str, Array]:
        """Return the arrays of one member by their names."""
        shapes, start, arrays = self._shapes, 0, {}
        held = sum(map(math.prod, shapes.values()))
        if len(position) != held:
            must = f"hold members of {held} numbers, those of the arrays of the symmetry"
            raise refuse("positions", must, f"have {len(position)}")
        for key, shape in shapes.items():
            count = math.prod(shape)
            arrays[key] = position[start : start + count].reshape(shape)
            start += count
        return arrays

    def units(
        self, k: int, position: Float[Array, " d"], axes: Sequence[Turned] | None = None
    ) -> Float[Array, "h p"]:
        """Return the numbers of each unit of group k in a row, shape (h, p), along all its axes or
        along some of them."""
        arrays, h = self.arrays(position), self.sizes[k]
        chosen = [(arrays[x.key], x) for x in (self.groups[k].axes if axes is None else axes)]
        rows = [
            jnp.moveaxis(array.reshape(_around(axis, h, array.shape)), 1, 0)
            for array, axis in chosen
        ]
        return jnp.concatenate([row.reshape(h, -1) for row in rows], axis=1)

    def identity(self, dtype: Any) -> Element:
        """Return the element that leaves all units where they are."""
        sizes = self.sizes
        return Element(
            tuple(jnp.arange(h, dtype=jnp.int32) for h in sizes),
            tuple(jnp.ones(h, dtype) for h in sizes),
        )

    def to_toml(self) -> str:
        """Return the lines of a file for `esljax measure --symmetry`."""
        named = [group.name for group in self.groups if group.signed]
        lines = [f"signs = {_quoted(named)}", "", "[permutations]"]
        for group in self.groups:
            axes = [[x for x in axis if x is not None] for axis in group.axes]
            lines.append(f"{_quoted(group.name)} = {_quoted(axes)}")
        sizes = [group for group in self.groups if group.units is not None]
        lines += ["", "[sizes]"] * bool(sizes)
        lines += [f"{_quoted(group.name)} = {group.units}" for group in sizes]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        sizes = [None] * len(self.groups) if self.keys is None else self.sizes
        lines = []
        for group, h in zip(self.groups, sizes, strict=True):
            kind = "signed permutations" if group.signed else "permutations"
            count = "" if h is None else f" of {h} units"
            axes = ", ".join(f"{axis.key} (axis {axis.axis})" for axis in group.axes)
            lines.append(f"{group.name}: {kind}{count} along {axes}")
        kind = (
            "The groups share no array: distances modulo the symmetry are exact."
            if self.exact
            else "Groups share arrays: distances modulo the symmetry are upper values."
        )
        return "\n".join([*lines, kind])


@door
def permutations(
    groups: Mapping[str, Sequence[Sequence[Any]]],
    *,
    signs: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    keys: Any = None,
) -> Symmetry:
    """Return a symmetry by hand: which axes of which arrays each group of units turns together.

    **Args:**
    - `groups`: for each group a name and its axes, `(key, axis)`. Where an axis indexes more than
      the units, as that of a dense layer behind a flattened image does, a third number says how
      many numbers lie side by side for each unit: 1 if channels come last, height times width if
      they come first.
    - `signs`: the names of the groups whose units may also change their signs.
    - `sizes`: how many units a group has, by its name, where none of its axes indexes them alone:
      3 for the heads of attention whose numbers all lie along one axis.
    - `keys`: the names and shapes of all arrays, as `Trajectory.keys` holds them. `speed_limit`
      takes those of the run where none are given.

    **Returns:** `Symmetry`. Whether it leaves a network alone is not known here: `check` tries it.
    **Raises:** `InputError` for groups that are not of this form, an axis that is turned twice, and
    arrays that `keys` does not hold.

    **Example:**

        >>> import esljax as esl
        >>> symmetry = esl.symmetry.permutations(
        ...     {"hidden": [("a", 1), ("b", 0)]}, signs=("hidden",), keys={"a": (2, 3), "b": (3, 5)}
        ... )
        >>> print(symmetry)
        hidden: signed permutations of 3 units along a (axis 1), b (axis 0)
        The groups share no array: distances modulo the symmetry are exact.
    """
    if not isinstance(groups, Mapping) or not groups:
        must = 'be axes by the name of their group, as {"hidden": [("0/kernel", 1), ...]}'
        raise refuse("groups", must, f"is {in_words(groups) if groups else 'empty'}")
    named = ", ".join(map(str, groups))
    if isinstance(signs, str) or not isinstance(signs, Iterable):
        raise refuse("signs", f"be a list of names of the groups {named}", f"is {signs!r}")
    signs = list(signs)
    if not all(name in list(groups) for name in signs):
        raise refuse("signs", f"be names of the groups {named}", f"is {signs!r}")
    sizes = {} if sizes is None else sizes
    if not isinstance(sizes, Mapping) or not all(
        name in groups and _is_count(size, 1) for name, size in sizes.items()
    ):
        raise refuse("sizes", f"be numbers of units of the groups {named}", f"is {sizes!r}")
    made = tuple(
        Group(str(name), _axes(name, axes), name in signs, sizes.get(name))
        for name, axes in groups.items()
    )
    places = Counter((x.key, x.axis, x.inner) for group in made for x in group.axes)
    (place, times), *_ = places.most_common(1)
    if times > 1:
        must = "turn each axis once"
        raise refuse("groups", must, f"turn axis {place[1]} of `{place[0]}` {times} times")
    symmetry = Symmetry(made)
    return symmetry if keys is None else symmetry.at(keys)


def _axes(name: str, axes: Any) -> tuple[Turned, ...]:
    must = (
        "be a list of (key, axis) or (key, axis, numbers side by side), axes counted from 0, "
        f"for {name!r}"
    )
    if isinstance(axes, str) or not isinstance(axes, Sequence) or not axes:
        raise refuse("groups", must, f"is {axes!r}")
    found = []
    for axis in axes:
        right = (
            isinstance(axis, Sequence)
            and len(axis) in (2, 3)
            and isinstance(axis[0], str)
            and _is_count(axis[1], 0)
            and (len(axis) == 2 or axis[2] is None or _is_count(axis[2], 1))
        )
        if not right:
            raise refuse("groups", must, f"holds {axis!r}")
        inner = axis[2] if len(axis) == 3 else None
        found.append(Turned(axis[0], int(axis[1]), None if inner is None else int(inner)))
    return tuple(found)


def _is_count(x: Any, least: int) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and int(x) >= least


def _quoted(x: Any) -> str:
    """Text, or a list, as TOML writes it; it knows no pairs of escapes for one sign."""
    return json.dumps(x, ensure_ascii=False)


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


def _check_axes(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for axis in group.axes:
        if axis.key not in shapes:
            listed = ", ".join(list(shapes)[:8]) + (", ..." if len(shapes) > 8 else "")
            must = f"turn arrays that are there ({listed})"
            raise refuse("symmetry", must, f"group {group.name!r} turns `{axis.key}`")
        if axis.axis >= len(shapes[axis.key]):
            was = f"`{axis.key}` has shape {shapes[axis.key]} and no axis {axis.axis}"
            raise refuse("symmetry", "turn axes that are there", was)
    h = _size(group, shapes)
    for axis in group.axes:
        length = shapes[axis.key][axis.axis]
        right = length == h if axis.inner is None else length % (h * axis.inner) == 0
        if not right:
            said = "`sizes` says" if group.units is not None else _witness(group, shapes, h)
            must = f"turn axes of as many units in group {group.name!r}, {h} as {said}"
            was = f"axis {axis.axis} of `{axis.key}` has length {length}"
            raise refuse("symmetry", must, was)


def _witness(group: Group, shapes: Mapping[str, tuple[int, ...]], h: int) -> str:
    """Which axes say that there are h units."""
    agree = [x for x in group.axes if x.inner is None and shapes[x.key][x.axis] == h]
    return "most have" if len(agree) > 1 else f"axis {agree[0].axis} of `{agree[0].key}` has"


def _size(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many units a group has: as it says, or the length that most of the axes have that index
    nothing else."""
    if group.units is not None:
        return group.units
    plain = [shapes[axis.key][axis.axis] for axis in group.axes if axis.inner is None]
    if not plain:
        must = f"say in `sizes` how many units group {group.name!r} has"
        raise refuse("symmetry", must, "says it nowhere: no axis of it indexes its units alone")
    return Counter(plain).most_common(1)[0][0]


def _around(axis: Turned, h: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of an array as (numbers before, units, numbers behind)."""
    behind = math.prod(shape[axis.axis + 1 :]) * (axis.inner or 1)
    return math.prod(shape) // (h * behind), h, behind
