"""Transports against linear programs, closed forms and each other's inequalities."""

import subprocess
import sys

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles_transport as oracles
import pytest
from ensembles import clouds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

import esljax as esl
from esljax.transport.exact import own_is_nearest

D = 3
MATRIX = np.array([[1.0, 0.3], [-0.5, 1.0], [0.2, 0.7]], np.float32)

# Every class, for members of D coordinates. Functions, so that no array is made before a test
# chooses its precision.
TRANSPORTS = {
    "exact": lambda: esl.ExactTransport(),
    "gaussian": lambda: esl.GaussianTransport(),
    "sliced": lambda: esl.SlicedTransport(2 * D, jax.random.key(3)),
    "sinkhorn": lambda: esl.SinkhornTransport(0.5, threshold=1e-5),
    "sinkhorn in blocks": lambda: esl.SinkhornTransport(0.5, threshold=1e-5, chunk=2),
    "hierarchical": lambda: esl.HierarchicalTransport(jax.random.key(3), leaf=2, passes=3),
    "mapped": lambda: esl.MappedTransport(esl.GaussianTransport(), jnp.tanh),
    "projected": lambda: esl.ProjectedTransport(esl.GaussianTransport(), MATRIX),
    "quotient": lambda: quotient(D),
}


def quotient(d):
    """Modulo the order and the signs of all coordinates."""
    symmetry = esl.symmetry.permutations({"all": [("a", 0)]}, signs=("all",), keys={"a": (d,)})
    return esl.QuotientTransport(esl.ExactTransport(), symmetry)


# Where the error of the iterations must not be seen.
TIGHT = {
    "sinkhorn": lambda: esl.SinkhornTransport(0.5, threshold=1e-12),
    "sinkhorn in blocks": lambda: esl.SinkhornTransport(0.5, threshold=1e-12, chunk=2),
}
METRICS = [name for name in TRANSPORTS if name not in (*TIGHT, "hierarchical")]
every = pytest.mark.parametrize("name", TRANSPORTS)


def sizes(name):
    """Unequal where the class takes them, with d between them."""
    return (5, 5) if name in ("exact", "hierarchical", "quotient") else (2, 5)


# Contracts


@every
def test_clouds_of_two_types_are_taken_in_the_wider_one(name, x64):
    transport = TRANSPORTS[name]()
    x, y = clouds(5, 5, D)
    single, double = np.asarray(x, np.float32), np.asarray(y, np.float64)
    for mine, theirs in ((single, double), (double, single)):
        found = transport.squared(mine, theirs)
        assert found.dtype == np.float64
        expected = transport.squared(mine.astype(np.float64), theirs.astype(np.float64))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    if hasattr(transport, "map") and name != "mapped":
        halves = (jnp.asarray(each, jnp.float16) for each in (x, y))
        assert transport.map(*halves).dtype == np.float32


@every
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    transport = TRANSPORTS[name]()
    x = np.random.default_rng(0).normal(size=(4, 5, D)).astype(np.float32)
    uncompiled = transport.solve(jnp.asarray(x[0]), jnp.asarray(x[1]))
    link = jax.jit(jax.value_and_grad(transport.squared, (0, 1)))
    values, gradient = [], np.zeros_like(x)
    for k in range(3):
        value, pair = link(x[k], x[k + 1])
        values.append(value)
        gradient[k : k + 2] += np.stack(pair)
    np.testing.assert_allclose(uncompiled.squared, values[0], rtol=1e-5)
    assert uncompiled.converged.dtype == bool
    assert uncompiled.converged

    @jax.jit
    @jax.value_and_grad
    def chain(x):
        return jnp.dot(jax.vmap(transport.squared)(x[:-1], x[1:]), jnp.ones(3))

    np.testing.assert_allclose(chain(x)[0], sum(values), rtol=1e-5)
    np.testing.assert_allclose(chain(x)[1], gradient, rtol=1e-3, atol=1e-4)


@every
def test_one_trace_for_two_calls(name):
    transport = TRANSPORTS[name]()
    x, y = clouds(5, 5)
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda x, y: transport.squared(x, y), n=1))
    assert traced(x, y) != traced(x, y + 1)


def test_squared_alone_compiles_once_even_for_new_parameters():
    calls = []

    def spy(member):
        calls.append(None)
        return member

    x, y = clouds(5, 5)
    for epsilon in (0.5, 0.7):
        esl.MappedTransport(esl.SinkhornTransport(epsilon), spy).squared(x, y)
    assert len(calls) == 3  # one trace of each cloud, and one of the shape of a feature


