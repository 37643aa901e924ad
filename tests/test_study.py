"""Studies: the content of the store, and that no number depends on how it was run."""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import Future

import jax
import numpy as np
import pytest
import zarr
from studies import BASE, GRID, Idle

import esljax as esl
from esljax.experiment import choices, runs
from esljax.figures import plot_settings
from esljax.study import store as study_store

DIMENSIONS = {"rate": 3, "members": 2, "schedule": 2, "seed": 2}
QUANTITIES = {
    *("entropy_production", "length_squared", "w2_squared", "gap", "temporal", "geometric"),
    *("learning_time", "final_loss", "test_accuracy", "noise_floor"),
}


# The networks are tiny, so the programs are compiled without most optimizations.
pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")


@pytest.fixture(scope="module")
def grid_store(tmp_path_factory):
    """A study of 24 runs in two shapes, in tasks of at most 8 runs: (its path, its progress)."""
    path, seen = tmp_path_factory.mktemp("grid") / "grid.zarr", []
    esl.study.run_study(esl.study.Study(BASE, grid=GRID), path, task_size=8, watch=seen.append)
    return path, seen


# The numbers


def test_a_run_is_the_simulation_that_its_settings_describe():
    """Rebuilt from the public functions."""
    config = dataclasses.replace(
        BASE, schedule="cosine", rate=0.7, temperature=1e-3, l2=0.01, seed=5
    )
    outcome = esl.run(config)
    data = esl.datasets.two_moons()
    potential = esl.FlaxLoss(esl.models.mlp(2, 4, 2), data.train, batch_size=32, l2=0.01)
    run_key, _ = jax.random.split(jax.random.key(5))
    start_key, path_key = jax.random.split(run_key)
    start = potential.init(members=8, key=start_key)
    path = esl.simulate(
        potential, esl.Langevin(esl.Cosine(0.7), 1e-3), start, steps=10, snapshots=5, key=path_key
    )
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    for name in QUANTITIES - {"final_loss", "test_accuracy"}:
        # Reductions of another program round differently; a difference has the error of its terms.
        error = 1e-5 * float(report.entropy_production)
        np.testing.assert_allclose(
            getattr(outcome.report, name),
            getattr(report, name),
            rtol=1e-5,
            atol=error,
            err_msg=name,
        )
    np.testing.assert_allclose(outcome.final_loss, potential(path.final).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        outcome.test_accuracy, potential.accuracy(path.final, data.test).mean(), rtol=1e-5
    )


def test_a_study_holds_the_same_bits_as_each_run_alone(grid_store):
    """In tasks of eight, with padding, beside other rates, schedules and seeds."""
    results = esl.study.open_study(grid_store[0])
    study = esl.study.Study(BASE, grid=GRID)
    for index in (0, 9, 13, 22):
        config = study.point(index)
        outcome = esl.run(config)
        stored = results.sel(
            rate=config.rate, members=config.members, schedule=config.schedule, seed=config.seed
        )
        for name in QUANTITIES - {"final_loss", "test_accuracy"}:
            assert float(stored[name]) == float(getattr(outcome.report, name)), name
        assert float(stored["final_loss"]) == float(outcome.final_loss)
        assert float(stored["test_accuracy"]) == float(outcome.test_accuracy)
    assert np.unique(results["entropy_production"]).size == 24


@pytest.mark.parametrize("listed", [False, True])
def test_no_number_depends_on_how_it_was_batched(listed, grid_store, tmp_path):
    """Runs go through the same operations one after another, whatever shares their task."""
    first = esl.study.open_study(grid_store[0]).load()
    study = esl.study.Study(BASE, grid=GRID)
    if listed:
        study = esl.study.Study(
            BASE,
            points=[
                {name: getattr(study.point(i), name) for name in GRID} for i in reversed(range(24))
            ],
        )
    second = esl.study.run_study(
        study, tmp_path / "second.zarr", task_size=8 if listed else 3
    ).load()
    for name in QUANTITIES:
        theirs = second[name].values[::-1] if listed else second[name].values.reshape(-1)
        np.testing.assert_array_equal(first[name].values.reshape(-1), theirs, err_msg=name)


