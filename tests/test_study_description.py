"""The description of a study, from Python and from TOML, and the input that it rejects."""

import dataclasses
import math

import numpy as np
import pytest
from studies import BASE, GRID

import esljax as esl
from esljax.experiment import runs
from esljax.study import description


def test_a_grid_is_every_combination():
    study = esl.study.Study(
        BASE, grid={"rate": np.array([0.1, 0.2]), "hidden": [(4,), (3, 2)], "seed": range(3)}
    )
    assert study.dimensions == {"rate": 2, "hidden": 2, "seed": 3}
    assert study.size == 12
    seen = [(study.point(i).rate, study.point(i).hidden, study.point(i).seed) for i in range(12)]
    assert len(set(seen)) == 12
    assert seen[1] == (0.1, (4,), 1)
    assert seen[3] == (0.1, (3, 2), 0)
    assert seen[6] == (0.2, (4,), 0)
    assert all(study.point(i).steps == BASE.steps for i in range(12))


def test_points_are_as_listed():
    study = esl.study.Study(BASE, points=[{"rate": 0.3}, {"seed": 4, "members": 6}])
    assert study.dimensions == {"point": 2}
    assert [dataclasses.asdict(study.point(i)) for i in range(2)] == [
        dataclasses.asdict(BASE) | {"rate": 0.3},
        dataclasses.asdict(BASE) | {"seed": 4, "members": 6},
    ]
    assert study.coordinates == {
        "members": ("point", (8, 6)),
        "rate": ("point", (0.3, 0.25)),
        "seed": ("point", (0, 4)),
    }


@pytest.mark.parametrize("task_size", [1, 2, 5, 8, 1000])
@pytest.mark.parametrize("listed", [False, True])
def test_slices_hold_every_run_once_and_one_shape_each(task_size, listed):
    study = esl.study.Study(BASE, grid=GRID)
    if listed:
        fields = ("rate", "members", "schedule", "seed")
        study = esl.study.Study(
            BASE,
            points=[{name: getattr(study.point(i), name) for name in fields} for i in range(24)],
        )
    slices = study.slices(task_size)
    assert sorted(np.concatenate([part.indices for part in slices])) == list(range(24))
    for part in slices:
        assert len(part.indices) <= part.length <= task_size
        assert len({runs.shape_of(study.point(int(i))) for i in part.indices}) == 1
    assert (
        len({(runs.shape_of(study.point(int(part.indices[0]))), part.length) for part in slices})
        == 2
    ), "one program for each shape"


def test_a_task_of_a_grid_is_one_chunk():
    study = esl.study.Study(BASE, grid=GRID)
    for task_size in (1, 3, 5, 100):
        chunk = np.array(study.chunks(task_size))
        for part in study.slices(task_size):
            places = np.array(np.unravel_index(part.indices, (3, 2, 2, 2))) // chunk[:, None]
            assert (places == places[:, :1]).all()


TOML = """
[base]
data = "moons"
hidden = [4]
temperature = 0

[grid]
rate = {start = 0.05, stop = 0.8, num = 5, scale = "log"}
l2 = {start = 0, stop = 1, num = 3}
members = {start = 8, stop = 64, num = 4, scale = "log"}
hidden = [[4], [8, 8]]
seed = {range = [5, 8]}
"""


