"""The results of a study on disk: one Zarr store of labeled arrays, filled task by task.

Every number has the dimensions of the study. `done` marks each run: 0 to do, 1 done, 2 failed, for
the reason in `reason`. A task fills a block of its own, file by file, and Zarr replaces each file
as a whole. `done` is written last, so every run that it counts is on disk, however the writer ends.
"""

import datetime
import json
import math
import os
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from esljax._checks import InputError, refuse
from esljax.experiment import (
    QUANTITIES,
    WITH_ERROR,
    Quantity,
    Rows,
    RunConfig,
    memory_of_a_run,
    memory_of_the_machine,
    number_names,
    size,
)
from esljax.files import storage
from esljax.study.description import Slice, Study

TO_DO, DONE, FAILED = 0, 1, 2

_VERSION = 1
# The space that a file of a Zarr chunk takes on a usual disk, however short it is.
_BLOCK = 4096
_UNITS = {
    "temperature": "loss",
    "rate": "squared parameters per unit of loss and step",
    "epsilon": "squared parameters",
}


class StudyStore:
    """The store of a study; a writer must hold its lock."""

    def __init__(self, path: Path, group: Any):
        self.path, self.attributes = path, group.attrs
        self.study = _study(path, group)
        # Opened once, because each opening reads a file.
        self._arrays = dict(group.arrays())
        self._shape = tuple(self.study.dimensions.values())

    @property
    def task_size(self) -> int:
        """The task size that the store was laid out for."""
        return int(self.attributes["task_size"])

    @property
    def done(self) -> np.ndarray:
        """The state of each run, flat: `TO_DO`, `DONE` or `FAILED`."""
        return self._arrays["done"][...].reshape(-1)

    def write(self, indices: np.ndarray, rows: Rows) -> None:
        """Write the rows of some runs, each in its place, and `done` last."""
        places = np.unravel_index(indices, self._shape)
        for name, values in rows.numbers.items():
            self._arrays[name].set_coordinate_selection(places, values)
        self._arrays["converged"].set_coordinate_selection(places, rows.converged)
        self._arrays["reason"].set_coordinate_selection(
            places, np.array(rows.reasons, dtype=object)
        )
        done = np.where([bool(reason) for reason in rows.reasons], FAILED, DONE).astype(np.int8)
        self._arrays["done"].set_coordinate_selection(places, done)

    def read(self, indices: np.ndarray, wanted: tuple[str, ...]) -> Rows:
        """The rows of some runs, with NaN for numbers that this store does not have."""

        def chosen(name):
            return self._arrays[name][...].reshape(-1)[indices]

        numbers = {
            name: chosen(name) if name in self._arrays else np.full(len(indices), np.nan)
            for name in wanted
        }
        return Rows(numbers, chosen("converged"), tuple(str(reason) for reason in chosen("reason")))

    def shared(self, study: Study) -> dict[int, int]:
        """The runs of another study that are done here: their indices there, and here."""
        done = {self.study.point(int(i)): int(i) for i in np.flatnonzero(self.done == DONE)}
        return {i: done[point] for i in range(study.size) if (point := study.point(i)) in done}

    def adopt(self, other: "StudyStore") -> int:
        """Copy runs that are unfinished here and done in another store; return their number."""
        state = self.done
        pairs = [(i, j) for i, j in other.shared(self.study).items() if state[i] == TO_DO]
        if pairs:
            reused = json.loads(self.attributes.get("reused", "{}"))
            reused[str(other.path)] = {
                name: other.attributes[name] for name in ("created", "commit")
            }
            self.attributes["reused"] = json.dumps(reused)
            ours, theirs = np.array(pairs).T
            self.write(ours, other.read(theirs, number_names(self.study.has_errors)))
        return len(pairs)

    def forget(self, indices: np.ndarray) -> None:
        """Mark some runs as to do again."""
        self._arrays["done"].set_coordinate_selection(
            np.unravel_index(indices, self._shape), np.zeros(len(indices), np.int8)
        )


def lock_path(path: Path) -> Path:
    """The lock file of a store, beside it: the same for every link that leads to the store."""
    path = path.resolve()
    if not path.name:
        raise refuse("out", "be a folder of its own", f"is {path}")
    return path.with_name(path.name + ".lock")


