"""Results on disk: files written whole or not at all, the versions behind them, and their locks."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
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
    """The versions of Python and of each package that a number depends on, by name."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first package that differs between two `versions()`; None if none does.

    **Returns:** a phrase such as "jax 0.1 there and 0.10.2 here".
    """
    differing = (name for name in _PACKAGES if theirs.get(name) != ours.get(name))
    return next(
        (
            f"{name} {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
            for name in differing
        ),
        None,
    )


def installation(extra: str) -> str:
    """The command that installs the packages of an extra, in a checkout as well as elsewhere."""
    packages = [
        requirement.partition(";")[0].strip()
        for requirement in importlib.metadata.requires("esljax") or ()
        if re.search(f"extra == ['\"]{extra}['\"]", requirement)
    ]
    return "pip install " + " ".join(f"'{package}'" for package in packages)


def commit() -> str | None:
    """The git commit of this checkout, with a + if files have changed since; None outside git."""
    folder = Path(__file__).parent.parent
    outputs = []
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
        outputs.append(done.stdout.strip())
    head, changes = outputs
    return head + "+" * bool(changes)


def make_folder(folder: Path, argument: str) -> None:
    """Make a folder if it does not exist.

    **Raises:** `InputError`, about `argument`, if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse(
            argument, "be a folder that can be written", f"{folder} gives: {error.strerror}"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON. Numbers that are not finite become null."""
    _write(path, json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_toml(path: Path, content: dict[str, Any]) -> None:
    """Write TOML without the keys whose value is None."""
    _write(path, toml({key: value for key, value in content.items() if value is not None}))


def toml(content: dict[str, Any]) -> str:
    """The content as TOML."""
    return tomli_w.dumps(content)


def holder(lock: Path) -> dict[str, Any] | None:
    """The content of a lock file that a process holds; None if no process does.

    **Returns:** the holder's `pid` and `host`, and whatever else it has recorded.
    """
    import fcntl

    try:
        with lock.open(encoding="utf-8") as file:
            content = json.load(file)
            if content["host"] != platform.node():
                return content
            # Ask the kernel: the process may be dead, and its number another's.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return content
    except (OSError, ValueError):
        return None
    return None


@contextlib.contextmanager
def locked(
    lock: Path, argument: str, *, elsewhere: bool = True
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Hold a lock file that names the process and the host of the writer.

    A process of this host that dies loses the lock at once.

    **Args:** `lock`: the file, in a folder that exists. `argument`: the argument that messages
    name. `elsewhere`: whether to believe a file that names another host. If False, only the
    kernel's lock counts; most shared file systems, though not all, pass it on between hosts.
    **Yields:** a function that records more about the writer in the file.
    **Raises:** `InputError`, about `argument`, while another process holds the lock, and if the
    folder cannot be written.
    """
    handle = _acquired(lock, argument)
    try:
        content = holder(lock)
        if elsewhere and content is not None and content["host"] != platform.node():
            raise _other_writer(argument, content, f" (if it is dead, delete {lock})")
        writer = {"pid": os.getpid(), "host": platform.node()}

        def record(more: dict[str, Any]) -> None:
            text = json.dumps({**writer, **more}).encode()
            os.truncate(handle, 0)
            os.pwrite(handle, text, 0)

        record({})
        try:
            yield record
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _acquired(lock: Path, argument: str) -> int:
    """The open file of a lock that this process now holds."""
    import fcntl  # exists on Unix alone, and the rest of the package runs without it

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
            # The kernel drops this lock with the process, however it ends. The content of the file
            # is for people and other hosts.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, lock):
                return handle
        except BlockingIOError:
            os.close(handle)
            if (content := holder(lock)) is not None:
                raise _other_writer(argument, content) from None
            # Another process was only asking, or has not recorded its name yet.
            time.sleep(0.01)
            continue
        # The last holder has removed the file between our two calls.
        os.close(handle)


def _other_writer(argument: str, content: dict[str, Any], advice: str = "") -> InputError:
    writer = f"process {content['pid']} of {content['host']}"
    return refuse(argument, "have no other writer", f"{writer} is writing it{advice}")


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a reader or an interruption meets the old one or the new one."""
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
