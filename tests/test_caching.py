"""The helpers of the test run itself: its cache of programs, the order of files, and signals."""

import os
import subprocess
import sys
import types
import zlib
from pathlib import Path

import caching
import durations

from esljax.files import programs

WHOLE = zlib.compress(os.urandom(1000))
# Warnings are errors, as in a run of the tests.
COMPILE = """
import warnings
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
import jax
print(jax.jit(lambda x: x * 3)(2.0))
"""


def keep(folder: Path, name: str, content: bytes) -> Path:
    path = folder / f"{name}-cache"
    path.write_bytes(content)
    return path


def test_half_written_programs_are_deleted(tmp_path):
    whole, half, empty = (
        keep(tmp_path, name, WHOLE[:size]) for name, size in (("a", None), ("b", 500), ("c", 0))
    )
    assert programs.mend(tmp_path) == [half.name, empty.name]
    assert whole.exists()
    assert programs.mend(tmp_path) == []
    # Other programs are read in the next look only if they are new.
    keep(tmp_path, "d", WHOLE[:500])
    assert programs.mend(tmp_path) == ["d-cache"]


def test_programs_that_were_not_used_for_longest_are_deleted(tmp_path):
    (tmp_path / "older").mkdir()
    for age, folder in enumerate((tmp_path, tmp_path / "older", tmp_path)):
        path = keep(folder, str(age), WHOLE)
        os.utime(path, (1e9 - age, 1e9 - age))
    programs.bound(tmp_path, most=2 * len(WHOLE))
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == ["0-cache", "1-cache"]


def test_a_damaged_cache_fails_nothing(tmp_path):
    environment = {**os.environ, **caching.settings(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
        )
        assert done.stdout == "6.0\n", done.stderr
        kept = list(tmp_path.glob("*-cache"))
        assert kept
        for path in kept:
            path.write_bytes(path.read_bytes()[:50])
    assert programs.mend(tmp_path) == sorted(path.name for path in kept)


def test_a_cache_is_of_one_version_and_one_kind_of_processor(monkeypatch):
    before = caching.folder()
    monkeypatch.setattr(programs, "_instructions", lambda: "others")
    assert before.parent == caching.folder().parent
    assert before != caching.folder()


def test_long_files_go_first_and_keep_their_order():
    tests = [
        types.SimpleNamespace(path=Path(file), nodeid=f"{file}::{name}")
        for file in ("a.py", "b.py", "c.py")
        for name in ("first", "second")
    ]
    seconds = {test.nodeid: 0.0 for test in tests} | {"b.py::second": 9.0, "c.py::first": 2.0}
    assert [test.nodeid for test in durations.longest_first(tests, seconds)] == [
        f"{file}::{name}" for file in ("b.py", "c.py", "a.py") for name in ("first", "second")
    ]


def test_an_ignored_signal_is_given_back_to_children():
    """As in the background of a script, where SIGINT is ignored, and below `nohup`."""
    child = (
        "from signal import *\n"
        "print(*(getsignal(number) == default for number, default in "
        "((SIGINT, default_int_handler), (SIGTERM, SIG_DFL), (SIGHUP, SIG_DFL))))"
    )
    program = (
        "import conftest, subprocess, sys\nconftest._deliver_signals()\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    ignoring = ["bash", "-c", 'trap "" INT TERM HUP; exec "$@"', "bash", sys.executable, "-c"]

    def output(*arguments):
        return subprocess.run(
            [*ignoring, *arguments], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
        ).stdout

    assert output(child) == "False False False\n"
    assert output(program, child) == "True True True\n"