def test_toml(tmp_path):
    (tmp_path / "study.toml").write_text(TOML)
    study = esl.study.Study.from_toml(tmp_path / "study.toml")
    assert study.base == esl.RunConfig(data="moons", hidden=(4,), temperature=0.0)
    assert study.grid == {
        "rate": (0.05, 0.1, 0.2, 0.4, 0.8),
        "l2": (0.0, 0.5, 1.0),
        "members": (8, 16, 32, 64),
        "hidden": ((4,), (8, 8)),
        "seed": (5, 6, 7),
    }
    again = esl.study.Study.from_dict(study.as_dict())
    assert again == study
    assert study.difference(again) is None
    (tmp_path / "points.toml").write_text(
        "[[points]]\nrate = 0.1\n[[points]]\nhidden = [3]\nseed = 2\n"
    )
    study = esl.study.Study.from_toml(tmp_path / "points.toml")
    assert study.points == ({"rate": 0.1}, {"hidden": (3,), "seed": 2})
    assert esl.study.Study.from_dict(study.as_dict()) == study


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"grid": {"learning_rate": [0.1]}},
            "Argument `grid` must be one of 'data', .*'learning_rate'",
        ),
        ({"grid": {}}, "Argument `grid` must name a field .* neither"),
        (
            {"grid": {"rate": [0.1]}, "points": [{"rate": 0.1}]},
            "Argument `grid` must name a field .* both",
        ),
        ({"grid": {"rate": []}}, "Argument `grid.rate` must hold at least one value"),
        ({"grid": {"rate": 0.1}}, "Argument `grid.rate` must be a list of values, but is 0.1"),
        ({"grid": {"schedule": "cosine"}}, "Argument `grid.schedule` must be a list of values"),
        (
            {"grid": {"rate": [0.1, 0.2, 0.1]}},
            "Argument `grid.rate` must hold each value once, but holds 0.1 twice",
        ),
        (
            {"points": [{"seed": 1}, {"seed": 2}, {"seed": 1}]},
            r"`points\[2\]` must be another run .* but is the same as points\[0\]",
        ),
        (
            {"points": [{"seed": 1}, {"seed": 1, "members": 8}]},
            r"`points\[1\]` must be another run .* but is the same as points\[0\]",
        ),
        (
            {"grid": {"seed": [0, 1.5]}},
            "Argument `seed` must be an integer in grid.seed, but is 1.5",
        ),
        (
            {"grid": {"seed": [0, True]}},
            "Argument `seed` must be an integer in grid.seed, but is True",
        ),
        (
            {"grid": {"rate": ["fast"]}},
            "Argument `rate` must be a number in grid.rate, but is 'fast'",
        ),
        ({"grid": {"rate": [0.1, -0.1]}}, "Argument `rate` must be greater than 0, but is -0.1"),
        ({"grid": {"rate": [0.1, math.nan]}}, "Argument `rate` must be greater than 0"),
        (
            {"grid": {"schedule": ["constant", "sawtooth"]}},
            "Argument `schedule` must be one of .*'sawtooth'",
        ),
        ({"grid": {"steps": [10, 12]}}, "Argument `snapshots` must divide the 12 steps, but is 5"),
        ({"grid": {"seed": [2**32]}}, r"Argument `seed` must be below 2\*\*32"),
        (
            {"grid": {"hidden": [[4], 8]}},
            "Argument `hidden` must be a list of integers in grid.hidden, but is 8",
        ),
        (
            {"grid": {"rate": [0.1], "seed": range(10**12)}},
            "`grid` must hold at most 10,000,000 runs, but holds 1,000,000,000,000",
        ),
        (
            {"points": [{"rate": 0.1}, {}]},
            r"Argument `points\[1\]` must be a table of at least one field",
        ),
        (
            {"points": [{"rate": 0.1}, {"rat": 0.1}]},
            r"Argument `points\[1\]` must be one of .*'rat'",
        ),
        (
            {"points": [{"rate": 0.1}, {"rate": 0}]},
            r"In points\[1\]: Argument `rate` must be greater than 0",
        ),
        ({"base": {"rate": 0.1}, "grid": {"seed": [0]}}, "Argument `base` must be a RunConfig"),
    ],
    ids=str,
)
def test_bad_studies_are_rejected(given, sentence, refused):
    refused(lambda: esl.study.Study(**{"base": BASE, **given}), sentence)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"hidden": [4]}, "Argument `hidden` must be a tuple of integers"),
        ({"rate": "1"}, "Argument `rate` must be a number, but is '1'"),
        ({"batch_size": -1}, "Argument `batch_size` must be an integer of at least 0"),
    ],
    ids=str,
)
def test_a_bad_base_is_rejected(field, sentence, refused):
    refused(
        lambda: esl.study.Study(dataclasses.replace(BASE, **field), grid={"seed": [0]}), sentence
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "[bas]\nrate = 1",
            "Key `bas` of .*study.toml is unknown; the known keys are base, grid, points",
        ),
        ("[base]\nrates = 1", r"Key `rates` of \[base\] of .*study.toml is unknown"),
        (
            "[base]\nrate = 'x'\n[grid]\nseed = [0]",
            "Argument `rate` must be a number in .*study.toml, but is 'x'",
        ),
        ("grid = 3", "Argument `grid` must be a table in .*study.toml, but is 3"),
        ("points = 3", "Argument `points` must be a list of tables in .*study.toml, but is 3"),
        ("[grid]\nseed = {range = [0]}", "Argument `grid.seed` must have a range of two integers"),
        ("[grid]\nseed = {range = [3, 3]}", "Argument `grid.seed` must hold at least one value"),
        ("[grid]\nrate = {start = 1, stop = 2}", "Argument `grid.rate` must be a list, {range"),
        (
            "[grid]\nrate = {start = 1, stop = 2, num = 1000000000000}",
            "`grid.rate.num` must be at most 10,000,000",
        ),
        (
            "[grid]\nrate = {start = 1, stop = 2, num = 1}",
            "Argument `grid.rate.num` must be an integer of at least 2",
        ),
        (
            "[grid]\nrate = {start = 0, stop = 2, num = 3, scale = 'log'}",
            "Argument `grid.rate` must have positive ends",
        ),
        (
            "[grid]\nrate = {start = 1, stop = 2, num = 3, scale = 'cube'}",
            "Argument `grid.rate.scale` must be one of",
        ),
        (
            "[grid]\nmembers = {start = 8, stop = 9, num = 3}",
            "Argument `members` must be an integer in grid.members, but is 8.5",
        ),
        ("[grid\n", "Argument `config` must be valid TOML"),
    ],
)
def test_bad_files_are_rejected(content, sentence, tmp_path, refused):
    (tmp_path / "study.toml").write_text(content)
    refused(lambda: esl.study.Study.from_toml(tmp_path / "study.toml"), sentence)


