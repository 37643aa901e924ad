"""Debiased numbers, intervals, errors: against known biases, identities on samples and SciPy."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import esljax as esl
from esljax.measures.chain import chain, distances

KEY = jax.random.key(0)
DEBIASED = (
    "debiased_entropy_production",
    "debiased_w2_squared",
    "debiased_gap",
    "gap_lower",
    "gap_upper",
)


def debiased(trajectory, transport):
    """Σ and W2² without their bias, as reports have them."""
    report = chain(trajectory, transport, distances(trajectory, transport, debias=True))
    return report.debiased_entropy_production, report.debiased_w2_squared


def wandering(n, d=2, links=4, seed=0):
    """A cloud in noisy motion, no two links alike."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(links, n, d)) / 2 + rng.normal(size=(links, 1, d))
    return np.concatenate([np.zeros((1, n, d)), np.cumsum(steps, axis=0)]) + rng.normal(size=(n, d))


# The bias and its removal


@pytest.mark.parametrize(
    ("n", "d", "plug_in", "repetitions"),
    [(64, 2, 0.32, 100), (256, 2, 0.12, 25), (64, 5, 2.31, 100), (256, 5, 1.34, 25)],
)
def test_two_samples_of_one_law(n, d, plug_in, repetitions):
    """W2² of the law is 0: plugged in it is the known bias of independent samples, debiased 0."""

    @jax.jit
    def pairs(keys):
        def one(key):
            return esl.speed_limit(
                esl.from_snapshots(jax.random.normal(key, (2, n, d))),
                transport=esl.ExactTransport(),
                debias=True,
                jackknife=0,
            )

        return jax.lax.map(one, keys)

    mean = esl.measures.average(pairs(jax.random.split(KEY, repetitions)))
    error = mean.standard_error
    assert (
        abs(float(mean.w2_squared) - plug_in) < 5 * float(error.w2_squared) + 0.005
    )  # known to two decimals
    for name in (
        "debiased_w2_squared",
        "debiased_entropy_production",
        "debiased_gap",
    ):  # one link in unit time: Σ is W2²
        assert abs(float(getattr(mean, name))) <= 5 * float(getattr(error, name))
    assert plug_in > 10 * float(error.debiased_w2_squared)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "transport", [esl.ExactTransport(), esl.GaussianTransport()], ids=["exact", "gaussian"]
)
def test_members_that_move_together(transport):
    """A translation loses all its bias; standing still is one by 0.

    W2²(x, y + c) = W2²(x, y) + 2c·(ȳ - x̄) + c² for any two samples.
    """
    along = (
        np.array([3.0]) if isinstance(transport, esl.ExactTransport) else np.array([1.0, 2.0, -2.0])
    )
    cloud = np.random.default_rng(0).normal(size=(12, len(along)))
    moved, times = np.array([0, 1, 1, 4.0]), np.array([0, 0.2, 0.5, 1])
    path = esl.from_snapshots(cloud + moved[:, None, None] * along, times)
    sigma, whole = eqx.filter_jit(debiased)(path, transport)
    np.testing.assert_allclose(sigma, 9 * np.sum(np.diff(moved) ** 2 / np.diff(times)), rtol=1e-10)
    np.testing.assert_allclose(whole, 9 * 16, rtol=1e-10)
    report = esl.speed_limit(path, transport=transport, debias=True)
    np.testing.assert_allclose(report.debiased_gap, sigma - whole, rtol=1e-10)
    for name in DEBIASED[:3]:  # whoever is left out, the translation is the same
        assert float(getattr(report.standard_error, name)) < 1e-10


@pytest.mark.usefixtures("x64")
def test_by_hand():
    """W(x, y') - ½ W(x, x') - ½ W(y, y') of every link, both ways, for alternate members."""
    positions, times, squared = (
        wandering(10, d=1),
        np.array([0, 0.1, 0.4, 0.6, 1]),
        esl.ExactTransport().squared,
    )
    half, other = positions[:, ::2], positions[:, 1::2]

    def between(i, j):
        across = (squared(half[i], other[j]) + squared(other[i], half[j])) / 2
        return float(across - squared(half[i], other[i]) / 2 - squared(half[j], other[j]) / 2)

    sigma = sum(between(j, j + 1) / (times[j + 1] - times[j]) for j in range(4))
    ours = eqx.filter_jit(debiased)(esl.from_snapshots(positions, times), esl.ExactTransport())
    np.testing.assert_allclose(ours, (sigma, between(0, 4)), rtol=1e-10)


