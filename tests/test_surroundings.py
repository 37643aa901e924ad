"""Whether results survive does not depend on terminals, pipes, disks, settings and signals."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest
from processes import PATIENCE
from trees import seen

import esljax as esl
from esljax.command import cli, streams
from esljax.experiment import read_toml
from esljax.files import writing

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all", "precision_restored")
FILES = {"config.toml", "report.json", "speed_limit.png"}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "run.npz"
    positions = np.random.default_rng(0).normal(size=(3, 6, 2)).cumsum(axis=0)
    np.savez(path, positions=positions)
    return path


def measure(recording, out, *more):
    return ["measure", str(recording), "--out", str(out), "--jackknife", "0", *more]


# --- Printing -------------------------------------------------------------------------------------


class Broken(io.RawIOBase):
    """A pipe whose reader is gone, or a disk that is full."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, _):
        raise OSError(self.number, os.strerror(self.number))


def text(raw, encoding="utf-8"):
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, write_through=True)


class Kept(io.BytesIO):
    def close(self):
        """Stay readable once the text stream above it is gone."""


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both", "closed", "none"])
def test_streams_that_fail_change_neither_files_nor_code(
    recording, tmp_path, monkeypatch, capsys, stream
):
    # Fewer columns than the help of a command can do with.
    monkeypatch.setenv("COLUMNS", "1")
    codes = []
    commands = [
        ["--help"],
        ["optimize", "--help"],
        ["--version"],
        ["measure", "--nonsense"],
        measure(recording, tmp_path / "out"),
        measure(tmp_path / "nowhere.npz", tmp_path / "no"),
        ["plan", "--data", "moons", "--members", "4", "--steps", "10", "--snapshots", "5"],
    ]
    for command in commands:
        with monkeypatch.context() as patched:
            for name in ("stdout", "stderr") if stream != "stderr" else ("stderr",):
                number = errno.EPIPE if name == "stdout" else errno.ENOSPC
                broken = None if stream == "none" else text(Broken(number))
                if stream == "closed":
                    broken = text(Kept())
                    broken.close()
                if stream != "stdout" or name == "stdout":
                    patched.setattr(sys, name, broken)
            codes.append(cli.main(command))
    assert codes == [0, 0, 0, 2, 0, 2, 0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_spelled(recording, tmp_path, monkeypatch, encoding):
    kept = Kept()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding=encoding))
        assert cli.main(measure(recording, tmp_path / "out")) == 0
        assert cli.main(["optimize", "--help"]) == 0
        print(streams.legible("Σ ± ½"))
        sys.stdout.flush()
    printed = kept.getvalue().decode(encoding)
    sigma = "Σ" if encoding == "utf-8" else "Sigma"
    assert f"{sigma} " in printed
    assert ("²" if encoding != "ascii" else "W2^2") in printed
    assert "?" not in printed.replace("how far is a training run", "").replace("limit?", "")
    assert printed.endswith(
        {"ascii": "Sigma +- 1/2", "utf-8": "Σ ± ½"}.get(encoding, "Sigma ± ½") + "\n"
    )


def test_a_name_that_is_no_text_is_printed_as_it_is(recording, tmp_path, monkeypatch):
    kept, out = Kept(), os.fsencode(tmp_path) + b"/\xff\xfe"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="utf-8"))
        assert cli.main(measure(recording, os.fsdecode(out))) == 0
        sys.stdout.flush()
    assert out in kept.getvalue()
    assert {os.fsdecode(name) for name in os.listdir(out)} == FILES
    with open(out + b"/report.json", encoding="utf-8") as file:
        json.load(file)
    assert cli.main(measure(recording, os.fsdecode(out), "--quiet")) == 0, "the same again"


