"""The values of an axis of a study, where a file gives them as a range or a spacing."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from esljax._checks import check_choice, check_positive_int, refuse

# A list of more runs than these would fill the memory of a usual machine by itself.
MOST = 10_000_000
# Whole numbers in a row are held by their ends from this length on.
LONG = 10_000


def plain_kind(field: dataclasses.Field) -> Any:
    """The type of a field without a bound or a default of its own."""
    return field.type if field.type in (bool, int, float, str) else type(field.default)


def spaced_values(name: str, given: Any, fields: Mapping[str, dataclasses.Field]) -> Any:
    """The values that a range or a spacing stands for; anything else unchanged."""
    if not isinstance(given, Mapping):
        return given
    place = f"grid.{name}"
    if set(given) == {"range"}:
        return _range(place, given["range"])
    if not {"start", "stop", "num"} <= set(given) <= {"start", "stop", "num", "scale"}:
        raise refuse(
            place,
            'be a list, {range = [first, end]} or {start, stop, num, scale = "linear" or "log"}',
            f"has the keys {', '.join(given)}",
        )
    whole = name in fields and plain_kind(fields[name]) is int
    return [
        int(value) if whole and value.is_integer() else value for value in _spaced(place, given)
    ]


def _range(place: str, ends: Any) -> range:
    if (
        not isinstance(ends, list)
        or len(ends) != 2
        or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    ):
        raise refuse(place, "have a range of two integers, [first, end]", f"has {ends!r}")
    return range(*ends)


def _spaced(place: str, given: Mapping[str, Any]) -> list[float]:
    """`num` values from `start` to `stop`, evenly spaced on the chosen scale."""
    start, stop, num = (given[key] for key in ("start", "stop", "num"))
    scale = given.get("scale", "linear")
    for end in (start, stop):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise refuse(place, "have a finite number for start and for stop", f"has {end!r}")
    check_positive_int(f"{place}.num", num, 2)
    if num > MOST:
        raise refuse(
            f"{place}.num", f"be at most {MOST:,}, the most runs of a study", f"is {num:,}"
        )
    check_choice(f"{place}.scale", scale, ("linear", "log"))
    if scale == "log" and not (start > 0 and stop > 0):
        raise refuse(place, "have positive ends on a log scale", f"has {start!r} and {stop!r}")
    spaced = (np.geomspace if scale == "log" else np.linspace)(start, stop, num)
    # Twelve digits are more than any result has, and let a value be selected as it is written.
    if num < LONG:
        return [float(f"{value:.12g}") for value in spaced]
    # The same by powers of ten, which are exact up to 22.
    powers = 11 - np.floor(np.log10(np.where(spaced == 0, 1, np.abs(spaced)))).clip(-11, 11)
    return (np.rint(spaced * 10.0**powers) / 10.0**powers).tolist()