def test_side_by_side_is_the_same_to_rounding(grid_store, tmp_path):
    """Four runs at a time add up in another order: single precision, ten steps.

    A difference has the error of its terms.
    """
    first = esl.study.open_study(grid_store[0]).sel(members=8).load()
    second = esl.study.run_study(
        esl.study.Study(BASE, grid={name: GRID[name] for name in ("rate", "schedule", "seed")}),
        tmp_path / "s.zarr",
        width=4,
    )
    scale = first["entropy_production"].values
    for name in QUANTITIES:
        off = np.abs(first[name].values - second[name].values) / np.maximum(
            scale, np.abs(first[name].values)
        )
        assert off.max() < 3e-6, name


def test_side_by_side_half_done_alone_and_by_targets(tmp_path):
    """A store that was begun with one width and ended with another says so. Runs differ in every
    number that one program takes, and a run whose target no rate reaches fails alone."""
    points = [
        {"rate": 0.1, "seed": 0},
        {"rate": 0.2, "seed": 1, "temperature": 1e-3},
        {"rate": 0.4, "seed": 2, "l2": 1e-2, "schedule": "cosine"},
        {"rate": 0.3, "seed": 3},
        {"target": 0.6, "seed": 4},
        {"target": 1e-9, "seed": 5},
        {"target": 0.65, "seed": 6, "schedule": "cosine"},
    ]
    study = esl.study.Study(dataclasses.replace(BASE, match_runs=2), points=points)
    path, first, second = tmp_path / "wide.zarr", Counting(most=1), Counting()
    alone = esl.study.run_study(study, tmp_path / "alone.zarr").load()
    with pytest.raises(KeyboardInterrupt):
        esl.study.run_study(study, path, task_size=3, width=3, executor=first)
    assert json.loads(esl.study.open_study(path).attrs["widths"]) == [3]
    wide = esl.study.run_study(study, path, width=2, executor=second).load()
    assert (len(first.points), len(second.points)) == (3, 4)
    assert json.loads(wide.attrs["widths"]) == [2, 3]
    assert "widths" not in alone.attrs
    np.testing.assert_array_equal(alone["done"], [1, 1, 1, 1, 1, 2, 1])
    np.testing.assert_array_equal(wide["done"], alone["done"])
    assert wide["reason"].values.tolist() == alone["reason"].values.tolist()
    scale = alone["entropy_production"].values
    for name in QUANTITIES | {"rate"}:
        one, other = alone[name].values, wide[name].values
        off = np.abs(one - other) / np.maximum(scale, np.abs(one))
        assert np.nanmax(off) < 3e-6, name
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
    # What is copied from there is known for it.
    base = dataclasses.replace(BASE, match_runs=2)
    some = esl.study.Study(base, points=points[:2])
    copied = esl.study.run_study(some, tmp_path / "copy.zarr", reuse=[path])
    assert json.loads(copied.attrs["widths"]) == [2, 3]


def test_all_slices_of_a_shape_share_one_program(tmp_path, monkeypatch):
    traced = []
    plain = runs._one
    monkeypatch.setattr(runs, "_one", lambda *given: traced.append(1) or plain(*given))
    base, counts = dataclasses.replace(BASE, members=7), []
    study = esl.study.Study(
        base,
        grid={
            "rate": [0.1, 0.2],
            "schedule": ["constant", "cosine"],
            "temperature": [0, 1e-3],
            "seed": range(3),
        },
    )
    esl.study.run_study(
        study,
        tmp_path / "study.zarr",
        task_size=5,
        watch=lambda progress: counts.append(len(traced)),
    )
    assert len(counts) > 8
    assert counts[0] == 0
    assert set(counts[1:]) == {counts[1]}, "nothing is traced after the first task"


def test_jackknife_errors_are_those_of_the_run(tmp_path):
    base = dataclasses.replace(BASE, members=6, jackknife=6)
    results = esl.study.run_study(
        esl.study.Study(base, grid={"seed": [2]}), tmp_path / "study.zarr"
    )
    errors = esl.run(dataclasses.replace(base, seed=2)).report.standard_error
    for name in (
        "entropy_production",
        "length_squared",
        "w2_squared",
        "gap",
        "temporal",
        "geometric",
    ):
        assert float(results[f"{name}_error"][0]) == float(getattr(errors, name)) > 0
        assert "standard error" in results[f"{name}_error"].attrs["long_name"]
    assert esl.study.summarize(results)[0].errors["gap"] == float(errors.gap)


