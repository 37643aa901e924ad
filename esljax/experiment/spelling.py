"""One spelling of each schedule, that of `usual_shapes()`; others are read with a sentence."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

# What papers, libraries and earlier versions call them.
_OTHERS = {
    "wsd": "warmup_stable_decay",
    "trapezoid": "warmup_stable_decay",
    "trapezoidal": "warmup_stable_decay",
    "linear": "linear_decay",
    "linear_cooldown": "linear_decay",
    "cosine_decay": "cosine",
    "exponential": "exponential_decay",
    "exp_decay": "exponential_decay",
    "exp_rise": "exponential_rise",
    "wsd_tuned": "warmup_stable_decay_tuned",
}


def spelled(name: Any, known: Iterable[str], others: Mapping[str, str] | None = None) -> Any:
    """The name of a schedule as it is among the known ones, or as it was if it is none of them.

    **Args:** `others`: names of known ones, before those of this module.
    **Warns:** `UserWarning` that says how a name is spelled here.
    """
    known = tuple(known)
    if not isinstance(name, str) or name in known:
        return name
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    plain = re.sub(r"[\s\-–—_]+", "_", plain).lower()
    if plain not in known:
        plain = (_OTHERS | dict(others or {})).get(plain, plain)
    if plain not in known:
        return name
    warnings.warn(f"The schedule {name!r} is spelled {plain!r} here.", stacklevel=3)
    return plain


class Spelled(dict):
    """Schedules by name, which are found by other spellings too."""

    def __init__(self, content: Mapping[str, Any], others: Mapping[str, str] | None = None):
        super().__init__(content)
        self._others = dict(others or {})

    def __missing__(self, name: Any) -> Any:
        right = spelled(name, self, self._others)
        if right == name:
            raise KeyError(name)
        return self[right]