@every
def test_float32_stays_float32_and_gives_the_number_of_float64(name, x64):
    value_and_grad = jax.jit(jax.value_and_grad(TRANSPORTS[name]().squared))
    x, y = clouds(5, 5)
    single, double = (
        value_and_grad(x, y),
        value_and_grad(x.astype(np.float64), y.astype(np.float64)),
    )
    for ours, truth in zip(single, double, strict=True):
        assert (ours.dtype, truth.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)


CROSS = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
ONES = np.ones((6, D), np.float32)
DEGENERATE = {
    "x = y": (clouds(6, 6)[0],) * 2,
    "isotropic": (CROSS, CROSS),
    "isotropic, scaled": (CROSS, 2 * CROSS),
    "two point masses": (ONES, 2 * ONES),
    "one point mass": (ONES, ONES),
    "a mass and a cloud": (ONES, clouds(6, 6)[1]),
    "one member": clouds(1, 1),
}


@every
def test_first_derivatives_are_finite_where_the_distance_degenerates(name):
    squared = TRANSPORTS[name]().squared

    @jax.jit
    def differentiate(x, y):
        slope = jax.jvp(squared, (x, y), (jnp.ones_like(x), jnp.ones_like(y) / 2))[1]
        return jax.value_and_grad(squared, (0, 1))(x, y), slope

    for x, y in DEGENERATE.values():
        (value, gradient), slope = differentiate(x, y)
        chex.assert_tree_all_finite((value, gradient, slope))
        np.testing.assert_allclose(
            slope, gradient[0].sum() + gradient[1].sum() / 2, rtol=1e-3, atol=1e-4
        )
        if x is y:
            np.testing.assert_allclose(gradient, np.zeros((2, *x.shape)), atol=2e-5)
            np.testing.assert_allclose(value, 0, atol=1e-6)


@every
def test_gradient_is_the_central_difference(name, x64):
    transport = TIGHT.get(name, TRANSPORTS[name])()
    x, y = clouds(*sizes(name), dtype=np.float64)
    dx, dy = clouds(*sizes(name), dtype=np.float64, seed=10)

    def along(t):
        return transport.squared(x + t * dx, y + t * dy)

    both = jax.jit(lambda t: (along(t), jax.grad(along)(t), jax.jacfwd(along)(t)))
    _, reverse, forward = both(0.0)
    np.testing.assert_allclose(
        reverse, oracles.central_difference(lambda t: both(t)[0], 0.0, 1.0), rtol=1e-7
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)


@pytest.mark.parametrize(
    "name", [name for name in TRANSPORTS if name != "sinkhorn in blocks"]
)  # which rejects them
def test_second_derivatives_in_general_position(name, x64):
    transport = TIGHT.get(name, TRANSPORTS[name])()
    x, y = clouds(5, 5, dtype=np.float64)
    dx, _ = clouds(5, 5, dtype=np.float64, seed=1)
    slope = jax.grad(lambda t: transport.squared(x + t * dx, y))
    both = jax.jit(lambda t: (slope(t), jax.jacfwd(slope)(t), jax.grad(slope)(t)))
    difference = oracles.central_difference(lambda t: both(t)[0], 0.0, 1.0)
    np.testing.assert_allclose(both(0.0)[1:], [difference, difference], rtol=1e-6)


def test_the_matrix_of_a_projection_has_a_gradient(x64):
    x, y = clouds(5, 7, dtype=np.float64)

    def by_matrix(matrix):
        return esl.ProjectedTransport(esl.GaussianTransport(), matrix).squared(x, y)

    matrix, direction = MATRIX.astype(np.float64), np.cos(np.arange(6.0)).reshape(3, 2)
    slope = np.sum(jax.grad(by_matrix)(matrix) * direction)
    np.testing.assert_allclose(
        slope, oracles.central_difference(by_matrix, matrix, direction), rtol=1e-7
    )


@every
@pytest.mark.parametrize("d", [1, D])
def test_a_lost_member_gives_nan_and_returns(name, d):
    if d == 1 and name in ("projected", "quotient"):
        pytest.skip("it is for D coordinates")
    transport = TRANSPORTS[name]()
    solve = eqx.filter_jit(
        eqx.filter_value_and_grad(
            lambda x, y: ((s := transport.solve(x, y)).squared, s.converged), has_aux=True
        )
    )
    x, y = clouds(5, 5, d=d)
    assert solve(jnp.asarray(x), y)[0][1]
    # The square of 1e30 overflows, so no finite answer is right. tanh makes every number but NaN
    # finite.
    for bad in (np.nan,) if name == "mapped" else (np.nan, np.inf, 1e30):
        x[1, 0] = bad
        (value, converged), gradient = solve(jnp.asarray(x), y)
        assert np.isnan(value)
        assert not converged
        assert np.isnan(gradient).all()
        if not np.isfinite(bad):
            with pytest.raises(esl.InputError, match="`x` must be finite"):
                transport.squared(x, y)


