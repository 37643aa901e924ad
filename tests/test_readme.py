"""The README's example runs as printed, in a small size, and its commands are the ones that exist."""

import re
import tomllib
from pathlib import Path

import jax

import esljax as esl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_example_runs(capsys):
    _, example, _ = EXAMPLES
    small = (
        example.replace("members=16", "members=4")
        .replace("steps=100", "steps=20")
        .replace("iterations=20", "iterations=2")
    )
    assert small != example
    exec(compile(small, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "entropy production Σ" in printed
    assert "Optimum: value" in printed


def test_mesh_runs():
    """The example of many devices, on those that there are."""
    example, _, _ = EXAMPLES
    key = jax.random.key(0)
    names = {
        "esl": esl,
        "key": key,
        "potential": esl.Quadratic(1.0),
        "rule": esl.Langevin(0.01, 0.01),
    }
    exec(compile(example, "README.md", "exec"), names | {"start": jax.random.normal(key, (8, 2))})


def test_measures_run():
    """The second example, on members that draw batches of a small data set."""
    _, _, example = EXAMPLES
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (32, 2))
    potential = esl.FlaxLoss(
        esl.models.mlp(2, 2), (inputs, (inputs[:, 0] > 0).astype(int)), batch_size=8, l2=0.1
    )
    start = potential.init(members=32, key=key)
    names = {
        "esl": esl,
        "key": key,
        "potential": potential,
        "rule": esl.Langevin(0.01, 0.01),
        "start": start,
    }
    exec(compile(example.replace("steps=200", "steps=40"), "README.md", "exec"), names)
    assert isinstance(names["books"], esl.FreeEnergy)
    assert isinstance(names["noise"], esl.measures.MinibatchNoise)


def test_example_is_short():
    _, example, _ = EXAMPLES
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) <= 16


def test_commands_and_links():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/esljax optimize" in README
    assert "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest" in README
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in project["project"]["optional-dependencies"]
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
