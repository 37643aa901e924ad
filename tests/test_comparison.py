"""Matched endpoints and judgments, on two moons with a small network."""

import json
import math

import jax
import numpy as np
import pytest

import esljax as esl
from esljax.experiment import comparison
from esljax.files.storage import write_json, write_toml


@pytest.fixture(scope="module")
def problem():
    data = esl.datasets.two_moons(300)
    potential = esl.FlaxLoss(esl.models.mlp(2, 8, 2), data.train, batch_size=32, l2=1e-4)
    return comparison.Problem(
        potential, data.test, 1e-6, esl.ExactTransport(), members=6, steps=20, snapshots=5
    )


def test_table_reads_the_same_rates(problem):
    for shape in comparison.usual_shapes().values():
        np.testing.assert_allclose(
            problem.table(shape).rates(20), shape.rates(20), rtol=1e-6, atol=1e-7
        )


def test_run_is_the_simulation_that_it_says(problem):
    """One run, rebuilt from the public pieces."""
    key = jax.random.key(3)
    outcome = problem.run(esl.Constant(0.2), key)
    start_key, path_key = jax.random.split(key)
    start = problem.potential.init(members=6, key=start_key)
    path = esl.simulate(
        problem.potential, esl.Langevin(0.2, 1e-6), start, steps=20, snapshots=5, key=path_key
    )
    losses = [float(problem.potential.energy(member)) for member in path.final]
    np.testing.assert_allclose(outcome.final_loss, np.mean(losses), rtol=1e-5)
    logits = problem.potential.predict(path.final, problem.test.inputs)
    np.testing.assert_allclose(
        outcome.test_accuracy,
        np.mean(np.argmax(logits, -1) == np.asarray(problem.test.labels)),
        rtol=1e-6,
    )


def test_match_endpoint_meets_the_target_on_its_keys(problem):
    keys = jax.random.split(jax.random.key(0), 2)
    target = comparison.final_loss(problem, esl.Constant(0.2), keys)
    trials = []
    for name, shape in comparison.usual_shapes().items():
        matched = comparison.match_endpoint(
            problem,
            shape,
            target=target,
            learning_time=4.0,
            keys=keys,
            name=name,
            watch=trials.append,
        )
        loss = np.mean([problem.run(matched, key).final_loss for key in keys])
        assert abs(loss / target - 1) < 1e-3, name
        # The shape is kept: only its scale moved.
        ratio = np.asarray(matched.values[1:-1]) / np.asarray(problem.table(shape).values[1:-1])
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert len(trials) <= 4 * len(comparison.usual_shapes())


def test_unreachable_target_lists_what_was_tried(problem):
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(
        esl.InputError,
        match="Argument `target` must be a loss that cosine can reach, but is 1e-06: scaling the rates gave",
    ):
        comparison.match_endpoint(
            problem, esl.Cosine(1.0), target=1e-6, learning_time=4.0, keys=keys, name="cosine"
        )
    with pytest.raises(esl.InputError, match="positive sum"):
        comparison.match_endpoint(
            problem, esl.Constant(0.0), target=0.5, learning_time=4.0, keys=keys
        )


def test_judge_averages_single_runs(problem):
    keys = jax.random.split(jax.random.key(5), 4)
    judgment = comparison.judge(problem, esl.Constant(0.2), keys)
    outcomes = [problem.run(esl.Constant(0.2), key) for key in keys]
    gaps = np.array([outcome.report.gap for outcome in outcomes])
    losses = np.array([outcome.final_loss for outcome in outcomes])
    np.testing.assert_allclose(judgment.report.gap, gaps.mean(), rtol=1e-4)
    np.testing.assert_allclose(judgment.report.standard_error.gap, gaps.std(ddof=1) / 2, rtol=1e-3)
    np.testing.assert_allclose(judgment.final_loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(judgment.final_loss_error, losses.std(ddof=1) / 2, rtol=1e-3)
    with pytest.raises(esl.InputError, match="at least 2"):
        comparison.judge(problem, esl.Constant(0.2), keys[:1])


def test_ratio_is_paired(problem):
    """Common keys cancel: the error of the ratio is far below that of two independent judgments."""
    keys = jax.random.split(jax.random.key(6), 6)
    fast, slow = (comparison.judge(problem, esl.Constant(rate), keys) for rate in (0.22, 0.2))
    mean, error = comparison.ratio(fast, slow)
    ratios = np.asarray(fast.entropy_productions) / np.asarray(slow.entropy_productions)
    np.testing.assert_allclose(mean, ratios.mean(), rtol=1e-6)
    np.testing.assert_allclose(error, ratios.std(ddof=1) / np.sqrt(6), rtol=1e-6)
    spread = (
        np.std(np.asarray(slow.entropy_productions), ddof=1)
        / np.sqrt(6)
        / np.mean(np.asarray(slow.entropy_productions))
    )
    assert error < spread


def test_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")], "z": math.pi})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "x": None,
        "y": [1.5, None],
        "z": math.pi,
    }
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert "null" in (tmp_path / "a.json").read_text(), "the old file stays"
    write_toml(tmp_path / "b.toml", {"a": 1, "b": None})
    assert (tmp_path / "b.toml").read_text() == "a = 1\n"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.toml"}
