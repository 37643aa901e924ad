"""Studies of problems from outside: their keywords as axes, rates that are found, travel."""

import dataclasses
import json
import pickle
import re
import tomllib
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from studies import Idle

import esljax as esl
from esljax.command.cli import main
from esljax.experiment import parcels, runs
from esljax.study import pace

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

FILE = '''
import jax
import jax.numpy as jnp

import esljax as esl

FACTOR = {factor}


def bowl(stiffness: float = 1.0, members: int = 4, noise: float = 1e-3) -> esl.Problem:
    """A quadratic whose members start apart."""
    return esl.Problem(
        esl.Quadratic(FACTOR * stiffness),
        members=members,
        steps=10,
        snapshots=5,
        temperature=noise,
        start=lambda key: 1 + jax.random.normal(key, (members, 2)),
        metrics={{"size": lambda potential, positions, test: jnp.sum(positions**2, axis=1)}},
    )
'''
GRID = {"stiffness": [1.0, 2.0], "schedule": ["constant", "cosine"], "seed": range(2)}


def bowl(stiffness: float = 1.0, members: int = 4, noise: float = 1e-3) -> esl.Problem:
    return esl.Problem(
        esl.Quadratic(stiffness),
        members=members,
        steps=10,
        snapshots=5,
        temperature=noise,
        start=lambda key: 1 + jax.random.normal(key, (members, 2)),
        metrics={"size": lambda potential, positions, test: jnp.sum(positions**2, axis=1)},
    )


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE.format(factor=1.0))
    (tmp_path / "study.toml").write_text(
        'problem = "mine.py:bowl"\n[base]\nrate = 0.1\n[grid]\nstiffness = [1.0, 2.0]\n'
        'schedule = ["constant", "cosine"]\nseed = {range = [0, 2]}\n'
    )
    return tmp_path


def test_keywords_are_axes_and_metrics_are_numbers(tmp_path):
    """Each run is the run of the problem that its keywords make, on the key of its seed."""
    study = esl.study.Study({"rate": 0.1}, GRID, problem=bowl)
    results = esl.study.run_study(study, tmp_path / "study.zarr")
    assert dict(results.sizes) == {"stiffness": 2, "schedule": 2, "seed": 2}
    assert "size" in results
    assert "test_accuracy" not in results
    assert results["final_loss"].attrs["units"] == "units of the loss"
    one = results.sel(stiffness=2.0, schedule="cosine", seed=1)
    key = jax.random.split(jax.random.key(1))[0]
    outcome = bowl(2.0).run(esl.Cosine(0.1), key)
    for name, value in (
        ("entropy_production", outcome.report.entropy_production),
        ("final_loss", outcome.final_loss),
        ("size", outcome.metrics["size"]),
    ):
        np.testing.assert_allclose(float(one[name]), float(value), rtol=2e-5, err_msg=name)
    alone = esl.run(study.point(7))
    assert float(one["entropy_production"]) == float(alone.report.entropy_production)
    assert esl.study.summarize(results)[0].means["size"] > 0


def test_a_file_an_object_and_an_importable_name_are_one_study(file, monkeypatch):
    """The same numbers, and a store of one that the command resumes."""
    by_file = esl.study.run_study(
        esl.study.Study.from_toml(file / "study.toml"), file / "by_file.zarr"
    )
    here = esl.study.Study({"rate": 0.1}, GRID, problem=bowl)
    monkeypatch.syspath_prepend(file)
    named = esl.study.Study({"rate": 0.1}, GRID, problem="mine:bowl")
    fixed = esl.study.Study({"rate": 0.1}, {"seed": [0, 1]}, problem=bowl(1.0))
    for study in (here, named):
        results = esl.study.run_study(study, file / f"{study is here}.zarr")
        np.testing.assert_array_equal(results["gap"], by_file["gap"])
    fixed = esl.study.run_study(fixed, file / "fixed.zarr")
    np.testing.assert_array_equal(fixed["gap"], by_file["gap"][0, 0])
    # A study is read without its problem.
    (file / "mine.py").unlink()
    kept = esl.study.open_study(file / "by_file.zarr")
    np.testing.assert_array_equal(kept["gap"], by_file["gap"])
    assert tomllib.loads(kept.attrs["study"])["problem"]["name"] == "mine.py:bowl"


