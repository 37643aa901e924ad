"""The free-energy monitor: books that balance on known laws and not on planted faults, calibrated
errors, and honest words."""

import dataclasses
import functools
import itertools
import operator

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import systems

import esljax as esl
from esljax.measures.balance import NUMBERS

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

KEY = jax.random.key(7)


# Each estimator, and the members it is given.
ENTROPIES = {
    "gaussian": (esl.density.GaussianEntropy, 4000),
    "along the velocity": (
        lambda: esl.density.TransportedEntropy(esl.density.GaussianEntropy()),
        4000,
    ),
    "neighbors": (esl.density.NearestNeighborEntropy, 1000),
    "kernels": (esl.density.KDEEntropy, 1000),
    "histogram": (esl.density.HistogramEntropy, 4000),
    "flow": (lambda: esl.density.FlowEntropy(jax.random.key(5), steps=200), 500),
}


@functools.cache
def relaxation(d, members, steps=400):
    """O1 and its run."""
    system = systems.ornstein_uhlenbeck(d, steps)
    start = system.sample(members, jax.random.key(1))
    return system, system.run(start, 20, KEY)


@functools.cache
def trapped(members=4000, **jumps):
    """A trap that moves, stiffens and cools at a falling rate, so that every term of the books
    counts."""
    potential = esl.Driven(
        lambda x: esl.Quadratic(1 + x, 2 * x),
        esl.Linear(0.2, 1.5),
        **{"before": 0.0, "after": 2.0, **jumps},
    )
    rule = esl.Langevin(esl.Cosine(4 / 400), esl.Linear(1.5, 0.5))
    start = jax.random.normal(jax.random.key(2), (members, 1))
    return potential, esl.simulate(potential, rule, start, steps=400, snapshots=20, key=KEY)


# The balance


@pytest.mark.parametrize(
    ("name", "d"),
    # In two dimensions one estimator stands for all in the quick tier; a flow takes a minute.
    [
        pytest.param(
            name,
            d,
            marks=pytest.mark.slow if name == "flow" or (d == 2 and name != "gaussian") else (),
        )
        for name in ENTROPIES
        for d in (1, 2)
    ],
)
def test_the_books_of_relaxation_balance(name, d):
    make, members = ENTROPIES[name]
    system, path = relaxation(d, members)
    report = esl.free_energy(path, system.potential, entropy=make(), velocity=esl.AffineVelocity())
    error = report.standard_error
    assert abs(report.residual) < 3 * error.residual < 0.05 * report.dissipation
    assert (
        abs(report.dissipation_by_balance - system.dissipation) < 5 * error.dissipation_by_balance
    )
    assert (
        abs(report.entropy_production_by_balance - system.entropy_production)
        < 5 * error.entropy_production_by_balance
    )
    change = d / 2 * np.log(0.1 + 0.9 * np.exp(-2))
    assert abs(report.heat_content_change - 0.1 * change) < 5 * error.heat_content_change
    assert "The books balance" in report.verdict()


@pytest.mark.parametrize("name", ["gaussian", "neighbors"])
def test_the_books_from_a_skewed_start(name):
    """A mixture of unequal weights, hot enough for the entropy to count; the truth is quadrature
    over mixtures."""
    weights, means, variances, temperature = [0.8, 0.2], [0.0, 3.0], [0.25, 0.09], 0.5
    rng, members = np.random.default_rng(4), 2000
    which = rng.choice(2, size=members, p=weights)
    start = np.array(means)[which] + np.sqrt(variances)[which] * rng.normal(size=members)
    path = esl.simulate(
        esl.Quadratic(1.0),
        esl.Langevin(1 / 400, temperature),
        start[:, None].astype(np.float32),
        steps=400,
        snapshots=20,
        key=KEY,
    )
    ends, dissipated = oracles.relaxing_mixture(weights, means, variances, 1.0, temperature, 1.0)
    np.testing.assert_allclose(
        ends[0][2] - ends[1][2], dissipated, rtol=1e-5
    )  # the oracle balances its own books
    report = esl.free_energy(
        path, esl.Quadratic(1.0), entropy=ENTROPIES[name][0](), velocity=esl.AffineVelocity()
    )
    error, truth = report.standard_error, np.array(ends)
    gaussian = name == "gaussian"
    # The Gaussian of the same moments has books of its own, which the affine velocity closes; those
    # of the law itself it cannot.
    assert (abs(report.residual) < 3 * error.residual) == gaussian
    assert (abs(report.dissipation_by_balance - dissipated) < 3 * error.dissipation_by_balance) == (
        not gaussian
    )
    for j, row in ((0, 0), (1, -1)):
        assert abs(report.energy[row] - truth[j, 0]) < 5 * error.energy[row]
        assert gaussian or abs(report.entropy[row] - truth[j, 1]) < 5 * error.entropy[row] + 0.005


