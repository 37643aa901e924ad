"""Bounds of settings, stated once in the annotation of the field and read by every check.

    members: Annotated[int, AtLeast(2)] = 32
    data: Annotated[str, OneOf(DATASETS)] = "digits"

The same annotations check a configuration (`check_fields`), convert a value from a TOML file
(`convert`) and give the command line the choices of its flags (`choices`).
"""

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import numpy as np

from esljax._checks import (
    InputError,
    check_choice,
    check_nonnegative,
    check_positive,
    check_positive_int,
    refuse,
)

# What no array holds.
_NO_INTEGER = 1 << 63


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """An integer of at least `least`."""

    least: int

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for a smaller value or none that is an integer."""
        _check_length(argument, value)
        check_positive_int(argument, value, self.least)


@dataclasses.dataclass(frozen=True)
class Below:
    """A number below `limit`, which an error writes as `words` and explains by `reason`."""

    limit: int | float
    words: str
    reason: str

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for a value of `limit` or more."""
        if value >= self.limit:
            raise refuse(argument, f"be below {self.words}, {self.reason}", f"is {value}")


@dataclasses.dataclass(frozen=True)
class Positive:
    """A number greater than 0; finite, unless `infinite` is allowed."""

    infinite: bool = False

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for 0, a negative number, NaN, or infinity if not allowed."""
        check_positive(argument, value)
        _check_infinite(argument, value, self.infinite)


@dataclasses.dataclass(frozen=True)
class Nonnegative:
    """A number of at least 0; finite, unless `infinite` is allowed."""

    infinite: bool = False

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for a negative number, NaN, or infinity if not allowed."""
        check_nonnegative(argument, value)
        _check_infinite(argument, value, self.infinite)


# Compared by identity: a registry may grow after the field has been declared.
@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """One of the names of a registry, a mapping from names to what they stand for."""

    registry: Mapping[str, Any]

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for a name that the registry does not have."""
        check_choice(argument, value, tuple(self.registry))


@dataclasses.dataclass(frozen=True, eq=False)
class NameOr:
    """One of the names of a registry, or something of the user's, described by `words`."""

    registry: Mapping[str, Any]
    words: str
    recognizes: Callable[[Any], bool]
    """Whether a value looks like that; whether it is there is seen when it is read."""

    def check(self, argument: str, value: Any) -> None:
        """**Raises:** `InputError` for anything else."""
        known = isinstance(value, str) and (value in self.registry or self.recognizes(value))
        if not known:
            names = ", ".join(map(repr, self.registry))
            raise refuse(argument, f"be one of {names}, or {self.words}", f"is {value!r}")


@dataclasses.dataclass(frozen=True)
class Manner:
    """A setting of how a command runs, not of what it computes: reports leave it out."""

    def check(self, argument: str, value: Any) -> None:
        """Any value will do."""


class _Anatomy(NamedTuple):
    """An annotation taken apart."""

    kind: type
    rules: tuple[Any, ...] = ()
    optional: bool = False
    item: "_Anatomy | None" = None


def check_fields(config: Any) -> None:
    """Check every field of a frozen dataclass against its own annotation.

    **Raises:** `InputError` for the first value of a wrong type or outside its bounds.
    """
    for name, anatomy in _anatomies(type(config)).items():
        _check(name, getattr(config, name), anatomy)


def choices(annotation: Any) -> tuple[str, ...]:
    """The names that a field with this annotation, or each item of it, may hold; none if it has no
    registry."""
    anatomy = _anatomy(annotation)
    rules = anatomy.rules if anatomy.item is None else anatomy.item.rules
    registries = [rule.registry for rule in rules if isinstance(rule, OneOf)]
    return tuple(registries[0]) if registries else ()


def choices_or(annotation: Any) -> tuple[str, ...]:
    """The names that a field with this annotation knows beside things of the user's, if any."""
    registries = [rule.registry for rule in _anatomy(annotation).rules if isinstance(rule, NameOr)]
    return tuple(registries[0]) if registries else ()


def is_manner(field: dataclasses.Field) -> bool:
    """Whether the field describes how a command runs, and not what it computes."""
    return any(isinstance(rule, Manner) for rule in _anatomy(field.type).rules)