@every
def test_lowers_for_a_tpu_with_every_product_in_full_precision(name):
    x, y = clouds(12, 12)
    lowered = (
        jax.jit(jax.value_and_grad(TRANSPORTS[name]().squared, (0, 1)))
        .trace(x, y)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert all(line.count("HIGHEST") == 2 for line in dots)
    assert dots


# Axioms and invariances


def _triples(n, d):
    """Three clouds on a coarse grid (duplicates, ties, lines), some between the two others."""
    grid = hnp.arrays(np.float32, (n, d), elements=st.integers(-8, 8).map(lambda i: i / 2))
    between = st.tuples(grid, grid, st.sampled_from([0.25, 0.5, 1.0])).map(
        lambda a: (a[0], a[0] + np.float32(a[2]) * (a[1] - a[0]), a[1])
    )
    return between | st.tuples(grid, grid, grid)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3), (6, 1)])
def test_metric_axioms(name, shape):
    transport = (
        esl.ProjectedTransport(esl.GaussianTransport(), MATRIX[: shape[1]])
        if name == "projected"
        else quotient(shape[1])
        if name == "quotient"
        else TRANSPORTS[name]()
    )
    assert transport.is_metric
    squared = jax.jit(lambda x, y: transport.squared(x, y))

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(_triples(*shape))
    def axioms(triple):
        x, y, z = triple
        xy, yz, xz = (float(squared(*pair)) for pair in ((x, y), (y, z), (x, z)))
        assert min(xy, yz, xz) >= 0
        assert abs(float(squared(y, x)) - xy) <= 1e-4 * (1 + xy)
        assert float(squared(x, x)) <= 1e-10
        # Coordinates up to 4 and float32: a distance is good to 1e-5.
        assert xz**0.5 <= xy**0.5 + yz**0.5 + 5e-5

    axioms()


def test_the_divergence_does_not_claim_to_be_a_metric():
    assert not esl.SinkhornTransport(0.5).is_metric
    assert not esl.MappedTransport(esl.SinkhornTransport(0.5), jnp.tanh).is_metric
    assert not esl.ProjectedTransport(esl.SinkhornTransport(0.5), MATRIX).is_metric


@every
def test_invariance_under_permutation_and_translation(name):
    squared = eqx.filter_jit(TRANSPORTS[name]().squared)
    n, m = sizes(name)
    x, y = clouds(n, m)
    value = squared(x, y)
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(
        squared(x[rng.permutation(n)], y[rng.permutation(m)]), value, rtol=1e-5
    )
    if name not in ("mapped", "quotient"):
        np.testing.assert_allclose(squared(x + 3, y + 3), value, rtol=1e-5)
        assert abs(squared(x + 3, y) / value - 1) > 0.1


# Exact


@pytest.mark.parametrize(("n", "d"), [(1, 2), (30, 5), (9, 20)])
def test_exact_is_the_linear_program(n, d, x64):
    x, y = clouds(n, n, d, np.float64)
    value = esl.ExactTransport().squared(x, y)
    np.testing.assert_allclose(value, oracles.assignment(x, y), rtol=1e-12)
    np.testing.assert_allclose(value, oracles.linear_program(x, y), rtol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 6), (7, 5), (100, 64)])
def test_exact_in_one_dimension_takes_any_sizes(n, m, x64):
    x, y = clouds(n, m, 1, np.float64)
    np.testing.assert_allclose(
        esl.ExactTransport().squared(x, y), oracles.one_dimensional(x, y), rtol=1e-12
    )


def test_coincident_members_cost_nothing():
    rng = np.random.default_rng(0)
    x = (10 + 1e-3 * rng.normal(size=(200, 2))).astype(np.float32)
    assert esl.ExactTransport().squared(x, x[rng.permutation(200)]) == 0


