"""The results of a study on disk: one Zarr store of labelled arrays, filled task by task, that survives any end of its writer.

Every number has the dimensions of the study. `done` says what is there: 0 to do, 1 done, 2 failed, for the reason in `reason`. A task
fills a block of its own, file by file, each of which Zarr replaces as a whole; `done` comes last, so a run that it counts is on disk.
"""

import datetime
import json
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
# What a file of a Zarr chunk takes on a usual disk, however short it is.
_BLOCK = 4096
_UNITS = {
    "temperature": "loss",
    "rate": "squared parameters per unit of loss and step",
    "epsilon": "squared parameters",
}


class StudyStore:
    """The store of a study; who writes to it holds its lock."""

    def __init__(self, path: Path, group: Any):
        self.path, self.attributes = path, group.attrs
        self.study = _study(path, group)
        # Opened once: each opening reads a file.
        self._arrays = dict(group.arrays())
        self._shape = tuple(self.study.dimensions.values())

    @property
    def task_size(self) -> int:
        """The task size that the store was laid out for."""
        return int(self.attributes["task_size"])

    @property
    def done(self) -> np.ndarray:
        """What is there of each run, flat: `TO_DO`, `DONE` or `FAILED`."""
        return self._arrays["done"][...].reshape(-1)

    def write(self, indices: np.ndarray, rows: Rows) -> None:
        """The rows of some runs, each in its place; `done` last."""
        places = np.unravel_index(indices, self._shape)
        for name, values in rows.numbers.items():
            self._arrays[name].set_coordinate_selection(places, values)
        self._arrays["converged"].set_coordinate_selection(places, rows.converged)
        self._arrays["reason"].set_coordinate_selection(
            places, np.array(rows.reasons, dtype=object)
        )
        done = np.where([bool(reason) for reason in rows.reasons], FAILED, DONE).astype(np.int8)
        self._arrays["done"].set_coordinate_selection(places, done)

    def shared(self, study: Study) -> dict[int, int]:
        """The runs that are done here and asked for there: their indices in that study, and in this one."""
        done = {self.study.point(int(i)): int(i) for i in np.flatnonzero(self.done == DONE)}
        return {i: done[point] for i in range(study.size) if (point := study.point(i)) in done}

    def adopt(self, other: "StudyStore") -> int:
        """Take over from another store the runs that are to do here and done there, and say how many they were."""
        state = self.done
        pairs = [
            (here, there)
            for here, there in other.shared(self.study).items()
            if state[here] == TO_DO
        ]
        if pairs:
            reused = json.loads(self.attributes.get("reused", "{}"))
            reused[str(other.path)] = {
                name: other.attributes[name] for name in ("created", "commit")
            }
            self.attributes["reused"] = json.dumps(reused)
            here, there = np.array(pairs).T
            self.write(here, other.read(there, number_names(self.study.has_errors)))
        return len(pairs)

    def read(self, indices: np.ndarray, wanted: tuple[str, ...]) -> Rows:
        """The rows of some runs; NaN for the standard errors of runs that were asked for none."""

        def chosen(name):
            return self._arrays[name][...].reshape(-1)[indices]

        numbers = {
            name: chosen(name) if name in self._arrays else np.full(len(indices), np.nan)
            for name in wanted
        }
        return Rows(numbers, chosen("converged"), tuple(str(reason) for reason in chosen("reason")))

    def forget(self, indices: np.ndarray) -> None:
        """Count some runs as to do again."""
        self._arrays["done"].set_coordinate_selection(
            np.unravel_index(indices, self._shape), np.zeros(len(indices), np.int8)
        )


def lock_path(path: Path) -> Path:
    """The lock file of a store, beside it: one, whatever links lead to the store."""
    path = path.resolve()
    if not path.name:
        raise refuse("out", "be a folder of its own", f"is {path}")
    return path.with_name(path.name + ".lock")


