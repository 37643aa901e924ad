"""Cores of a CPU that share the members of a command: where they do, and with which numbers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

COUNTED = """
import json, os, sys
import jax
from esljax.command import job, settings

given = json.loads(sys.argv[1])
job.cores_of_the_machine = lambda: given["cores"]
before = os.environ.get("XLA_FLAGS", "")
job.use_cores(getattr(settings, given["command"])(devices=given["devices"]))
patient = os.environ.get("XLA_FLAGS", "") != before
print(json.dumps([len(jax.devices()), patient]))
"""
RUN = """
import sys
import jax
from esljax.command import job, main

job.cores_of_the_machine = lambda: 2
code = main(sys.argv[1:])
print(code, len(jax.devices()))
"""
SMALL = [
    "--data",
    "digits",
    "--hidden",
    "8",
    "--members",
    "8",
    "--steps",
    "8",
    "--snapshots",
    "4",
    "--batch-size",
    "8",
    "--rate",
    "0.2",
    "--iterations",
    "2",
    "--knots",
    "2",
    "--match-runs",
    "1",
    "--judge-runs",
    "2",
    "--quiet",
]


def unchosen(environment) -> dict[str, str]:
    """Return the environment of a process for which nobody has chosen devices."""
    chosen = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {name: value for name, value in environment.items() if name not in chosen}


@pytest.mark.parametrize(
    ("command", "devices", "cores", "more", "expected"),
    [
        ("Optimize", None, 4, {}, [2, True]),
        ("Optimize", None, 1, {}, [1, False]),
        ("Front", None, 4, {}, [1, False]),
        ("Optimize", 1, 4, {}, [1, False]),
        ("Optimize", 3, 4, {}, [3, True]),
        ("Optimize", 8, 4, {}, [4, True]),
        ("Optimize", 2, 4, {"JAX_NUM_CPU_DEVICES": "8"}, [8, False]),
        ("Optimize", 2, 4, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, [8, False]),
    ],
)
def test_two_cores_are_devices_or_as_many_as_are_asked_for(command, devices, cores, more, expected):
    given = {"command": f"{command}Config", "devices": devices, "cores": cores}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, json.dumps(given)],
        env=unchosen(os.environ) | more,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def optimized(environment, out, *more: str) -> int:
    """Run `esljax optimize` on a machine of two cores, and return the devices that jax had."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, "optimize", *SMALL, *more, "--out", str(out)],
        env=unchosen(environment),
        capture_output=True,
        text=True,
    )
    code, devices = done.stdout.split()[-2:]
    assert code in "01", done.stderr
    return int(devices)


def test_two_cores_give_the_numbers_of_one(tmp_path, environment):
    assert optimized(environment, tmp_path / "1", "--devices", "1") == 1
    assert optimized(environment, tmp_path / "2") == 2
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text())["schedules"] for name in "12"
    )
    assert one.keys() == two.keys()
    for name in one:
        for number in ("entropy_production", "w2_squared", "final_loss"):
            np.testing.assert_allclose(two[name][number], one[name][number], rtol=2e-4)


def test_members_that_two_cores_cannot_share_evenly_stay_on_one(tmp_path, environment):
    assert optimized(environment, tmp_path, "--members", "9") == 2