def test_neighbors_that_rounding_cannot_tell_apart_are_paired_by_their_costs():
    """Two clusters whose distance hides the distances within them from a product of matrices."""
    rng = np.random.default_rng(1)
    center = np.repeat(300 * rng.normal(size=(2000, 2, 3)), 2, axis=1)
    x, y = ((center + 0.03 * rng.normal(size=center.shape)).astype(np.float32) for _ in range(2))
    found = jax.jit(jax.vmap(lambda x, y: esl.ExactTransport().solve(x, y).squared))(x, y)
    wide = x.astype(float), y.astype(float)
    costs = np.sum((wide[0][:, :, None] - wide[1][:, None]) ** 2, axis=-1)
    best = [cost[linear_sum_assignment(cost)].mean() for cost in costs]
    # Differences of numbers near 300 are exact in float32.
    np.testing.assert_allclose(found, best, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "d", "offset"), [(2, 2, 0), (32, 2410, 0), (300, 10, 1000), (1500, 10, 0)]
)
def test_own_partners_are_recognized_by_one_product(n, d, offset):
    rng = np.random.default_rng(2)
    x = (offset + rng.normal(size=(n, d))).astype(np.float32)
    y = (x + 0.03 * rng.normal(size=x.shape)).astype(np.float32)
    assert own_is_nearest(jnp.asarray(x), jnp.asarray(y))
    # A copy of one member is as near as its original.
    y[1] = y[0]
    assert not own_is_nearest(jnp.asarray(y), jnp.asarray(y))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e15])
def test_an_assignment_whose_costs_overflow_is_not_trusted(bad):
    x, y = clouds(64, 64)
    x[5] = y[5] = bad  # partners, so that the answer would be finite where they are
    solution = eqx.filter_jit(esl.ExactTransport().solve)(jnp.asarray(x), jnp.asarray(y))
    assert bool(solution.converged) == bool(np.isfinite(solution.squared)) == (bad == 1e15)


# Gaussian


@pytest.mark.parametrize(("n", "m", "d"), [(8, 8, 3), (9, 20, 4), (50, 11, 10)])
def test_gaussian_is_bures(n, m, d, x64):
    x, y = clouds(n, m, d, np.float64)
    np.testing.assert_allclose(
        esl.GaussianTransport().squared(x, y), oracles.bures(x, y), rtol=1e-9
    )


@pytest.mark.parametrize(("n", "m", "d"), [(4, 7, 10), (3, 30, 10), (30, 3, 10), (1, 5, 4)])
def test_gaussian_of_rank_deficient_clouds(n, m, d, x64):
    x, y = clouds(n, m, d, np.float64)
    np.testing.assert_allclose(
        esl.GaussianTransport().squared(x, y), oracles.bures_of_singular(x, y), rtol=1e-6
    )


def test_gaussian_reference_o14(x64):
    x = np.sqrt(2) * np.array(
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]
    )  # covariance diag(1, 4)
    rotation = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    np.testing.assert_allclose(
        esl.GaussianTransport().squared(x, np.tile(x @ rotation.T, (3, 1))),
        10 - 2 * np.sqrt(20.5),
        rtol=1e-12,
    )


def test_lower_bounds_of_exact(x64):
    for seed in range(20):
        x, y = clouds(8, 8, dtype=np.float64, seed=seed)
        exact = esl.ExactTransport().squared(x, y)
        assert esl.GaussianTransport().squared(x, y) < exact
        assert esl.SlicedTransport(D, jax.random.key(seed)).squared(x, y) < exact
        assert esl.SlicedTransport(3 * D, jax.random.key(seed)).squared(x, y) < exact


# Sliced


def test_sliced_is_the_mean_over_its_orthonormal_directions(x64):
    x, y = clouds(6, 9, dtype=np.float64)
    transport = esl.SlicedTransport(2 * D + 1, jax.random.key(0))
    directions = np.asarray(transport._draw(D))
    for block in (directions[:, :D], directions[:, D : 2 * D]):
        np.testing.assert_allclose(block.T @ block, np.eye(D), atol=1e-12)
    assert abs(directions[:, 0] @ directions[:, D]) > 1e-3
    slices = [oracles.one_dimensional(x @ u, y @ u) for u in directions.T]
    assert len(slices) == 2 * D + 1
    np.testing.assert_allclose(transport.squared(x, y), D * np.mean(slices), rtol=1e-10)


def test_sliced_directions_depend_on_the_key_alone(request):
    x, y = clouds(6, 9)
    values = [esl.SlicedTransport(4, jax.random.key(seed)).squared(x, y) for seed in (0, 0, 1)]
    assert values[0] == values[1]
    assert abs(values[2] - values[0]) > 1e-3
    np.testing.assert_allclose(
        esl.SlicedTransport(2 * D, jax.random.key(0)).squared(x, x + 1), D, rtol=1e-5
    )
    request.getfixturevalue("x64")
    np.testing.assert_allclose(
        esl.SlicedTransport(4, jax.random.key(0)).squared(x.astype(np.float64), y),
        values[0],
        rtol=1e-5,
    )


