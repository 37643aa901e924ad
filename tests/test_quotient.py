"""Transport modulo a symmetry against SciPy's assignments, planted elements and metric axioms."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles_transport as oracles
import pytest
from scipy.optimize import linear_sum_assignment

import esljax as esl
from esljax.transport import aligned

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

SHALLOW = {"b0": (4,), "w0": (2, 4), "b1": (3,), "w1": (4, 3)}
AXES = [("w0", 1), ("b0", 0), ("w1", 0)]
DEEP = {"b0": (4,), "w0": (2, 4), "b1": (5,), "w1": (4, 5), "b2": (3,), "w2": (5, 3)}
LAYERS = {
    "first": [("w0", 1), ("b0", 0), ("w1", 0)],
    "second": [("w1", 1), ("b1", 0), ("w2", 0)],
}


def symmetry(kind):
    if kind == "deep":
        return esl.symmetry.permutations(LAYERS, signs=tuple(LAYERS), keys=DEEP)
    if kind == "independent":
        chosen = {"first": AXES, "other": [("c", 0)]}
        return esl.symmetry.permutations(chosen, signs=("other",), keys={**SHALLOW, "c": (3, 2)})
    signs = ("hidden",) if kind == "signed" else ()
    return esl.symmetry.permutations({"hidden": AXES}, signs=signs, keys=SHALLOW)


EXACT = ("plain", "signed", "independent")
KINDS = (*EXACT, "deep")


def size(kind):
    return sum(int(np.prod(shape)) for shape in dict(symmetry(kind).keys).values())


def members(kind, *shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(*shape, size(kind))).astype(dtype)


def quotient(kind, inner=None):
    return esl.QuotientTransport(inner or esl.ExactTransport(), symmetry(kind))


def units(position):
    """The numbers of each hidden unit in a row, and the others."""
    b0, w0, b1, w1 = np.split(position, [4, 12, 15])
    return np.concatenate([w0.reshape(2, 4).T, b0[:, None], w1.reshape(4, 3)], axis=1), b1


def by_scipy(x, y, signed):
    """d_G² of two members, in double precision."""
    (one, rest), (other, rest_of_other) = units(x.astype(float)), units(y.astype(float))
    squares = [np.sum((one[:, None] - sign * other) ** 2, axis=-1) for sign in (1, -1)]
    cost = np.minimum(*squares) if signed else squares[0]
    return cost[linear_sum_assignment(cost)].sum() + np.sum((rest - rest_of_other) ** 2)


@pytest.mark.parametrize("kind", ["plain", "signed"])
def test_w2_is_that_of_scipy(kind):
    x, y = members(kind, 2, 6)
    cost = np.array([[by_scipy(a, b, kind == "signed") for b in y] for a in x])
    rows, columns = linear_sum_assignment(cost)
    transport = quotient(kind)
    np.testing.assert_allclose(transport.squared(x, y), cost[rows, columns].mean(), rtol=1e-5)
    solved, places = eqx.filter_jit(transport.paired)(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(places, columns)
    partners = eqx.filter_jit(transport.partners)(x, y, places)
    np.testing.assert_allclose(np.mean(np.sum((x - partners) ** 2, 1)), solved.squared, rtol=1e-5)
    assert transport.is_metric


@pytest.mark.parametrize("kind", ["plain", "signed"])
def test_units_that_hardly_differ_find_their_partners(kind):
    """Far from 0 the rounding of their products is larger than what tells them apart."""
    x, noise = members(kind, 2, 1)
    x = 100 + 0.01 * x
    element = esl.symmetry.Element((jnp.array([2, 3, 1, 0]),), (jnp.ones(4),))
    y = np.asarray(symmetry(kind).act(element, x[0]))[None] + np.float32(1e-3) * noise
    expected = by_scipy(x[0], y[0], kind == "signed")
    np.testing.assert_allclose(quotient(kind).squared(x, y), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", EXACT)
def test_no_element_is_nearer_by_brute_force(kind):
    """Over all permutations and signs of all groups."""
    group, (x, y) = symmetry(kind), members(kind, 2)
    choices = []
    for h, one in zip(group.sizes, group.groups, strict=True):
        flips = list(itertools.product((1.0, -1.0), repeat=h)) if one.signed else [(1.0,) * h]
        choices.append(list(itertools.product(itertools.permutations(range(h)), flips)))
    parts = zip(*itertools.product(*choices), strict=True)
    stacked = [[np.array(each) for each in zip(*part, strict=True)] for part in parts]
    elements = esl.symmetry.Element(*map(tuple, zip(*stacked, strict=True)))
    values = jax.jit(jax.vmap(lambda g: jnp.sum((x - group.act(g, y)) ** 2)))(elements)
    np.testing.assert_allclose(quotient(kind).squared(x[None], y[None]), jnp.min(values), rtol=1e-5)


def test_alternating_assignments_improve_on_members_as_they_stand():
    x, y = members("deep", 2, 6)
    assert np.all(
        np.array([quotient("deep").squared(a[None], b[None]) for a, b in zip(x, y, strict=True)])
        < 0.9 * np.sum((x - y) ** 2, axis=1)
    )


def planted(kind, count, noise=0.01):
    """How many of `count` random elements are recovered from members that differ by little more."""
    group = symmetry(kind)

    @jax.jit
    @jax.vmap
    def recovered(key):
        of_x, of_g, of_noise = jax.random.split(key, 3)
        x = jax.random.normal(of_x, (size(kind),))
        element = group.draw(of_g)
        y = group.act(element, x) + noise * jax.random.normal(of_noise, x.shape)
        back = group.act(aligned(group, x, y), group.act(element, jnp.arange(1.0, 1 + len(x))))
        return jnp.all(back == jnp.arange(1.0, 1 + len(x)))

    return int(jnp.sum(recovered(jax.random.split(jax.random.key(0), count))))


@pytest.mark.parametrize("kind", EXACT)
def test_planted_elements_are_recovered(kind):
    assert planted(kind, 1000) == 1000


def test_planted_elements_of_deeper_networks_are_recovered_too():
    """An upper value need not find them all: here all are found."""
    assert planted("deep", 1000) > 990


@pytest.mark.parametrize("kind", KINDS)
def test_turning_members_changes_nothing(kind):
    x, y = members(kind, 2, 5)
    group, transport = symmetry(kind), quotient(kind)
    turn = jax.vmap(group.act)
    elements = jax.vmap(group.draw)(jax.random.split(jax.random.key(0), 5))
    before, after = (transport.squared(z, y) for z in (x, turn(elements, x)))
    if kind == "deep":  # from another start, another local minimum
        np.testing.assert_allclose(after, before, rtol=0.3)
    else:
        np.testing.assert_allclose(after, before, rtol=1e-6)
        np.testing.assert_allclose(transport.squared(x, turn(elements, x)), 0, atol=1e-10)


def axioms(kind, count, seed=0):
    """The largest breaches of the triangle inequality and of symmetry over random members."""
    transport = quotient(kind)
    x, y, z = members(kind, 3, count, 3, seed=seed, dtype=np.float64)
    # Some pairs are near each other, and some are the same network.
    y[: count // 3] = x[: count // 3] + 0.1 * y[: count // 3]
    z[count // 3 : count // 2] = 2 * y[count // 3 : count // 2] - x[count // 3 : count // 2]

    @jax.jit
    def distances(x, y, z):
        def of_one(three):
            pairs = itertools.permutations(three, 2)
            return jnp.sqrt(jnp.stack([transport.solve(a, b).squared for a, b in pairs]))

        return jax.lax.map(of_one, (x, y, z))

    xy, xz, yx, yz, zx, zy = distances(x, y, z).T
    sides = np.stack([xy, yz, xz])
    return float(np.max(2 * sides.max(0) - sides.sum(0))), float(
        max(np.max(np.abs(a - b)) for a, b in ((xy, yx), (xz, zx), (yz, zy)))
    )


@pytest.mark.parametrize(
    "count", [60, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("kind", ["signed", "independent"])
def test_the_metric_axioms_hold(kind, count, x64):
    breach, asymmetry = axioms(kind, count)
    assert breach < 1e-12
    assert asymmetry < 1e-12


@pytest.mark.parametrize(
    "count", [20, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_chains_obey_the_speed_limit(count, x64):
    """Σ ≥ L² ≥ W2² for random chains of 6 snapshots, with equality where one network moves on."""
    transport = quotient("signed")
    chains = np.cumsum(members("signed", count, 6, 3, dtype=np.float64), axis=1)

    @jax.jit
    def numbers(chains):
        def of_chain(chain):
            squares = jax.lax.map(lambda p: transport.solve(*p).squared, (chain[:-1], chain[1:]))
            whole = transport.solve(chain[0], chain[-1]).squared
            return jnp.stack([5 * squares.sum(), jnp.sqrt(squares).sum() ** 2, whole])

        return jax.lax.map(of_chain, chains)

    sigma, length, whole = np.asarray(numbers(chains)).T
    assert np.all(sigma >= length * (1 - 1e-12))
    assert np.all(length >= whole * (1 - 1e-12))


@pytest.mark.parametrize("inner", ["exact", "sinkhorn"])
@pytest.mark.parametrize("kind", ["signed", "deep"])
def test_the_gradient_is_the_central_difference(kind, inner, x64):
    sinkhorn = esl.SinkhornTransport(2.0, threshold=1e-12)
    transport = quotient(kind, sinkhorn if inner == "sinkhorn" else None)
    x, y, dx, dy = members(kind, 4, 4, dtype=np.float64)

    def along(t):
        return transport.squared(x + t * dx, y + t * dy)

    both = jax.jit(lambda t: (along(t), jax.grad(along)(t), jax.jacfwd(along)(t)))
    _, reverse, forward = both(0.0)
    numerical = oracles.central_difference(lambda t: both(t)[0], 0.0, 1.0)
    np.testing.assert_allclose(reverse, numerical, rtol=1e-7)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_members_agree(kind):
    x = members(kind, 4)
    value, gradient = jax.value_and_grad(quotient(kind).squared, (0, 1))(x, x)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, *x.shape)))


def test_a_lost_member_gives_nan():
    x, y = members("signed", 2, 4)
    x[1, 2] = np.nan
    solved = eqx.filter_jit(quotient("signed").solve)(jnp.asarray(x), jnp.asarray(y))
    assert not solved.converged
    assert np.isnan(solved.squared)


@pytest.mark.parametrize("inner", ["exact", "sinkhorn"])
def test_parts_are_problems_of_their_own(inner):
    transport = quotient("signed", esl.SinkhornTransport(2.0) if inner == "sinkhorn" else None)
    x, y = map(jnp.asarray, members("signed", 2, 6))
    rows, columns = jnp.array([[0, 2, 4], [1, 3, 5]]), jnp.array([[1, 3, 5], [0, 4, 2]])
    parts = eqx.filter_jit(transport.solve_parts)(x, y, rows, columns).squared
    alone = [transport.squared(x[i], y[j]) for i, j in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(parts, alone, rtol=1e-5)
    subsets = eqx.filter_jit(transport.solve_subsets)(x, y, rows).squared
    np.testing.assert_allclose(subsets, [transport.squared(x[i], y[i]) for i in rows], rtol=1e-5)


def test_sinkhorn_tends_to_the_exact_distance():
    x, y = members("signed", 2, 5)
    near = quotient("signed", esl.SinkhornTransport(0.05, max_iterations=100_000))
    np.testing.assert_allclose(near.squared(x, y), quotient("signed").squared(x, y), rtol=0.02)


# In reports


@pytest.fixture(scope="module")
def path():
    potential = esl.FlaxLoss(esl.models.mlp(2, 4, 2), esl.datasets.two_moons(samples=40).train)
    start = potential.init(members=8, key=jax.random.key(0))
    key = jax.random.key(1)
    return esl.simulate(potential, esl.Langevin(0.3), start, steps=12, snapshots=3, key=key)


HIDDEN = [("layers/0/kernel", 1), ("layers/0/bias", 0), ("layers/1/kernel", 0)]


def test_a_report_binds_the_arrays_of_the_run_and_debiases(path):
    by_hand = esl.symmetry.permutations({"hidden": HIDDEN}, signs=("hidden",))
    transport = esl.QuotientTransport(esl.ExactTransport(), by_hand)
    report = esl.speed_limit(path, transport=transport, debias=True, jackknife=4)
    bound = esl.QuotientTransport(esl.ExactTransport(), by_hand.at(path.keys))
    x, y = path.positions[0], path.positions[-1]
    there, back = bound.squared(x[0::2], y[1::2]), bound.squared(x[1::2], y[0::2])
    inside = [bound.squared(z[0::2], z[1::2]) for z in (x, y)]
    np.testing.assert_allclose(
        report.debiased_w2_squared, (there + back) / 2 - sum(inside) / 2, rtol=1e-4
    )
    assert report.is_bound
    assert report.w2_squared <= report.length_squared * (1 + 1e-5)
    assert report.length_squared <= report.entropy_production * (1 + 1e-5)
    assert np.isfinite(float(report.standard_error.debiased_w2_squared))
    shares = sum(share.w2_squared for share in report.by_key())
    np.testing.assert_allclose(shares, 1, rtol=1e-4)


def test_shares_of_parameters_are_of_aligned_members(path):
    """A run whose last snapshot has its units in another order has not moved at all."""
    group = esl.symmetry.permutations({"hidden": HIDDEN}, keys=path.keys)
    last = jax.vmap(lambda z: group.act(group.draw(jax.random.key(5)), z))(path.positions[0])
    moved = last.at[:, -1].add(1.0)
    turned = esl.from_snapshots(jnp.stack([path.positions[0], moved]), keys=path.keys)
    transport = esl.QuotientTransport(esl.ExactTransport(), group)
    report = esl.speed_limit(turned, transport=transport, jackknife=0)
    assert (
        float(esl.speed_limit(turned, transport=esl.ExactTransport(), jackknife=0).w2_squared) > 2
    )
    np.testing.assert_allclose(report.w2_squared, 1, rtol=1e-5)
    (share,) = (each for each in report.by_key() if each.w2_squared > 0.99)
    assert share.key == "layers/1/kernel"


def test_arrays_lie_where_the_run_has_them(path):
    """A symmetry made for another order of the same arrays is that of the run all the same."""
    axes = {"hidden": HIDDEN}
    own = esl.symmetry.permutations(axes, keys=path.keys)
    other = esl.symmetry.permutations(axes, keys=path.keys[::-1])
    renamed = [(f"my {key}", shape) for key, shape in path.keys]
    by_other_names = esl.symmetry.permutations(
        {"hidden": [(f"my {key}", axis) for key, axis in HIDDEN]}, keys=renamed
    )
    values = [
        esl.QuotientTransport(esl.ExactTransport(), each).of_parameters(path.keys).symmetry
        for each in (own, other, by_other_names)
    ]
    assert values == [own, own, by_other_names]


def test_upper_values_are_labelled():
    transport = quotient("deep")
    assert not transport.is_metric
    assert "upper values" in transport.name
    positions = members("deep", 3, 8)
    report = esl.speed_limit(esl.from_snapshots(positions), transport=transport, jackknife=0)
    assert not report.is_bound
    assert "upper values" in str(report)


REFUSED = {
    "moments": (
        lambda: esl.QuotientTransport(esl.GaussianTransport(), symmetry("plain")),
        "distances of members alone",
    ),
    "a projection": (
        lambda: esl.ProjectedTransport(quotient("plain"), jnp.eye(27)[:, ::-1]),
        "whatever coordinates they have.*turns their parameters",
    ),
    "features": (
        lambda: esl.MappedTransport(quotient("plain"), lambda member: member[::-1]),
        "whatever coordinates they have",
    ),
    "no run": (
        lambda: esl.measures.w2_bracket(members("plain", 2, 3), None),
        "trajectory.*be a run",
    ),
    "no symmetry": (
        lambda: esl.QuotientTransport(esl.ExactTransport(), "hidden"),
        "made by esljax.symmetry",
    ),
    "unbound": (
        lambda: esl.QuotientTransport(
            esl.ExactTransport(), esl.symmetry.permutations({"hidden": AXES})
        ).squared(*members("plain", 2, 3)),
        "know the shapes of its arrays",
    ),
    "members": (
        lambda: quotient("plain").squared(*members("deep", 2, 3)),
        "members of 27 numbers",
    ),
    "blocks": (
        lambda: quotient("plain", esl.SinkhornTransport(1.0, chunk=2)).squared(
            *members("plain", 2, 3)
        ),
        "chunk",
    ),
    "unequal": (
        lambda: quotient("plain").squared(members("plain", 3), members("plain", 4)),
        "hold 3 members",
    ),
    "of another kind": (
        lambda: esl.AbstractTransport.solve_costs(esl.GaussianTransport(), None, None),
        "distances of members alone",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_quotients_are_refused(name, refused):
    call, sentence = REFUSED[name]
    refused(call, sentence)
