"""The jackknife and the intervals of squares: by hand, by SciPy, and over many samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

import esljax as esl
from esljax._numerics import debiased_variance
from esljax.measures.errors import (
    interval_of_square,
    jackknife_bias,
    jackknife_groups,
    jackknife_variance,
    quantile,
    resolved_squares,
)

# Groups


@given(
    members=st.integers(2, 400),
    most=st.integers(0, 40),
    unit=st.sampled_from([1, 2]),
    least=st.integers(1, 6),
)
def test_groups_are_disjoint_and_cover_all_members_where_they_can(members, most, unit, least):
    groups = jackknife_groups(members, most, unit=unit, least=least)
    halves = list(range(unit, members // 2 + 1, unit))
    if most < 2 or not halves:
        assert groups is None
        return
    smallest = min(unit * int(np.ceil(members / (most * unit))), halves[-1])
    # None is left over if groups of up to half again the least size can do without.
    sizes = [size for size in range(smallest, smallest * 3 // 2 + 1, unit) if members % size == 0]
    # Else smaller groups may hold more members, or as many in more groups.
    near = [size for size in (smallest, smallest - unit) if size]
    held = {size: min(members // size, most) * size for size in near}
    size = sizes[0] if sizes else min(near, key=lambda size: (-held[size], size))
    if groups is None:
        assert min(members // size, most) * size - size < least
        return
    left = [sorted(set(range(groups.covered)) - set(kept)) for kept in groups.kept.tolist()]
    assert all(len(one) == groups.size for one in left)
    assert sorted(itertools.chain(*left)) == list(range(groups.covered))
    assert groups.count == len(groups.kept) <= most
    assert groups.size % unit == 0
    assert groups.kept.shape[1] == groups.covered - groups.size >= least
    assert groups.size == size
    assert members - groups.covered == members - min(members // size, most) * size


@pytest.mark.parametrize(
    ("members", "most", "words"),
    [
        (31, 8, "7 groups of 4 of 31"),  # a prime: three members belong to no group
        (31, 31, "31 groups of 1 of 31"),
        (50, 16, "10 groups of 5 of 50"),  # not 12 groups of 4
        (64, 32, "32 groups of 2 of 64"),
        (9, 2, "2 groups of 4 of 9"),  # not none
        (11, 3, "3 groups of 3 of 11"),  # not 2 groups of 4
        (49, 16, "16 groups of 3 of 49"),  # not 12 groups of 4, which hold as many
    ],
)
def test_a_report_says_who_left(members, most, words):
    x = np.random.default_rng(0).normal(size=(3, members, 1)).astype(np.float32)
    report = esl.speed_limit(
        esl.from_snapshots(x), transport=esl.GaussianTransport(), jackknife=most
    )
    assert report.errors == f"jackknife over {words} members"
    assert report.freedom == int(words.split()[0]) - 1


# Variance and bias


@pytest.mark.usefixtures("x64")
def test_the_mean_and_its_square_by_hand():
    """One member at a time: the variance of a mean is s²/n, and the bias of its square too."""
    x = np.random.default_rng(1).normal(size=(12, 3)) + 2
    groups = jackknife_groups(12, 12)
    means = jnp.stack([jnp.mean(x[kept], axis=0) for kept in groups.kept])
    error = np.var(x, axis=0, ddof=1) / 12
    np.testing.assert_allclose(jackknife_variance(means, groups, 12), error, rtol=1e-12)
    bias = jackknife_bias(jnp.asarray(np.mean(x, axis=0) ** 2), means**2, groups)
    np.testing.assert_allclose(bias, error, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_members_in_no_group_count_in_the_variance():
    """The mean of 31 members, of which 28 leave in groups of 4: its variance is that of 31."""
    x = np.random.default_rng(2).normal(size=(20_000, 31))
    groups = jackknife_groups(31, 8)
    means = jnp.stack([jnp.mean(x[:, kept], axis=1) for kept in groups.kept])
    # Seven groups know a variance to √(2/6) of it, 20 000 samples to .4 %; 28/31 is 10 % less.
    np.testing.assert_allclose(np.mean(jackknife_variance(means, groups, 31)), 1 / 31, rtol=0.02)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("ratio", "too_large"), [(0.0, 1.25), (1.0, 1.0), (10.0, 1.0)])
def test_the_error_of_a_square_without_its_noise_counted_twice(ratio, too_large):
    """θ̂ = ‖x̄‖² - b in 20 dimensions, of a mean of `ratio` times its own error.

    Its variance is (2b² + 4θb)/20, where the jackknife of ‖x̄‖² has (4b² + 4θb)/20. The correction
    needs θ and has θ̂, or 0 if that is negative: at θ = 0 it has .13 b on the average, .25 of b/2.
    """
    n, d, samples = 24, 20, 2000
    x = np.random.default_rng(3).normal(size=(samples, n, d)) + ratio / np.sqrt(n)
    groups = jackknife_groups(n, n)

    def square(x):
        return jnp.asarray(np.sum(np.mean(x, axis=1) ** 2, axis=1))

    replicates = jnp.asarray([square(x[:, kept]) for kept in groups.kept])
    variance = jackknife_variance(replicates, groups, n)
    bias = jackknife_bias(square(x), replicates, groups)
    value = square(x) - bias
    truth = (2 + 4 * ratio**2) * d / n**2
    np.testing.assert_allclose(np.var(value), truth, rtol=0.16)  # five errors
    claimed = np.mean(np.asarray(debiased_variance(value, variance, bias)))
    np.testing.assert_allclose(claimed / truth, too_large, rtol=0.1)
    if ratio == 0:
        assert np.mean(variance) / truth > 1.8


# Intervals


@given(
    value=st.floats(-3, 30),
    error=st.floats(0.01, 5),
    bias=st.floats(0.001, 5),
    width=st.floats(0.5, 13),
)
def test_ends_are_the_roots_of_the_score_equation(value, error, bias, width):
    interval = interval_of_square(
        jnp.asarray(value), jnp.asarray(error), jnp.asarray(bias), width, 0.95
    )
    rate = error**2 / (max(value, 0) + bias / 2)

    def score(theta):
        return (value - theta) ** 2 - width**2 * rate * (theta + bias / 2)

    # Least where its slope vanishes; positive far away on both sides.
    least = value + width**2 * rate / 2
    size = abs(value) + bias + width * error + width**2 * rate
    if score(least) > -1e-5 * size**2:
        if score(least) > 1e-5 * size**2:  # no root: as wide as its error
            np.testing.assert_allclose(
                (interval.lower, interval.upper),
                (value - width * error, value + width * error),
                rtol=1e-4,
                atol=1e-4 * size,
            )
        return
    ends = [optimize.brentq(score, least, least + way * 3 * size) for way in (-1, 1)]
    np.testing.assert_allclose((interval.lower, interval.upper), ends, rtol=1e-3, atol=3e-3 * size)


@pytest.mark.usefixtures("x64")
def test_ends_in_double_precision():
    for value, error, bias, width in [(2.0, 0.5, 0.3, 2.1), (-0.1, 0.5, 0.3, 2.1), (9, 3, 0, 1.9)]:
        interval = interval_of_square(
            jnp.asarray(float(value)),
            jnp.asarray(float(error)),
            jnp.asarray(float(bias)),
            width,
            0.95,
        )
        rate = error**2 / (max(value, 0.0) + bias / 2)
        for end in (interval.lower, interval.upper):
            np.testing.assert_allclose(
                (value - end) ** 2, width**2 * rate * (end + bias / 2), rtol=1e-9
            )


def test_no_interval_has_zero_width():
    """A Σ far below 0, which no square explains, is not known exactly for that."""
    for value, error, bias in [(-5.0, 1.0, 1.0), (-1.0, 0.5, 0.0), (-1.0, 0.5, -0.2)]:
        interval = interval_of_square(
            jnp.asarray(value), jnp.asarray(error), jnp.asarray(bias), 2.0, 0.95
        )
        np.testing.assert_allclose(
            (interval.lower, interval.upper), (value - 2 * error, value + 2 * error), rtol=1e-6
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 30.0])
def test_intervals_of_a_square_cover(ratio):
    """x̄² - s²/n of five coordinates, from its jackknife error."""
    n, d, samples = 40, 5, 4000
    x = np.random.default_rng(4).normal(size=(samples, n, d)) + ratio / np.sqrt(n)
    groups = jackknife_groups(n, 20)

    def square(x):
        return jnp.asarray(np.sum(np.mean(x, axis=1) ** 2, axis=1))

    replicates = jnp.asarray([square(x[:, kept]) for kept in groups.kept])
    bias = jackknife_bias(square(x), replicates, groups)
    value = square(x) - bias
    error = jnp.sqrt(debiased_variance(value, jackknife_variance(replicates, groups, n), bias))
    interval = interval_of_square(value, error, bias, quantile(0.975, groups.count - 1), 0.95)
    truth = d * ratio**2 / n
    lower, upper = np.asarray(interval.lower), np.asarray(interval.upper)
    # 4000 samples know a coverage to .35 %. Errors that vanish with a square missed 13 % at 0.
    assert 0.93 < np.mean((lower <= truth) & (truth <= upper)) < 0.985
    assert np.all(upper > lower)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 8, 19, 31, 1000])
@pytest.mark.parametrize("probability", [0.505, 0.75, 0.975, 0.9995])
def test_quantiles_of_student(freedom, probability):
    np.testing.assert_allclose(
        quantile(probability, freedom), stats.t.ppf(probability, freedom), rtol=1e-6
    )


def test_a_square_below_two_errors_is_not_resolved():
    squares = jnp.array([1.0, 4.0, 2.0])
    assert resolved_squares(squares, jnp.array([0.2, 1.0, 0.9]))
    assert not resolved_squares(squares, jnp.array([0.2, 1.0, 1.1]))
    assert not resolved_squares(jnp.array([1.0, 0.0]), jnp.zeros(2))


# The jackknife against the bias of distances


@pytest.mark.parametrize(("d", "n", "runs"), [(1, 20, 4000), (5, 60, 1000)])
@pytest.mark.parametrize("apart", [False, True], ids=["one law", "two laws"])
def test_distances_between_moments_without_bias(d, n, runs, apart):
    """W2² between two independent small samples, in the geometry of moments."""
    shift, width = (0.5, 1.5) if apart else (0.0, 1.0)

    def one(key):
        x, y = jax.random.normal(key, (2, n, d))
        path = esl.from_snapshots(jnp.stack([x, shift + width * y]))
        report = esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=20, debias=True)
        return report.w2_squared, report.debiased_w2_squared

    keys = jax.random.split(jax.random.key(d), runs)
    plain, debiased = map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    truth = oracles.gaussian_w2_squared(
        np.zeros(d), np.eye(d), np.full(d, shift), width**2 * np.eye(d)
    )
    error = np.std(debiased) / np.sqrt(runs)
    assert abs(np.mean(debiased) - truth) < 5 * error
    assert np.mean(plain) - truth > 10 * error
