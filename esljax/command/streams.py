"""What the commands print, on streams that cannot end them.

Whether results survive must not depend on who reads them: a terminal without Greek letters, a pipe
that `head` has closed, a full disk behind `>`, or nobody. Letters that an encoding lacks are
spelled in its own. A stream that fails is silent from there on.
"""

import codecs
import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import rich.console

# Spellings in ASCII of the signs that reports use.
_SPELLED = {
    "Σ": "Sigma",
    "Φ": "Phi",
    "η": "eta",
    "σ": "sigma",
    "ℓ": "l",
    "θ": "theta",
    "τ": "tau",
    "χ": "chi",
    "ε": "epsilon",
    "Δ": "Delta",
    "∇": "grad",
    "π": "pi",
    "₀": "0",
    "²": "^2",
    "√": "sqrt",
    "½": "1/2",
    "±": "+-",
    "×": "x",
    "∫": "int ",
    "∝": "~",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "–": "-",
    "—": "-",
    "…": "...",
    "é": "e",
}


def legible(text: str, stream: Any = None) -> str:
    """The text with what the encoding of a stream lacks spelled out; of standard output if None.

    Tables call it before they are laid out, because a spelling is longer than its sign.
    """
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _SPELLING).decode(encoding, "surrogateescape")


def wide(console: rich.console.Console, width: int) -> rich.console.Console:
    """A console at least that wide, whatever the terminal is: it breaks lines, and no numbers."""
    console.width = max(console.width, width)
    return console


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Let nothing that is printed in the block raise, and leave one line for each warning."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Patient(before[0]), _Patient(before[1])
    try:
        with _quiet(), _some_columns():
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


# On fewer columns than these, the help of a command has no end.
_COLUMNS = 40


@contextlib.contextmanager
def _some_columns() -> Iterator[None]:
    """Lay text out for some columns at least, however few a terminal has or claims to have."""
    if shutil.get_terminal_size().columns >= _COLUMNS:
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_COLUMNS)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


class _Patient(io.TextIOBase):
    """A text stream that spells what it cannot encode and is silent once it has failed."""

    def __init__(self, stream: Any):
        # A stream that was closed before the start is None.
        self._stream = stream
        self._silent = stream is None

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return not self._silent and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not self._silent:
            try:
                self._write(text)
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self._silent:
            try:
                self._stream.flush()
            except BlockingIOError:
                with contextlib.suppress(OSError, ValueError):
                    os.set_blocking(self._stream.fileno(), True)
                    self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            content = text.encode(self.encoding, _SPELLING)
            if hasattr(self._stream, "buffer"):
                self._stream.flush()
                self._stream.buffer.write(content)
                self._stream.buffer.flush()
            else:
                self._stream.write(content.decode(self.encoding, "replace"))

    def _give_up(self) -> None:
        """Send the rest to nobody, and so what Python tries again to write at its end."""
        self._silent = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = self._stream.fileno()
            if number in (1, 2):
                nobody = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nobody, number)
                os.close(nobody)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Spell the first letter that cannot be encoded; a byte of a file name is itself."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    spelled = _SPELLED.get(letter)
    if spelled is None:
        # Lines of tables and bars.
        spelled = "-" if 0x2500 <= ord(letter) < 0x2600 else "?"
    return spelled, error.start + 1


_SPELLING = "esljax.spelled"
codecs.register_error(_SPELLING, _spell)

# Loggers of libraries that say in their words what a command says in its own.
_CHATTY = ("absl", "asyncio", "distributed", "jax", "matplotlib", "tornado", "orbax")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.CRITICAL))
    before = warnings.formatwarning
    warnings.formatwarning = _in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _in_one_line(message: Any, *_: Any, **__: Any) -> str:
    return f"esljax: {' '.join(str(message).split())}\n"
