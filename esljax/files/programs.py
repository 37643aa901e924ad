"""Compiled programs that one command leaves for the next, by the compilation cache of jax.

Of a short `esljax optimize` three quarters were compilation, of the same programs each time. The
commands keep them in the user's folder for caches; importing the package keeps nothing.

jax itself bounds a cache only with another library, by a look at all of its files, under a lock,
for each new program. It warns of a file that a killed process has left half written, but does not
replace it. So the start of a command deletes such files, and those that were not used for longest.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

VARIABLE = "ESLJAX_COMPILATION_CACHE"
"""The variable of the environment that moves the programs, or keeps none if it says no."""
# As jax reads its own settings, so that no folder gets such a name.
_NO, _YES = ("off", "0", "false", "f", "no", "n"), ("on", "1", "true", "t", "yes", "y")
MOST_BYTES = 2**30
"""A run of digits leaves three megabytes."""

# The first bytes of a program that jax has compressed by zstd, where Python or a package brings it.
ZSTD = b"\x28\xb5\x2f\xfd"
# jax warns of each program that it cannot read or write, and compiles it.
_UNREADABLE = tuple(f"Error {verb} persistent compilation cache" for verb in ("reading", "writing"))
# Of 224 programs six took more than a second to compile, jax's usual limit; the others together a
# fifth of the time.
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep_programs(wanted: bool = True) -> str | None:
    """Let this process and those that it starts keep what they compile, for the next command.

    A cache that the user has chosen by jax's own settings stands, and so does the wish for none.

    **Args:** `wanted`: if False, all is compiled anew, whatever the environment says.
    **Returns:** why nothing is kept, in a sentence, if the user has named a folder that cannot be
    written; else None. A folder for caches that cannot be written is no news to its user.
    """
    if not wanted:
        _set({"jax_enable_compilation_cache": False})
        return None
    settings: Any = jax.config
    named = os.environ.get(VARIABLE, "").strip()
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    if named.lower() in _NO:
        return None
    if named.lower() in _YES:
        named = ""
    try:
        root = Path(named).expanduser().absolute() if named else _user_caches() / "esljax"
        programs = of_this_machine(root)
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        mend(programs)
        bound(root)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        unusable = f"{VARIABLE}={named} cannot be used, and no program is kept: {reason}."
        return unusable if named else None
    # What fails later, such as a full disk, costs a compilation and is no news either.
    for message in _UNREADABLE:
        warnings.filterwarnings("ignore", message)
    silent = (os.environ.get("PYTHONWARNINGS"), *(f"ignore:{message}" for message in _UNREADABLE))
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, silent))
    chosen = {name: value for name, value in _SETTINGS.items() if name.upper() not in os.environ}
    _set({"jax_compilation_cache_dir": str(programs), **chosen})
    return None


def of_this_machine(root: Path) -> Path:
    """The folder below `root` of this version of jax and this kind of processor: the compiler of
    CPUs writes instructions that another one may not have."""
    system = f"{platform.system()}-{platform.machine()}".lower()
    return root / f"jax-{jax.__version__}-{system}-{_instructions()}"


def mend(programs: Path) -> list[str]:
    """Delete the programs that a killed process has left half written; return their names.

    Files older than the last look are not read again.
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
    """Delete the programs that were not used for longest, until the others have so many bytes."""
    entries = sorted(
        _entries(folders), key=lambda entry: max(entry[1].st_atime_ns, entry[1].st_mtime_ns)
    )
    excess = sum(status.st_size for _, status in entries) - most
    for path, status in entries:
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= status.st_size


def _set(settings: dict[str, Any]) -> None:
    """Set jax in this process, which has read its environment, and in those that it starts."""
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def _user_caches() -> Path:
    """Where the programs of this user keep what they can compute again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def _instructions() -> str:
    """A digest of the instructions that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _entries(folders: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The programs in a folder and those below it; other commands may delete some meanwhile."""
    for path in list(folders.rglob("*-cache")):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


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
    """What jax compresses by, where it is: a part of Python, or a package that nobody requires."""
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd")
    return importlib.import_module("zstandard").ZstdDecompressor()
