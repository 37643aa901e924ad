"""matplotlib, loaded and used whatever the settings of the user are.

A figure here goes to a file or to a notebook, and needs no window. So a backend that does not exist
is no reason to have no figure. Settings with which a figure cannot be drawn (an undecodable
matplotlibrc, TeX that is not installed) are replaced by those of matplotlib, and that is said.
"""

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from esljax._checks import InputError, first_sentence

# Where each format keeps the name of the program that drew a figure.
_PROGRAM = {
    "png": "Software",
    "pdf": "Creator",
    "svg": "Creator",
    "svgz": "Creator",
    "ps": "Creator",
    "eps": "Creator",
}


def load() -> None:
    """Import matplotlib, if need be without the backend and the settings that the user names.

    **Raises:** `InputError` if it cannot be imported.
    """
    try:
        try:
            importlib.import_module("matplotlib.figure")
        except ImportError:
            raise
        except Exception:
            _forget()
            with _settings_of_matplotlib():
                importlib.import_module("matplotlib.figure")
    except Exception as error:
        _forget()
        raise InputError(
            f"Figures need matplotlib, which does not start here: {first_sentence(error)}."
        ) from error


@contextlib.contextmanager
def _settings_of_matplotlib() -> Iterator[None]:
    """Hide the backend and the file of settings that the environment names."""
    names = ("MPLBACKEND", "MATPLOTLIBRC")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["MATPLOTLIBRC"] = os.devnull
    try:
        yield
    finally:
        del os.environ["MATPLOTLIBRC"]
        os.environ.update(before)


def rendered(draw: Callable[[], Any], kind: str, signature: str) -> tuple[bytes, str]:
    """Draw a figure and return it as the content of a file.

    **Args:** `draw`: makes the figure. `kind`: the ending of the file, such as "png". `signature`:
    goes into the metadata of the file, where its format has any for text.
    **Returns:** the content, and a sentence on what was changed to get it, "" if nothing was.
    **Raises:** `InputError`, one sentence, if the figure cannot be drawn.
    """
    load()
    import matplotlib

    try:
        return _saved(draw, kind, signature), ""
    except InputError:
        raise
    except Exception as error:
        reason = first_sentence(error)
    try:
        with matplotlib.rc_context(matplotlib.rcParamsDefault):
            return (
                _saved(draw, kind, signature),
                f"drawn with the settings of matplotlib, because yours fail ({reason})",
            )
    except Exception as error:
        raise InputError(f"The figure cannot be drawn: {first_sentence(error)}.") from error


def _saved(draw: Callable[[], Any], kind: str, signature: str) -> bytes:
    figure, file = draw(), io.BytesIO()
    kinds = sorted(figure.canvas.get_supported_filetypes())
    if kind not in kinds:
        raise InputError(f"A figure can have the endings {', '.join(kinds)}, not {kind!r}.")
    metadata = {_PROGRAM[kind]: signature} if kind in _PROGRAM else None
    with _quiet():
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return file.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what matplotlib says of fonts and caches: the figure has others then, or none."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _forget() -> None:
    """Forget what an import that failed has left, so that another can be tried."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("matplotlib", "mpl_toolkits"):
            del sys.modules[name]


with _quiet():
    load()
