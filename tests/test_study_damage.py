"""Damaged stores of studies: one sentence that names the place, or the same numbers."""

import numpy as np
import pytest
from damages import copied, damage

import esljax as esl
from esljax.command import cli
from esljax.experiment import Rows, number_names
from esljax.files import writing
from esljax.study import run as study_run
from esljax.study import store as study_store

BASE = {"data": "moons", "hidden": [4], "members": 6, "steps": 10, "snapshots": 5}
GRID = {"schedule": ["constant", "cosine"], "rate": [0.1, 0.4, 1.6]}


def worked(points) -> Rows:
    """Numbers that are a function of the run, as those of a simulation are."""
    scale = np.array([10 * p.rate + 7 * (p.schedule == "cosine") for p in points])
    numbers = {name: scale + i / 8 for i, name in enumerate(number_names(False))}
    bad = [p.rate == 1.6 and p.schedule == "cosine" for p in points]
    numbers = {name: np.where(bad, np.nan, values) for name, values in numbers.items()}
    return Rows(numbers, ~np.array(bad), tuple("diverged" * b for b in bad))


@pytest.fixture
def quick(monkeypatch):
    """Runs that take no time."""
    monkeypatch.setattr(study_run, "work", lambda task: worked(task.points))
    monkeypatch.setattr(study_store.storage, "commit", lambda: "abc")


@pytest.fixture
def folder(tmp_path, quick):
    """A study of six runs in two tasks: four done, one failed, one to do."""
    folder = tmp_path / "whole"
    folder.mkdir()
    writing.write_toml(folder / "study.toml", {"base": BASE, "grid": GRID})
    study = esl.study.Study.from_toml(folder / "study.toml")
    store = study_store.make_store(folder / "study.zarr", study, 3)
    store.write(np.arange(1, 6), worked([study.point(i) for i in range(1, 6)]))
    return folder


def everything(path) -> dict[str, list]:
    """All variables, coordinates and attributes, in a form in which NaN equals itself."""
    found = esl.study.open_study(path)
    content = {
        str(name): [found[name].dims, repr(found[name].values.tolist()), repr(found[name].attrs)]
        for name in found.variables
    }
    return content | {"attrs": [{k: v for k, v in found.attrs.items() if k != "commit"}]}


def answer(call, path):
    """The result of a call, or the sentence that refuses it."""
    try:
        return call()
    except esl.InputError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert str(path) in sentence
    return None


def commanded(command, path, capfd) -> tuple[int, str] | None:
    """Exit code and output of a command, or None where it refuses the store in one line."""
    code = cli.main(["study", command, str(path)])
    out, error = capfd.readouterr()
    if code == 2:
        assert error.startswith("esljax: ")
        assert str(path) in error
        assert error.count("\n") == 1, error
        return None
    return code, out


def survived(folder, tmp_path, capfd, seeds) -> dict[str, int]:
    """Damage copies of a store, try every door, and count how it ended."""
    ended = {"refused": 0, "same": 0, "repaired": 0}
    path = copied(folder, tmp_path / "copy") / "study.zarr"
    study, content = esl.study.read_study(path), everything(path)
    shown = {command: commanded(command, path, capfd) for command in ("status", "show")}
    commanded("run", path, capfd)
    complete = everything(path)
    for seed in seeds:
        copied(folder / "study.zarr", path)
        words = f"{seed}: {damage(path, np.random.default_rng(seed))}"
        if seed % 4 == 0:
            assert answer(lambda: esl.study.read_study(path), path) in (None, study), words
        found = answer(lambda: everything(path), path)
        assert found in (None, content), words
        for command in {1: ("status",), 2: ("show",)}.get(seed % 4, ()):
            assert commanded(command, path, capfd) in (None, shown[command]), words
        finished = commanded("run", path, capfd)
        if finished is not None:
            assert everything(path) == complete, words
        ended["same" if found else "repaired" if finished else "refused"] += 1
    return ended


def test_a_damaged_store_is_a_sentence_or_the_same_numbers(folder, tmp_path, capfd):
    ended = survived(folder, tmp_path, capfd, range(60))
    assert min(ended["refused"], ended["repaired"]) > 10, ended


@pytest.mark.slow
def test_five_hundred_damages(folder, tmp_path, capfd):
    ended = survived(folder, tmp_path, capfd, range(100, 600))
    assert min(ended["refused"], ended["repaired"]) > 100, ended
