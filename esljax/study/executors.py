"""Where the tasks of a study run: in this process, in processes of this machine, or on the workers of a dask cluster.

Each is a context manager whose value is a `concurrent.futures.Executor`; `run_study` takes any other one as well.
"""

import contextlib
import math
import multiprocessing
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from esljax._checks import InputError, check_positive_int, refuse

# Seconds for a scheduler to answer, and for a first worker to be there.
_PATIENCE = 15
# Seconds between two looks at whether jobs have ended.
_RENEWAL = 10


class InProcess(Executor):
    """Runs each task at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future:  # pyright: ignore[reportIncompatibleMethodOverride]
        future: Future = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def capacity(executor: Executor) -> int | float:
    """How many tasks an executor should have at a time, so that no worker waits and not all tasks are copied at once."""
    if isinstance(executor, InProcess):
        return 1
    workers = getattr(executor, "_max_workers", None)
    return 2 * workers + 1 if isinstance(workers, int) else math.inf


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """`count` processes of this machine, each with a jax of its own; they end with the block, at once if it is interrupted.

    They start afresh (spawn), because a fork of a process that has imported jax hangs, so a script that uses them has to keep what it
    does below `if __name__ == "__main__":`.
    """
    check_positive_int("processes", count)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_deaf
    )
    try:
        yield pool
    except BaseException:
        # A task may take minutes, and nothing of it would be kept.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextlib.contextmanager
def scheduler(address: str) -> Iterator[Executor]:
    """The workers of a running dask scheduler, at an address such as "tcp://10.0.0.1:8786". They need esljax installed.

    **Raises:** `InputError` if nothing answers at the address, if no worker is there, or if its esljax is missing or another.
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
        _check_workers(client, address)
        with client.get_executor(pure=False) as executor:
            yield executor


@contextlib.contextmanager
def slurm(jobs: int) -> Iterator[Executor]:
    """The workers that `jobs` jobs of a SLURM cluster start, as dask-jobqueue's own configuration describes them.

    What a job asks for (queue, cores, memory, time) stands in ~/.config/dask/jobqueue.yaml. Tasks wait until SLURM starts a job; a job
    whose worker is gone, because its time was up or it was cancelled, is sent again, and so is what it was working at.

    **Raises:** `InputError` if there is no such description or no `sbatch`, if SLURM refuses such a job, or if the first worker's esljax is
    missing.
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
                _check_import(client, "slurm", "a job's worker")
            except TimeoutError:
                warnings.warn(
                    "No job of SLURM has brought a worker yet, and everything waits for one: `squeue` tells whether they are queued, and "
                    "those that have failed leave their reasons in the log-directory of ~/.config/dask/jobqueue.yaml.",
                    stacklevel=4,
                )
            with client.get_executor(pure=False) as executor:
                yield executor


@contextlib.contextmanager
def _renewed(cluster: Any, jobs: int) -> Iterator[None]:
    """Keep that many jobs. dask notices that a worker is gone, but starts another only when it is told the number again; a job that never
    brought a worker counts as there, so that one that cannot start is not sent again and again."""
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
    """Let SLURM look at a job without running it: of one that it refuses only a log of dask's would tell."""
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only"],
            input=script,
            capture_output=True,
            text=True,
            timeout=4 * _PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_described(error) from error
    if asked.returncode:
        raise _not_described(
            RuntimeError(asked.stderr.strip() or f"sbatch ends with code {asked.returncode}")
        )


def _not_described(error: BaseException) -> InputError:
    said = str(error).splitlines()[0].rstrip(".")
    return refuse(
        "slurm", "have jobs described in ~/.config/dask/jobqueue.yaml that sbatch takes", said
    )


def _deaf() -> None:
    """A Ctrl-C goes to the parent alone, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_workers(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except TimeoutError as error:
        raise refuse("scheduler", "have a worker", f"{address} has none") from error
    _check_import(client, "scheduler", f"a worker of {address}")


def _check_import(client: Any, argument: str, whose: str) -> None:
    try:
        client.submit(_import_runs, pure=False).result(timeout=4 * _PATIENCE)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise refuse(
            argument, "have workers that can import esljax", f"{whose} says: {said}"
        ) from error


def _import_runs() -> None:
    import esljax.experiment  # noqa: F401


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise _missing("distributed") from error
    return distributed


def _missing(package: str) -> InputError:
    return InputError(
        f"Clusters are reached by {package}, which is not installed: pip install 'esljax[cluster]'."
    )
