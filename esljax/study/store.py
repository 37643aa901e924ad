"""The results of a study on disk: one Zarr store of labeled arrays, filled task by task.

Every number has the dimensions of the study. `done` marks each run: 0 to do, 1 done, 2 failed, for
the reason in `reason`. A task fills a block of its own, file by file, and Zarr replaces each file
as a whole. `done` is written last, so every run that it counts is on disk, however the writer ends.
What is read is checked against the checksums of `study.integrity`.
"""

import glob
import json
import math
import os
import re
import shutil
import time
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from esljax._checks import InputError, first_sentence, memory_of_the_machine, refuse, size
from esljax.experiment import (
    OWN,
    Columns,
    Rows,
    knot_name,
    memory_of_a_task,
    number_names,
    own_files,
    program_of,
    task_of,
)
from esljax.files import storage
from esljax.study.columns import MOST_MADE, columns_of
from esljax.study.description import Slice, Study
from esljax.study.integrity import (
    CHECKSUM,
    CHECKSUMS,
    Contents,
    check_array,
    check_attributes,
    check_consolidated,
    check_labels,
    chunk_of,
    damaged,
    digests,
    file_of,
    read,
    run_checksums,
    runs_of,
)
from esljax.study.layout import COLUMNS, TO_DO, VERSION, labels_of, lay_out

DONE, FAILED = 1, 2

# The space that a file of a Zarr chunk takes on a usual disk, however short it is.
_BLOCK = 4096


class Damage(NamedTuple):
    """What is wrong with the runs of a store."""

    runs: np.ndarray
    """Whether each finished run is damaged, flat."""
    chunks: list[tuple[str, tuple[int, ...]]]
    """The chunks that cannot be read: their array and block."""
    words: str
    """The first damaged place and what is wrong with it."""


