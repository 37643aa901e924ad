"""Damage of a store: whether its arrays are what its study says, and its runs what was written.

Three kinds of checksum answer for three kinds of content, so that what is read is either what was
written or is named as damaged. Each chunk ends with its CRC-32C. Each finished run has a checksum
of its place, state and numbers in the array `checksum`, which also shows chunks that are lost or in
each other's places. The attribute `checksums` of the store holds a digest of its own attributes and
of the metadata of each array.

Stores of layout 1 have none of these. Of them, shapes, types and labels are compared with the
study, and a finished run must have finite numbers.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esljax._checks import InputError, first_sentence, refuse

CHECKSUM = "checksum"
"""The array of the checksums of runs."""
CHECKSUMS = "checksums"
"""The attribute of the digests of metadata, as JSON: by array, and "." for the store itself."""

_METADATA = "zarr.json"


class Contents(NamedTuple):
    """What could be read of an array."""

    values: np.ndarray
    """Flat; the fill value where a chunk is missing or cannot be read."""
    unreadable: dict[tuple[int, ...], str]
    """The chunks that cannot be read, and why."""


def damaged(argument: str, what: str, advice: str = "") -> InputError:
    """Return the error that says what is wrong with a place of a store, and what to do."""
    advice = advice or "bring it back from a copy, or start a new store"
    return refuse(argument, "be an undamaged store", f"{what}: {advice}")


def digests(path: Path, attributes: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the digests of the attributes of a store and of the metadata of some of its arrays."""
    found = {".": _digest({k: v for k, v in attributes.items() if k != CHECKSUMS})}
    found |= {name: _digest(json.loads((path / name / _METADATA).read_bytes())) for name in names}
    # Sorted, because a folder lists its arrays in any order.
    return json.dumps(found, sort_keys=True)


def check_attributes(argument: str, path: Path, attributes: Mapping[str, Any]) -> None:
    """Compare the attributes of a store with their digest.

    **Raises:** `InputError`, about `argument`, if they are not those that were written.
    """
    now = _digest({k: v for k, v in attributes.items() if k != CHECKSUMS})
    if _recorded(attributes).get(".") != now:
        what = f"{path / _METADATA} has other attributes than were written"
        raise damaged(argument, what)


def check_consolidated(argument: str, path: Path, attributes: Mapping[str, Any]) -> None:
    """Compare the metadata of all arrays that a complete store holds with those of each.

    **Raises:** `InputError`, about `argument`, if they are not those that were written.
    """
    place = path / _METADATA
    try:
        content = json.loads(place.read_bytes()).get("consolidated_metadata")
    except (OSError, ValueError) as error:
        raise damaged(argument, f"{place} cannot be read ({first_sentence(error)})") from error
    recorded = {k: v for k, v in _recorded(attributes).items() if k != "."}
    if content is None or not recorded:
        return
    held = content.get("metadata") if isinstance(content, dict) else None
    if not isinstance(held, dict) or {k: _digest(v) for k, v in held.items()} != recorded:
        raise damaged(argument, f"{place} has other consolidated metadata than were written")


def check_array(
    argument: str,
    path: Path,
    group: Any,
    name: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    kinds: str,
) -> Any:
    """Open an array of a store and compare it with what the study says.

    **Args:** `kinds`: the kinds of NumPy type that it may have. **Returns:** the array.
    **Raises:** `InputError`, about `argument`, if it is missing or differs.
    """
    place = path / name / _METADATA
    try:
        metadata = json.loads(place.read_bytes())
        array = group[name]
        found = (array.shape, tuple(array.metadata.dimension_names or ()), array.dtype.kind)
        endian = getattr(getattr(array.serializer, "endian", None), "value", "little")
    except FileNotFoundError as error:
        raise damaged(argument, f"{place} is missing") from error
    except Exception as error:
        # Whatever json and zarr raise for metadata that they do not understand.
        raise damaged(argument, f"{place} cannot be read ({first_sentence(error)})") from error
    recorded = _recorded(group.attrs)
    if recorded and recorded.get(name) != _digest(metadata):
        raise damaged(argument, f"{place} is not what was written")
    kind = found[-1] if found[-1] in kinds else kinds
    wanted = (shape, dimensions, kind)
    for what, is_now, should in zip(("shape", "dimensions", "type"), found, wanted, strict=True):
        if is_now != should:
            raise damaged(argument, f"{place} has the {what} {is_now}, and the study {should}")
    if endian != "little":
        raise damaged(argument, f"{place} has the byte order {endian}")
    return array


