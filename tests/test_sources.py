"""Problems from outside: where they are found, their settings, and whose line is at fault."""

import dataclasses
import pickle
import sys
from pathlib import Path

import jax
import pytest

import esljax as esl
from esljax.experiment import (
    REQUIRED,
    GeneralConfig,
    Source,
    check_given,
    settings_class,
)

MINE = '''"""A problem of one's own."""

from pathlib import Path
from typing import Literal

import jax

import esljax as esl
from model import loss


def net(
    width: int = 3,
    batch=8,
    noise: float = 1,
    kind: Literal["flat", "steep"] = "flat",
    sizes: list[int] = [4, 2],
    members: int = 4,
    table: Path | None = None,
):
    """Make it.

    Args:
        width: of the cloud.
        noise (float): its temperature.
    """
    from late import shift

    assert type(sizes) is list
    if kind == "steep":
        raise RuntimeError("too steep. By far")
    return esl.Problem(
        esl.FromFunction(loss),
        members=members,
        steps=20,
        snapshots=5,
        temperature=noise,
        start=lambda key: shift + jax.random.normal(key, (members, width)),
    )


def dictionary(width: int, depth=2):
    return {"width": width}


def variadic(*args): ...
def positional(x=1, /): ...
def bare(x): ...
def swallowing(**options): ...
def activated(by=jax.nn.relu): ...
def unreadable(x: "Nowhere" = 1): ...
def mapped(x: dict[str, int] = {}): ...
def pair(x: tuple[int, float] = (1, 2.0)): ...
def seeded(seed: int = 0): ...
def checking(check: bool = True): ...


fixed = net()
number = 3
if __name__ == "__main__":
    raise SystemExit("ran as a script")
'''


def folder_with(tmp_path: Path, name: str, center: float) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    neighbor = f"def loss(position):\n    return ((position - {center}) ** 2).mean()\n"
    (folder / "model.py").write_text(neighbor)
    (folder / "late.py").write_text(f"shift = {center}\n")
    return folder


@pytest.fixture
def mine(tmp_path):
    return folder_with(tmp_path, "one", 10.0) / "mine.py"


def test_keywords_have_the_types_and_defaults_of_the_signature(mine):
    keywords = Source.of(f"{mine}:net").keywords
    assert {name: keyword.default for name, keyword in keywords.items()} == {
        "width": 3,
        "batch": 8,
        "noise": 1.0,
        "kind": "flat",
        "sizes": (4, 2),
        "members": 4,
        "table": None,
    }
    assert type(keywords["noise"].default) is float
    assert keywords["width"].annotation is keywords["batch"].annotation is int
    assert keywords["sizes"].annotation == tuple[int, ...]
    assert keywords["width"].words == "of the cloud."
    assert keywords["noise"].words == "its temperature."


def test_a_function_makes_the_problem_of_its_settings(mine):
    source = Source.of(f"{mine}:net")
    problem = source.problem(width=5, noise=2, sizes=(1, 2), members=6, table="here.csv")
    start = problem.positions(jax.random.key(0))
    assert start.shape == (6, 5)
    # The neighbor that is imported only when the function runs.
    assert float(start.mean()) == pytest.approx(10, abs=1)
    assert float(problem.temperature(0.0)) == 2


def test_an_object_needs_no_place(mine):
    def line(noise=0.5):
        return dataclasses.replace(fixed, temperature=noise)

    fixed = Source.of(f"{mine}:fixed").problem()
    assert Source.of(fixed).problem() is fixed
    source = Source.of(line)
    assert source.place == ""
    assert float(source.problem(noise=3).temperature(0.0)) == 3
    assert Source.of(source) is source


def test_neighbors_of_two_files_with_the_same_names_are_apart(tmp_path, mine):
    other = folder_with(tmp_path, "two", -10.0) / "mine.py"
    potentials = [Source.of(f"{file}:fixed").problem().potential for file in (mine, other)]
    at_zero = [float(potential(jax.numpy.zeros((1, 3)))[0]) for potential in potentials]
    assert at_zero == [100.0, 100.0]
    starts = [
        float(Source.of(f"{file}:net").problem().positions(jax.random.key(0)).mean())
        for file in (mine, other)
    ]
    assert starts[0] > 5
    assert starts[1] < -5
    assert not {"model", "late"} & set(sys.modules)
    assert str(mine.parent) not in sys.path


