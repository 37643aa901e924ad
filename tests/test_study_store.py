"""The store of a study and the commands that read it, on numbers written by hand."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import zarr
from studies import Idle

import esljax as esl
from esljax.command import cli
from esljax.experiment import runs
from esljax.files import storage, writing
from esljax.study import run as study_run
from esljax.study import store as study_store

SETTINGS = {
    "data": "moons",
    "hidden": [4],
    "members": 6,
    "steps": 10,
    "snapshots": 5,
    "batch_size": 32,
}
BASE = esl.RunConfig(**{**SETTINGS, "hidden": (4,)})


def rows(count: int, reasons=None, converged=True) -> runs.Rows:
    """Numbers that name their run in the task and their quantity."""
    numbers = {
        name: 100.0 * i + np.arange(count) for i, name in enumerate(runs.number_names(False))
    }
    return runs.Rows(numbers, np.full(count, converged), reasons or ("",) * count)


def describe(folder, seeds=(3, 1, 2)):
    """The file that describes a study of two rates."""
    writing.write_toml(
        folder / "study.toml", {"base": SETTINGS, "grid": {"rate": [0.1, 0.4], "seed": list(seeds)}}
    )


def written(path, study, *, done=None, **more) -> study_store.StudyStore:
    store = study_store.make_store(path, study, 4)
    count = study.size if done is None else done
    store.write(np.arange(count), rows(count, **more))
    return store


@pytest.fixture
def folder(tmp_path):
    """A study of six runs, all of them done."""
    describe(tmp_path)
    written(tmp_path / "study.zarr", esl.study.Study.from_toml(tmp_path / "study.toml"))
    return tmp_path


def output(command: str, folder, capsys, *more: str) -> tuple[int, str, str]:
    code = cli.main(["study", command, str(folder / "study.toml"), *more])
    return code, *capsys.readouterr()


# Rejected stores


def test_a_store_of_other_versions_is_not_resumed(folder, refused):
    """Its numbers may differ from those of the installed versions."""
    store = study_store.StudyStore(folder / "study.zarr", zarr.open_group(folder / "study.zarr"))
    versions = json.loads(store.attributes["versions"])
    store.record({"versions": json.dumps({**versions, "flax": "0.1"})})
    study = esl.study.Study.from_toml(folder / "study.toml")
    refused(
        lambda: esl.study.run_study(study, folder / "study.zarr", executor=Idle()),
        "`out` must be a store made with the installed versions, but .*study.zarr differs: "
        "flax 0.1 there and .* here .install that version",
    )


def test_every_commit_that_writes_is_recorded(folder, monkeypatch):
    monkeypatch.setattr(storage, "commit", lambda: "abc")
    esl.study.run_study(
        esl.study.Study.from_toml(folder / "study.toml"), folder / "study.zarr", executor=Idle()
    )
    first, second = esl.study.open_study(folder / "study.zarr").attrs["commit"].split(", ")
    assert second == "abc" != first


class Elsewhere(esl.study.executors.InProcess):
    """A worker that has another jax."""

    def submit(self, fn, task, versions, /):
        return super().submit(fn, task, {**versions, "jax": "0.1"})


def test_a_worker_with_other_versions_is_rejected(tmp_path):
    study = esl.study.Study(BASE, grid={"seed": [1]})
    with pytest.raises(
        esl.study.LostWorkersError, match=r"a worker differs: jax .* there and 0\.1 here"
    ):
        esl.study.run_study(study, tmp_path / "study.zarr", executor=Elsewhere())
    assert int(esl.study.open_study(tmp_path / "study.zarr")["done"].sum()) == study_store.TO_DO


def test_rejected_input_leaves_no_store(folder, refused):
    vast = esl.study.Study(BASE, grid={"members": [6, 10_000_000]})
    refused(
        lambda: esl.study.run_study(vast, folder / "new.zarr", executor=Idle()),
        "`members` must fit in the .* of memory",
    )
    study = esl.study.Study(BASE, grid={"seed": [9]})
    for other, sentence in (
        ("nowhere.zarr", "there is nothing at"),
        ("study.zarr", "differs in grid.seed"),
    ):
        refused(
            lambda other=other: esl.study.run_study(
                study, folder / "new.zarr", reuse=[folder / other], executor=Idle()
            ),
            sentence,
        )
    assert sorted(path.name for path in folder.iterdir()) == ["study.toml", "study.zarr"]


def test_a_rejected_retry_forgets_nothing(folder, refused):
    study = esl.study.Study(BASE, grid={"seed": [1, 2]})
    written(folder / "failed.zarr", study, reasons=("diverged", "diverged"))
    refused(
        lambda: esl.study.run_study(
            study,
            folder / "failed.zarr",
            retry=True,
            reuse=[folder / "nowhere.zarr"],
            executor=Idle(),
        ),
        "there is nothing at",
    )
    assert (
        esl.study.open_study(folder / "failed.zarr")["done"].values.tolist()
        == [study_store.FAILED] * 2
    )


def test_a_grown_grid_is_pointed_to_reuse(folder, refused):
    refused(
        lambda: esl.study.run_study(
            esl.study.Study(BASE, grid={"rate": [0.1, 0.4], "seed": [3, 1, 2, 4]}),
            folder / "study.zarr",
            executor=Idle(),
        ),
        r"differs in grid.seed, \[3, 1, 2\] there and \[3, 1, 2, 4\] here: choose another store, "
        "and copy finished runs into it by --reuse study.zarr",
    )


def test_a_link_to_a_store_is_the_store(folder, refused):
    (folder / "link.zarr").symlink_to(folder / "study.zarr")
    study = esl.study.Study.from_toml(folder / "study.toml")
    with storage.locked(study_store.lock_path(folder / "study.zarr"), "out"):
        refused(
            lambda: esl.study.run_study(study, folder / "link.zarr", executor=Idle()),
            "`out` must have no other writer",
        )
    assert study_store.lock_path(folder / "link.zarr") == study_store.lock_path(
        folder / "study.zarr"
    )
    refused(
        lambda: esl.study.run_study(study, "/", executor=Idle()),
        "`out` must be a folder of its own",
    )


# Reading


# The description that version 0.1 wrote into the attributes of a store, field by field.
OF_0_1 = """
[base]
data = "moons"
hidden = [4]
members = 6
steps = 10
snapshots = 5
batch_size = 32
temperature = 1e-07
l2 = 0.0001
rate = 0.25
transport = "exact"
epsilon = 1.0
directions = 64
chunk = 0
seed = 0
dtype = "float32"
model_dtype = "same"
schedule = "constant"
jackknife = 0

