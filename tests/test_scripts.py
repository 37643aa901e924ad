"""Every script runs in its smallest size, and every notebook equals its script."""

import json
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from processes import PATIENCE

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").glob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)
# Most of these compile every estimator, for a minute or two each; benchmarks compile several ways
# of doing one thing.
LONG = {
    "check_wheel",
    "benchmark_device",
    "benchmark_gradient",
    "benchmark_simulation",
    "coverage",
    "free_energy_balance",
    "large_model",
    "measure_digits",
    "study_scaling",
    "velocity_accuracy",
}
# The line that `esljax measure` prints about its input, and how many times it runs.
MEASUREMENTS = {
    "measure_adam": ("5 snapshots of 4 members, 2410 parameters each", 2),
    "measure_numpy": ("4 snapshots of 5 members, 6 parameters each", 1),
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_is_something_to_run():
    assert {path.stem for path in SCRIPTS} >= {
        "benchmark_transport",
        "compile_tpu",
        "large_transport",
        "measure_adam",
        "measure_numpy",
        *LONG,
    }
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart", "02_study"]


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_scripts(script, tmp_path):
    if script.stem == "compile_tpu":
        pytest.importorskip("libtpu")
    command = [sys.executable, str(script), "--smoke", "--out", "numbers.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3, "a table"
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(numbers["about"]) == {"jax", "python", "device", "cores"}
    assert all(one["exit_code"] == 0 for one in dictionaries(numbers, "exit_code"))
    if script.stem in MEASUREMENTS:
        line, times = MEASUREMENTS[script.stem]
        assert done.stdout.count(line) == times
        reports = list(dictionaries(numbers, "w2_squared"))
        assert len(reports) >= times
        # Chains in a metric obey the limit on samples.
        assert all(
            one["entropy_production"] > one["length_squared"] > one["w2_squared"] > 0
            for one in reports
        )


def dictionaries(numbers, key):
    """Yield every dictionary among nested ones that holds a number under this key."""
    if isinstance(numbers, dict):
        if isinstance(numbers.get(key), int | float):
            yield numbers
        for inner in numbers.values():
            yield from dictionaries(inner, key)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_paired_and_stripped(notebook):
    stored = jupytext.read(notebook)
    twin = jupytext.read(notebook.with_suffix(".py"))
    assert [cell.source for cell in stored.cells] == [cell.source for cell in twin.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in stored.cells)
