"""A digest of everything that two runs must share: numbers, arrays, functions, objects.

The digest of a thing is a hash of its kind and of the digests of its parts. Functions count with
all that they look up, objects with their classes. The digest does not depend on addresses in
memory, on the order of a set or a dictionary, or on whether two equal parts are one object. A
function or class at the top level of an installed package counts by its name alone, and one of
esljax by its name and room, so that it may move between the files of a room. Devices do not count,
because a run may resume on others.

Checkpoints record digests: any change of the strings hashed here rejects every older checkpoint.
"""

import argparse
import collections
import dataclasses
import dis
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding

from esljax._checks import is_key, known

_PLAIN = bool | int | float | complex | str | bytes | range | types.EllipsisType | None
_PLACES = Mesh | AbstractMesh | Sharding | jax.Device
_ARRAYS = jax.Array | np.ndarray | np.generic
_PACKAGE = __name__.partition(".")[0]


def describe(thing: Any) -> str:
    """Describe a part of a run in a few words: a number as itself, else its kind and a digest.

    Arrays count by their contents; functions by their code, the variables that they close over and
    the globals that they load; objects by their attributes and, unless an installed package defines
    their class, by its methods. An array that is spread over processes counts by its shape alone.

    **Args:** `thing`: any argument of a run.
    **Returns:** a line of text. Two runs are the same if all their arguments have the same lines.

    **Example:**

        >>> from esljax.files.description import describe
        >>> describe(40), describe("cosine")
        ('40', "'cosine'")
        >>> import esljax as esl
        >>> describe(esl.Cosine(0.1)) == describe(esl.Cosine(0.1)) != describe(esl.Cosine(0.2))
        True
    """
    if isinstance(thing, bool | int | float | str | None):
        return repr(thing)
    named = getattr(thing, "__qualname__", type(thing).__name__)
    kind = f"{thing.dtype}{list(thing.shape)}" if isinstance(thing, _ARRAYS) else named
    return f"{kind} {_digest(thing).hex()[:12]}"


class _Anatomy(NamedTuple):
    kind: str | bytes
    parts: Iterable[Any] = ()
    ordered: bool = True


class _Node:
    """A thing whose parts are being hashed."""

    def __init__(self, thing: Any, anatomy: _Anatomy):
        self.thing, self.digests = thing, []
        self.kind, parts, self.ordered = anatomy
        self.parts = iter(parts)

    def digest(self) -> bytes:
        return _hash(self.kind, *(self.digests if self.ordered else sorted(self.digests)))


def _digest(thing: Any) -> bytes:
    """The digest, by an explicit stack: lists may be nested deeper than Python can recurse."""
    # A thing is kept beside its digest, so that no new object can reuse its id meanwhile.
    finished: dict[int, tuple[Any, bytes]] = {}
    within: dict[int, int] = {}
    stack = [_Node(None, _Anatomy("", [thing]))]
    while True:
        node = stack[-1]
        for part in node.parts:
            # A run on one device has no mesh at all.
            part = None if isinstance(part, _PLACES) else part
            number = id(part)
            if isinstance(part, _PLAIN):
                node.digests.append(_hash(type(part).__qualname__, repr(part)))
            elif number in finished:
                node.digests.append(finished[number][1])
            elif number in within:
                node.digests.append(_hash("the thing around it at depth", str(within[number])))
            else:
                within[number] = len(stack)
                stack.append(_Node(part, _anatomy(part)))
                break
        else:
            stack.pop()
            if not stack:
                return node.digest()
            del within[id(node.thing)]
            finished[id(node.thing)] = node.thing, node.digest()
            stack[-1].digests.append(finished[id(node.thing)][1])


