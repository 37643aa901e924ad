"""One sentence for every bad input: the argument, the rule, the value.

Shapes and Python numbers are always checked. The values of arrays are checked only where they are
known, that is, outside `jit`; inside a transformation the same call runs unchecked, and bad values
come out as NaN. Sizes that are declared are held against the memory of the machine.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from esljax._types import Array


class InputError(ValueError):
    """Input that breaks a rule, described by one sentence: the argument, the rule and the value.

    A `ValueError`, raised before anything is computed wherever that is possible. The command line
    prints the sentence without a traceback.

    **Example:**

        >>> import esljax as esl
        >>> try:
        ...     esl.density.NearestNeighborEntropy(neighbors=0)
        ... except esl.InputError as error:
        ...     print(error)
        Argument `neighbors` must be an integer of at least 1, but is 0.
    """


def refuse(argument: str, must: str, was: Any) -> InputError:
    """Return the error "Argument `argument` must `must`, but `was`.", which the caller raises."""
    return InputError(f"Argument `{argument}` must {must}, but {was}.")


def wrong_answer(argument: str, owner: Any, method: str, expected: str, answer: Any) -> InputError:
    """Return the error of an `owner` whose method breaks the contract of its base class.

    **Example:**

        >>> from esljax._checks import wrong_answer
        >>> print(wrong_answer("law", "no law", "fit", "a density", (0.5, None)))
        Argument `law` must return a density from `fit`, but str.fit returns (float, NoneType).
    """
    was = f"{type(owner).__name__}.{method} returns {_described(answer)}"
    return refuse(argument, f"return {expected} from `{method}`", was)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its type, to end a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".:") if lines else type(error).__name__


def as_float(x: Any) -> Array:
    """Return `x` as an array of the default float type; a floating array keeps its own type.

    Python floats become arrays so that `jit` traces them: a float in a static field recompiles for
    every value.

    **Raises:** `InputError` if `x` holds no numbers.
    """
    inexact = isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)
    try:
        # The explicit type also strips jax's weak type. Otherwise an optimizer step strips it
        # later, at the price of a recompilation.
        return jnp.asarray(x, jnp.asarray(x).dtype if inexact else jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise refuse("value", "be a number or an array of numbers", f"is {x!r}") from error


def known(*arrays: Any) -> bool:
    """Return whether this process can read the values: no tracers, no parts on other processes."""
    return all(_here(leaf) for leaf in jax.tree.leaves(arrays))


def is_key(x: Any) -> bool:
    """Return whether `x` holds keys made by `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_positive_int(argument: str, value: int, minimum: int = 1) -> None:
    """Reject anything but an integer of at least `minimum`; a bool is no integer here."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise refuse(argument, f"be an integer of at least {minimum}", f"is {value!r}")


def check_positive(argument: str, value: Any) -> None:
    """Reject numbers that are known and not all greater than 0."""
    if known(value) and not bool(np.all(np.asarray(value) > 0)):
        raise refuse(argument, "be greater than 0", f"is {_brief(value)}")


def check_nonnegative(argument: str, value: Any) -> None:
    """Reject numbers that are known and negative or NaN anywhere."""
    if known(value) and not bool(np.all(np.asarray(value) >= 0)):
        raise refuse(
            argument,
            "be at least 0 and not NaN",
            f"has the value {_brief(np.min(np.asarray(value)))}",
        )


def check_finite(argument: str, value: Any) -> None:
    """Reject numbers that are known and not finite, with their count and the first index."""
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
    """Reject anything but a floating array (n, d) of enough members, finite where it is known."""
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
    """Reject anything but one key made by `jax.random.key`; a legacy `PRNGKey` is none."""
    if not is_key(key) or key.shape != ():
        raise refuse(argument, "be made by `jax.random.key`", f"is {key!r}")


def memory_of_a_device() -> float:
    """Return the bytes that each device of this machine holds.

    Devices that are cores of a CPU share its memory.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return _memory_of(device)
    return memory_of_the_machine() / len(jax.local_devices())


def memory_of_the_machine() -> float:
    """Return the bytes of main memory, or those that a container grants; infinite if unknown."""
    try:
        whole = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        whole = math.inf
    for place in _GRANTED:
        try:
            whole = min(whole, float(Path(place).read_text()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return whole


# Where Linux says what a container may use, in version 2 and 1 of its control groups.
_GRANTED = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _memory_of(device: Any) -> float:
    # A device that reports no limit counts as one of the smallest accelerators.
    return float((device.memory_stats() or {}).get("bytes_limit", 16e9))


def check_fits(argument: str, needed: float, holds: str, advice: str, share: int = 1) -> None:
    """Reject what cannot fit in the memory of this machine or its accelerator, before it is made.

    **Args:** `needed`: bytes. `holds`: what needs them, such as "60,000 members in ExactTransport".
    `advice`: what to do. `share`: the devices that share them.
    """
    device = jax.local_devices()[0]
    of_cpu = device.platform == "cpu"
    available = memory_of_the_machine() if of_cpu else share * _memory_of(device)
    if needed > available:
        place = "machine" if of_cpu else "device" if share == 1 else f"{share} devices"
        raise refuse(
            argument,
            f"fit in the {size(available)} of memory of this {place} ({advice})",
            f"{holds} need about {size(needed)}",
        )


def size(count: int | float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Reject anything but one of a few words."""
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


def _described(answer: Any) -> str:
    if isinstance(answer, tuple):
        return f"({', '.join(map(_described, answer))})"
    if isinstance(answer, jax.Array | np.ndarray):
        return f"an array of shape {tuple(answer.shape)}"
    name = getattr(answer, "__name__", None)
    return f"function {name}" if name and callable(answer) else type(answer).__name__
