"""`esljax front`: its files, what it prints, resumption, bad input."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from processes import PATIENCE

import esljax as esl
from esljax.command import cli, progress
from esljax.experiment import judge
from esljax.files import TERMINATED

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all", "precision_restored")
SMALL = """
data = "moons"
hidden = [4]
members = 4
steps = 20
snapshots = 5
batch_size = 16
transport = "gaussian"
points = 3
knots = 4
iterations = 8
judge_runs = 2
families = ["cosine"]
checkpoint_every = 0
"""


def given(folder: Path, out: str, *more: str) -> list[str]:
    return ["front", "--config", str(folder / "small.toml"), "--out", str(folder / out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    (folder / "small.toml").write_text(SMALL)
    return folder


@pytest.fixture(scope="module")
def printed(folder, environment) -> str:
    program = "import sys; from esljax.command import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *given(folder, "whole")],
        env={**environment, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert done.returncode == 0
    return done.stdout


def numbers(folder: Path, out: str) -> dict:
    content = json.loads((folder / out / "front.json").read_text())
    return {name: content[name] for name in content if name not in ("wall_seconds", "config")}


def test_it_leaves_the_front_and_its_schedules(folder, printed):
    content = json.loads((folder / "whole" / "front.json").read_text())
    assert content["config"]["families"] == ["cosine"]
    assert list(content["families"]) == ["cosine"]
    for front in (content, content["families"]["cosine"]):
        for name in ("final_loss", "entropy_production", "w2_squared", "test_accuracy"):
            assert len(front[name]) == len(front["standard_error"][name]) == 3
    assert content["slopes"] == sorted(content["slopes"], reverse=True)
    names = sorted(path.name for path in (folder / "whole" / "schedules").iterdir())
    assert names == ["point_0.json", "point_1.json", "point_2.json"]
    for i, name in enumerate(names):
        schedule = esl.load_schedule(folder / "whole" / "schedules" / name)
        assert schedule.as_dict() == content["schedules"][i]
        assert np.allclose(schedule.rates(20), content["learning_rates"][i][:-1], rtol=1e-5)
    assert (folder / "whole" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "whole" / "checkpoints").exists()


def test_it_prints_the_trade_and_how_to_use_it(folder, printed):
    lines = printed.splitlines()
    assert lines[0].split()[:4] == ["final", "loss", "Σ", "W2²"]
    # Lines are not broken: a copied one works.
    (use,) = [line for line in lines if "load_schedule" in line]
    (code,) = re.findall(r"esljax\.(load_schedule\(.*\))\.to_optax\(steps\)", use)
    schedule = eval(f"esl.{code}", {"esl": esl})
    knee = json.loads((folder / "whole" / "front.json").read_text())["knee"]
    known = esl.load_schedule(folder / "whole" / "schedules" / f"point_{knee}.json")
    assert float(schedule.to_optax(800)(400)) == float(known.to_optax(800)(400))
    words = " ".join(printed.split())
    for sentence in (
        "Held-out means over 2 runs",
        "saves a factor .* of Σ|No point of this front has less Σ",
        "cosine, at its best: |cosine: no loss",
    ):
        assert re.search(sentence, words)


def test_ended_by_sigterm_it_is_finished_with_the_same_numbers(
    folder, printed, environment, capsys
):
    program = "import sys; from esljax.command import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, *given(folder, "ended", "--quiet")],
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        points = folder / "ended" / "checkpoints" / "points"
        while process.poll() is None and not any(
            path.name.isdecimal() for path in points.glob("*")
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert process.returncode == TERMINATED
    assert f"saved in {points}" in error
    assert cli.main(given(folder, "ended", "--quiet")) == 2
    assert "without an unfinished run" in capsys.readouterr().err
    assert not (folder / "ended" / "front.json").exists()
    assert cli.main(given(folder, "ended", "--quiet", "--resume")) == 0
    assert numbers(folder, "ended") == numbers(folder, "whole")
    assert not (folder / "ended" / "checkpoints").exists()


def test_a_front_at_targets_without_families_of_an_own_problem(folder, capsys, monkeypatch):
    (folder / "bowl.py").write_text(
        "import jax\nimport esljax as esl\n\n\ndef bowl(members: int = 4, floor=0.1):\n"
        "    return esl.Problem(\n"
        "        esl.FromFunction(lambda x: floor + (x**2).sum()), members=members, steps=8,\n"
        "        snapshots=4, transport=esl.GaussianTransport(),\n"
        "        start=lambda key: 1 + jax.random.normal(key, (members, 2)) / 4)\n"
    )
    monkeypatch.chdir(folder)
    arguments = ["front", "--problem", "bowl.py:bowl", "--floor", "0.5", "--targets", "1", "0.7"]
    quick = ["--families", "none", "--knots", "2", "--iterations", "6", "--judge-runs", "2"]
    assert cli.main([*arguments, *quick, "--rate", "0.1", "--out", "bowl"]) == 0
    content = json.loads((folder / "bowl" / "front.json").read_text())
    assert content["families"] == {}
    assert content["config"]["floor"] == 0.5
    assert content["final_loss"] == pytest.approx([1, 0.7], rel=0.1)
    assert "2 held-out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--targets", "0.1", "0.2"], "`targets` must be final losses from high to low"),
        (["--targets", "0"], "`targets` must be greater than 0"),
        (["--families", "none", "cosine"], "`families` must be names, or 'none' alone"),
        (["--families", "sine"], "sine"),
        (["--points", "0"], "`points` must be an integer of at least 1"),
        (["--knots", "1"], "`knots` must be an integer of at least 2"),
        (["--judge-runs", "1"], "`judge_runs` must be an integer of at least 2"),
        (["--snapshots", "7"], "`snapshots` must divide the 20 steps"),
        (["--devices", "3"], "`devices` must be at most 1, the cores"),
        (["--process", "1"], "`process` must come with --distributed"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, flags, sentence):
    assert cli.main(given(folder, "bad", *flags)) == 2
    assert sentence in capsys.readouterr().err
    assert not (folder / "bad").exists()


def test_results_of_others_and_of_other_settings_stay(folder, printed, capsys):
    report = folder / "whole" / "front.json"
    before = report.read_bytes()
    assert cli.main(given(folder, "whole", "--points", "2")) == 2
    assert "add --force" in capsys.readouterr().err
    assert report.read_bytes() == before
    theirs = folder / "theirs" / "front.json"
    theirs.parent.mkdir()
    theirs.write_text("precious")
    assert cli.main(given(folder, "theirs", "--force")) == 2
    assert theirs.read_text() == "precious"


def test_the_bar_is_full_at_the_end_and_counts_what_is_restored():
    """The stages of a front with one family, of which two points are restored."""
    console = rich.console.Console(file=io.StringIO(), force_terminal=True)
    gradients = {"front": [12, 8], "cosine": [7, 4]}
    bar = progress.FrontBar(console, gradients=gradients, judge_runs=2)
    task = bar.bar.tasks[0]
    total = progress.GRADIENT * 31 + progress.JUDGED * 8
    assert task.total == pytest.approx(total)
    bowl = esl.Problem(
        esl.Quadratic(1.0),
        members=4,
        steps=4,
        snapshots=2,
        transport=esl.GaussianTransport(),
        start=np.ones((4, 1)),
    )
    judged = judge(bowl, esl.Constant(0.1), jax.random.split(jax.random.key(0)))
    bar.stage("rate")
    bar.trial(1.0)
    assert task.completed == 0
    for i, count in enumerate(gradients["cosine"], 1):
        bar.stage(f"cosine {i}/2")
        assert task.completed >= progress.GRADIENT * 20
        for _ in range(count):
            bar.trial(1.0)
    for between in ("valuing cosine 2/2", "again front 1/2"):
        bar.stage(between)
        bar.trial(1.0)
    for turn, name in enumerate(gradients):
        for i in (1, 2):
            bar.stage(f"judging {name} {i}/2")
            bar.trial(1.0)
            bar.judged(judged)
            done = progress.GRADIENT * 31 + (2 * turn + i) * progress.JUDGED * 2
            assert task.completed == pytest.approx(done)
    assert task.completed == pytest.approx(total)
