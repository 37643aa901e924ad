r"""Training runs made elsewhere, read from disk: a file of snapshots or a folder of checkpoints.

    snapshots.npz    `positions` (J+1, n, d) or `features` (J+1, n, p), optionally `times` (J+1,)
    snapshots.zarr   a Zarr v3 group of the same arrays; needs the extra `zarr`
    snapshots.npy    positions alone
    folder/          member_000/step_000100.npz, member_000/step_000200.npz, ..., member_001/...

**Checkpoints.** The number in which the names of folders differ is the member, and the number in
which the names of checkpoints differ is their time (see `names`). A checkpoint is an `.npz`, an
`.npy`, a `.safetensors` or a folder of such or of Orbax (see `layouts`). Its parameters, raveled in
the sorted order of their keys, are one member. What lies beside the parameters is left out where
its name tells it apart, and refused where it does not (see `companions`). Integers are rejected in
checkpoints; a file of snapshots may hold them. bfloat16 and types of eight bits are read from
safetensors and Orbax.

**Pickles** (`.pt`, `.pth`, `.pkl`, object arrays) are never loaded (see `archives`).
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esljax._checks import in_words, refuse
from esljax.files.archives import (
    Archive,
    Header,
    check_room,
    decoding,
    open_file,
    open_zarr,
    read_part,
    refuse_pickle,
)
from esljax.files.companions import Choice, Selection, several
from esljax.files.layouts import by_member_and_time, open_checkpoint
from esljax.files.names import patterns


class Recording(NamedTuple):
    """The members of a run at J+1 snapshots, as they were stored.

    `esl.from_snapshots(recording.positions, recording.times)` makes a `Trajectory` of it.
    """

    positions: np.ndarray
    """Shape (J+1, n, d), or the features (J+1, n, p) of an observed run."""
    times: np.ndarray | None
    """When the snapshots were taken, shape (J+1,), in the stored unit; None if not stored."""
    observed: bool
    """Whether `positions` holds features (J+1, n, p) rather than positions."""
    keys: Mapping[str, tuple[int, ...]] | None = None
    """The shape of each parameter, in the order in which they are raveled; None without names."""
    left_out: Mapping[str, str] = MappingProxyType({})
    """Keys that are not among the positions, and why."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """The members of a run at J+1 snapshots, on disk."""

    path: Path
    shape: tuple[int, int, int]
    """J+1, n and d."""
    times: np.ndarray | None
    """When the snapshots were taken, shape (J+1,); None if not stored."""
    dtype: np.dtype
    """The floating type in which all numbers fit."""
    keys: Mapping[str, tuple[int, ...]] | None
    """The shape of each parameter, in the order in which they are raveled; None without names."""
    observed: bool
    """Whether the members are features."""
    left_out: Mapping[str, str]
    """Keys that are not among the positions, and why."""
    archives: Mapping[tuple[int, int], Archive]
    """The checkpoints by snapshot and member; empty for a file of snapshots."""
    file: tuple[Archive, str] | None = None
    """The file of snapshots, and the name of the members in it."""

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers of a member each parameter holds; all are one without names."""
        if self.keys is None:
            return {"": self.shape[2]}
        return {key: math.prod(shape) for key, shape in self.keys.items()}

    @property
    def nbytes(self) -> int:
        """The bytes of all members in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def in_parts(self, key: str) -> bool:
        """Whether a parameter can be read in parts: it is not where it lies compressed, in chunks
        or by columns."""
        if self.file is not None:
            archive, name = self.file
            return name in archive.places
        return all(key in archive.places for archive in self.archives.values())

    def files(self) -> dict[str, tuple[int, int]]:
        """Return the size and the time of change of each file whose numbers are read, and of what
        else is in the folder of a checkpoint.

        **Raises:** `InputError` for one that is gone.
        """
        archives = [self.file[0]] if self.file is not None else list(self.archives.values())
        found = {place.path for archive in archives for place in archive.places.values()}
        with decoding("recording", self.path):
            for path in {archive.path for archive in archives}:
                found |= {each for each in path.rglob("*") if each.is_file()} or {path}
            states = {str(path): path.stat() for path in sorted(found)}
        return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}

    def read(self, key: str, skipped: int, out: np.ndarray) -> None:
        """Fill `out`, shape (J+1, n, count), with the numbers of a parameter after the first
        `skipped` of them.

        **Raises:** `InputError` for a file that is damaged.
        """
        snapshots, members, d = self.shape
        if self.file is not None:
            archive, name = self.file
            if name not in archive.places:
                whole = archive.load("recording", [name])[name]
                out[...] = whole[:, :, skipped : skipped + out.shape[2]]
                return
            place = archive.places[name]
            for j in range(snapshots):
                for i in range(members):
                    row = (j * members + i) * d + skipped
                    read_part("recording", name, place, row, out[j, i])
            return
        for (j, i), archive in self.archives.items():
            if key in archive.places:
                read_part("recording", key, archive.places[key], skipped, out[j, i])
            else:
                whole = archive.load("recording", [key])[key].ravel()
                out[j, i] = whole[skipped : skipped + out.shape[2]]


def read(
    path: str | Path,
    *,
    only: Iterable[str] | str = (),
    skip: Iterable[str] | str = (),
    name: str | None = None,
) -> Recording:
    """Read a training run from `.npz`, `.zarr` or a folder of checkpoints.

    **Args:**
    - `path`: the file or folder, laid out as this module describes.
    - `only`, `skip`: patterns of the keys to measure and to leave out, such as `params/*`, matched
      against whole keys with case; `/` and `.` are the same. A pattern of `only` also settles what
      names leave open.
    - `name`: the pattern of the checkpoints that count, with `{}` for their time and `*` for what
      may vary beside it, such as `step_{}`; or with that of the members, `member_{}/step_{}`.

    **Returns:** `Recording`. `esl.from_snapshots` checks its shapes and values.
    **Raises:** `InputError` if anything is missing, broken or pickled; if checkpoints differ in
    their keys or shapes, or members in their times; if names of one level differ in more than a
    number; if a key may be a parameter or not; or if a pattern matches nothing.

    **Example:**

        >>> import tempfile
        >>> import numpy as np
        >>> import esljax as esl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/run.npz", positions=np.zeros((3, 8, 2)), times=[0, 10, 50])
        ...     recording = esl.recordings.read(folder + "/run.npz")
        >>> recording.positions.shape, recording.times.tolist()
        ((3, 8, 2), [0, 10, 50])
    """
    path, selection = _path(path), Selection(only, skip)
    if _is_folder(path):
        return _checkpoints(path, selection, name)
    return _snapshots(_snapshot_file(path, name), selection)


def open_stored(
    path: str | Path,
    *,
    only: Iterable[str] | str = (),
    skip: Iterable[str] | str = (),
    name: str | None = None,
) -> "Stored":
    """Return a training run as it lies on disk, of which any part can be read.

    **Args:** as of `read`.
    **Raises:** `InputError`, as `read` does for what headers tell; damage of the numbers themselves
    is found where they are read. Checksums are not verified.
    """
    path, selection = _path(path), Selection(only, skip)
    if _is_folder(path):
        found = _opened(path, selection, name)
        return Stored(
            path,
            found.shape,
            np.array(found.times),
            found.dtype,
            found.keys,
            False,
            MappingProxyType(found.left_out),
            found.archives,
        )
    archive = _snapshot_file(path, name)
    choice, named = _chosen(archive, selection)
    archive.check("recording", choice.kept)
    header = archive.headers[named]
    if header.dtype is None or len(header.shape) != 3 or not _is_real(header.dtype):
        raise refuse(
            "recording",
            f"hold numbers of shape (snapshots, members, numbers) as `{named}`",
            f"{path} holds {header.kind} of shape {header.shape}",
        )
    times = archive.load("recording", ["times"])["times"] if "times" in choice.kept else None
    floating = jnp.issubdtype(header.dtype, jnp.floating)
    dtype = np.result_type(np.float32, header.dtype) if floating else np.dtype(np.float64)
    left_out = MappingProxyType(choice.left_out)
    observed = named == "features"
    return Stored(path, header.shape, times, dtype, None, observed, left_out, {}, (archive, named))


def _path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise refuse("recording", "be a path", f"is {in_words(path)}")
    path = Path(path)
    refuse_pickle("recording", path)
    with decoding("recording", path):
        exists = path.exists()
    if not exists:
        raise refuse("recording", "be a file or folder", f"{path} does not exist")
    return path


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder of checkpoints rather than one of a Zarr group."""
    with decoding("recording", path):
        return path.is_dir() and not (path.suffix == ".zarr" or (path / "zarr.json").exists())


