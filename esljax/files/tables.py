"""Labeled examples in a file of the user's: arrays in an .npz, or one table in .csv or .tsv.

    mine.npz    `inputs` (m, ...) and `labels` (m, ...), optionally `test_inputs` and `test_labels`
    mine.csv    a row of names, then one row for each example; one of the columns is the label

A table is separated by commas, semicolons or tabs, whichever its first row has, and is read row by
row. Whatever a row has wrong is an error that names its line.
"""

import array
import csv
import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esljax._checks import InputError, check_fits, first_sentence, refuse
from esljax.files.archives import open_file, refuse_pickle

ARRAYS, TABLES = (".npz",), (".csv", ".tsv")
EXAMPLES = (*ARRAYS, *TABLES)
"""The endings of the files that hold examples."""


class StoredExamples(NamedTuple):
    """The examples of a file, as they stand there."""

    inputs: np.ndarray
    """(m, ...); float64 (m, p) from a table."""
    labels: np.ndarray
    """(m, ...): integers, floating numbers, or text."""
    test_inputs: np.ndarray | None = None
    """The same of the held-out examples; None if the file does not set any apart."""
    test_labels: np.ndarray | None = None


def holds_examples(name: object) -> bool:
    """Whether a name ends as that of a file of examples does."""
    return isinstance(name, str) and Path(name).suffix.lower() in EXAMPLES


def is_table(path: str | Path) -> bool:
    """Whether a file is a table, whose label has a column, by its name."""
    return Path(path).suffix.lower() in TABLES


def read_examples(path: str | Path, label: str = "") -> StoredExamples:
    """Read the examples of an .npz, .csv or .tsv file. No pickled data is loaded.

    **Args:** `path`: of the file. `label`: the column of the labels of a table.
    **Raises:** `InputError`, about `data` or `label`, for a file that is not whole, of other
    arrays, or too large for this machine; and, with its line, for a row of a table that is short or
    long, lacks a value, or has text in a column of numbers.

    **Example:**

        >>> from pathlib import Path
        >>> from esljax.files.tables import read_examples
        >>> written = Path("irises.csv").write_text("length,width,kind\\n5.1,3.5,setosa\\n")
        >>> stored = read_examples("irises.csv", label="kind")
        >>> stored.inputs.tolist(), stored.labels.tolist()
        ([[5.1, 3.5]], ['setosa'])
    """
    path = Path(path)
    _check_file(path)
    if not is_table(path):
        if label:
            raise refuse("label", "be given with a table .csv or .tsv alone", f"{path} is no table")
        return _arrays(path)
    # A number takes two characters or more in the file, and eight bytes here, twice.
    needed = 8.0 * path.stat().st_size
    check_fits("data", needed, f"the numbers of {path}", "take fewer rows")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _table(path, file, label)
    except OSError as error:
        raise refuse("data", "be readable", f"{path} gives: {error.strerror}") from error
    except UnicodeDecodeError as error:
        must = "be text in UTF-8 (save the table as 'CSV UTF-8')"
        raise refuse("data", must, f"{path} is not: {error.reason}") from error


def _check_file(path: Path) -> None:
    refuse_pickle("data", path)
    try:
        there, whole = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise refuse("data", "be a readable file", f"{path} gives: {error}") from error
    if not there:
        raise refuse("data", "be a file that is there", f"there is nothing at {path}")
    if not whole:
        raise refuse("data", "be a file", f"{path} is a {'folder' if path.is_dir() else 'device'}")
    if not os.access(path, os.R_OK):
        raise refuse("data", "be readable", f"{path} may not be read")


# --- Arrays ---------------------------------------------------------------------------------------