# Float32


@pytest.mark.parametrize("name", ["exact", "gaussian", "sliced"])
def test_a_small_step_far_from_the_origin_survives_float32(name):
    rng = np.random.default_rng(0)
    x = (10 + rng.normal(size=(256, D))).astype(np.float32)
    y = x + (0.01 * rng.normal(size=x.shape)).astype(np.float32)
    transport = TRANSPORTS[name]()
    if name == "sliced":
        directions = np.asarray(transport._draw(D), np.float64)
        truth = D * np.mean(
            [
                oracles.one_dimensional(x.astype(float) @ u, y.astype(float) @ u)
                for u in directions.T
            ]
        )
    else:
        truth = {"exact": oracles.assignment, "gaussian": oracles.bures_of_near}[name](x, y)
    # Five times the measured errors. Uncentred projections would be off by 5e-6, squares by
    # expansion by 1e-2, Bures from traces by 1.
    np.testing.assert_allclose(
        transport.squared(x, y),
        truth,
        rtol={"exact": 5e-7, "gaussian": 3e-4, "sliced": 1.3e-6}[name],
    )


# Wrappers


def test_wrappers_measure_the_image():
    x, y = clouds(6, 6)
    exact = esl.ExactTransport()
    linear = esl.MappedTransport(exact, lambda member: member @ MATRIX).squared(x, y)
    np.testing.assert_allclose(linear, exact.squared(x @ MATRIX, y @ MATRIX), rtol=1e-5)
    np.testing.assert_allclose(
        linear, esl.ProjectedTransport(exact, MATRIX).squared(x, y), rtol=1e-5
    )
    orthonormal = np.linalg.qr(MATRIX)[0]
    assert esl.ProjectedTransport(exact, orthonormal).squared(x, y) < exact.squared(x, y)


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: esl.SlicedTransport(0, jax.random.key(0)),
            r"`directions` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda x: esl.SlicedTransport(3, 0),
            r"`key` must be made by `jax.random.key`, but is 0\.",
        ),
        (
            lambda x: esl.ProjectedTransport(esl.ExactTransport(), np.ones(3)),
            r"`matrix` must have shape \(d, p\), but has shape \(3,\)\.",
        ),
        (
            lambda x: esl.ProjectedTransport(esl.ExactTransport(), np.ones((4, 1))).squared(x, x),
            r"`matrix` must have shape \(3, p\).*but has shape \(4, 1\)\.",
        ),
        (
            lambda x: esl.MappedTransport(esl.ExactTransport(), jnp.sum).squared(x, x),
            r"`map` must return shape \(p,\) for one member, but returns shape \(\)\.",
        ),
        (
            lambda x: esl.MappedTransport(esl.ExactTransport(), lambda member: (member,)).squared(
                x, x
            ),
            r"`map` must return shape \(p,\) for one member, but returns a tuple\.",
        ),
        (
            lambda x: esl.ExactTransport().squared(x, x[:, :2]),
            r"`y` must have 3 coordinates per member, as `x` has, but has 2\.",
        ),
        (
            lambda x: esl.ExactTransport().squared(x[0], x),
            r"`x` must have shape \(n, d\), one row per member, but has shape \(3,\)\.",
        ),
        (
            lambda x: esl.ExactTransport().squared(x, x[:0]),
            r"`y` must hold at least 1 members, but holds 0\.",
        ),
        (
            lambda x: esl.ExactTransport().squared(x, x[:2]),
            r"`y` must hold 5 members.*`SinkhornTransport` take unequal sizes\), but holds 2\.",
        ),
        (lambda x: jax.jit(esl.ExactTransport().squared)(x, x[:2]), r"`y` must hold 5 members"),
        (
            lambda x: jax.jit(esl.GaussianTransport().squared)(x, x[:, :2]),
            r"`y` must have 3 coordinates",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(lambda: call(jnp.ones((5, D))), sentence)


# Documentation and import


def test_import_is_silent_and_ott_comes_on_first_use_without_a_trace_left_behind():
    program = (
        "import sys, jax, jax.numpy as jnp, esljax.transport.sinkhorn as s, esljax.transport as t\n"
        "assert 'ott' not in sys.modules\n"
        "x = jnp.arange(6.0).reshape(3, 2)\n"
        "first = jax.jit(t.ExactTransport().squared)(x, x + 1)\n"
        "second = s.SinkhornTransport(1.0).squared(x, x + 1)\n"
        "assert first == 2 and abs(second - 2) < 1e-3\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