[grid]
rate = [0.1, 0.4]
seed = [3, 1, 2]
"""
NUMBERS_OF_0_1 = (
    *("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric"),
    *("learning_time", "final_loss", "test_accuracy", "noise_floor"),
)


def store_of_0_1(path, **attributes):
    """A finished store as version 0.1 laid it out, made by hand."""
    about = {
        "version": 1,
        "study": OF_0_1,
        "task_size": 32,
        "created": "2026-11-26T09:54:58+00:00",
        "versions": json.dumps(storage.versions()),
        "commit": "8f28a06f8af0c734b688368c5c2dad7d93c3ed7f",
    }
    group = zarr.create_group(str(path), zarr_format=3, attributes={**about, **attributes})
    arrays = {name: np.full((2, 3), float(i)) for i, name in enumerate(NUMBERS_OF_0_1)}
    arrays |= {"converged": np.full((2, 3), True), "done": np.full((2, 3), 1, np.int8)}
    arrays |= {"rate": np.array([0.1, 0.4]), "seed": np.array([3, 1, 2])}
    for name, values in arrays.items():
        dimensions = (name,) if name in ("rate", "seed") else ("rate", "seed")
        group.create_array(name, data=values, dimension_names=dimensions)
    group.create_array("reason", shape=(2, 3), dtype="string", dimension_names=("rate", "seed"))


def test_a_store_of_0_1_is_read_and_resumed(tmp_path):
    describe(tmp_path)
    store_of_0_1(tmp_path / "study.zarr")
    study = esl.study.Study.from_toml(tmp_path / "study.toml")
    results = esl.study.run_study(study, tmp_path / "study.zarr", executor=Idle())
    groups = esl.study.summarize(results)
    assert [(group.settings, group.runs) for group in groups] == [
        ({"rate": 0.1}, 3),
        ({"rate": 0.4}, 3),
    ]
    assert list(groups[0].means.values()) == list(range(len(NUMBERS_OF_0_1)))
    assert results["seed"].values.tolist() == [3, 1, 2]


def test_a_run_of_0_1_without_numbers_is_run_again(tmp_path, refused, monkeypatch):
    """Stores without checksums: a finished run has numbers."""
    describe(tmp_path)
    path = tmp_path / "study.zarr"
    store_of_0_1(path)
    zarr.open_group(path)["gap"][0, 1] = np.nan
    refused(
        lambda: esl.study.open_study(path),
        "`path` must be an undamaged store, but .*study.zarr does not hold what was written of the "
        "run at rate 0.1, seed 1: 1 of 6 finished runs are lost, which `esljax study run",
    )
    monkeypatch.setattr(study_run, "work", lambda task: rows(len(task.points)))
    study = esl.study.Study.from_toml(tmp_path / "study.toml")
    with pytest.warns(RuntimeWarning, match="seed 1: 1 finished runs are damaged and run again"):
        results = esl.study.run_study(study, path)
    assert float(results["gap"][0, 1]) == rows(1).numbers["gap"][0]


def test_a_store_of_another_layout_is_rejected(tmp_path, refused):
    store_of_0_1(tmp_path / "study.zarr", version=0)
    refused(
        lambda: esl.study.open_study(tmp_path / "study.zarr"),
        "`path` must be a store with layout 1 or 2, but .*study.zarr has layout 0: read it with",
    )


def test_coordinates_come_in_the_order_of_the_study(tmp_path):
    """Not in the order of a folder's files, on which the lines of a figure would depend."""
    grid = {
        "temperature": [0.1],
        "rate": [0.1, 0.2],
        "l2": [0.0, 0.1],
        "batch_size": [8, 4],
        "seed": [0],
    }
    written(tmp_path / "study.zarr", esl.study.Study(BASE, grid=grid))
    results = esl.study.open_study(tmp_path / "study.zarr")
    assert list(results.coords) == list(results.sizes) == list(grid)
    assert list(esl.study.summarize(results)[0].settings) == [
        "temperature",
        "rate",
        "l2",
        "batch_size",
    ]
    assert all(isinstance(value, str | int) for value in results.attrs.values()), (
        "as other formats want them"
    )


