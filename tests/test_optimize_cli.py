"""`esljax optimize` killed, ended by SIGTERM, and shared by processes: the same report."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PATIENCE
from trees import plant, seen, still_there

from esljax.command import cli
from esljax.files import TERMINATED, alone

pytestmark = pytest.mark.usefixtures("precision_restored")
SMALL = """
data = "moons"
hidden = [4]
members = 4
steps = 20
snapshots = 5
batch_size = 32
knots = 4
iterations = 15
judge_runs = 2
match_runs = 1
transport = "gaussian"
checkpoint_every = 0
"""


def command(folder: Path, out: str, *more: str) -> list[str]:
    program = "import sys; from esljax.command import main; sys.exit(main(sys.argv[1:]))"
    return [
        sys.executable,
        "-c",
        program,
        "optimize",
        "--config",
        str(folder / "small.toml"),
        "--out",
        str(folder / out),
        *more,
    ]


def finish(folder: Path, out: str, environment: dict[str, str], *more: str) -> None:
    printed(folder, out, environment, "--quiet", *more)


def printed(folder: Path, out: str, environment: dict[str, str], *more: str) -> str:
    done = subprocess.run(
        command(folder, out, *more),
        env=environment,
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert done.returncode in (0, 1)
    return done.stdout


def report(folder: Path, out: str) -> dict:
    found = json.loads((folder / out / "report.json").read_text())
    return {"target": found["target_loss"], "schedules": found["schedules"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, environment) -> Path:
    folder = tmp_path_factory.mktemp("optimize")
    (folder / "small.toml").write_text(SMALL)
    environment = {**environment, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    text = printed(folder, "undisturbed", environment)
    (folder / "printed.txt").write_text(text, encoding="utf-8")
    return folder


def test_it_prints_a_table_and_what_to_make_of_it(folder):
    text = (folder / "printed.txt").read_text(encoding="utf-8")
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 136
    (heading,) = [line.split() for line in lines if line.startswith("schedule ")]
    assert heading[1:9] == ["Σ", "L²", "W2²", "gap", "temporal", "geometric", "W2²/Σ", "U"]
    schedules = report(folder, "undisturbed")["schedules"]
    rows = [
        line for line in lines if line.startswith(tuple(n.replace("_", " ") for n in schedules))
    ]
    assert len(rows) == len(schedules) == 9
    for row, schedule in zip(rows, schedules.values(), strict=True):
        assert f"  {schedule['efficiency']:.3f}  " in row
    words = " ".join(text.split())
    for sentence in (
        "Units: squared parameters",
        "times the entropy of the best schedule in common use",
        "Without a search: ",
        "by the first shape passed at constant speed (retimed)",
        "χ² of equality",
        "dissipated free energy D is",
        "batches spread members as injected noise",
    ):
        assert sentence in words
    # The moments of an ensemble are no members' paths.
    assert "displacement" not in words


def test_a_finished_run_leaves_no_checkpoints(folder):
    assert not (folder / "undisturbed" / "checkpoints").exists()


def ended_by(
    folder: Path, out: str, environment: dict[str, str], number: int, stage: str, *more: str
) -> int:
    """Start the command, end it by a signal once a stage has been saved; its exit code."""
    with subprocess.Popen(
        command(folder, out, "--quiet", *more), env=environment, stderr=subprocess.DEVNULL
    ) as process:
        # What is half written is named by more than a number.
        while process.poll() is None and not any(
            path.name.isdecimal() for path in (folder / out / "checkpoints" / stage).glob("*")
        ):
            time.sleep(0.02)
        process.send_signal(number)
    return process.returncode


@pytest.mark.parametrize("stage", [pytest.param("matching", marks=pytest.mark.slow), "search"])
def test_killed_it_is_finished_by_resume_with_the_same_numbers(folder, environment, stage, capsys):
    out = f"killed in {stage}"
    assert ended_by(folder, out, environment, signal.SIGKILL, stage) == -signal.SIGKILL
    if stage == "search":
        # Another run in the folder would lose this one, and other settings would not finish it.
        given = ["optimize", "--config", str(folder / "small.toml"), "--out", str(folder / out)]
        assert cli.main(given) == 2
        assert "without an unfinished run, or be given with --resume" in capsys.readouterr().err
        assert cli.main([*given, "--rate", "0.3", "--resume"]) == 2
        assert "whose rate is not given, not 0.3" in capsys.readouterr().err
        assert "rate = 0.3" not in (folder / out / "config.toml").read_text()
    finish(folder, out, environment, "--resume")
    assert report(folder, out) == report(folder, "undisturbed")


@pytest.mark.slow
def test_killed_it_is_finished_on_other_devices(folder, environment):
    """The objective holds the mesh of all devices there are; with one there is none."""
    eight, four = ({**environment, "JAX_NUM_CPU_DEVICES": str(count)} for count in (8, 4))
    members = ("--members", "8")
    assert ended_by(folder, "moved", eight, signal.SIGKILL, "search", *members) == -signal.SIGKILL
    finish(folder, "moved", four, *members, "--resume")
    assert (folder / "moved" / "report.json").exists()
    assert ended_by(folder, "alone", eight, signal.SIGKILL, "search", *members) == -signal.SIGKILL
    finish(folder, "alone", environment, *members, "--resume")
    assert (
        report(folder, "alone")["schedules"].keys() == report(folder, "moved")["schedules"].keys()
    )


@pytest.mark.slow
def test_another_network_does_not_finish_what_was_matched(folder, environment, capsys):
    assert (
        ended_by(folder, "wide", environment, signal.SIGKILL, "matching", "--hidden", "8", "4", "8")
        == -signal.SIGKILL
    )
    given = [
        "optimize",
        "--config",
        str(folder / "small.toml"),
        "--out",
        str(folder / "wide"),
        "--quiet",
        "--resume",
    ]
    assert cli.main([*given, "--hidden", "8", "4", "4"]) == 2
    assert "whose hidden is [8, 4, 8], not [8, 4, 4]" in capsys.readouterr().err


def test_ended_by_sigterm_it_exits_with_its_own_code_and_leaves_what_is_theirs(folder, environment):
    out = folder / "ended"
    for name in THEIRS:
        plant(out / name)
    (out / "checkpoints" / "run").mkdir()
    before = seen(out)
    assert ended_by(folder, "ended", environment, signal.SIGTERM, "search") == TERMINATED
    assert not (out / "report.json").exists()
    assert still_there(before, out)
    finish(folder, "ended", environment, "--resume")
    assert report(folder, "ended") == report(folder, "undisturbed")
    assert still_there(before, out)
    ours = {"report.json", "config.toml", "schedules.png", "speed_limit.png", "schedules"}
    ours |= {f"schedules/{name}.json" for name in report(folder, "ended")["schedules"]}
    assert seen(out).keys() - before.keys() == ours


# In every folder that the command makes, by names that it does not use, or that Orbax does.
THEIRS = (
    "notes.txt",
    "checkpoints/notes.txt",
    "checkpoints/100/params",
    "checkpoints/search/best.npz",
    "checkpoints/matching/3.orbax-checkpoint-tmp/theirs",
)


@pytest.mark.parametrize("name", ["search/7/params", "matching/3/about/metadata", "search/2"])
def test_a_checkpoint_of_another_program_is_refused_and_stays(tmp_path, capsys, name):
    plant(tmp_path / "out" / "checkpoints" / name)
    before = seen(tmp_path)
    for flags in ([], ["--resume"], ["--force"]):
        assert cli.main(["optimize", "--out", str(tmp_path / "out"), *flags]) == 2
        assert "which is no checkpoint of esljax" in capsys.readouterr().err
        assert seen(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--devices", "0"], "`devices` must be an integer of at least 1"),
        (["--devices", "3"], "`devices` must be at most 1, the cores"),
        (["--process", "1"], "`process` must come with --distributed"),
        (["--checkpoint-every", "-1"], "`checkpoint_every` must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, flags, sentence):
    assert cli.main(["optimize", "--out", str(tmp_path / "out"), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_what_cannot_run_leaves_nothing_to_finish(folder, capsys):
    given = [
        "optimize",
        "--config",
        str(folder / "small.toml"),
        "--out",
        str(folder / "unreachable"),
        "--quiet",
    ]
    out = folder / "unreachable"
    for name in THEIRS:
        plant(out / name)
    before = seen(out)
    for _ in range(2):
        assert cli.main([*given, "--target", "1e-9"]) == 2
        assert "be a loss that" in capsys.readouterr().err
        assert still_there(before, out)
        assert seen(out).keys() == before.keys()


def test_a_file_of_others_in_the_place_of_a_schedule_is_refused_and_stays(tmp_path, capsys):
    plant(tmp_path / "schedules" / "optimized.json")
    before = seen(tmp_path)
    assert cli.main(["optimize", "--out", str(tmp_path), "--quiet", "--force"]) == 2
    assert "optimized.json is there" in capsys.readouterr().err
    assert seen(tmp_path) == before


def test_two_commands_do_not_write_one_folder(tmp_path, capsys):
    kept = tmp_path / "checkpoints"
    (kept / "search").mkdir(parents=True)
    with alone(tmp_path, "out"):
        assert cli.main(["optimize", "--out", str(tmp_path), "--quiet"]) == 2
    assert "`out` must have no other writer" in capsys.readouterr().err
    assert not (tmp_path / "config.toml").exists()
    assert kept.exists()


def test_a_rejected_resumption_drops_nothing(folder, capsys):
    """The checkpoints of the run before took a while to compute."""
    kept = folder / "refused" / "checkpoints"
    (kept / "matching" / "3").mkdir(parents=True)
    given = [
        "optimize",
        "--config",
        str(folder / "small.toml"),
        "--out",
        str(folder / "refused"),
        "--quiet",
    ]
    assert cli.main([*given, "--devices", "3", "--resume"]) == 2
    assert cli.main(given) == 2
    assert "without an unfinished run" in capsys.readouterr().err
    assert (kept / "matching" / "3").exists()


def test_half_a_checkpoint_is_no_unfinished_run(tmp_path, capsys):
    """The run begins, and is refused for another reason."""
    (tmp_path / "checkpoints" / "matching" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert cli.main(["optimize", "--out", str(tmp_path), "--quiet", "--devices", "3"]) == 2
    assert "`devices` must be at most 1, the cores" in capsys.readouterr().err


JOINING = """
import os
import sys
import jax
from jax._src import xla_bridge

def initialize(**_):
    print("used" if xla_bridge.backends_are_initialized() else "unused", flush=True)
    os._exit(9)

jax.distributed.initialize = initialize
from esljax.command import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["optimize", "front"])
def test_processes_join_before_any_device_is_used(name, tmp_path, environment):
    words = [name, "--distributed", "--quiet", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", JOINING, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == ("unused\n", 9), done.stderr


@pytest.mark.slow
def test_two_processes_share_a_run(folder, environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = ["--quiet", "--distributed", "--coordinator", address, "--processes", "2", "--process"]
    started = [
        subprocess.Popen(command(folder, "shared", *flags, str(index)), env=environment)
        for index in range(2)
    ]
    try:
        assert {process.wait(timeout=PATIENCE) for process in started} <= {0, 1}
    finally:
        for process in started:
            process.kill()
            process.wait()
    for name, schedule in report(folder, "undisturbed")["schedules"].items():
        shared = report(folder, "shared")["schedules"][name]
        assert shared["learning_rates"] == pytest.approx(schedule["learning_rates"], rel=1e-4)
        assert shared["entropy_production"] == pytest.approx(
            schedule["entropy_production"], rel=1e-4
        )
