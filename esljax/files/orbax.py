"""Orbax on damaged files, which are one sentence here and many lines of its own.

Orbax reads the arrays of a checkpoint at the same time, in an event loop. When one of them cannot
be read it logs that, closes the loop and raises. The other reads go on in threads of TensorStore,
find their loop closed, and Python prints what they raise wherever the program has got to.
"""

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds in which the reads that were left end. They are of files on a disk; whoever else uses
# TensorStore in this process may have reads that take longer, which are not waited for.
_LONGEST = 2.0
# What is put back belongs to the process: of two threads one would put back what the other has put.
_ALONE = threading.Lock()
# Seconds in which a read that has ended says so.
_REST = 0.05


def quietly(call: Callable[[], T], refusal: Callable[[Exception], Exception]) -> T:
    """Call Orbax, which prints nothing meanwhile and leaves nothing behind that prints later; one
    thread at a time.

    **Args:** `call`: only reads, and raises whatever went wrong. `refusal`: makes the exception to
    be raised in place of that.
    """
    with _ALONE, _silence():
        try:
            return call()
        except Exception as error:
            # Without the error itself, whose frames hold the tasks of its loop.
            refused = refusal(error)
        _await_reads()
        gc.collect()
        time.sleep(_REST)
    raise refused


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what Orbax logs, and errors in what nobody waits for any more."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers], sys.excepthook, sys.unraisablehook
    try:
        for logger in loggers:
            logger.disabled = True
        sys.excepthook = sys.unraisablehook = lambda *_: None
        yield
    finally:
        for logger, disabled in zip(loggers, before[0], strict=True):
            logger.disabled = disabled
        sys.excepthook, sys.unraisablehook = before[1:]


def _await_reads() -> None:
    """Wait until the reads of TensorStore have ended that objects of this process wait for."""
    import tensorstore

    end = time.monotonic() + _LONGEST
    reads: list[Any] = [held for held in gc.get_objects() if type(held) is tensorstore.Future]
    while time.monotonic() < end and not all(read.done() for read in reads):
        time.sleep(_REST / 10)
