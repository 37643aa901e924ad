"""Processes that share a run, watched, so that the rest ends when one of them is gone.

A process that is killed leaves the others in a collective. Some communication fails at once with an
error of its library, some waits for a hundred seconds, and then jax aborts in C++ without a word on
what is saved. Therefore each process counts up a number in jax's key-value store, the first process
reads them all, and where one stands still it says so to the others. The store itself lives in the
first process: when that is gone, jax aborts every other process at once, and a handler of the abort
speaks first.

The end is abrupt, by `os._exit`: exit handlers of jax would wait for the process that is gone.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from esljax._checks import InputError

LOST_PROCESS = 75
"""Exit code of a process whose run cannot go on because another process is gone: EX_TEMPFAIL of
sysexits.h, "try again"."""

# Seconds between two counts, and without a new count until a process is gone. Counting needs no
# more than a moment of the interpreter, also beside a compilation.
_PERIOD, _PATIENCE = 1.0, 20.0
_PLACE = "esljax/alive/"
_VERDICT = "esljax/gone"


class _Watch:
    """The watch of this process over the others."""

    def __init__(self, client: Any, address: str, index: int, count: int):
        self.client, self.address, self.index, self.count = client, address, index, count
        self.saved: list[Callable[[], str]] = []
        self.ended = threading.Event()
        self._abort = _on_abort(self._aborted)
        threading.Thread(target=self._run, daemon=True, name="esljax-processes").start()
        # Registered after jax's own, so called before it.
        atexit.register(self._at_exit)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        number = 0
        while not self.ended.wait(_PERIOD):
            number += 1
            try:
                self.client.key_value_set(f"{_PLACE}{self.index}", str(number), True)
                if self.index == 0:
                    self._judge(seen)
                else:
                    gone = dict(self.client.key_value_dir_get("esljax/")).get(_VERDICT)
                    if gone is not None:
                        self.end(gone)
            except Exception:
                # The store does not answer. If the first process is gone, that is the reason.
                if self.index and not self._first_answers():
                    self.end("process 0")

    def _judge(self, seen: dict[int, tuple[str, float]]) -> None:
        counts = {
            int(key.rsplit("/", 1)[1]): value
            for key, value in self.client.key_value_dir_get(_PLACE)
        }
        now = time.monotonic()
        for index, value in counts.items():
            if index not in seen or seen[index][0] != value:
                seen[index] = (value, now)
        still = [
            index
            for index, (value, since) in seen.items()
            if index and value != "ended" and now - since > _PATIENCE
        ]
        if still:
            gone = f"process{'es' * (len(still) > 1)} {', '.join(map(str, sorted(still)))}"
            self.client.key_value_set(_VERDICT, gone, True)
            # The others read the verdict before its store ends with this process.
            time.sleep(3 * _PERIOD * (self.count > 2))
            self.end(gone)

    def _first_answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, ValueError):
            return False
        return True

    def _aborted(self) -> None:
        """Before an abort: speak if the first process is gone; leave any other abort alone."""
        if self.index and not self._first_answers():
            self.end("process 0")

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        if error is not None and not isinstance(error, InputError):
            # An error of communication may be the first sign that a process is gone.
            self.wait()
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_PLACE}{self.index}", "ended", True)
        self.ended.set()

    def wait(self) -> None:
        """Give the watch the time to find that a process is gone, and end then."""
        time.sleep(_PATIENCE + 5 * _PERIOD)

    def end(self, gone: str) -> None:
        """Say what is gone and what is saved, and end this process."""
        saved = [words() for words in self.saved]
        kept = saved[-1] if saved else "nothing of it is saved: give it checkpoints"
        line = (
            f"esljax: {gone} of {self.count} is gone, so process {self.index} ends; the run is "
            f"{kept}.\n"
        )
        os.write(2, line.encode())
        os._exit(LOST_PROCESS)


_watches: list[_Watch] = []


def watch_processes() -> _Watch | None:
    """Start to watch the other processes of this run, once; None if there are none.

    A process whose run cannot go on ends with exit code 75 and a sentence that names the process
    that is gone and the checkpoint to resume from.
    """
    if _watches:
        return _watches[0]
    if jax.process_count() == 1:
        return None
    try:
        # Not public, but the only store that all processes share, and what Orbax uses.
        from jax._src.distributed import global_state as state

        client, address = state.client, state.coordinator_address
    except (ImportError, AttributeError):
        return None
    if client is None or not address:
        return None
    _watches.append(_Watch(client, address, jax.process_index(), jax.process_count()))
    return _watches[0]


def _on_abort(action: Callable[[], None]) -> Any:
    """Call an action when this process aborts. The result must be kept while it is in use.

    Python's own handlers run in the main thread between two of its instructions; an abort in
    another thread is over before. This one is called by the system in the thread that aborts.
    """
    if sys.platform == "win32":
        return None

    def handle(number: int) -> None:
        action()

    try:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.CFUNCTYPE(None, ctypes.c_int)]
        libc.signal(int(signal.SIGABRT), handler)
    except (OSError, AttributeError):
        return None
    return handler