@pytest.mark.parametrize("name", ["gaussian", "along the velocity"])
def test_the_books_of_a_driven_and_cooled_trap_balance(name):
    potential, path = trapped()
    report = esl.free_energy(
        path, potential, entropy=ENTROPIES[name][0](), velocity=esl.AffineVelocity()
    )
    assert abs(report.residual) < 3 * report.standard_error.residual
    assert (
        min(abs(report.work), abs(report.tempering), report.dissipation)
        > 20 * report.standard_error.residual
    )
    assert "Work and tempering are what the controls did" in report.verdict()


def planted(fault):
    """The books of the trap with something wrong in them."""
    potential, path = trapped(20_000)
    report = esl.free_energy(
        path, potential, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    )
    values = {name: getattr(report, name) for name in esl.FreeEnergy.__dataclass_fields__}
    wrong = {
        "work of the wrong sign": lambda: {"work_of_links": -report.work_of_links},
        "work missing": lambda: {"work_of_links": 0 * report.work_of_links},
        "temperature missing": lambda: {"temperature": jnp.zeros_like(report.temperature)},
        "entropy of the wrong sign": lambda: {"entropy": -report.entropy},
        "dissipation for entropy production": lambda: {
            "dissipation_of_links": report.mobility * report.dissipation_of_links
        },
    }
    if fault in wrong:
        return esl.FreeEnergy(**{**values, **wrong[fault]()})
    # The work is that of the run, so the balance sees jumps that the run did not make.
    other = {
        "first jump missing": trapped(before=None)[0],
        "last jump of another size": trapped(after=2.5)[0],
        "potential of another stiffness": esl.Driven(
            lambda x: esl.Quadratic(1.1 + x, 2 * x), esl.Linear(0.2, 1.5), before=0.0, after=2.0
        ),
        "drive of another end": esl.Driven(
            lambda x: esl.Quadratic(1 + x, 2 * x), esl.Linear(0.2, 1.6), before=0.0, after=2.0
        ),
    }
    return esl.free_energy(
        path, other[fault], entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    )


