"""Folders of other people's files, and whether they are still what they were."""

import os
from pathlib import Path

THEIRS = b"theirs: \x00\xff\n"


def seen(folder: Path) -> dict[str, tuple]:
    """What is in a folder: kinds and modes, targets of links, and bytes; no link is followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            content = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def plant(path: Path) -> None:
    """Write one of their files, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(THEIRS + str(path).encode())


def still_there(before: dict[str, tuple], folder: Path) -> bool:
    """Whether all that was there is there as it was, whatever has been added."""
    after = seen(folder)
    return {name: after.get(name) for name in before} == before
