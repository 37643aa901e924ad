"""One sentence for every bad input: the argument, the rule, the value.

Shapes and Python numbers are always checked. The values of arrays are checked only where they are
known, that is, outside `jit`; inside a transformation the same call runs unchecked, and bad values
come out as NaN. Sizes that are declared are held against the memory of the machine.
"""

import functools
import inspect
import math
import operator
import os
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from esljax._types import Array, Float

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


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

        >>> from esljax._checks import plain_int, wrong_answer
        >>> print(wrong_answer("law", "no law", "fit", "a density", (0.5, None)))
        Argument `law` must return a density from `fit`, but str.fit returns (float, NoneType).
    """
    was = f"{type(owner).__name__}.{method} returns {_described(answer)}"
    return refuse(argument, f"return {expected} from `{method}`", was)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its type, to end a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".:") if lines else type(error).__name__


def failure(error: BaseException) -> str:
    """Return what went wrong in code of the user, and the line of it, to end a sentence of ours.

    The line is the last one outside of this package and the libraries, so the user's own.
    """
    reason = first_sentence(error)
    if not isinstance(error, TypeError | ValueError) and reason != type(error).__name__:
        reason = f"{type(error).__name__}: {reason}"
    own = own_frame(error)
    if own is None:
        return reason
    line = (own.line or "").strip().replace(". ", ".")
    code = f": {line}" if line else ""
    return f"{reason} ({Path(own.filename).name}, line {own.lineno}{code})"


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return where code of the user raised an error or called what did; None if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not _of_a_library(frame)), None)


def as_array(argument: str, x: Any, must: str = "be an array of numbers") -> Any:
    """Return `x` as an array of numbers or bools that jax takes as it is; the one door for arrays
    from outside.

    A jax array, traced or not, stays as it is. Anything else becomes a NumPy array of a type that
    jax has, in the byte order of this machine.

    **Raises:** `InputError` for keys, text, objects, dates, ragged lists, and masked entries.
    """
    if isinstance(x, jax.Array):
        if is_key(x):
            raise refuse(argument, must, "holds random keys")
        return x
    masked = _masked(x)
    if masked:
        remedy = f"{must} without masked entries, as x.filled(value) or x.compressed() makes"
        raise refuse(argument, remedy, f"has {masked} that are masked")
    try:
        array = np.asarray(x)
    except Exception as error:  # whatever an object from outside raises when it is converted
        raise refuse(argument, must, f"is {in_words(x)}: {first_sentence(error)}") from error
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        scalar = array.ndim == 0
        raise refuse(argument, must, f"is {in_words(x)}" if scalar else f"has dtype {array.dtype}")
    if array.dtype.kind in "fc":  # extended precision, which jax lacks
        widest = np.float64 if array.dtype.kind == "f" else np.complex128
        array = array if array.dtype.itemsize <= widest().itemsize else array.astype(widest)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_jax(argument: str, x: Any) -> Array:
    """Return `x` as a jax array of its own kind: integers and bools stay what they are.

    **Raises:** `InputError` for what `as_array` refuses, and for integers that the integers of jax
    do not hold.
    """
    array = as_array(argument, x)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and dtype != array.dtype and array.size:
        least, most = int(array.min()), int(array.max())
        if least < jnp.iinfo(dtype).min or most > jnp.iinfo(dtype).max:
            must = f"hold integers that {dtype} holds (or set jax_enable_x64)"
            raise refuse(argument, must, f"has integers from {least} to {most}")
    with np.errstate(over="ignore"):
        return jnp.asarray(array, dtype)


def as_real(argument: str, x: Any, must: str = "be an array of numbers") -> Array:
    """Return real numbers of any kind as a floating jax array of at least single precision.

    float32 and float64 keep their type, as far as `jax_enable_x64` allows; halves and integers take
    the default one.

    **Raises:** `InputError` for complex numbers, bools, and what `as_array` refuses.
    """
    array = as_array(argument, x, must)
    check_real(argument, array)
    return _at_least_single(array)


def as_float(x: Any, argument: str = "value") -> Array:
    """Return `x` as an array of the default float type; a floating array of at least single
    precision keeps its own type.

    Python floats become arrays so that `jit` traces them: a float in a static field recompiles for
    every value.

    **Raises:** `InputError` if `x` holds no real numbers.
    """
    must = "be a number or an array of numbers"
    own = isinstance(x, jax.Array | np.ndarray)
    array = as_array(argument, x, must)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise refuse(argument, "hold real numbers", f"has dtype {array.dtype}")
    return _at_least_single(array) if own else jnp.asarray(array, jnp.result_type(float))


def plain_int(x: Any) -> Any:
    """Return a number of NumPy or jax as one of Python, which a static field needs; anything else
    as it is, for a sentence of its own."""
    if isinstance(x, np.generic | np.ndarray | jax.Array) and known(x) and np.shape(x) == ():
        return x if is_key(x) else x.item()
    return x


def as_count(argument: str, value: Any, minimum: int = 1) -> int:
    """Return an integer of at least `minimum` as a Python one, also from NumPy or a 0-d array.

    **Raises:** `InputError` for anything else; a bool is no integer here.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # what is no integer, and integers that a transformation traces
        count = None
    if count is None or count < minimum:
        raise refuse(argument, f"be an integer of at least {minimum}", f"is {value!r}")
    return count