def test_a_file_runs_once_and_again_when_it_or_a_neighbor_has_changed(mine):
    first = Source.of(f"{mine}:net")
    assert Source.of(str(mine.parent / ".." / "one" / "mine.py") + ":net") == first
    assert Source.of(f"{mine}:fixed").made is Source.of(f"{mine}:fixed").made
    mine.write_text(MINE.replace("width: int = 3", "width: int = 7"))
    second = Source.of(f"{mine}:net")
    assert second != first
    assert second.keywords["width"].default == 7
    neighbor = mine.parent / "model.py"
    neighbor.write_text(neighbor.read_text().replace("10.0", "20.00"))
    import os

    os.utime(neighbor, (1, 1))
    potential = Source.of(f"{mine}:fixed").problem().potential
    assert float(potential(jax.numpy.zeros((1, 3)))[0]) == 400.0


def test_a_module_on_the_path_of_the_user_is_found(tmp_path, mine, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "mypackage_of_problems"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "make.py").write_text(
        "import esljax as esl\n\n\ndef hill(n: int = 4):\n"
        "    start = esl.gaussian.Law([1.0], [[1.0]])\n"
        "    return esl.Problem(esl.Quadratic(1.0), members=n, steps=4, snapshots=2,\n"
        "        start=__import__('numpy').ones((n, 1)))\n"
    )
    source = Source.of("mypackage_of_problems.make:hill")
    assert source.place == "mypackage_of_problems.make:hill"
    assert source.problem(n=6).members == 6
    assert str(tmp_path) not in sys.path


def test_arrays_of_the_file_and_its_neighbors_have_the_floating_type_of_the_run(tmp_path):
    (tmp_path / "third.py").write_text("import jax.numpy as jnp\nTHIRD = jnp.asarray(1.0) / 3\n")
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp\nimport esljax as esl\nfrom third import THIRD\n"
        "SIXTH = jnp.asarray(1.0) / 6\n\n\ndef bowl(members: int = 2):\n"
        "    start = jnp.stack([jnp.full(members, THIRD), jnp.full(members, SIXTH)], axis=1)\n"
        "    return esl.Problem(esl.Quadratic(1.0), members=members, steps=4, snapshots=2,\n"
        "        start=start)\n"
    )
    source = Source.of(f"{tmp_path / 'own.py'}:bowl")
    with jax.enable_x64(True):
        for each in (source, Source.of(source.place)):
            start = each.problem().positions(jax.random.key(0))
            assert start[0].tolist() == [1 / 3, 1 / 6]


def test_settings_have_the_fields_of_a_base_and_of_the_keywords(mine):
    source = Source.of(f"{mine}:net")
    kind = settings_class(GeneralConfig, source)
    assert kind is settings_class(GeneralConfig, Source.of(f"{mine}:net"))
    assert kind is not settings_class(GeneralConfig, Source.of(f"{mine}:dictionary"))
    settings = kind(width=5, seed=1, sizes=(3,))
    assert settings == kind(width=5, seed=1, sizes=(3,))
    assert len({settings, kind(width=5, seed=1, sizes=(3,)), kind()}) == 2
    assert dataclasses.replace(settings, width=6).width == 6
    returned = pickle.loads(pickle.dumps(settings))
    assert returned == settings
    assert type(returned) is kind
    assert settings_class(GeneralConfig, None) is GeneralConfig


