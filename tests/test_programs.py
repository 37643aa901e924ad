"""Compiled programs that the commands keep: seen in a second process, elsewhere, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from esljax.command import cli

# One that keeps its programs as the commands do, and one command.
SMALL = """
import jax
from esljax.files import programs
remark = programs.keep_programs()
jax.jit(lambda x: x * 3)(2.0)
"""
COMMAND = """
from esljax.command import main
remark = main(sys.argv[1:])
"""
COUNTED = """
import collections, json, os, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
{}
counts = [events["/jax/compilation_cache/cache_" + name] for name in ("hits", "misses")]
print(json.dumps([*counts, os.environ.get("JAX_COMPILATION_CACHE_DIR"), remark]))
"""
OURS = "ESLJAX_COMPILATION_CACHE"


class Ran(NamedTuple):
    hits: int
    misses: int
    inherited: str | None
    """The folder that the children of the process have."""
    remark: str | int | None


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program in a process with its own caches."""
    # Every place that a user's caches may have is in the folder of the test.
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    home = {"HOME": str(tmp_path / "home"), "LOCALAPPDATA": str(tmp_path / "home")}

    def run(program: str, *arguments: str, **environment: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-c", COUNTED.format(program), *arguments],
            env={**kept, **home, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return Ran(*json.loads(done.stdout))

    return run


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache")) if folder.exists() else []


def test_a_second_command_compiles_nothing(run, tmp_path):
    recording = tmp_path / "run.npz"
    np.savez(recording, positions=np.random.default_rng(0).normal(size=(3, 4, 2)))
    given = ["measure", str(recording), "--jackknife", "0", "--quiet", "--out", str(tmp_path)]
    first = run(COMMAND, *given)
    report = (tmp_path / "report.json").read_text()
    assert (first.hits, first.remark) == (0, 0)
    assert first.misses == len(kept_in(tmp_path / "home")) > 10
    second = run(COMMAND, *given)
    assert (second.hits, second.misses) == (first.misses, 0)
    before, after = json.loads(report), json.loads((tmp_path / "report.json").read_text())
    assert before.pop("wall_seconds") != after.pop("wall_seconds")
    assert before == after


def test_damaged_programs_are_compiled_again_in_silence(run, tmp_path):
    kept = run(SMALL).misses
    for path in kept_in(tmp_path / "home"):
        path.write_bytes(path.read_bytes()[:50])
        # Older than the last look at them.
        os.utime(path, (1e9, 1e9))
    assert run(SMALL)[:2] == (0, kept)
    # jax does not replace them: the next look does.
    assert {path.stat().st_size for path in kept_in(tmp_path / "home")} == {50}
    for path in kept_in(tmp_path / "home"):
        path.touch()
    assert run(SMALL)[:2] == (0, kept)
    assert run(SMALL)[:2] == (kept, 0)


def test_programs_go_where_the_user_wants_them(run, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ran = run(SMALL, **{OURS: str(ours)})
    assert ran.misses == len(kept_in(ours)) > 0
    assert ran.inherited == str(kept_in(ours)[0].parent)
    # jax has its own limits for a folder of its own variable.
    least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    chosen = {OURS: str(tmp_path / "not"), "JAX_COMPILATION_CACHE_DIR": str(theirs)}
    assert run(SMALL, **chosen, **least).inherited == str(theirs)
    assert kept_in(theirs)
    assert not (tmp_path / "not").exists()
    assert kept_in(tmp_path / "home") == []


@pytest.mark.parametrize(
    ("program", "environment"),
    [
        (SMALL.replace("()", "(wanted=False)", 1), {}),
        *((SMALL, {OURS: no}) for no in ("off", "0", " False")),
        (SMALL, {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        # The package as a library.
        ("import esljax\nremark = jax.jit(lambda x: x * 3)(2.0).item()", {}),
    ],
)
def test_nothing_is_kept_where_nothing_is_wanted(run, tmp_path, program, environment):
    ran = run(program, **environment)
    assert (ran.hits, ran.misses, ran.inherited) == (0, 0, None)
    assert kept_in(tmp_path / "home") == []


def test_a_folder_that_cannot_be_made_ends_nothing(run, tmp_path):
    file = tmp_path / "home"
    file.write_text("")
    assert run(SMALL) == Ran(0, 0, None, None)
    named = run(SMALL, **{OURS: str(file)})
    assert named[:3] == (0, 0, None)
    assert named.remark.startswith(f"{OURS}={file} cannot be used, and no program is kept: ")
    assert "\n" not in named.remark
    nobody = run(SMALL, **{OURS: "~nobody_at_all/x"}).remark
    assert nobody.endswith(".")
    assert not nobody.endswith("..")


def test_a_yes_is_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(SMALL, **{OURS: "1"}).misses == len(kept_in(tmp_path / "home")) > 0
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["measure", "none.npz"], [True]),
        (["measure", "none.npz", "--no-compilation-cache"], [False]),
        (["front", "--no-compilation-cache", "--devices", "1000"], [False]),
        (["study", "run", "none.toml", "--no-compilation-cache"], [False]),
        (["study", "show", "none.toml"], []),
    ],
)
def test_a_flag_turns_it_off(monkeypatch, capsys, tmp_path, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(cli.programs, "keep_programs", lambda wanted: seen.append(wanted))
    assert cli.main(arguments) == 2
    assert seen == wanted
