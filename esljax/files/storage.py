"""Results on disk: whole files or none, what made them, and who is writing."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from esljax._checks import InputError, refuse

_PACKAGES = (
    "esljax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "ott-jax",
    "equinox",
    "numpy",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first package of two `versions()` that differs, as "jax 0.1 there and 0.10.2 here"; None if none does."""
    differing = (name for name in _PACKAGES if theirs.get(name) != ours.get(name))
    return next(
        (
            f"{name} {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
            for name in differing
        ),
        None,
    )


def commit() -> str | None:
    """The git commit that this package is checked out at, with a + if files have changed since; None outside of git."""
    folder = Path(__file__).parent.parent
    told = []
    for command in (
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no", "--", "."),
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        told.append(done.stdout.strip())
    return told[0] + "+" * bool(told[1])


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON: a number that is not finite becomes null."""
    _write(path, json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_toml(path: Path, content: dict[str, Any]) -> None:
    """Write TOML; keys whose value is None are left out."""
    _write(path, toml({key: value for key, value in content.items() if value is not None}))


def toml(content: dict[str, Any]) -> str:
    """The content as TOML."""
    return tomli_w.dumps(content)


def holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock: its `pid`, `host` and what else it said; None if nobody does."""
    import fcntl

    try:
        with lock.open(encoding="utf-8") as file:
            told = json.load(file)
            if told["host"] != platform.node():
                return told
            # The kernel knows who is alive; a number of a process may be another's by now.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return told
    except (OSError, ValueError):
        return None
    return None


@contextlib.contextmanager
def locked(
    lock: Path, argument: str, *, elsewhere: bool = True
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Hold a lock file that says which process of which host is writing; a dead process of this host loses it.

    **Args:** `elsewhere`: whether to believe a file that names another host. Without, what the kernel says of the file is all that counts:
    file systems that hosts share tell it of each other's locks, though not all do.
    **Yields:** a function that adds to what the lock file says.
    **Raises:** `InputError`, about `argument`, while another process holds it.
    """
    import fcntl  # of Unix alone: the rest of the package runs without

    must = "have no other writer"
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise refuse(
                argument,
                "be in a folder that can be written",
                f"{lock.parent} gives: {error.strerror}",
            ) from error
        try:
            # The kernel drops this with the process, however that ends; what the file says is for people and other hosts.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, lock):
                break
        except BlockingIOError:
            os.close(handle)
            if (told := holder(lock)) is not None:
                raise refuse(
                    argument, must, f"process {told['pid']} of {told['host']} is writing it"
                ) from None
            # Somebody was only asking, or has not said yet who it is.
            time.sleep(0.01)
            continue
        # The last holder has removed the file between our two calls.
        os.close(handle)
    try:
        told = holder(lock)
        if elsewhere and told is not None and told["host"] != platform.node():
            raise InputError(
                f"Argument `{argument}` must {must}, but process {told['pid']} of {told['host']} says it is writing it; "
                f"if that process is dead, delete {lock}."
            )
        ours = {"pid": os.getpid(), "host": platform.node()}

        def say(more: dict[str, Any]) -> None:
            text = json.dumps({**ours, **more}).encode()
            os.truncate(handle, 0)
            os.pwrite(handle, text, 0)

        say({})
        try:
            yield say
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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
