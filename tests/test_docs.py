"""The pages name what exists: links, paths, public names, commands, and examples that run.

Sphinx is not needed here; the build of the site checks the rest.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from processes import PATIENCE
from test_floors import FLOORS

import esljax as esl
from esljax.command.check import CHECKS
from esljax.command.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md")),
        *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    ]
)
# The changelog speaks of names and commands of the past.
PRESENT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# These train networks: seconds to compile, and more to run.
LONG = {
    "docs/howto/data.md",
    "docs/howto/model.md",
    "docs/howto/transformer.md",
    "docs/measurement.md",
    "docs/schedules.md",
    "docs/studies.md",
    "docs/symmetry.md",
}
RUN_ELSEWHERE = {"README.md": "tests/test_readme.py", "docs/index.md": "tests/test_readme.py"}


def blocks(text, language):
    return [content for kind, content in FENCE.findall(text) if kind == language]


def flags(command):
    """The flags in the help of `esljax COMMAND`."""
    return frozenset(re.findall(r"--[a-z][\w-]*", helps(command)))


@functools.cache
def helps(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main([*command, "--help"])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def commands(text):
    """Every command line of `esljax` in a page: those of shell blocks, and those in backticks."""
    shell = "\n".join(blocks(text, "sh") + blocks(text, "bash")).replace("\\\n", " ")
    prose = FENCE.sub("", text)
    spans = re.findall(r"`((?:srun [^`]*)?esljax [^`]+)`", prose)
    lines = [*shell.splitlines(), *spans]
    matches = [re.search(r"(?:^|[ /])esljax ([a-z-][^\"&|]*)", line) for line in lines]
    return [match.group(1).split() for match in matches if match]


def problem_of(words):
    """The flags that give a command its problem, whose keywords are flags too."""
    place = words.index("--problem") if "--problem" in words else len(words)
    return words[place : place + 2]


@pytest.mark.parametrize("page", PRESENT)
def test_commands_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks(PRESENT[page], "python"):
        if match := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / match[1]).write_text(code)
    for words in commands(PRESENT[page]):
        if words == ["--version"]:
            continue
        depth = 2 if words[0] == "study" and len(words) > 1 else 1
        for level in range(depth):
            (choices,) = re.findall(r"^usage: .*\{([\w,-]+)\}", helps(tuple(words[:level])))
            assert words[level] in choices.split(","), f"{page}: esljax {' '.join(words)}"
        # The keywords of a problem are flags too, where the page has its file.
        problem = problem_of(words)
        has_it = problem and (tmp_path / problem[1].partition(":")[0]).exists()
        known = flags((*words[:depth], *(problem if has_it else ())))
        named = {word.split("=")[0] for word in words if word.startswith("--")}
        assert named <= known | {"--help"}, f"{page}: esljax {' '.join(words)}"


def test_the_check_of_commands_sees_a_wrong_one():
    assert commands("`esljax optimize --knobs 3`") == [["optimize", "--knobs", "3"]]
    assert "--knobs" not in flags(("optimize",))
    assert problem_of(["optimize", "--out", "a", "--problem", "b.py:c", "--d"])[1:] == ["b.py:c"]
    assert "--knots" in flags(("optimize",))
    assert commands("```sh\nsrun -n 2 esljax check \\\n  --quiet\n```\n") == [["check", "--quiet"]]


@pytest.mark.parametrize("page", PRESENT)
def test_scripts_take_what_the_page_gives_them(page):
    for script, arguments in re.findall(
        r"python (scripts/\w+\.py)((?: +[^\s`&|]+)*)", PRESENT[page]
    ):
        source = (ROOT / script).read_text(encoding="utf-8")
        # The flags that scripts share stand in the module that makes their parser.
        for shared in ("experiments", "timing"):
            if f"\nimport {shared}\n" in source:
                source += (ROOT / f"scripts/{shared}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in source, f"{page}: {script} {flag}"


@pytest.mark.parametrize("page", PRESENT)
def test_links_and_paths_exist(page):
    text = FENCE.sub("", PRESENT[page])
    here = (ROOT / page).parent
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)", text):
        target = Path(os.path.normpath(here / link))
        if target.parent == ROOT / "docs/notebooks":
            # The build copies the notebooks there.
            target = ROOT / "notebooks" / target.name
        assert target.exists(), f"{page}: {link}"
    for path in re.findall(
        r"`(?:python )?((?:scripts|tests|docs|esljax|notebooks)/[\w./]*)`", text
    ):
        assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", PRESENT)
def test_headings_that_links_aim_at_exist(page):
    here = (ROOT / page).parent
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([\w-]+)\)", PRESENT[page]):
        target = (here / link) if link else ROOT / page
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page}: {link}#{anchor}"


@pytest.mark.parametrize("page", PRESENT)
def test_names_exist(page):
    """Aliases of earlier names are errors here, because a DeprecationWarning is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in set(re.findall(r"\besl\.([A-Za-z_][\w.]*\w)", PRESENT[page])):
            functools.reduce(getattr, name.split("."), esl)


