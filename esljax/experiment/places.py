"""Objects of the user's by their places: "my_file.py:name" or "package.module:name"."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from esljax._checks import failure, refuse


def load(argument: str, place: str, must: str) -> Any:
    where, _, name = place.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"_{Path(where).stem}_", where)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except Exception as error:
        raise refuse(argument, must, f"{place} fails: {failure(error)}") from error
    if not hasattr(module, name):
        raise refuse(argument, must, f"{where} has no {name!r}")
    return getattr(module, name)