def test_a_process_with_a_full_output_says_nothing_of_it(recording, tmp_path, environment):
    """Python writes what is left once more at its end, and complains if it cannot."""
    surroundings = {
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "nonsense",
        "COLUMNS": "1",
        "TERM": "nonsense",
        "MPLCONFIGDIR": "/proc/nowhere",
    }
    environment = {key: value for key, value in environment.items() if key != "HOME"}
    command = [sys.executable, "-m", "esljax", *measure(recording, tmp_path / "out")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command,
            env={**environment, **surroundings},
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# --- Disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [FILES, {"report.json"}, {"speed_limit.png"}])
def test_a_disk_that_fails_costs_files_and_no_numbers(
    recording, tmp_path, monkeypatch, capsys, lost
):
    replace = writing.os.replace

    def full(temporary, path):
        if path.name in lost:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    monkeypatch.setattr(writing.os, "replace", full)
    assert cli.main(measure(recording, tmp_path / "out")) == 3
    captured = capsys.readouterr()
    assert "Σ" in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == len(lost)
    for name in lost:
        assert any(f"{name} could not be written: No space left on device" in x for x in lines)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - lost


# --- Settings -------------------------------------------------------------------------------------


def test_a_figure_that_cannot_be_drawn_is_one_line(recording, tmp_path, monkeypatch, capsys):
    with matplotlib.rc_context({"text.usetex": True}), monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        assert cli.main(measure(recording, tmp_path / "out")) == 0
    assert "speed_limit.png is drawn with the settings of matplotlib" in capsys.readouterr().err

    def fails(*_, **__):
        raise RuntimeError("no ink. And a long account of it\nover two lines")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    assert cli.main(measure(recording, tmp_path / "none")) == 0
    error = capsys.readouterr().err
    assert error == "esljax: speed_limit.png was not drawn: The figure cannot be drawn: no ink.\n"
    assert {path.name for path in (tmp_path / "none").iterdir()} == FILES - {"speed_limit.png"}


@pytest.mark.parametrize("named", ["nonsense", "cuda"])
def test_devices_that_are_not_there_are_one_sentence(recording, tmp_path, environment, named):
    command = [sys.executable, "-m", "esljax", *measure(recording, tmp_path / "out")]
    done = subprocess.run(
        command,
        env={**environment, "JAX_PLATFORMS": named, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"esljax: jax cannot use JAX_PLATFORMS={named}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a = " + b"[" * 10_000 + b"]" * 10_000, "nested too deep"),
        (b"x = " + b"{a = " * 10_000 + b"1" + b"}" * 10_000, "nested too deep"),
        (b"members = " + b"9" * 10_000, "`config` must be valid TOML"),
        (b"members = 0x" + b"f" * 10_000, "`members` must be an integer below"),
        (b"rate = 0x" + b"f" * 10_000, "`rate` must be a number in .* is too large"),
        (b"hidden = [0x" + b"f" * 10_000 + b", 2]", "`hidden`"),
        (b"out = 0x" + b"f" * 10_000, "`out` must be an integer below"),
        (b"out = [" + b"1, " * 10_000 + b"]", "`out` must be a string .* and so on"),
        ("rate = 1".encode("utf-16"), "which is UTF-8"),
        (b"data = '\xff'", "which is UTF-8"),
        (b"rate = 1\nrate = 2", "overwrite a value"),
        (b"rate = nan", "`rate` must be greater than 0, but is nan"),
        (b"rate = 1979-05-27", "`rate` must be a number in"),
        (b"rate = true", "`rate` must be a number in"),
        (b'out = "a\\u0000b"', "`out` must be a folder"),
        (b"[rate]\nx = 1", "`rate` must be a number in"),
        (b"\x00", "`config` must be valid TOML"),
    ],
)
def test_odd_settings_are_one_sentence(content, sentence, tmp_path, capsys):
    (tmp_path / "c.toml").write_bytes(content)
    before = seen(tmp_path)
    given = ["--config", str(tmp_path / "c.toml")]
    if b"out" not in content:
        given += ["--out", str(tmp_path / "out")]
    assert cli.main(["optimize", *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 800
    assert re.search(sentence, captured.err)
    assert seen(tmp_path) == before


def test_the_mark_of_an_encoding_is_no_setting(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfrate = 0.5")
    assert read_toml(tmp_path / "c.toml") == {"rate": 0.5}
    with pytest.raises(esl.InputError, match="does not end"):
        read_toml(type(tmp_path)("/dev/zero"))


@pytest.mark.parametrize(
    ("named", "threads"),
    [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3"), ({"OMP_NUM_THREADS": "3"}, "None")],
)
def test_the_command_sets_the_threads_of_openblas_where_its_user_has_not(named, threads):
    program = (
        "import os, sys\n"
        "sys.argv = ['esljax', 'check']\n"
        "import esljax\n"
        "print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    kept = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | named, capture_output=True, text=True
    )
    assert done.stdout == f"{threads}\n", done.stderr


# --- Signals --------------------------------------------------------------------------------------


def signalled(process, word, *numbers):
    """What a process leaves on standard error that gets these signals once it has said a word."""
    try:
        assert process.stdout.readline() == f"{word}\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        return process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)]
)
def test_every_signal_is_one_line_and_its_code(tmp_path, environment, number, code):
    """Two of each, the second one while the first is being answered."""
    program = (
        "import sys, time\n"
        "from esljax.command import check, cli\n"
        "def rows(**_):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(1000)\n"
        "cli.run_checks = rows\n"
        "sys.argv = ['esljax', 'check']\n"
        "from esljax.__main__ import main\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    error = signalled(process, "begun", number, number)
    assert process.returncode == code
    assert error.startswith("esljax: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)]
)
def test_a_signal_while_libraries_load_is_one_line_and_its_code(tmp_path, number, code):
    (tmp_path / "jax.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(1000)")
    root = os.path.dirname(os.path.dirname(esl.__file__))
    process = subprocess.Popen(
        [sys.executable, "-m", "esljax", "check"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    error = signalled(process, "loading", number)
    assert process.returncode == code
    assert error == "esljax: ended before it began; nothing was written.\n"


def test_a_library_that_does_not_start_is_one_sentence(tmp_path):
    (tmp_path / "jax.py").write_text("raise ValueError('no setting\\nof mine')")
    root = os.path.dirname(os.path.dirname(esl.__file__))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    codes = {"-m": 2, "-c": 1}
    for how, code in codes.items():
        done = subprocess.run(
            [sys.executable, how, "esljax" if how == "-m" else "import esljax", "check"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code
        assert ("Traceback" in done.stderr) == (how == "-c"), "a program of a user is its own"
    assert (
        "esljax: a library does not start (ValueError: no setting of mine)"
        in subprocess.run(
            [sys.executable, "-m", "esljax"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        ).stderr
    )