def check_labels(argument: str, path: Path, name: str, array: Any, wanted: np.ndarray) -> None:
    """Compare the labels of a dimension with the values of the study.

    **Raises:** `InputError`, about `argument`, if they differ or cannot be read.
    """
    found = read(path, name, array)
    if found.unreadable or found.values.tolist() != wanted.tolist():
        what = next(iter(found.unreadable.values()), "holds other labels than the study")
        raise damaged(argument, f"{path / name} {what}")


def read(path: Path, name: str, array: Any) -> Contents:
    """Read an array of a store chunk by chunk: what is damaged must not cost the rest."""
    values = np.full(array.shape, array.fill_value, object if array.dtype.kind in "TO" else None)
    unreadable = {}
    for block in np.ndindex(array.cdata_shape):
        if not file_of(path, name, block).exists():
            continue  # what Zarr finds as well, in a hundred times the time
        try:
            values[_places(array, block)] = array.blocks[block]
        except Exception as error:
            # Codecs raise whatever they like: ValueError, RuntimeError, MemoryError.
            unreadable[block] = f"cannot be read ({first_sentence(error)})"
    return Contents(values.reshape(-1), unreadable)


def runs_of(array: Any, blocks: Mapping[tuple[int, ...], str]) -> np.ndarray:
    """Mark the runs whose numbers lie in some chunks of an array, flat."""
    inside = np.zeros(array.shape, bool)
    for block in blocks:
        inside[_places(array, block)] = True
    return inside.reshape(-1)


def chunk_of(path: Path, name: str, array: Any, index: int) -> Path:
    """The file of the chunk that holds one run."""
    places = np.unravel_index(index, array.shape)
    return file_of(
        path,
        name,
        tuple(int(i) // length for i, length in zip(places, array.chunks, strict=True)),
    )


def file_of(path: Path, name: str, block: tuple[int, ...]) -> Path:
    """The file of a chunk, as the default encoding of Zarr names it."""
    return path.joinpath(name, "c", *map(str, block))


def run_checksums(
    indices: np.ndarray,
    state: np.ndarray,
    numbers: Mapping[str, np.ndarray],
    converged: np.ndarray,
    reasons: Any,
) -> np.ndarray:
    """Return a checksum for each run, of its place, state, numbers and reason.

    **Args:** the rows of some runs; `numbers` in the order of the store. **Returns:** uint32.
    """
    columns = np.stack([np.asarray(values, "<f8") for values in numbers.values()], axis=1)
    # A chunk of NaN alone is not written, and comes back as the one NaN of the fill value.
    columns = np.where(np.isnan(columns), np.nan, columns)
    marks = np.stack([indices, state, converged], axis=1).astype("<i8")
    sums = [
        zlib.crc32(str(reason).encode(), zlib.crc32(row.tobytes(), zlib.crc32(mark.tobytes())))
        for mark, row, reason in zip(marks, columns, reasons, strict=True)
    ]
    return np.array(sums, np.uint32)


def _places(array: Any, block: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(i * length, min((i + 1) * length, whole))
        for i, length, whole in zip(block, array.chunks, array.shape, strict=True)
    )


def _recorded(attributes: Mapping[str, Any]) -> dict[str, str]:
    """The digests that were written; none in a store of layout 1, or where they are damaged."""
    try:
        recorded = json.loads(attributes[CHECKSUMS])
    except (KeyError, TypeError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
