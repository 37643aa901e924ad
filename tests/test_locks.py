"""Locks: no link is followed, and nothing but a lock of this program is written or removed."""

import json
import os
import re
import subprocess
import sys

import pytest
from trees import seen

import esljax as esl
from esljax.files import alone, storage
from esljax.study.store import lock_path

BASE = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)


def link(path):
    (path.parent / "precious").write_bytes(b"theirs")
    path.symlink_to(path.parent / "precious")


STRANGERS = {
    "a link": link,
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a file": lambda path: path.write_bytes(b"theirs"),
    "an empty file": lambda path: path.write_bytes(b""),
    "a table": lambda path: path.write_bytes(b'{"pid": 1, "host": "here", "theirs": 2}'),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
}


def run_study(folder):
    esl.study.run_study(esl.study.Study(BASE, grid={"seed": [0]}), folder / "s.zarr")


def checkpointed(folder):
    with alone(folder, "checkpoints"):
        pass


def locked(folder):
    with storage.locked(folder / "lock", "out"):
        pass


DOORS = {"s.zarr.lock": run_study, ".lock": checkpointed, "lock": locked}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", DOORS)
def test_what_is_no_lock_is_refused_and_stays_as_it_was(tmp_path, name, stranger, refused):
    STRANGERS[stranger](tmp_path / name)
    before = seen(tmp_path)
    kind = "a file" if stranger in ("an empty file", "a table") else stranger.partition(" to")[0]
    refused(
        lambda: DOORS[name](tmp_path),
        f"must be where .*{re.escape(name)} can be locked, but {kind} of that name is there",
    )
    assert storage.holder(tmp_path / name) is None
    assert seen(tmp_path) == before


def test_a_lock_that_was_replaced_meanwhile_stays(tmp_path):
    lock = tmp_path / "lock"
    with storage.locked(lock, "out"):
        lock.unlink()
        lock.write_bytes(b"theirs")
    assert lock.read_bytes() == b"theirs"


def test_what_a_killed_holder_recorded_is_there_for_the_next(tmp_path):
    program = (
        "import os, pathlib, sys; from esljax.files import storage\n"
        "with storage.locked(pathlib.Path(sys.argv[1]), 'out') as record:\n"
        "    record({'started': 123456789, 'saving': 7}); record({'saving': 7})\n"
        "    os.kill(os.getpid(), 9)"
    )
    lock = lock_path(tmp_path / "study.zarr")
    subprocess.run([sys.executable, "-c", program, str(lock)], check=False)
    assert json.loads(lock.read_text())["saving"] == 7
    with storage.locked(lock, "out") as record:
        assert record.left["saving"] == 7
        assert json.loads(lock.read_text())["saving"] == 7, "not lost by a second kill"
        assert storage.holder(lock)["pid"] == os.getpid()
    assert not lock.exists()


def test_a_lock_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with storage.locked(tmp_path / "lock", "out"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