def _snapshot_file(path: Path, name: str | None) -> Archive:
    if name is not None:
        patterns(name)
        raise refuse("name", "choose checkpoints in a folder", f"{path} is a file of snapshots")
    if path.is_dir():
        return open_zarr("recording", path)
    if path.suffix.lower() in (".npz", ".npy"):
        return open_file("recording", path)
    must = "be .npz, .zarr or a folder of checkpoints"
    if path.suffix.lower() == ".safetensors":
        raise refuse("recording", f"{must} (member_000/step_000100.safetensors)", f"is {path}")
    raise refuse("recording", must, f"is {path}")


def read_matrix(path: str | Path) -> np.ndarray:
    """Read the projection stored as `matrix` (d, p) in an `.npz` file.

    **Returns:** the array, of any real type.
    **Raises:** `InputError` if the file is missing or broken, or holds no such finite array, or
    others.

    **Example:**

        >>> import tempfile
        >>> import numpy as np
        >>> import esljax as esl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/project.npz", matrix=np.eye(3)[:, :2])
        ...     esl.recordings.read_matrix(folder + "/project.npz").shape
        (3, 2)
    """
    path = Path(path)
    refuse_pickle("project", path)
    with decoding("project", path):
        exists = path.is_file()
    if not exists or path.suffix.lower() != ".npz":
        was = f"is {path}" if exists else f"{path} does not exist"
        raise refuse("project", "be 'pca', 'random', 'none' or an .npz file", was)
    archive = open_file("project", path)
    if "matrix" not in archive.headers:
        raise refuse("project", "hold an array `matrix` (d, p)", f"{path} holds none")
    _refuse_unknown("project", path, archive.headers, ("matrix",))
    matrix = archive.load("project", ["matrix"])["matrix"]
    if matrix.ndim != 2 or not matrix.size or not _is_real(matrix.dtype):
        raise refuse(
            "project",
            "hold an array `matrix` (d, p) of numbers",
            f"that of {path} is {matrix.shape} of {matrix.dtype}",
        )
    if not np.all(np.isfinite(matrix)):
        raise refuse("project", "hold a finite `matrix`", f"that of {path} is not")
    return matrix


