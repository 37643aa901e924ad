"""What a comparison says of one schedule beyond its Σ."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

import esljax as esl
from esljax.experiment import examining, telling
from esljax.experiment.examining import examine

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

KEYS = jax.random.split(jax.random.key(7), 3)
DATA = esl.datasets.two_moons(100)
NETWORK = esl.FlaxLoss(esl.models.mlp(2, 4, 2), DATA.train)


def problem(potential=NETWORK, **changes):
    settings: Any = {"members": 8, "steps": 10, "snapshots": 5, "temperature": 0.0} | changes
    return esl.Problem(potential, **settings)


def examined(problem) -> Any:
    return examine(problem, problem.table(esl.Constant(0.2)), KEYS)


def debiased(problem, transport, members=slice(None)):
    """The mean and its error over the keys, from whole runs."""
    reports = [
        esl.speed_limit(
            esl.from_snapshots(problem.path(esl.Constant(0.2), key).positions[:, members]),
            transport=transport,
            debias=True,
            jackknife=0,
        )
        for key in KEYS
    ]
    values = np.array([np.asarray(report.debiased_w2_squared) for report in reports], float)
    return values.mean(), values.std(ddof=1) / np.sqrt(3)


def test_laws_of_networks_are_compared_modulo_their_symmetry():
    own = problem()
    bracket = examined(own).bracket
    transport = esl.QuotientTransport(esl.ExactTransport(), esl.symmetry.of(NETWORK))
    value, error = debiased(own, transport)
    np.testing.assert_allclose(bracket.lower, value, rtol=1e-4)
    np.testing.assert_allclose(bracket.lower_error, error, rtol=1e-3)
    assert bracket.geometry == "QuotientTransport ExactTransport"
    # Plain halves see the order of units.
    assert debiased(own, esl.ExactTransport())[0] < value - 3 * error


GIVEN = NETWORK.init(members=8, key=jax.random.key(0))
LINE = esl.FromFunction(lambda x: 0.5 * (x[0] ** 2 + 3 * x[1] ** 2))


@pytest.mark.parametrize(
    "changes",
    [
        # Nobody knows that units of given members are exchangeable.
        pytest.param({"start": GIVEN}, id="given start"),
        pytest.param({"transport": esl.GaussianTransport()}, id="moments"),
        pytest.param(
            {"potential": LINE, "start": lambda key: jax.random.normal(key, (8, 2)) + 2},
            id="no model",
        ),
    ],
)
def test_other_laws_are_compared_as_they_are(changes):
    own = problem(**changes)
    found = examined(own)
    value, error = debiased(own, own.transport)
    np.testing.assert_allclose(found.bracket.lower, value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.bracket.lower_error, error, rtol=2e-3, atol=1e-6)


def test_members_displacements_are_in_the_coordinates_of_the_transport():
    directions = esl.random_directions(22, 2, jax.random.key(1))
    own = problem(transport=esl.ProjectedTransport(esl.ExactTransport(), directions))
    found = examined(own)
    paths = [own.path(esl.Constant(0.2), key) for key in KEYS]
    moved = [np.square((p.final - p.positions[0]) @ directions).sum(axis=1).mean() for p in paths]
    np.testing.assert_allclose(found.bracket.upper, np.mean(moved), rtol=1e-4)


def test_wide_networks_stand_by_fewer_members_or_are_compared_plain(monkeypatch):
    own = problem(members=12)
    transport = esl.QuotientTransport(esl.ExactTransport(), esl.symmetry.of(NETWORK))
    # 16 pairs for each of three distances of three runs, 4³ each.
    monkeypatch.setattr(examining, "_WORK", 3 * 3 * 16 * 4**3)
    value, _ = debiased(own, transport, slice(8))
    np.testing.assert_allclose(examined(own).bracket.lower, value, rtol=1e-4)
    monkeypatch.setattr(examining, "_WORK", 3 * 3 * 15 * 4**3)
    found = examined(own)
    np.testing.assert_allclose(
        found.bracket.lower, debiased(own, esl.ExactTransport())[0], rtol=1e-4
    )
    assert found.bracket.geometry == "ExactTransport"


def test_the_loss_proves_what_its_observable_limit_says():
    own = problem()
    limits = [
        float(esl.measures.observable_limit(own.path(esl.Constant(0.2), key), NETWORK).value)
        for key in KEYS
    ]
    value, error = examined(own).observable_limit
    np.testing.assert_allclose(value, np.mean(limits), rtol=1e-4)
    np.testing.assert_allclose(error, np.std(limits, ddof=1) / np.sqrt(3), rtol=1e-3)


def test_members_that_diverge_are_not_examined():
    """A comparison goes on with what it has judged."""
    own = problem()
    assert examine(own, own.table(esl.Constant(float("nan"))), KEYS[:2]) is None


def test_one_run_has_the_errors_of_its_members():
    own = problem()
    report: Any = esl.speed_limit(
        own.path(esl.Constant(0.2), KEYS[0]), transport=own.transport, jackknife=32
    )
    errors: Any = examined(own).member_error
    np.testing.assert_allclose(
        errors.entropy_production, report.standard_error.entropy_production, rtol=1e-3
    )


def test_a_comparison_prints_and_reports_what_was_examined():
    own = problem()
    result: Any = esl.compare(
        own,
        rate=0.2,
        key=jax.random.key(0),
        shapes={"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)},
        optimize=False,
        match_runs=1,
        judge_runs=2,
    )
    for words in (
        r"W2² between the laws lies between about \S+ ± \S+ \(debiased, in QuotientTransport",
        r"The change of the loss alone proves a Σ of [\d.]+\(\d+\), whatever the path\.",
        r"One run of 8 members alone knows Σ to ± [\d.]+",
    ):
        assert re.search(words, str(result)), words
    found = telling.numbers(result)["optimized"]
    assert found["w2_bracket"]["upper"] == float(result.bracket.upper)
    assert found["standard_error_of_one_run"]["w2_squared"] > 0
    assert (
        found["entropy_production_of_loss"]
        < float(result.judgments["constant"].report.entropy_production)
        + 5 * found["standard_error"]["entropy_production_of_loss"]
    )
    # An interruption leaves none of it.
    cut = dataclasses.replace(result, examination=None)
    assert telling.numbers(cut)["optimized"]["w2_bracket"] is None
    assert "between the laws" not in str(cut)
