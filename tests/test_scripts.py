"""Every script runs in its smallest size, and every notebook equals its script."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jupytext
import numpy as np
import pytest
from processes import PATIENCE

import esljax as esl

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
    "benchmark_assignment",
    "benchmark_device",
    "benchmark_gradient",
    "benchmark_simulation",
    "centered_values",
    "count_coverage",
    "experiment_curriculum",
    "experiment_gap",
    "experiment_size",
    "experiment_speed_limits",
    "experiment_sweep",
    "experiment_toy",
    "free_energy_balance",
    "quotient_table",
    "which_schedule",
    "large_model",
    "measure_digits",
    "modular_addition",
    "study_scaling",
    "transfer",
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
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart", "02_study", "03_experiments"]


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


@pytest.fixture
def laws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("laws")


def test_coverage_is_held_to_known_numbers(laws):
    exact = laws.truth("ou1", 1.0, 20, "affine")
    numbers = [exact[name] for name in ("entropy_production", "length_squared", "w2_squared")]
    np.testing.assert_allclose(numbers, [2.04312999, 1.87917202, 1.87819069], atol=1e-8)
    # Schmiedl and Seifert: the least work leads along a geodesic at constant speed.
    for duration, limit in ((1.0, 0.0364745), (10.0, 0.0777378)):
        exact = laws.truth("trap", duration, 20, "chain")
        np.testing.assert_allclose(list(exact.values()), [limit, limit, 0, limit, 0, 0], atol=1e-6)
    # The Gaussian of the same moments moves more slowly than the mixture.
    affine, whole = (laws.truth("mixture", 1.0, 20, kind) for kind in ("affine", "field"))
    assert 1.05 * affine["entropy_production"] < whole["entropy_production"]


@pytest.mark.parametrize("name", ["trap", "ou5", "mixture"])
def test_members_of_coverage_follow_their_law(laws, name):
    n, system = 20000, laws.SYSTEMS[name]
    path = system.run(1.0, system.transitions(1.0, 4), n, jax.random.key(0))
    shrunk, variance = system.laws(1.0, np.linspace(0, 1, 5))
    for x, *law in zip(np.asarray(path.positions, float), shrunk, variance, strict=True):
        mean, covariance = system.moments(*law)
        widths = np.diag(covariance)
        assert (abs(x.mean(0) - mean) < 5 * np.sqrt(widths / n)).all()
        # Of a Gaussian; a mixture of hills apart has lighter tails.
        errors = np.sqrt((np.outer(widths, widths) + covariance**2) / n)
        assert (abs(np.cov(x.T) - covariance) < 5 * errors).all()
    # Langevin dynamics with short steps has the same correlation with the start.
    first, last = np.asarray(path.positions, float)[[0, -1], :, 0]
    steps = esl.simulate(
        system.potential(1.0),
        esl.Langevin(1 / 400, system.temperature),
        path.positions[0],
        steps=400,
        key=jax.random.key(1),
    ).final
    slopes = [np.cov(first, y)[0, 1] / first.var() for y in (last, np.asarray(steps, float)[:, 0])]
    assert abs(slopes[0] - slopes[1]) < 5 * np.sqrt(2 * last.var() / first.var() / n) + 0.002


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("experiments")


def test_effects_of_experiments_have_t_intervals(experiments):
    # Differences 1, 1, 1, 2, 1: a spread of √.2, and 2.776445 is the quantile of four degrees.
    effect = experiments.effect([1.0, 2, 3, 4, 5], [0, 1, 2, 2, 4])
    half = 2.776445 * np.sqrt(0.2 / 5)
    np.testing.assert_allclose(effect, [1.2, 1.2 - half, 1.2 + half, 5], rtol=1e-6)
    x = np.array([[1.0, 2, 4], [1, 3, 9]])
    np.testing.assert_allclose(experiments.exponent(x, 5 * x**-2)[:3], -2, rtol=1e-12)
    assert np.isnan(experiments.effect([1.0, np.nan])[:3]).all(), "nothing is dropped"


def test_experiments_resume(experiments, tmp_path):
    arguments = experiments.parser("").parse_args(["--store", str(tmp_path / "store")])
    tasks = [{"log": str(tmp_path / "log"), "x": x} for x in (1, 2)]
    for _ in range(2):
        assert experiments.each(doubled, tasks, arguments) == [{"y": 2}, {"y": 4}]
    more = [*tasks, {**tasks[0], "x": 3}]
    assert experiments.each(doubled, more, arguments)[2] == {"y": 6}
    assert (tmp_path / "log").read_text() == "123", "each task ran once"


def doubled(log, x):
    with open(log, "a") as file:
        file.write(str(x))
    return {"y": 2 * x}


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
