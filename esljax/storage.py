"""Results on disk: whole files or none, and what made them."""

import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

_PACKAGES = ("esljax", "jax", "jaxlib", "flax", "optax", "ott-jax", "equinox", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON: a number that is not finite becomes null."""
    _write(path, json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_toml(path: Path, content: dict[str, Any]) -> None:
    """Write TOML; keys whose value is None are left out."""
    _write(path, tomli_w.dumps({key: value for key, value in content.items() if value is not None}))


def _write(path: Path, text: str) -> None:
    """A reader, or an interruption, meets the old file or the new one, never a half of either."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and content - content != 0:
        return None
    return content
