"""The README's example runs as printed, in a small size, and its commands exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_example_runs(capsys):
    small = EXAMPLE.replace("members=16", "members=4").replace("steps=100", "steps=20")
    assert small != EXAMPLE
    exec(compile(small, "README.md", "exec"), {})
    assert "entropy production Σ" in capsys.readouterr().out


def test_example_is_ten_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 10


def test_the_first_page_of_the_site_has_the_same_example():
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", first, re.DOTALL)

    def statements(code):
        return [line.partition("  #")[0] for line in code.splitlines()]

    assert statements(example) == statements(EXAMPLE)


def test_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/esljax front" in README
    assert "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest" in README
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in project["project"]["optional-dependencies"]


def test_numbers_of_the_first_lines_are_those_of_the_command():
    """The claims at the top are printed by the command whose output stands below them."""
    claims = re.findall(r"(0\.\d+)\s+times", README.partition("## Two commands")[0])
    assert len(claims) == 3
    for ratio in claims:
        assert f"the front has {ratio} ±" in README