def test_keywords_that_change_arrays_alone_share_one_program(tmp_path, monkeypatch):
    """Stiffness and noise are arrays of the problem; the number of members is a shape."""
    traced = []
    plain = runs._one
    monkeypatch.setattr(runs, "_one", lambda *given: traced.append(1) or plain(*given))
    grid = {"members": [5, 7], "stiffness": [1.0, 2.0, 3.0], "noise": [1e-3, 1e-2], "seed": [0, 1]}
    study = esl.study.Study({"rate": 0.1}, grid, problem=bowl)
    esl.study.run_study(study, tmp_path / "study.zarr")
    # A program is traced once for its shapes and once to be compiled.
    assert len(traced) <= 4
    assert len(traced) >= 2


def test_rates_are_found_at_a_target(tmp_path):
    """On keys of the search alone: the mean loss there is the target, whatever the run has."""
    grid = {"schedule": ["constant", "linear_decay"], "seed": [0, 1]}
    study = esl.study.Study({"target": 0.2, "match_runs": 3}, grid, problem=bowl)
    results = esl.study.run_study(study, tmp_path / "study.zarr")
    assert (results["done"] == 1).all()
    problem = bowl()
    for name in grid["schedule"]:
        for seed in grid["seed"]:
            run = results.sel(schedule=name, seed=seed)
            schedule = esl.study.schedule_of(run)
            outcome = problem.run(schedule, jax.random.split(jax.random.key(seed))[0])
            np.testing.assert_allclose(
                float(run["final_loss"]), float(outcome.final_loss), rtol=1e-4
            )
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1 << 30))[0]
            losses = [problem.run(schedule, key).final_loss for key in jax.random.split(keys, 3)]
            np.testing.assert_allclose(np.mean(losses), 0.2, rtol=2e-3)
    assert np.unique(results["rate"]).size == 4
    # A rate that was found and given again is the same run.
    rate = float(results["rate"][0, 1])
    again = esl.study.Study({"rate": rate, "seed": 1}, {"schedule": ["constant"]}, problem=bowl)
    again = esl.study.run_study(again, tmp_path / "again.zarr")
    np.testing.assert_allclose(again["gap"][0], results["gap"][0, 1], rtol=1e-5)


def test_what_cannot_reach_the_target_has_failed(tmp_path):
    """The noise keeps the loss of a quadratic above a floor."""
    study = esl.study.Study({"noise": 0.1}, {"target": [0.3, 1e-6], "seed": [0]}, problem=bowl)
    results = esl.study.run_study(study, tmp_path / "study.zarr")
    assert results["done"].values.tolist() == [[1], [2]]
    assert "`target` must be a loss that constant can reach" in str(results["reason"][1, 0].values)
    assert np.isnan(float(results["rate"][1, 0]))


def still() -> esl.Problem:
    """Members that always start at the same places."""
    start = 1 + jax.random.normal(jax.random.key(5), (4, 2))
    return esl.Problem(esl.Quadratic(1.0), members=4, steps=10, snapshots=10, start=start)


def test_an_optimized_schedule_is_found_and_taken_home(tmp_path):
    """Its Σ is the least at the target; its knots are those of the run."""
    base = {"target": 0.1, "iterations": 15, "knots": 3, "match_runs": 1}
    study = esl.study.Study(base, {"schedule": ["constant", "optimized"]}, problem=still)
    results = esl.study.run_study(study, tmp_path / "study.zarr").load()
    assert (results["done"] == 1).all()
    sigma = results["entropy_production"].values
    assert sigma[1] < 0.95 * sigma[0]
    np.testing.assert_allclose(results["final_loss"], 0.1, rtol=2e-3)
    assert np.isnan(results["knots"].values[0]).all()
    schedule: Any = esl.study.schedule_of(results.sel(schedule="optimized"))
    np.testing.assert_allclose(schedule.values, results["knots"].values[1], rtol=1e-6)
    outcome = still().run(schedule, jax.random.split(jax.random.key(0))[0])
    np.testing.assert_allclose(sigma[1], float(outcome.report.entropy_production), rtol=1e-4)
    assert float(results["rate"][1]) == results["knots"].values[1].max()
    assert schedule.to_optax(10)(0) > 0