@pytest.mark.parametrize("page", PRESENT)
def test_extras_exist(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"'\.\[([\w,-]+)\]'", PRESENT[page]):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), page


def documented():
    """The full names in the pages of the API."""
    names = set()
    for page, text in PRESENT.items():
        if not page.startswith("docs/api/"):
            continue
        module = ""
        for line in text.splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = match.group(1)
            if match := re.match(r"\.\. auto(?:class|function):: (\S+)", line):
                names.add(f"{module}.{match.group(1)}")
    return names


def test_every_public_name_is_in_the_reference():
    names = documented()
    rooms = {name.rpartition(".")[0] for name in names}
    missing = [
        name
        for name in esl.__all__
        if f"esljax.{name}" not in names | rooms and f"esljax.{name}" not in ROOMS_WITHOUT_A_PAGE
    ]
    assert missing == []


# Their classes and functions are public under `esljax` itself.
ROOMS_WITHOUT_A_PAGE = {
    "esljax.potentials",
    "esljax.schedules",
    "esljax.sharding",
    "esljax.transport",
}


def test_every_name_in_the_reference_exists():
    for name in documented():
        room, _, rest = name.removeprefix("esljax.").rpartition(".")
        if room == "figures":  # not imported with the package, because matplotlib takes its time
            importlib.import_module("esljax.figures")
        functools.reduce(getattr, [*filter(None, room.split(".")), rest], esl)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page in LONG))
        for page in PRESENT
        if blocks(PRESENT[page], "python") and page not in RUN_ELSEWHERE
    ],
)
def test_examples_run(page, tmp_path):
    """All of a page in one process of its own, as a reader copies them; registries stay clean."""
    code = "\n\n".join(blocks(PRESENT[page], "python"))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_examples_that_run_elsewhere_do(page):
    (example,) = blocks(PRESENT[page], "python")
    assert "esl.speed_limit" in example
    assert "EXAMPLE" in (ROOT / RUN_ELSEWHERE[page]).read_text(encoding="utf-8")


def test_theory_has_every_reference_of_the_check():
    """The labels of `esljax check` are headings of the page, and its digits stand below them."""
    page = PRESENT["docs/theory.md"]
    sections = dict(re.findall(r"^### (O\d+):(.*?)(?=^#)", page, re.DOTALL | re.MULTILINE))
    # In words: 1 - h/2 at h = .1, and a schedule that reaches the limit.
    in_words = {("O13", 0.95), ("O3", 1.0)}
    for check in CHECKS:
        if check.name == "∇" or (check.name, check.reference) in in_words:
            continue
        numbers = {float(number) for number in re.findall(r"\d*\.\d+", sections[check.name])}
        assert check.reference in numbers, f"{check.name}, {check.what}"


def test_design_has_the_floors_of_the_tests():
    table = re.findall(r"^\|\s*(\d*)\s*\| (`.*?`) \|", PRESENT["docs/design.md"], re.MULTILINE)
    floors = {}
    for floor, rooms in table:
        last = int(floor) if floor else max(floors.values())
        floors |= dict.fromkeys(re.findall(r"`(\w+)`", rooms), last)
    assert floors == {
        room: floor
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if room not in ("__main__", "__init__")
    }


def test_the_readme_is_short():
    assert len(PRESENT["README.md"].splitlines()) <= 150
