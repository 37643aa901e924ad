"""Files that replace nothing but files of this program.

A name is no proof of who wrote a file. Each file that is written here says so in its content:
settings by a first line with the digest of the others, so that an edited file is its editor's; a
report by the versions and the settings in it; a figure by its metadata, with a digest of what it
shows. Whatever does not say so is never replaced: other files, links, folders, pipes and devices.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from esljax._checks import InputError, refuse
from esljax.files.storage import described, toml, versions

# What changes no number, and so makes no other configuration.
_MANNERS = ("out", "quiet", "checkpoint_every")


def write_json(path: Path, content: Mapping[str, Any], argument: str = "out") -> None:
    """Write a report as strict JSON. Numbers that are not finite become null.

    **Args:** `content`: with the keys `config` and `versions`, by which it is recognized.
    `argument`: the one that a refusal names.
    **Raises:** `InputError` if something else is there, and `OSError` if the disk fails.
    """
    replace(path, as_json(content), argument=argument)


def as_json(content: Mapping[str, Any]) -> bytes:
    """The content of a file of strict JSON. Numbers that are not finite become null."""
    text = json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode(errors="backslashreplace")


def write_toml(path: Path, content: Mapping[str, Any]) -> None:
    """Write settings as TOML, without the keys whose value is None.

    **Raises:** `InputError` if something else is there, and `OSError` if the disk fails.
    """
    known = {key: value for key, value in content.items() if value is not None}
    body = toml(known).encode(errors="replace")
    replace(path, _HEAD + _digest(body).encode() + b"\n" + body)


def replace(
    path: Path,
    content: bytes,
    *,
    argument: str = "out",
    ours: Callable[[bytes], bool] | bytes | None = None,
) -> None:
    """Write a file whole or not at all, in the place of none or of one that this program wrote.

    A reader or a kill meets the old file or the new one. The mode is that of the umask.

    **Args:** `argument`: the argument that messages name. `ours`: recognizes the content of files
    of this program, or is what they begin with; by default settings, reports and figures are.
    **Raises:** `InputError` if something else is there, and `OSError` if the disk fails.
    """
    if _is_foreign(path, ours):
        raise _foreign(argument, path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def prepared(folder: Path, argument: str) -> Iterator[None]:
    """Make a folder and see that it can be written, before the work whose results go there.

    If the block raises, the folders made here are removed again where they are empty.

    **Raises:** `InputError`, about `argument`, if the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe.{secrets.token_hex(4)}.part"
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        reason = getattr(error, "strerror", None) or error
        raise refuse(
            argument, "be a folder that can be written", f"{folder} gives: {reason}"
        ) from error
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def claim(
    paths: Iterable[Path],
    settings: Mapping[str, Any],
    *,
    force: bool = False,
    argument: str = "out",
    ours: Callable[[bytes], bool] | bytes | None = None,
) -> None:
    """Refuse places where a run would replace what is not its own.

    **Args:** `paths`: the files that the run will write. `settings`: of the run. `force`: whether
    files that this program wrote for other settings may be replaced. `argument`, `ours`: as of
    `replace`.
    **Raises:** `InputError` for a file that this program did not write, and, without
    `force`, for one of other settings.
    """
    paths = list(paths)
    for path in paths:
        if _is_foreign(path, ours):
            raise _foreign(argument, path)
    here = _compared(settings)
    for path in paths if not force else ():
        about = _about(path)
        if isinstance(about, str):
            differs = "which shows something else" if about != identity(settings) else ""
        else:
            differs = "" if about is None else _difference(_compared(about), here)
        if differs:
            raise refuse(
                "out",
                "replace no results of another configuration (choose another folder, or add "
                "--force)",
                f"{path} is there, {differs}",
            )


def identity(content: Mapping[str, Any]) -> str:
    """A digest of settings, by which a figure says what it shows."""
    return _digest(json.dumps(_compared(content), sort_keys=True).encode())


def signature(content: Mapping[str, Any]) -> str:
    """The text in the metadata of a figure that says who drew it, and of what."""
    return f"{_SIGNED}{identity(content)}"


_SIGNED = "esljax, a figure of "
_HEAD = b"# Written by esljax, which replaces it only as long as nobody edits it: "
_FIGURE = re.compile(re.escape(_SIGNED).encode() + rb"([0-9a-f]{32})")
_MAGIC = (b"\x89PNG", b"%PDF", b"<?xml", b"%!PS")
# No report and no figure of this program comes near it.
_LONGEST = 1 << 28


def _about(path: Path) -> dict[str, Any] | str | None:
    """The settings, or for a figure their digest, that a file of this program is of.

    **Returns:** None if there is no file, or none of this program.
    """
    content = _content(path)
    if content is None:
        return None
    if content.startswith(_MAGIC):
        signed = _FIGURE.search(content)
        return None if signed is None else signed[1].decode()
    head, _, body = content.partition(b"\n")
    try:
        if head.startswith(_HEAD):
            unedited = head == _HEAD + _digest(body).encode()
            return tomllib.loads(body.decode()) if unedited else None
        report = json.loads(content)
        known = isinstance(report, dict) and isinstance(report.get("versions"), dict)
        if known and report["versions"].keys() == versions().keys():
            return report["config"] if isinstance(report["config"], dict) else None
    except (ValueError, KeyError, RecursionError):
        pass
    return None


def _content(path: Path, count: int | None = None) -> bytes | None:
    """The content of a file, or its first bytes; None if it cannot be read, or is none of ours."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or (count is None and state.st_size > _LONGEST):
            return None
        try:
            return file.read(count)
        except OSError:
            return None


def _is_foreign(path: Path, ours: Callable[[bytes], bool] | bytes | None = None) -> bool:
    try:
        # Looked at before it is opened: a device may act on being opened.
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    if not regular:
        return True
    if ours is None:
        return _about(path) is None
    if isinstance(ours, bytes):
        return _content(path, len(ours)) != ours
    content = _content(path)
    return content is None or not ours(content)


def _foreign(argument: str, path: Path) -> InputError:
    return refuse(
        argument,
        "be where nothing but results of esljax is replaced",
        f"{path} is there, {described(path)} that esljax did not write (choose another place)",
    )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file, without those that change no number."""
    known = json.loads(json.dumps(_plain(settings)))
    # What holds nothing says nothing: an earlier version may not have had that setting.
    return {
        name: value
        for name, value in known.items()
        if value not in (None, []) and name not in _MANNERS
    }


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        there, here = theirs.get(name, "not given"), ours.get(name, "not given")
        if there != here:
            return f"whose {name} is {there}, not {here}"
    return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and content - content != 0:
        return None
    return content
