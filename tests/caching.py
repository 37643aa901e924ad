"""Compiled programs that one run of the tests leaves for the next.

They lie in `~/.cache/esljax-tests` (or below `XDG_CACHE_HOME`), apart from those of the commands.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import jax

from esljax.files import programs as kept

# jax warns where a program cannot be read or written, and compiles it.
SILENT = ",".join(f"ignore:Error {verb} persistent" for verb in ("reading", "writing"))
# Several times as much as all tests compile.
MOST_BYTES = 2 * 2**30


def root() -> Path:
    """Return the folder of all versions of jax and all machines."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        caches = Path(tempfile.gettempdir())
    return caches / "esljax-tests"


def folder() -> Path:
    """Return the folder of this version of jax on this machine."""
    return kept.of_this_machine(root())


def settings(programs: Path) -> dict[str, str]:
    """Return the environment of a process that keeps every program it compiles in a folder."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def enable(programs: Path) -> None:
    """Let this process and its children keep every program they compile in a folder."""
    programs.mkdir(parents=True, exist_ok=True)
    kept.mend(programs)
    kept.bound(programs.parent, MOST_BYTES)
    os.environ.update(settings(programs))
    # This process has read its environment already.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def disable() -> None:
    """Let this process and its children compile everything anew."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":  # for a shell: env $(python tests/caching.py) COMMAND
    # Without a place for the folder, COMMAND compiles everything anew.
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        print(*(f"{name}={value}" for name, value in settings(folder()).items()), sep="\n")
