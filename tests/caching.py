"""Compiled programs that one run of the tests leaves for the next.

They lie in `~/.cache/esljax-tests` (or below `XDG_CACHE_HOME`), in a folder named by the version of
jax and the machine: the compiler of CPUs writes instructions that another processor may not have.
"""

import contextlib
import hashlib
import os
import platform
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax

# jax warns where a program cannot be read or written, and compiles it.
SILENT = ",".join(f"ignore:Error {verb} persistent" for verb in ("reading", "writing"))
# The first bytes of a program that jax has compressed by zstd, where Python or a package brings it.
ZSTD = b"\x28\xb5\x2f\xfd"
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
    system = f"{platform.system()}-{platform.machine()}".lower()
    return root() / f"jax-{jax.__version__}-{system}-{_instructions()}"


def _instructions() -> str:
    """Return a digest of the instructions that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:8]


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
    mend(programs)
    bound(programs.parent)
    os.environ.update(settings(programs))
    # This process has read its environment already.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def disable() -> None:
    """Let this process and its children compile everything anew."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jax.config.update("jax_enable_compilation_cache", False)


def mend(programs: Path) -> list[str]:
    """Delete the programs that a killed process has left half written; return their names.

    jax warns of such a file and compiles, but does not replace it. Files older than the last look
    are not read again.
    """
    stamp = programs / "looked"
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    stamp.touch()
    damaged = [
        path
        for path, status in _entries(programs)
        if status.st_mtime_ns >= since and not _is_whole(path)
    ]
    for path in damaged:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in damaged)


def bound(folders: Path, most: int = MOST_BYTES) -> None:
    """Delete the programs that were not used for longest, until the others have so many bytes.

    jax can bound a cache too, but then looks at all its files, under a lock, for each new one.
    """
    entries = sorted(
        _entries(folders), key=lambda entry: max(entry[1].st_atime_ns, entry[1].st_mtime_ns)
    )
    excess = sum(status.st_size for _, status in entries) - most
    for path, status in entries:
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= status.st_size


def _entries(folders: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the programs in a folder and those below it; other runs may delete some meanwhile."""
    entries = []
    for path in folders.rglob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            entries.append((path, path.stat()))
    return entries


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
        (_zstd() if content.startswith(ZSTD) else zlib).decompress(content)
    except FileNotFoundError:
        return True
    except Exception:  # each library has its own; jax cannot read such a file either
        return False
    return True


def _zstd() -> Any:
    try:
        from compression import zstd
    except ImportError:
        import zstandard

        return zstandard.ZstdDecompressor()
    return zstd


if __name__ == "__main__":  # for a shell: env $(python tests/caching.py) COMMAND
    # Without a place for the folder, COMMAND compiles everything anew.
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        print(*(f"{name}={value}" for name, value in settings(folder()).items()), sep="\n")