def _arrays(path: Path) -> StoredExamples:
    archive = open_file("data", path)
    known = StoredExamples._fields
    names = list(archive.headers)
    must = "hold `inputs` and `labels`, and optionally `test_inputs` and `test_labels`"
    for name in names:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name not in known and close:
            raise refuse("data", must, f"{path} holds `{name}`: is that `{close[0]}`?")
    missing = [name for name in known[:2] if name not in names]
    missing += [name for name in known[2:] if name not in names] * (
        len([name for name in known[2:] if name in names]) == 1
    )
    if missing:
        listed = ", ".join(f"`{name}`" for name in names[:20]) or "nothing"
        raise refuse("data", must, f"{path} holds {listed} and no `{missing[0]}`")
    stored = StoredExamples(**archive.load("data", [name for name in known if name in names]))
    for inputs, labels in (("inputs", "labels"), ("test_inputs", "test_labels")):
        _check_arrays(path, inputs, getattr(stored, inputs), labels, getattr(stored, labels))
    shapes = [x.shape[1:] for x in (stored.inputs, stored.test_inputs) if x is not None]
    if len(set(shapes)) > 1:
        must = f"have `test_inputs` of the shape of `inputs`, {shapes[0]} for each example"
        raise refuse("data", must, f"{path} has {shapes[1]}")
    shapes = [x.shape[1:] for x in (stored.labels, stored.test_labels) if x is not None]
    if len(set(shapes)) > 1:
        must = f"have `test_labels` of the shape of `labels`, {shapes[0]} for each example"
        raise refuse("data", must, f"{path} has {shapes[1]}")
    if stored.test_labels is not None and _sort(stored.test_labels) != _sort(stored.labels):
        must = "have `test_labels` of the kind of `labels`: integers, floating numbers, or text"
        was = f"{path} has {_kind(stored.test_labels)} and {_kind(stored.labels)}"
        raise refuse("data", must, was)
    return stored


def _sort(labels: np.ndarray) -> str:
    return "i" if labels.dtype.kind in "iub" else labels.dtype.kind