# A file of snapshots

_SNAPSHOTS = ("positions", "features", "times")


def _snapshots(archive: Archive, selection: Selection) -> Recording:
    choice, named = _chosen(archive, selection)
    arrays = archive.load("recording", choice.kept)
    return Recording(
        arrays[named],
        arrays.get("times"),
        observed=named == "features",
        left_out=MappingProxyType(choice.left_out),
    )


def _chosen(archive: Archive, selection: Selection) -> tuple[Choice, str]:
    """Return what a file of snapshots holds, and the name of the members among it."""
    path = archive.path
    choice = selection.plain(archive.headers)
    selection.check_used(str(path))
    if path.suffix.lower() == ".npy" and choice.kept:
        return choice, "array"
    named = [name for name in ("positions", "features") if name in choice.kept]
    if len(named) != 1:
        unknown = [key for key in choice.kept if key not in _SNAPSHOTS]
        instead = f" but {several(unknown)}" if unknown and not named else ""
        raise refuse(
            "recording",
            "hold either `positions` or `features`",
            f"{path} holds {'both' if named else 'neither'}{instead}",
        )
    _refuse_unknown("recording", path, choice.kept, _SNAPSHOTS)
    return choice, named[0]


def _refuse_unknown(argument: str, path: Path, names: Iterable[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0].lower(), known, n=1, cutoff=0.5)
        meant = f" (did you mean `{near[0]}`?)" if near else ""
        listed = ", ".join(f"`{name}`" for name in known)
        advice = "" if argument == "project" else f", or skip={unknown[0]!r}"
        raise refuse(
            argument,
            f"hold no other arrays than {listed}{advice}",
            f"{path} holds {several(unknown)}{meant}",
        )