def find_store(path: Path, study: Study) -> StudyStore | None:
    """Open the store of a study at `path` to resume it. The caller holds its lock.

    **Returns:** the store, or None if there is nothing at `path`.
    **Raises:** `InputError` if something else is there, the store of another study, or a store made
    with other versions, whose numbers may differ from those of the installed ones.
    """
    _zarr()
    for leftover in path.parent.glob(f"{path.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not path.exists():
        return None
    store = StudyStore(path, _open(path, "r+"))
    difference = study.difference(store.study)
    if difference is not None:
        raise refuse(
            "out",
            "be the store of this study",
            f"{path} differs in {difference}: choose another store, and copy finished runs into it "
            f"by --reuse {path.name}",
        )
    _check_versions("out", store)
    for leftover in path.rglob("*.partial"):
        leftover.unlink(missing_ok=True)
    commits, now = store.attributes["commit"].split(", "), storage.commit() or ""
    if now not in commits:
        store.attributes["commit"] = ", ".join([*commits, now])
    return store


def make_store(path: Path, study: Study, task_size: int) -> StudyStore:
    """Make a new store. The caller holds its lock.

    **Raises:** `InputError` if the disk or the memory has too little room for the results.
    """
    _check_room(path, study, task_size)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    _make(_zarr(), part, study, task_size)
    part.rename(path)
    return StudyStore(path, _open(path, "r+"))


def store_to_reuse(path: Path, study: Study) -> StudyStore:
    """Open another store to copy runs from.

    **Raises:** `InputError` if `path` is no store, was made with other versions, or has no finished
    run of this study.
    """
    store = StudyStore(path, _open(path, "r", "reuse"))
    _check_versions("reuse", store)
    if not store.shared(study):
        difference = study.difference(store.study) if np.any(store.done == DONE) else None
        raise refuse(
            "reuse",
            "hold finished runs of this study",
            f"{path} {f'differs in {difference}' if difference else 'has no finished run'}",
        )
    return store


def read_study(path: str | Path) -> Study:
    """The description of the study whose results a store holds.

    **Raises:** `InputError` if there is no such store.
    """
    return _study(Path(path), _open(Path(path), "r"))


def open_study(path: str | Path) -> Any:
    """Open the results of a study, complete or still being written.

    **Args:** `path`: of the store.
    **Returns:** an `xarray.Dataset`, which reads its arrays when they are used. Its dimensions are
    the fields of the grid, or `point`; its coordinates are the fields that vary. Each variable has
    all dimensions, and `units` and `long_name` among its attributes; numbers are float64, and NaN
    where there are no results. With r for the unit of a model parameter, the variables are

    - `entropy_production` Σ, `length_squared` L², `w2_squared` W2², `gap` Σ - W2², and its parts
      `temporal` and `geometric`: in r².
    - `learning_time` U: in r² per unit of loss.
    - `final_loss`: in nats per example; `test_accuracy`: a share between 0 and 1. Both are means
      over the members at the end of the run.
    - `noise_floor`: the part of Σ that the noise of the steps adds, in r²; NaN unless the transport
      pairs members, as the exact one does.
    - `entropy_production_error` and so on, for the six numbers of the first line: standard errors
      by the jackknife over the members; only if `jackknife` is greater than 0 in some run.
    - `converged`: whether every transport problem of the run was solved, boolean.
    - `done`: 0 to do, 1 done, 2 failed, int8. `reason`: why the run failed, a string.

    Its attributes are strings and integers: `study` (the description, as TOML), `task_size`,
    `created` (the time), `versions` (as JSON), `commit` (of every writer), `version` (of the
    layout), and `reused` (as JSON) for the stores that runs were copied from.

    **Raises:** `InputError` if there is no such store, or if xarray is not installed.

    **Example:**

        >>> import tempfile
        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     study = esl.study.Study(base, grid={"rate": [0.1, 0.2], "seed": range(2)})
        ...     results = esl.study.run_study(study, folder + "/study.zarr")
        ...     gap = esl.study.open_study(folder + "/study.zarr").gap.mean("seed").load()
        >>> gap.dims, gap.shape
        (('rate',), (2,))
    """
    xarray = _xarray()
    path = Path(path)
    study = read_study(path)
    dataset = xarray.open_zarr(path, chunks=None, consolidated=False)
    # As objects, the type of string that every selection by label accepts.
    strings = {
        name: dataset[name].astype(object)
        for name in dataset.variables
        if dataset[name].dtype.kind not in "iufb"
    }
    dataset = dataset.assign(strings)
    ordered = [
        name for name in (*number_names(True), "converged", "done", "reason") if name in dataset
    ]
    # In the order of the study, because a folder lists its files in an arbitrary order.
    variables, coordinates = (
        {name: dataset[name].variable for name in some} for some in (ordered, study.coordinates)
    )
    return xarray.Dataset(variables, coordinates, dataset.attrs)


def _study(path: Path, group: Any) -> Study:
    try:
        content, version = tomllib.loads(group.attrs["study"]), group.attrs["version"]
    except (KeyError, TypeError, tomllib.TOMLDecodeError):
        raise refuse("path", "be the store of a study", f"{path} is none") from None
    if version != _VERSION:
        raise refuse(
            "path",
            f"be a store with layout {_VERSION}",
            f"{path} has layout {version}: read it with the esljax that wrote it",
        )
    return Study.from_dict(content, str(path))


def _check_versions(argument: str, store: StudyStore) -> None:
    difference = storage.difference(json.loads(store.attributes["versions"]), storage.versions())
    if difference is not None:
        raise refuse(
            argument,
            "be a store made with the installed versions",
            f"{store.path} differs: {difference} (install that version, or start a new store)",
        )


def _open(path: Path, mode: Any, argument: str = "path") -> Any:
    zarr = _zarr()
    if not path.exists():
        raise refuse(argument, "be the store of a study", f"there is nothing at {path}")
    try:
        return zarr.open_group(str(path), mode=mode, zarr_format=3)
    except (OSError, ValueError, KeyError) as error:
        raise refuse(argument, "be the store of a study", f"{path} is none") from error


def _make(zarr: ModuleType, path: Path, study: Study, task_size: int) -> None:
    """Lay out a store: its attributes, and arrays filled with "to do" and NaN."""
    about = {
        "version": _VERSION,
        "study": storage.toml(study.as_dict()),
        "task_size": task_size,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(storage.versions()),
        "commit": storage.commit() or "",
    }
    group = zarr.create_group(str(path), zarr_format=3, attributes=about)
    layout = {
        "shape": tuple(study.dimensions.values()),
        "chunks": study.chunks(task_size),
        "dimension_names": tuple(study.dimensions),
    }

    def variable(name: str, dtype: str, fill: Any, words: str, **more: str) -> None:
        group.create_array(
            name, dtype=dtype, fill_value=fill, attributes={"long_name": words, **more}, **layout
        )

    for quantity in _quantities(study):
        variable(quantity.name, "float64", np.nan, quantity.words, units=quantity.units)
    variable("converged", "bool", False, "whether every transport problem of the run was solved")
    variable("reason", "string", "", "why the run failed")
    flags = {"flag_values": "0 1 2", "flag_meanings": "to_do done failed"}
    variable("done", "int8", TO_DO, "state of the run", **flags)
    for name, (dimension, values) in study.coordinates.items():
        _add_coordinate(group, name, dimension, values)


def _add_coordinate(group: Any, name: str, dimension: str, values: tuple) -> None:
    labels = _labels(values)
    units = {"units": _UNITS[name]} if name in _UNITS else {}
    array = group.create_array(
        name,
        shape=labels.shape,
        dtype="string" if labels.dtype == object else labels.dtype,
        dimension_names=(dimension,),
        attributes={"long_name": name.replace("_", " "), **units},
    )
    array[...] = labels


def _quantities(study: Study) -> list[Quantity]:
    """The numbers stored of each run, with standard errors if some run has them."""
    if not study.has_errors:
        return list(QUANTITIES)
    errors = [
        Quantity(f"{q.name}_error", q.units, f"standard error of {q.words}")
        for q in QUANTITIES
        if q.name in WITH_ERROR
    ]
    return [*QUANTITIES, *errors]


def _labels(values: tuple) -> np.ndarray:
    if isinstance(values[0], tuple):
        return np.array([",".join(map(str, value)) for value in values], dtype=object)
    return np.array(values, dtype=object if isinstance(values[0], str) else None)


def _check_room(path: Path, study: Study, task_size: int) -> None:
    """Reject results that would not fit, by an estimate, before anything is written."""
    if not path.parent.is_dir():
        raise refuse("out", "be in a folder that exists", f"{path.parent} does not")
    variables = len(number_names(study.has_errors)) + 3
    lengths = zip(study.dimensions.values(), study.chunks(task_size), strict=True)
    chunks = math.prod(-(-length // step) for length, step in lengths)
    on_disk = variables * max(8 * study.size, _BLOCK * chunks)
    free = shutil.disk_usage(path.parent).free
    if on_disk > free:
        raise refuse(
            "out",
            f"have room for {study.size:,} runs, about {size(on_disk)}",
            f"{path.parent} has {size(free)} left",
        )
    # The numbers when they are read, and the list of tasks.
    in_memory = variables * 8 * study.size + 200 * study.size
    available = memory_of_the_machine()
    if in_memory > available:
        raise refuse(
            "grid",
            f"fit in the {size(available)} of memory of this machine",
            f"the results of {study.size:,} runs need about {size(in_memory)}",
        )


def check_memory(study: Study, slices: list[Slice]) -> None:
    """Reject a run that this machine cannot hold, by an estimate from its shapes.

    **Raises:** `InputError`, naming the run and the memory that it needs.
    """
    available = memory_of_the_machine()
    for part in slices:
        config: RunConfig = study.point(int(part.indices[0]))
        needed = memory_of_a_run(config)
        if needed > available:
            raise refuse(
                "members",
                f"fit in the {size(available)} of memory of this machine",
                f"{config.members} members of hidden {config.hidden} over {config.snapshots} "
                f"snapshots need about {size(needed)}",
            )


def _zarr() -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise _missing("zarr") from error
    return zarr


def _xarray() -> ModuleType:
    try:
        import xarray
    except ImportError as error:
        raise _missing("xarray") from error
    return xarray


def _missing(module: str) -> InputError:
    return InputError(
        f"Studies need {module}, which is not installed: {storage.installation('studies')}."
    )