@pytest.mark.parametrize("transport", ["sliced", "sinkhorn", "gaussian"])
def test_every_point_has_its_own_transport(transport, tmp_path):
    """ε differs within a task; the directions of the sliced transport are drawn from the seed."""
    base = dataclasses.replace(BASE, transport=transport, directions=3, seed=4)
    results = esl.study.run_study(
        esl.study.Study(base, grid={"epsilon": [0.5, 2.0]}), tmp_path / "study.zarr"
    )
    problem = runs.make_problem(base, esl.ExactTransport())
    run_key, transport_key = jax.random.split(jax.random.key(4))
    distances = []
    for epsilon in (0.5, 2.0):
        made = {
            "sliced": lambda: esl.SlicedTransport(3, transport_key),
            "gaussian": esl.GaussianTransport,
        }
        chosen = made.get(transport, lambda epsilon=epsilon: esl.SinkhornTransport(epsilon))()
        outcome = dataclasses.replace(problem, transport=chosen).run(
            problem.table(esl.Constant(base.rate)), run_key
        )
        stored = results.sel(epsilon=epsilon)
        np.testing.assert_allclose(
            float(stored["w2_squared"]), outcome.report.w2_squared, rtol=1e-4
        )
        np.testing.assert_allclose(
            float(stored["entropy_production"]), outcome.report.entropy_production, rtol=1e-3
        )
        distances.append(float(stored["w2_squared"]))
    assert (distances[0] != distances[1]) == (transport == "sinkhorn")
    assert np.isnan(results["noise_floor"]).all(), "known for the exact transport alone"
    assert (results["done"] == 1).all(), "and its absence is no failure"


def test_double_precision_stays_within_its_runs(tmp_path):
    results = esl.study.run_study(
        esl.study.Study(BASE, grid={"dtype": ["float32", "float64"]}), tmp_path / "study.zarr"
    )
    single, double = results["w2_squared"].values
    assert single == np.float32(single)
    assert double != np.float32(double)
    assert not jax.config.jax_enable_x64


def test_schedules_are_those_that_are_compared():
    field = next(field for field in dataclasses.fields(esl.RunConfig) if field.name == "schedule")
    assert choices(field.type) == (*esl.usual_shapes(), "optimized")


@pytest.mark.slow
def test_memory_is_estimated_within_a_factor_of_three():
    """Against the memory that XLA plans for the compiled run."""
    jax.config.update("jax_disable_most_optimizations", False)
    for config in (
        BASE,
        dataclasses.replace(BASE, data="teacher", hidden=(32,), members=16, batch_size=0),
    ):
        problem = runs._problem(runs.shape_of(config), config.dtype, ())
        numbers = jax.tree.map(lambda x: x[0], runs._numbers((config,)))
        numbers = numbers._replace(rates=problem.table(esl.Constant(0.1)).values)
        needed = (
            runs._alone.lower(problem, runs.shape_of(config), numbers)
            .compile()
            .compiled.memory_analysis()
            .temp_size_in_bytes
        )
        assert 1 / 3 < runs.memory_of_a_run(config) / needed < 3
    jax.config.update("jax_disable_most_optimizations", True)


def test_width_is_one_on_a_cpu_and_what_fits_elsewhere():
    assert runs.fitting_width(BASE, 32) == 1
    assert runs.fitting_width(BASE, 32, budget=5.5 * runs.memory_of_a_run(BASE)) == 5
    assert runs.fitting_width(BASE, 32, budget=1e15) == 32
    assert runs.fitting_width(BASE, 32, budget=1.0) == 1


# The store


