"""Places where a study's tasks run: this process, processes of this machine, or a dask cluster.

Each function here is a context manager whose value is a `concurrent.futures.Executor` for
`run_study(executor=)`, which also takes any other such executor.
"""

import contextlib
import importlib
import math
import multiprocessing
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from esljax._checks import InputError, check_positive_int, first_sentence, refuse
from esljax.files import storage

# Seconds for a scheduler to answer, and for its first worker to arrive.
_PATIENCE = 15
# Seconds between two checks for jobs that have ended.
_RENEWAL = 10


class InProcess(Executor):
    """Runs each task at once, in the thread that submits it: the default of `run_study`."""

    def submit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, fn: Callable[..., Any], /, *args: Any
    ) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def capacity(executor: Executor) -> int | float:
    """How many tasks to submit at a time: no worker waits, and not all tasks are copied at once."""
    if isinstance(executor, InProcess):
        return 1
    workers = getattr(executor, "_max_workers", None)
    return 2 * workers + 1 if isinstance(workers, int) else math.inf


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Start `count` processes of this machine, each with its own jax.

    The processes end with the block, at once if it is interrupted. They are spawned, because a fork
    of a process that has imported jax hangs: a script that uses them must keep its work below
    `if __name__ == "__main__":`.

    **Args:** `count`: the number of processes, at least 1.
    **Yields:** the executor.

    **Example:** a script.

        import esljax as esl

        if __name__ == "__main__":
            study = esl.study.Study.from_toml("study.toml")
            with esl.study.executors.processes(4) as executor:
                results = esl.study.run_study(study, "study.zarr", executor=executor)
    """
    check_positive_int("processes", count)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupt
    )
    try:
        yield pool
    except BaseException:
        # A task may take minutes, and its results would be dropped.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextlib.contextmanager
def scheduler(address: str) -> Iterator[Executor]:
    """Use the workers of a running dask scheduler; they need esljax installed.

    **Args:** `address`: of the scheduler, such as "tcp://10.0.0.1:8786".
    **Yields:** the executor.
    **Raises:** `InputError` if no scheduler answers at the address, if it has no worker, or if a
    worker cannot import esljax. Workers with other versions are rejected by `run_study`.
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=_PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        raise refuse(
            "scheduler",
            "be the address of a dask scheduler that answers",
            f"nothing answers at {address}",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError as error:
            raise refuse(
                "scheduler",
                "have a worker",
                f"{address} has none: start one with `dask worker {address}`",
            ) from error
        _check_import(client, "scheduler", f"a worker of {address}")
        with client.get_executor(pure=False) as executor:
            yield executor


@contextlib.contextmanager
def slurm(jobs: int) -> Iterator[Executor]:
    """Start `jobs` jobs of a SLURM cluster, and use their workers.

    dask-jobqueue reads the resources of a job (queue, cores, memory, time) from
    ~/.config/dask/jobqueue.yaml. Tasks wait until SLURM starts a job. A job whose worker is gone,
    because its time was up or it was cancelled, is submitted again, and so is its task.

    **Args:** `jobs`: the number of jobs, at least 1.
    **Yields:** the executor.
    **Raises:** `InputError` if no jobs are described there, if there is no `sbatch`, if SLURM
    rejects such a job, or if the first worker cannot import esljax.
    **Warns:** `UserWarning` if no job has started a worker within a minute.
    """
    check_positive_int("slurm", jobs)
    distributed = _distributed()
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise _missing("dask-jobqueue") from error
    try:
        cluster = SLURMCluster()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise _not_described(error) from error
    with cluster:
        _check_job(cluster.job_script())
        with distributed.Client(cluster) as client, _renewed(cluster, jobs):
            try:
                client.wait_for_workers(1, timeout=4 * _PATIENCE)
                _check_import(client, "slurm", "the worker of a job")
            except TimeoutError:
                warnings.warn(
                    "No job of SLURM has brought a worker yet, and the study waits for one: "
                    "`squeue` shows whether jobs are queued, and failed jobs leave their reasons "
                    "in the log-directory of ~/.config/dask/jobqueue.yaml.",
                    stacklevel=4,
                )
            with client.get_executor(pure=False) as executor:
                yield executor


@contextlib.contextmanager
def _renewed(cluster: Any, jobs: int) -> Iterator[None]:
    """Keep that many jobs running.

    dask notices that a worker is gone, but starts another only when the number of jobs is set
    again. A job that never brought a worker counts as running, so that a job that cannot start is
    not submitted again and again.
    """
    ended = threading.Event()

    def renew() -> None:
        cluster.scale(jobs=jobs)
        while not ended.wait(_RENEWAL):
            cluster.scale(jobs=jobs)

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()


def _check_job(script: str) -> None:
    """Let SLURM test a job without running it: only a log of dask would show a rejected job."""
    try:
        test = subprocess.run(
            ["sbatch", "--test-only"],
            input=script,
            capture_output=True,
            text=True,
            timeout=4 * _PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_described(error) from error
    if test.returncode:
        raise _not_described(
            RuntimeError(test.stderr.strip() or f"sbatch ends with code {test.returncode}")
        )


def _not_described(error: BaseException) -> InputError:
    return refuse(
        "slurm",
        "have jobs described in ~/.config/dask/jobqueue.yaml that sbatch takes",
        first_sentence(error),
    )


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_import(client: Any, argument: str, worker: str) -> None:
    try:
        client.submit(_import_runs, pure=False).result(timeout=4 * _PATIENCE)
    except Exception as error:
        raise refuse(
            argument,
            "have workers that can import esljax",
            f"{worker} raises: {first_sentence(error)}",
        ) from error


def _import_runs() -> None:
    importlib.import_module("esljax.experiment")


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise _missing("distributed") from error
    return distributed


def _missing(package: str) -> InputError:
    return InputError(
        f"Clusters need {package}, which is not installed: {storage.installation('cluster')}."
    )