def converted(
    content: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], place: str
) -> dict[str, Any]:
    """The values of a TOML table in the types of the fields of a configuration.

    **Args:** `content`: keys and values as `tomllib` reads them. `fields`: the known keys. `place`:
    where the table stands, for messages.
    **Raises:** `InputError` for an unknown key or a wrong type.
    """
    for key in content:
        if key not in fields:
            raise InputError(
                f"Key `{key}` of {place} is unknown; the known keys are {', '.join(fields)}."
            )
    return {key: convert(key, value, fields[key], place) for key, value in content.items()}


def convert(key: str, value: Any, field: dataclasses.Field, place: str) -> Any:
    """One value of a TOML table in the type of its field.

    **Raises:** `InputError` for a wrong type, or a name that the field's registry does not have.
    """
    anatomy = _anatomy(field.type)
    kind = anatomy.kind
    if kind is not float:
        for item in value if isinstance(value, list) else (value,):
            _check_length(key, item)
    for rule in anatomy.rules:
        if isinstance(rule, OneOf | NameOr):
            rule.check(key, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise refuse(key, f"be {_IN_TOML[kind]} in {place}", "is too large for one") from None
    if kind is Path and isinstance(value, str):
        # In the encoding of names here, whatever that is: the file is UTF-8.
        return Path(os.fsdecode(value.encode()))
    item = None if anatomy.item is None else anatomy.item.kind
    if item is not None and isinstance(value, list):
        allowed = (int, float) if item is float else (item,)
        if all(type(one) in allowed for one in value):
            return tuple(item(one) for one in value)
    if type(value) is not kind:
        must = _IN_TOML[kind] if item is None else f"a list of {_ITEMS[item]}"
        raise refuse(key, f"be {must} in {place}", f"is {_shown(value)}")
    return value


def _check_length(argument: str, value: Any) -> None:
    """Reject an integer that no array holds; one of thousands of digits cannot even be printed."""
    if isinstance(value, int) and abs(value) >= _NO_INTEGER:
        raise refuse(argument, "be an integer below 2**63", "is beyond")


def _shown(value: Any) -> str:
    """A value from a file in at most a line, however long or deep it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return "too long to show"
    return text if len(text) <= 80 else f"{text[:60]} and so on"


_IN_TOML = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a string",
}
_ITEMS = {int: "integers", float: "numbers", str: "strings", bool: "values true or false"}
_IN_PYTHON = {bool: "True or False", int: "an integer", str: "a string", Path: "a path"}


@functools.cache
def _anatomies(config: type) -> dict[str, _Anatomy]:
    return {field.name: _anatomy(field.type) for field in dataclasses.fields(config)}


def _anatomy(annotation: Any) -> _Anatomy:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = _anatomy(parts[0])
        rules = tuple(rule for rule in parts[1:] if isinstance(rule, _Rule))
        return inner._replace(rules=(*inner.rules, *rules))
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        return _anatomy(inner)._replace(optional=True)
    if origin is tuple:
        return _Anatomy(tuple, item=_anatomy(parts[0]))
    return _Anatomy(annotation)


_Rule = AtLeast | Below | Positive | Nonnegative | OneOf | NameOr | Manner


def _check(name: str, value: Any, anatomy: _Anatomy) -> None:
    if value is None and anatomy.optional:
        return
    if anatomy.kind is float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise refuse(name, "be a number", f"is {value!r}")
    # A rule has a sentence of its own, and takes the integers of NumPy.
    plain = anatomy.kind in _IN_PYTHON and not anatomy.rules
    boolean = isinstance(value, bool) and anatomy.kind is not bool
    if plain and (boolean or not isinstance(value, anatomy.kind)):
        raise refuse(name, f"be {_IN_PYTHON[anatomy.kind]}", f"is {value!r}")
    if anatomy.item is not None:
        if not isinstance(value, tuple):
            raise refuse(name, f"be a tuple of {_ITEMS[anatomy.item.kind]}", f"is {value!r}")
        for item in value:
            _check(name, item, anatomy.item)
    for rule in anatomy.rules:
        rule.check(name, value)


def _check_infinite(argument: str, value: Any, allowed: bool) -> None:
    if not allowed and not np.isfinite(value):
        raise refuse(argument, "be finite", f"is {value}")