def _check_arrays(
    path: Path, of_inputs: str, inputs: np.ndarray | None, of_labels: str, labels: np.ndarray | None
) -> None:
    if inputs is None or labels is None:
        return
    if inputs.dtype.kind not in "fiub":
        raise refuse(
            "data",
            f"have real numbers in `{of_inputs}`",
            f"{path} has {_kind(inputs)}",
        )
    if labels.dtype.kind not in "fiubU":
        must = f"have numbers or text in `{of_labels}`"
        raise refuse("data", must, f"{path} has {_kind(labels)}")
    if inputs.ndim < 2 or not inputs.size:
        must = f"have `{of_inputs}` of shape (m, ...), one row for each example"
        raise refuse("data", must, f"{path} has shape {inputs.shape}")
    if labels.shape[:1] != inputs.shape[:1]:
        was = f"{path} has shapes {labels.shape} and {inputs.shape}"
        raise refuse("data", f"have one row of `{of_labels}` for each of `{of_inputs}`", was)
    for name, values in ((of_inputs, inputs), (of_labels, labels)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            was = f"`{name}` of {path} has {values[place]} at index {place}"
            raise refuse("data", "hold finite numbers (leave out rows that lack one)", was)


def _kind(values: np.ndarray) -> str:
    return "text" if values.dtype.kind in "US" else f"dtype {values.dtype}"


# --- Tables ---------------------------------------------------------------------------------------

_SEPARATORS = ",;\t"
# Longer ones are the names of something.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = re.compile(r"[+-]?[0-9]+")


def _table(path: Path, file: Iterable[str], label: str) -> StoredExamples:
    rows = _rows(path, file)
    _, names = next(rows, (0, []))
    _check_names(path, names)
    if not label:
        raise refuse("label", f"name the column of the labels, one of {_listed(names)}", "is empty")
    if label not in names:
        raise refuse("label", f"be a column of {path}, one of {_listed(names)}", f"is {label!r}")
    place = names.index(label)
    numbers, labels = array.array("d"), []
    lines = array.array("q")
    for line, cells in rows:
        if len(cells) != len(names):
            raise refuse(
                "data",
                f"have {len(names)} cells in each row, as its first row has",
                f"line {line} of {path} has {len(cells)}",
            )
        for i, cell in enumerate(cells):
            if i != place:
                numbers.append(_number(path, line, names[i], cell))
        labels.append(cells[place])
        lines.append(line)
    if not labels:
        raise refuse("data", "have a row for each example below its names", f"{path} has none")
    inputs = np.frombuffer(numbers, np.float64).reshape(len(labels), len(names) - 1)
    return StoredExamples(inputs, _labels(path, label, labels, lines))


def _rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with cells, each with the line that it ends on."""
    numbered = enumerate(file, 1)
    start, first = next(((i, line) for i, line in numbered if line.strip()), (1, ""))
    # Outside of quotes.
    separator = max(_SEPARATORS, key=re.sub(r'"[^"]*"?', "", first).count)
    every = itertools.chain([first], (line for _, line in numbered))
    reader = csv.reader(every, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num + start - 1, cells
    except csv.Error as error:
        was = f"line {reader.line_num + start - 1} of {path} is not: {first_sentence(error)}"
        raise refuse("data", "be a table whose quotes close", was) from error


def _check_names(path: Path, names: list[str]) -> None:
    if not names:
        raise refuse("data", "be a table with a row of names", f"{path} is empty")
    if len(names) == 1:
        must = "have several columns, separated by commas, semicolons or tabs"
        raise refuse("data", must, f"{path} has one, {names[0][:60]!r}")
    if all(_float(name) is not None for name in names):
        must = "begin with a row of names of its columns"
        raise refuse("data", must, f"the first row of {path} holds numbers")
    for i, name in enumerate(names):
        if not name:
            must = "have a name for each column (leave out a column of row numbers)"
            raise refuse("data", must, f"column {i + 1} of {path} has none")
        if name in names[:i]:
            raise refuse("data", "name each column once", f"{path} has {name!r} twice")


def _number(path: Path, line: int, name: str, cell: str) -> float:
    value = _float(cell)
    if value is None or not math.isfinite(value):
        raise _no_number(path, line, name, cell)
    return value


def _no_number(path: Path, line: int, name: str, cell: str) -> InputError:
    where = f"column {name!r} of {path}"
    if not cell or _float(cell) is not None or cell.lower() in ("na", "n/a", "null", "none", "?"):
        what = f"holds {cell[:60]!r}" if cell else "is empty"
        must = "have a number in each cell (fill in what is missing, or leave out the row)"
        return refuse("data", must, f"{where} {what} in line {line}")
    must = "have columns of numbers beside the label (leave out the others, or write them as 0, 1)"
    if re.fullmatch(r"[+-]?\d+,\d+", cell):
        must = "have numbers with a decimal point"
    return refuse("data", must, f"{where} holds {cell[:60]!r} in line {line}")


def _float(cell: str) -> float | None:
    # Python reads 1_000 as a number, no other program does.
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _labels(path: Path, name: str, cells: Sequence[str], lines: Sequence[int]) -> np.ndarray:
    """The labels as integers if all cells are, else as numbers if all cells are, else as text."""
    values = [_float(cell) for cell in cells]
    empty = next((i for i, cell in enumerate(cells) if not cell), None)
    if empty is not None:
        raise _no_number(path, lines[empty], name, "")
    text = next((i for i, value in enumerate(values) if value is None), None)
    if text is not None:
        # Words such as "nan" and "infinity" are text among text.
        finite = (i for i, x in enumerate(values) if x is not None and math.isfinite(x))
        number = next(finite, None)
        if number is not None:
            both = " and ".join(
                f"{cells[i][:60]!r} in line {lines[i]}" for i in sorted((text, number))
            )
            must = "have labels that are all numbers or all text"
            raise refuse("data", must, f"column {name!r} of {path} holds {both}")
        return np.array(cells, dtype=np.str_)
    if all(_DIGITS.fullmatch(cell) for cell in cells):
        if all(_INTEGER.fullmatch(cell) for cell in cells):
            return np.array([int(cell) for cell in cells], np.int64)
        return np.array(cells, dtype=np.str_)
    for i, value in enumerate(values):
        if not math.isfinite(value or 0.0):
            raise _no_number(path, lines[i], name, cells[i])
    return np.array(values, np.float64)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