FAULTS = [
    "work of the wrong sign",
    "work missing",
    "temperature missing",
    "entropy of the wrong sign",
    "dissipation for entropy production",
    "first jump missing",
    "last jump of another size",
    "potential of another stiffness",
    "drive of another end",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    report = planted(fault)
    assert abs(report.residual) > 5 * report.standard_error.residual
    assert "do not balance" in report.verdict()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_copies_of_members_count_once(fraction):
    """The books and their errors are those of the distinct members, work included."""
    potential, path = trapped(200)
    places = np.concatenate([np.arange(200), np.arange(int(200 * fraction))])
    names = ("positions", "energies", "work_of_links")
    copies = {name: getattr(path, name)[:, places] for name in names}
    copied = dataclasses.replace(path, final=path.final[places], **copies)
    entropy, velocity = esl.density.GaussianEntropy(), esl.AffineVelocity()
    given, found = (
        esl.free_energy(run, potential, entropy=entropy, velocity=velocity)
        for run in (path, copied)
    )
    chex.assert_trees_all_close(found, given, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_work_is_exact_for_any_number_of_snapshots_and_so_is_the_first_law():
    """Members in no noise, whose work NumPy sums from the steps of the run alone. Trapezoids over
    snapshots would be off by 1 to 30 %."""
    start = np.array([[0.0], [0.4], [-1.0], [0.3]])
    driven = esl.Driven(
        lambda x: esl.Quadratic(1 + x, x**2), esl.Knots([0.0, 2.0, -0.5, 1.0], "linear"), after=3.0
    )

    def energy(x, drive):
        return (1 + drive) * (x[:, 0] - drive**2) ** 2 / 2

    drives = np.interp(np.linspace(0, 1, 49), np.linspace(0, 1, 4), [0.0, 2.0, -0.5, 1.0])
    x, work, heat = start, np.zeros(4), np.zeros(4)
    for k, (now, then) in enumerate(itertools.pairwise([*drives, 3.0])):
        moved = x - 0.05 * (1 + now) * (x - now**2) * (k < 48)
        heat += energy(moved, now) - energy(x, now)
        work += energy(moved, then) - energy(moved, now)
        x = moved
    for count in (1, 4, 16, 48):
        path = esl.simulate(driven, esl.Langevin(0.05), start, steps=48, snapshots=count, key=KEY)
        books = esl.free_energy(path, driven, entropy=esl.density.GaussianEntropy())
        np.testing.assert_allclose(path.work, work, rtol=1e-12)
        np.testing.assert_allclose(books.work, np.mean(work), rtol=1e-12)
        np.testing.assert_allclose(books.heat, np.mean(heat), rtol=1e-12)


# Errors


@pytest.mark.parametrize("transport", [None, esl.GaussianTransport()])
def test_errors_over_members_are_the_spread_over_runs(transport):
    runs, members = 40, 200
    keys = jax.random.split(KEY, runs)
    measured = {"velocity": esl.AffineVelocity()} if transport is None else {"transport": transport}

    def one(key):
        start = jnp.array([2.0]) + jax.random.normal(jax.random.fold_in(key, 1), (members, 1))
        return esl.simulate(
            esl.Quadratic(1.0), esl.Langevin(1 / 40, 0.5), start, steps=40, snapshots=4, key=key
        )

    paths = jax.vmap(one)(keys)
    together = esl.free_energy(
        paths, esl.Quadratic(1.0), entropy=esl.density.GaussianEntropy(), **measured
    )
    assert together.errors == "spread over 40 independent runs"
    singles = [
        esl.free_energy(
            jax.tree.map(operator.itemgetter(i), paths),
            esl.Quadratic(1.0),
            entropy=esl.density.GaussianEntropy(),
            **measured,
        )
        for i in range(6)
    ]
    for name in NUMBERS:
        if name in ("work", "tempering"):
            continue
        over_runs = np.asarray(getattr(together.standard_error, name)) * np.sqrt(runs)
        over_members = np.mean([getattr(one.standard_error, name) for one in singles], axis=0)
        # The spread of 40 runs is known to 11 %.
        np.testing.assert_allclose(over_members, over_runs, rtol=0.45)


def test_of_several_runs_the_mean():
    paths = [
        esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(0.1, 0.5),
            np.eye(4, 2, dtype=np.float32) + i,
            steps=4,
            snapshots=2,
            key=KEY,
        )
        for i in (0, 1)
    ]
    report = esl.free_energy(paths, esl.Quadratic(1.0), entropy=esl.density.GaussianEntropy())
    singles = [
        esl.free_energy(path, esl.Quadratic(1.0), entropy=esl.density.GaussianEntropy())
        for path in paths
    ]
    np.testing.assert_allclose(
        report.free_energy, np.mean([one.free_energy for one in singles], axis=0), rtol=1e-6
    )
    np.testing.assert_allclose(
        report.standard_error.energy,
        np.std([one.energy for one in singles], axis=0, ddof=1) / np.sqrt(2),
        rtol=1e-5,
    )
    assert singles[0].errors == "over 4 members"
    assert report.residual is None
    assert "nothing checks it here" in singles[0].verdict()


def test_energies_are_over_all_data_whatever_batches_the_run_saw():
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(12, 2)).astype(np.float32), rng.integers(0, 2, 12))
    potential = esl.FlaxLoss(esl.potentials.mlp(2, 3, 2), data, l2=0.1, batch_size=2)
    start = potential.init(members=40, key=jax.random.key(2))
    path = esl.simulate(potential, esl.Langevin(0.1, 0.01), start, steps=4, snapshots=2, key=KEY)
    report = esl.free_energy(path, potential, entropy=esl.density.GaussianEntropy())
    np.testing.assert_allclose(report.energy, np.mean(potential(path.positions), axis=1), rtol=1e-5)
    assert np.all(np.abs(report.energy - np.mean(path.energies, axis=1)) > 1e-4)


def test_without_temperature_the_free_energy_is_the_energy_whatever_the_entropy():
    start = np.zeros((4, 1), np.float32)  # one point has no entropy
    path = esl.simulate(
        esl.Quadratic(1.0, 2.0), esl.Langevin(0.1), start, steps=20, snapshots=4, key=KEY
    )
    report = esl.free_energy(path, esl.Quadratic(1.0, 2.0), entropy=esl.density.GaussianEntropy())
    np.testing.assert_allclose(report.dissipation_by_balance, 2 * (1 - 0.9**40), rtol=1e-5)