def test_the_store_is_labelled(grid_store):
    path, _ = grid_store
    results = esl.study.open_study(path)
    assert dict(results.sizes) == DIMENSIONS
    assert {name: list(results[name].values) for name in GRID} == GRID
    assert set(results.data_vars) == QUANTITIES | {"converged", "done", "reason"}
    for name in QUANTITIES:
        assert results[name].dims == tuple(GRID)
        assert results[name].attrs["units"]
        assert results[name].attrs["long_name"]
    assert results["done"].dtype == np.int8
    assert (results["done"] == 1).all()
    assert results["converged"].all()
    assert (results["reason"] == "").all()
    np.testing.assert_allclose(
        results["gap"], results["entropy_production"] - results["w2_squared"], rtol=1e-4, atol=1e-6
    )
    assert esl.study.Study.from_dict(tomllib.loads(results.attrs["study"])) == esl.study.Study(
        BASE, grid=GRID
    )
    assert json.loads(results.attrs["versions"])["jax"] == jax.__version__
    assert set(results.attrs) == {"version", "study", "task_size", "created", "versions", "commit"}
    assert json.loads((path / "zarr.json").read_text())["zarr_format"] == 3
    assert zarr.open_group(path, mode="r")["gap"].chunks == (2, 1, 2, 2)
    assert not list(path.parent.glob("*.lock"))
    assert float(results.sel(rate=0.4, schedule="cosine", members=6, seed=1)["w2_squared"]) > 0


def test_progress_is_reported_task_by_task(grid_store):
    seen = grid_store[1]
    assert [progress.done for progress in seen] == [0, 8, 16, 20, 24]
    assert [progress.fresh for progress in seen] == [0, 8, 16, 20, 24]
    assert all(progress.runs == 24 and progress.failed == 0 for progress in seen)


class Counting(esl.study.executors.InProcess):
    """Records the points that it ran, and is interrupted after some tasks."""

    def __init__(self, most=10**9):
        self.points, self.most = [], most

    def submit(self, fn, /, *args) -> Future:
        if self.most == 0:
            raise KeyboardInterrupt
        self.most -= 1
        self.points += args[0].points
        return super().submit(fn, *args)


def test_a_stopped_study_resumes_where_it_was(grid_store, tmp_path):
    study, first, second = esl.study.Study(BASE, grid=GRID), Counting(most=2), Counting()
    with pytest.raises(KeyboardInterrupt):
        esl.study.run_study(study, tmp_path / "study.zarr", task_size=8, executor=first)
    half = esl.study.open_study(tmp_path / "study.zarr").load()
    assert int((half["done"] == 1).sum()) == len(first.points) == 16
    assert np.isnan(half["gap"].values[half["done"].values == 0]).all()
    # The task size is the store's.
    results = esl.study.run_study(study, tmp_path / "study.zarr", executor=second).load()
    assert len(second.points) == 8
    assert not set(first.points) & set(second.points)
    same(results, esl.study.open_study(grid_store[0]).load())
    assert esl.study.run_study(
        study, tmp_path / "study.zarr", executor=(third := Counting())
    ).equals(results)
    assert third.points == []


def same(results, others):
    """Every number, reason and mark is the same, bit for bit."""
    for name in others.data_vars:
        np.testing.assert_array_equal(results[name].values, others[name].values, err_msg=name)


@pytest.mark.parametrize("written", [0, 1, 7, 11, 12, 13])
def test_runs_that_count_as_done_are_on_disk(written, grid_store, tmp_path, monkeypatch):
    """The writer ends between any two files of a task."""
    study, calls = esl.study.Study(BASE, grid=GRID), []
    plain = zarr.Array.set_coordinate_selection

    def dies(self, *given, **more):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(self.name)
        plain(self, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "set_coordinate_selection", dies)
        with pytest.raises(KeyboardInterrupt):
            esl.study.run_study(study, tmp_path / "study.zarr", task_size=8)
    assert not (esl.study.open_study(tmp_path / "study.zarr")["done"] != 0).any()
    same(
        esl.study.run_study(study, tmp_path / "study.zarr").load(),
        esl.study.open_study(grid_store[0]).load(),
    )