class StudyStore:
    """The store of a study; a writer must hold its lock.

    **Raises:** `InputError`, about `argument`, if the layout is not that of a study: attributes,
    arrays, shapes, types and labels. Runs are checked by `examine`.
    """

    def __init__(self, path: Path, group: Any, argument: str = "path"):
        self.path, self.attributes, self._argument = path, group.attrs, argument
        self.study = _study(path, group, argument)
        self._shape = tuple(self.study.dimensions.values())
        self.columns = _columns(path, group.attrs, self.study, argument)
        self._names = self.columns.names()
        kinds = dict.fromkeys(self._names, "f") | {"converged": "b", "reason": "TO", "done": "i"}
        if CHECKSUMS in group.attrs:
            kinds[CHECKSUM] = "u"
        dimensions = tuple(self.study.dimensions)
        # Opened once, because each opening reads a file.
        self._arrays = {
            name: check_array(argument, path, group, name, self._shape, dimensions, kind)
            for name, kind in kinds.items()
        }
        for name, (dimension, values) in self.study.coordinates.items():
            labels = labels_of(values)
            kind = "TO" if labels.dtype.kind == "O" else labels.dtype.kind
            array = check_array(argument, path, group, name, labels.shape, (dimension,), kind)
            check_labels(argument, path, name, array, labels)
            self._arrays[name] = array

    @property
    def task_size(self) -> int:
        """The task size that the store was laid out for."""
        return int(self.attributes["task_size"])

    @property
    def widths(self) -> list[int]:
        """How many runs at a time went side by side where it was more than one: the last bits of
        such runs may differ from those of a run alone."""
        return json.loads(self.attributes.get("widths", "[]"))

    def note_widths(self, widths: Iterable[int]) -> None:
        """Note that runs are about to be written that went side by side."""
        known = set(self.widths)
        if not known.issuperset(widths):
            self.record({"widths": json.dumps(sorted(known.union(widths)))})

    def about(self, name: str) -> dict[str, Any]:
        """The attributes of an array: its name in words, and its units."""
        return self._arrays[name].attrs.asdict()

    @property
    def done(self) -> np.ndarray:
        """The state of each run, flat: `DONE`, `FAILED`, or `TO_DO`, also where it is lost."""
        state = read(self.path, "done", self._arrays["done"]).values
        return np.where(np.isin(state, (DONE, FAILED)), state, TO_DO)

    def record(self, attributes: Mapping[str, Any]) -> None:
        """Change attributes of the store, and the digest of them all, at once."""
        new = {**self.attributes.asdict(), **attributes}
        if CHECKSUMS in new:
            kept = json.loads(new[CHECKSUMS])
            new[CHECKSUMS] = json.dumps(kept | json.loads(digests(self.path, new, ())))
        self.attributes.update(new)

    def write(self, indices: np.ndarray, rows: Rows) -> None:
        """Write the rows of some runs, each in its place, and `done` last."""
        places = np.unravel_index(indices, self._shape)
        missing = np.full(len(indices), np.nan)
        numbers = {name: rows.numbers.get(name, missing) for name in self._names}
        done = np.where([bool(reason) for reason in rows.reasons], FAILED, DONE).astype(np.int8)
        columns = {
            **numbers,
            "converged": rows.converged,
            "reason": np.array(rows.reasons, dtype=object),
        }
        if CHECKSUM in self._arrays:
            columns[CHECKSUM] = run_checksums(indices, done, numbers, rows.converged, rows.reasons)
        for name, values in (columns | {"done": done}).items():
            self._arrays[name].set_coordinate_selection(places, values)

    def read(self, indices: np.ndarray, wanted: tuple[str, ...]) -> Rows:
        """The rows of some runs, with NaN for numbers that this store does not have."""

        def chosen(name):
            return self._arrays[name][...].reshape(-1)[indices]

        numbers = {
            name: chosen(name) if name in self._arrays else np.full(len(indices), np.nan)
            for name in wanted
        }
        return Rows(numbers, chosen("converged"), tuple(str(reason) for reason in chosen("reason")))

    def examine(self) -> tuple[dict[str, np.ndarray], Damage]:
        """Read all runs and check them.

        **Returns:** the numbers, states and reasons, each flat, and what is damaged.
        """
        names = (*self._names, "converged", "reason", CHECKSUM)
        # `done` first: what it counts has been written before.
        found = {
            name: read(self.path, name, self._arrays[name])
            for name in ("done", *names)
            if name in self._arrays
        }
        content = {name: contents.values for name, contents in found.items()}
        wrong = self._wrong(content)
        chunks = []
        for name, contents in found.items():
            chunks += [(name, block) for block in contents.unreadable]
            lost = runs_of(self._arrays[name], contents.unreadable)
            wrong |= lost & ((content["done"] != TO_DO) | (name == "done"))
        return content, Damage(wrong, chunks, self._words(found, wrong))

    def _wrong(self, content: dict[str, np.ndarray]) -> np.ndarray:
        """Whether each run that counts as finished is not what was written."""
        done = content["done"]
        wrong = ~np.isin(done, (TO_DO, DONE, FAILED))
        ended = np.flatnonzero(np.isin(done, (DONE, FAILED)))
        if CHECKSUM in content:
            columns = (content[name][ended] for name in ("done", "converged", "reason", CHECKSUM))
            state, converged, reasons, stored = columns
            numbers = {name: content[name][ended] for name in self._names}
            wrong[ended] = run_checksums(ended, state, numbers, converged, reasons) != stored
            return wrong
        # Without checksums: a finished run has numbers, and a failed one a reason.
        for name in self._names:
            if name == "noise_floor":
                pairs = [self.study.point(int(i)).transport == "exact" for i in ended]
                wrong[ended] |= (done[ended] == DONE) & pairs & np.isnan(content[name][ended])
            elif self._is_finite(name):
                wrong |= (done == DONE) & ~np.isfinite(content[name])
        return wrong | ((done == FAILED) & (content["reason"] == ""))

    def _words(self, found: dict[str, Contents], wrong: np.ndarray) -> str:
        """The first damaged place, and what is wrong with it; "" if nothing is."""
        for name, contents in found.items():
            for block, why in contents.unreadable.items():
                return f"{file_of(self.path, name, block)} {why}"
        if not wrong.any():
            return ""
        first = int(np.flatnonzero(wrong)[0])
        # Zarr leaves out a chunk of NaN alone, as these numbers may be, and those of failed runs.
        finished = found["done"].values[first] == DONE
        numbers = [
            name
            for name in self._names
            if finished and self._is_finite(name) and not np.isfinite(found[name].values[first])
        ]
        for name in ("done", *numbers, *({CHECKSUM} & set(self._arrays))):
            file = chunk_of(self.path, name, self._arrays[name], first)
            if not file.is_file():
                return f"{file} is missing"
        places = np.unravel_index(first, self._shape)
        labels = {name: values for name, (_, values) in self.study.coordinates.items()}
        at = ", ".join(
            f"{name} {labels[name][i] if name in labels else i}"
            for name, i in zip(self.study.dimensions, places, strict=True)
        )
        return f"{self.path} does not hold what was written of the run at {at}"

    def _is_finite(self, name: str) -> bool:
        """Whether a number is finite in every finished run."""
        sometimes = ("noise_floor", "rate", *self.columns.metrics)
        return name not in sometimes and not name.endswith("_error") and "knot_" not in name

    def check(self, lock: Path | None = None) -> dict[str, np.ndarray]:
        """Return the content of all arrays, each flat.

        **Args:** `lock`: the lock of a writer that may be at work.
        **Raises:** `InputError` if runs are damaged, naming the first place.
        """
        content, damage = self.examine()
        while damage.runs.any() and lock is not None and storage.holder(lock) is not None:
            # A writer may have replaced a run between two of its chunks, which it does not again.
            time.sleep(0.2)
            lock = None
            content, damage = self.examine()
        if not damage.runs.any():
            return content
        ended = int(np.sum(content["done"] != TO_DO))
        raise damaged(
            self._argument,
            damage.words,
            f"{int(np.sum(damage.runs)):,} of {ended:,} finished runs are lost, which "
            f"`esljax study run {self.path}` runs again",
        )

    def repair(self) -> tuple[int, str]:
        """Remove damaged chunks and mark the finished runs in them as to do.

        **Returns:** the number of those runs, and the first damaged place in words.
        """
        _, damage = self.examine()
        for name, block in damage.chunks:
            # A block is written as a whole only where nothing unreadable is in its place.
            file_of(self.path, name, block).unlink(missing_ok=True)
        if damage.runs.any():
            self.forget(np.flatnonzero(damage.runs))
        return int(np.sum(damage.runs)), damage.words

    def shared(self, study: Study) -> dict[int, int]:
        """The runs of another study that are done here: their indices there, and here."""
        if self.study.content != study.content:
            return {}
        done = {_key(self.study, int(i)): int(i) for i in np.flatnonzero(self.done == DONE)}
        return {i: done[key] for i in range(study.size) if (key := _key(study, i)) in done}

    def adopt(self, other: "StudyStore") -> int:
        """Copy runs that are unfinished here and done in another store; return their number."""
        state = self.done
        pairs = [(i, j) for i, j in other.shared(self.study).items() if state[i] == TO_DO]
        if pairs:
            self.note_widths(other.widths)
            reused = json.loads(self.attributes.get("reused", "{}"))
            reused[str(other.path)] = {
                name: other.attributes[name] for name in ("created", "commit")
            }
            self.record({"reused": json.dumps(reused)})
            ours, theirs = np.array(pairs).T
            self.write(ours, other.read(theirs, self._names))
        return len(pairs)

    def forget(self, indices: np.ndarray) -> None:
        """Mark some runs as to do again."""
        self._arrays["done"].set_coordinate_selection(
            np.unravel_index(indices, self._shape), np.full(len(indices), TO_DO, np.int8)
        )


