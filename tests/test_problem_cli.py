"""Commands for a problem from outside: keywords as flags and TOML keys, errors by their line."""

import dataclasses
import json
import re
import shlex
import tomllib

import pytest

import esljax as esl
from esljax.command import cli
from esljax.command.flags import JOBS
from esljax.command.settings import CheckConfig, MeasureConfig

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all", "precision_restored")

HILL = '''"""A hill of one's own."""

import jax
import jax.numpy as jnp

import esljax as esl

STEEP, CALLS = jnp.array([2.0, 1.0]), []


def hill(members: int = 4, noise: float = 1e-3, far=(2.0, 1.0), fail: str = ""):
    """A hill.

    Args:
        members: how many go down.
    """

    def loss(position):
        return jnp.sum(STEEP * position**2)

    def size(potential, positions, test):
        CALLS.append(fail)
        if CALLS.count("run") > 1:
            raise RuntimeError("no size today")
        return jnp.sum(positions**2, axis=1)

    if fail == "make":
        raise RuntimeError("no hill today")
    return esl.Problem(
        esl.FromFunction(loss),
        members=members,
        steps=10,
        snapshots=5,
        temperature=noise,
        transport=esl.GaussianTransport(),
        start=lambda key: jnp.array(far) + jax.random.normal(key, (members, 2)),
        metrics={"size": size},
    )


def named(name: str, members: int = 4):
    return hill(members)


fixed = hill()
'''
QUICK = ["--rate", "0.05", "--iterations", "2", "--knots", "3", "--judge-runs", "2", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    (folder / "hill.py").write_text(HILL)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def report(path):
    return json.loads((path / "report.json").read_text())


def test_keywords_are_flags_and_keys_and_come_back_from_the_settings(here, tmp_path):
    (tmp_path / "run.toml").write_text('problem = "hill.py:hill"\nmembers = 6\nnoise = 0\n')
    given = ["optimize", "--config", str(tmp_path / "run.toml"), "--far", "3", "1", *QUICK]
    assert cli.main([*given, "--out", str(tmp_path / "first")]) in (0, 1)
    settings = tomllib.loads((tmp_path / "first" / "config.toml").read_text())
    assert settings["problem"] == f"{here}/hill.py:hill"
    assert settings["members"] == 6
    assert settings["noise"] == 0.0
    assert settings["far"] == [3.0, 1.0]
    first = report(tmp_path / "first")
    assert "size" in first["schedules"]["constant"]
    assert first["config"]["far"] == [3.0, 1.0]
    assert {"data", "hidden", "steps"}.isdisjoint(settings)
    # The schedule comes back as it was judged, knots and interpolation.
    for name, judged in first["schedules"].items():
        schedule = esl.schedules.from_dict(judged["schedule"])
        assert schedule.rates(10).tolist() == pytest.approx(judged["learning_rates"], rel=1e-6)
        saved = esl.load_schedule(tmp_path / "first" / "schedules" / f"{name}.json")
        assert saved.as_dict() == schedule.as_dict()
    again = ["--config", str(tmp_path / "first" / "config.toml"), "--out", str(tmp_path / "second")]
    assert cli.main(["optimize", *again]) in (0, 1)
    second = report(tmp_path / "second")
    assert second["schedules"] == first["schedules"]
    # Another value of a keyword is another configuration.
    same = ["optimize", *again, "--members", "4"]
    assert cli.main(same) == 2


def test_the_help_shows_the_keywords(here, capsys):
    assert cli.main(["optimize", "--problem", "hill.py:hill", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("--members INT", "how many go down. (default: 4)", "--far [FLOAT [FLOAT ...]]"):
        assert words in text
    assert "--hidden" not in text
    assert cli.main(["optimize", "--help"]) == 0
    assert "--far" not in capsys.readouterr().out


def test_a_plan_of_an_own_problem(here, capsys):
    assert cli.main(["plan", "--problem=hill.py:hill", "--members", "12"]) == 0
    assert "12 members of 2 numbers" in capsys.readouterr().out
    assert cli.main(["plan", "--problem", "hill.py:fixed"]) == 0
    assert "4 members of 2 numbers" in capsys.readouterr().out
    assert cli.main(["plan", "--problem", "hill.py:named", "--name", "x", "--members", "6"]) == 0
    assert "6 members of 2 numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hill", "--hidden", "3"], r"`hidden` must be left out with hill.py:hill, whose settings"),
        (["fixed", "--members", "8"], r"`members` must be left out with hill.py:fixed, a Problem"),
        (["hill", "--members", "1"], r"`members` .* at least 2, but is 1 \(.*/hill.py, line 29: "),
        (["hill", "--fail", "make"], r"/hill.py, line 28 raises RuntimeError: no hill today \("),
        (
            ["hill", "--dtype", "float64", "--fail", "run"],
            r"hill.py, line 24 raises RuntimeError: no size today",
        ),
        (["nothing"], r"hill.py has no 'nothing'; it has hill, named, fixed"),
        (["hill", "--config", "data.toml"], r"`data` must be left out with hill.py:hill"),
        (
            ["hill", "--config", "wrong.toml"],
            r"Argument `members` must be an integer in wrong.toml",
        ),
        (["hill", "--config", "unknown.toml"], r"Key `height` of unknown.toml is unknown"),
        (["named", "--config", "out.toml"], r"--name"),
    ],
)
def test_bad_settings_of_an_own_problem_are_one_sentence(here, capsys, arguments, sentence):
    (here / "data.toml").write_text('data = "moons"\n')
    (here / "wrong.toml").write_text('members = "many"\n')
    (here / "unknown.toml").write_text("height = 1\n")
    (here / "out.toml").write_text('out = "here"\n')
    name, *flags = arguments
    given = ["optimize", "--problem", f"hill.py:{name}", *QUICK, "--out", "bad", *flags]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "Traceback" not in error
    assert sentence == "--name" or error.count("\n") == 1
    assert not (here / "bad").exists()


@pytest.mark.parametrize("command", [*JOBS, "measure"])
def test_every_setting_is_a_flag_in_one_group_of_the_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    kind = JOBS[command][0] if command in JOBS else MeasureConfig
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    lines = [line.strip(" │|") for line in text.splitlines()]
    flags = [line.split()[0].rstrip(",") for line in lines if re.match(r"--[a-z]", line)]
    names = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    assert sorted(flags) == sorted(f"--{name}" for name in names if name != "recording")
    groups = [line for line in lines if re.fullmatch(r"\W*(\w+) options\W*", line)]
    assert len(groups) == 5
    words = " ".join(" ".join(lines).split())
    assert not re.search(r"(--no-[a-z-]+|[]A-Z}]) \(default", words), "a flag without words"


@pytest.mark.parametrize(
    "kind", [*(each for pair in JOBS.values() for each in pair), MeasureConfig]
)
def test_the_example_of_a_help_runs(kind, monkeypatch):
    """It is parsed, and its settings may run."""
    (example,) = re.findall(r"Example: esljax (.*)", kind.__doc__)
    words = shlex.split(example)
    config = cli._parse(words)
    config.check()
    assert words[0] in CheckConfig.__doc__ or type(config).__doc__ == kind.__doc__
