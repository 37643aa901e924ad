"""Debiased numbers, intervals, errors: against known biases, identities on samples and SciPy."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import esljax as esl
from esljax.measures.chain import chain, distances
from esljax.measures.errors import jackknife_groups

KEY = jax.random.key(0)
DEBIASED = (
    "debiased_entropy_production",
    "debiased_w2_squared",
    "debiased_gap",
    "debiased_length_squared",
    "gap_lower",
    "gap_upper",
)


def halved(trajectory, transport):
    """Σ and W2² without their bias, by halves of the members."""
    report = chain(trajectory, transport, distances(trajectory, transport, halves=True))
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

    W2²(x, y + c) = W2²(x, y) + 2c·(ȳ - x̄) + c² for any two samples. Distances between moments are
    debiased by the jackknife, others by halves; of moments the halves are right too.
    """
    along = (
        np.array([3.0]) if isinstance(transport, esl.ExactTransport) else np.array([1.0, 2.0, -2.0])
    )
    cloud = np.random.default_rng(0).normal(size=(12, len(along)))
    moved, times = np.array([0, 1, 1, 4.0]), np.array([0, 0.2, 0.5, 1])
    path = esl.from_snapshots(cloud + moved[:, None, None] * along, times)
    report = esl.speed_limit(path, transport=transport, debias=True)
    halves = eqx.filter_jit(halved)(path, transport)
    for sigma, whole in (
        halves,
        (report.debiased_entropy_production, report.debiased_w2_squared),
    ):
        truth = 9 * np.sum(np.diff(moved) ** 2 / np.diff(times))
        np.testing.assert_allclose(sigma, truth, rtol=1e-10)
        np.testing.assert_allclose(whole, 9 * 16, rtol=1e-10)
    np.testing.assert_allclose(report.debiased_gap, sigma - whole, rtol=1e-10)
    np.testing.assert_allclose(report.debiased_length_squared, 9 * 16, rtol=1e-10)
    for name in DEBIASED[:4]:  # whoever is left out, the translation is the same
        assert float(getattr(report.standard_error, name)) < 1e-10


