"""Schedules as plain content for JSON, exact to the bit, and back.

A floating number is written as the shortest decimal that its type reads back exactly, beside the
name of that type: `"dtype": "float32"` if all numbers of a schedule are arrays of one type, else
the type of each array by its name. Numbers that are no arrays keep their type as JSON has it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import InputError, first_sentence, in_words, known, refuse
from esljax.files import storage, writing

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The types of numbers that a file may name."""

Problem = Callable[[str], InputError]
"""From what is wrong, as a phrase that begins with a verb, to the error."""


def check_known(schedule: Any) -> None:
    """Reject a schedule that is traced, or whose values are on other processes."""
    if not known(schedule):
        raise refuse(
            "schedule",
            "have known numbers to leave, outside of jit, grad and vmap",
            "is traced",
        )


def check_one_number(shape: tuple[int, ...]) -> None:
    """Reject a schedule with values of a shape, such as several schedules stacked for `vmap`."""
    if shape:
        raise refuse(
            "schedule",
            "give one number at each time (take one of a stack of schedules)",
            f"gives the shape {shape}",
        )


def encode(schedule: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The kind, the types and the fields of a schedule as JSON holds them.

    **Raises:** `InputError` if the schedule is traced or stacked, or if the fields do not rebuild
    it bit for bit.
    """
    check_known(schedule)
    check_one_number(_shape(schedule))
    kind = type(schedule)
    arrays = {name: _decimals(x) for name, x in fields.items() if _is_array(x)}
    nested = {name: x.as_dict() for name, x in fields.items() if hasattr(x, "as_dict")}
    others = {name: _plain(name, x) for name, x in fields.items() if name not in arrays | nested}
    types = {name: fields[name].dtype.name for name in arrays}
    one = len(set(types.values())) == 1 and all(isinstance(x, str) for x in others.values())
    content = {name: (arrays | nested | others)[name] for name in fields}
    head: dict[str, Any] = {"kind": name_of(kind)}
    if types:
        head["dtype"] = next(iter(types.values())) if one else types
    _check_that_it_comes_back(schedule, {**head, **content}, {n: fields[n] for n in nested})
    return {**head, **content}


def decode(content: Any, kinds: Mapping[str, Any], dtype: str | None, problem: Problem) -> Any:
    """The schedule that `encode` described.

    **Args:** `kinds`: the classes that may occur, by `key_of`. `dtype`: the type of all numbers, if
    not their own. `problem`: makes the error.
    """
    if not isinstance(content, Mapping):
        raise problem(f"holds {in_words(content)}")
    name = content.get("kind")
    name = name if isinstance(name, str) else repr(name)
    kind = kinds.get(_key(name))
    if kind is None:
        own = f"give kinds=[{name.rpartition('.')[2]}]"
        advice = own if "." in name else "known: " + ", ".join(kinds)
        raise problem(f"is of the kind {name}, which is unknown ({advice})")
    fields = _fields(content, dtype, problem)
    for field, value in fields.items():
        if isinstance(value, Mapping):
            fields[field] = decode(
                value, kinds, dtype, lambda phrase, field=field: problem(f"in `{field}` {phrase}")
            )
    try:
        schedule = kind.from_fields(fields)
        shape = _shape(schedule)
    except (TypeError, ValueError) as error:
        raise problem(f"is no valid {name}: {first_sentence(error)}") from error
    if shape:
        raise problem(f"is no valid {name}: it gives the shape {shape} at one time")
    return schedule


def key_of(kind: type) -> str:
    """The key under which `decode` finds a class: its name, of classes from outside after a dot."""
    return _key(name_of(kind))


def name_of(kind: type) -> str:
    """The name of a class in a file; a dot marks those that are not of this package."""
    module, name = kind.__module__, kind.__name__
    return name if module.startswith(__name__.rpartition(".")[0]) else f"{module}.{name}"


def write(path: Any, content: dict[str, Any]) -> None:
    """Write `content` to a file at once, in the place of none or of another schedule.

    **Raises:** `InputError` if that fails, or if something else is there.
    """
    if not isinstance(path, str | Path):
        raise refuse("path", "be the path of a file", f"is {in_words(path)}")
    path = Path(path)
    if _has_a_gap(content):
        raise refuse("schedule", "be finite to be saved", "has numbers that are not")
    with writing.prepared(path.parent, "path"):
        try:
            writing.replace(path, writing.as_json(content), argument="path", ours=is_schedule)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise refuse(
                "path", "be a file that can be written", f"{str(path)!r} gives: {reason}"
            ) from error


def is_schedule(content: bytes) -> bool:
    """Whether `write` wrote this: the kind of a schedule, laid out as it lays files out.

    An empty file, as `tempfile` leaves one, holds nothing to lose.
    """
    if not content:
        return True
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return False
    known = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return known and writing.as_json(record) == content


def read(path: Any) -> Any:
    """The content of a JSON file. **Raises:** `InputError` if it cannot be read."""
    if not isinstance(path, str | Path):
        raise refuse("path", "be the path of a file", f"is {in_words(path)}")
    path = Path(path)
    if path.exists() and not path.is_file():  # nobody may ever write to a pipe
        raise refuse("path", "be a readable file", f"{path} is {storage.described(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise refuse("path", "be a readable file", f"{path} gives: {error.strerror}") from error
    except ValueError as error:
        raise wrong_file(path)(f"is no text ({first_sentence(error)})") from error
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise wrong_file(path)(f"is no valid JSON ({first_sentence(error)})") from error


def wrong_file(path: Any) -> Problem:
    """The error of a file that holds no schedule."""
    return lambda phrase: refuse("path", "hold a schedule that `save` wrote", f"{path} {phrase}")


def _is_array(x: Any) -> bool:
    arrays = jax.Array | np.ndarray | np.generic
    return isinstance(x, arrays) and jnp.issubdtype(x.dtype, jnp.floating)


def _shape(schedule: Any) -> tuple[int, ...]:
    """The shape of a value; of a schedule that counts steps, in a run of one."""
    start = jnp.zeros((), jnp.result_type(float))
    return jax.eval_shape(lambda: schedule.over(1)(start)).shape


def _decimals(x: Any) -> Any:
    array = np.asarray(x)
    if array.ndim:
        return [_decimals(part) for part in array]
    short = float(str(array))
    return short if array.dtype.type(short) == array else float(array)


def _plain(name: str, x: Any) -> Any:
    if isinstance(x, bool | int | float | str | None):
        return x
    if isinstance(x, tuple) and all(isinstance(one, int | float) for one in x):
        return list(x)
    raise refuse(
        "schedule",
        "have fields of numbers, texts and schedules to be saved, or be saved as the table "
        "Knots.from_rates(schedule.rates(steps))",
        f"has as `{name}` {in_words(x)}",
    )


def _key(name: str) -> str:
    return name if "." not in name else "." + name.rpartition(".")[2]


def _fields(content: Mapping[str, Any], dtype: str | None, problem: Problem) -> dict[str, Any]:
    """The fields of a schedule, numbers as arrays of their types; schedules within as they are."""
    types = content.get("dtype", {})
    if not isinstance(types, str | Mapping):
        raise problem(f"has as `dtype` {in_words(types)}")
    fields = {}
    for name, value in content.items():
        if name in ("kind", "dtype"):
            continue
        of_all = isinstance(types, str) and not isinstance(value, str | Mapping)
        if of_all or (isinstance(types, Mapping) and name in types):
            stored = types if isinstance(types, str) else types[name]
            fields[name] = _array(name, value, stored, dtype, problem)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return fields


def _check_that_it_comes_back(schedule: Any, content: Any, nested: dict[str, Any]) -> None:
    flat = {name: value for name, value in content.items() if name not in nested}
    try:
        # Schedules within have passed this check; one of optax has become a table.
        fields = _fields(flat, None, wrong_file(""))
        same = _same(type(schedule).from_fields({**fields, **nested}), schedule)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise refuse(
            "schedule",
            "come back from its fields to be saved (override as_dict and from_fields, or save "
            "Knots.from_rates(schedule.rates(steps)))",
            f"is {in_words(schedule)}, which does not",
        )


def _same(one: Any, other: Any) -> bool:
    ones, others = jax.tree.flatten(one), jax.tree.flatten(other)
    if ones[1] != others[1]:
        return False
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ones[0], others[0], strict=True)]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


def _array(name: str, value: Any, stored: Any, wanted: str | None, problem: Problem) -> Any:
    if stored not in DTYPES:
        raise problem(f"has the unknown dtype {stored!r}")
    dtype = wanted or stored
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise problem(
            "has float64 numbers, which jax keeps only with jax_enable_x64 "
            "(dtype='float32' rounds them)"
        )
    if not _numeric(value):
        raise problem(f"has a `{name}` that is not made of numbers")
    try:
        wide = np.asarray(value, np.float64)
    except (ValueError, OverflowError) as error:
        raise problem(f"has a `{name}` that is no array of numbers") from error
    with np.errstate(over="ignore"):
        array = wide.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(array), np.isfinite(wide)):
        raise problem(f"has a `{name}` too large for {dtype}")
    return jnp.asarray(array)


def _numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_a_gap(content: Any) -> bool:
    if isinstance(content, Mapping):
        return any(map(_has_a_gap, content.values()))
    if isinstance(content, list):
        return any(map(_has_a_gap, content))
    return isinstance(content, float) and not np.isfinite(content)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if np.isfinite(number) else _no_number(text)
