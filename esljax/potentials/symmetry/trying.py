"""A symmetry is tried: random elements act on random members, and the outputs of the model stay."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, as_count, check_positive, refuse
from esljax._types import Array, Key
from esljax.potentials.base import AbstractPotential, check_potential
from esljax.potentials.symmetry.coupling import coupled
from esljax.potentials.symmetry.parts import Element, Group, Turned
from esljax.results import table

# Inputs of one trial.
_INPUTS = 8
# Trials are the same in every call: what is a symmetry does not depend on luck.
_SEED = 20260117
# Elements of few units are often the identity, which proves nothing: so many are drawn in all.
_DRAWN_UNITS = 32


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
        return (
            f"{table(rows, align='lr')}\nNo output moves by more than {self.tolerance:g} of them."
        )


def trial(symmetry: Any, potential: AbstractPotential, draws: int, tolerance: float) -> Trial:
    """Try a `Symmetry`, as its `check` describes."""
    _, keys = model_of(potential)
    draws = as_count("draws", draws)
    check_positive("tolerance", tolerance)
    symmetry = symmetry.at(keys)
    trials = Trials(potential, symmetry)
    moved = tuple(trials.moved(k, group.signed, draws) for k, group in enumerate(symmetry.groups))
    for k, (group, by) in enumerate(zip(symmetry.groups, moved, strict=True)):
        if not by <= tolerance:
            raise _broken(potential, trials, k, group, by, tolerance)
    return Trial(tuple(group.name for group in symmetry.groups), moved, tolerance)


def model_of(potential: Any) -> tuple[Any, Any]:
    """Return the outputs of a model by its arrays, and the names and shapes of these.

    **Raises:** `InputError` for a potential without a model.
    """
    check_potential("potential", potential)
    outputs, keys = potential.outputs_by_array, potential.parameter_keys
    if outputs is None or keys is None:
        must = "have a model, as FlaxLoss does (esljax.symmetry.permutations makes one by hand)"
        raise refuse("potential", must, f"is a {type(potential).__name__}")
    return outputs, keys


def probes_of(potential: AbstractPotential, key: Key, count: int) -> tuple[Array, Any]:
    """Return a random position, and random inputs."""
    probes = potential.probes(key, count)
    if probes is None:
        must = "return a position and inputs from `probes`, beside outputs by arrays"
        raise refuse("potential", must, "returns None")
    return probes


class Trials:
    """Random elements of groups act on random members. Compiled once for all groups."""

    def __init__(self, potential: AbstractPotential, symmetry: Any):
        outputs = model_of(potential)[0]
        free = tuple(dataclasses.replace(group, signed=True) for group in symmetry.groups)
        symmetry = dataclasses.replace(symmetry, groups=free)

        @jax.jit
        def change(key, chosen, flips):
            of_probes, of_element = jax.random.split(key)
            position, inputs = probes_of(potential, of_probes, _INPUTS)
            drawn, idle = symmetry.draw(of_element), symmetry.identity(position.dtype)
            places = tuple(
                jnp.where(chosen == k, one, other)
                for k, (one, other) in enumerate(zip(drawn.places, idle.places, strict=True))
            )
            signs = tuple(
                jnp.where((chosen == k) & flips, one, other)
                for k, (one, other) in enumerate(zip(drawn.signs, idle.signs, strict=True))
            )
            turned = symmetry.act(Element(places, signs), position)
            before, after = (
                outputs(list(symmetry.arrays(each).values()), inputs) for each in (position, turned)
            )
            pairs = zip(*map(_numbers, (before, after)), strict=True)
            return [(jnp.max(jnp.abs(a - b)), jnp.max(jnp.abs(a))) for a, b in pairs]

        self.change, self.sizes = change, symmetry.sizes

    def moved(self, k: int, signed: bool, draws: int = 2) -> float:
        """The largest relative change of outputs when elements of group k act."""
        draws = max(draws, -(-_DRAWN_UNITS // self.sizes[k]))
        keys = jax.random.split(jax.random.key(_SEED), draws)
        # Of each draw and array of outputs.
        seen = np.array([self.change(key, k, signed) for key in keys], float)
        change, size = np.moveaxis(seen, -1, 0)
        if not np.any(size):
            must = "have outputs other than 0 for random members, or a trial shows nothing"
            raise refuse("potential", must, "has none")
        # Outputs that are all 0 and stay have not moved.
        size = np.where((size == 0) & (change == 0), 1.0, size)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.max(change / size))


def _numbers(outputs: Any) -> list[Array]:
    """Each array of the outputs in floating numbers, also of masks and classes."""
    return [jnp.asarray(x, jnp.result_type(float)) for x in jax.tree.leaves(outputs)]


def found_in(potential: AbstractPotential) -> list[tuple[int, tuple[Turned, ...]]]:
    """Return how many units turn, and the axes that turn together, as the traced model tells."""
    outputs, keys = model_of(potential)
    _, inputs = probes_of(potential, jax.random.key(0), 1)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for _, shape in keys]
    return [
        (
            group.size,
            tuple(Turned(keys[place][0], axis, inner) for place, axis, inner in group.axes),
        )
        for group in coupled(lambda given: outputs(given, inputs), arrays)
    ]


def _broken(
    potential: AbstractPotential, trials: Trials, k: int, group: Group, by: float, tolerance: float
) -> InputError:
    """The error of a group that moves outputs, with the array that does it."""
    must = f"leave the outputs alone within {tolerance:g} of them"
    moves = f"group {group.name!r} moves them by {by:.1e}"
    if group.signed and trials.moved(k, False) <= tolerance:
        was = f"{moves} with the signs of its units in `{group.axes[0].key}`, though not without"
        return refuse("symmetry", must, was)
    mine = {(axis.key, axis.axis) for axis in group.axes}
    nearest: set[tuple[str, int]] = max(
        ({(axis.key, axis.axis) for axis in found} for _, found in found_in(potential)),
        key=lambda found: len(found & mine),
        default=set(),
    )
    if not nearest & mine:
        arrays = ", ".join(f"`{axis.key}`" for axis in group.axes)
        return refuse("symmetry", must, f"{moves}, and none of {arrays} may turn at all")
    wrong, lacking = sorted(mine - nearest), sorted(nearest - mine)
    reasons = [f"axis {axis} of `{key}` does not belong to it" for key, axis in wrong]
    reasons += [f"it lacks axis {axis} of `{key}`" for key, axis in lacking]
    return refuse("symmetry", must, ", ".join([moves, *reasons[:3]]))