# Transformations


def test_jit_and_vmap_change_nothing():
    potential, path = trapped(members=8)
    report = functools.partial(
        esl.free_energy, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    )
    alone = report(path, potential)
    chex.assert_trees_all_close(
        eqx.filter_jit(report)(path, potential), alone, rtol=1e-5, atol=1e-5
    )
    paths = jax.tree.map(lambda x: jnp.stack([x, x]), path)
    mapped = jax.vmap(lambda path: report(path, potential).residual)(paths)
    np.testing.assert_allclose(mapped, np.full(2, alone.residual), rtol=1e-3, atol=1e-4)
    assert {x.dtype for x in jax.tree.leaves(alone)} == {np.dtype(np.float32)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gaussian", "along the velocity"])
def test_gradient_of_a_whole_run_is_the_central_difference(name):
    start = np.random.default_rng(3).normal(size=(9, 2))

    def fields(report):
        return (
            report.residual
            + report.work
            + 2 * report.tempering
            + jnp.sum(jnp.sin(report.free_energy))
        )

    @jax.jit
    def value(x):
        driven = esl.Driven(
            lambda s: esl.Quadratic(1 + s, s), esl.Linear(0.1, x[0]), before=0.0, after=x[1]
        )
        path = esl.simulate(
            driven, esl.Langevin(x[2], esl.Linear(0.5, x[3])), start, steps=6, snapshots=2, key=KEY
        )
        return fields(
            esl.free_energy(
                path,
                driven,
                entropy=ENTROPIES[name][0](),
                velocity=esl.AffineVelocity(),
                jackknife=0,
            )
        )

    x = jnp.array([1.0, 2.0, 0.2, 0.3])
    gradient = jax.jit(jax.grad(value))(x)
    for i, direction in enumerate(np.eye(4)):
        np.testing.assert_allclose(
            gradient[i], oracles.central_difference(value, x, direction), rtol=1e-6, atol=1e-8
        )


def test_memory_is_that_of_the_snapshots():
    def temporary(members):
        path = jax.eval_shape(
            lambda: esl.simulate(
                esl.FromFunction(_wide),
                esl.Langevin(0.1),
                jnp.ones((members, 3)),
                steps=20,
                key=KEY,
            )
        )

        def report(path):
            return esl.free_energy(
                path, esl.FromFunction(_wide), entropy=esl.density.GaussianEntropy()
            )

        return jax.jit(report).lower(path).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(200), temporary(800)
    assert many < 5 * few
    assert (
        many < 40 * 21 * 800 * 4
    )  # some tens of numbers for each member and snapshot, not the square of their count


def _wide(position):
    return jnp.sum(position**2)


# Words


def test_print():
    potential, path = trapped(members=50)
    report = esl.free_energy(
        path, potential, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    )
    lines = str(report).splitlines()
    assert lines[0] == (
        "free energy by GaussianEntropy and AffineVelocity at 21 snapshots; standard errors: over "
        "50 members"
    )
    assert lines[1].split() == ["s", "T", "E", "H", "F", "=", "E", "-", "T", "H"]
    assert [line.split()[0] for line in lines[2:13]] == [f"{s:.3f}" for s in np.linspace(0, 1, 11)]
    labels = ["ΔE", "Δ(TH)", "ΔF", "work", "heat", "tempering", "D", "D", "residual", "Σ"]
    assert [line.split()[0] for line in lines[13:23]] == labels
    assert all("±" in line for line in lines[2:23])
    energy, error = float(report.energy[-1]), float(report.standard_error.energy[-1])
    assert f"{energy:.6g} ± {error:.2g}" in lines[12]
    assert lines[-1] == report.verdict()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), report)
    assert "Several runs" in stacked.verdict()
    assert "FreeEnergy" in str(stacked)
    assert "FreeEnergy" in str(jax.eval_shape(lambda: report))
    chain = esl.free_energy(
        path,
        potential,
        entropy=esl.density.GaussianEntropy(),
        transport=esl.GaussianTransport(),
        jackknife=5,
    )
    assert str(chain).startswith(
        "free energy by GaussianEntropy and a chain in GaussianTransport at 21 snapshots; standard "
        "errors: jackknife"
    )
    assert chain.errors == "jackknife over 5 groups of 10 of 50 members"
    bare = esl.free_energy(
        path,
        potential,
        entropy=esl.density.GaussianEntropy(),
        transport=esl.GaussianTransport(),
        jackknife=0,
    )
    assert "no standard error to judge that by" in bare.verdict()
    assert "±" not in str(bare)
    np.testing.assert_allclose(bare.dissipation, chain.dissipation, rtol=1e-6)


