"""Reject what cannot run, in one sentence and before anything is computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    InputError,
    as_array,
    as_cloud,
    check_finite,
    check_nonnegative,
    check_positive_int,
    failure,
    in_words,
    refuse,
    wrong_answer,
)
from esljax._numerics import divisors
from esljax._types import Array, Float, Key
from esljax.potentials import AbstractPotential, check_potential
from esljax.simulation.diffusion import Diffusion


def as_ensemble(argument: str, x: Any) -> Float[Array, "n d"]:
    """An ensemble of at least two members as one array (n, d).

    **Raises:** `InputError` for anything else; it names how to make an array of it.
    """
    try:
        array = as_array(argument, x)
    except InputError as error:
        if "masked" in str(error) or isinstance(x, np.ndarray | jax.Array):
            raise
        if hasattr(x, "__array__"):
            remedy = "an array, as x.detach().cpu().numpy() makes of a PyTorch tensor"
        elif isinstance(x, list | tuple):
            remedy = "an array of shape (n, d), with rows of one length"
        else:
            remedy = "an array (n, d), each row a member raveled by jax.flatten_util.ravel_pytree"
        raise refuse(argument, f"be {remedy}", f"is {in_words(x)}") from error
    if jnp.issubdtype(array.dtype, jnp.integer):
        remedy = "hold floating-point numbers, as x.astype(float) makes of integers"
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        raise refuse(argument, remedy, f"has dtype {dtype}")
    return as_cloud(argument, array, minimum_members=2)


def check_links(steps: int, snapshots: int) -> None:
    """Reject snapshots that are not evenly spaced."""
    check_positive_int("steps", steps)
    check_positive_int("snapshots", snapshots)
    if steps % snapshots:
        near = [
            *[j for j in divisors(steps) if j < snapshots][-1:],
            *[j for j in divisors(steps) if j > snapshots][:1],
        ]
        raise refuse(
            "snapshots",
            f"divide the {steps} steps (such as {' or '.join(map(str, near))})",
            f"is {snapshots}",
        )


def check_law(rule: Any, controls: Any) -> None:
    """Reject a law that is no `Diffusion` of numbers that a step can have."""
    law: Any = jax.eval_shape(rule.law, jax.tree.map(lambda x: x[0], controls))
    if law is None:
        return
    if not isinstance(law, Diffusion):
        raise wrong_answer("rule", rule, "law", "a Diffusion or None", law)
    for name in ("mobility", "temperature", "injected"):
        shape = getattr(law, name).shape
        if shape != ():
            must = f"claim one {name} of each step in its law"
            raise refuse("rule", must, f"claims numbers of shape {shape}")
    of_steps = jax.vmap(rule.law)(controls)
    for name in ("mobility", "temperature", "injected"):
        values = getattr(of_steps, name)
        check_finite(f"{name} of the law", values)
        check_nonnegative(f"{name} of the law", values)


def check_functions(potential: AbstractPotential, positions: Any, key: Key, observe: Any) -> None:
    """Reject functions that fail on a member of this shape: traced, so only when a run compiles."""
    d = positions.shape[1]
    if potential.moves:
        check_potential("potential.at_start()", potential.at_start())
        check_potential("potential.at_end()", potential.at_end())
    potential = potential.at(0.0)
    check_potential("potential.at(s)", potential)
    member = jax.ShapeDtypeStruct((d,), positions.dtype)
    try:
        batches = jax.eval_shape(lambda: potential.draw(key, 1))
    except Exception as error:  # whatever a potential from outside raises
        raise _fails(d, error) from error
    shapes = [x.shape for x in jax.tree.leaves(batches)]
    # Without the axis of the members, b examples would go to b members, one to each.
    if any(shape[:1] != (1,) for shape in shapes):
        raise refuse(
            "potential",
            "draw batches with a leading axis of length `members`",
            f"draws shapes {shapes} for one member",
        )
    try:
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], potential.draw(key, 1)))
        energy, slope = jax.eval_shape(potential.energy_and_gradient, member, batch)
    except Exception as error:  # whatever a potential from outside raises
        raise _fails(d, error) from error
    if energy.shape != () or slope.shape != (d,):
        raise refuse(
            "potential",
            f"accept members of {d} coordinates",
            f"gives an energy of shape {energy.shape} and a slope of shape {slope.shape}",
        )
    if observe is not None:
        try:
            features = jax.eval_shape(observe, member)
        except Exception as error:  # whatever a function from outside raises
            must = f"accept a member of {d} coordinates"
            raise refuse("observe", must, f"fails on it: {failure(error)}") from error
        if len(getattr(features, "shape", ())) != 1:
            raise refuse(
                "observe",
                "return shape (p,) for one member",
                f"returns shape {getattr(features, 'shape', features)}",
            )


def check_arrays(
    argument: str, owner: Any, method: str, answer: Any, parts: dict[str, tuple[int, ...]]
) -> None:
    """Reject an answer of a method if it is no tuple of arrays of these shapes, by name."""
    shapes = [getattr(x, "shape", None) for x in answer] if isinstance(answer, tuple) else []
    if shapes != list(parts.values()):
        expected = " and ".join(f"{name} of shape {shape}" for name, shape in parts.items())
        raise wrong_answer(argument, owner, method, expected, answer)


def _fails(d: int, error: Exception) -> InputError:
    reason = f"fails on them: {failure(error)}"
    return refuse("potential", f"accept members of {d} coordinates", reason)