def test_searches_of_one_shape_share_a_program(tmp_path):
    """The target, the seed and the arrays of the problem are data of the search."""
    from esljax.optimization import lagrangian

    base = {"iterations": 2, "knots": 2, "schedule": "optimized", "members": 6, "match_runs": 1}
    grid = {"stiffness": [1.0, 2.0], "target": [0.2], "seed": [0, 1]}
    before = lagrangian.Compiled.step._cached._cache_size()
    esl.study.run_study(esl.study.Study(base, grid, problem=bowl), tmp_path / "study.zarr")
    assert lagrangian.Compiled.step._cached._cache_size() - before == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda folder: (folder / "mine.py").write_text(FILE.format(factor=2.0)), "the content of"),
        (
            lambda folder: (folder / "study.toml").write_text(
                (folder / "study.toml").read_text().replace("rate = 0.1", "rate = 0.2")
            ),
            "base.rate, 0.1 there and 0.2 here",
        ),
        (
            lambda folder: (folder / "study.toml").write_text(
                (folder / "study.toml").read_text().replace("rate", "noise = 0.2\nrate")
            ),
            "base.noise, 0.001 there and 0.2 here",
        ),
    ],
)
def test_what_differs_is_said(changed, words, file, refused):
    study = esl.study.Study.from_toml(file / "study.toml")
    esl.study.run_study(study, file / "study.zarr")
    resumed = esl.study.run_study(
        esl.study.read_study(file / "study.zarr"), file / "study.zarr", executor=Idle()
    )
    assert (resumed["done"] == 1).all()
    changed(file)
    again = esl.study.Study.from_toml(file / "study.toml")
    refused(lambda: esl.study.run_study(again, file / "study.zarr"), words)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"grid": {"steps": [1]}}, "`grid` must hold settings of a run .*fixes itself"),
        ({"base": {"steps": 1}}, "`base` must hold settings of a run .*fixes itself"),
        ({"base": esl.RunConfig(members=6, hidden=(2,))}, "'hidden', which .*bowl fixes itself"),
        ({"grid": {"stiffnes": [1.0]}}, "`grid` must be one of .*'stiffnes'"),
        ({"grid": {"stiffness": ["a"]}}, "`stiffness` must be a number"),
        ({"grid": {"stiffness": [None]}}, "`stiffness` must be a value"),
        ({"grid": {"rate": [0.1], "target": [0.2]}}, "`rate` must be left out"),
        ({"grid": {"schedule": ["wave"]}}, "`schedule` must be one of .*'optimized'"),
        ({"problem": "nowhere.py:bowl"}, "there is no file"),
        ({"problem": lambda gap=1.0: bowl()}, "keyword `gap`"),
        ({"problem": 3}, "`problem` must be a Problem"),
    ],
    # Functions print their place in memory, which differs from worker to worker.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_bad_studies_of_a_problem_are_refused(given, sentence, refused):
    whole = {"grid": {"seed": [0]}, "problem": bowl} | given
    refused(lambda: esl.study.Study(**whole), sentence)


def test_a_metric_with_a_name_of_the_store_is_refused(tmp_path, refused):
    taken = dataclasses.replace(bowl(), metrics={"gap": bowl().metrics["size"]})
    study = esl.study.Study(grid={"seed": [0]}, problem=taken)
    refused(lambda: esl.study.run_study(study, tmp_path / "s.zarr"), "`metrics` must have names")
    assert not (tmp_path / "s.zarr").exists()


class Elsewhere(esl.study.executors.InProcess):
    """Runs tasks that were pickled on the way, as another process would."""

    def submit(self, fn, /, *args) -> Future:
        self.sent = pickle.dumps(args)
        return super().submit(fn, *pickle.loads(self.sent))


@pytest.mark.parametrize("given", ["closure", "problem", "file"])
def test_objects_travel(given, file, monkeypatch):
    scale = jnp.asarray(2.0)

    def closure(stiffness: float = 1.0) -> esl.Problem:
        return bowl(stiffness * float(scale))

    monkeypatch.setattr("esljax.study.run.InProcess", type("Other", (), {}))
    problem = {"closure": closure, "problem": bowl(), "file": str(file / "mine.py:bowl")}[given]
    study = esl.study.Study({"rate": 0.1}, {"seed": [0, 1]}, problem=problem)
    results = esl.study.run_study(study, file / "s.zarr", executor=Elsewhere())
    expected = bowl(2.0 if given == "closure" else 1.0)
    outcome = expected.run(esl.Constant(0.1), jax.random.split(jax.random.key(1))[0])
    np.testing.assert_allclose(float(results["final_loss"][1]), outcome.final_loss, rtol=1e-5)


