"""The fields of the settings of a study, and the values that a file gives them."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from esljax._checks import InputError
from esljax.experiment import RUN_SCHEDULES, RunConfig, convert, spelled


def plain_kind(field: dataclasses.Field) -> Any:
    """The type of a field without a bound or a default of its own."""
    return field.type if field.type in (bool, int, float, str) else type(field.default)


def is_plain(value: Any) -> bool:
    """Whether a file holds a value: no None, and none that is still to be given."""
    return value is not None and not isinstance(value, enum.Enum)


def converted_table(
    content: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], problem: Any, place: str
) -> dict[str, Any]:
    """The values of a TOML table in the types of the settings."""
    for key in content:
        if key not in fields:
            fixed = ""
            if problem is not None and key in RunConfig.__dataclass_fields__:
                fixed = f", and {problem} fixes it itself"
            raise InputError(
                f"Key `{key}` of {place} is unknown{fixed}; the known keys are {', '.join(fields)}."
            )
    return {
        key: convert(
            key, spelled(value, RUN_SCHEDULES) if key == "schedule" else value, fields[key], place
        )
        for key, value in content.items()
    }