def _hash(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _anatomy(thing: Any) -> _Anatomy:
    """The kind of a thing, and its parts."""
    if isinstance(thing, _ARRAYS):
        return _of_array(thing)
    if isinstance(thing, types.ModuleType):
        return _Anatomy(thing.__name__)
    if isinstance(thing, types.CodeType):
        return _Anatomy(thing.co_code, [thing.co_names, thing.co_consts])
    if isinstance(thing, types.MethodType):
        return _Anatomy("method", [thing.__self__, thing.__func__])
    if isinstance(thing, functools.partial):
        return _Anatomy("partial", [thing.func, thing.args, thing.keywords])
    if isinstance(thing, property):
        return _Anatomy("property", [thing.fget, thing.fset])
    if isinstance(thing, slice):
        return _Anatomy("slice", [thing.start, thing.stop, thing.step])
    if (name := _name_in_a_package(thing)) is not None:
        return _Anatomy(name)
    if isinstance(thing, type):
        return _of_class(thing)
    if isinstance(thing, types.FunctionType):
        return _of_function(thing)
    return _of_object(thing)


def _of_array(thing: Any) -> _Anatomy:
    if is_key(thing):
        return _Anatomy(f"key {jax.random.key_impl(thing)}", [jax.random.key_data(thing)])
    shape = f"{thing.dtype}{thing.shape}"
    if not known(thing):
        return _Anatomy(shape)
    if thing.dtype == object:
        return _Anatomy(shape, np.ravel(thing).tolist())
    return _Anatomy(_hash(shape, np.ascontiguousarray(thing).tobytes()))


def _of_function(thing: types.FunctionType) -> _Anatomy:
    held = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
    mentioned = {name for code in _codes(thing.__code__) for name in code.co_names}
    closed_over = {
        name: _looked_up(cell.cell_contents, mentioned) for name, cell in held if _filled(cell)
    }
    loaded = {}
    if _installed(thing.__globals__.get("__name__")):
        # optax turns the steps of a schedule into a float when it is first used.
        closed_over = {
            name: float(value) if type(value) is int and abs(value) < 2**53 else value
            for name, value in closed_over.items()
        }
    else:
        loaded = _loaded(thing)
    return _Anatomy(
        thing.__qualname__,
        [thing.__code__, closed_over, thing.__defaults__, thing.__kwdefaults__, loaded],
    )


def _filled(cell: Any) -> bool:
    # Reading an empty cell raises a ValueError.
    try:
        getattr(cell, "cell_contents", None)
    except ValueError:
        return False
    return True


def _loaded(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function loads.

    Of a module that no installed package brings, the attributes whose names occur in the code.
    """
    codes = list(_codes(function.__code__))
    loads = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
    names = {
        step.argval for code in codes for step in dis.get_instructions(code) if step.opname in loads
    }
    mentioned = {name for code in codes for name in code.co_names}
    values, modules = {}, []
    for name in sorted(names & set(function.__globals__)):
        values[name] = _looked_up(function.__globals__[name], mentioned)
        modules += [values[name]] if isinstance(values[name], types.ModuleType) else []
    for module in modules:
        if _installed(module.__name__):
            continue
        for name in sorted(mentioned & set(vars(module))):
            value = vars(module)[name]
            if isinstance(value, types.ModuleType) and value not in modules:
                modules.append(value)
            values[f"{module.__name__}.{name}"] = value
    return values


def _looked_up(value: Any, mentioned: set[str]) -> Any:
    """A value; of a script's flags only those that are read: a resumed script has other flags."""
    if not isinstance(value, argparse.Namespace):
        return value
    return {name: flag for name, flag in vars(value).items() if name in mentioned}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _of_class(thing: type) -> _Anatomy:
    if _installed(thing.__module__):
        return _Anatomy(_address(thing.__module__, thing.__qualname__))
    members = {name: value for name, value in vars(thing).items() if _counts(name, value)}
    return _Anatomy(thing.__qualname__, [members, thing.__bases__])


def _counts(name: str, value: Any) -> bool:
    """Whether a member of a class may change numbers: Python's notes on its text cannot."""
    if name in ("__annotate__", "__annotate_func__"):
        return False
    special = name.startswith("__") and name.endswith("__")
    return not special or callable(value) or hasattr(value, "__get__")


def _of_object(thing: Any) -> _Anatomy:
    kind = type(thing)
    name, own = kind.__qualname__, not _installed(kind.__module__)
    # The class comes last, so that no number of parts can pass for it.
    methods = [kind] if own else []
    if hasattr(thing, "__wrapped__"):
        return _Anatomy(name, [thing.__wrapped__, _attributes(thing), *methods])
    if dataclasses.is_dataclass(thing):
        return _Anatomy(
            name,
            [
                {
                    field.name: getattr(thing, field.name, None)
                    for field in dataclasses.fields(thing)
                },
                *methods,
            ],
        )
    if isinstance(thing, dict | types.MappingProxyType):
        return _Anatomy(name, [*thing.items(), *methods], ordered=False)
    if isinstance(thing, set | frozenset):
        # Sorted, so that every process meets parts that contain each other in the same order.
        return _Anatomy(name, [*sorted(thing, key=_text), *methods], ordered=False)
    if isinstance(thing, list | tuple | collections.deque):
        return _Anatomy(name, [*thing, *methods])
    parts, structure = jax.tree.flatten(thing, is_leaf=lambda node: node is not thing)
    if len(parts) != 1 or parts[0] is not thing:
        return _Anatomy(_without_addresses(f"{structure}"), [*parts, *methods])
    if own or kind.__repr__ is object.__repr__:
        return _Anatomy(name, [_attributes(thing), *methods])
    return _Anatomy(_text(thing))


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object, from its dictionary and its slots, without cached properties."""
    slots = [
        name for kind in type(thing).__mro__ for name in _names(vars(kind).get("__slots__", ()))
    ]
    attributes = {
        name: getattr(thing, name)
        for name in slots
        if not name.startswith("__") and hasattr(thing, name)
    }
    for name, value in getattr(thing, "__dict__", {}).items():
        cached = isinstance(getattr(type(thing), name, None), functools.cached_property)
        if not cached and not (name.startswith("__") and name.endswith("__")):
            attributes[name] = value
    return attributes


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _text(thing: Any) -> str:
    return _without_addresses(repr(thing))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _name_in_a_package(thing: Any) -> str | None:
    """The name under which an installed package has a thing; None if none has it."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _installed(module):
        return None
    value = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return _address(module, name) if value is thing else None


def _address(module: str, name: str) -> str:
    """The name of a thing in a module; in esljax in a room, whichever file of it holds the thing.

    Checkpoints outlive files: `esljax.transport.exact.ExactTransport` was once, and is here,
    `esljax.transport.ExactTransport`.
    """
    if module.partition(".")[0] == _PACKAGE:
        module = ".".join(module.split(".")[:2])
    return f"{module}.{name}"


@functools.cache
def _installed(module: str | None) -> bool:
    """Whether a module belongs to an installed package (esljax counts) and not to a user."""
    root = (module or "__main__").partition(".")[0]
    if root == "__main__":
        return False
    if root in sys.stdlib_module_names or root == _PACKAGE:
        return True
    package = sys.modules.get(root)
    files = [getattr(package, "__file__", None), *getattr(package, "__path__", ())]
    return any(_among_packages(Path(file)) for file in files if file)


def _among_packages(file: Path) -> bool:
    places = {
        Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    return bool({"site-packages", "dist-packages"} & set(file.parts)) or any(
        file.is_relative_to(place) for place in places
    )