# Odd numbers of members


@pytest.mark.usefixtures("x64")
def test_an_odd_member_has_no_half_to_be_in():
    positions = wandering(9, d=1)
    report, even = (
        esl.speed_limit(
            esl.from_snapshots(positions[:, :n]),
            transport=esl.ExactTransport(),
            debias=True,
            jackknife=0 if n == 8 else 32,
        )
        for n in (9, 8)
    )
    for name in DEBIASED[:3]:
        np.testing.assert_allclose(getattr(report, name), getattr(even, name), rtol=1e-12)
    assert float(report.w2_squared) != float(even.w2_squared)
    # Who leaves the jackknife leaves in pairs, one from each half.
    assert report.errors == "jackknife over 4 groups of 2 of 9 members"
    assert report.freedom == 3
    kept = [np.delete(positions, [2 * i, 2 * i + 1], axis=1) for i in range(4)]
    left = [
        esl.speed_limit(
            esl.from_snapshots(x), transport=esl.ExactTransport(), debias=True, jackknife=0
        )
        for x in kept
    ]
    for name in (*DEBIASED, "entropy_production"):
        values = np.array([float(getattr(one, name)) for one in left])
        by_hand = np.sqrt(7 / 8 * np.sum((values - values.mean()) ** 2))
        np.testing.assert_allclose(getattr(report.standard_error, name), by_hand, rtol=1e-10)


@pytest.mark.parametrize(
    ("n", "errors"),
    [(2, "none"), (3, "none"), (5, "none"), (6, "jackknife over 3 groups of 2 of 6 members")],
)
def test_few_members(n, errors):
    report = esl.speed_limit(
        esl.from_snapshots(wandering(n, d=1)), transport=esl.ExactTransport(), debias=True
    )
    assert np.isfinite(float(report.debiased_gap))
    assert report.errors == errors


# Errors


@pytest.mark.parametrize("groups", [32, 8])
@pytest.mark.parametrize("speed", ["uneven", "even"])
def test_jackknife_errors_are_the_spread_over_repetitions(speed, groups):
    """All errors are right but those of the gap at even speed, which are √2 too wide.

    There the gap has no part that is linear in the law, and a jackknife doubles the variance of the
    quadratic part (Efron and Stein, 1981): on the safe side.
    """
    n, runs = 64, 400
    centers = jnp.array([0.0, 1, 6, 7, 12] if speed == "uneven" else [0.0, 2, 4, 6, 8])[
        :, None, None
    ]

    @jax.jit
    def reports(keys):
        def one(key):
            path = esl.from_snapshots(
                centers + jnp.cumsum(jax.random.normal(key, (5, n, 2)), axis=0)
            )
            return esl.speed_limit(
                path, transport=esl.GaussianTransport(), debias=True, jackknife=groups
            )

        return jax.lax.map(one, keys)

    stacked = reports(jax.random.split(KEY, runs))
    for name in DEBIASED:
        spread = np.std(getattr(stacked, name), ddof=1)
        claimed = np.sqrt(np.mean(np.asarray(getattr(stacked.standard_error, name)) ** 2))
        expected = np.sqrt(2) if speed == "even" and "gap" in name else 1
        # 400 repetitions know the spread to 4 %, so this is 4 errors of the ratio.
        np.testing.assert_allclose(claimed / spread, expected, rtol=0.15, err_msg=name)


# Intervals


@pytest.fixture(scope="module")
def report():
    return esl.speed_limit(
        esl.from_snapshots(wandering(16, links=6)), transport=esl.GaussianTransport(), debias=True
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 8, 31, 1000])
@pytest.mark.parametrize("level", [0.01, 0.5, 0.68, 0.95, 0.999])
def test_widths_are_quantiles_of_student(report, freedom, level):
    interval = dataclasses.replace(report, freedom=freedom).interval("w2_squared", level)
    truth = float(stats.t.ppf(0.5 + level / 2, freedom) * report.standard_error.w2_squared)
    np.testing.assert_allclose(
        (interval.upper - interval.lower) / 2, truth, rtol=1e-2 if level < 0.1 else 1e-4
    )
    np.testing.assert_allclose(
        (interval.upper + interval.lower) / 2, report.w2_squared, rtol=1e-5, atol=1e-5 * truth
    )
    assert interval.level == level


