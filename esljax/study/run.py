"""A study run to its end: tasks go to an executor, and this process alone writes what comes back."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    wait,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esljax._checks import check_positive_int, refuse
from esljax.experiment import Rows, Task, failed, fitting_width, work
from esljax.files import storage
from esljax.study.description import Slice, Study
from esljax.study.executors import InProcess, capacity
from esljax.study.store import (
    DONE,
    FAILED,
    TO_DO,
    StudyStore,
    check_memory,
    find_store,
    lock_path,
    make_store,
    open_study,
    store_to_reuse,
)


class Progress(NamedTuple):
    """How far a study is: runs of all, runs done and failed, how many of both this call has run, and how many it took from other stores."""

    runs: int
    done: int
    failed: int
    fresh: int
    taken: int


class LostWorkersError(RuntimeError):
    """The workers ended before the study did, or cannot take part in it; what they had finished is kept."""


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
    """Run what is left of a study and return its results. It can be interrupted or killed at any time and called again.

    The numbers of a run are a function of its own settings: alone, in another study, in tasks of another size, in another process of the
    same machine they are the same bits, as long as `width` is 1, and otherwise the same up to rounding.

    **Args:**
    - `study`: what to run.
    - `out`: the Zarr store of the results, made if it does not exist.
    - `executor`: where tasks run, from `esljax.executors` or any `concurrent.futures.Executor`; by default in this process.
    - `task_size`: the most runs in a task. Results are kept task by task. By default 32, or what the store was made with.
    - `width`: how many runs of a task go side by side in one program: by default 1 on a CPU, and as many as fit the memory of an
      accelerator (a cluster's workers do as this process would).
    - `retry`: whether to run again what has failed.
    - `reuse`: other stores, whose finished runs are taken over where their settings are the same. So a study is extended by more seeds or
      rates: describe the larger one, and reuse the store of the smaller.
    - `watch`: is called with the `Progress` at the start and after each task.

    **Returns:** `open_study(out)`, an `xarray.Dataset`. A run that failed is marked there with its reason.
    **Raises:** `InputError`, before anything runs, if `out` is no store of this study or another process is writing it, if one of `reuse`
    is no store or has no run of this study, if either was made with other versions of what numbers depend on, or if the study needs more
    disk or memory than there is; `LostWorkersError` if a pool or a cluster ends before the study does, or has other versions.

    **Example:**

        >>> import tempfile
        >>> from esljax.experiment import RunConfig
        >>> base = RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = run_study(Study(base, grid={"rate": [0.1, 0.2], "seed": range(3)}), folder + "/study.zarr").load()
        >>> dict(results.sizes), int((results.done == 1).sum())
        ({'rate': 2, 'seed': 3}, 6)
    """
    if not isinstance(study, Study):
        raise refuse("study", "be a Study", f"is {study!r}")
    for name, value in (("task_size", task_size), ("width", width)):
        if value is not None:
            check_positive_int(name, value)
    executor = InProcess() if executor is None else executor
    if isinstance(reuse, str | Path):
        raise refuse("reuse", "be a list of stores", f"is {str(reuse)!r}")
    if not isinstance(executor, Executor):
        raise refuse("executor", "be a concurrent.futures.Executor", f"is {executor!r}")
    # A path such as "." has no name before it is resolved.
    out = Path(out).resolve()
    with storage.locked(lock_path(out), "out") as say:
        # What can be refused is, before anything is written.
        store = find_store(out, study)
        task_size = task_size or (32 if store is None else store.task_size)
        others = [store_to_reuse(Path(other), study) for other in reuse]
        again = (TO_DO, FAILED) if retry else (TO_DO,)
        slices = study.slices(task_size)
        check_memory(study, slices if store is None else _left(slices, np.isin(store.done, again)))
        store = make_store(out, study, task_size) if store is None else store
        taken = sum(store.adopt(other) for other in others)
        if retry:
            store.forget(np.flatnonzero(store.done == FAILED))
        state = store.done
        fresh = 0
        say({"started": time.time(), "before": int(np.sum(state != TO_DO))})
        watch(_progress(state, fresh, taken))
        for part, task, future in _completed(
            executor, _left(slices, state == TO_DO), lambda part: _task(study, part, width)
        ):
            fresh += _keep(store, state, part, task, future)
            watch(_progress(state, fresh, taken))
    return open_study(out)


def _left(slices: list[Slice], wanted: np.ndarray) -> list[Slice]:
    """What is wanted of each slice, for the same compiled program."""
    left = (part._replace(indices=part.indices[wanted[part.indices]]) for part in slices)
    return [part for part in left if part.indices.size]


def _task(study: Study, part: Slice, width: int | None) -> Task:
    points = tuple(study.point(int(i)) for i in part.indices)
    return Task(points, part.length, width or fitting_width(points[0], part.length))


def _completed(
    executor: Executor, slices: list[Slice], task_of: Callable[[Slice], Task]
) -> Iterator[tuple[Slice, Task, Future]]:
    """Slices with their futures in the order in which they finish; only so many are under way as keep the workers busy."""
    most, left, versions = capacity(executor), iter(slices), storage.versions()
    running: dict[Future, tuple[Slice, Task]] = {}
    while True:
        while len(running) < most and (part := next(left, None)) is not None:
            task = task_of(part)
            try:
                running[executor.submit(work_alike, task, versions)] = (part, task)
            except (BrokenExecutor, RuntimeError) as error:
                raise _lost(error) from error
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield *running.pop(future), future


def _keep(store: StudyStore, state: np.ndarray, part: Slice, task: Task, future: Future) -> int:
    """Write the runs of a task, and say how many they were."""
    try:
        rows = future.result()
    except (BrokenExecutor, CancelledError, _OtherVersionsError) as error:
        raise _lost(error) from error
    except Exception as error:
        # The task's own errors come back as rows: this one is of its worker, such as one that has died once too often.
        rows = failed(
            task,
            f"the worker failed: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
        )
    store.write(part.indices, rows)
    state[part.indices] = np.where([bool(reason) for reason in rows.reasons], FAILED, DONE)
    return len(part.indices)


def _progress(state: np.ndarray, fresh: int, taken: int) -> Progress:
    return Progress(
        state.size, int(np.sum(state == DONE)), int(np.sum(state == FAILED)), fresh, taken
    )


class _OtherVersionsError(RuntimeError):
    """A worker computes with other versions than this process."""


def work_alike(task: Task, versions: dict[str, str]) -> Rows:
    """`work`, by a worker that has the versions of the store."""
    difference = storage.difference(storage.versions(), versions)
    if difference is not None:
        raise _OtherVersionsError(f"a worker has {difference}")
    return work(task)


def _lost(error: BaseException) -> LostWorkersError:
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return LostWorkersError(
        f"The workers ended before the study did ({said}); what is done is kept, and the same call goes on from there."
    )
