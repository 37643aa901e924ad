"""One sentence for every bad input: the argument, what it must be, what it was.

Shapes and Python numbers are checked always. Values of arrays are checked only where they are known, that is, outside `jit`;
under a transformation the same call goes through unchecked and the results carry NaN.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from esljax._types import Array


class InputError(ValueError):
    """Bad input, said in one sentence; the command line prints it without a traceback."""


def refuse(argument: str, must: str, was: Any) -> InputError:
    """The one template of an error sentence, to be raised by the caller."""
    return InputError(f"Argument `{argument}` must {must}, but {was}.")


def as_float(x: Any) -> Array:
    """`x` as an array of the default float type; an array that is already floating keeps its type.

    Python floats become arrays so that `jit` traces them: a float left in a static field recompiles for every value.
    """
    inexact = isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)
    # The explicit type also strips jax's weak type, which an optimizer step would strip later at the price of a recompilation.
    return jnp.asarray(x, jnp.asarray(x).dtype if inexact else jnp.result_type(float))


def known(*arrays: Any) -> bool:
    """Whether the values are there to be looked at: no tracer among them, nor parts that only another process has."""
    return all(_here(leaf) for leaf in jax.tree.leaves(arrays))


def is_key(x: Any) -> bool:
    """Whether `x` holds keys made by `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_positive_int(argument: str, value: int, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise refuse(argument, f"be an integer of at least {minimum}", f"is {value!r}")


def check_positive(argument: str, value: Any) -> None:
    if known(value) and not bool(np.all(np.asarray(value) > 0)):
        raise refuse(argument, "be greater than 0", f"is {_brief(value)}")


def check_nonnegative(argument: str, value: Any) -> None:
    if known(value) and not bool(np.all(np.asarray(value) >= 0)):
        raise refuse(
            argument,
            "be at least 0 and not NaN",
            f"has the value {_brief(np.min(np.asarray(value)))}",
        )


def check_finite(argument: str, value: Any) -> None:
    if known(value):
        bad = ~np.isfinite(np.asarray(value))
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise refuse(
                argument,
                "be finite",
                f"has {int(bad.sum())} entries that are not, the first at index {where}",
            )


def check_ensemble(argument: str, x: Any, minimum_members: int = 1) -> None:
    """An ensemble: shape (n, d), floating, finite where that can be seen."""
    shape = tuple(jnp.shape(x))
    if len(shape) != 2:
        raise refuse(argument, "have shape (n, d), one row per member", f"has shape {shape}")
    if shape[0] < minimum_members:
        raise refuse(argument, f"hold at least {minimum_members} members", f"holds {shape[0]}")
    if shape[1] < 1:
        raise refuse(argument, "have at least one coordinate per member", f"has shape {shape}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise refuse(argument, "hold floating-point numbers", f"has dtype {jnp.result_type(x)}")
    check_finite(argument, x)


def check_key(argument: str, key: Any) -> None:
    if not is_key(key) or key.shape != ():
        raise refuse(argument, "be made by `jax.random.key`", f"is {key!r}")


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise refuse(argument, "be one of " + ", ".join(map(repr, choices)), f"is {value!r}")


def check_kind(argument: str, value: Any, kind: type, must: str) -> None:
    """Reject a value that is no instance of `kind`, such as the class itself or a bare function."""
    if not isinstance(value, kind):
        raise refuse(argument, must, f"is {in_words(value)}")


def in_words(value: Any) -> str:
    """A value as an error names it: "a float", "the class Langevin", "the function decay"."""
    if value is None or isinstance(value, str):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", "<lambda>")
    if callable(value) and name != "<lambda>":
        return f"the function {name}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _here(leaf: Any) -> bool:
    if isinstance(leaf, Tracer):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _brief(value: Any) -> str:
    array = np.asarray(value)
    return f"{array.item():g}" if array.size == 1 else f"an array with minimum {array.min():g}"