def test_ends_by_hand(report):
    width = stats.t.ppf(0.95, report.freedom)
    assert report.freedom == 7  # eight pairs
    errors = report.standard_error
    hidden = (report.entropy_production - report.entropy_production_coarse) / 3
    np.testing.assert_allclose(report.hidden_by_spacing, hidden, rtol=1e-5)
    assert hidden > 0
    low = report.debiased_entropy_production - report.w2_squared
    high = report.entropy_production + hidden - report.debiased_w2_squared
    np.testing.assert_allclose((report.gap_lower, report.gap_upper), (low, high), rtol=1e-5)
    interval = report.interval("gap", 0.9)
    np.testing.assert_allclose(interval.lower, low - width * errors.gap_lower, rtol=1e-4)
    np.testing.assert_allclose(interval.upper, high + width * errors.gap_upper, rtol=1e-4)
    assert f"\ngap within {report.interval('gap')}\n" in str(report)
    assert str(interval) == f"[{float(interval.lower):.6g}, {float(interval.upper):.6g}] at 90 %"
    for name in ("debiased_gap", "entropy_production"):
        interval = report.interval(name, 0.9)
        value, error = getattr(report, name), getattr(errors, name)
        np.testing.assert_allclose(
            (interval.lower, interval.upper),
            (value - width * error, value + width * error),
            rtol=1e-4,
        )


def test_ends_with_a_velocity():
    """A Σ that is itself a lower bound replaces the debiased chain below.

    Above stays the chain, with the part that its spacing hides.
    """
    path = esl.from_snapshots(wandering(16, links=6))
    report = esl.speed_limit(
        path,
        transport=esl.GaussianTransport(),
        velocity=esl.TransportVelocity(esl.GaussianTransport()),
        debias=True,
    )
    chain = esl.speed_limit(path, transport=esl.GaussianTransport(), debias=True)
    assert float(report.entropy_production) != pytest.approx(
        float(chain.entropy_production), rel=1e-2
    )
    for name in ("gap_upper", "gap_lower", "hidden_by_spacing"):
        np.testing.assert_allclose(getattr(report, name), getattr(chain, name), rtol=1e-5)
    bound = dataclasses.replace(report, bound="lower")
    np.testing.assert_allclose(bound.gap_lower, report.gap, rtol=1e-6)
    np.testing.assert_allclose(bound.gap_upper, chain.gap_upper, rtol=1e-5)


def test_spacing_hides_nothing_where_no_coarser_chain_is_lower():
    """An odd number of links has no coarser chain; a coarser chain that is higher hides nothing."""
    odd = esl.speed_limit(
        esl.from_snapshots(wandering(8, links=5)), transport=esl.GaussianTransport(), debias=True
    )
    assert float(odd.hidden_by_spacing) == 0
    higher = esl.speed_limit(
        esl.from_snapshots(wandering(8, links=4)), transport=esl.GaussianTransport(), debias=True
    )
    higher = dataclasses.replace(higher, entropy_production_coarse=2 * higher.entropy_production)
    assert float(higher.hidden_by_spacing) == 0
    np.testing.assert_allclose(
        higher.gap_upper, higher.entropy_production - higher.debiased_w2_squared, rtol=1e-6
    )


def test_without_splitting_the_gap_is_about_itself():
    plain = esl.speed_limit(esl.from_snapshots(wandering(16)), transport=esl.GaussianTransport())
    assert plain.debiased_gap is None
    assert plain.gap_lower is None
    assert plain.gap_upper is None
    interval, width = plain.interval("gap"), stats.t.ppf(0.975, plain.freedom)
    np.testing.assert_allclose(
        interval.upper - interval.lower, 2 * width * plain.standard_error.gap, rtol=1e-4
    )


def test_bad_input(report, refused):
    for level, shown in ((0, "0"), (1.0, "1.0"), (95, "95"), (-0.5, "-0.5"), (float("nan"), "nan")):
        refused(
            lambda level=level: report.interval("gap", level),
            f"Argument `level` must lie between 0 and 1, but is {shown}.",
        )
    refused(lambda: report.interval("Σ"), "Argument `name` must be one of 'entropy_production'")
    bare = esl.speed_limit(
        esl.from_snapshots(wandering(16)), transport=esl.GaussianTransport(), jackknife=0
    )
    refused(
        lambda: bare.interval("gap"),
        "Argument `name` must be a number that the report has a standard error of, but is 'gap'",
    )
    refused(
        lambda: report.interval("dissipation"),
        "that the report has a standard error of, but is 'dissipation'",
    )
