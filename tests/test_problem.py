"""Any problem: potentials, starts, rules and metrics of one's own, held against bare loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

KEY = jax.random.key(2)
X = jnp.linspace(-1.0, 1.0, 20)
LINE = esl.FromFunction(lambda line: jnp.mean((line[0] + line[1] * X - 2 * X - 1) ** 2) + 0.1)


def start(key):
    return jax.random.normal(key, (6, 2))


def line(**settings):
    metrics = {
        "slope": lambda potential, lines, test: lines[:, 1],
        "error": lambda potential, lines, test: (lines[:, 0] + lines[:, 1] * test - 3) ** 2,
    }
    settings = {"start": start, "metrics": metrics, "test": 1.0, "snapshots": 5, **settings}
    return esl.Problem(LINE, members=6, steps=20, **settings)


def test_a_problem_without_a_network_is_a_loop_in_numpy():
    outcome = line().run(esl.Constant(0.3), KEY)
    lines = np.asarray(start(jax.random.split(KEY)[0]), float)
    path, x = [lines], np.asarray(X, float)
    for k in range(20):
        misfit = lines[:, :1] + lines[:, 1:] * x - 2 * x - 1
        slopes = np.stack([2 * misfit.mean(1), 2 * (misfit * x).mean(1)], axis=1)
        lines = lines - 0.3 * slopes
        if (k + 1) % 4 == 0:
            path.append(lines)
    misfit = lines[:, :1] + lines[:, 1:] * x - 2 * x - 1
    np.testing.assert_allclose(outcome.final_loss, np.mean(misfit**2) + 0.1, rtol=1e-5)
    np.testing.assert_allclose(outcome.metrics["slope"], lines[:, 1].mean(), rtol=1e-5)
    error = np.mean((lines.sum(axis=1) - 3) ** 2)
    np.testing.assert_allclose(outcome.metrics["error"], error, rtol=1e-4)
    assert outcome.test_accuracy is None
    # Members keep their order along a gradient flow of one minimum.
    sigma = 5 * sum(np.mean(np.sum((b - a) ** 2, 1)) for a, b in itertools.pairwise(path))
    np.testing.assert_allclose(outcome.report.entropy_production, sigma, rtol=1e-5)


def test_positions_rules_and_drives_of_ones_own():
    given = jnp.ones((6, 2))
    flow = functools.partial(esl.ProbabilityFlow, velocity=esl.AffineVelocity())
    problem = line(start=given, rule=flow, temperature=0.1, metrics={})
    path = problem.path(esl.Constant(0.1), KEY)
    np.testing.assert_array_equal(path.positions[0], given)
    assert np.all(np.asarray(path.law.injected) == 0)
    trap = esl.Driven(lambda center: esl.Quadratic(2.0, center), esl.Linear(0.0, 3.0))
    driven = esl.Problem(trap, members=6, steps=20, start=start)
    outcome = driven.run(esl.Constant(0.1), KEY)
    final = driven.path(esl.Constant(0.1), KEY).final
    truth = np.mean(np.sum((np.asarray(final) - 3) ** 2, axis=1))
    np.testing.assert_allclose(outcome.final_loss, truth, rtol=1e-5)


def test_accuracy_is_a_metric_where_labels_are_classes_and_nowhere_else():
    data = esl.datasets.two_moons(60)
    classes = esl.FlaxLoss(esl.models.mlp(2, 2), data.train)
    assert list(esl.Problem(classes, members=2, steps=2, snapshots=2, test=data.test).metrics) == [
        "test_accuracy"
    ]
    assert esl.Problem(classes, members=2, steps=2, snapshots=2).metrics == {}
    values = data.train.labels.astype(float)
    regression = esl.FlaxLoss(
        esl.models.mlp(2, 1), (data.train.inputs, values), loss="squared_error"
    )
    assert esl.Problem(regression, members=2, steps=2, snapshots=2, test=data.test).metrics == {}


def test_regression_with_two_metrics_is_compared():
    problem = line()
    shapes = {"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)}
    compare = functools.partial(
        esl.compare, problem, key=KEY, shapes=shapes, rate=0.05, judge_runs=2, match_runs=1
    )
    found = compare(iterations=4, knots=3)
    assert sorted(found.judgments) == ["constant", "cosine", "optimized", "retimed"]
    for judgment in found.judgments.values():
        assert sorted(judgment.metrics) == ["error", "slope"]
        assert judgment.standard_error.slope > 0
        # One run was matched, two others are judged: by the same keys for all.
        np.testing.assert_allclose(
            judgment.final_loss, found.judgments["cosine"].final_loss, rtol=0.03
        )
    without = compare(optimize=False)
    assert sorted(without.judgments) == ["constant", "cosine", "retimed"]
    assert without.optimum is None
    assert not without.misses_target
    assert not without.interrupted


@pytest.mark.parametrize("stiffness", [0.5, 40.0])
def test_the_rate_by_default_keeps_clear_of_the_stability_limit(stiffness):
    """2/k is the limit of a quadratic; a rate from a grid of factors 2 lies in (1/2k, 1/k]."""
    trap = esl.Quadratic(jnp.array([stiffness, stiffness / 100]))
    problem = esl.Problem(trap, members=4, steps=20, start=jnp.ones((4, 2)) * jnp.arange(1, 3))
    rate = esl.experiment.stable_rate(problem, KEY)
    assert 0.5 / stiffness < rate <= 1.001 / stiffness


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"start": None}, "`start` must be given for a potential that does not initialize"),
        ({"start": jnp.ones((5, 2))}, r"`start` must have or return shape \(6, d\).*\(5, 2\)"),
        ({"metrics": {"a": 3}}, r"`metrics\['a'\]` must be a function"),
        ({"metrics": {"a": lambda *x: jnp.ones(2)}}, r"`metrics\['a'\]` must return one number"),
        ({"rule": 0.1}, "`rule` must be a function"),
        ({"rule": lambda rate, temperature: rate}, "`rule` must be a function.*returns Constant"),
        ({"transport": esl.ExactTransport}, "`transport` must be a transport"),
        ({"temperature": "hot"}, "`temperature` must be a number or a schedule"),
        ({"snapshots": 3}, "`snapshots` must divide the 20 steps"),
    ],
)
def test_problems_that_do_not_fit_are_refused(refused, settings, sentence):
    refused(lambda: line(**settings), sentence)


def test_losses_that_fall_below_zero_are_refused(refused):
    below = esl.FromFunction(lambda x: jnp.sum(x**2) - 1)
    problem = esl.Problem(below, members=4, steps=10, snapshots=5, start=jnp.ones((4, 2)))
    refused(
        lambda: esl.compare(problem, key=KEY, rate=0.1, shapes={"constant": esl.Constant(1.0)}),
        "`problem` must have final losses above 0",
    )


def test_a_comparison_prints_draws_and_leaves(tmp_path):
    shapes = {"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)}
    problem = line(metrics={})
    found = esl.compare(
        problem, key=KEY, shapes=shapes, rate=0.05, judge_runs=2, iterations=2, knots=2
    )
    text = str(found)
    assert text.startswith("Matched final loss, 2 held-out runs")
    assert "units of the loss" in text
    assert "nats" not in text
    table = found.table()
    assert table["schedule"].tolist() == list(found.judgments)
    sigmas = [float(each.report.entropy_production) for each in found.judgments.values()]
    np.testing.assert_array_equal(table["entropy_production"], sigmas)
    assert table["entropy_production_error"].shape == (4,)
    assert len(found.plot()) == 2
    found.save(tmp_path / "out")
    again = esl.load_schedule(tmp_path / "out" / "schedules" / "optimized.json")
    np.testing.assert_array_equal(again.rates(20), found.schedule("optimized").rates(20))
    assert (tmp_path / "out" / "schedules.png").stat().st_size > 1000
    with pytest.raises(
        esl.InputError, match=r"`name` must be one of .*'cosine'.*, but is 'linear'"
    ):
        found.schedule("linear")
