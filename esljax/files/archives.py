"""Arrays by name in the files of other writers: .npz, .npy, safetensors, Zarr and Orbax.

An `Archive` knows the shapes and types of its arrays before any of them is read, so that what is
not wanted is never loaded, and what the machine cannot hold is refused before anything is
allocated. What is damaged is an error that names the place: checksums are verified to the end of
each array, declared sizes are held against stored ones, and a part that is missing is never filled
in.

**Pickles** (`.pt`, `.pth`, `.pkl`, object arrays) are never loaded, because a pickle runs whatever
code it carries. Any error of a decoder on a broken file becomes an `InputError`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from esljax._checks import InputError, first_sentence, refuse
from esljax.files.orbax import quietly
from esljax.files.storage import installation

# Suffixes of files that are usually pickles; only opening one would show whether it is.
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin")
FILES = (".npz", ".safetensors", ".npy")
"""Suffixes of the files that are read as checkpoints."""
NO_PICKLE = "be plain arrays, because a pickle runs whatever code it carries"


class Header(NamedTuple):
    """What a file states of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    """None if NumPy has no such type."""
    kind: str
    """The type in the words of the file."""

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the array in memory, as far as they are known."""
        return self.size * (self.dtype.itemsize if self.dtype is not None else 1)


class Place(NamedTuple):
    """Where an array lies in a file as it does in memory, in the order of its entries."""

    path: Path
    start: int
    """The bytes before its first number."""
    dtype: np.dtype
    """The type of its numbers as stored, with its byte order."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """The arrays of one file or folder."""

    path: Path
    headers: Mapping[str, Header]
    loader: Callable[[Sequence[str]], dict[str, np.ndarray]]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files beside the arrays that were not opened, and why."""
    parts: tuple[str, ...] = ()
    """Prefixes of the keys of its several files or items; empty if it is one."""
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    """Where the arrays lie that can be read in parts; others can be loaded whole alone."""

    def check(self, argument: str, keys: Iterable[str]) -> None:
        """Reject what is no plain array.

        **Raises:** `InputError` for a pickle, or a type that NumPy lacks.
        """
        for key in keys:
            header = self.headers[key]
            if header.dtype is None or header.dtype.hasobject:
                pickled = header.dtype is not None
                raise refuse(
                    argument,
                    NO_PICKLE
                    if pickled
                    else f"be arrays of a type that NumPy has (save float32, or skip={key!r})",
                    f"`{key}` of {self.path} is {'pickled' if pickled else header.kind}",
                )

    def load(self, argument: str, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the named arrays, in the byte order of this machine.

        **Raises:** `InputError` if one is no plain array, does not fit into memory, or is damaged.
        """
        keys = list(keys)
        self.check(argument, keys)
        check_room(argument, str(self.path), sum(self.headers[key].nbytes for key in keys))
        with decoding(argument, self.path):
            arrays = self.loader(keys)
        return {key: _native(array) for key, array in arrays.items()}


def read_part(argument: str, key: str, place: Place, skipped: int, out: np.ndarray) -> None:
    """Fill `out`, shape (count,), with the numbers of an array after the first `skipped` of them.

    **Raises:** `InputError` if the file ends before them.
    """
    direct = out.dtype == place.dtype and out.flags.c_contiguous
    stored = out if direct else np.empty(out.shape, place.dtype)
    with decoding(argument, place.path), open(place.path, "rb", buffering=0) as file:
        file.seek(place.start + skipped * place.dtype.itemsize)
        rest: Any = memoryview(stored.view(np.uint8).data)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise refuse(argument, "be whole arrays", f"`{key}` of {place.path} is cut short")
            rest = rest[count:]
    if not direct:
        out[...] = _native(stored)


def check_room(argument: str, where: str, nbytes: int) -> None:
    """Reject what the memory of this machine cannot hold.

    **Raises:** `InputError` with both numbers.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    if nbytes > memory:
        raise refuse(
            argument,
            f"fit into the memory of this machine, {memory / 1e9:.3g} GB",
            f"{where} declares {nbytes / 1e9:.3g} GB",
        )


@contextlib.contextmanager
def decoding(argument: str, path: Path) -> Iterator[None]:
    """Turn any error of a decoder into an `InputError` about the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _undecoded(argument, path, error) from error


def _undecoded(argument: str, path: Path, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    # On arbitrary bytes each decoder fails in its own way (struct, zlib, syntax, memory, ...).
    if isinstance(error, OSError):
        was = f"{path} gives: {error.strerror or first_sentence(error)}"
        return refuse(argument, "be readable", was)
    return refuse(argument, "be a whole, readable file", f"{path} is not: {first_sentence(error)}")


def refuse_pickle(argument: str, path: Path) -> None:
    """Reject a file whose name is that of a pickle."""
    if path.suffix.lower() in PICKLES:
        raise refuse(
            argument,
            "be plain arrays (save .npz or .safetensors), because a pickle runs whatever code it "
            "carries and is never loaded",
            f"{path} may be a pickle",
        )


def open_file(argument: str, path: Path) -> Archive:
    """Return the arrays of an .npz, .npy or .safetensors file."""
    kinds = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}
    with decoding(argument, path):
        return kinds[path.suffix.lower()](argument, path)


# NumPy


def _npz(argument: str, path: Path) -> Archive:
    if not zipfile.is_zipfile(path):
        raise refuse(argument, "be a whole .npz archive", f"{path} is cut short or something else")
    headers, entries, places = {}, {}, {}
    # Opened here, because zipfile leaves the file open when the archive's directory is damaged.
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in headers:
                raise refuse(argument, "name each array once", f"{path} holds `{name}` twice")
            entries[name] = entry.filename
            with archive.open(entry) as stored:
                headers[name], inside = _npy_header(argument, f"`{name}` of {path}", stored, entry)
            if inside is not None and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + _ZIP_LENGTHS)
                lengths = int.from_bytes(file.read(2), "little")
                lengths += int.from_bytes(file.read(2), "little")
                start = entry.header_offset + _ZIP_LENGTHS + 4 + lengths + inside.start
                places[name] = Place(path, start, inside.dtype)

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for key in keys:
                with archive.open(entries[key]) as stored:
                    arrays[key] = np.lib.format.read_array(stored, allow_pickle=False)
                    # The checksum is verified at the end of an entry alone.
                    if stored.read(1):
                        raise refuse(argument, "be whole arrays", f"`{key}` of {path} goes on")
        return arrays

    return Archive(path, headers, load, places=places)


# The local header of an entry of a zip file ends with the lengths of its name and of its extras.
_ZIP_LENGTHS = 26


class _Inside(NamedTuple):
    """Where the numbers of an .npy file begin, and their type."""

    start: int
    dtype: np.dtype


def _npy_header(
    argument: str, where: str, stored: Any, entry: zipfile.ZipInfo
) -> tuple[Header, _Inside | None]:
    if not entry.filename.endswith(".npy"):
        return Header((), None, "no array"), None
    try:
        header, start, inside = _read_header(stored)
    except ValueError as error:
        if "descr" not in str(error):
            raise
        return Header((), None, "of another type, as far as NumPy can tell"), None
    _check_size(argument, where, header, entry.file_size - start)
    return header, inside


def _read_header(stored: Any) -> tuple[Header, int, _Inside | None]:
    """Return what the head of an .npy file states, how long it is, and where its numbers lie; None
    for that if they lie by columns, or are objects."""
    form = np.lib.format
    version = form.read_magic(stored)
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, by_columns, dtype = read(stored)
    shape = tuple(int(n) for n in shape)
    if any(n < 0 for n in shape):
        raise ValueError(f"it declares the shape {shape}")
    header, start = Header(shape, _of_raw_bytes(dtype), str(dtype)), stored.tell()
    plain = not (by_columns and len(shape) > 1) and not dtype.hasobject
    return header, start, _Inside(start, dtype) if plain else None


def _check_size(argument: str, where: str, header: Header, stored: int) -> None:
    if header.dtype is not None and not header.dtype.hasobject and header.nbytes != stored:
        check_room(argument, where, header.nbytes)
        raise refuse(
            argument,
            "be whole arrays",
            f"{where} declares {header.nbytes} bytes and holds {stored}",
        )


def _npy(argument: str, path: Path) -> Archive:
    with path.open("rb") as file:
        header, start, inside = _read_header(file)
    _check_size(argument, str(path), header, path.stat().st_size - start)
    places = {} if inside is None else {"array": Place(path, inside.start, inside.dtype)}

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        return {key: np.load(path, allow_pickle=False) for key in keys}

    return Archive(path, {"array": header}, load, places=places)


def _of_raw_bytes(dtype: np.dtype) -> np.dtype | None:
    # np.save does not know bfloat16 and writes it as two raw bytes, as it does no other number. One
    # raw byte may be any of several types of eight bits.
    raw = {np.dtype("V2"): np.dtype(jnp.bfloat16), np.dtype("V1"): None}
    return raw.get(dtype, dtype)


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):
        return array.view(jnp.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


# safetensors

_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _safetensors(argument: str, path: Path) -> Archive:
    # This verifies that the arrays fill the file without gaps. The places of the data are read
    # here, because the library cannot give NumPy the types of eight bits.
    with safetensors.safe_open(path, "np"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
    content.pop("__metadata__", None)
    headers, places, types = {}, {}, {}
    for key, stated in content.items():
        known = _SAFETENSORS.get(stated["dtype"])
        dtype = None if known is None else np.dtype(known)
        headers[key] = Header(tuple(stated["shape"]), dtype, stated["dtype"])
        places[key] = 8 + length + stated["data_offsets"][0]
        stored = stated["data_offsets"][1] - stated["data_offsets"][0]
        if dtype is not None:
            types[key] = dtype.newbyteorder("<")  # by definition of the format
            _check_size(argument, f"`{key}` of {path}", headers[key], stored)

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        with path.open("rb") as file:
            for key in keys:
                header = headers[key]
                file.seek(places[key])
                data = bytearray(header.nbytes)
                if file.readinto(data) != header.nbytes:
                    raise refuse(argument, "be whole arrays", f"`{key}` of {path} is cut short")
                arrays[key] = np.frombuffer(data, types[key]).reshape(header.shape)
        return arrays

    lie = {key: Place(path, places[key], dtype) for key, dtype in types.items()}
    return Archive(path, headers, load, places=lie)


# Zarr


def open_zarr(argument: str, path: Path) -> Archive:
    """Return the arrays of a Zarr v3 group and of the groups in it."""
    try:
        import zarr
    except ImportError as error:
        raise refuse(
            argument,
            f"be .npz unless zarr is installed ({installation('zarr')})",
            f"is {path}",
        ) from error
    if not (path / "zarr.json").exists():
        old = any((path / name).exists() for name in _OLD)
        raise refuse(
            argument,
            "be a Zarr group of version 3 (zarr.save_group with zarr_format=3)",
            f"{path} is of version 2" if old else f"{path} has no zarr.json",
        )
    with decoding(argument, path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of what is refused below
        if json.loads((path / "zarr.json").read_bytes()).get("node_type") == "array":
            raise refuse(argument, "be a Zarr group of arrays", f"{path} is one array")
        # The consolidated copy of the metadata could name arrays that are gone.
        group = zarr.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
        members = dict(group.members(max_depth=None))
    arrays = {key: node for key, node in members.items() if isinstance(node, zarr.Array)}
    headers = {
        key: Header((), None, "a group")
        for key, node in members.items()
        if not isinstance(node, zarr.Array) and not any(k.startswith(f"{key}/") for k in arrays)
    }
    # A folder without metadata is an array that lost it.
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and entry.name not in members:
            headers[entry.name] = Header((), None, "a folder without zarr.json")
    for key, array in arrays.items():
        headers[key] = Header(tuple(array.shape), np.dtype(array.dtype), str(array.dtype))

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        return {key: _zarr_array(argument, f"`{key}` of {path}", arrays[key]) for key in keys}

    return Archive(path, headers, load)


_OLD = (".zgroup", ".zarray", ".zattrs", ".zmetadata")


def _zarr_array(argument: str, where: str, array: Any) -> np.ndarray:
    """Return an array of which every chunk is stored; Zarr fills in those that are not."""
    chunk = math.prod(array.shards or array.chunks) * array.dtype.itemsize
    check_room(argument, f"a chunk of {where}", chunk)
    first = _filled(array, np.nan if array.dtype.kind == "f" else 0)
    if array.dtype.kind == "f" and not np.isnan(first).any():
        return first
    second = _filled(array, 0 if array.dtype.kind == "f" else 1)
    if first.tobytes() != second.tobytes():
        equal = first.view(np.uint8) if first.ndim else first.reshape(1).view(np.uint8)
        other = second.view(np.uint8) if second.ndim else second.reshape(1).view(np.uint8)
        place = np.argwhere(np.atleast_1d(equal != other))[0]
        place = (*place[:-1], place[-1] // array.dtype.itemsize)[: array.ndim]
        raise refuse(
            argument,
            "hold every chunk of its arrays (write_empty_chunks=True stores zeros as well)",
            f"{where} lacks the chunk at index {tuple(int(i) for i in place)}",
        )
    return first


def _filled(array: Any, value: Any) -> np.ndarray:
    import zarr

    inner = array.async_array if hasattr(array, "async_array") else array._async_array
    filling = array.dtype.type(value)
    metadata = dataclasses.replace(inner.metadata, fill_value=filling)
    read = zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=inner.store_path))[...]
    return np.ascontiguousarray(read).reshape(array.shape)


# Orbax


def is_orbax(path: Path) -> bool:
    """Return whether a folder holds arrays written by Orbax, whole or not."""
    return any((path / name).exists() for name in ("_METADATA", "manifest.ocdbt", "_sharding"))


def open_orbax(argument: str, path: Path) -> Archive:
    """Return the arrays of one pytree written by Orbax."""
    import jax
    import orbax.checkpoint as ocp

    path = path.resolve()
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    undecoded = functools.partial(_undecoded, argument, path)

    def stored() -> Any:
        # Orbax keeps an error of reading to itself here.
        found = checkpointer.metadata(path).item_metadata
        if found is None:
            raise refuse(
                argument,
                "hold whole checkpoints of Orbax",
                f"{path} is none or is incomplete",
            )
        return found.tree

    tree = quietly(stored, undecoded)

    def named(leaves: Any) -> list[tuple[str, Any]]:
        return [
            (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(leaves)
        ]

    headers = {key: _orbax_header(leaf) for key, leaf in named(tree)}

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        wanted = set(keys)
        names = iter([key for key, _ in named(tree)])
        item = jax.tree.map(lambda leaf: leaf if next(names) in wanted else ocp.PLACEHOLDER, tree)
        # As NumPy arrays: the devices that it was saved from need not exist here.
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        wanted_only = ocp.args.PyTreeRestore(item=item, restore_args=plain)
        whole = quietly(lambda: checkpointer.restore(path, args=wanted_only), undecoded)
        return {key: np.asarray(leaf) for key, leaf in named(whole) if key in wanted}

    return Archive(path, headers, load)


def _orbax_header(leaf: Any) -> Header:
    kind = str(getattr(leaf, "dtype", None) or type(leaf).__name__)
    try:
        dtype = np.dtype(leaf.dtype)
    except (AttributeError, TypeError):  # text, or the keys of JAX
        dtype = None
    return Header(tuple(getattr(leaf, "shape", None) or ()), dtype, kind)


# Several as one


def joined(path: Path, parts: Mapping[str, Archive], left_out: Mapping[str, str]) -> Archive:
    """Return several archives as one, whose keys begin with the name of their part."""
    place = {f"{name}/{key}": (name, key) for name, part in parts.items() for key in part.headers}
    headers = {key: parts[name].headers[inner] for key, (name, inner) in place.items()}

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name, part in parts.items():
            of_part = [place[key][1] for key in keys if place[key][0] == name]
            if of_part:
                loaded = part.loader(of_part)
                arrays |= {f"{name}/{key}": array for key, array in loaded.items()}
        return arrays

    lie = {
        key: parts[name].places[inner]
        for key, (name, inner) in place.items()
        if inner in parts[name].places
    }
    return Archive(path, headers, load, left_out, tuple(parts), lie)


def sharded(argument: str, path: Path, shards: Sequence[Archive]) -> Archive:
    """Return the shards of one model as one archive, with the keys as they are."""
    owner: dict[str, Archive] = {}
    for shard in shards:
        for key in shard.headers:
            if key in owner:
                both = f"{owner[key].path.name} and {shard.path.name} of {path}"
                raise refuse(argument, "hold each array in one shard", f"{both} hold `{key}`")
            owner[key] = shard

    def load(keys: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for shard in shards:
            own = [key for key in keys if owner[key] is shard]
            arrays |= shard.loader(own) if own else {}
        return arrays

    headers = {key: shard.headers[key] for key, shard in owner.items()}
    lie = {key: shard.places[key] for key, shard in owner.items() if key in shard.places}
    return Archive(path, headers, load, places=lie)
