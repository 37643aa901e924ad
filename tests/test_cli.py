"""The command line: files, exit codes, reproducibility, bad input, choices and interruption."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import PATIENCE

import esljax as esl
from esljax.command import cli
from esljax.experiment import DATASETS, TRANSPORTS

SMALL = """
data = "moons"
hidden = [8]
members = 6
steps = 40
snapshots = 10
batch_size = 64
knots = 5
iterations = 12
judge_runs = 3
"""
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("quick_compilation_of_all", "precision_restored")
NAMES = {
    "constant",
    "linear_decay",
    "cosine",
    "warmup_stable_decay",
    "exponential_decay",
    "linear_rise",
    "exponential_rise",
    "retimed",
    "optimized",
}
NUMBERS = {
    "entropy_production",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "final_loss",
    "test_accuracy",
    "learning_time",
    "dissipation",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimize")
    (folder / "small.toml").write_text(SMALL)
    code = cli.main(
        [
            "optimize",
            "--config",
            str(folder / "small.toml"),
            "--out",
            str(folder / "first"),
            "--quiet",
        ]
    )
    return code, folder


def test_writes_what_it_promises(small):
    code, folder = small
    report = json.loads((folder / "first" / "report.json").read_text())
    assert set(report) == {
        "rate",
        "target_loss",
        "schedules",
        "optimized",
        "paths",
        "units",
        "config",
        "versions",
        "wall_seconds",
    }
    assert set(report["schedules"]) == NAMES
    for schedule in report["schedules"].values():
        assert set(schedule) >= NUMBERS | {"learning_rates", "standard_error"}
        assert set(schedule["standard_error"]) == NUMBERS
        assert len(schedule["learning_rates"]) == 40
        assert schedule["gap"] == pytest.approx(
            schedule["entropy_production"] - schedule["w2_squared"], rel=1e-5
        )
        assert schedule["gap"] == pytest.approx(
            schedule["temporal"] + schedule["geometric"], rel=1e-5
        )
        assert schedule["efficiency"] == pytest.approx(
            schedule["w2_squared"] / schedule["entropy_production"], rel=1e-5
        )
        assert 0.5 < schedule["identity_fraction"] <= 1
        assert sum(schedule["learning_rates"]) == pytest.approx(schedule["learning_time"], rel=1e-5)
        assert (
            schedule["entropy_production"]
            >= schedule["length_squared"]
            >= schedule["w2_squared"]
            > 0
        )
    sigmas = [schedule["entropy_production"] for schedule in report["schedules"].values()]
    assert sigmas == sorted(sigmas), "best first"
    # No schedule in common use has less Σ than the two made here; which of those has, a search
    # of twelve iterations does not decide.
    assert next(iter(report["schedules"])) in ("optimized", "retimed")
    examined = report["optimized"]
    assert len(examined["batch_temperature"]) == 11
    assert min(examined["batch_temperature"]) > 0
    assert examined["batch_floor"] > examined["standard_error"]["batch_floor"] > 0
    assert examined["debiased_w2_squared"] is None, "too few members"
    assert report["paths"]["freedom"] == len(NAMES) - 1
    assert 0 < report["paths"]["spread"] < 0.2
    assert set(report["units"]) >= NUMBERS | {"efficiency", "identity_fraction", "noise_floor"}
    optimized = report["schedules"]["optimized"]
    assert code == (0 if abs(optimized["final_loss"] / report["target_loss"] - 1) <= 0.01 else 1)
    for figure in ("schedules.png", "speed_limit.png"):
        assert (folder / "first" / figure).read_bytes().startswith(b"\x89PNG")


def test_matched_endpoints(small):
    """Held-out losses agree far better than their own scatter: all schedules see the same keys."""
    schedules = json.loads((small[1] / "first" / "report.json").read_text())["schedules"]
    losses = [schedule["final_loss"] for schedule in schedules.values()]
    assert max(losses) / min(losses) - 1 < 0.02


def test_the_written_config_gives_the_same_report_again(small):
    _, folder = small
    config = folder / "first" / "config.toml"
    assert tomllib.loads(config.read_text())["hidden"] == [8]
    cli.main(["optimize", "--config", str(config), "--out", str(folder / "second"), "--quiet"])
    first, second = (
        json.loads((folder / name / "report.json").read_text()) for name in ("first", "second")
    )
    assert first["schedules"] == second["schedules"]
    assert first["target_loss"] == second["target_loss"]
    cli.main(
        [
            "optimize",
            "--config",
            str(config),
            "--out",
            str(folder / "third"),
            "--seed",
            "1",
            "--quiet",
        ]
    )
    assert (
        json.loads((folder / "third" / "report.json").read_text())["target_loss"]
        != first["target_loss"]
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "Argument `steps` must be an integer of at least 1, but is 0."),
        (["--members", "1"], "Argument `members` must be an integer of at least 2, but is 1."),
        (["--snapshots", "7"], "Argument `snapshots` must divide the 200 steps, but is 7."),
        (["--rate", "-0.1"], "Argument `rate` must be greater than 0, but is -0.1."),
        (["--rate", "nan"], "Argument `rate` must be greater than 0, but is nan."),
        (
            ["--temperature", "-1"],
            "Argument `temperature` must be at least 0 and not NaN, but has the value -1.",
        ),
        (["--epsilon", "0"], "Argument `epsilon` must be greater than 0, but is 0."),
        (["--target", "-2"], "Argument `target` must be greater than 0, but is -2."),
        (["--target", "inf"], "Argument `target` must be finite, but is inf."),
        (["--seed", "4294967296"], "Argument `seed` must be below 2**32, where the keys"),
        (["--hidden", "0"], "Argument `hidden` must be an integer of at least 1, but is 0."),
        (
            ["--judge-runs", "1"],
            "Argument `judge_runs` must be an integer of at least 2, but is 1.",
        ),
        (["--config", "/nowhere.toml"], "Argument `config` must be a readable file"),
    ],
)
def test_bad_values_are_one_sentence(arguments, sentence, capsys, tmp_path):
    assert cli.main(["optimize", "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"esljax: {sentence}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("stepps = 3", "Key `stepps` of"),
        ("steps = 'many'", "Argument `steps` must be an integer in"),
        ("steps = true", "Argument `steps` must be an integer in"),
        ("rate = 'fast'", "Argument `rate` must be a number in"),
        ("devices = 1.5", "Argument `devices` must be an integer in"),
        ("quiet = 1", "Argument `quiet` must be true or false in"),
        ("hidden = 3", "Argument `hidden` must be a list of integers"),
        ("steps = = 3", "Argument `config` must be valid TOML"),
        ("data = 'mnist'", "Argument `data` must be one of"),
        ("dtype = 'float16'", "Argument `dtype` must be one of"),
    ],
)
def test_bad_files_are_one_sentence(content, sentence, capsys, tmp_path):
    (tmp_path / "bad.toml").write_text(content)
    assert (
        cli.main(
            ["optimize", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "bad.toml")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"esljax: {sentence}")
    assert error.count("\n") == 1


def test_unknown_flag(capsys):
    assert cli.main(["optimize", "--learning-rat", "3"]) == 2
    assert "--learning-rat" in capsys.readouterr().err
    assert cli.main(["optimise"]) == 2
    assert "optimise" in capsys.readouterr().err


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert cli.main(["optimize", "--out", str(tmp_path / "file")]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_target_out_of_reach(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SMALL)
    code = cli.main(
        [
            "optimize",
            "--config",
            str(tmp_path / "small.toml"),
            "--target",
            "1e-5",
            "--out",
            str(tmp_path / "out"),
            "--quiet",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert "Argument `target` must be a loss that constant can reach, but is 1e-05" in error
    assert error.count("\n") == 1


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"esljax {esl.__version__}\n"


def mine():
    """A data set of one feature."""
    inputs = jnp.linspace(-1, 1, 12)[:, None]
    examples = esl.potentials.Examples(inputs, (inputs[:, 0] > 0).astype(int))
    return esl.datasets.Dataset(examples, examples)


def test_one_line_adds_a_data_set(tmp_path, capsys, monkeypatch):
    """The flag shows it, a TOML file takes it, and a run is made of it."""
    small = ["--members", "4", "--hidden", "3", "--batch-size", "0"]
    assert cli.main(["plan", "--data", "mine", *small]) == 2
    assert "mine" in capsys.readouterr().err

    monkeypatch.setitem(DATASETS, "mine", mine)

    assert cli.main(["optimize", "--help"]) == 0
    shown = re.sub(r"[\s│]", "", capsys.readouterr().out)
    assert f"{{{','.join(DATASETS)},...}}" in shown
    (tmp_path / "mine.toml").write_text("data = 'mine'")
    for given in (["--data", "mine"], ["--config", str(tmp_path / "mine.toml")]):
        assert cli.main(["plan", *given, *small]) == 0
        # One feature, three hidden units and two classes: 1·3 + 3 + 3·2 + 2 parameters.
        assert "4 members of 14 numbers" in capsys.readouterr().out
    assert esl.RunConfig(data="mine").check().load_data().train.inputs.shape == (12, 1)


def test_one_line_adds_a_transport(tmp_path, capsys, monkeypatch):
    """The flags of all commands show it, and it gets the settings that it asks for."""
    monkeypatch.setitem(
        TRANSPORTS,
        "first",
        lambda numbers: esl.ProjectedTransport(
            esl.ExactTransport(), jnp.eye(2)[:, :1] * numbers.epsilon
        ),
    )
    for command in ("optimize", "measure"):
        assert cli.main([command, "--help"]) == 0
        assert "{exact,gaussian,sliced,sinkhorn,first}" in capsys.readouterr().out
    transport = esl.RunConfig(transport="first", epsilon=2.0).check().make_transport(KEY)
    assert float(transport.squared(jnp.ones((3, 2)), jnp.zeros((3, 2)))) == pytest.approx(4)
    np.savez(tmp_path / "run.npz", positions=np.random.default_rng(0).normal(size=(3, 4, 2)))
    given = ["measure", str(tmp_path / "run.npz"), "--transport", "first", "--quiet"]
    assert cli.main([*given, "--jackknife", "0", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["transport"]["name"] == "first"


def test_help_explains_every_flag(capsys):
    assert cli.main(["optimize", "--help"]) == 0
    text = capsys.readouterr().out
    flags = re.findall(r"--[a-z0-9-]+", text)
    for field in (
        "members",
        "judge-runs",
        "batch-size",
        "temperature",
        "config",
        "quiet",
        "dtype",
        "transport",
    ):
        assert f"--{field}" in flags
    assert "130 interrupted" in text


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["optimize", "--help"], 0), (["front", "--membrs"], 2)]
)
def test_help_waits_for_no_library_that_it_does_not_need(words, code):
    """Those that a command needs are imported where they are used."""
    program = (
        "import sys\nfrom esljax.command import main\ncode = main(sys.argv[1:])\n"
        "print(code, *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    answered, *imported = done.stderr.splitlines()[-1].split()
    assert answered == str(code)
    assert "jax" in imported
    late = ("flax", "flowjax", "matplotlib", "orbax", "ott", "scipy.optimize", "sklearn", "xarray")
    assert not set(late) & set(imported)


def test_interrupting_the_optimization_keeps_the_best_so_far(tmp_path):
    """A real Ctrl-C to a real process on a terminal, once its progress bar shows the search."""
    (tmp_path / "small.toml").write_text(SMALL.replace("iterations = 12", "iterations = 100000"))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "esljax", "optimize", "--config", "small.toml", "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(theirs)
    seen, sent, deadline = "", False, time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                try:
                    seen += os.read(ours, 65536).decode(errors="replace")
                except OSError:  # the terminal closes with the process
                    break
            if not sent and re.search(r"optimizing ([5-9]|\d\d)/100000", seen):
                process.send_signal(signal.SIGINT)
                sent = True
        code = process.wait(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert sent, seen[-2000:]
    assert code == 130
    assert re.search(r"Interrupted after \d+ of 100000 iterations", seen)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["schedules"]) == NAMES
    assert (tmp_path / "out" / "speed_limit.png").exists()
