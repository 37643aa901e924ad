"""Problems from outside on their way to other processes.

One with a place is loaded there, from the same content. An object is pickled, by cloudpickle where
that is installed, which also takes lambdas, closures and what a notebook defines.
"""

import functools
import inspect
import pickle
import sys
from typing import Any, NamedTuple

import jax

from esljax._checks import InputError, first_sentence, in_words, refuse
from esljax.experiment.problem import Problem
from esljax.experiment.sources import Source
from esljax.files import describe


class Parcel(NamedTuple):
    """A source in a form that any process can open."""

    name: str
    """The source in words."""
    place: str
    """Where it is; "" for an object."""
    content: str
    """Its `content_of`."""
    keywords: tuple[str, ...]
    """The names of its keywords."""
    wide: bool
    """Whether jax had numbers of 64 bits when it was loaded."""
    made: bytes
    """The pickled object; empty beside a place."""


def content_of(source: Source) -> str:
    """A digest of the numbers, functions and arrays that the problems of a source are made from."""
    return describe(source.made)


def parcel(source: Source) -> Parcel:
    """Wrap a source up for other processes.

    **Raises:** `InputError` that names what cannot travel.
    """
    keywords = tuple(source.keywords)
    about = str(source), source.place, content_of(source), keywords, source.wide
    if source.place:
        return Parcel(*about, made=b"")
    try:
        return Parcel(*about, made=_pickled(source.made))
    except Exception as error:
        part, why = _stuck(source.made, error)
        raise refuse(
            "problem",
            "travel to other processes",
            f"{part} cannot ({why}); give it as 'my_file.py:name', or run the study in one process",
        ) from error


def opened(given: Any) -> Any:
    """The source in a parcel, or a source itself.

    **Raises:** `InputError` if its content is not what was wrapped up, or cannot be loaded.
    """
    return _opened(given) if isinstance(given, Parcel) else given


@functools.lru_cache(maxsize=8)
def _opened(given: Parcel) -> Source:
    try:
        # What it is made from has the type of the numbers then, and so its digest.
        with jax.enable_x64(given.wide):
            source = Source.of(given.place or pickle.loads(given.made))
    except InputError:
        raise
    except Exception as error:
        must = "be an object that the workers can load"
        raise refuse("problem", must, f"{given.name} gives: {first_sentence(error)}") from error
    # A pickled object may name its parts otherwise than the first one did.
    if given.place and content_of(source) != given.content:
        must = "stay as it is while its study runs"
        raise refuse("problem", must, f"{given.name} has changed since")
    return source


def _pickled(made: Any) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        main = sys.modules["__main__"]
        if getattr(made, "__module__", "") == "__main__" and not hasattr(main, "__file__"):
            raise pickle.PicklingError(
                "no file defines it, and cloudpickle is not installed"
            ) from None
        return pickle.dumps(made)
    return cloudpickle.dumps(made)


def _stuck(made: Any, error: Exception) -> tuple[str, str]:
    """The smallest part of an object that cannot be pickled, in words, and why."""
    if isinstance(made, Problem):
        parts = {f"its part `{name}`": part for name, part in made.parts().items()}
        parts["its part `mesh`"] = made.mesh
    else:
        # A lambda in plain pickle is stuck itself, and its parts are not.
        try:
            found = inspect.getclosurevars(inspect.unwrap(made))
        except TypeError:
            found = inspect.ClosureVars({}, {}, {}, set())
        parts = {f"`{name}`, which it uses,": part for name, part in found.nonlocals.items()}
        parts |= {f"`{name}`, which it uses,": part for name, part in found.globals.items()}
    for words, part in parts.items():
        try:
            _pickled(part)
        except Exception as deeper:
            return f"{words} is {in_words(part)} and", first_sentence(deeper)
    return in_words(made), first_sentence(error)
