"""Runs a study to its end: tasks go to an executor, and only this process writes their results."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esljax._checks import check_positive_int, first_sentence, refuse
from esljax.experiment import Rows, Task, failed, parcel, task_of, work
from esljax.files import storage
from esljax.study.description import Slice, Study
from esljax.study.executors import InProcess, capacity
from esljax.study.pace import Pace, Part
from esljax.study.store import (
    DONE,
    FAILED,
    TO_DO,
    StudyStore,
    check_memory,
    find_store,
    finish,
    lock_path,
    make_store,
    open_study,
    store_to_reuse,
)

_TASK_SIZE = 32


class Progress(NamedTuple):
    """How far a study is, in numbers of runs."""

    runs: int
    """All runs of the study."""
    done: int
    """Runs with results, from this call or before."""
    failed: int
    """Runs that failed, in this call or before."""
    fresh: int
    """Runs that this call has computed, done or failed."""
    taken: int
    """Runs that this call has copied from the stores of `reuse`."""
    repaired: int = 0
    """Finished runs that were damaged on disk, and that this call runs again."""


class LostWorkersError(RuntimeError):
    """The workers ended before the study did, or have other versions than the store.

    The runs that they had finished are saved; call `run_study` again to resume.
    """


def run_study(
    study: Study,
    out: str | Path,
    *,
    executor: Executor | None = None,
    task_size: int | None = None,
    width: int | None = None,
    retry: bool = False,
    reuse: Sequence[str | Path] = (),
    watch: Callable[[Progress], Any] = lambda progress: None,
) -> Any:
    """Run the runs of a study that are left, and return all results.

    The call can be interrupted or killed at any time; the same call resumes. The numbers of a run
    are a function of its own settings: alone, in another study, in tasks of another size or in
    another process of the same machine they are the same bits if `width` is 1. Runs side by side
    have the same numbers up to rounding, and `widths` among the attributes of the result says so.

    **Args:**
    - `study`: what to run.
    - `out`: the Zarr store of the results, made if it does not exist.
    - `executor`: where tasks run, from `esl.study.executors` or any `concurrent.futures.Executor`;
      by default in this process.
    - `task_size`: runs in a task. Results are saved task by task. By default the first task has one
      run, and the next ones as many as take three seconds by the time of those before, at most the
      task size of the store, which is 32 for a new one.
    - `width`: the number of runs of a task that go side by side in one program; by default 1 on a
      CPU, and as many as fit the memory of an accelerator (of this process, also on a cluster).
      Rates that are found for a target, and optimized schedules, are found run by run before.
    - `retry`: whether to run again the runs that failed.
    - `reuse`: other stores, whose finished runs are copied where their settings are the same. To
      extend a study by seeds or rates, describe the larger one and reuse the store of the smaller.
    - `watch`: called with the `Progress` at the start and after each task.

    **Returns:** `open_study(out)`, an `xarray.Dataset`, which marks failed runs with their reasons.
    **Raises:** `InputError`, before anything runs, if `out` is no store of this study or another
    process is writing it, if one of `reuse` is no store or has no run of this study, if either was
    made with other versions, or if the study needs more disk or memory than there is.
    Also if the `problem` of the study cannot travel to the executor's processes, or is not what the
    store was made from. `LostWorkersError` if the workers end before the study does, or have other
    versions.

    **Example:**

        >>> import tempfile
        >>> import esljax as esl
        >>> base = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> study = esl.study.Study(base, grid={"rate": [0.1, 0.2], "seed": range(3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = esl.study.run_study(study, folder + "/study.zarr").load()
        >>> dict(results.sizes), int((results.done == 1).sum())
        ({'rate': 2, 'seed': 3}, 6)
    """
    _check(study, executor, task_size, width, reuse)
    executor = InProcess() if executor is None else executor
    study = study.loaded()
    source = study.problem
    if source is not None and not isinstance(executor, InProcess | ThreadPoolExecutor):
        source = parcel(source)
    # A path such as "." has no name before it is resolved.
    out = Path(out).resolve()
    with storage.locked(lock_path(out), "out") as record:
        store, slices, taken, repaired = _prepared(study, out, task_size, retry, reuse)
        state, fresh = store.done, 0
        record({"started": time.time(), "before": int(np.sum(state != TO_DO))})
        watch(_progress(state, fresh, taken, repaired))
        pace = Pace(study, _left(slices, state == TO_DO), fixed=task_size, width=width)
        running: dict[Future, tuple[Part, Task]] = {}
        try:
            for part, task, future in _completed(executor, pace, running, source):
                fresh += _keep(store, state, pace, part, task, future)
                watch(_progress(state, fresh, taken, repaired))
        except (KeyboardInterrupt, SystemExit):
            # What the workers have sent by now is not lost.
            for future, (part, task) in running.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    _keep(store, state, pace, part, task, future)
            raise
        if np.all(state != TO_DO):
            finish(out)
    return open_study(out)


def _check(study: Any, executor: Any, task_size: Any, width: Any, reuse: Any) -> None:
    if not isinstance(study, Study):
        raise refuse("study", "be a Study", f"is {study!r}")
    for name, value in (("task_size", task_size), ("width", width)):
        if value is not None:
            check_positive_int(name, value)
    if isinstance(reuse, str | Path):
        raise refuse("reuse", "be a list of stores", f"is {str(reuse)!r}")
    if executor is not None and not isinstance(executor, Executor):
        raise refuse("executor", "be a concurrent.futures.Executor", f"is {executor!r}")


def _prepared(
    study: Study, out: Path, task_size: int | None, retry: bool, reuse: Sequence[str | Path]
) -> tuple[StudyStore, list[Slice], int, int]:
    """The store at `out`, its slices, how many runs it has copied from other stores, and how many
    were damaged.

    Every check comes before the first run is written.
    """
    store = find_store(out, study)
    task_size = task_size or (_TASK_SIZE if store is None else store.task_size)
    others = [store_to_reuse(Path(other), study) for other in reuse]
    slices = study.slices(task_size)
    if store is None:
        check_memory(study, slices)
        store = make_store(out, study, task_size)
    else:
        check_memory(
            study, _left(slices, np.isin(store.done, (TO_DO, FAILED) if retry else (TO_DO,)))
        )
    repaired, where = store.repair()
    if repaired:
        warnings.warn(
            f"{where}: {repaired:,} finished runs are damaged and run again.",
            RuntimeWarning,
            stacklevel=3,
        )
    taken = sum(store.adopt(other) for other in others)
    if retry:
        store.forget(np.flatnonzero(store.done == FAILED))
    return store, slices, taken, repaired


def _left(slices: list[Slice], wanted: np.ndarray) -> list[Slice]:
    """The wanted runs of each slice, for the same compiled program."""
    left = (part._replace(indices=part.indices[wanted[part.indices]]) for part in slices)
    return [part for part in left if part.indices.size]


def _completed(
    executor: Executor, pace: Pace, running: dict[Future, tuple[Part, Task]], source: Any
) -> Iterator[tuple[Part, Task, Future]]:
    """Tasks and their futures in the order of completion.

    Only as many tasks are submitted at a time as keep the workers busy.
    """
    most, versions = capacity(executor), storage.versions()
    while True:
        while len(running) < most and (part := pace.next()) is not None:
            task = task_of(part.points, part.length, part.width, source)
            try:
                running[executor.submit(work_alike, task, versions)] = (part, task)
            except (BrokenExecutor, RuntimeError) as error:
                raise _lost(error) from error
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield *running.pop(future), future


def _keep(
    store: StudyStore, state: np.ndarray, pace: Pace, part: Part, task: Task, future: Future
) -> int:
    """Write the runs of a task and return their number."""
    try:
        rows, seconds = future.result()
        pace.took(part, seconds)
    except (BrokenExecutor, CancelledError, _OtherVersionsError) as error:
        raise _lost(error) from error
    except Exception as error:
        # Errors of the task itself come back as rows. This one is of its worker, such as a worker
        # that has died too often.
        rows = failed(task, f"the worker failed: {first_sentence(error)[:300]}")
    if part.width > 1:
        store.note_widths([part.width])
    store.write(part.indices, rows)
    state[part.indices] = np.where([bool(reason) for reason in rows.reasons], FAILED, DONE)
    return len(part.indices)


def _progress(state: np.ndarray, fresh: int, taken: int, repaired: int) -> Progress:
    done, failed = int(np.sum(state == DONE)), int(np.sum(state == FAILED))
    return Progress(state.size, done, failed, fresh, taken, repaired)


class _OtherVersionsError(RuntimeError):
    """A worker computes with other versions than this process."""


def work_alike(task: Task, versions: dict[str, str]) -> tuple[Rows, float]:
    """Run a task, in a worker that must have the versions of the store, and measure the seconds."""
    difference = storage.difference(storage.versions(), versions)
    if difference is not None:
        raise _OtherVersionsError(f"a worker differs: {difference}")
    began = time.monotonic()
    return work(task), time.monotonic() - began


def _lost(error: BaseException) -> LostWorkersError:
    return LostWorkersError(
        f"The workers ended before the study did ({first_sentence(error)}); what is done is kept, "
        "and the same call resumes the study."
    )