def _is_real(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


# A folder of checkpoints


class _Folder(NamedTuple):
    """The checkpoints of a folder, opened and held against each other."""

    archives: dict[tuple[int, int], Archive]
    """By snapshot and member."""
    times: list[float]
    members: int
    model: dict[str, Header]
    """The parameters, in the order in which they are raveled."""
    dtype: np.dtype
    """The type in which all of them fit."""
    left_out: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the positions: snapshots, members and numbers."""
        size = sum(header.size for header in self.model.values())
        return len(self.times), self.members, size

    @property
    def keys(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter, by its name."""
        return MappingProxyType({key: header.shape for key, header in self.model.items()})


def _opened(folder: Path, selection: Selection, name: str | None) -> _Folder:
    """All members of a folder at all times; the first checkpoint is the model of the others."""
    table = by_member_and_time(folder, name)
    members, first = sorted(table), next(iter(table))
    times = sorted(table[first])
    opened = {
        (j, i): open_checkpoint(table[member][time])
        for j, time in enumerate(times)
        for i, member in enumerate(members)
    }
    choices = {place: selection.parameters(one.headers) for place, one in opened.items()}
    selection.check_used(f"the checkpoints of {folder}")
    left_out = {key: why for choice in choices.values() for key, why in choice.left_out.items()}
    for archive in opened.values():
        left_out |= archive.left_out
    for place, archive in opened.items():
        _check(archive, choices[place], selection)
    origin = opened[0, members.index(first)]
    kept = sorted(choices[0, members.index(first)].kept)
    model = {key: origin.headers[key] for key in kept}
    for place, archive in opened.items():
        headers = {key: archive.headers[key] for key in choices[place].kept}
        _compare(archive.path, headers, origin.path, model)
    types = [archive.headers[key].dtype for archive in opened.values() for key in kept]
    # By size: NumPy knows no type in which float16, bfloat16 and those of eight bits all fit.
    wide = any(dtype is not None and dtype.itemsize > 4 for dtype in types)
    dtype = np.dtype(np.float64 if wide else np.float32)
    return _Folder(opened, times, len(members), model, dtype, left_out)


def _checkpoints(folder: Path, selection: Selection, name: str | None) -> Recording:
    """All members of a folder at all times, in memory."""
    found = _opened(folder, selection, name)
    check_room("recording", str(folder), found.dtype.itemsize * math.prod(found.shape))
    positions = np.empty(found.shape, found.dtype)
    for (j, i), archive in found.archives.items():
        parameters = archive.load("recording", found.model)
        flat = [parameters[key].ravel().astype(found.dtype) for key in found.model]
        positions[j, i] = np.concatenate(flat)
    return Recording(
        positions,
        np.array(found.times),
        observed=False,
        keys=found.keys,
        left_out=MappingProxyType(found.left_out),
    )


def _check(archive: Archive, choice: Choice, selection: Selection) -> None:
    """Reject a checkpoint whose parameters are not floating, not there or not told apart."""
    path = archive.path
    if choice.doubtful:
        (key, reason) = next(iter(choice.doubtful.items()))
        raise refuse(
            "recording",
            "hold parameters that names tell apart from what lies beside them (choose by only or "
            f"skip, as in skip={key!r})",
            f"{several(list(choice.doubtful))} of {path} may be {reason}",
        )
    for key in choice.kept:
        header = archive.headers[key]
        archive.check("recording", [key])
        if header.dtype is not None and not jnp.issubdtype(header.dtype, jnp.floating):
            raise refuse(
                "recording",
                f"hold floating-point parameters alone (leave others out by skip={key!r})",
                f"`{key}` of {path} has dtype {header.dtype}",
            )
    if not sum(archive.headers[key].size for key in choice.kept):
        why = ""
        if choice.left_out:
            why = f" besides what is left out: {several(list(choice.left_out))}"
        raise refuse("recording", "hold parameters", f"{path} holds none{why}")
    parts = [part for part in archive.parts if _has(part, choice.kept)]
    if len(parts) > 1 and not selection:
        raise refuse(
            "recording",
            f"hold the parameters once (choose by only='{parts[0]}/*', or take all by only='*')",
            f"{path} holds them in {several(parts)}",
        )


def _has(part: str, keys: Iterable[str]) -> bool:
    return any(key.startswith(f"{part}/") for key in keys)


def _compare(
    path: Path, parameters: Mapping[str, Header], origin: Path, model: Mapping[str, Header]
) -> None:
    odd = sorted(set(parameters) ^ set(model))
    if odd:
        lacks, has = (path, origin) if odd[0] in model else (origin, path)
        raise refuse(
            "recording",
            "hold the same keys in every checkpoint",
            f"{lacks} lacks `{odd[0]}`, which {has} has",
        )
    for key, header in parameters.items():
        if header.shape != model[key].shape:
            raise refuse(
                "recording",
                "hold parameters of one shape in every checkpoint",
                f"`{key}` has {model[key].shape} in {origin} and {header.shape} in {path}",
            )
