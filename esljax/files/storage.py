"""What is behind the results on disk: versions, and the locks of their writers."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from esljax._checks import InputError, first_sentence, refuse

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


def digest(argument: str, path: str | Path) -> str:
    """A digest of what a file holds.

    **Raises:** `InputError`, about `argument`, for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_sentence(error)
        raise refuse(argument, "be a readable file", f"{path} gives: {reason}") from error


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


def toml(content: dict[str, Any]) -> str:
    """The content as TOML."""
    return tomli_w.dumps(content)


class Lock:
    """A lock file that this process holds; called, it records more about the writer in the file."""

    def __init__(self, handle: int, left: dict[str, Any] | None):
        self._handle = handle
        self.left: dict[str, Any] = left or {}
        """The content that a holder who was killed has left; empty if there was none."""

    def __call__(self, more: Mapping[str, Any]) -> None:
        """Record the writer and `more` in the file."""
        writer = {"pid": os.getpid(), "host": platform.node(), "program": _PROGRAM}
        text = json.dumps({**writer, **more}).encode()
        # Never empty and never cut short, not even between two calls: an empty file would be no
        # lock of this program for whoever comes after a kill.
        os.pwrite(self._handle, text.ljust(os.fstat(self._handle).st_size), 0)


def holder(lock: Path) -> dict[str, Any] | None:
    """The content of a lock file that a process holds; None if no process does.

    A link and a file that is no lock of this program are nobody's.

    **Returns:** the holder's `pid` and `host`, and whatever else it has recorded.
    """
    import fcntl

    try:
        # A link is not followed, and a pipe without a writer is not waited for.
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = _lock_content(handle)
        if content is None or content["host"] != platform.node():
            return content
        # Ask the kernel: the process may be dead, and its number another's.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return content
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


@contextlib.contextmanager
def locked(lock: Path, argument: str, *, elsewhere: bool = True) -> Iterator[Lock]:
    """Hold a lock file that names the process and the host of the writer.

    A process of this host that dies loses the lock at once. A link, and a file that is no lock of
    this program, are neither followed nor written nor removed.

    **Args:** `lock`: the file, in a folder that exists. `argument`: the argument that messages
    name. `elsewhere`: whether to believe a file that names another host. If False, only the
    kernel's lock counts; most shared file systems, though not all, pass it on between hosts.
    **Yields:** the `Lock`, which records more about the writer in the file.
    **Raises:** `InputError`, about `argument`, while another process holds the lock, if something
    else is there, and if the folder cannot be written.
    """
    handle = _acquired(lock, argument)
    try:
        content = _lock_content(handle)
        if elsewhere and content is not None and content["host"] != platform.node():
            raise _other_writer(argument, content, f" (if it is dead, delete {lock})")
        record = Lock(handle, content)
        # Half a checkpoint that a killed holder has left is its own until it is removed.
        record({key: record.left[key] for key in record.left.keys() & {"saving"}})
        try:
            yield record
        finally:
            if _same(handle, lock):
                lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


_PROGRAM = "esljax"
_WRITER = {"pid", "host", "program"}
# The keys of a lock, those of every writer together. A file with others is another program's.
_RECORDED = _WRITER | {"started", "before", "saving"}
# Far longer than any lock; what is longer is none.
_LONGEST_LOCK = 65536


def _acquired(lock: Path, argument: str) -> int:
    """The open file of a lock that this process now holds."""
    import fcntl  # exists on Unix alone, and the rest of the package runs without it

    empty = 0
    while True:
        handle = _opened(lock, argument)
        try:
            # The kernel drops this lock with the process, however it ends. The content of the file
            # is for people and other hosts.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same(handle, lock):
                # The last holder has removed the file between our two calls.
                os.close(handle)
                continue
            if _lock_content(handle) is not None:
                return handle
            # Another process has made the file and not yet recorded its name. That takes it
            # microseconds, so what stays empty for a second is no lock of this program.
            empty += 1
            if os.fstat(handle).st_size or empty > _PATIENCE:
                os.close(handle)
                raise _no_lock(argument, lock)
        except BlockingIOError:
            os.close(handle)
            if (content := holder(lock)) is not None:
                raise _other_writer(argument, content) from None
        except OSError as error:
            os.close(handle)
            raise _not_writable(argument, lock, error) from error
        else:
            os.close(handle)
        # Another process was only asking, or has not recorded its name yet.
        time.sleep(0.01)


# How many hundredths of a second an empty file may wait for the name of its writer.
_PATIENCE = 100


def _opened(lock: Path, argument: str) -> int:
    """An open lock file that exists, or a new one with this process recorded in it."""
    import fcntl

    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            # Looked at before it is opened: a device may act on being opened.
            if not stat.S_ISREG(lock.lstat().st_mode):
                raise _no_lock(argument, lock)
            return os.open(lock, flags)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _not_writable(argument, lock, error) from error
        try:
            handle = os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_writable(argument, lock, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            Lock(handle, None)({})
        except OSError as error:
            os.close(handle)
            lock.unlink(missing_ok=True)
            raise _not_writable(argument, lock, error) from error
        return handle


def _lock_content(handle: int) -> dict[str, Any] | None:
    """What a lock of this program says; None for any other file."""
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        content = json.loads(os.pread(handle, _LONGEST_LOCK, 0))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not content.keys() <= _RECORDED:
        return None
    known = isinstance(content.get("pid"), int) and isinstance(content.get("host"), str)
    return content if known and content.get("program", _PROGRAM) == _PROGRAM else None


def _no_lock(argument: str, lock: Path) -> InputError:
    return refuse(
        argument,
        f"be where {lock} can be locked",
        f"{described(lock)} of that name is there, which esljax did not write and does not touch",
    )


def _not_writable(argument: str, lock: Path, error: OSError) -> InputError:
    return refuse(
        argument, "be in a folder that can be written", f"{lock.parent} gives: {error.strerror}"
    )


def described(path: Path) -> str:
    """What is at a path, links not followed: "a link", "a folder", "a file", "a pipe" or so."""
    mode = path.lstat().st_mode
    kinds = {
        stat.S_ISLNK: "a link",
        stat.S_ISDIR: "a folder",
        stat.S_ISREG: "a file",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next((words for test, words in kinds.items() if test(mode)), "a device")


def _other_writer(argument: str, content: dict[str, Any], advice: str = "") -> InputError:
    writer = f"process {content['pid']} of {content['host']}"
    return refuse(argument, "have no other writer", f"{writer} is writing it{advice}")


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False
