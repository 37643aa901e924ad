"""The symmetries of a model: derived from its program, and tried on random members and inputs."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, as_count, check_positive, door, refuse
from esljax._types import Array, Key
from esljax.potentials import AbstractPotential, check_potential
from esljax.results import table
from esljax.symmetry.coupling import coupled
from esljax.symmetry.group import Group, Symmetry, Turned

# Inputs of one trial.
_INPUTS = 8
# Trials are the same in every call: what is a symmetry does not depend on luck.
_SEED = 20260117


class Trial(NamedTuple):
    """How far outputs move when a random element of each group acts; `print` shows a table."""

    groups: tuple[str, ...]
    """The names of the groups."""
    moved: tuple[float, ...]
    """The largest change of an output, in units of the largest output, for each group."""
    tolerance: float
    """What counts as rounding."""

    def __str__(self) -> str:
        rows = [("group", "outputs move by")]
        rows += [(name, f"{x:.1e}") for name, x in zip(self.groups, self.moved, strict=True)]
        return f"{table(rows, align='lr')}\nNo output moves by more than {self.tolerance:g} of them."


@door
def of(potential: AbstractPotential, *, tolerance: float = 1e-5) -> Symmetry:
    """Return the symmetry of a model: which of its units may be permuted, and which may flip signs.

    Follows the axes of all arrays through the traced model: axes that are joined turn together, and
    those that some operation knows by their place stay. Hidden units of dense and convolutional
    layers are found so, the heads of attention and the numbers within them, streams that residual
    layers share, and tables. Every group is then tried on random members and inputs, and so are
    signs: units may flip if no output moves, as behind tanh, and not behind relu or gelu.

    What is found is a symmetry; it need not be all of it: the numbers within each head turn alike,
    and rescalings, which are no isometries, do not count.

    **Args:** `potential`: a `FlaxLoss`, or one `Driven` from such. `tolerance`: the largest change
    of outputs, relative to the largest output, that counts as rounding.
    **Returns:** `Symmetry`, which knows the shapes of the arrays.
    **Raises:** `InputError` for a potential without a model, and for a model without symmetry.

    **Example:**

        >>> import esljax as esl
        >>> data = esl.datasets.two_moons(samples=50)
        >>> potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train)
        >>> symmetry = esl.symmetry.of(potential)
        >>> [(group.name, group.signed) for group in symmetry.groups], symmetry.sizes
        ([('layers/0', True)], (3,))
        >>> symmetry.exact
        True
    """
    outputs, keys = _model(potential)
    check_positive("tolerance", tolerance)
    _, inputs = _probes(potential, jax.random.key(_SEED), 1)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for _, shape in keys]
    found = coupled(lambda given: outputs(given, inputs), arrays)
    names, taken = [key for key, _ in keys], Counter()
    groups = []
    for each in found:
        axes = tuple(Turned(names[place], axis, inner) for place, axis, inner in each.axes)
        name = axes[0].key.rpartition("/")[0] or axes[0].key
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}.{taken[name]}"
        groups += [Group(name, axes, signed=True), Group(name, axes, signed=False)]
    kept: dict[str, Group] = {}
    for group in groups:
        if group.name not in kept and _moved(potential, (group,), keys) <= tolerance:
            kept[group.name] = group
    if not kept:
        raise refuse("potential", "have units that may change places", "has none that are found")
    return Symmetry(tuple(kept.values()), keys)


@door
def check(
    symmetry: Symmetry, potential: AbstractPotential, *, draws: int = 3, tolerance: float = 1e-5
) -> Trial:
    """Try a symmetry: random elements of each group act on random members, and outputs must stay.

    **Args:** `potential`: of the model, a `FlaxLoss` or one `Driven` from such. `draws`: members,
    inputs and elements that are drawn for each group. `tolerance`: the largest change of outputs,
    relative to the largest output, that counts as rounding.
    **Returns:** `Trial`; `print` shows it.
    **Raises:** `InputError` for what is no symmetry, with the array that breaks it: the one whose
    axis, left out, added or exchanged, leaves the outputs alone.
    """
    _, keys = _model(potential)
    draws = as_count("draws", draws)
    check_positive("tolerance", tolerance)
    bound = symmetry.at(keys)
    moved = tuple(_moved(potential, (group,), keys, draws) for group in bound.groups)
    for group, by in zip(bound.groups, moved, strict=True):
        if not by <= tolerance:
            raise _broken(potential, group, keys, by, tolerance)
    return Trial(tuple(group.name for group in bound.groups), moved, tolerance)


def _model(potential: Any) -> tuple[Any, Any]:
    check_potential("potential", potential)
    outputs, keys = potential.outputs_by_array, potential.parameter_keys
    if outputs is None or keys is None:
        must = "have a model, as FlaxLoss does (esljax.symmetry.permutations makes one by hand)"
        raise refuse("potential", must, f"is a {type(potential).__name__}")
    return outputs, keys


def _probes(potential: AbstractPotential, key: Key, count: int) -> tuple[Array, Any]:
    probes = potential.probes(key, count)
    if probes is None:
        must = "return a position and inputs from `probes`, beside outputs by arrays"
        raise refuse("potential", must, "returns None")
    return probes


def _moved(
    potential: AbstractPotential, groups: Sequence[Group], keys: Any, draws: int = 2
) -> float:
    """The largest relative change of outputs when random elements of these groups act."""
    outputs, symmetry = _model(potential)[0], Symmetry(tuple(groups), keys)

    @jax.jit
    def change(key):
        of_probes, of_element = jax.random.split(key)
        position, inputs = _probes(potential, of_probes, _INPUTS)
        turned = symmetry.act(symmetry.draw(of_element), position)
        before, after = (
            outputs(list(symmetry.arrays(each).values()), inputs) for each in (position, turned)
        )
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return jnp.stack(
            [jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-30) for a, b in pairs]
        )

    keys_of_draws = jax.random.split(jax.random.key(_SEED), draws)
    return float(np.max([np.max(np.asarray(change(key))) for key in keys_of_draws]))


def _broken(
    potential: AbstractPotential, group: Group, keys: Any, by: float, tolerance: float
) -> InputError:
    """The error of a group that moves outputs, with the array that does it."""

    def holds(axes, signed=group.signed):
        changed = dataclasses.replace(group, axes=tuple(axes), signed=signed)
        try:
            # Too little to act on, or axes of other lengths, mend nothing.
            Symmetry((changed,)).at(keys)
            return bool(axes) and _moved(potential, (changed,), keys) <= tolerance
        except InputError:
            return False

    must = f"leave the outputs alone within {tolerance:g} of them"
    moves = f"group {group.name!r} moves them by {by:.1e}"
    if group.signed and holds(group.axes, signed=False):
        was = f"{moves} with the signs of its units in `{group.axes[0].key}`, though not without"
        return refuse("symmetry", must, was)
    shapes, (h,) = dict(keys), Symmetry((group,), keys).sizes
    others = [
        Turned(key, axis)
        for key, shape in shapes.items()
        for axis, length in enumerate(shape)
        if length == h and Turned(key, axis) not in group.axes
    ]
    for axis in others:
        if holds([*group.axes, axis]):
            was = f"{moves}: it lacks axis {axis.axis} of `{axis.key}`"
            return refuse("symmetry", must, was)
    for i, axis in enumerate(group.axes):
        rest = group.axes[:i] + group.axes[i + 1 :]
        if any(holds([*rest, *more]) for more in [(), *((other,) for other in others)]):
            was = f"{moves}: axis {axis.axis} of `{axis.key}` does not belong to it"
            return refuse("symmetry", must, was)
    for one, other in itertools.combinations(others, 2):
        if holds([*group.axes, one, other]):
            was = f"{moves}: it lacks `{one.key}` and `{other.key}`"
            return refuse("symmetry", must, was)
    arrays = ", ".join(f"`{axis.key}`" for axis in group.axes)
    return refuse("symmetry", must, f"{moves}, and no one array of {arrays} is to blame")