def find_store(path: Path, study: Study) -> StudyStore | None:
    """The store of a study at `path`, to go on with; None if there is nothing. The caller holds its lock.

    **Raises:** `InputError` if there is something else, the store of another study, or one made with other versions, whose numbers are not
    those of these.
    """
    _zarr()
    for leftover in path.parent.glob(f"{path.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not path.exists():
        return None
    store = StudyStore(path, _open(path, "r+"))
    difference = study.difference(store.study)
    if difference is not None:
        hint = f"which another store may take its runs from by --reuse {path.name}"
        raise refuse(
            "out", f"be the store of this study ({hint})", f"{path} differs in {difference}"
        )
    _check_versions("out", store)
    for leftover in path.rglob("*.partial"):
        leftover.unlink(missing_ok=True)
    commits, now = store.attributes["commit"].split(", "), storage.commit() or ""
    if now not in commits:
        store.attributes["commit"] = ", ".join([*commits, now])
    return store


def make_store(path: Path, study: Study, task_size: int) -> StudyStore:
    """A new store. The caller holds its lock. **Raises:** `InputError` if there is too little room for it."""
    _check_room(path, study, task_size)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    _make(_zarr(), part, study, task_size)
    part.rename(path)
    return StudyStore(path, _open(path, "r+"))


def store_to_reuse(path: Path, study: Study) -> StudyStore:
    """Another store, to take runs over from. **Raises:** `InputError` if it is none, has other versions, or no run of this study."""
    store = StudyStore(path, _open(path, "r", "reuse"))
    _check_versions("reuse", store)
    if not store.shared(study):
        differs = study.difference(store.study) if np.any(store.done == DONE) else None
        raise refuse(
            "reuse",
            "hold runs of this study",
            f"{path} {f'differs in {differs}' if differs else 'has none that is done'}",
        )
    return store


def read_study(path: str | Path) -> Study:
    """The study that a store holds the results of. **Raises:** `InputError` if there is no such store."""
    return _study(Path(path), _open(Path(path), "r"))


def open_study(path: str | Path) -> Any:
    """The results of a study, also while they are being written.

    **Args:** `path`: of the store.
    **Returns:** an `xarray.Dataset`, read as it is asked for. Its dimensions are the fields of the grid, or `point`; its variables the
    numbers of each run, NaN where there are none yet, with units and names in words; `done` (0 to do, 1 done, 2 failed), `reason` of what
    failed, `converged`. Its attributes tell the study as TOML, versions, commit and time, and the same of stores that runs were taken from.
    **Raises:** `InputError` if there is no such store, or xarray is not installed.

    **Example:** `open_study("study.zarr").w2_squared.mean("seed")`
    """
    xarray = _xarray()
    path = Path(path)
    study = read_study(path)
    dataset = xarray.open_zarr(path, chunks=None, consolidated=False)
    # Strings of the type that every selection by label understands.
    strings = {
        name: dataset[name].astype(object)
        for name in dataset.variables
        if dataset[name].dtype.kind not in "iufb"
    }
    dataset = dataset.assign(strings)
    ordered = [
        name for name in (*number_names(True), "converged", "done", "reason") if name in dataset
    ]
    # In the order of the study: a folder lists its files in an order of its own.
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
        raise refuse("path", f"be a store of version {_VERSION}", f"{path} has version {version}")
    return Study.from_dict(content, str(path))


def _check_versions(argument: str, store: StudyStore) -> None:
    difference = storage.difference(json.loads(store.attributes["versions"]), storage.versions())
    if difference is not None:
        raise refuse(
            argument,
            "be a store made with the versions that are here",
            f"{store.path} was made with {difference}",
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
    about = {
        "version": _VERSION,
        "study": storage.toml(study.as_dict()),
        "task_size": task_size,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(storage.versions()),
        "commit": storage.commit() or "",
    }
    group = zarr.create_group(str(path), zarr_format=3, attributes=about)
    dimensions = study.dimensions
    layout = {
        "shape": tuple(dimensions.values()),
        "chunks": study.chunks(task_size),
        "dimension_names": tuple(dimensions),
    }

    def variable(name: str, dtype: str, fill: Any, words: str, **more: str) -> None:
        group.create_array(
            name, dtype=dtype, fill_value=fill, attributes={"long_name": words, **more}, **layout
        )

    for quantity in _quantities(study):
        variable(quantity.name, "float64", np.nan, quantity.words, units=quantity.units)
    variable("converged", "bool", False, "whether every transport problem of the run was solved")
    variable("reason", "string", "", "why the run failed")
    variable(
        "done",
        "int8",
        TO_DO,
        "what is there",
        flag_values="0 1 2",
        flag_meanings="to_do done failed",
    )
    for name, (dimension, values) in study.coordinates.items():
        array = _labels(values)
        attributes = {
            "long_name": name.replace("_", " "),
            **({"units": _UNITS[name]} if name in _UNITS else {}),
        }
        made = group.create_array(
            name,
            shape=array.shape,
            dtype="string" if array.dtype == object else array.dtype,
            dimension_names=(dimension,),
            attributes=attributes,
        )
        made[...] = array


def _quantities(study: Study) -> list[Quantity]:
    """What is stored of each run, the standard errors among it if some run has them."""
    plain = list(QUANTITIES)
    if not study.has_errors:
        return plain
    errors = [
        Quantity(f"{q.name}_error", q.units, f"standard error of {q.words}")
        for q in QUANTITIES
        if q.name in WITH_ERROR
    ]
    return plain + errors


def _labels(values: tuple) -> np.ndarray:
    if isinstance(values[0], tuple):
        return np.array([",".join(map(str, value)) for value in values], dtype=object)
    return np.array(values, dtype=object if isinstance(values[0], str) else None)


def _check_room(path: Path, study: Study, task_size: int) -> None:
    """Refuse what would not fit, by an estimate, before anything is written."""
    if not path.parent.is_dir():
        raise refuse("out", "be in a folder that exists", f"{path.parent} does not")
    variables = len(number_names(study.has_errors)) + 3
    chunks = int(
        np.prod(
            [
                -(-length // step)
                for length, step in zip(
                    study.dimensions.values(), study.chunks(task_size), strict=True
                )
            ]
        )
    )
    on_disk = variables * max(8 * study.size, _BLOCK * chunks)
    free = shutil.disk_usage(path.parent).free
    if on_disk > free:
        raise refuse(
            "out",
            f"have room for {study.size:,} runs, about {size(on_disk)}",
            f"{path.parent} has {size(free)} left",
        )
    # Its numbers once read, and a list of its tasks.
    in_memory = variables * 8 * study.size + 200 * study.size
    here = memory_of_the_machine()
    if in_memory > here:
        raise refuse(
            "grid",
            f"fit in memory, here {size(here)}",
            f"its {study.size:,} runs need about {size(in_memory)}",
        )


def check_memory(study: Study, slices: list[Slice]) -> None:
    """Refuse a run that this machine cannot hold, by an estimate from its shapes."""
    for part in slices:
        config: RunConfig = study.point(int(part.indices[0]))
        needed = memory_of_a_run(config)
        if needed > memory_of_the_machine():
            what = f"{config.members} members of hidden {config.hidden} over {config.snapshots} snapshots"
            raise refuse(
                "members",
                f"fit in memory, here {size(memory_of_the_machine())}",
                f"{what} need about {size(needed)}",
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
        f"Studies keep their results by {module}, which is not installed: pip install 'esljax[studies]'."
    )
