"""From settings to flags in groups, and from the words of a command line back to settings.

The settings of a command are one flat dataclass. tyro gets one nested class for each group of the
help, and the names of the flags stay those of the settings.
"""

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from esljax._checks import check_choice
from esljax.command.job import join, use_cores
from esljax.command.settings import (
    ComparisonConfig,
    FrontConfig,
    JobConfig,
    MeasureConfig,
    OptimizeConfig,
    OutsideFrontConfig,
    OutsidePlanConfig,
    PlanConfig,
)
from esljax.experiment import (
    DTYPES,
    REQUIRED,
    Source,
    choices,
    choices_or,
    converted,
    enable,
    read_toml,
    settings_class,
    source_of,
)

# The settings of the built-in problem, and those beside a problem from outside.
JOBS: dict[str, tuple[type[JobConfig], type[JobConfig]]] = {
    "front": (FrontConfig, OutsideFrontConfig),
    "optimize": (OptimizeConfig, ComparisonConfig),
    "plan": (PlanConfig, OutsidePlanConfig),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of flags in the help."""

    words: str
    """What they are about, with an example."""
    names: tuple[str, ...] = ()
    """The settings in it."""


# What no group names is of the first one.
_OF_A_JOB = {
    "problem": Group("What is learned, as in --data moons --hidden 8 8, or --problem mine.py:net."),
    "ensemble": Group(
        "Members, steps, noise and geometry, as in --members 16 --steps 400.",
        (
            "members",
            "steps",
            "snapshots",
            "temperature",
            "transport",
            "epsilon",
            "directions",
            "chunk",
        ),
    ),
    "search": Group(
        "How schedules are found and judged, as in --judge-runs 10 --seed 1.",
        (
            "rate",
            "target",
            "points",
            "targets",
            "knots",
            "families",
            "iterations",
            "match_runs",
            "judge_runs",
            "seed",
        ),
    ),
    "devices": Group(
        "Where it runs, and in which numbers, as in --devices 4 --dtype float64.",
        (
            "dtype",
            "recompute",
            "devices",
            "distributed",
            "coordinator",
            "processes",
            "process",
            "memory",
        ),
    ),
    "files": Group(
        "What is read and written, as in --config small.toml --out small.",
        (
            "config",
            "out",
            "resume",
            "force",
            "checkpoint_every",
            "compilation_cache",
            "quiet",
        ),
    ),
}
_OF_A_MEASUREMENT = {
    "recording": Group("The run, as in --only 'params/*'.", ("recording", "only", "skip", "name")),
    "geometry": Group("Coordinates and distances, as in --project pca --transport sliced."),
    "errors": Group(
        "Standard errors and sampling bias, as in --jackknife 0.", ("jackknife", "debias")
    ),
    "numbers": Group("Random and other numbers, as in --dtype float64.", ("seed", "dtype")),
    "files": Group(
        "What is read and written, as in --out run.",
        ("config", "out", "force", "compilation_cache", "quiet"),
    ),
}


def subcommand(command: str, arguments: Sequence[str]) -> tuple[Any, type]:
    """The type that tyro parses one command by, and the settings that it stands for.

    **Args:** `command`: `optimize`, `plan`, `front` or `measure`. `arguments`: of the whole command
    line; if it gives this command, its TOML file and problem make defaults and further flags.
    **Raises:** `InputError` for a TOML file or a problem that cannot be used.
    """
    given = list(arguments) if _command(arguments) == command else []
    inside, outside = JOBS.get(command, (MeasureConfig, MeasureConfig))
    path = _value(given, "--config")
    content = {} if path is None else read_toml(Path(path))
    place = _value(given, "--problem") or content.get("problem")
    if command not in JOBS or not isinstance(place, str) or place == "None":
        kind: Any = inside
    else:
        kind = _with_keywords(command, inside, outside, content, place, given)
    values = _converted(kind, content, path)
    flags = _nested(kind, values, documented=bool(given))
    return Annotated[flags, tyro.conf.subcommand(command)], kind


def flat(kind: Any, flags: Any) -> Any:
    """The settings that parsed flags stand for."""
    groups = [getattr(flags, field.name) for field in dataclasses.fields(flags)]
    values = {
        field.name: getattr(group, field.name)
        for group in groups
        for field in dataclasses.fields(group)
    }
    source = source_of(kind)
    return kind(**values | ({"problem": source.place} if source else {}))


def _with_keywords(
    command: str,
    inside: Any,
    outside: Any,
    content: Mapping[str, Any],
    place: str,
    arguments: list[str],
) -> Any:
    """The settings beside a problem from outside and its keywords.

    Its file makes arrays when it is loaded: the other processes are found, and the type of numbers
    is set, before that. So the flags that need no problem are parsed on their own.
    """
    names = {field.name for field in dataclasses.fields(outside)}
    known = {key: value for key, value in content.items() if key in names}
    path = _value(arguments, "--config")
    flags = _nested(outside, _converted(outside, known, path), documented=False)
    helps = {"-h", "--help", "-H", "--help-verbose"}
    words = [word for word in arguments[arguments.index(command) + 1 :] if word not in helps]
    parsed, others = tyro.cli(
        flags, prog=f"esljax {command}", args=words, return_unknown_args=True, console_outputs=True
    )
    early = flat(outside, parsed)
    if words == arguments[arguments.index(command) + 1 :]:
        join(early)
        if command != "plan":  # which is about devices that are not here
            use_cores(early)
    check_choice("dtype", early.dtype, tuple(DTYPES))
    enable(early.dtype)
    source = Source.of(place)
    built_in = {field.name for field in dataclasses.fields(inside)} - names
    flagged = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in others]
    of_flags = [name for word, name in zip(others, flagged, strict=True) if word.startswith("--")]
    for name in (*content, *of_flags):
        if name in built_in and name not in source.keywords:
            raise source.unknown(name)
    return settings_class(outside, source)


def _command(arguments: Sequence[str]) -> str:
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, before tyro reads them all."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def _converted(kind: Any, content: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """The values of a TOML file in the types of the settings."""
    if path is None:
        return {}
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "config"}
    return {**converted(content, fields, path), "config": Path(path)}


# --- Groups ---------------------------------------------------------------------------------------


def _nested(kind: Any, values: Mapping[str, Any], *, documented: bool) -> Any:
    """A class with one nested class for each group of settings, which tyro reads.

    It is made at each call, because a registry of choices may have grown.

    **Args:** `values`: defaults in the place of those of the class. `documented`: whether to look
    up the words of the help, which takes a while. Without any, tyro would look for them itself.
    """
    groups = _OF_A_MEASUREMENT if issubclass(kind, MeasureConfig) else _OF_A_JOB
    place = {name: group for group, each in groups.items() for name in each.names}
    rest = next(group for group, each in groups.items() if not each.names)
    words = _documented(kind) if documented else {}
    of: dict[str, list[Any]] = {group: [] for group in groups}
    source = source_of(kind)
    keywords = source.keywords if source else {}
    # Where the problem comes from stands before what it has.
    for field in sorted(dataclasses.fields(kind), key=lambda field: field.name != "problem"):
        default = values.get(field.name, field.default)
        group = rest if field.name in keywords else place.get(field.name, rest)
        of[group].append((field.name, _flag(field, words.get(field.name, "")), _default(default)))
    about = {group: each.words for group, each in groups.items()}
    text = inspect.cleandoc(kind.__doc__ or "")
    if source:
        about[rest] = f"What is learned: {source}, made from its keywords."
        text = re.sub(r"(Example: esljax \w+) .*", rf"\1 --problem {source}", text)
    nested = [
        (
            group,
            dataclasses.make_dataclass(
                group, fields, namespace={"__doc__": about[group]}, frozen=True, kw_only=True
            ),
        )
        for group, fields in of.items()
        if fields
    ]
    namespace = {"__doc__": text}
    return dataclasses.make_dataclass(kind.__name__, nested, namespace=namespace, frozen=True)


def _default(value: Any) -> Any:
    return dataclasses.field() if value is REQUIRED else dataclasses.field(default=value)


def _flag(field: dataclasses.Field, words: str) -> Any:
    """The annotation of a field with its choices as a `Literal`, and without its group's name."""
    named = choices(field.type)
    kind: Any = field.type
    metavar = None
    if others := choices_or(field.type):
        metavar = f"{{{','.join(others)},...}}"
    if named:
        kind = tuple[Literal[named], ...] if isinstance(field.default, tuple) else Literal[named]
    return Annotated[kind, tyro.conf.arg(prefix_name=False, help=words, metavar=metavar)]


def _documented(kind: Any) -> dict[str, str]:
    """The line below each field in the source of its class; of a keyword, that of its function."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        found |= _lines(owner)
    source: Source | None = source_of(kind)
    for name, keyword in source.keywords.items() if source else ():
        found[name] = keyword.words or f"Keyword of {source}."
    return found


def _lines(owner: type) -> dict[str, str]:
    try:
        tree = ast.parse(Path(inspect.getfile(owner)).read_text(encoding="utf-8"))
    except (OSError, TypeError, SyntaxError):
        return {}
    bodies = [
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == owner.__name__
    ]
    return {
        before.target.id: " ".join(after.value.value.split())
        for body in bodies
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }
