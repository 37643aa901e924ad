"""`python -m esljax` and the `esljax` command."""

import signal
import sys

from esljax import _starting


def main() -> None:
    """Run the command line and exit with its code."""
    _starting.begin()
    from esljax.command import main as run

    _starting.begun()
    try:
        code = run()
    except KeyboardInterrupt:  # a second one, in the moment in which the first was answered
        code = _starting.CODES["SIGINT"]
    # All is written and said. At its very end, Python has no handlers, and a signal, which any
    # thread of a library may receive, would change the exit code.
    for number in _starting.answered():
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
