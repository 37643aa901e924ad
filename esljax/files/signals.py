"""Signals that end a run: noted, delayed while a file is written, or raised as an exception.

Signals reach the main thread alone; in any other thread everything here does nothing.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

TERMINATED = 143
"""Exit code of a process that saved its run after SIGTERM: 128 + 15, the convention of shells."""


class Terminated(SystemExit):
    """Raised when the process has received SIGTERM; uncaught, it ends the process with code 143.

    **Args:** `message`: one sentence on what is saved and where.
    """

    def __init__(self, message: str):
        super().__init__(TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def handling(number: signal.Signals, handler: Callable[..., Any]) -> Iterator[None]:
    """Handle a signal in the main thread; elsewhere signals do not arrive, and nothing is done.

    A handler that was not set from Python cannot be put back, so it is left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(number) is None:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def endings() -> list[signal.Signals]:
    """The signals that end a run: SIGTERM, and SIGHUP where a command has chosen to handle it."""
    hangup: Any = getattr(signal, "SIGHUP", None)
    found: list[signal.Signals] = [signal.SIGTERM]
    if hangup is not None and callable(signal.getsignal(hangup)):
        found.append(hangup)
    return found


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, and `KeyboardInterrupt` on Ctrl-C.

    A signal that the caller ignores, as `nohup` does, stays ignored.
    """

    def end(number: int, _: Any) -> None:
        raise Terminated(f"Ended by {signal.Signals(number).name}.")

    answers = {"SIGINT": signal.default_int_handler, "SIGTERM": end, "SIGHUP": end}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                stack.enter_context(handling(number, answer))
        yield


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Drop Ctrl-C, SIGTERM and SIGHUP: what they ask for is being done."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, *endings()):
            if callable(signal.getsignal(number)):
                stack.enter_context(handling(number, lambda *_: None))
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until what is being written is complete."""
    arrived: list[int] = []
    try:
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, *endings()):
                if callable(signal.getsignal(number)):
                    stack.enter_context(handling(number, lambda number, _: arrived.append(number)))
            yield
    finally:
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)
