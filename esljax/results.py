"""How every result carries its errors, and how every result prints.

One convention: `result.standard_error` is None, or holds the standard errors under the names of the
numbers themselves, so that the error of `result.gap` is `result.standard_error.gap`. The string
`result.errors` describes how they were taken, such as "spread over 8 independent runs".
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from esljax._checks import is_key, known


class StandardErrors(eqx.Module):
    """Standard errors of the numbers of a result, as attributes of the same names.

    A pytree, so that errors pass through `jit`, `vmap` and `jax.tree.map` with their result.

    **Args:** `numbers`: names and errors, each of the shape and in the units of its number. None
    for a number that this result does not have.
    **Raises:** `AttributeError` for a name that is not among them, listing those that are.

    **Example:**

        >>> import esljax as esl
        >>> errors = esl.results.StandardErrors({"gap": 0.5, "debiased_gap": None})
        >>> errors.gap
        0.5
        >>> print(errors)
        gap  ± 0.5
    """

    numbers: dict[str, Any]
    """The errors by name; the pytree holds them in the order of their names."""

    def __init__(self, numbers: Mapping[str, Any]):
        self.numbers = dict(numbers)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for names that are no attributes. `copy` and `pickle` call it
        # before `numbers` exists.
        numbers = self.__dict__.get("numbers", {})
        if name.startswith("__") or name not in numbers:
            names = ", ".join(numbers) or "none"
            raise AttributeError(f"no standard error of {name!r}; there is one of: {names}")
        return numbers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def get(self, name: str) -> Any:
        """The standard error of one number, or None if it has none."""
        return self.numbers.get(name)

    def __float__(self) -> float:
        # `velocity.standard_error` and `entropy.standard_error` were numbers in 0.1.
        if len(self.numbers) != 1:
            raise TypeError(
                f"standard errors are read by name, such as .{next(iter(self.numbers))}"
            )
        (name, error), *_ = self.numbers.items()
        message = f"standard_error is read by name now: standard_error.{name}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return float(error)

    def __str__(self) -> str:
        errors = {name: error for name, error in self.numbers.items() if error is not None}
        if not errors or not all(map(is_number, errors.values())):
            return repr(self)
        rows = [(name, f"± {float(error):.2g}") for name, error in errors.items()]
        return table(rows, align="ll")


def renamed_error(name: str) -> property:
    """The former attribute `NAME_error` of a result: an alias of its standard error that warns."""

    def read(result: Any) -> Any:
        kind = type(result).__name__
        warnings.warn(
            f"{kind}.{name}_error is now {kind}.standard_error.{name}; the old name goes with the "
            "next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(result.standard_error, name)

    return property(read, doc=f"Deprecated: `standard_error.{name}`.")


def is_number(value: Any) -> bool:
    """Whether this is one number with a known value, which can be printed."""
    return (
        isinstance(value, jax.Array | np.ndarray | np.generic | float)
        and known(value)
        and np.ndim(value) == 0
    )


def measured(value: Any, error: Any = None, digits: int = 6) -> str:
    """A number for a table, such as `236.298 ± 1.1`; without an error, the number alone.

    **Args:** `value`, `error`: numbers in the same units. `digits`: significant digits of `value`;
    the error has two, or is named if it is no finite number.
    """
    if error is None:
        return f"{float(value):.{digits}g}"
    size = f"{float(error):.2g}" if np.isfinite(float(error)) else "not finite"
    return f"{float(value):.{digits}g} ± {size}"


def concise(value: Any, error: Any) -> str:
    """Concise notation: 76.717(50) is 76.717 ± 0.050. Without an error, four digits."""
    value, error = float(value), float(error)
    if not np.isfinite(value) or not np.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f}({error * 10**digits:.0f})"


def in_short(value: Any, most: int = 16) -> str:
    """A value in a few words: numbers with four digits, the ends alone of a long array.

    **Args:** `value`: anything; arrays need not be known. `most`: numbers of an array to show.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> esl.results.in_short(jnp.array([0.5, 0.25])), esl.results.in_short(jnp.zeros((2, 3)))
        ('0.5 0.25', 'an array of shape (2, 3) from 0 to 0')
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex):
        return str(value)
    if is_key(value):
        return "a key"
    if not known(value):
        return "unknown" if np.ndim(value) == 0 else f"an unknown array of shape {np.shape(value)}"
    array = np.asarray(value)
    if array.ndim == 0:
        number = array.item()
        return f"{number:.4g}" if isinstance(number, float | complex) else str(number)
    if array.ndim > 1:
        ends = f" from {in_short(array.min())} to {in_short(array.max())}" if array.size else ""
        return f"an array of shape {array.shape}{ends}"
    if array.size > most:
        half = most // 2
        return f"{in_short(array[:half])} … {in_short(array[-half:])}"
    return " ".join(in_short(number) for number in array)


def table(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Rows of cells as lines of columns, two spaces apart: the one printer of tables in plain text.

    In columns that are aligned to the right, the signs ± of `measured` stand below each other.

    **Args:** `rows`: cells, the same number in each row; the first row may be a heading. `align`: a
    letter for each column, "l" or "r"; by default the first column is "l" and the others "r".

    **Example:**

        >>> import esljax as esl
        >>> print(esl.results.table([("gap", "2.25 ± 0.1"), ("efficiency", "0.5")]))
        gap         2.25 ± 0.1
        efficiency   0.5
    """
    columns = list(zip(*rows, strict=True))
    align = align or "l" + "r" * (len(columns) - 1)
    justified = [_justified(*column) for column in zip(columns, align, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*justified, strict=True))


def _justified(cells: Sequence[str], side: str) -> list[str]:
    if side == "r":
        errors = [f" ± {cell.partition(' ± ')[2]}" if " ± " in cell else "" for cell in cells]
        room = max(map(len, errors))
        cells = [
            cell + " " * (room - len(error)) for cell, error in zip(cells, errors, strict=True)
        ]
    width = max(map(len, cells))
    return [f"{cell:{'<' if side == 'l' else '>'}{width}}" for cell in cells]