def test_long_ranges_are_held_and_checked_by_their_ends(monkeypatch, refused):
    """Ten million values are neither listed nor converted one by one."""
    converted, plain = [], description._value
    monkeypatch.setattr(description, "_value", lambda *given: converted.append(1) or plain(*given))
    whole = {"range": [5, 10_000_005]}
    study = esl.study.Study.from_dict({"grid": {"seed": whole}})
    assert study.grid["seed"] == range(5, 10_000_005)
    assert study.as_dict()["grid"]["seed"] == whole
    assert study.point(9_999_999).seed == 10_000_004
    assert len(converted) == 1
    refused(
        lambda: esl.study.Study(BASE, grid={"seed": range(2**32 - 10**5, 2**32 + 1)}),
        r"`seed` must be below 2\*\*32, .*, but is 4294967296",
    )
    refused(
        lambda: esl.study.Study(BASE, grid={"members": range(-1, 10**5)}),
        "`members` must be an integer of at least 2, but is -1",
    )
    refused(
        lambda: esl.study.Study(BASE, grid={"rate": [0.1, *np.linspace(1, 2, 10**4), np.nan]}),
        "`rate` must be greater than 0, but is nan",
    )
    refused(
        lambda: esl.study.Study(BASE, grid={"steps": range(20, 10**5), "snapshots": [20]}),
        "`snapshots` must divide the 21 steps, but is 20",
    )
    refused(
        lambda: esl.study.Study.from_dict({"grid": {"seed": {"range": [0, 10**20]}}}),
        "`grid` must hold at most 10,000,000 runs, but holds 100,000,000,000,000,000,000, whose",
    )


def test_a_long_range_is_the_same_study_as_its_list():
    some = range(3, 3 + description._LONG)
    listed = esl.study.Study(BASE, grid={"seed": list(some)})
    assert listed == esl.study.Study(BASE, grid={"seed": some})
    # As earlier versions have written it.
    old = {"base": BASE.as_dict(), "grid": {"seed": list(some)}}
    assert esl.study.Study.from_dict(old).difference(listed) is None


def test_long_spacings_have_the_digits_of_short_ones(monkeypatch):
    for given in (
        {"start": 0.1, "stop": 3.7, "num": 999, "scale": "log"},
        {"start": -1, "stop": 1, "num": 1000},
    ):
        short = description._spaced("x", given)
        with monkeypatch.context() as patched:
            patched.setattr(description, "_LONG", 1)
            assert description._spaced("x", given) == short