def test_what_cannot_travel_is_named(refused):
    import threading

    lock = threading.Lock()

    def guarded() -> esl.Problem:
        with lock:
            return bowl()

    refused(
        lambda: parcels.parcel(parcels.Source.of(guarded)),
        "`problem` must travel to other processes, but `lock`, which it uses, is a lock",
    )


def test_the_first_task_is_small_and_the_next_take_a_few_seconds():
    study = esl.study.Study(esl.RunConfig(data="moons"), {"seed": range(100)})
    cut, sizes = pace.Pace(study, study.slices(32), fixed=None, width=None), []
    while (part := cut.next()) is not None:
        sizes.append(len(part.indices))
        # The first one compiles for a minute; then each run takes a quarter of a second.
        cut.took(part, 60.0 if len(sizes) == 1 else 0.25 * len(part.indices))
    assert sizes[:3] == [1, 1, 12]
    assert sum(sizes) == 100
    assert max(sizes) == 12
    whole, sizes = pace.Pace(study, study.slices(32), fixed=32, width=None), []
    while (part := whole.next()) is not None:
        sizes.append(len(part.indices))
    assert sizes == [32, 32, 32, 4]


def test_optimized_runs_are_tasks_of_their_own():
    study = esl.study.Study(grid={"schedule": ["constant", "optimized"], "seed": range(4)})
    cut, kinds = pace.Pace(study, study.slices(32), fixed=None, width=None), []
    while (part := cut.next()) is not None:
        kinds.append([point.schedule for point in part.points])
        cut.took(part, 0.01 if part.points[0].schedule == "constant" else 100.0)
    assert kinds == [["constant"], ["constant"] * 3, *[["optimized"]] * 4]


def test_a_complete_store_has_consolidated_metadata(tmp_path, recwarn):
    import xarray

    study = esl.study.Study({"rate": 0.1}, {"seed": [0, 1]}, problem=bowl)
    results = esl.study.run_study(study, tmp_path / "s.zarr")
    metadata = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())
    assert "gap" in metadata["consolidated_metadata"]["metadata"]
    recwarn.clear()
    opened = xarray.open_zarr(tmp_path / "s.zarr", consolidated=True)
    np.testing.assert_array_equal(opened["gap"].values, results["gap"].values)
    assert not recwarn.list, [str(each.message) for each in recwarn.list]
    # What is damaged there is found, though esljax does not read it.
    metadata["consolidated_metadata"]["metadata"]["gap"]["fill_value"] = 1.0
    (tmp_path / "s.zarr" / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(esl.InputError, match="consolidated"):
        esl.study.open_study(tmp_path / "s.zarr")
    inside: Any = zarr.open_group(tmp_path / "s.zarr", mode="r")["gap"]
    assert inside.fill_value == 1.0


def test_the_commands(file, capsys):
    """Run with a problem on the command line, show with four digits, plot."""
    (file / "other.toml").write_text(
        "[grid]\nstiffness = [0.1234567, 2.0]\ntarget = [0.2, 0.3]\nseed = [0, 1]\n"
    )
    code = main(
        ["study", "run", f"{file}/other.toml", "--problem", f"{file}/mine.py:bowl", "--quiet"]
    )
    assert code in (0, 1)
    assert main(["study", "show", f"{file}/other.zarr"]) == 0
    shown = capsys.readouterr().out
    assert "0.1235" in shown
    assert "0.1234567" not in shown
    assert "size" in shown
    for flags in ([], ["--x", "target", "--y", "size", "--hue", "stiffness"], ["--panels"]):
        out = f"{file}/figure{len(flags)}.png"
        assert main(["study", "plot", f"{file}/other.zarr", "--out", out, *flags]) == 0
    assert main(["study", "plot", f"{file}/other.zarr", "--x", "nothing"]) == 2
    assert "`x` must be a setting that varies or a number" in capsys.readouterr().err