def test_a_failed_run_is_stored_with_its_reason(tmp_path):
    study = esl.study.Study(BASE, points=[{"seed": 1}, {"rate": 1e30}, {"seed": 2}])
    results = esl.study.run_study(study, tmp_path / "study.zarr")
    assert results["done"].values.tolist() == [1, 2, 1]
    assert results["reason"].values.tolist()[::2] == ["", ""]
    assert "diverged: the final loss is nan" in str(results["reason"].values[1])
    assert np.isfinite(results["gap"].values[[0, 2]]).all()
    assert results["rate"].values.tolist() == [0.25, 1e30, 0.25]
    assert [(group.settings, group.runs) for group in esl.study.summarize(results)] == [
        ({"rate": 0.25}, 2),
        ({"rate": 1e30}, 0),
    ]


def test_a_failed_task_is_stored_and_run_again_on_request(tmp_path, monkeypatch):
    study = esl.study.Study(BASE, grid={"members": [5, 6], "seed": [0, 1]})
    plain = runs.make_problem

    def breaks(config, *given):
        if config.members == 5:
            raise MemoryError("no room\nfor it")
        return plain(config, *given)

    runs._problem.cache_clear()
    monkeypatch.setattr(runs, "make_problem", breaks)
    results = esl.study.run_study(study, tmp_path / "study.zarr")
    assert results["done"].values.tolist() == [[2, 2], [1, 1]]
    assert set(results["reason"].values[0]) == {"MemoryError: no room"}
    monkeypatch.setattr(runs, "make_problem", plain)
    assert esl.study.run_study(study, tmp_path / "study.zarr")["done"].values.tolist() == [
        [2, 2],
        [1, 1],
    ]
    again = esl.study.run_study(
        study, tmp_path / "study.zarr", retry=True, executor=(counting := Counting())
    )
    assert again["done"].values.tolist() == [[1, 1], [1, 1]]
    assert (again["reason"] == "").all()
    assert [point.members for point in counting.points] == [5, 5]


def test_a_study_is_extended_by_the_runs_of_another(grid_store, tmp_path):
    """Only new runs are computed, and all numbers are those of a study that reused nothing."""
    path, _ = grid_store
    larger = esl.study.Study(
        dataclasses.replace(BASE, rate=0.1),
        grid={"members": [6], "schedule": ["cosine", "constant"], "seed": [1, 2, 3]},
    )
    fresh = esl.study.run_study(larger, tmp_path / "fresh.zarr").load()
    results = esl.study.run_study(
        larger, tmp_path / "study.zarr", reuse=[path], executor=(counting := Counting())
    )
    assert {(point.schedule, point.seed) for point in counting.points} == {
        ("cosine", 2),
        ("constant", 2),
    }
    same(results.load(), fresh)
    reused = json.loads(results.attrs["reused"])
    assert list(reused) == [str(path)]
    assert reused[str(path)]["created"] == esl.study.open_study(path).attrs["created"]
    assert "reused" not in fresh.attrs
    # Standard errors of runs without a jackknife are NaN.
    rows = study_store.StudyStore(path, zarr.open_group(path, mode="r")).read(
        np.array([3]), ("gap", "gap_error")
    )
    assert rows.numbers["gap"] == esl.study.open_study(path)["gap"].values.reshape(-1)[3]
    assert np.isnan(rows.numbers["gap_error"])


def test_failed_runs_are_not_reused(tmp_path):
    failing = esl.study.Study(BASE, points=[{"rate": 1e30}, {"rate": 0.1}])
    esl.study.run_study(failing, tmp_path / "failing.zarr")
    again = esl.study.run_study(
        failing,
        tmp_path / "again.zarr",
        reuse=[tmp_path / "failing.zarr"],
        executor=(counting := Counting()),
    )
    assert [point.rate for point in counting.points] == [1e30]
    assert again["done"].values.tolist() == [2, 1]


def test_stores_that_cannot_be_reused_are_rejected(grid_store, tmp_path, refused):
    path, _ = grid_store
    study = esl.study.Study(BASE, grid={"seed": [1]})
    refused(
        lambda: esl.study.run_study(study, tmp_path / "s.zarr", reuse=path),
        "Argument `reuse` must be a list of stores",
    )
    refused(
        lambda: esl.study.run_study(study, tmp_path / "s.zarr", reuse=[tmp_path / "no.zarr"]),
        "must be the store of a study, but there is nothing",
    )
    shutil.copytree(path, tmp_path / "old.zarr")
    store = study_store.StudyStore(tmp_path / "old.zarr", zarr.open_group(tmp_path / "old.zarr"))
    versions = json.loads(store.attributes["versions"])
    store.record({"versions": json.dumps({**versions, "jax": "0.1"})})
    refused(
        lambda: esl.study.run_study(
            study, tmp_path / "s.zarr", reuse=[tmp_path / "old.zarr"], executor=Idle()
        ),
        "`reuse` must be a store made with the installed versions, but .*old.zarr differs: "
        f"jax 0.1 there and {jax.__version__} here",
    )