def _key(study: Study, index: int) -> frozenset:
    """The settings of a run, in a form that two descriptions of one problem have in common."""
    settings = vars(study.point(index)).items()
    return frozenset(
        (name, str(value) if isinstance(value, Path) else value)
        for name, value in settings
        # A description has no place for None, the default of some keywords.
        if value is not None
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
    _remove_leftovers(path, study)
    if not path.exists():
        return None
    store = StudyStore(path, _open(path, "r+", "out"), "out")
    difference = study.difference(store.study)
    if difference is not None:
        raise refuse(
            "out",
            "be the store of this study",
            f"{path} differs in {difference}: choose another store, and copy finished runs into it "
            f"by --reuse {path.name}",
        )
    _check_versions("out", store)
    _check_sources("out", store, study)
    commits, now = store.attributes["commit"].split(", "), storage.commit() or ""
    if now not in commits:
        store.record({"commit": ", ".join([*commits, now])})
    return store


def _remove_leftovers(path: Path, study: Study) -> None:
    """Remove what a killed writer has left half-made: nothing but files that it can have made."""
    ours = {*study.columns.names(), *number_names(True), *study.coordinates}
    ours |= {"converged", "reason", "done", CHECKSUM}
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        known = re.fullmatch(r"\d+", part.name.removeprefix(f"{path.name}.").removesuffix(".part"))
        if known and part.is_dir() and not part.is_symlink():
            within = {entry.name for entry in part.iterdir()}
            if all(name in ours or name.startswith("zarr.") for name in within):
                shutil.rmtree(part, ignore_errors=True)
    for name in ours:
        for half in (path / name).rglob("*.partial"):
            half.unlink(missing_ok=True)
    for half in path.glob("zarr.*.partial"):
        half.unlink(missing_ok=True)


def make_store(path: Path, study: Study, task_size: int) -> StudyStore:
    """Make a new store. The caller holds its lock.

    **Raises:** `InputError` if the disk or the memory has too little room for the results.
    """
    columns = columns_of(study)
    _check_room(path, study, task_size, columns)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    lay_out(_zarr(), part, study, task_size, columns, sources(study))
    part.rename(path)
    return StudyStore(path, _open(path, "r+"))


def finish(path: Path) -> None:
    """Write the metadata of all arrays of a complete store into that of the store itself.

    `xarray.open_zarr` then reads one file in place of one for each array.
    """
    zarr = _zarr()
    with warnings.catch_warnings():
        # Zarr 3 has it by convention, not yet by its specification.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(str(path), zarr_format=3)


def store_to_reuse(path: Path, study: Study) -> StudyStore:
    """Open another store to copy runs from.

    **Raises:** `InputError` if `path` is no store, was made with other versions, or has no finished
    run of this study.
    """
    store = StudyStore(path, _open(path, "r", "reuse"), "reuse")
    _check_versions("reuse", store)
    _check_sources("reuse", store, study)
    store.check(lock_path(path))
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

    **Raises:** `InputError` if there is no such store, or if its description is damaged.
    """
    return _study(Path(path), _open(Path(path), "r"))


def open_study(path: str | Path) -> Any:
    """Read the results of a study, complete or still being written, and check them.

    **Args:** `path`: of the store.
    **Returns:** an `xarray.Dataset` in memory. Its dimensions are the fields of the grid, or
    `point`; its coordinates are the fields that vary. Each variable has all dimensions, and `units`
    and `long_name` among its attributes; numbers are float64, and NaN where there are no results.
    With r for the unit of a model parameter, the variables are

    - `entropy_production` Σ, `length_squared` L², `w2_squared` W2², `gap` Σ - W2², and its parts
      `temporal` and `geometric`: in r².
    - `learning_time` U: in r² per unit of loss.
    - `final_loss`: in units of the loss, nats per example for a cross entropy; the metrics of the
      problem under their names, such as `test_accuracy`, a share between 0 and 1; NaN in a run
      whose problem lacks it. All are means over the members at the end of the run.
    - `rate`: the peak learning rate, where it is found in some run and no coordinate. `knots`, with
      a last dimension `knot`: the log-linear knots of an optimized schedule, NaN in other runs;
      `schedule_of` makes schedules of both.
    - `noise_floor`: the part of Σ that the noise of the steps adds, in r²; NaN unless the transport
      pairs members, as the exact one does.
    - `entropy_production_error` and so on, for the six numbers of the first line: standard errors
      by the jackknife over the members; only if `jackknife` is greater than 0 in some run.
    - `converged`: whether every transport problem of the run was solved, boolean.
    - `done`: 0 to do, 1 done, 2 failed, int8. `reason`: why the run failed, a string.

    Its attributes are strings and integers: `study` (the description, as TOML), `task_size`,
    `created` (the time), `versions` (as JSON), `commit` (of every writer), `version` (of the
    layout), `sources` (as JSON) for digests of your files that the runs read, `widths` (as JSON)
    where runs went side by side, so many at a time, and may differ from runs alone in their last
    bits, and `reused` (as JSON) for the stores that runs were copied from.

    **Raises:** `InputError` if there is no such store, if it is damaged (the message names the
    place), or if xarray is not installed.

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
    store = StudyStore(path, _open(path, "r"))
    content = store.check(lock_path(path))
    study, layout = store.study, store.study.dimensions
    knots = [knot_name(i) for i in range(store.columns.knots)]
    names = [name for name in store.columns.names() if name not in knots]
    shape = tuple(layout.values())
    # As objects, the type of string that every selection by label accepts.
    variables = {
        name: (tuple(layout), content[name].reshape(shape), store.about(name))
        for name in (*names, "converged", "done", "reason")
    }
    if knots:
        values = np.stack([content[name].reshape(shape) for name in knots], axis=-1)
        about = store.about(knots[0]) | {"long_name": "log-linear knots of the optimized schedule"}
        variables["knots"] = ((*layout, "knot"), values, about)
    coordinates = {
        name: (dimension, labels_of(values), store.about(name))
        for name, (dimension, values) in study.coordinates.items()
    }
    attributes = {
        k: v for k, v in store.attributes.asdict().items() if k not in (CHECKSUMS, COLUMNS)
    }
    return xarray.Dataset(variables, coordinates, attributes)


def _columns(path: Path, attributes: Any, study: Study, argument: str) -> Columns:
    """The numbers that a store has of each run."""
    if COLUMNS not in attributes:
        return Columns(study.has_errors)
    try:
        content = json.loads(attributes[COLUMNS])
        return Columns(**content | {"metrics": tuple(content["metrics"])})
    except (KeyError, TypeError, ValueError) as error:
        what = f"{path}/zarr.json holds no description of its numbers"
        raise damaged(argument, what) from error


def _study(path: Path, group: Any, argument: str = "path") -> Study:
    try:
        content, version = tomllib.loads(group.attrs["study"]), group.attrs["version"]
        task_size, texts = group.attrs["task_size"], [group.attrs[name] for name in _TEXTS]
    except KeyError as error:
        is_other = "study" not in group.attrs
        missing = "is none" if is_other else f"lacks the attribute {error}"
        raise refuse(argument, "be the store of a study", f"{path} {missing}") from None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        what = f"{path}/zarr.json holds no description of a study ({first_sentence(error)})"
        raise damaged(argument, what) from None
    if version not in (1, VERSION) or isinstance(version, bool):
        raise refuse(
            argument,
            f"be a store with layout 1 or {VERSION}",
            f"{path} has layout {version}: read it with the esljax that wrote it",
        )
    if version == VERSION or CHECKSUMS in group.attrs:
        check_attributes(argument, path, group.attrs)
        check_consolidated(argument, path, group.attrs)
    if type(task_size) is not int or task_size < 1 or not all(type(x) is str for x in texts):
        raise damaged(argument, f"{path}/zarr.json has attributes of other types than were made")
    return Study.from_dict(content, str(path))


_TEXTS = ("created", "versions", "commit")


def _check_versions(argument: str, store: StudyStore) -> None:
    try:
        theirs = dict(json.loads(store.attributes["versions"]))
    except (TypeError, ValueError) as error:
        raise damaged(argument, f"{store.path}/zarr.json holds no versions") from error
    difference = storage.difference(theirs, storage.versions())
    if difference is not None:
        raise refuse(
            argument,
            "be a store made with the installed versions",
            f"{store.path} differs: {difference} (install that version, or start a new store)",
        )


def sources(study: Study) -> dict[str, str]:
    """The user's files that the runs of a study read, and a digest of what each holds now.

    **Raises:** `InputError` for one that cannot be read.
    """
    if study.problem is not None:
        return {}
    base, varied = study.base, study.coordinates
    held = {name: varied[name][1] for name in OWN if name in varied}
    fixed = {name: [getattr(base, name)] for name in OWN if hasattr(base, name)}
    return own_files(fixed | held)


def _check_sources(argument: str, store: StudyStore, study: Study) -> None:
    """Reject a store whose runs have read other files than those that are there now."""
    try:
        theirs = dict(json.loads(store.attributes.get("sources", "{}")))
    except (TypeError, ValueError) as error:
        raise damaged(argument, f"{store.path}/zarr.json holds no sources") from error
    for file, digest in sources(study).items():
        if theirs.get(file, digest) != digest:
            raise refuse(
                argument,
                "be a store made with the files that are there now",
                f"{file} has changed since {store.path} was made (start a new store)",
            )


def _open(path: Path, mode: Any, argument: str = "path") -> Any:
    zarr = _zarr()
    if not path.exists():
        raise refuse(argument, "be the store of a study", f"there is nothing at {path}")
    try:
        return zarr.open_group(str(path), mode=mode, zarr_format=3, use_consolidated=False)
    except Exception as error:
        # zarr raises whatever its parsing meets: OSError, ValueError, KeyError, TypeError.
        why = f" ({first_sentence(error)})" if (path / "zarr.json").exists() else ""
        raise refuse(argument, "be the store of a study", f"{path} is none{why}") from error


def _check_room(path: Path, study: Study, task_size: int, columns: Columns) -> None:
    """Reject results that would not fit, by an estimate, before anything is written."""
    if not path.parent.is_dir():
        raise refuse("out", "be in a folder that exists", f"{path.parent} does not")
    variables = len(columns.names()) + 4
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
    available, seen = memory_of_the_machine(), set()
    for part in slices:
        config = study.point(int(part.indices[0]))
        if study.problem is not None:
            if len(seen) >= MOST_MADE:
                return
            # Of an own problem each kind is made once: that may take its time.
            if (program := program_of(config)) in seen:
                continue
            seen.add(program)
        needed = memory_of_a_task(task_of((config,), 1, 1, study.problem))
        if needed > available:
            what = (
                f"{config.members} members of hidden {config.hidden} over {config.snapshots} "
                "snapshots need"
                if study.problem is None
                else f"a run of {study.problem} needs"
            )
            raise refuse(
                "members" if study.problem is None else "problem",
                f"fit in the {size(available)} of memory of this machine",
                f"{what} about {size(needed)}",
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
