"""How every result carries its errors, and how every result prints.

One convention: `result.standard_error` is None, or holds the standard errors under the names of the
numbers themselves, so that the error of `result.gap` is `result.standard_error.gap`. In words,
`result.errors` says what the errors are taken over.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import numpy as np


class StandardErrors(eqx.Module):
    """Standard errors of the numbers of a result, as attributes of the same names.

    A pytree, so that errors pass through `jit` and `vmap` with the result that they belong to.

    **Args:** `numbers`: names and errors, each of the shape and in the units of its number.
    **Raises:** `AttributeError` for a number without a standard error, naming those that have one.

    **Example:**

        >>> from esljax.results import StandardErrors
        >>> StandardErrors({"gap": 0.5}).gap
        0.5
    """

    numbers: dict[str, Any]

    def __init__(self, numbers: Mapping[str, Any]):
        self.numbers = dict(numbers)

    def __getattr__(self, name: str) -> Any:
        # Called only for what is no attribute already; unpickling asks before there are any numbers.
        numbers = self.__dict__.get("numbers", {})
        if name.startswith("__") or name not in numbers:
            known = ", ".join(numbers) or "none"
            raise AttributeError(f"no standard error of {name!r} here; those of: {known}")
        return numbers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def get(self, name: str) -> Any:
        """The standard error of one number, or None if it has none."""
        return self.numbers.get(name)


def measured(value: Any, error: Any = None) -> str:
    """A number for a table: `236.298 ± 1.1`, or the number alone where no error is known."""
    return f"{float(value):.6g}" + ("" if error is None else f" ± {float(error):.2g}")


def concise(value: Any, error: Any) -> str:
    """Concise notation: 76.717(50) is 76.717 ± 0.050. Without an error, four digits."""
    value, error = float(value), float(error)
    if not np.isfinite(value) or not np.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f}({error * 10**digits:.0f})"


def table(rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Rows of cells as lines of columns, two spaces apart: the one printer of tables in plain text.

    **Args:** `rows`: cells, the same number in each row; the first row may be a heading. `align`: a
    letter for each column, "l" or "r"; by default the first column is "l" and the others "r".
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    align = align or "l" + "r" * (len(widths) - 1)

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, align, strict=True)
        return "  ".join(
            f"{cell:{'<' if side == 'l' else '>'}{width}}" for cell, width, side in cells
        )

    return "\n".join(line(row).rstrip() for row in rows)