def test_memory_is_predicted_once_for_each_shape(tmp_path, monkeypatch):
    """A study of very many runs starts at once."""
    plans, plain = [], esl.Problem.plan_memory
    monkeypatch.setattr(
        esl.Problem,
        "plan_memory",
        lambda self, **more: plans.append(self.members) or plain(self, **more),
    )
    runs._memory.cache_clear()
    study = esl.study.Study(BASE, grid={"members": [6, 8], "rate": [0.1, 0.2], "seed": range(20)})
    study_store.check_memory(study, study.slices(4))
    assert plans == [6, 8]


def test_another_study_is_rejected(grid_store, refused, tmp_path):
    path, _ = grid_store
    other = {**GRID, "rate": [0.1, 0.4, 1.7]}
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid=other), path),
        r"Argument `out` must be the store of this study, but .* grid.rate, \[0.1",
    )
    refused(
        lambda: esl.study.run_study(
            esl.study.Study(dataclasses.replace(BASE, l2=0.5), grid=GRID), path
        ),
        "differs in base.l2, 0.0001 there and 0.5 here",
    )
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid=dict(reversed(GRID.items()))), path),
        "differs in the order of its dimensions",
    )
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, points=[{"seed": 1}]), path),
        "differs in points, absent there and .*seed",
    )
    (tmp_path / "file.zarr").write_text("precious")
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid=GRID), tmp_path / "file.zarr"),
        "must be the store of a study",
    )
    zarr.create_group(tmp_path / "other.zarr")
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid=GRID), tmp_path / "other.zarr"),
        "must be the store of a study",
    )
    refused(
        lambda: esl.study.open_study(tmp_path / "nothing.zarr"),
        "must be the store of a study, but there is nothing at",
    )
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid=GRID), tmp_path / "no" / "s.zarr"),
        "Argument `out` must be in a folder",
    )
    assert (tmp_path / "file.zarr").read_text() == "precious"


def test_wrong_types_are_rejected(tmp_path, refused):
    study = esl.study.Study(BASE, grid=GRID)
    refused(
        lambda: esl.study.run_study(GRID, tmp_path / "s.zarr"), "Argument `study` must be a Study"
    )
    refused(
        lambda: esl.study.run_study(study, tmp_path / "s.zarr", task_size=0),
        "Argument `task_size` must be an integer of at least 1",
    )
    refused(
        lambda: esl.study.run_study(study, tmp_path / "s.zarr", width=-1),
        "Argument `width` must be an integer of at least 1",
    )
    refused(
        lambda: esl.study.run_study(study, tmp_path / "s.zarr", executor=4),
        "Argument `executor` must be a concurrent.futures.Executor",
    )
    assert list(tmp_path.iterdir()) == []


def test_studies_that_do_not_fit_are_rejected(tmp_path, refused, monkeypatch):
    study = esl.study.Study(BASE, grid={"seed": range(100_000)})
    usage = type("Usage", (), {"free": 5e6})
    with monkeypatch.context() as patched:
        patched.setattr(study_store.shutil, "disk_usage", lambda path: usage)
        refused(
            lambda: esl.study.run_study(study, tmp_path / "s.zarr", executor=Idle()),
            "Argument `out` must have room for 100,000 runs, about .* has 5.0 MB left",
        )
    with monkeypatch.context() as patched:
        patched.setattr(study_store, "memory_of_the_machine", lambda: 2e7)
        refused(
            lambda: esl.study.run_study(study, tmp_path / "s.zarr", executor=Idle()),
            "`grid` must fit in the 20.0 MB of memory .*, but the results of 100,000 runs need",
        )
    vast = esl.study.Study(BASE, grid={"members": [8, 10_000_000]})
    refused(
        lambda: esl.study.run_study(vast, tmp_path / "v.zarr"),
        "Argument `members` must fit in the .* of memory .* 10000000 members .* need about",
    )
    assert not (tmp_path / "s.zarr").exists()


