r"""Training runs made elsewhere, read from disk: a file of snapshots or a folder of checkpoints.

    snapshots.npz    `positions` (J+1, n, d) or `features` (J+1, n, p), optionally `times` (J+1,)
    snapshots.zarr   a Zarr v3 group of the same arrays; needs the extra `zarr`
    folder/          member_000/step_000100.npz, member_000/step_000200.npz, ..., member_001/...

**Checkpoints.** The last number in a folder's name is the member, and the last number in a
checkpoint's name is its time (digits, with or without decimals: `epoch_2.5.npz` is 2.5). Names
without a number are ignored. A checkpoint is a plain `.npz`, a `.safetensors` or a folder written
by Orbax. All its arrays, raveled in the sorted order of their keys, are one member, so it should
hold parameters alone, without the state of an optimizer. Integers are rejected in checkpoints,
where they are counters; a file of snapshots may hold them. bfloat16 is read everywhere.

**Pickles** (`.pt`, `.pth`, `.pkl`, object arrays) are never loaded, because a pickle runs whatever
code it carries. Any error of a decoder on a broken file becomes an `InputError`.
"""

import contextlib
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from esljax._checks import InputError, first_sentence, refuse
from esljax.files.storage import installation

_LAYOUT = (
    "hold one folder for each member, each with its checkpoints, as in member_000/step_000100.npz"
)
# Suffixes of files that are usually pickles; only opening one would show whether it is.
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin")
_FILES = (".npz", ".safetensors")


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


def read(path: str | Path) -> Recording:
    """Read a training run from `.npz`, `.zarr` or a folder of checkpoints.

    **Args:** `path`: the file or folder, laid out as this module describes.
    **Returns:** `Recording`. `esl.from_snapshots` checks its shapes and values.
    **Raises:** `InputError` if anything is missing, broken or pickled, or if checkpoints differ in
    their keys or shapes, or members in their times.

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
    path = Path(path)
    _refuse_pickle("recording", path)
    with _decoding("recording", path):
        if not path.exists():
            raise refuse("recording", "be a file or folder", f"{path} does not exist")
        if path.suffix == ".zarr" or (path / "zarr.json").exists():
            return _snapshots(path, _zarr_group(path))
        if path.is_dir():
            return _checkpoints(path)
        if path.suffix == ".npz":
            return _snapshots(path, _npz("recording", path, ("positions", "features", "times")))
    raise refuse("recording", "be .npz, .zarr or a folder of checkpoints", f"is {path}")


def read_matrix(path: str | Path) -> np.ndarray:
    """Read the projection stored as `matrix` (d, p) in an `.npz` file.

    **Returns:** the array, of any real type.
    **Raises:** `InputError` if the file is missing or broken, or holds no such finite array.

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
    _refuse_pickle("project", path)
    with _decoding("project", path):
        if not path.is_file():
            raise refuse(
                "project", "be 'pca', 'random', 'none' or an .npz file", f"{path} does not exist"
            )
        arrays = _npz("project", path, ("matrix",))
    if "matrix" not in arrays:
        raise refuse("project", "hold an array `matrix` (d, p)", f"{path} holds none")
    matrix = arrays["matrix"]
    if matrix.ndim != 2 or not matrix.size or not _is_real(matrix.dtype):
        raise refuse(
            "project",
            "hold an array `matrix` (d, p) of numbers",
            f"that of {path} is {matrix.shape} of {matrix.dtype}",
        )
    if not np.all(np.isfinite(matrix)):
        raise refuse("project", "hold a finite `matrix`", f"that of {path} is not")
    return matrix


def _snapshots(path: Path, arrays: Mapping[str, np.ndarray]) -> Recording:
    named = [name for name in ("positions", "features") if name in arrays]
    if len(named) != 1:
        raise refuse(
            "recording",
            "hold either `positions` or `features`",
            f"{path} holds {'both' if named else 'neither'}",
        )
    return Recording(arrays[named[0]], arrays.get("times"), observed=named == ["features"])


