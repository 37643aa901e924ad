"""The first seconds of the command, in which it imports its libraries.

A signal, or a library that does not start with a setting of the environment, ends it with one line
and the documented code. Only a process that is the command gets these handlers: importing the
package in any other program changes nothing.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143}
"""Exit codes by signal: 128 and the number of the signal, as shells have them."""
_BAD_INPUT = 2
# By which a user may have set the threads of OpenBLAS.
_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


def is_command() -> bool:
    """Whether this process is `esljax` or `python -m esljax`, and none of its workers."""
    parallel = sys.modules.get("multiprocessing")
    if parallel is not None and parallel.parent_process() is not None:
        return False
    name, flags = (sys.argv or [""])[0], sys.orig_argv
    if name == "-m":
        return flags[flags.index("-m") + 1 :][:1] == ["esljax"] if "-m" in flags else False
    return os.path.basename(name) in ("esljax", "esljax.exe")


def begin() -> None:
    """Open closed streams, and answer signals and faults until the command has begun."""
    _open_streams()
    # jax takes LAPACK from SciPy, whose threads wait for work in a loop and take the cores from the
    # rest. Workers inherit the setting. OpenBLAS prefers its own variable to the others.
    if not any(os.environ.get(name) for name in _THREADS):
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # Importing makes many objects and no garbage; looking through them took a tenth of the time.
    gc.disable()
    on_signals(lambda number: _quit(code_of(number), "ended before it began; nothing was written."))
    sys.excepthook = _answer


def begun() -> None:
    """Leave faults to Python again, and signals to the handlers of the command.

    Before and after the command, another signal only hurries the end.
    """
    gc.freeze()
    gc.enable()
    sys.excepthook = sys.__excepthook__
    on_signals(lambda number: os._exit(code_of(number)))


def answered() -> list[signal.Signals]:
    """The signals that end a command. Those that the caller ignores (`nohup`) stay ignored."""
    known = [getattr(signal, name) for name in CODES if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def on_signals(act: Callable[[int], Any]) -> None:
    """Call a function with the number of a signal that ends a command."""
    for number in answered():
        signal.signal(number, lambda number, _: act(number))


def code_of(number: int) -> int:
    """The exit code after a signal."""
    return CODES[signal.Signals(number).name]


def _answer(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, ImportError | ValueError | RuntimeError | OSError):
        reason = " ".join(str(error).split())
        _quit(_BAD_INPUT, f"a library does not start ({kind.__name__}: {reason}).")
    sys.__excepthook__(kind, error, trace)


def _quit(code: int, words: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"esljax: {words}\n".encode("ascii", "replace"))
    os._exit(code)


def _open_streams() -> None:
    """Open standard streams that are closed, so that no file gets their numbers, and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if is_command():
    begin()