def test_one_writer_at_a_time(tmp_path, refused):
    """A second writer is rejected while the first lives, and succeeds when it has been killed."""
    study, lock = esl.study.Study(BASE, grid={"seed": [0]}), tmp_path / "study.zarr.lock"
    hold = (
        "import sys, time; from pathlib import Path; from esljax.files.storage import locked\n"
        f"with locked(Path({str(lock)!r}), 'out'): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refused(
            lambda: esl.study.run_study(study, tmp_path / "study.zarr"),
            f"Argument `out` must have no other writer, but process {holder.pid} of "
            f"{platform.node()} is writing it",
        )
        assert not (tmp_path / "study.zarr").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert json.loads(lock.read_text())["pid"] == holder.pid, "left behind"
    assert (esl.study.run_study(study, tmp_path / "study.zarr")["done"] == 1).all()
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    refused(
        lambda: esl.study.run_study(study, tmp_path / "study.zarr"),
        "process 1 of elsewhere is writing it .if it is dead, delete .*study.zarr.lock",
    )
    assert lock.exists()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    study = esl.study.Study(BASE, grid={"seed": [0]})
    (tmp_path / "study.zarr.123.part").mkdir()
    esl.study.run_study(study, tmp_path / "study.zarr")
    (tmp_path / "study.zarr" / "gap" / "c" / "0.abc.partial").write_text("half")
    esl.study.run_study(study, tmp_path / "study.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["study.zarr"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_missing_extra_is_named_with_a_command_that_installs_it(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    refused(
        lambda: esl.study.run_study(esl.study.Study(BASE, grid={"seed": [0]}), tmp_path / "s.zarr"),
        r"Studies need zarr, which is not installed: pip install 'xarray>=\S+' 'zarr>=\S+'",
    )
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(
            esl.InputError,
            match=r"Clusters need distributed, .*: pip install .*'distributed>=",
        ),
        esl.study.executors.scheduler("x"),
    ):
        pass


# Summaries and figures


def test_means_are_over_the_seeds(grid_store):
    results = esl.study.open_study(grid_store[0])
    groups = esl.study.summarize(results)
    assert len(groups) == 12
    for group in (groups[0], groups[7]):
        stored = results.sel(**group.settings)["gap"].values
        assert group.runs == 2
        np.testing.assert_allclose(group.means["gap"], stored.mean())
        np.testing.assert_allclose(group.errors["gap"], abs(stored[0] - stored[1]) / 2)


@pytest.mark.parametrize(
    ("grid", "rows", "scales"),
    [
        ({"rate": [0.1, 0.4, 1.6], "members": [6, 8], "seed": [3, 1]}, 2, ["log", "linear"]),
        ({"schedule": ["constant", "cosine"]}, 1, ["linear"]),
        ({"seed": [1]}, 1, ["linear"]),
    ],
)
def test_figures(grid, rows, scales, grid_store, tmp_path):
    results = esl.study.open_study(grid_store[0])
    fixed = {"schedule": "constant", "members": 8, "rate": 0.1, "seed": 3}
    some = results.sel({name: values for name, values in grid.items()}).sel(
        {name: fixed[name] for name in fixed if name not in grid}, drop=True
    )
    figure = plot_settings(esl.study.summarize(some))
    figure.savefig(tmp_path / "figure.png")
    panels = figure.axes
    assert len(panels) == 3 * rows
    assert [axes.get_xscale() for axes in panels[::3]] == scales
    assert [axes.get_ylabel() for axes in panels[:3]] == [
        "entropy production $\\Sigma$",
        "$W_2^2$, the limit",
        "gap $\\Sigma - W_2^2$",
    ]
    if rows == 2:
        drawn = panels[0].lines[0].get_xydata()
        means = results.sel(members=6, schedule="constant")["entropy_production"].mean("seed")
        np.testing.assert_allclose(drawn, np.stack([[0.1, 0.4, 1.6], means.values], axis=1))
        assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["6", "8"]