def test_unsolved_transport_problems_are_reported(folder, capsys):
    study = esl.study.Study.from_toml(folder / "study.toml")
    shutil.rmtree(folder / "study.zarr")
    store = written(folder / "study.zarr", study)
    store.write(np.array([1, 2]), rows(2, converged=False))
    sentence = re.compile("2 done, but with .*transport problems.*: do not trust their numbers")
    for command, code in (("run", 1), ("status", 0)):
        ended, out, _ = output(command, folder, capsys)
        assert (ended, bool(sentence.search(out)), "failed:" in out) == (code, True, False)
    # A failed run has solved nothing either, but is reported as failed.
    store.write(np.array([5]), rows(1, reasons=("diverged",), converged=False))
    out = output("status", folder, capsys)[1]
    assert sentence.search(out)
    assert "1 failed: diverged" in out
    _, shown, _ = output("show", folder, capsys)
    assert [line.split()[:2] for line in shown.splitlines()[-3:-1]] == [
        ["0.1", "3*"],
        ["0.4", "2/3"],
    ]
    assert "* Some transport problems were not solved" in shown


def test_no_digit_is_cut_off(folder, capsys):
    """However many settings vary; constant settings are printed once."""
    shutil.rmtree(folder / "study.zarr")
    one = {
        "rate": 0.1234567,
        "temperature": 0.1,
        "members": 6,
        "l2": 0.1,
        "steps": 10,
        "data": "moons",
        "transport": "exact",
    }
    one |= {
        "directions": 16,
        "epsilon": 0.1,
        "schedule": "constant",
        "model_dtype": "same",
        "batch_size": 8,
    }
    two = {
        "rate": 0.1234568,
        "temperature": 0.2,
        "members": 8,
        "l2": 0.2,
        "steps": 20,
        "data": "digits",
        "transport": "sliced",
    }
    two |= {
        "directions": 32,
        "epsilon": 0.2,
        "schedule": "warmup_stable_decay",
        "model_dtype": "bfloat16",
        "batch_size": 16,
    }
    written(
        folder / "study.zarr",
        esl.study.Study(BASE, points=[{**point, "dtype": "float64"} for point in (one, two)]),
    )
    _, shown, error = output("show", folder, capsys)
    title, heading, row, *_ = shown.splitlines()
    assert "dtype float64: digits in parentheses" in title
    assert heading.split()[:5] == ["data", "batch", "size", "l2", "model"]
    assert row.split()[:6] == ["moons", "8", "0.1", "same", "6", "10"]
    assert "0.1234567 " in row
    assert "…" not in row + heading
    assert "has changed" in error


def test_a_changed_file_is_reported(folder, capsys):
    describe(folder, seeds=(3, 1, 2, 4))
    code, out, error = output("status", folder, capsys)
    assert (code, "6 done, 0 failed, 0 to do" in out) == (0, True)
    assert "study.toml has changed" in error
    assert "grid.seed, [3, 1, 2] there and [3, 1, 2, 4] here" in error


def test_a_study_in_a_file_of_another_name(folder, capsys):
    (folder / "study.toml").rename(folder / "study.v2")
    assert cli.main(["study", "status", str(folder / "study.v2")]) == 0
    assert "6 done" in capsys.readouterr().out


def test_a_stale_lock_file_names_no_writer(folder, capsys):
    """A killed writer leaves its lock file, and another process may have its number."""
    lock = study_store.lock_path(folder / "study.zarr")
    lock.write_text(json.dumps({"pid": os.getppid(), "host": os.uname().nodename}))
    assert "is running it" not in output("status", folder, capsys)[1]
    with storage.locked(lock, "out"):
        assert f"process {os.getpid()} of " in output("status", folder, capsys)[1]


def test_a_full_disk_is_reported(folder, capsys, monkeypatch):
    shutil.rmtree(folder / "study.zarr")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study_run, "_keep", full)
    code, _, error = output("run", folder, capsys)
    assert code == 1
    assert error.startswith(
        "esljax: ended by [Errno 28] No space left on device; 0 of 6 runs done in"
    )
    assert error.count("\n") == 1
