"""Reject what cannot run, in one sentence and before anything is computed."""

from typing import Any

import jax
import jax.numpy as jnp

from esljax._checks import check_ensemble, check_positive_int, in_words, refuse
from esljax._types import Array, Float, Key
from esljax.potentials import AbstractPotential


def as_ensemble(argument: str, x: Any) -> Float[Array, "n d"]:
    """An ensemble of at least two members as one array (n, d).

    **Raises:** `InputError` for anything else; it names how to make an array of it.
    """
    try:
        positions = jnp.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        if hasattr(x, "__array__"):
            remedy = "an array, as x.detach().cpu().numpy() makes of a PyTorch tensor"
        elif isinstance(x, list | tuple):
            remedy = "an array of shape (n, d), with rows of one length"
        else:
            remedy = "an array (n, d), each row a member raveled by jax.flatten_util.ravel_pytree"
        raise refuse(argument, f"be {remedy}", f"is {in_words(x)}") from error
    if jnp.issubdtype(positions.dtype, jnp.integer):
        remedy = "hold floating-point numbers, as x.astype(float) makes of integers"
        raise refuse(argument, remedy, f"has dtype {positions.dtype}")
    check_ensemble(argument, positions, minimum_members=2)
    return positions


def check_links(steps: int, snapshots: int) -> None:
    """Reject snapshots that are not evenly spaced."""
    check_positive_int("steps", steps)
    check_positive_int("snapshots", snapshots)
    if steps % snapshots:
        divisors = [j for j in range(1, steps + 1) if steps % j == 0]
        near = [
            *[j for j in divisors if j < snapshots][-1:],
            *[j for j in divisors if j > snapshots][:1],
        ]
        raise refuse(
            "snapshots",
            f"divide the {steps} steps (such as {' or '.join(map(str, near))})",
            f"is {snapshots}",
        )


def check_functions(potential: AbstractPotential, positions: Any, key: Key, observe: Any) -> None:
    """Reject functions that fail on a member of this shape: traced, so only when a run compiles."""
    d = positions.shape[1]
    potential = potential.at(0.0)
    member = jax.ShapeDtypeStruct((d,), positions.dtype)
    try:
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], potential.draw(key, 1)))
        energy, slope = jax.eval_shape(potential.energy_and_gradient, member, batch)
    except (TypeError, ValueError) as error:
        raise refuse(
            "potential",
            f"accept members of {d} coordinates",
            f"fails on them: {str(error).splitlines()[0]}",
        ) from error
    if energy.shape != () or slope.shape != (d,):
        raise refuse(
            "potential",
            f"accept members of {d} coordinates",
            f"gives an energy of shape {energy.shape} and a slope of shape {slope.shape}",
        )
    if observe is not None:
        features = jax.eval_shape(observe, member)
        if len(getattr(features, "shape", ())) != 1:
            raise refuse(
                "observe",
                "return shape (p,) for one member",
                f"returns shape {getattr(features, 'shape', features)}",
            )
