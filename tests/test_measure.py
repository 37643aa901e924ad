"""`esljax measure`: a run from disk against numbers by hand, its files, exit codes and messages."""

import collections
import json
import re
import tomllib
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.command import cli
from esljax.command.measure import Measurement, transport_problems
from esljax.command.settings import MeasureConfig

pytestmark = pytest.mark.usefixtures("precision_restored")
NUMBERS = ("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric")


def wandering(links=4, members=6, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return np.cumsum(
        rng.normal(size=(links + 1, members, d)) * np.array([3, 1, 0.3, 1, 2])[:d], axis=0
    )


@pytest.fixture
def run(tmp_path):
    np.savez(tmp_path / "run.npz", positions=wandering(), times=[0, 1, 2, 4, 8])
    return tmp_path / "run.npz"


def measured(*arguments, out):
    """The report of a call that must succeed."""
    assert cli.main(["measure", *map(str, arguments), "--out", str(out), "--quiet"]) == 0
    return json.loads((out / "report.json").read_text())


def test_a_translation_by_hand(tmp_path, capsys):
    """All members move by c_j along a vector of length 3: Σ = 9 Σ Δc²/Δs, L² = W2² = 9 c_J²."""
    moved, times = np.array([0, 1, 2, 3, 5.0]), np.array([200, 210, 220, 250, 300])
    cloud = np.random.default_rng(0).normal(size=(7, 3))
    np.savez(
        tmp_path / "run.npz",
        positions=cloud + moved[:, None, None] * np.array([1, 2, -2]),
        times=times,
    )
    assert (
        cli.main(
            [
                "measure",
                str(tmp_path / "run.npz"),
                "--out",
                str(tmp_path / "out"),
                "--dtype",
                "float64",
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    np.testing.assert_allclose(
        report["entropy_production"],
        9 * np.sum(np.diff(moved) ** 2 / (np.diff(times) / 100)),
        rtol=1e-12,
    )
    np.testing.assert_allclose([report["length_squared"], report["w2_squared"]], 225, rtol=1e-12)
    np.testing.assert_allclose(
        report["speed"]["values"], 3 * np.diff(moved) / (np.diff(times) / 100), rtol=1e-12
    )
    np.testing.assert_allclose(report["speed"]["times"], [0.05, 0.15, 0.35, 0.75])
    assert report["gap"] == pytest.approx(report["temporal"], rel=1e-12)
    assert (report["snapshots"], report["members"], report["coordinates"]) == (5, 7, 3)
    printed = capsys.readouterr().out
    assert (
        "5 snapshots of 7 members, 3 parameters each; times 200 to 300 rescaled to [0, 1]."
        in printed
    )
    assert re.search("entropy production Σ +282 ", printed)
    assert "The speed limit holds: Σ is 1.25 times W2²" in printed


def test_writes_what_it_promises(run, tmp_path, capsys):
    report = measured(run, out=tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "config.toml",
        "speed_limit.png",
    }
    assert (tmp_path / "out" / "speed_limit.png").read_bytes().startswith(b"\x89PNG")
    assert {
        *NUMBERS,
        "noise_floor",
        "transport_converged",
        "learning_time",
        "standard_error",
        "versions",
        "wall_seconds",
    } <= set(report)
    assert set(NUMBERS) <= set(report["standard_error"])
    assert report["learning_time"] is None
    assert report["noise_floor"] is None
    assert report["transport"] == {"name": "exact"}
    assert report["projection"] == {"name": "none", "coordinates": 5}
    assert report["times"] == {"first": 0, "last": 8}
    assert report["measured"] == "positions"
    assert "The speed limit holds" in report["verdict"]
    by_hand = esl.speed_limit(
        esl.from_snapshots(wandering(), [0, 1, 2, 4, 8]), transport=esl.ExactTransport()
    )
    for name in NUMBERS:
        assert report[name] == pytest.approx(float(getattr(by_hand, name)), rel=1e-6)
        assert report["standard_error"][name] == pytest.approx(
            float(getattr(by_hand.standard_error, name)), rel=1e-5
        )
    again = measured("--config", tmp_path / "out" / "config.toml", out=tmp_path / "again")
    assert tomllib.loads((tmp_path / "out" / "config.toml").read_text())["recording"] == str(run)
    for key in ("config", "wall_seconds"):
        report.pop(key), again.pop(key)
    assert report == again


def test_what_is_left_out_is_said(tmp_path, capsys):
    random = np.random.default_rng(0)
    moved = random.normal(size=(3, 4, 2)).astype(np.float32)
    for member in range(4):
        (tmp_path / "run" / f"member_{member}").mkdir(parents=True)
        for step in range(3):
            np.savez(
                tmp_path / "run" / f"member_{member}" / f"step_{step}.npz",
                weight=moved[step, member],
                m=100 * random.normal(size=2),
                exp_avg=100 * random.normal(size=2),
            )
        np.savez(tmp_path / "run" / f"member_{member}" / "best_0.93.npz", weight=np.ones(2))
    call = ["measure", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--jackknife", "0"]
    assert cli.main(call) == 2
    assert "name='step_{}'" in capsys.readouterr().err
    call += ["--name", "step_{}"]
    assert cli.main(call) == 2
    assert "skip='m'" in capsys.readouterr().err
    assert cli.main([*call, "--skip", "m", "--skip", "mm"]) == 2
    assert "`skip` must match keys" in capsys.readouterr().err
    assert cli.main([*call, "--skip", "m"]) == 0
    printed = capsys.readouterr().out
    assert "Left out of the recording: chosen by skip (`m`); state of an optimizer (`exp" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"] == {"m": "chosen by skip", "exp_avg": "state of an optimizer"}
    by_hand = esl.speed_limit(
        esl.from_snapshots(moved), transport=esl.ExactTransport(), jackknife=0
    )
    assert report["entropy_production"] == pytest.approx(float(by_hand.entropy_production))
    only = ["--only", "wei*", "--only", "m", "--out", str(tmp_path / "only"), "--quiet"]
    assert cli.main([*call, "--skip", "m", *only]) == 0
    config = tmp_path / "only" / "config.toml"
    assert tomllib.loads(config.read_text())["only"] == ["wei*", "m"]
    again = measured("--config", config, out=tmp_path / "again")
    assert again["entropy_production"] == report["entropy_production"]


def test_how_axes_were_read_is_said(tmp_path, capsys):
    cloud = np.random.default_rng(0).normal(size=(16, 4, 2))
    for times, said in ((None, True), (np.arange(16), False)):
        more = {} if times is None else {"times": times}
        np.savez(tmp_path / "run.npz", positions=cloud, **more)
        call = [str(tmp_path / "run.npz"), "--out", str(tmp_path / "out"), "--jackknife", "0"]
        assert cli.main(["measure", *call]) == 0
        sentence = "the first axis (16) was read as snapshots and the second (4) as members"
        assert (sentence in capsys.readouterr().out) == said


GIVEN = np.linalg.qr(np.random.default_rng(5).normal(size=(5, 2)))[0]


def SLICED():
    return esl.SlicedTransport(8, jax.random.split(jax.random.key(3))[1])


@pytest.mark.parametrize(
    ("flags", "transport", "velocity"),
    [
        (["--transport", "gaussian"], lambda matrix: esl.GaussianTransport(), None),
        (
            ["--transport", "sliced", "--directions", "8", "--seed", "3"],
            lambda matrix: SLICED(),
            None,
        ),
        (
            ["--transport", "sinkhorn", "--epsilon", "3"],
            lambda matrix: esl.SinkhornTransport(3.0),
            None,
        ),
        (
            ["--velocity", "transport"],
            lambda matrix: esl.ExactTransport(),
            esl.TransportVelocity(esl.ExactTransport()),
        ),
        (
            ["--project", "matrix.npz"],
            lambda matrix: esl.ProjectedTransport(esl.ExactTransport(), GIVEN),
            None,
        ),
        (
            ["--project", "matrix.npz", "--transport", "gaussian", "--velocity", "transport"],
            lambda matrix: esl.ProjectedTransport(esl.GaussianTransport(), GIVEN),
            esl.TransportVelocity(esl.GaussianTransport()),
        ),
        (
            ["--project", "pca", "--coordinates", "2"],
            lambda matrix: esl.ProjectedTransport(esl.ExactTransport(), matrix),
            None,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_are_what_speed_limit_takes(flags, transport, velocity, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("matrix.npz", matrix=GIVEN)
    report = measured(run, *flags, "--jackknife", 0, "--dtype", "float64", out=tmp_path / "out")
    pooled = wandering().reshape(-1, 5)
    principal = np.linalg.eigh(np.cov(pooled.T))[1][:, ::-1][:, :2]
    path = esl.from_snapshots(wandering(), [0, 1, 2, 4, 8])
    by_hand = esl.speed_limit(path, transport=transport(principal), velocity=velocity, jackknife=0)
    for name in NUMBERS:
        assert report[name] == pytest.approx(float(getattr(by_hand, name)), rel=1e-9, abs=1e-9)
    assert report["standard_error"] is None
    assert report["errors"] == "none"
    if "pca" in flags:
        share = np.sort(np.linalg.eigvalsh(np.cov(pooled.T)))[-2:].sum() / np.trace(
            np.cov(pooled.T)
        )
        assert report["projection"] == {
            "name": "pca",
            "coordinates": 2,
            "variance_share": pytest.approx(share),
        }


def test_random_projections_differ_by_seed_and_bound_from_below(run, tmp_path):
    whole = measured(run, "--jackknife", 0, out=tmp_path / "whole")
    first, second, again = (
        measured(
            run,
            "--project",
            "random",
            "--coordinates",
            3,
            "--jackknife",
            0,
            "--seed",
            seed,
            out=tmp_path / name,
        )
        for seed, name in ((0, "a"), (1, "b"), (0, "c"))
    )
    assert (
        first["entropy_production"] == again["entropy_production"] != second["entropy_production"]
    )
    assert (
        max(first["entropy_production"], second["entropy_production"]) < whole["entropy_production"]
    )
    assert max(first["w2_squared"], second["w2_squared"]) < whole["w2_squared"]


def test_a_folder_and_features(tmp_path):
    """The same numbers from checkpoints, and features named as such."""
    positions, times = wandering().astype(np.float32), [0, 1, 2, 4, 8]
    for i in range(6):
        (tmp_path / "run" / f"member_{i}").mkdir(parents=True)
        for j, time in enumerate(times):
            np.savez(
                tmp_path / "run" / f"member_{i}" / f"{time}.npz",
                b=positions[j, i, 2:],
                a=positions[j, i, :2],
            )
    np.savez(tmp_path / "features.npz", features=positions)
    np.savez(tmp_path / "run.npz", positions=positions, times=times)
    from_folder, from_file = (
        measured(tmp_path / name, out=tmp_path / f"of {name}") for name in ("run", "run.npz")
    )
    features = measured(tmp_path / "features.npz", out=tmp_path / "features")
    assert all(from_folder[name] == from_file[name] for name in NUMBERS)
    assert from_folder["times"] == from_file["times"]
    assert features["measured"] == "features"
    assert features["times"] is None
    np.testing.assert_array_equal(esl.recordings.read(tmp_path / "run").positions, positions)


def test_numbers_not_to_be_trusted_are_exit_code_1(tmp_path, capsys):
    """Two clouds far apart at an ε that the iterations cannot reach."""
    start = np.random.default_rng(0).normal(size=(1, 100, 2))
    np.savez(tmp_path / "run.npz", positions=np.concatenate([start, start * 100]))
    arguments = [
        "--transport",
        "sinkhorn",
        "--epsilon",
        "1e-2",
        "--jackknife",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(["measure", str(tmp_path / "run.npz"), *arguments]) == 1
    assert "did not converge: do not trust these numbers" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["transport_converged"] is False


class Counting(esl.AbstractTransport):
    """Counts the problems that are solved in earnest, by their members."""

    is_metric: ClassVar[bool] = True
    solved: collections.Counter = eqx.field(static=True)

    def solve(self, x, y):
        def count(x):
            self.solved[x.shape[0]] += 1
            return np.float32(0)

        # Once for each problem of a batch.
        nothing = jax.pure_callback(
            count, jax.ShapeDtypeStruct((), np.float32), x, vmap_method="sequential"
        )
        return esl.Solution(jnp.mean(jnp.sum((x - y) ** 2, axis=1)) + nothing, jnp.asarray(True))

    def map(self, x, y):
        return y + 0 * self.solve(x, y).squared


class Tally(collections.Counter):
    __hash__ = object.__hash__


@pytest.mark.parametrize("links", [4, 3])
@pytest.mark.parametrize(("jackknife", "debias"), [(0, False), (3, False), (32, True)])
@pytest.mark.parametrize("maps", [False, True])
def test_problems_are_predicted(links, jackknife, debias, maps):
    members = 12
    transport = Counting(Tally())
    path = esl.from_snapshots(np.float32(wandering(links=links, members=members)))
    velocity = esl.TransportVelocity(transport) if maps else None
    jax.block_until_ready(
        esl.speed_limit(
            path, transport=transport, velocity=velocity, jackknife=jackknife, debias=debias
        )
    )
    whole = sum(count for size, count in transport.solved.items() if size > members // 2)
    solved = whole, transport.solved.total() - whole
    assert solved == transport_problems(
        links + 1, members, maps=maps, jackknife=jackknife, halves=debias
    )


def test_the_time_that_it_will_take_is_printed_first(tmp_path, capsys):
    """32 groups of 64 members, 5 snapshots, debiased: 33 · (4 + 1 + 2) and 33 · 3 · 5 problems."""
    np.savez(tmp_path / "run.npz", positions=wandering(members=64))
    assert (
        cli.main(
            [
                "measure",
                str(tmp_path / "run.npz"),
                "--transport",
                "exact",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    first, second, third = capsys.readouterr().out.splitlines()[:3]
    assert first == "231 transport problems of up to 64 members and 495 of up to 32."
    each, half, whole = map(
        float,
        re.fullmatch(
            r"A batch of them took (\S+) s each and (\S+) s for the smaller ones: "
            r"about (\S+) seconds in all, and some to compile.",
            second,
        ).groups(),
    )
    # Two digits of each, and one decimal of the whole.
    assert whole == pytest.approx(231 * each + 495 * half, abs=0.05 + 0.05 * whole + 0.03)
    assert third.startswith("5 snapshots of 64 members")


def test_a_projection_silences_no_warning(tmp_path):
    """Few members in many coordinates, bare and by a matrix that changes no number."""
    cloud = 5 * np.random.default_rng(1).normal(size=(4, 5))
    moved = 3 * np.arange(5)[:, None, None] + wandering(members=4) / 99
    np.savez(tmp_path / "run.npz", positions=cloud + moved)
    np.savez(tmp_path / "eye.npz", matrix=np.eye(5))
    flags = (tmp_path / "run.npz", "--jackknife", 0)
    bare = measured(*flags, out=tmp_path / "bare")
    given = measured(*flags, "--project", tmp_path / "eye.npz", out=tmp_path / "given")
    turned = ("--project", "pca", "--coordinates", 5)
    principal = measured(*flags, *turned, out=tmp_path / "principal")
    few = measured(*flags, *turned[:3], 2, out=tmp_path / "few")
    assert bare["identity_fraction"] == given["identity_fraction"] == 1
    assert principal["identity_fraction"] == few["identity_fraction"] == 1
    assert bare["findings"] == given["findings"]

    def names(report):
        return [finding["name"] for finding in report["findings"]]

    assert "n too small for d" in names(bare)
    assert names(principal) == names(bare)
    assert "n too small for d" not in names(few)


def test_members_that_do_not_move(tmp_path):
    np.savez(tmp_path / "run.npz", positions=np.ones((3, 4, 2)))
    report = measured(
        tmp_path / "run.npz", "--project", "pca", "--coordinates", 1, out=tmp_path / "out"
    )
    assert "Nothing moved" in report["verdict"]
    assert report["efficiency"] is None, "0/0 is no number"


def _arrays(tmp_path, **arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    return str(tmp_path / "bad.npz")


def _hole(tmp_path):
    positions = wandering()
    positions[2, 3, 0] = np.nan
    return _arrays(tmp_path, positions=positions)


def _cut(tmp_path):
    whole = (tmp_path / "run.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    return str(tmp_path / "cut.npz")


def _text(path, content):
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            lambda tmp, run: [],
            "Argument `recording` must be a file of snapshots or a folder of checkpoints, but is "
            "not given.",
        ),
        (
            lambda tmp, run: ["/nowhere.npz"],
            "Argument `recording` must be a file or folder, but /nowhere.npz does not exist.",
        ),
        (
            lambda tmp, run: [_arrays(tmp, weights=wandering())],
            "Argument `recording` must hold either `positions` or `features`",
        ),
        (
            lambda tmp, run: [_hole(tmp)],
            "Argument `positions` must be finite in float32, but is not for member 3 at snapshot "
            "2.",
        ),
        (
            lambda tmp, run: [_arrays(tmp, features=wandering()[:1])],
            "Argument `features` must hold at least two snapshots",
        ),
        (
            lambda tmp, run: [_arrays(tmp, positions=wandering()[:, :1])],
            "Argument `positions` must hold at least two snapshots of at least",
        ),
        (
            lambda tmp, run: [_arrays(tmp, positions=wandering(), times=[0, 1, 1, 2, 3])],
            "Argument `times` must increase",
        ),
        (
            lambda tmp, run: [_arrays(tmp, positions=wandering(), times=[0, 1])],
            "Argument `times` must have shape (5,)",
        ),
        (
            lambda tmp, run: [_arrays(tmp, positions=np.array([{}], object))],
            "Argument `recording` must be plain arrays, because a pickle",
        ),
        (lambda tmp, run: [_cut(tmp)], "Argument `recording` must be a whole .npz archive"),
        (
            lambda tmp, run: [_text(tmp / "run.pt", "")],
            "Argument `recording` must be plain arrays (save .npz or .safetensors), because",
        ),
        (lambda tmp, run: [str(tmp)], "Argument `recording` must hold one folder for each member"),
        (
            lambda tmp, run: [run, "--project", "pca"],
            "Argument `coordinates` must be at most 5, the numbers in one member, but is 10.",
        ),
        (lambda tmp, run: [run, "--project", "random"], "Argument `coordinates` must be at most 5"),
        (
            lambda tmp, run: [run, "--project", "umap"],
            "Argument `project` must be 'pca', 'random', 'none' or an .npz file, but umap does",
        ),
        (
            lambda tmp, run: [run, "--project", _arrays(tmp, matrix=np.eye(4))],
            "Argument `project` must hold a matrix (5, p), p ≤ 5",
        ),
        (
            lambda tmp, run: [run, "--project", _arrays(tmp, matrix=np.ones((5, 6)))],
            "Argument `project` must hold a matrix (5, p), p ≤ 5",
        ),
        (
            lambda tmp, run: [run, "--transport", "sliced", "--velocity", "transport"],
            "Argument `velocity` must be 'none' beside",
        ),
        (
            lambda tmp, run: [run, "--epsilon", "0"],
            "Argument `epsilon` must be greater than 0, but is 0.",
        ),
        (lambda tmp, run: [run, "--epsilon", "inf"], "Argument `epsilon` must be finite"),
        (
            lambda tmp, run: [run, "--coordinates", "0"],
            "Argument `coordinates` must be an integer of at least 1, but is 0.",
        ),
        (
            lambda tmp, run: [run, "--directions", "0"],
            "Argument `directions` must be an integer of at least 1, but is 0.",
        ),
        (
            lambda tmp, run: [run, "--jackknife", "-1"],
            "Argument `jackknife` must be an integer of at least 0, but is -1.",
        ),
        (
            lambda tmp, run: [run, "--seed", "-1"],
            "Argument `seed` must be an integer of at least 0",
        ),
        (
            lambda tmp, run: [run, "--config", "/nowhere.toml"],
            "Argument `config` must be a readable file",
        ),
        (lambda tmp, run: [run, "--config", _text(tmp / "c.toml", "steps = 3")], "Key `steps` of"),
        (
            lambda tmp, run: [run, "--config", _text(tmp / "c.toml", "project = 3")],
            "Argument `project` must be a string in",
        ),
        (
            lambda tmp, run: [run, "--config", _text(tmp / "c.toml", "velocity = 'affine'")],
            "Argument `velocity` must be one of 'none', 'tr",
        ),
        (
            lambda tmp, run: [run, f"--config={_text(tmp / 'c.toml', 'recording = 3')}"],
            "Argument `recording` must be a string in",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, run, tmp_path, capsys):
    assert (
        cli.main(["measure", *arguments(tmp_path, str(run)), "--out", str(tmp_path / "out")]) == 2
    )
    captured = capsys.readouterr()
    assert captured.err.startswith(f"esljax: {sentence}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists(), "refused before anything is written"


def test_where_it_cannot_write(run, tmp_path, capsys):
    assert cli.main(["measure", str(run), "--out", str(run)]) == 2
    assert "Argument `out` must be a folder, but is the file" in capsys.readouterr().err
    assert (
        cli.main(["measure", str(run), "--out", str(run / "inside"), "--jackknife", "0", "--quiet"])
        == 2
    )
    error = capsys.readouterr().err
    assert "Argument `out` must be a folder that can be written" in error
    assert error.count("\n") == 1
    np.testing.assert_array_equal(esl.recordings.read(run).positions, wandering())


def test_unknown_flags_and_help(run, capsys):
    assert cli.main(["measure", str(run), "--projekt", "pca"]) == 2
    assert "--projekt" in capsys.readouterr().err
    assert cli.main(["measure", "--help"]) == 0
    text = capsys.readouterr().out
    for field in (
        "project",
        "coordinates",
        "transport",
        "epsilon",
        "directions",
        "velocity",
        "jackknife",
        "seed",
        "dtype",
        "config",
        "quiet",
    ):
        assert f"--{field}" in text
    for words in ("member_000/step_000100.npz", "No pickled data", "130 interrupted"):
        assert words in " ".join(text.replace("│", " ").split())


def test_settings_of_one_command_are_not_those_of_another(run, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("transport = 'gaussian'\njackknife = 0\n")
    report = measured(run, "--config", tmp_path / "c.toml", out=tmp_path / "out")
    assert report["transport"] == {"name": "gaussian"}
    assert cli.main(["optimize", "--config", str(tmp_path / "c.toml")]) == 2
    assert "Key `jackknife` of" in capsys.readouterr().err


def test_modulo_a_symmetry_units_may_change_places(tmp_path, capsys, refused):
    """Checkpoints of another framework, whose hidden units end in an order of their own."""
    rng = np.random.default_rng(0)
    for member in range(8):
        inward, outward = rng.normal(size=(4, 3)), rng.normal(size=(2, 4))
        for step in (0, 1, 2):
            order = rng.permutation(4)
            weights = {"0.weight": inward[order], "2.weight": (outward + 0.1 * step)[:, order]}
            (tmp_path / f"run/member_{member}").mkdir(parents=True, exist_ok=True)
            np.savez(tmp_path / f"run/member_{member}/step_{step}.npz", **weights)
    axes = {"hidden": [("0.weight", 0), ("2.weight", 1)]}
    toml = tmp_path / "symmetry.toml"
    toml.write_text(esl.symmetry.permutations(axes).to_toml())
    out = tmp_path / "out"
    words = ["measure", str(tmp_path / "run"), "--symmetry", str(toml), "--out", str(out)]
    assert cli.main([*words, "--jackknife", "4"]) == 0
    report = json.loads((out / "report.json").read_text())
    # Each of 8 outward weights moves by .2 in all.
    assert report["w2_squared"] == pytest.approx(8 * 0.2**2, rel=1e-4)
    assert report["symmetry"]["exact"]
    sides = report["w2_squared_between_laws"]
    assert sides["lower"] < sides["upper"]
    assert sides["lower_error"] > 0 < sides["upper_error"]
    assert "W2² between the laws lies between about" in capsys.readouterr().out

    def with_content(text, *more):
        toml.write_text(text)
        return Measurement.of(
            MeasureConfig(recording=tmp_path / "run", symmetry=toml, **dict(more))
        )

    refused(lambda: with_content("units = 3"), "hold a table `permutations`")
    wrong = '[permutations]\nhidden = [["0/weight", 0]]'
    refused(lambda: with_content(wrong), "symmetry.toml is not: .*turns `0/weight`")
    refused(lambda: with_content("signs = ["), "`symmetry` must be valid TOML")
    heads = '[permutations]\nheads = [["0.weight", 0, 1]]\n[sizes]\nheads = "2"'
    refused(lambda: with_content(heads), "symmetry.toml is not: .*sizes.*numbers of units")
    refused(lambda: with_content(wrong, ("project", "pca")), "project.*be 'none' modulo a symmetry")
