"""Two processes share a run and one is killed: the other ends, and says what to resume."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE

from esljax.files import LOST_PROCESS

PROGRAM = Path(__file__).with_name("lost_program.py")


def started(folder: Path, environment, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, folder, address, str(index), str(steps)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def test_the_survivor_names_the_process_that_is_gone(tmp_path, environment):
    """In both orders, side by side."""
    pairs = {killed: started(tmp_path / str(killed), environment, 100_000) for killed in (0, 1)}
    try:
        for killed, pair in pairs.items():
            while pair[1 - killed].stdout.readline() not in ("round\n", ""):
                pass
            pair[killed].kill()
        for killed, pair in pairs.items():
            _, error = pair[1 - killed].communicate(timeout=PATIENCE)
            assert pair[1 - killed].returncode == LOST_PROCESS == 75, error
            sentence = (
                rf"^esljax: process {killed} of 2 is gone, so process {1 - killed} ends; the run "
                rf"is saved in {tmp_path}/{killed} up to round \d+: start all processes again with"
            )
            assert re.search(sentence, error, re.MULTILINE), error
    finally:
        for process in pairs[0] + pairs[1]:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_that_end_well_are_not_missed(tmp_path, environment):
    """Nor is what they saved lost: the same command ends at once."""
    for _ in range(2):
        pair = started(tmp_path / "run", environment, 20)
        outputs = [process.communicate(timeout=PATIENCE) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], outputs
        assert all("finished" in out for out, _ in outputs)
