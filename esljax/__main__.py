"""`python -m esljax` and the `esljax` command."""

import contextlib
import os
import signal
import sys
from typing import Any

# Exit codes: 128 and the number of the signal, as shells have them, and that of bad input.
_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143}
_BAD_INPUT = 2


def main() -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    # Importing takes seconds, in which there is nothing to save and nothing to say but this.
    handlers = _on_signals(
        lambda number: _quit(_code(number), "ended before it began; nothing was written.")
    )
    try:
        from esljax.command import main as run
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        # A library does not start with a setting of the environment, or is not installed whole.
        reason = " ".join(str(error).split())
        _quit(_BAD_INPUT, f"a library does not start ({type(error).__name__}: {reason}).")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    code = run()
    # All is written and said: a second Ctrl-C only hurries the end.
    _on_signals(lambda number: os._exit(code))
    sys.exit(code)


def _on_signals(act: Any) -> dict[Any, Any]:
    """Handle the signals that end a command, and return the handlers of before.

    Those that the caller ignores, as `nohup` does, stay ignored.
    """
    known = [getattr(signal, name) for name in _CODES if hasattr(signal, name)]
    ours = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, lambda number, _: act(number)) for number in ours}


def _code(number: int) -> int:
    return _CODES[signal.Signals(number).name]


def _quit(code: int, words: str) -> None:
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


if __name__ == "__main__":
    main()
