"""Silent faults of members and snapshots: each is planted, and found by its own name alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")
N, D, LINKS = 64, 4, 20


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def simulated(start, temperature=1e-3, steps=200, links=LINKS, time=1.5):
    potential = esl.Quadratic(jnp.array([0.5, 1.0, 1.5, 2.0]))
    rule = esl.Langevin(time / steps, temperature)
    path = esl.simulate(
        potential, rule, jnp.asarray(start), steps=steps, snapshots=links, key=jax.random.key(1)
    )
    return np.asarray(path.positions)


@pytest.fixture(scope="module")
def start():
    return np.float32(np.random.default_rng(0).normal(size=(N, D)) * 0.5 + 2)


@pytest.fixture(scope="module")
def healthy(start):
    return simulated(start)


def few():
    """Return 8 members in 400 dimensions that contract, with noise of their own at each time."""
    random = np.random.default_rng(0)
    base = random.normal(size=(8, 400))
    steps = [base * (1 - 0.04 * j) + 0.02 * random.normal(size=base.shape) for j in range(11)]
    return np.float32(np.stack(steps))


def report(positions, times=None, transport=None, **options):
    return esl.speed_limit(
        esl.from_snapshots(positions, times),
        transport=esl.GaussianTransport() if transport is None else transport,
        **{"jackknife": 8, "debias": True, **options},
    )


def names(report):
    return [finding.name for finding in report.diagnose()]


def only(report):
    (finding,) = report.diagnose()
    return finding.name, finding.evidence


def test_the_healthy_run_has_no_finding(healthy):
    assert names(report(healthy)) == []
    assert names(report(healthy, transport=esl.ExactTransport(), jackknife=0)) == []


# Labels


def everywhere(x, random):
    return np.stack([one[random.permutation(x.shape[1])] for one in x])


def at_one_snapshot(x, random):
    y = x.copy()
    y[7] = y[7][random.permutation(x.shape[1])]
    return y


def from_the_middle(x, random):
    y = x.copy()
    y[len(y) // 2 :] = y[len(y) // 2 :, random.permutation(x.shape[1])]
    return y


@pytest.mark.parametrize("permute", [everywhere, at_one_snapshot, from_the_middle])
def test_labels_that_do_not_follow_members_are_recovered(healthy, permute):
    """The laws are the same, so all numbers and errors are, to the order of the groups."""
    shuffled = permute(healthy, np.random.default_rng(1))
    exact = [esl.ExactTransport()] if permute is everywhere else []
    for transport in (esl.GaussianTransport(), *exact):
        given = report(healthy, transport=transport, jackknife=64, debias=False)
        found = report(shuffled, transport=transport, jackknife=64, debias=False)
        assert names(found) == ["labels do not follow members", *names(given)]
        for name in ("entropy_production", "length_squared", "w2_squared"):
            np.testing.assert_allclose(getattr(found, name), getattr(given, name), rtol=1e-4)
            np.testing.assert_allclose(
                found.standard_error.get(name), given.standard_error.get(name), rtol=0.1
            )
        assert found.identity_fraction is None
        assert found.noise_floor is None
    links = {everywhere: 20, at_one_snapshot: 2, from_the_middle: 1}[permute]
    assert f"In {links} of 20 links" in found.diagnose()[0].evidence


@pytest.mark.parametrize("transport", [esl.ExactTransport(), esl.GaussianTransport()], ids=str)
def test_few_members_in_many_dimensions_stay_too_few_in_any_order(transport):
    given, found = few(), everywhere(few(), np.random.default_rng(1))
    options = {"transport": transport, "jackknife": 8, "debias": False}
    before, after = report(given, **options), report(found, **options)
    assert "n too small for d" in names(before)
    assert names(after) == ["labels do not follow members", *names(before)]
    np.testing.assert_allclose(after.entropy_production, before.entropy_production, rtol=1e-4)
    np.testing.assert_allclose(
        after.standard_error.entropy_production, before.standard_error.entropy_production, rtol=0.1
    )


def test_the_order_of_the_first_snapshot_stays_and_each_run_has_its_own(healthy):
    shuffled = [esl.from_snapshots(everywhere(healthy, np.random.default_rng(i))) for i in (1, 2)]
    several = esl.speed_limit(shuffled, transport=esl.GaussianTransport())
    given = report(healthy, jackknife=0)
    assert names(several)[0] == "labels do not follow members"
    np.testing.assert_allclose(several.entropy_production, given.entropy_production, rtol=1e-4)


def test_paths_are_refused_where_labels_do_not_follow_members(healthy, refused):
    shuffled = everywhere(healthy, np.random.default_rng(1))
    refused(
        lambda: report(shuffled, velocity=esl.PathVelocity()),
        "`velocity` must read laws.*where labels do not follow members, but is PathVelocity",
    )
    assert names(report(shuffled, velocity=esl.TransportVelocity(esl.GaussianTransport())))


@pytest.mark.parametrize("quarter", [1, 2])
def test_members_that_turn_or_mix_keep_their_labels(quarter):
    """A quarter turn has no correlation with the start, and a mixed law none at all."""
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    turned = np.stack([ring @ np.linalg.matrix_power(turn, quarter * j) for j in range(9)])
    assert report(turned, jackknife=0).evidence.labels is None
    for n, d in ((8, 400), (16, 1), (64, 1), (200, 1), (64, 2), (64, 4)):
        mixed = report(random.normal(size=(21, n, d)), jackknife=0, debias=False)
        assert mixed.evidence.labels is None


@pytest.mark.parametrize("count", [2, 6])
def test_members_in_each_others_places_at_one_snapshot_are_put_back(healthy, count):
    swapped = healthy.copy()
    swapped[7, :count] = np.roll(swapped[7, :count], 1, axis=0)
    given, found = (report(x, jackknife=64, debias=False) for x in (healthy, swapped))
    name, evidence = only(found)
    assert name == "labels do not follow members"
    assert f"In 2 of 20 links the given order of {count} of 64 members" in evidence
    np.testing.assert_allclose(
        found.standard_error.entropy_production, given.standard_error.entropy_production, rtol=1e-3
    )
    np.testing.assert_array_equal(found.evidence.displacements, given.evidence.displacements)


def test_members_that_change_places_for_good_keep_their_labels(healthy):
    """Two that cross a barrier do the same."""
    crossed = healthy.copy()
    crossed[7:, :2] = crossed[7:, 1::-1]
    assert report(crossed, jackknife=0).evidence.labels is None


def test_under_jit_labels_are_not_known(healthy):
    measure = jax.jit(functools.partial(report, transport=esl.GaussianTransport(), jackknife=0))
    assert measure(healthy).evidence.labels is None


# Copies


@pytest.mark.parametrize("copy", ["tiled", "repeated", "shuffled", "two"])
def test_copies_are_counted_once(healthy, copy):
    distinct = healthy[:, :16]
    copied = {
        "tiled": np.tile(distinct, (1, 4, 1)),
        "repeated": np.repeat(distinct, 4, axis=1),
        "shuffled": np.tile(distinct, (1, 4, 1))[:, np.random.default_rng(0).permutation(64)],
        "two": np.concatenate([distinct, distinct[:, :1]], axis=1),
    }[copy]
    given, found = (report(x, jackknife=16, debias=False) for x in (distinct, copied))
    name, evidence = only(found)
    assert name == "copied members"
    assert f"Only 16 of {copied.shape[1]} members are distinct" in evidence
    np.testing.assert_allclose(found.entropy_production, given.entropy_production, rtol=1e-4)
    np.testing.assert_allclose(
        found.standard_error.entropy_production,
        given.standard_error.entropy_production,
        rtol=1e-3,
    )


def test_copies_that_are_permuted_are_two_faults(healthy):
    copied = everywhere(np.tile(healthy[:, :16], (1, 4, 1)), np.random.default_rng(1))
    assert names(report(copied)) == ["labels do not follow members", "copied members"]


# Members


@pytest.mark.parametrize("factor", [30.0, -30.0, 10.0])
def test_a_member_that_leaps_is_found(healthy, factor):
    broken = healthy.copy()
    broken[5:, 7] *= factor
    finding = report(broken).diagnose()[0]
    assert finding.name == "outlying members"
    assert finding.evidence.startswith("Member 7 leaps")
    assert "at snapshot 5" in finding.evidence


@pytest.mark.parametrize("law", ["cauchy", "t", "one"])
def test_heavy_tails_are_found_by_transports_that_always_converge(law):
    random = np.random.default_rng(3)
    found = 0
    for _ in range(20):
        draw = {
            "cauchy": random.standard_cauchy((N, D)),
            "t": random.normal(size=(N, D)) / np.abs(random.normal(size=(N, 1))),
            "one": random.normal(size=(N, D)) * np.where(np.arange(N) == 9, 30.0, 1.0)[:, None],
        }[law]
        positions = np.stack([np.float32(2 + draw) * (1 - 0.05 * j) for j in range(5)])
        found += "heavy tails" in names(report(positions, jackknife=0, debias=False))
    assert found >= 19


# Snapshots


def test_identical_snapshots_are_found(healthy):
    twice = healthy.copy()
    twice[10] = twice[9]
    assert only(report(twice)) == (
        "identical snapshots",
        "Snapshots 9 and 10 hold the same members, while these move before and after.",
    )
    again = healthy.copy()
    again[12] = again[5]
    assert "Snapshots 5 and 12" in next(
        one.evidence for one in report(again).diagnose() if one.name == "identical snapshots"
    )


def test_frozen_runs_and_frozen_members_are_found(healthy):
    frozen = healthy.copy()
    frozen[8:] = frozen[8]
    name, evidence = only(report(frozen))
    assert name == "frozen after a snapshot"
    assert "No member moves after snapshot 8 of 20" in evidence
    some = healthy.copy()
    some[8:, 3:6] = some[8, 3:6]
    name, evidence = only(report(some))
    assert name == "frozen members"
    assert "3 of 64 members (number 3, 4, 5)" in evidence


def test_members_that_come_to_rest_are_not_frozen():
    """Without noise members reach the minimum to the last digit, and a rate of 0 moves none."""
    start = 1 + jax.random.normal(jax.random.key(0), (32, 2))
    for rate in (0.5, esl.FromOptax(lambda count: jnp.where(count < 40, 0.1, 0.0), 120)):
        path = esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(rate, 0.0),
            start,
            steps=120,
            snapshots=30,
            key=jax.random.key(1),
        )
        found = esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=0)
        assert not {"frozen after a snapshot", "frozen members", "identical snapshots"} & set(
            names(found)
        )


def test_logarithmic_times_declared_even_are_found(start):
    fine = simulated(start, steps=1000, links=1000)
    at = np.unique(np.round(np.geomspace(1, 1001, 21)).astype(int) - 1)
    name, evidence = only(report(fine[at]))
    assert name == "times may be wrong"
    assert "declared evenly spaced" in evidence
    assert names(report(fine[at], times=at)) == []
    # A warm-up that is linear from 0 is no geometric sequence, and decays slow down.
    fraction = np.linspace(0, 1, 21)
    for clock in (fraction**2, 1 - (1 - fraction) ** 2, np.expm1(1.6 * fraction) / np.expm1(1.6)):
        assert names(report(fine[np.round(1000 * clock).astype(int)], debias=False)) in (
            [],
            ["Σ not converged in snapshot spacing"],
        )


# Coordinates and the numbers that hold them


def test_a_counter_among_the_parameters_is_found(healthy):
    counter = np.broadcast_to(10 * np.arange(LINKS + 1)[:, None, None], (LINKS + 1, N, 1))
    name, evidence = only(report(np.concatenate([healthy, counter], axis=2)))
    assert name == "common coordinates"
    assert "Coordinate 4 of 5 is the same for all members at every snapshot" in evidence
    assert "100 %" in evidence


def test_few_coordinates_that_hold_nearly_all_are_found():
    random = np.random.default_rng(0)
    positions = random.normal(size=(N, 60)) * np.linspace(1, 0.5, 9)[:, None, None]
    assert names(report(positions)) == []
    positions[..., 17] *= 100
    name, evidence = only(report(positions))
    assert name == "few coordinates hold Σ"
    assert "1 of 60 coordinates (number 17 " in evidence


@pytest.mark.parametrize("fault", ["offset", "half", "bfloat16"])
def test_rounding_of_the_positions_is_found_with_its_quantum(healthy, fault):
    stored = {
        "offset": lambda: healthy + np.float32(1e6),
        "half": lambda: (healthy + 100).astype(np.float16).astype(np.float32),
        "bfloat16": lambda: np.asarray(jnp.asarray(healthy + 8, jnp.bfloat16), np.float32),
    }[fault]()
    before, after = (
        report(x, transport=esl.ExactTransport(), jackknife=0, debias=False)
        for x in (healthy, stored)
    )
    finding = next(one for one in after.diagnose() if one.name == "rounded positions")
    quantum = {"offset": 2.0**-4, "half": 2.0**-4, "bfloat16": 2.0**-4}[fault]
    assert abs(float(finding.evidence.split("are ")[1].split(" ")[0]) / quantum - 1) < 0.02
    # A twelfth of the squared quantum at each end of a link.
    added = float(after.entropy_production) - float(before.entropy_production)
    np.testing.assert_allclose(after.evidence.rounding, added, rtol=0.3)


@pytest.mark.parametrize(
    ("scale", "name"), [(1e-20, "underflow"), (1e19, "overflow"), (1e15, None), (1e-12, None)]
)
def test_numbers_without_digits_are_named(healthy, scale, name):
    found = report(healthy * np.float32(scale), transport=esl.ExactTransport())
    assert names(found) == ([] if name is None else [name])
    if name is not None:
        assert "float64" in found.diagnose()[0].change
        assert found.verdict().startswith(f"No verdict, by {name}: ")
        assert "float64" in found.verdict()
        assert "not finite" not in found.verdict()


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    "transport",
    [esl.GaussianTransport(), esl.ExactTransport(), esl.SinkhornTransport(0.2)],
    ids=str,
)
def test_constant_runs_have_not_moved(start, transport, offset):
    constant = np.broadcast_to(start + np.float32(offset), (5, N, D))
    found = report(constant, transport=transport, debias=False)
    assert names(found) == ["nothing moved"]
    assert found.verdict() == "Nothing moved: all members are at the same place in every snapshot."


def test_evidence_is_the_same_on_several_scales(healthy):
    """A power of 2 changes no digit of the observations but their unit."""
    one, other = report(healthy, jackknife=0), report(healthy * 4, jackknife=0)
    for field, power in (("distances", 1), ("displacements", 1), ("quantum", 1), ("pace", 0)):
        np.testing.assert_array_equal(
            getattr(one.evidence, field) * 4**power, getattr(other.evidence, field)
        )


def test_simulated_runs_are_never_put_in_another_order(start):
    rule = esl.Langevin(0.02, 0.5)
    path = esl.simulate(
        esl.Quadratic(1.0), rule, jnp.asarray(start), steps=100, key=jax.random.key(1)
    )
    every = dataclasses.replace(path, positions=path.positions, mesh=path.mesh)
    assert (
        esl.speed_limit(every, transport=esl.GaussianTransport(), jackknife=0).evidence.labels
        is None
    )