def known(*arrays: Any) -> bool:
    """Return whether this process can read the values: no tracers, no parts on other processes."""
    return all(_here(leaf) for leaf in jax.tree.leaves(arrays))


def is_key(x: Any) -> bool:
    """Return whether `x` holds keys made by `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def door(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Make a public function independent of the global settings of jax and of the type of counts.

    Its formulas are written for the usual promotion of shapes and types, so it runs under that, and
    so do the functions of the user that it calls. Parameters annotated as integers also take those
    of NumPy and arrays of shape (), as Python ones.
    """
    parameters = list(inspect.signature(function).parameters.values())
    counts = {each.name for each in parameters if each.annotation in (int, int | None)}
    call: Any = function
    places = {i for i, each in enumerate(parameters) if each.name in counts}

    @functools.wraps(function)
    def opened(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        given: Any = [plain_int(x) if i in places else x for i, x in enumerate(args)]
        named: Any = {k: plain_int(x) if k in counts else x for k, x in kwargs.items()}
        config: Any = jax.config
        settings = config.jax_numpy_rank_promotion, config.jax_numpy_dtype_promotion
        if settings == ("allow", "standard"):
            return call(*given, **named)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return call(*given, **named)

    return opened


def check_positive_int(argument: str, value: int, minimum: int = 1) -> None:
    """Reject what `as_count` rejects."""
    as_count(argument, value, minimum)


def check_real(argument: str, array: Any) -> None:
    """Reject arrays of complex numbers and of bools."""
    if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise refuse(argument, "hold real numbers", f"has dtype {array.dtype}")


def check_positive(argument: str, value: Any) -> None:
    """Reject what is known and no number, or not all greater than 0."""
    must = "be a number or an array of numbers greater than 0"
    if known(value) and not bool(np.all(np.asarray(as_array(argument, value, must)) > 0)):
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


def as_cloud(argument: str, x: Any, minimum_members: int = 1) -> Float[Array, "n d"]:
    """Return members (n, d) as a jax array of at least single precision.

    **Raises:** `InputError` for integers, other shapes, too few members, and numbers that are known
    and not finite.
    """
    array = as_array(argument, x)
    check_ensemble(argument, array, minimum_members)
    return _at_least_single(array)


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


def memory_of_a_device(sharing: int | None = None) -> float:
    """Return the bytes that each device of this machine holds.

    Devices that are cores of a CPU share its memory: as many as `sharing` says, or all.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return _memory_of(devices[0])
    return memory_of_the_machine() / min(sharing or len(devices), len(devices))


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


def cores_of_the_machine() -> int:
    """Return how many cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # The quota and the period of a container; "max" is no quota.
    try:
        quota, period = map(float, Path(_QUOTA).read_text().split())
        cores = min(cores, int(quota / period))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return max(cores, 1)


_QUOTA = "/sys/fs/cgroup/cpu.max"
# Where Linux says what a container may use, in version 2 and 1 of its control groups.
_GRANTED = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _memory_of(device: Any) -> float:
    # A device that reports no limit counts as one of the smallest accelerators.
    return float((device.memory_stats() or {}).get("bytes_limit", 16e9))


def check_fits(argument: str, needed: float | int, holds: str, advice: str, share: int = 1) -> None:
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


# Where the standard library, this package and whatever is installed lie.
_LIBRARIES = tuple(
    str(Path(place).resolve()) + os.sep
    for place in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parent,
    )
)


def _of_a_library(frame: traceback.FrameSummary) -> bool:
    generated = frame.filename.startswith("<frozen") or (frame.filename, frame.name) == (
        "<string>",
        "__init__",
    )
    return generated or str(Path(frame.filename).resolve()).startswith(_LIBRARIES)


def _at_least_single(array: Any) -> Array:
    wide = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 4
    # The explicit type also strips jax's weak type. Otherwise an optimizer step strips it later, at
    # the price of a recompilation.
    dtype = jax.dtypes.canonicalize_dtype(array.dtype) if wide else jnp.result_type(float)
    with np.errstate(over="ignore"):  # too large a number becomes infinite, and is seen as such
        return jnp.asarray(array, dtype)


def _masked(x: Any) -> int:
    """How many entries are masked, of an array or of arrays in lists."""
    if isinstance(x, np.ma.MaskedArray):
        return int(np.ma.count_masked(x))
    return sum(map(_masked, x)) if isinstance(x, list | tuple) else 0


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
