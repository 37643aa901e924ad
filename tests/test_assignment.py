"""Exact assignment against SciPy's, and by the proof that it brings."""

import functools
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import esljax as esl
from esljax.transport import assignment


def _random(generator, n):
    return generator.normal(size=(n, n))


def _tied(generator, n):
    return generator.integers(0, 3, size=(n, n)).astype(float)


def _equal(generator, n):
    return np.full((n, n), generator.normal())


def _matched(generator, n):
    x = generator.normal(size=(n, 4))
    return _squares(x, x + 0.05 * generator.normal(size=(n, 4)))


def _turned(generator, n):
    # Every member's own partner is the next one's: the identity is not the cheapest.
    x = generator.normal(size=(n, 4))
    return _squares(x, np.roll(x, 1, axis=0))


def _clustered(generator, n):
    x, y = (
        generator.integers(0, 2, (n, 1)) + 1e-6 * generator.normal(size=(n, 3)) for _ in range(2)
    )
    return _squares(x, y)


def _far(generator, n):
    return 1e6 + generator.normal(size=(n, n))


def _low_rank(generator, n):
    # Products of weights: the worst kind for augmenting paths.
    return np.outer(np.arange(1, n + 1), np.arange(1, n + 1)) / n


def _squares(x, y):
    return ((x[:, None] - y) ** 2).sum(-1)


KINDS = [_random, _tied, _equal, _matched, _turned, _clustered, _far, _low_rank]


@functools.cache
def _many(how):
    in_turn = jax.jit(lambda costs: jax.lax.map(assignment, costs))
    return in_turn if how == "in turn" else jax.jit(assignment)


ways = pytest.mark.parametrize("how", ["in turn", "in one array"])


def _check(costs, solved, tolerance):
    for i, cost in enumerate(costs):
        columns = np.asarray(solved.columns[i])
        rows = np.arange(len(cost))
        assert len(set(columns.tolist())) == len(rows)
        assert columns.min() >= 0
        best = cost[linear_sum_assignment(cost)].sum()
        scale = np.abs(cost[rows, columns]).sum() + 1e-300
        assert cost[rows, columns].sum() - best <= tolerance * scale
        assert abs(float(solved.cost[i]) - best) <= tolerance * scale
        u, v = np.asarray(solved.row_duals[i]), np.asarray(solved.column_duals[i])
        slack = cost - u[:, None] - v
        size = np.abs(cost).max() + 1e-300
        assert slack.min() >= -len(rows) * tolerance * size
        np.testing.assert_allclose(slack[rows, columns], 0, atol=len(rows) * tolerance * size)


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_scipy(kind, how, x64):
    generator = np.random.default_rng(0)
    for n, count in ((1, 5), (2, 60), (5, 60), (9, 60), (40, 4)):
        costs = np.stack([kind(generator, n) for _ in range(count)])
        _check(costs, _many(how)(jnp.asarray(costs)), 1e-12)


@pytest.mark.slow
@ways
@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_scipy_in_ten_thousand_problems(kind, how, x64):
    generator = np.random.default_rng(1)
    for n, count in ((3, 500), (8, 500), (17, 250)):
        costs = np.stack([kind(generator, n) for _ in range(count)])
        _check(costs, _many(how)(jnp.asarray(costs)), 1e-12)


@ways
@pytest.mark.parametrize("n", [1, 3, 6])
def test_rows_choose_among_more_columns(n, how, x64):
    generator = np.random.default_rng(n)
    costs = generator.normal(size=(40, n, 7))
    solved = _many(how)(jnp.asarray(costs))
    _check(costs, solved, 1e-12)
    for columns, v in zip(np.asarray(solved.columns), np.asarray(solved.column_duals), strict=True):
        unpaired = np.setdiff1d(np.arange(7), columns)
        np.testing.assert_array_equal(v[unpaired], 0)
        assert v.max() <= 1e-12


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e30, 3e35, 1e37])
@pytest.mark.parametrize("shape", [(30, 30), (20, 30), (2, 30, 30)])
def test_costs_may_be_of_any_size(size, shape):
    """In float32 duals of a path through 30 of the largest would be no numbers."""
    costs = np.random.default_rng(11).uniform(-1, 1, shape).astype(np.float32)
    solved, one = assignment(np.float32(size) * costs), assignment(costs)
    np.testing.assert_array_equal(solved.columns, one.columns)
    for found, expected in zip(solved[1:], one[1:], strict=True):
        # In double precision, because 1e-6 of the smallest is no number.
        found, expected = np.asarray(found, float) / size, np.asarray(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_small_costs_beside_forbidden_ones_keep_their_order():
    """No unit may bring the small ones below the least number of their type."""
    generator = np.random.default_rng(13)
    costs = np.full((40, 40), 1e30, np.float32)
    for i in range(40):
        for j in (i, (i + 1) % 40, (i + 7) % 40):
            costs[i, j] = 1e-9 * generator.uniform()
    best = costs[linear_sum_assignment(costs.astype(float))].sum()
    np.testing.assert_allclose(assignment(costs).cost, best, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-19, 1e-18, 1e16, 1e18])