@contextlib.contextmanager
def _decoding(argument: str, path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise refuse(
            argument, "be readable", f"{path} gives: {error.strerror or first_sentence(error)}"
        ) from error
    except Exception as error:
        # On arbitrary bytes each decoder fails in its own way (struct, zlib, syntax, memory, ...).
        raise refuse(
            argument, "be a whole, readable file", f"{path} is not: {first_sentence(error)}"
        ) from error


def _refuse_pickle(argument: str, path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise refuse(
            argument,
            "be plain arrays (save .npz or .safetensors), because a pickle runs whatever code it "
            "carries and is never loaded",
            f"{path} may be a pickle",
        )


def _npz(argument: str, path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an archive, or those of the given names that it has."""
    if not zipfile.is_zipfile(path):
        raise refuse(argument, "be a whole .npz archive", f"{path} is cut short or something else")
    # Opened here, because NumPy leaves the file open when the archive's directory is damaged.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        wanted = (
            archive.files if names is None else [name for name in names if name in archive.files]
        )
        return {
            name: _stored(argument, f"`{name}` of {path}", lambda name=name: archive[name])
            for name in wanted
        }


def _stored(argument: str, where: str, load: Any) -> np.ndarray:
    try:
        array = load()
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise refuse(
                argument,
                "be plain arrays, because a pickle runs whatever code it carries",
                f"{where} is pickled",
            ) from error
        raise
    if not isinstance(array, np.ndarray):
        raise refuse(argument, "be plain arrays", f"{where} is none")
    # np.save does not know bfloat16 and writes it as two raw bytes, as it does no other number.
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def _zarr_group(path: Path) -> dict[str, np.ndarray]:
    try:
        import zarr
    except ImportError as error:
        raise refuse(
            "recording",
            f"be .npz unless zarr is installed ({installation('zarr')})",
            f"is {path}",
        ) from error
    group = zarr.open_group(str(path), mode="r", zarr_format=3)
    arrays = {}
    for name in ("positions", "features", "times"):
        if name in group:
            array = group[name]
            if not isinstance(array, zarr.Array):
                raise refuse("recording", "hold arrays", f"`{name}` of {path} is a group")
            arrays[name] = np.asarray(array[...])
    return arrays


def _checkpoints(folder: Path) -> Recording:
    """All members of a folder at all times; the first checkpoint is the model of the others."""
    table = _files_by_member_and_time(folder)
    members, first = sorted(table), next(iter(table))
    times = sorted(table[first])
    origin = table[first][times[0]]
    model = _parameters(origin)
    dtype = np.result_type(np.float32, *(array.dtype for array in model.values()))
    size = sum(array.size for array in model.values())
    positions = np.empty((len(times), len(members), size), dtype)
    for j, time in enumerate(times):
        for i, member in enumerate(members):
            path = table[member][time]
            parameters = _parameters(path)
            _compare(path, parameters, origin, model)
            positions[j, i] = np.concatenate(
                [parameters[key].ravel().astype(dtype) for key in sorted(parameters)]
            )
    return Recording(positions, np.array(times), observed=False)


def _files_by_member_and_time(folder: Path) -> dict[float, dict[float, Path]]:
    """The checkpoint of each member at each time; every member has the same times."""
    members = _numbered(folder, [entry for entry in _entries(folder) if entry.is_dir()])
    if not members:
        raise refuse("recording", _LAYOUT, f"{folder} has no folder with a number in its name")
    table = {member: _numbered(inside, _candidates(inside)) for member, inside in members.items()}
    first = next(iter(table))
    for member, files in table.items():
        if not files:
            raise refuse(
                "recording",
                _LAYOUT,
                f"{members[member]} has no .npz, .safetensors or Orbax folder with a number in its "
                "name",
            )
        odd = sorted(set(files) ^ set(table[first]))
        if odd:
            lacking = member if odd[0] in table[first] else first
            raise refuse(
                "recording",
                "hold every member at every time",
                f"{members[lacking]} has no checkpoint at {odd[0]:.12g}",
            )
    return table


def _entries(folder: Path) -> list[Path]:
    # The leftovers of an interrupted Orbax end in a number as well.
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and ".orbax-checkpoint-tmp" not in entry.name
    )


def _candidates(folder: Path) -> list[Path]:
    candidates = []
    for entry in _entries(folder):
        if _number(entry) is not None:
            _refuse_pickle("recording", entry)
            if entry.is_dir() or entry.suffix in _FILES:
                candidates.append(entry)
    return candidates


def _number(path: Path) -> float | None:
    numbers = re.findall(
        r"\d+(?:\.\d+)?", path.stem if path.suffix in (*_FILES, *_PICKLES) else path.name
    )
    return float(numbers[-1]) if numbers else None


def _numbered(folder: Path, entries: Iterable[Path]) -> dict[float, Path]:
    numbered: dict[float, Path] = {}
    for entry in entries:
        number = _number(entry)
        if number in numbered:
            raise refuse(
                "recording",
                "name each member and time once",
                f"{folder} has both {numbered[number].name} and {entry.name}",
            )
        if number is not None:
            numbered[number] = entry
    return numbered


def _parameters(path: Path) -> dict[str, np.ndarray]:
    with _decoding("recording", path):
        if path.is_dir():
            parameters = _orbax(path)
        elif path.suffix == ".npz":
            parameters = _npz("recording", path)
        else:
            parameters = safetensors.numpy.load_file(path)
    for key, array in parameters.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise refuse(
                "recording",
                "hold floating-point parameters alone",
                f"`{key}` of {path} has dtype {array.dtype}",
            )
    if not sum(array.size for array in parameters.values()):
        raise refuse("recording", "hold parameters", f"{path} holds none")
    return parameters


def _orbax(path: Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    # A CheckpointManager keeps the only item of a checkpoint one folder down.
    path = (path / "default" if (path / "default").is_dir() else path).resolve()
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with _silence("absl"):
        stored = checkpointer.metadata(path).item_metadata
        if stored is None:
            raise refuse(
                "recording",
                "hold Orbax checkpoints in the folders of a member",
                f"{path} is none or is incomplete",
            )
        # As NumPy arrays: the devices that it was saved from need not exist here.
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.tree)
        tree = checkpointer.restore(path, restore_args=plain)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
        for keys, leaf in leaves
    }


@contextlib.contextmanager
def _silence(name: str) -> Iterator[None]:
    """Silence a logger that repeats the error which is raised anyway."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _compare(
    path: Path, parameters: Mapping[str, np.ndarray], origin: Path, model: Mapping[str, np.ndarray]
) -> None:
    odd = sorted(set(parameters) ^ set(model))
    if odd:
        lacks, has = (path, origin) if odd[0] in model else (origin, path)
        raise refuse(
            "recording",
            "hold the same keys in every checkpoint",
            f"{lacks} lacks `{odd[0]}`, which {has} has",
        )
    for key, array in parameters.items():
        if array.shape != model[key].shape:
            raise refuse(
                "recording",
                "hold parameters of one shape in every checkpoint",
                f"`{key}` has {model[key].shape} in {origin} and {array.shape} in {path}",
            )


def _is_real(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