def test_a_setting_without_default_is_to_be_given(mine):
    kind = settings_class(GeneralConfig, Source.of(f"{mine}:dictionary"))
    assert kind().width is REQUIRED
    with pytest.raises(esl.InputError, match=r"`width` must be given: mine.py:dictionary has no"):
        check_given(kind())
    check_given(kind(width=1))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"depth": 1},
            r"`depth` must be left out with mine.py:net, whose settings are width, batch, ",
        ),
        ({"width": 0.5}, r"`width` must be an integer, but is 0.5"),
        ({"width": True}, r"`width` must be an integer, but is True"),
        ({"batch": "8"}, r"`batch` must be an integer, but is '8'"),
        ({"noise": "much"}, r"`noise` must be a number, but is 'much'"),
        ({"kind": "round"}, r"`kind` must be one of 'flat', 'steep', but is 'round'"),
        ({"sizes": [1, 2.5]}, r"`sizes` must be an integer, but is 2.5"),
        ({"sizes": 3}, r"`sizes` must be a tuple of integers, but is 3"),
        ({"kind": "steep"}, r"mine.py, line 31 raises RuntimeError: too steep. By far \(raise Ru"),
        ({"members": 1}, r"`members` must be an integer of at least 2, but is 1 \(.*, line 32: "),
    ],
)
def test_a_wrong_setting_is_one_sentence(mine, settings, sentence):
    with pytest.raises(esl.InputError, match=sentence):
        Source.of(f"{mine}:net").problem(**settings)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("number", r"must be a Problem, or a function.*but mine.py:number is an int"),
        ("variadic", r"mine.py:variadic has \*args"),
        ("positional", r"has the positional-only x"),
        ("bare", r"`x` of mine.py:bare has no type and no default"),
        ("swallowing", r"has \*\*options"),
        ("activated", r"`by` of mine.py:activated has the default the function relu"),
        ("unreadable", r"`x` of mine.py:unreadable is 'Nowhere'|NameError"),
        ("mapped", r"`x` of mine.py:mapped is dict"),
        ("pair", r"`x` of mine.py:pair is tuple"),
        ("nothing", r"has no 'nothing'; it has net, dictionary, .*fixed"),
        ("", r"\(it has net, dictionary"),
        ("a-b", r"\(it has net, dictionary"),
    ],
)
def test_what_is_no_problem_is_refused(mine, name, sentence):
    with pytest.raises(esl.InputError, match=sentence):
        Source.of(f"{mine}:{name}")


@pytest.mark.parametrize("name", ["seeded", "checking"])
def test_a_keyword_with_the_name_of_a_setting_beside_it_is_refused(mine, name):
    class Config(GeneralConfig):
        """Settings with a method."""

        def check(self):
            """Check them."""

    with pytest.raises(esl.InputError, match="differ from the settings beside it"):
        settings_class(Config, Source.of(f"{mine}:{name}"))


def test_a_problem_has_no_settings_and_a_function_must_return_one(mine):
    with pytest.raises(esl.InputError, match=r"`width` must be left out with mine.py:fixed"):
        Source.of(f"{mine}:fixed").problem(width=3)
    with pytest.raises(esl.InputError, match=r"returns a dict \(.*mine.py, line 42\)"):
        Source.of(f"{mine}:dictionary").problem(width=3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("x = 1\ndef f(:\n", r"own.py, line 2 raises SyntaxError: .*\(def f\(:\)"),
        ("x = 1\n1 / 0\n", r"own.py, line 2 raises ZeroDivisionError: division by zero \(1 / 0"),
        ("import esljax\n\nimport nowhere\n", r"own.py, line 3 raises ModuleNotFoundError"),
        ("import sys\nsys.exit('bye')\n", r"own.py, line 2 raises SystemExit: bye"),
        ("from broken import f\n", r"broken.py, line 2 raises AttributeError"),
        ("import esljax\nesljax.Cosine('high')\n", r"must be .*\(.*own.py, line 2: esljax.Cosine"),
        ("x = '\n", r"own.py, line 1 raises SyntaxError"),
    ],
)
def test_an_error_of_a_file_names_the_line_of_its_user(tmp_path, content, sentence):
    (tmp_path / "own.py").write_text(content)
    (tmp_path / "broken.py").write_text("import math\nmath.nothing\n")
    before = set(sys.modules)
    with pytest.raises(esl.InputError, match=sentence):
        Source.of(f"{tmp_path / 'own.py'}:f")
    assert not {name for name in set(sys.modules) - before if "own" in name or "broken" in name}


@pytest.mark.parametrize("place", ["", "mine", ":f", "a:b:c", "nowhere.py:f", "no-module:f", "."])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(esl.InputError, match=r"my_file\.py:name"):
        Source.of(place)