def test_members_of_any_size_have_their_partners(size):
    """Squares that are no numbers, or lose some of their terms, prove nothing."""
    generator = np.random.default_rng(12)
    x = size * generator.normal(size=(400, 4, 3))
    y = x + size * 10 ** generator.uniform(-3, 0, (400, 1, 1)) * generator.normal(size=x.shape)
    x, y = (each.astype(np.float32) for each in (x, y))
    # Which member is brought along.
    found = jax.jit(jax.vmap(esl.ExactTransport().map))(jnp.asarray(x), jnp.asarray(y))
    for mine, theirs, partners in zip(x, y, np.asarray(found), strict=True):
        mine, theirs, partners = (each.astype(float) / size for each in (mine, theirs, partners))
        cost = _squares(mine, theirs)
        best = cost[linear_sum_assignment(cost)].sum()
        assert ((mine - partners) ** 2).sum() <= best * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 3, 4)])
def test_no_problems_have_no_answers(shape):
    solved = assignment(np.ones(shape))
    assert solved.columns.shape == solved.row_duals.shape == shape[:-1]
    assert solved.cost.shape == shape[:-2]
    assert solved.column_duals.shape == (*shape[:-2], shape[-1])


def test_side_by_side_it_finds_what_it_finds_alone():
    costs = np.stack([kind(np.random.default_rng(2), 12) for kind in KINDS]).astype(np.float32)
    together = jax.jit(jax.vmap(assignment))(costs)
    for i, cost in enumerate(costs):
        alone = assignment(cost)
        np.testing.assert_array_equal(together.columns[i], alone.columns)


def test_many_problems_keep_their_axes_and_larger_ones_are_solved_in_turn():
    generator = np.random.default_rng(8)
    for n in (3, 65):
        costs = generator.normal(size=(2, 3, n, n)).astype(np.float32)
        solved = assignment(costs)
        assert solved.cost.shape == (2, 3)
        assert solved.columns.shape == solved.column_duals.shape == (2, 3, n)
        in_a_row = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), solved)
        _check(costs.reshape(6, n, n), in_a_row, 1e-5)
        one = jax.grad(lambda c: assignment(c).cost[1, 2])(costs)
        np.testing.assert_array_equal(one[1, 2][np.arange(n), solved.columns[1, 2]], 1)
        assert float(jnp.sum(one)) == n


def test_one_of_many_that_is_no_number_leaves_the_others_alone():
    costs = np.random.default_rng(9).normal(size=(40, 5, 5)).astype(np.float32)
    whole = jax.jit(assignment)(costs)
    costs[7, 1, 2] = np.nan
    found = jax.jit(assignment)(costs)
    assert np.flatnonzero(np.isnan(found.cost)).tolist() == [7]
    others = np.arange(40) != 7
    np.testing.assert_array_equal(found.columns[others], whole.columns[others])


def test_the_identity_is_found_where_it_is_cheapest():
    cost = _matched(np.random.default_rng(3), 50).astype(np.float32)
    np.testing.assert_array_equal(assignment(cost).columns, np.arange(50))
    np.testing.assert_array_equal(assignment(np.zeros((4, 4))).columns, np.arange(4))