@pytest.mark.usefixtures("x64")
def test_by_hand():
    """W(x, y') - ½ W(x, x') - ½ W(y, y') of every link, both ways, for alternate members."""
    positions, times, squared = (
        wandering(10, d=1),
        np.array([0, 0.1, 0.4, 0.6, 1]),
        esl.ExactTransport().squared,
    )

    def between(i, j, kept=slice(None)):
        half, other = positions[:, kept][:, ::2], positions[:, kept][:, 1::2]
        across = (squared(half[i], other[j]) + squared(other[i], half[j])) / 2
        return float(across - squared(half[i], other[i]) / 2 - squared(half[j], other[j]) / 2)

    sigma = sum(between(j, j + 1) / (times[j + 1] - times[j]) for j in range(4))
    path = esl.from_snapshots(positions, times)
    ours = eqx.filter_jit(halved)(path, esl.ExactTransport())
    np.testing.assert_allclose(ours, (sigma, between(0, 4)), rtol=1e-10)
    report = esl.speed_limit(path, transport=esl.ExactTransport(), debias=True)
    np.testing.assert_allclose(
        (report.debiased_entropy_production, report.debiased_w2_squared), ours, rtol=1e-10
    )

    # L² is made of the roots of these, and loses the bias of the roots by the jackknife.
    def length(kept):
        squares = [between(j, j + 1, kept) for j in range(4)]
        return np.sum(np.sqrt(np.maximum(squares, 0))) ** 2

    everyone = np.arange(10)
    left = [length(np.delete(everyone, [2 * i, 2 * i + 1])) for i in range(5)]
    whole = length(everyone)
    np.testing.assert_allclose(
        report.debiased_length_squared, whole - 4 * (np.mean(left) - whole), rtol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_moments_by_hand():
    """n f - (n-1) f̄ of f without each member, for Σ, L² and W2² alike."""
    positions, times = wandering(10, d=2), np.array([0, 0.1, 0.4, 0.6, 1])
    squared = esl.GaussianTransport().squared

    def numbers(x):
        links = np.array([float(squared(a, b)) for a, b in itertools.pairwise(x)])
        return np.array(
            [
                np.sum(links / np.diff(times)),
                np.sum(np.sqrt(links)) ** 2,
                float(squared(x[0], x[-1])),
            ]
        )

    left = [numbers(np.delete(positions, i, axis=1)) for i in range(10)]
    truth = 10 * numbers(positions) - 9 * np.mean(left, axis=0)
    report = esl.speed_limit(
        esl.from_snapshots(positions, times), transport=esl.GaussianTransport(), debias=True
    )
    assert report.errors == "jackknife over 10 groups of 1 of 10 members"
    names = ("debiased_entropy_production", "debiased_length_squared", "debiased_w2_squared")
    np.testing.assert_allclose([getattr(report, name) for name in names], truth, rtol=1e-8)
    np.testing.assert_allclose(report.gap, truth[0] - truth[2], rtol=1e-7)
    np.testing.assert_allclose(report.temporal, truth[0] - truth[1], rtol=1e-7)
    np.testing.assert_allclose(report.geometric, truth[1] - truth[2], rtol=1e-7)


def test_the_slope_of_a_length_with_negative_squares_is_finite():
    """Samples of one law: some debiased links come out below 0 and count as no length."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12, 1)), jnp.float32)
    links = distances(esl.from_snapshots(x), esl.ExactTransport(), halves=True).debiased_links
    assert float(jnp.min(links)) < 0 < float(jnp.max(links))

    def length(x):
        path = esl.from_snapshots(x)
        report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=3, debias=True)
        return report.debiased_length_squared

    assert np.all(np.isfinite(np.asarray(jax.jit(jax.grad(length))(x))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("members", [12, 31])
@pytest.mark.parametrize("transport", [esl.ExactTransport(), esl.SinkhornTransport(epsilon=0.5)])
def test_what_is_left_by_a_group_is_measured_as_a_run_of_its_own(members, transport):
    """Its halves are those of its members, and no help from all of them changes a distance."""
    positions = wandering(members, d=3)
    groups = jackknife_groups(members, 5, unit=2, least=4)
    together = distances(
        esl.from_snapshots(positions), transport, halves=True, subsets=jnp.asarray(groups.kept)
    )
    for k, kept in enumerate(groups.kept):
        alone = distances(esl.from_snapshots(positions[:, kept]), transport, halves=True)
        for name in ("links", "whole", "coarse", "debiased_links", "debiased_whole"):
            expected = getattr(alone, name)
            np.testing.assert_allclose(getattr(together, name)[k], expected, rtol=1e-6, atol=1e-9)


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
    # The last member has no partner; it is in no half, and in no group.
    kept = [np.delete(positions[:, :8], [2 * i, 2 * i + 1], axis=1) for i in range(4)]
    left = [
        esl.speed_limit(
            esl.from_snapshots(x), transport=esl.ExactTransport(), debias=True, jackknife=0
        )
        for x in kept
    ]
    for name in (*DEBIASED, "entropy_production"):
        if name == "debiased_length_squared":  # is debiased once more in each of `left`
            continue
        values = np.array([float(getattr(one, name)) for one in left])
        # (g-1)/g of the sum, of eight members in groups; nine vary less by 8/9.
        by_hand = np.sqrt(3 / 4 * 8 / 9 * np.sum((values - values.mean()) ** 2))
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
    interval = dataclasses.replace(report, freedom=freedom).interval("metric_action", level)
    truth = float(stats.t.ppf(0.5 + level / 2, freedom) * report.standard_error.metric_action)
    np.testing.assert_allclose(
        (interval.upper - interval.lower) / 2, truth, rtol=1e-2 if level < 0.1 else 1e-4
    )
    np.testing.assert_allclose(
        (interval.upper + interval.lower) / 2, report.metric_action, rtol=1e-5, atol=1e-5 * truth
    )
    assert interval.level == level


def test_ends_by_hand(report):
    width = stats.t.ppf(0.95, report.freedom)
    assert report.freedom == 15  # sixteen members: distances between moments need no pairs
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
    within = report.interval("gap")
    ends = f"lies within [{float(within.lower):.4g}, {float(within.upper):.4g}] at 95 %"
    assert ends in report.verdict()
    assert str(interval) == f"[{float(interval.lower):.6g}, {float(interval.upper):.6g}] at 90 %"
    interval = report.interval("debiased_gap", 0.9)
    value, error = report.debiased_gap, errors.debiased_gap
    np.testing.assert_allclose(
        (interval.lower, interval.upper), (value - width * error, value + width * error), rtol=1e-4
    )
    # Of a square both ends solve (θ̂ - θ)² = t² R (θ + b/2), and of either name alike.
    for name, plain in (
        ("entropy_production", report.entropy_production),
        ("w2_squared", report.w2_squared),
    ):
        interval, again = report.interval(name, 0.9), report.interval(f"debiased_{name}", 0.9)
        assert (interval.lower, interval.upper) == (again.lower, again.upper)
        value, error = report.best(name), errors.get(f"debiased_{name}")
        half = max(float(plain - value), 0) / 2
        rate = error**2 / (max(float(value), 0) + half)
        for end in (interval.lower, interval.upper):
            np.testing.assert_allclose(
                abs(value - end), width * np.sqrt(rate * (end + half)), rtol=1e-3
            )
        assert float(interval.lower) < float(value) < float(interval.upper)
    # L² is about its debiased value, with the error of that.
    interval = report.interval("length_squared", 0.9)
    if report.length_resolved:
        value, error = report.debiased_length_squared, errors.debiased_length_squared
        np.testing.assert_allclose(
            (interval.lower, interval.upper),
            (value - width * error, value + width * error),
            rtol=1e-4,
        )


def test_the_interval_of_a_halved_length_is_as_wide_as_its_error():
    """Halves know L² less well than all members do, whose error is that of the plug-in."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(5, 24, 2)) / 4 + 3 * np.arange(5.0)[:, None, None]
    report = esl.speed_limit(esl.from_snapshots(x), transport=esl.ExactTransport(), debias=True)
    assert report.length_resolved
    errors, width = report.standard_error, stats.t.ppf(0.975, report.freedom)
    assert float(errors.debiased_length_squared) != pytest.approx(
        float(errors.length_squared), rel=0.02
    )
    for name in ("length_squared", "debiased_length_squared"):
        interval = report.interval(name)
        value, reach = report.debiased_length_squared, width * errors.debiased_length_squared
        np.testing.assert_allclose(
            (interval.lower, interval.upper), (value - reach, value + reach), rtol=1e-5
        )


def test_ends_with_a_velocity():
    """Below is what is below Σ in expectation: the lower bound of fitted fields, or else Σ itself.

    Above stays the chain, with the part that its spacing hides. A Σ with a bound beside it is known
    on both sides, and so is its gap.
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
    for name in ("gap_upper", "hidden_by_spacing"):
        np.testing.assert_allclose(getattr(report, name), getattr(chain, name), rtol=1e-5)
    np.testing.assert_allclose(
        report.gap_lower, report.entropy_production - report.w2_squared, rtol=1e-5
    )
    width, errors = stats.t.ppf(0.975, report.freedom), report.standard_error
    within = report.interval("gap")
    np.testing.assert_allclose(
        (within.lower, within.upper),
        (
            report.gap_lower - width * errors.gap_lower,
            report.gap_upper + width * errors.gap_upper,
        ),
        rtol=1e-4,
    )
    bound = dataclasses.replace(report, entropy_production_bound=report.entropy_production / 2)
    np.testing.assert_allclose(
        bound.gap_lower, report.entropy_production / 2 - report.w2_squared, rtol=1e-6
    )
    np.testing.assert_allclose(bound.gap_upper, chain.gap_upper, rtol=1e-5)
    within = bound.interval("gap")
    np.testing.assert_allclose(
        (within.lower, within.upper),
        (report.gap - width * errors.gap, report.gap + width * errors.gap),
        rtol=1e-4,
    )


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


def test_too_few_members_are_rejected():
    path = esl.from_snapshots(np.zeros((3, 2, 2), np.float32) + np.arange(3)[:, None, None])
    with pytest.raises(esl.InputError, match="`debias` must be False for the moments of two"):
        esl.speed_limit(path, transport=esl.GaussianTransport(), debias=True)
