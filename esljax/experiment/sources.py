"""A learning problem from outside: a `Problem`, or a function of keywords that returns one.

It is given as an object, or by the place where it is: "my_file.py:name" or "package.module:name".
The keywords of a function are settings: flags of a command, keys of a TOML file, axes of a study.

    def network(width: int = 16, batch: int = 8) -> esl.Problem: ...

    source = Source.of("my_file.py:network")
    source.problem(width=32)
    settings_class(GeneralConfig, source)(width=32, seed=1)
"""

import contextlib
import contextvars
import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import jax

from esljax._checks import InputError, in_words, own_frame, refuse
from esljax.experiment.bounds import OneOf, check_fields
from esljax.experiment.problem import Problem
from esljax.files import Terminated

_MUST = "be a Problem, or a function of keywords that returns one"
_PLACE = f"{_MUST}, as 'my_file.py:name' or 'package.module:name'"
# Settings of these types have a flag and a key of a TOML file.
_TYPES = (bool, int, float, str, Path)


class Required(enum.Enum):
    """What a setting without a default holds until it is given."""

    REQUIRED = "to be given"


REQUIRED = Required.REQUIRED


class Keyword(NamedTuple):
    """A keyword of a function that makes a problem."""

    annotation: Any
    """The type as the fields of settings have it."""
    default: Any
    """`REQUIRED` where the function has none."""
    words: str = ""
    """What the docstring of the function says about it."""
    as_list: bool = False
    """Whether the function has a list where settings have a tuple."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A problem from outside, and the keywords that it is made from.

    Sources are equal if they have the same object and place. One with a place may travel to another
    process, which loads it there.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> from esljax.experiment import Source
        >>> def line(members: int = 8, noise: float = 0.1):
        ...     '''Members on a line.'''
        ...     return esl.Problem(
        ...         esl.Quadratic(1.0),
        ...         members=members,
        ...         steps=10,
        ...         snapshots=5,
        ...         temperature=noise,
        ...         start=lambda key: jax.random.normal(key, (members, 1)),
        ...     )
        >>> source = Source.of(line)
        >>> sorted(source.keywords), source.problem(members=4).members
        (['members', 'noise'], 4)
    """

    place: str
    """Where it is: "/folder/my_file.py:name" or "package.module:name"; "" for an object that was
    given from Python."""
    made: Problem | Callable[..., Problem]
    """The problem, or the function that makes it."""
    keywords: Mapping[str, Keyword]
    """The keywords of the function, by name; none of a problem."""
    wide: bool = False
    """Whether jax had numbers of 64 bits when it was loaded."""

    @staticmethod
    def of(given: "Source | str | Path | Problem | Callable[..., Problem]") -> "Source":
        """The source of a place or an object.

        **Raises:** `InputError` for a place that cannot be loaded, with the line of the user's file
        that is at fault, and for a function whose parameters are no settings.
        """
        if isinstance(given, Source):
            return given
        given_object: tuple[str, Any] = "", given
        place, made = _load(str(given)) if isinstance(given, str | Path) else given_object
        if isinstance(made, Problem):
            return Source(place, made, types.MappingProxyType({}), _wide())
        if isinstance(made, type) or not callable(made):
            named = f"{_brief(place)} is" if place else "is"
            raise refuse("problem", _PLACE if place else _MUST, f"{named} {in_words(made)}")
        function: Callable[..., Any] = made
        name = _brief(place) if place else in_words(made)
        return Source(place, function, types.MappingProxyType(_keywords(function, name)), _wide())

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Source) and (self.place, id(self.made)) == (
            other.place,
            id(other.made),
        )

    def __hash__(self) -> int:
        return hash((self.place, id(self.made)))

    def __reduce__(self) -> Any:
        return (Source.of, (self.place or self.made,))

    def __str__(self) -> str:
        return _brief(self.place) if self.place else in_words(self.made)

    @property
    def problem(self) -> Callable[..., Problem]:
        """A function of settings by name to the problem; the others have their defaults.

        It raises `InputError` for an unknown or missing setting, one of the wrong type, and
        whatever goes wrong in the function that makes the problem, with the line of the user's
        file.
        """
        return self._problem

    def _problem(self, **settings: Any) -> Problem:
        given = self.check(settings)
        made = self.made
        if isinstance(made, Problem):
            return made
        if self.place and self.wide != _wide():
            # Arrays that the file makes when it runs have the type of jax at that time.
            made = _load(self.place)[1]
        for name, value in given.items():
            if self.keywords[name].as_list and value is not None:
                given[name] = list(value)
        with self.blamed(str(self)):
            problem = made(**given)
        if not isinstance(problem, Problem):
            code: Any = getattr(inspect.unwrap(made), "__code__", None)
            line = "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
            raise refuse("problem", _MUST, f"{self} returns {in_words(problem)}{line}")
        return problem

    def check(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as the types of the keywords have them: tuples, floats, paths.

        **Raises:** `InputError` for an unknown or missing setting, or one of a wrong type.
        """
        for name in settings:
            if name not in self.keywords:
                raise self.unknown(name)
        given = {name: _fitted(self.keywords[name], value) for name, value in settings.items()}
        values = {name: keyword.default for name, keyword in self.keywords.items()} | given
        for name, value in values.items():
            if value is REQUIRED:
                raise refuse(name, f"be given: {self} has no default for it", "is not")
        check_fields(_settings_class(_Nothing, self)(**values))
        return given

    def unknown(self, name: str) -> InputError:
        """The error of a setting that this problem does not have, which the caller raises."""
        if isinstance(self.made, Problem):
            return refuse(
                name,
                f"be left out with {self}, a Problem, which has no settings (a function of "
                "keywords that returns a Problem has)",
                "is given",
            )
        known = ", ".join(self.keywords) or "none"
        return refuse(name, f"be left out with {self}, whose settings are {known}", "is given")

    @contextlib.contextmanager
    def blamed(self, what: str = "") -> Iterator[None]:
        """Turn whatever is raised in the user's code into one sentence with its file and line.

        **Args:** `what`: what to name in the place of a line, if none of the user has raised; ""
        to let that error pass.
        """
        where = self.place.rpartition(":")[0]
        file = Path(where) if _is_file(where) else None
        with _beside(file), _blamed(what):
            yield


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """Settings without any field."""


def settings_class(base: Any, source: Any) -> Any:
    """A frozen dataclass with the fields of `base` and one for each keyword of a source.

    It is the same class for equal sources, its instances are hashable where their values are, and
    may travel to another process where the source may. `source` is an attribute of the class. A
    keyword without a default is `REQUIRED` until it is given. Without a source it is `base`.

    **Raises:** `InputError` for a keyword that has the name of a setting of `base`.

    **Example:**

        >>> import esljax as esl
        >>> import jax
        >>> from esljax.experiment import GeneralConfig, Source, settings_class
        >>> def line(members: int = 8):
        ...     return esl.Problem(
        ...         esl.Quadratic(1.0),
        ...         members=members,
        ...         steps=10,
        ...         snapshots=5,
        ...         start=lambda key: jax.random.normal(key, (members, 1)),
        ...     )
        >>> kind = settings_class(GeneralConfig, Source.of(line))
        >>> kind(members=4, rate=0.5)
        GeneralConfig(seed=0, dtype='float32', rate=0.5, members=4)
    """
    return base if source is None else _settings_class(base, source)


def source_of(settings: Any) -> Any:
    """The source that settings, or their class, were made for; None for the built-in problem."""
    return getattr(settings if isinstance(settings, type) else type(settings), "source", None)


def given_of(settings: Any) -> dict[str, Any]:
    """The values of a source's keywords among settings, by name."""
    source = source_of(settings)
    return {name: getattr(settings, name) for name in (source.keywords if source else ())}


def check_given(settings: Any) -> None:
    """**Raises:** `InputError` for a keyword of the settings' source that is still to be given."""
    source = source_of(settings)
    if source is not None:
        source.check(given_of(settings))


@functools.lru_cache(maxsize=64)
def _settings_class(base: Any, source: Any) -> Any:
    for name in source.keywords:
        if hasattr(base, name) or name in ("source", "help"):
            raise refuse(
                "problem",
                "be a function whose keywords differ from the settings beside it (rename it in the "
                f"function, as problem_{name})",
                f"{source} has the keyword `{name}`",
            )
    fields: Any = [
        (name, keyword.annotation, dataclasses.field(default=keyword.default))
        for name, keyword in source.keywords.items()
    ]
    namespace = {"__doc__": base.__doc__, "source": source, "__reduce__": _reduced}
    made = dataclasses.make_dataclass(
        base.__name__, fields, bases=(base,), namespace=namespace, frozen=True
    )
    made.__module__ = base.__module__
    return made


def _reduced(settings: Any) -> Any:
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return _restored, (type(settings).__mro__[1], type(settings).source, values)


def _restored(base: Any, source: Source, values: dict[str, Any]) -> Any:
    return settings_class(base, source)(**values)


# --- Keywords -------------------------------------------------------------------------------------


def _keywords(function: Callable[..., Any], name: str) -> dict[str, Keyword]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # of the annotations, which may be any expression
        must = "be a function whose signature can be read"
        raise refuse("problem", must, f"{name} gives: {_said(error)}") from error
    words = _documented(function)
    return {
        parameter.name: _keyword(parameter, name, words.get(parameter.name, ""))
        for parameter in signature.parameters.values()
    }


def _keyword(parameter: inspect.Parameter, function: str, words: str) -> Keyword:
    name, default = parameter.name, parameter.default
    signs = {parameter.VAR_POSITIONAL: f"*{name}", parameter.VAR_KEYWORD: f"**{name}"}
    if parameter.kind in signs or parameter.kind is parameter.POSITIONAL_ONLY:
        shown = signs.get(parameter.kind, f"the positional-only {name}")
        must = "be a function of keywords, each of which becomes a setting"
        raise refuse("problem", must, f"{function} has {shown}")
    if not name[0].isalpha():
        must = "be a function whose keywords can be flags, which begin with a letter"
        raise refuse("problem", must, f"{function} has the keyword {name}")
    empty = parameter.empty
    default = REQUIRED if default is empty else _python(default)
    annotation = _type_of(default) if parameter.annotation is empty else parameter.annotation
    made = None if annotation is None else _annotation(annotation)
    if made is None:
        if parameter.annotation is not empty:
            what = f"is {inspect.formatannotation(annotation)}"
        else:
            plain = isinstance(default, bool | int | float | str | list | tuple | dict | None)
            shown = repr(default) if plain else in_words(default)
            nothing = default is REQUIRED
            what = "has no type and no default" if nothing else f"has the default {shown}"
        must = (
            "be a function whose keywords can be settings: bool, int, float, str, Path, Literal, "
            "or a tuple or list of any length of one of them, or one of these or None"
        )
        raise refuse("problem", must, f"`{name}` of {function} {what}")
    annotation, as_list = made
    keyword = Keyword(annotation, default, words, as_list)
    return keyword._replace(default=_fitted(keyword, default))


def _fitted(keyword: Keyword, value: Any) -> Any:
    """A value in the type of its keyword, where that loses nothing."""
    members, value = _members(keyword.annotation), _python(value)
    if isinstance(value, list | tuple):
        if _item(keyword.annotation) is float:
            value = [float(one) if type(one) is int else one for one in map(_python, value)]
        return tuple(value)
    if float in members and type(value) is int:
        return float(value)
    if Path in members and isinstance(value, str):
        return Path(value)
    return value


def _type_of(default: Any) -> Any:
    """The annotation that a default stands for; None if it stands for none."""
    if isinstance(default, tuple | list) and default:
        kinds = {type(one) for one in default}
        kind = float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else None
        if kind not in _TYPES:
            return None
        return tuple[kind, ...] if isinstance(default, tuple) else list[kind]
    kind = Path if isinstance(default, Path) else type(default)
    return kind if kind in _TYPES else None


def _annotation(annotation: Any) -> tuple[Any, bool] | None:
    """The annotation as settings have it, and whether it was one of a list; None if it is none."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = _annotation(parts[0])
        return inner and (Annotated[(inner[0], *parts[1:])], inner[1])
    if origin in (Union, types.UnionType):
        some = {part for part in parts if part is not types.NoneType}
        if some == {int, float}:
            some = {float}
        if len(some) != 1:
            return None
        inner = _annotation(some.pop())
        optional = types.NoneType in parts
        return inner and (inner[0] | None if optional else inner[0], inner[1])
    if origin is Literal:
        kinds = {type(part) for part in parts}
        if kinds not in ({str}, {int}):
            return None
        return Annotated[(kinds.pop(), OneOf({part: part for part in parts}))], False
    if origin in (tuple, list):
        items = parts[:1] if origin is list or parts[1:] == (...,) else ()
        inner = _annotation(items[0]) if items else None
        plain = inner is not None and _item(inner[0]) is None and len(_members(inner[0])) == 1
        return (tuple[inner[0], ...], origin is list) if inner and plain else None
    return (annotation, False) if annotation in _TYPES else None


def _members(annotation: Any) -> set[Any]:
    """The types that a value of this annotation may have."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _members(parts[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_members, parts))
    return {annotation}


def _item(annotation: Any) -> Any:
    """The type of the items of a tuple; None for anything else."""
    for member in _members(annotation):
        if get_origin(member) is tuple:
            (kind,) = _members(get_args(member)[0])
            return kind
    return None


def _python(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _documented(function: Any) -> dict[str, str]:
    """What a docstring says about each keyword, where it has lines "name: words" or the like."""
    text = inspect.getdoc(function) or ""
    line = re.compile(r"^\s*(?:[-*]\s*|:param\s+)?`{0,2}(\w+)`{0,2}(?:\s*\([^)]*\))?:\s+(\S.*)$")
    found = (line.match(each) for each in text.splitlines())
    return {match[1]: match[2].strip() for match in found if match}


# --- Files ----------------------------------------------------------------------------------------


class _Loaded(NamedTuple):
    """A file that was run as a module."""

    module: types.ModuleType
    content: bytes
    stamps: dict[str, float]
    """The times at which its neighbors were modified, by their files."""


_LOADED: dict[tuple[Path, bool], _Loaded] = {}
# The modules that the files of a folder import from it. They are in `sys.modules` only while code
# of that folder runs, so that two folders may have a `model.py` each.
_NEIGHBORS: dict[tuple[Path, bool], dict[str, types.ModuleType]] = {}
# No other module has such a name, whatever the file is called.
_PREFIX = "_problem_"


class _Asked(NamedTuple):
    """What a place is given for."""

    argument: str
    must: str
    kinds: tuple[type, ...]
    """The kinds of objects, besides problems, that a module may offer for it."""


_OF_A_PROBLEM = _Asked("problem", _PLACE, (types.FunctionType,))
_ASKED = contextvars.ContextVar("asked", default=_OF_A_PROBLEM)


def load(argument: str, place: str, must: str) -> Any:
    """The object at a place, "my_file.py:name" or "package.module:name".

    **Args:** `argument`: the setting that names the place. `must`: what it must be, for messages.
    **Raises:** `InputError` for a place without such an object, and whatever goes wrong in the
    user's file, with its line.
    """
    token = _ASKED.set(_Asked(argument, must, (types.FunctionType, type)))
    try:
        return _load(place)[1]
    finally:
        _ASKED.reset(token)


def _refused(was: str) -> InputError:
    asked = _ASKED.get()
    return refuse(asked.argument, asked.must, was)


def _wide() -> bool:
    return bool(jax.config.read("jax_enable_x64"))


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _load(place: str) -> tuple[str, Any]:
    """The full place and the object there."""
    where, _, name = place.rpartition(":")
    if not where or not name.isidentifier():
        where = where if where.endswith(".py") else place.rstrip(":")
        known = f" (it has {_offers(_run(_file(where)))})" if where.endswith(".py") else ""
        raise _refused(f"is {place!r}{known}")
    module = _run(_file(where)) if _is_file(where) else _imported(where)
    if not hasattr(module, name):
        raise _refused(f"{where} has no {name!r}; it has {_offers(module)}")
    full = str(_file(where)) if _is_file(where) else where
    return f"{full}:{name}", getattr(module, name)


def _imported(where: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise _refused(f"names the module {where!r}")
    with _on_path(Path.cwd()), _blamed(where):
        return importlib.import_module(where)


def _file(where: str) -> Path:
    try:
        file = Path(where).expanduser().resolve()
        found = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise _refused(f"{where} gives {_said(error)}") from error
    if not found:
        raise _refused(f"there is no file {file}")
    if file.suffix != ".py":
        raise _refused(f"{file} is no file of Python, whose name ends in .py")
    return file


def _run(file: Path) -> types.ModuleType:
    """The module of a file, which is run once for each content and floating type."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _refused(f"{file} gives: {error.strerror}") from error
    before = _LOADED.get((file, _wide()))
    if before is not None and before.content == content and before.stamps == _stamps(before.stamps):
        return before.module
    if before is not None:
        _NEIGHBORS.pop((file.parent, _wide()), None)
    module = types.ModuleType(
        f"{_PREFIX}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    )
    module.__file__ = str(file)
    replaced = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        with _beside(file), _blamed(file.name):
            exec(compile(content, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        if replaced is not None:
            sys.modules[module.__name__] = replaced
        raise
    files = [getattr(each, "__file__", None) for each in _NEIGHBORS[file.parent, _wide()].values()]
    stamps = _stamps(each for each in files if each)
    _LOADED[file, _wide()] = _Loaded(module, content, stamps)
    return module


def _stamps(files: Iterable[str]) -> dict[str, float]:
    return {file: Path(file).stat().st_mtime for file in files if Path(file).exists()}


@contextlib.contextmanager
def _beside(file: Path | None) -> Iterator[None]:
    """Let code import the neighbors of its file in the block."""
    if file is None:
        yield
        return
    ours = _NEIGHBORS.setdefault((file.parent, _wide()), {})
    before = dict(sys.modules)
    sys.modules.update(ours)
    try:
        with _on_path(file.parent):
            yield
    finally:
        new = [name for name in sys.modules if name not in before or name in ours]
        for name in new:
            if name in ours or _is_neighbor(name, file.parent):
                ours[name] = sys.modules[name]
        for name in ours:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def _is_neighbor(name: str, folder: Path) -> bool:
    """Whether a module, or the package that it is of, lies in a folder itself."""
    root = name.partition(".")[0]
    package = sys.modules.get(root)
    known = [getattr(package, "__file__", None), *(getattr(package, "__path__", None) or ())]
    homes = {folder / f"{root}.py", folder / root, folder / root / "__init__.py"}
    return not root.startswith(_PREFIX) and any(Path(each) in homes for each in known if each)


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _offers(module: types.ModuleType) -> str:
    """The problems and functions that a module defines."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, Problem)
            or (isinstance(value, _ASKED.get().kinds) and value.__module__ == module.__name__)
        )
    ]
    return ", ".join(names) or "no function and no Problem"


# --- Blame ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Turn an exception of the user's code into one sentence with its file and line."""
    try:
        yield
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        own = own_frame(error)
        if own is None and (isinstance(error, InputError) or not what):
            raise
        if isinstance(error, SyntaxError) and error.filename and error.lineno:
            where, code = f"{error.filename}, line {error.lineno}", (error.text or "").strip()
        elif own is not None:
            where, code = f"{own.filename}, line {own.lineno}", (own.line or "").strip()
        else:
            where, code = what, ""
        # The sentence ends with the code, which may hold full stops.
        shown = f": {code}" if code else ""
        if isinstance(error, InputError):
            raise InputError(f"{str(error).rstrip('.')} ({where}{shown}).") from error
        raise InputError(
            f"Argument `{_ASKED.get().argument}` must be code without an error, but {where} raises "
            f"{_said(error)}{f' ({code})' if code else ''}."
        ) from error


def _said(error: BaseException) -> str:
    """The type and the words of an exception, in one line."""
    words = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    words = words if len(words) <= 300 else f"{words[:280]} …"
    return f"{type(error).__name__}: {words.rstrip('.')}" if words else type(error).__name__


def _brief(place: str) -> str:
    """A place without the folder of its file."""
    where, _, name = place.rpartition(":")
    return f"{Path(where).name if _is_file(where) else where}:{name}"