def test_the_derivative_is_the_pairing(x64):
    cost = jnp.asarray(_random(np.random.default_rng(4), 6))
    columns = assignment(cost).columns
    pairing = np.zeros((6, 6))
    pairing[np.arange(6), columns] = 1
    np.testing.assert_array_equal(jax.grad(lambda c: assignment(c).cost)(cost), pairing)
    moved = jax.jvp(lambda c: assignment(c).cost, (cost,), (jnp.ones((6, 6)),))[1]
    assert float(moved) == 6
    # A finite difference, which knows nothing of pairings.
    step = 1e-6 * _random(np.random.default_rng(5), 6)
    difference = float(assignment(cost + step).cost - assignment(cost - step).cost) / 2
    assert abs(difference - float(np.sum(pairing * step))) < 1e-12


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_costs_that_are_no_numbers_end_without_a_pairing(bad):
    cost = np.ones((5, 5), np.float32)
    cost[2, 3] = bad
    assert np.isnan(jax.jit(lambda c: assignment(c).cost)(cost))
    with pytest.raises(esl.InputError, match="`cost` must be finite, but has 1 entries"):
        assignment(cost)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (np.ones(3), r"`cost` must have shape \(\*many, n, m\), but has shape \(3,\)"),
        (np.ones((0, 3)), r"`cost` must have shape \(\*many, n, m\), but has shape \(0, 3\)"),
        (np.ones((3, 2)), r"`cost` must have no more rows than columns, but has shape \(3, 2\)"),
        (np.ones((2, 2)) * 1j, "`cost` must hold real numbers"),
        ("costs", "`cost` must be a number or an array of numbers"),
    ],
)
def test_wrong_costs_are_refused(cost, message, refused):
    refused(lambda: assignment(cost), message)


@pytest.mark.parametrize("kind", ["matched", "apart"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda exact, d: exact,
        lambda exact, d: esl.ProjectedTransport(exact, jnp.eye(d)[:, :2]),
        lambda exact, d: esl.MappedTransport(exact, lambda x: x**3),
    ],
    ids=["exact", "projected", "mapped"],
)
def test_subsets_of_members_have_their_own_cheapest_pairs(kind, wrap, x64):
    """Found from the duals of all members; here against each problem solved anew by SciPy."""
    generator = np.random.default_rng(6)
    n, d = 24, 3
    x = generator.normal(size=(n, d))
    y = x + 0.01 * generator.normal(size=x.shape) if kind == "matched" else x[::-1] ** 2 + 0.3
    transport = wrap(esl.ExactTransport(), d)
    subsets = np.stack([np.setdiff1d(np.arange(n), range(i, i + 3)) for i in range(0, n, 3)])
    found = eqx.filter_jit(transport.solve_subsets)(x, y, jnp.asarray(subsets))
    assert bool(found.converged.all())
    there, back = transport.coordinates(jnp.asarray(x)), transport.coordinates(jnp.asarray(y))
    for kept, squared in zip(subsets, np.asarray(found.squared), strict=True):
        cost = _squares(np.asarray(there)[kept], np.asarray(back)[kept])
        best = cost[linear_sum_assignment(cost)].mean()
        np.testing.assert_allclose(squared, best, rtol=1e-12)


@pytest.mark.parametrize("n", [24, 70])
@pytest.mark.parametrize("far", [1e3, 1e5])
def test_subsets_without_a_member_far_away_have_their_cheapest_pairs(n, far):
    """Beside its costs the duals of the others are rounding."""
    generator = np.random.default_rng(14)
    x, y = generator.normal(size=(2, n, 3)).astype(np.float32)
    x[5] += far
    subsets = np.stack([np.setdiff1d(np.arange(n), [i]) for i in (4, 5, 6)])
    found = eqx.filter_jit(esl.ExactTransport().solve_subsets)(x, y, jnp.asarray(subsets))
    for kept, squared in zip(subsets, np.asarray(found.squared), strict=True):
        cost = _squares(x[kept].astype(float), y[kept].astype(float))
        best = cost[linear_sum_assignment(cost)].mean()
        np.testing.assert_allclose(squared, best, rtol=1e-5)


def test_a_subclass_that_solves_another_problem_solves_it_for_subsets_too():
    class Doubled(esl.ExactTransport):
        def solve(self, x, y):
            solved = super().solve(x, y)
            return esl.Solution(2 * solved.squared, solved.converged)

    x = np.random.default_rng(7).normal(size=(3, 16, 2)).astype(np.float32)
    path = esl.from_snapshots(x)
    plain, twice = (
        cast(Any, esl.speed_limit(path, transport=transport, jackknife=8).standard_error)
        for transport in (esl.ExactTransport(), Doubled())
    )
    np.testing.assert_allclose(twice.w2_squared, 2 * plain.w2_squared, rtol=1e-5)
