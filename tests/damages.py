"""Damage to one file of a folder, drawn at random: what disks, copies and editors do to files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("flip", "truncate", "delete", "rename", "swap", "zero", "json", "extend")
_VALUES = (None, True, -1, 0, 3, 1e300, "", "x", "int8", "NaN", [], [1], {}, {"a": 1}, 10**30)


def damage(folder: Path, random: np.random.Generator, kind: str | None = None) -> str:
    """Damage one file below a folder and return what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = kind or str(random.choice(KINDS))
    if kind == "json":
        described = [path for path in files if _holds_json(path)]
        files, kind = (described, kind) if described else (files, "flip")
    path = files[random.integers(len(files))]
    words = f"{kind} {path.relative_to(folder)}"
    content = bytearray(path.read_bytes())
    if kind == "flip" and content:
        at, bit = int(random.integers(len(content))), int(random.integers(8))
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f"{words} bit {bit} of byte {at}"
    if kind == "truncate" and content:
        path.write_bytes(content[: random.integers(len(content))])
    elif kind == "extend":
        path.write_bytes(bytes(content) + bytes(content[:5]) + b"\0")
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(path.name + random.choice(["~", "0", ".bak"])))
    elif kind == "zero":
        path.write_bytes(bytes(len(content)))
    elif kind == "swap":
        other = files[random.integers(len(files))]
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        words += f" and {other.relative_to(folder)}"
    elif kind == "json":
        words += f": {_replace_value(path, random)}"
    return words


def _holds_json(path: Path) -> bool:
    """Whether a file is a JSON object, whatever its name: Orbax has names of its own."""
    try:
        return bool(json.loads(path.read_bytes())) and path.read_bytes()[:1] == b"{"
    except ValueError:
        return False


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder, in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def _replace_value(path: Path, random: np.random.Generator) -> str:
    """Replace one value anywhere in a JSON file by another one, mostly of the same type."""
    content = json.loads(path.read_bytes())
    places = [(content, key) for key in content] if isinstance(content, dict) else []
    for inner, key in places:
        value = inner[key]
        keys = range(len(value)) if isinstance(value, list) else value
        places += [(value, key) for key in keys] if isinstance(value, dict | list) else []
    inner, key = places[random.integers(len(places))]
    before = inner[key]
    inner[key] = _other(before, random)
    path.write_text(json.dumps(content))
    return f"{key} from {before!r:.40} to {inner[key]!r:.40}"


def _other(value: Any, random: np.random.Generator) -> Any:
    if random.integers(2):
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + int(random.integers(1, 4))
        if isinstance(value, str) and value:
            i = int(random.integers(len(value)))
            return value[:i] + random.choice(list("0159aez")) + value[i + 1 :]
        if isinstance(value, list) and len(value) > 1:
            return value[::-1]
    return _VALUES[random.integers(len(_VALUES))]
