"""Nothing but files of this program is replaced or removed, and those of its own run alone."""

import json
import os
import stat

import numpy as np
import pytest
from trees import plant, seen, still_there

import esljax as esl
from esljax._checks import InputError
from esljax.command import cli
from esljax.files import remove_ours, session, writing

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all", "precision_restored")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "run.npz"
    positions = np.random.default_rng(0).normal(size=(3, 6, 2)).cumsum(axis=0)
    np.savez(path, positions=positions)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    base = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5)
    for name, seeds in (("s", [0, 1]), ("other", [2, 3])):
        described = esl.study.Study(base, grid={"seed": seeds})
        esl.study.run_study(described, folder / f"{name}.zarr")
    return folder


def refused(capsys, *arguments):
    """The one line of a call that must be refused."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


STRANGERS = {
    "file": plant,
    "empty": lambda path: path.write_bytes(b""),
    "another program's": lambda path: path.write_text('{"config": {}, "versions": {"jax": "1"}}'),
    "link": lambda path: path.symlink_to("precious"),
    "pipe": os.mkfifo,
    "folder": os.mkdir,
}
NAMES = {
    "optimize": ("config.toml", "report.json", "schedules.png", "speed_limit.png", ".lock"),
    "measure": ("config.toml", "report.json", "speed_limit.png"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in NAMES for name in NAMES[command]]
)
def test_what_they_put_under_our_names_is_refused_and_stays(
    tmp_path, capsys, recording, command, name, stranger
):
    out = tmp_path / "out"
    plant(out / "precious")
    plant(out / "checkpoints" / "search" / "best.npz")
    STRANGERS[stranger](out / name)
    before = seen(tmp_path)
    more = [recording] if command == "measure" else []
    for flags in ([], ["--force"], *([["--resume"]] if command == "optimize" else [])):
        error = refused(capsys, command, *more, "--out", out, *flags)
        assert f"{out / name}" in error
        assert seen(tmp_path) == before


def test_a_measurement_replaces_its_own_files_alone(tmp_path, capsys, recording):
    out = tmp_path / "out"
    plant(out / "theirs.txt")
    given = ["measure", str(recording), "--out", str(out), "--quiet", "--jackknife", "0"]
    before = seen(tmp_path)
    umask = os.umask(0o027)
    try:
        assert cli.main(given) == 0
    finally:
        os.umask(umask)
    written = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.glob("[!t]*")}
    assert written == dict.fromkeys(("config.toml", "report.json", "speed_limit.png"), 0o640)
    first = json.loads((out / "report.json").read_text())
    assert cli.main(given) == 0, "the same configuration again"
    ours = seen(tmp_path)
    error = refused(capsys, *given[:-2], "--jackknife", "3")
    assert "--force" in error
    assert "another folder" in error
    assert "whose jackknife is 0, not 3" in error
    assert seen(tmp_path) == ours
    assert cli.main([*given[:-2], "--jackknife", "3", "--force"]) == 0
    assert json.loads((out / "report.json").read_text())["config"]["jackknife"] == 3
    assert first["config"]["jackknife"] == 0
    # An edited file is its editor's.
    with (out / "config.toml").open("a") as file:
        file.write("# for the paper\n")
    edited = seen(tmp_path)
    assert "config.toml is there" in refused(capsys, *given, "--force")
    assert seen(tmp_path) == edited
    # A figure alone says what it is of.
    (out / "config.toml").unlink()
    (out / "report.json").unlink()
    assert "speed_limit.png is there, which shows something else" in refused(capsys, *given)
    assert still_there(before, tmp_path)


def test_a_figure_of_a_study_replaces_one_of_that_study_alone(study, tmp_path, capsys):
    for kind in ("png", "pdf", "svg", "eps"):
        out = tmp_path / f"figure.{kind}"
        given = ["study", "plot", str(study / "s.zarr"), "--out", str(out)]
        assert cli.main(given) == 0
        assert cli.main(given) == 0, "the same again"
        drawn = seen(tmp_path)
        other = ["study", "plot", str(study / "other.zarr"), "--out", str(out)]
        assert "--force" in refused(capsys, *other)
        assert seen(tmp_path) == drawn
        assert cli.main([*other, "--force"]) == 0
        out.unlink()
        plant(out)
        theirs = seen(tmp_path)
        assert "esljax did not write" in refused(capsys, *other, "--force")
        assert seen(tmp_path) == theirs


def test_a_refused_run_leaves_no_folder(tmp_path, capsys, recording):
    refused(capsys, "measure", tmp_path / "nowhere.npz", "--out", tmp_path / "a" / "b")
    refused(capsys, "optimize", "--out", tmp_path / "a" / "b", "--resume", "--steps", "7")
    # Found where the settings are written already.
    refused(capsys, "optimize", "--out", tmp_path / "a" / "b", "--members", "1000000000")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["file", "pipe", "below a file", "device", "long"])
def test_an_out_that_will_not_do_is_found_before_the_work(tmp_path, capsys, recording, kind):
    out = tmp_path / "out"
    if kind in ("file", "below a file"):
        plant(out)
    elif kind == "pipe":
        os.mkfifo(out)
    others = {"below a file": out / "inside", "device": "/dev/null", "long": out / ("a" * 300)}
    place = others.get(kind, out)
    before = seen(tmp_path)
    for command in (["measure", recording], ["optimize"]):
        assert "`out` must be a folder" in refused(capsys, *command, "--out", place)
    assert seen(tmp_path) == before


def test_no_file_under_our_name_is_followed_or_cut_short(tmp_path, monkeypatch):
    """The functions hold it themselves, also for what appears while a run computes."""
    plant(tmp_path / "precious")
    (tmp_path / "report.json").symlink_to("precious")
    before = seen(tmp_path)
    content = {"config": {"seed": 1}, "versions": {}}
    with pytest.raises(InputError, match="a link that esljax did not write"):
        writing.write_json(tmp_path / "report.json", content)
    assert seen(tmp_path) == before
    settings = tmp_path / "config.toml"
    writing.write_toml(settings, {"seed": 1, "rate": 0.5})
    before = seen(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            writing.write_toml(settings, {"seed": 2})
    assert seen(tmp_path) == before, "the old file, and nothing half-written"


def test_a_saved_schedule_replaces_a_saved_schedule_alone(tmp_path, refused):
    path = tmp_path / "schedule.json"
    for schedule in (esl.Constant(0.25), esl.Linear(1, 0.5), esl.Knots([0.1, 0.2])):
        schedule.save(path)
        schedule.save(path)
    for name, stranger in STRANGERS.items():
        if name == "empty":  # as `tempfile` leaves one: nothing to lose
            continue
        place = tmp_path / name
        stranger(place)
        before = seen(tmp_path)
        refused(lambda place=place: esl.Constant(0.25).save(place), "`path` must be where nothing")
        assert seen(tmp_path) == before


# --- Checkpoints ----------------------------------------------------------------------------------


def counted(folder, *, resume=False, rounds=6):
    """A loop with a checkpoint after each round."""
    with session(esl.Checkpoints(folder, resume=resume, every=0), {"rounds": rounds}) as saved:
        done, total = saved.restore(lambda done: np.zeros(2)) or (0, np.zeros(2))
        for i in range(done, rounds):
            total = total + i
            saved.offer(i + 1, lambda total=total: total, last=i + 1 == rounds)
    return total


FOREIGN = (
    "3/model.safetensors",
    "3/about/metadata",
    "3/_CHECKPOINT_METADATA",
    "9/params",
    "4.orbax-checkpoint-tmp/half",
    "8.orbax-checkpoint-tmp-77/half",
    "notes.txt",
    "best/1/params",
)


def test_checkpoints_leave_what_is_theirs(tmp_path):
    for name in FOREIGN:
        plant(tmp_path / name)
    (tmp_path / "7.orbax-checkpoint-tmp").symlink_to("best")
    before = seen(tmp_path)
    (tmp_path / "9").rename(tmp_path.parent / "nine")
    (tmp_path / "3").rename(tmp_path.parent / "three")
    with pytest.warns(RuntimeWarning, match="4 .* cannot be written: .* is in the way"):
        counted(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.name.isdecimal()} == {"5", "6"}
    (tmp_path.parent / "nine").rename(tmp_path / "9")
    (tmp_path.parent / "three").rename(tmp_path / "3")
    # A checkpoint of another program is skipped, and neither counted nor removed.
    with pytest.warns(RuntimeWarning, match="round 9 .* cannot be read and is skipped"):
        assert counted(tmp_path, resume=True).tolist() == [15, 15]
    assert still_there(before, tmp_path)
    remove_ours(tmp_path)
    assert seen(tmp_path) == before


def test_a_half_that_a_killed_writer_has_left_is_removed(tmp_path):
    counted(tmp_path)
    plant(tmp_path / "7.orbax-checkpoint-tmp" / "state" / "d" / "part")
    plant(tmp_path / "2.orbax-checkpoint-tmp" / "theirs")
    writer = {"pid": os.getpid(), "host": os.uname().nodename, "program": "esljax", "saving": 7}
    (tmp_path / ".lock").write_text(json.dumps(writer))
    counted(tmp_path, resume=True)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"5", "6", "2.orbax-checkpoint-tmp"}
