"""The layout of a new store: its attributes, and arrays filled with "to do" and NaN."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from esljax.experiment import Columns
from esljax.files import storage
from esljax.study.description import Study
from esljax.study.integrity import CHECKSUM, CHECKSUMS, digests, file_of

TO_DO = 0

# 2: with checksums. Stores of layout 1 are still read, and resumed without them.
VERSION = 2
# What `done` holds where its chunk is lost: none of the states.
LOST = -1
# The attribute of the `Columns`, as JSON: none in stores of earlier versions.
COLUMNS = "columns"
_UNITS = {
    "target": "loss",
    "temperature": "loss",
    "rate": "squared parameters per unit of loss and step",
    "epsilon": "squared parameters",
}


def lay_out(
    zarr: ModuleType,
    path: Path,
    study: Study,
    task_size: int,
    columns: Columns,
    files: Mapping[str, str],
) -> None:
    """Write the attributes and the arrays of a store, with `files` and their digests as sources."""
    about = {
        "version": VERSION,
        "study": storage.toml(study.as_dict()),
        "task_size": task_size,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(storage.versions()),
        "commit": storage.commit() or "",
        COLUMNS: json.dumps(columns._asdict()),
    }
    if files:
        about["sources"] = json.dumps(dict(files))
    group = zarr.create_group(str(path), zarr_format=3, attributes=about)
    # Explicit, because a damaged list of codecs may not look like another default.
    codecs = (zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec())
    layout = {
        "shape": tuple(study.dimensions.values()),
        "chunks": study.chunks(task_size),
        "dimension_names": tuple(study.dimensions),
        "compressors": codecs,
    }

    def variable(name: str, dtype: str, fill: Any, words: str, **more: str) -> Any:
        return group.create_array(
            name, dtype=dtype, fill_value=fill, attributes={"long_name": words, **more}, **layout
        )

    for quantity in columns.quantities():
        variable(quantity.name, "float64", np.nan, quantity.words, units=quantity.units)
    variable("converged", "bool", False, "whether every transport problem of the run was solved")
    variable("reason", "string", "", "why the run failed")
    variable(CHECKSUM, "uint32", 0, "CRC-32 of the place, state, numbers and reason of the run")
    flags = {"flag_values": "0 1 2", "flag_meanings": "to_do done failed"}
    _fill(path, "done", variable("done", "int8", LOST, "state of the run", **flags))
    for name, (dimension, values) in study.coordinates.items():
        _add_coordinate(group, name, dimension, values, codecs)
    names = tuple(group.array_keys())
    group.attrs[CHECKSUMS] = digests(path, group.attrs.asdict(), names)


def _fill(path: Path, name: str, array: Any) -> None:
    """Mark all runs as to do: a chunk that is missing later is damage.

    Zarr keeps chunks at the edge in full, so that all files hold the same bytes, and copies of one
    take a tenth of the time.
    """
    first = (0,) * array.ndim
    array.blocks[first] = np.full(array.blocks[first].shape, TO_DO, array.dtype)
    content = file_of(path, name, first).read_bytes()
    for block in np.ndindex(array.cdata_shape):
        file = file_of(path, name, block)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _add_coordinate(group: Any, name: str, dimension: str, values: tuple, codecs: Any) -> None:
    labels = labels_of(values)
    units = {"units": _UNITS[name]} if name in _UNITS else {}
    array = group.create_array(
        name,
        shape=labels.shape,
        dtype="string" if labels.dtype == object else labels.dtype,
        dimension_names=(dimension,),
        attributes={"long_name": name.replace("_", " "), **units},
        compressors=codecs,
    )
    array[...] = labels


def labels_of(values: Any) -> np.ndarray:
    """The labels of an axis: numbers, or strings as objects."""
    if isinstance(values[0], tuple):
        return np.array([",".join(map(str, value)) for value in values], dtype=object)
    return np.array(values, dtype=object if isinstance(values[0], str) else None)
