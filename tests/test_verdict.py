"""Every sentence of a verdict, from planted reports, and what no verdict may say."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import esljax as esl
from esljax.measures.report import NUMBERS
from esljax.results import StandardErrors


def report(errors: Any = 0.1, **values: Any) -> esl.SpeedLimit:
    """A debiased report of velocities: Σ = 6, W2² = 2, L² = 5, 1 of them housekeeping.

    `errors` are those of all numbers; None is a report without.
    """
    plain: dict[str, Any] = {
        "entropy_production": 6.0,
        "length_squared": 4.2,
        "w2_squared": 2.1,
        "housekeeping": 0.5,
        "dissipation": 6.0,
        "learning_time": 1.0,
        "times": [0.25, 0.75],
        "speed": [1.0, 3.0],
        "converged": True,
        "elapsed": [0.5, 0.5],
        "mobility": [1.0, 1.0],
        "entropy_production_chain": 6.2,
        "entropy_production_bound": 5.8,
        "debiased_entropy_production": 5.9,
        "debiased_length_squared": 4.0,
        "debiased_w2_squared": 2.0,
        "length_resolved": True,
    }
    plain |= values
    words = {
        name: plain.pop(name)
        for name in ("worth", "bound", "is_bound", "circulation", "freedom")
        if name in plain
    }
    arrays = {name: None if x is None else jnp.asarray(x) for name, x in plain.items()}
    made = esl.SpeedLimit(**arrays, **{"freedom": 20, "source": "planted numbers", **words})
    if errors is None:
        return dataclasses.replace(made, freedom=0)
    sizes = {
        name: None if getattr(made, name) is None else jnp.asarray(float(errors))
        for name in NUMBERS
    }
    return dataclasses.replace(made, standard_error=StandardErrors(sizes), errors="planted")


def chained(errors: Any = 0.1, **values: Any) -> esl.SpeedLimit:
    """A plug-in chain."""
    none = dict.fromkeys(
        ("debiased_entropy_production", "debiased_length_squared", "debiased_w2_squared",
         "entropy_production_chain", "entropy_production_bound", "housekeeping"),
    )  # fmt: skip
    return report(errors, **{**none, "circulation": "invisible", **values})


def tiers(made: esl.SpeedLimit) -> list[str]:
    return made.verdict().splitlines()


# The number


def test_the_limit_holds():
    within = report().interval("gap")
    assert tiers(report())[0] == (
        "The speed limit holds: Σ is 3 times W2²; the gap Σ - W2² of the law, estimated from "
        f"velocities, lies within [{float(within.lower):.4g}, {float(within.upper):.4g}] at 95 %."
    )
    assert float(within.lower) == pytest.approx(4 - 2.086 * 0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("made", "subject"),
    [
        (report(), "the law, estimated from velocities, lies"),
        (
            report(entropy_production_chain=None, entropy_production_bound=None),
            "the law, estimated by a chain, lies",
        ),
        (chained(), "these samples, measured by a chain, lies"),
        (chained(identity_fraction=1.0), "the members' own paths lies"),
        (chained(identity_fraction=0.4), "these samples, measured by a chain, lies"),
    ],
    ids=["velocities", "debiased", "samples", "paths", "few paths"],
)
def test_of_what_the_numbers_are(made, subject):
    assert f"the gap Σ - W2² of {subject} within [" in tiers(made)[0]


def test_a_gap_that_is_not_resolved():
    made = report(errors=3.0)
    assert re.fullmatch(
        r"These members do not resolve a gap: the gap Σ - W2² of the law, estimated from "
        r"velocities, lies within \[-2\.\d+, 10\.\d+\] at 95 %, which includes 0\.",
        tiers(made)[0],
    )
    assert len(tiers(made)) == 1  # no word on a waste that may be none, and here no caveats
    assert "standard error" not in made.verdict()


def test_of_samples_the_limit_is_an_identity():
    assert tiers(chained(errors=3.0))[0].startswith("The speed limit holds: Σ is 2.86 times W2²; ")
    assert tiers(chained(errors=3.0, is_bound=False))[0].startswith("These members do not resolve")


def test_sigma_below_the_distance():
    """Of velocities, beside a chain that obeys the limit: no violation, but no gap either."""
    by_chance = report(entropy_production=1.7, housekeeping=0.0)
    assert by_chance.holds
    first = tiers(by_chance)[0]
    assert first.startswith("Σ came out below W2²: the gap Σ - W2² of the law, estimated from")
    assert first.endswith(
        "at 95 %. An estimate that misses part of the velocity does that, or by chance."
    )
    missing = report(entropy_production=1.0, housekeeping=0.0)
    assert not missing.holds
    assert tiers(missing)[0].endswith("An estimate that misses part of the velocity does that.")
    for made in (by_chance, missing):
        assert "holds" not in made.verdict()
        assert "includes 0" not in made.verdict()
        assert "of the gap is" not in made.verdict()


def test_a_violation():
    made = chained(entropy_production=1.0, w2_squared=3.0)
    assert not made.holds
    assert tiers(made)[0] == (
        "The speed limit is violated by 2, 20.0 standard errors: Σ and W2² do not come from one "
        "geometry, or an estimate is off."
    )
    # Two groups know an error so badly that five of them leave 0 inside of the interval.
    few = chained(entropy_production=2.5, w2_squared=3.0, freedom=1)
    assert float(few.interval("gap").upper) > 0
    assert "violated by 0.5: Σ and W2²" in few.verdict()
    assert "standard errors" not in few.verdict()
    # The chain itself is below, whatever the velocities have.
    made = report(entropy_production_chain=1.0, debiased_entropy_production=0.9)
    assert "violated by 1: " in made.verdict()


def test_without_errors():
    assert tiers(report(None))[0] == (
        "The speed limit holds: Σ is 3 times W2² (gap 4, without a standard error)."
    )
    made = chained(None, entropy_production=1.0, w2_squared=3.0)
    assert tiers(made)[0] == (
        "The speed limit is violated by 2: Σ and W2² do not come from one geometry, or an estimate "
        "is off; there is no standard error to judge that by."
    )


@pytest.mark.parametrize("name", ["entropy_production", "debiased_w2_squared", "length_squared"])
def test_numbers_that_are_not_finite(name):
    assert report(**{name: np.nan}).verdict() == "No verdict: the numbers are not finite."


@pytest.mark.parametrize("errors", [None, 0.1])
def test_nothing_follows_from_an_unsolved_transport(errors):
    made = report(errors=errors, converged=False)
    assert made.verdict().startswith(
        "No verdict. A transport problem did not converge: do not trust these numbers."
    )
    claims = ("limit holds", "uneven timing", "bend", "violated", "within", "times W2²")
    assert not [claim for claim in claims if claim in made.verdict()], made.verdict()
    assert not made.holds
    assert [finding.name for finding in made.diagnose()] == ["transport did not converge"]
    with pytest.raises(esl.InputError, match="problems that were solved"):
        esl.constant_speed(made, 4)


@pytest.mark.parametrize("lost", [np.inf, np.nan])
def test_errors_that_are_not_finite_are_named(lost):
    made = report(errors=lost)
    assert "its standard error is not finite" in tiers(made)[0]
    assert "errors are not finite" in [finding.name for finding in made.diagnose()]
    shown = str(made).replace("not finite", "")
    assert "inf" not in shown.replace("information", "")
    assert "nan" not in shown


def test_nothing_moved():
    still = chained(entropy_production=0.0, w2_squared=0.0, length_squared=0.0)
    assert tiers(still)[0] == "Nothing moved: Σ and W2² are both 0."


def test_a_distance_of_nothing():
    made = report(debiased_w2_squared=-0.1)
    assert tiers(made)[0].startswith(
        "The speed limit holds: Σ is 6, and W2² cannot be distinguished from 0; the gap"
    )


# The waste


def test_where_the_waste_is():
    assert tiers(report())[1] == (
        "12 % of the gap is circulation that moves no mass; dynamics without it would remove that; "
        "38 % of the gap is uneven timing; the schedule of esl.constant_speed(report) promises "
        "Σ = 4 without it; 50 % is the bend of the path, which only another control than the "
        "learning rate removes."
    )
    assert "the same path at constant speed would produce Σ = 4;" in tiers(report(mobility=None))[1]
    assert "circulation" not in tiers(report(housekeeping=0.01))[1]
    assert "circulation" not in tiers(report(housekeeping=0.1))[1]  # half of its own error
    assert "circulation" not in tiers(report(housekeeping=None, circulation="invisible"))[1]


def test_parts_that_vanish():
    bent = report(debiased_length_squared=5.45)
    assert "uneven timing cannot be distinguished from 0; 86 % is the bend" in tiers(bent)[1]
    assert "constant_speed" not in bent.verdict()
    straight = report(debiased_length_squared=2.05)
    assert tiers(straight)[1].endswith("the bend of the path cannot be distinguished from 0.")
    assert "86 % of the gap is uneven timing" in tiers(straight)[1]


def test_a_speed_that_is_not_resolved():
    made = report(length_resolved=False, housekeeping=0.0)
    upper = float(made.interval("temporal").upper)
    assert upper == pytest.approx(4 + 0.2086, rel=1e-3)
    assert tiers(made)[1] == (
        "The speed does not stand out of its noise, so uneven timing cannot be separated from the "
        f"bend of the path; timing accounts for between 0 and {upper:.3g} of Σ."
    )
    # Circulation needs no metric speed.
    mixed = report(length_resolved=False)
    assert tiers(mixed)[1].startswith("12 % of the gap is circulation that moves no mass; ")
    assert "; the speed does not stand out of its noise, so uneven" in tiers(mixed)[1]
    assert float(mixed.interval("temporal").upper) == pytest.approx(4 + 0.2086 - 0.5, rel=1e-3)
    bare = report(None, length_resolved=False)
    assert tiers(bare)[1].endswith("cannot be separated from the bend of the path.")
    rows = {row.rsplit("  ", 1)[0].strip(): row for row in str(bare).splitlines()}
    for label in ("Wasserstein length L²", "temporal", "geometric"):
        assert rows[label].endswith("  not resolved")
    assert rows["L², plug-in"].endswith("4.2")


# The caveats


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"is_bound": False}, "This transport is not a metric, so the inequality holds only"),
        (
            {"entropy_production_coarse": 5.6},
            "Halving the number of snapshots changes the chain's Σ by 0.6, so spacing still hides "
            "about 0.2.",
        ),
        ({"worth": "Worth of Σ."}, "Worth of Σ."),
        (
            {"entropy_production_bound": -4.6},
            "The lower bound of Σ, -4.6, is below 0 and carries no information.",
        ),
        (
            {"entropy_production_bound": 1.5},
            "The lower bound of Σ, 1.5, is below W2² and carries no information beyond it.",
        ),
        (
            {"housekeeping": None, "circulation": "contained"},
            "This estimator does not tell circulation from transport: whatever circulates is "
            "contained in Σ and L², and L² is an upper value.",
        ),
    ],
)
def test_caveats(values, sentence):
    assert len(tiers(report())) == 2
    assert sentence in tiers(report(**values))[2]


def test_caveats_of_a_chain():
    assert "changes Σ by" in tiers(chained(entropy_production_coarse=5.8))[2]
    loud = chained(noise_floor=2.0, identity_fraction=1.0)
    assert (
        "The chain is noise-dominated: injected noise alone contributes up to 2 to Σ. In 100 % of "
        "the links each member is its own best partner: the numbers describe the members' paths, "
        "not a resolved density, and W2² is the mean squared displacement of the members, an upper "
        "value of that between laws."
    ) in loud.verdict()
    assert (
        "Injected noise would contribute 2 to Σ if no member changed partners; here most links do."
    ) in chained(noise_floor=2.0, identity_fraction=0.1).verdict()
    assert "oise" not in chained(noise_floor=0.2, identity_fraction=0.1).verdict()
    assert "oise" not in report(noise_floor=2.0, identity_fraction=0.1).verdict()


def test_members_that_pair_with_themselves_speak_of_their_paths_first():
    """Their paths are known exactly, and the law behind them is not."""
    rng = np.random.default_rng(0)
    start = 5 + rng.normal(size=(8, 60))
    positions = start * np.linspace(1, 0.2, 9)[:, None, None] ** 2
    report = esl.speed_limit(
        esl.from_snapshots(np.float32(positions)), transport=esl.ExactTransport(), debias=True
    )
    sigma, length, distance = oracles.chain_of_pairs(positions, np.arange(9) / 8)
    first, second, third = report.verdict().splitlines()
    assert first.startswith(f"Of the members' own paths, Σ is {sigma:.4g} ± ")
    assert (
        f"{sigma / distance:.3g} times their mean squared displacement {distance:.4g} ± " in first
    )
    assert "Of the law behind them these members resolve" in first
    assert f"at constant speed they would produce Σ = {length:.4g}." in second
    assert f"{100 * (sigma - length) / (sigma - distance):.0f} % is uneven timing" in second
    assert "the plug-in numbers describe the members' paths" in third


def test_a_finding_is_named_once():
    made = chained(entropy_production=60.0)
    names = [finding.name for finding in made.diagnose()]
    assert "gap extreme" in names
    assert f"See diagnose() for: {', '.join(names)}." in made.verdict()
    assert "See diagnose()" not in chained(converged=False).verdict()


# What no verdict may say


@given(
    sigma=st.floats(-5, 30),
    distance=st.floats(0, 20),
    error=st.floats(0.01, 10),
    freedom=st.integers(1, 30),
    bound=st.one_of(st.none(), st.floats(-20, 20)),
    chain=st.one_of(st.none(), st.floats(0.1, 40)),
    debias=st.booleans(),
    resolved=st.booleans(),
)
def test_no_count_of_errors_beside_an_interval_that_contains_0(
    sigma, distance, error, freedom, bound, chain, debias, resolved
):
    made = (report if debias else chained)(
        error,
        entropy_production=sigma,
        entropy_production_chain=chain,
        entropy_production_bound=None if chain is None else bound,
        freedom=freedom,
        length_resolved=resolved,
        w2_squared=distance + (0.1 if debias else 0.0),
        **({"debiased_w2_squared": distance} if debias else {}),
    )
    within, words = made.interval("gap"), made.verdict()
    contains = float(within.lower) <= 0 <= float(within.upper)
    if contains:
        assert "standard errors" not in words
        assert "of the gap is" not in words
    if "includes 0" in words:
        assert contains
    if "holds" in words:
        assert made.holds
    first = tiers(made)[0]
    answers = ("The speed limit holds", "violated", "do not resolve", "came out below", "Nothing")
    assert sum(each in first for each in answers) == 1


def test_several_runs_have_no_verdict():
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), report())
    assert stacked.verdict().startswith("Several runs in one report")