def test_a_run_at_fixed_controls_has_no_reversible_part():
    system, path = relaxation(1, 4000)
    verdict = esl.free_energy(
        path, system.potential, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
    ).verdict()
    assert "the whole drop of F is dissipation" in verdict
    assert "reversible" not in verdict


# Bad input

BAD = {
    "`potential` must be a potential such as Quadratic.*, but is None": {"potential": None},
    "`entropy` must be an entropy estimator such as GaussianEntropy.*, but is 'gaussian'": {
        "entropy": "gaussian"
    },
    "`velocity` must be a velocity estimator such as AffineVelocity.*, but is an int": {
        "velocity": 3
    },
    "`velocity` must estimate at snapshots, .*, but is PathVelocity, which estimates on links": {
        "velocity": esl.PathVelocity()
    },
    "`velocity` must be given beside TransportedEntropy, which follows it, but is missing": {
        "entropy": esl.density.TransportedEntropy(esl.density.GaussianEntropy())
    },
    "`velocity` must know its divergence, which .* follows, but is TransportVelocity": {
        "entropy": esl.density.TransportedEntropy(esl.density.GaussianEntropy()),
        "velocity": esl.TransportVelocity(esl.GaussianTransport()),
    },
    "`transport` must stand alone, .*, but is given beside AffineVelocity": {
        "velocity": esl.AffineVelocity(),
        "transport": esl.GaussianTransport(),
    },
    "`transport` must be a transport between whole members, such as GaussianTransport": {
        "transport": esl.MappedTransport(esl.GaussianTransport(), jnp.tanh)
    },
    "`trajectory` must hold the positions of the members, but is a run observed in features": {
        "observe": jnp.tanh
    },
    "`trajectory` must hold at least 4 members for an entropy, but holds 3": {"members": 3},
    "`positions` must hold more than 4 members": {"members": 4, "d": 4},
    "`jackknife` must be an integer of at least 0, but is -1": {"jackknife": -1},
    "`trajectory` must be a Trajectory or a sequence of at least two, but is a float": {
        "trajectory": 3.0
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence, refused):
    options = {
        "members": 6,
        "d": 2,
        "observe": None,
        "potential": esl.Quadratic(1.0),
        "entropy": esl.density.GaussianEntropy(),
        **BAD[sentence],
    }
    start = (
        np.random.default_rng(0)
        .normal(size=(options.pop("members"), options.pop("d")))
        .astype(np.float32)
    )
    path = esl.simulate(
        esl.Quadratic(1.0),
        esl.Langevin(0.1, 0.1),
        start,
        steps=4,
        snapshots=2,
        key=KEY,
        observe=options.pop("observe"),
    )
    path, potential = options.pop("trajectory", path), options.pop("potential")
    refused(lambda: esl.free_energy(path, potential, **options), sentence)


def test_work_and_law_are_known_or_the_run_is_refused(refused):
    start = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    moving = esl.Driven(lambda center: esl.Quadratic(1.0, center), esl.Linear(0.0, 1.0))

    def books(path, potential):
        return esl.free_energy(path, potential, entropy=esl.density.GaussianEntropy())

    path = esl.simulate(moving, esl.Langevin(0.1, 0.1), start, steps=4, snapshots=2, key=KEY)
    bare = dataclasses.replace(path, work_of_links=None)
    refused(lambda: books(bare, moving), "must hold the work of a potential that moves")
    np.testing.assert_array_equal(books(bare, esl.Quadratic(1.0)).work, 0)
    lawless = dataclasses.replace(path, lawful=False)
    refused(lambda: books(lawless, moving), "must come from a rule with a law")


def test_a_run_that_left_the_numbers_is_refused():
    start = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    path = esl.simulate(
        esl.Quadratic(1.0), esl.Langevin(1e30), start, steps=4, snapshots=2, key=KEY
    )
    with pytest.raises(esl.InputError, match="must hold finite members"):
        esl.free_energy(path, esl.Quadratic(1.0), entropy=esl.density.GaussianEntropy())
