"""Σ, L² and W2² are right wherever the members lie, in whatever unit and type they come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

J, N, D = 4, 6, 3
NUMBERS = ("entropy_production", "length_squared", "w2_squared")
MATRIX = jnp.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(D, 2)))[0], jnp.float32)


def recording():
    """Return members that drift, with motion of their own, in double precision."""
    random = np.random.default_rng(0)
    drift = np.linspace(0, 2, J + 1)[:, None, None] * np.array([1.0, 0.5, -1.0])
    return random.normal(size=(1, N, D)) + drift + 0.1 * random.normal(size=(J + 1, N, D))


def sigma(positions, **options):
    path = esl.from_snapshots(positions)
    report = esl.speed_limit(path, **{"transport": esl.ExactTransport(), "jackknife": 0, **options})
    return float(report.entropy_production)


def action(positions):
    """Return Σ of members that stay their own best partners, in the type of the numbers."""
    positions = np.asarray(positions, np.longdouble)
    return float(J * np.sum(np.mean(np.sum(np.diff(positions, axis=0) ** 2, axis=2), axis=1)))


# Units

TRANSPORTS = {
    "exact": lambda c: esl.ExactTransport(),
    "gaussian": lambda c: esl.GaussianTransport(),
    "sliced": lambda c: esl.SlicedTransport(D, jax.random.key(0)),
    "sinkhorn": lambda c: esl.SinkhornTransport(2.0 * c**2),
    "projected": lambda c: esl.ProjectedTransport(esl.SinkhornTransport(2.0 * c**2), MATRIX),
}
VELOCITIES = {
    "chain": lambda transport: None,
    "paths": lambda transport: esl.PathVelocity(),
    "maps": lambda transport: esl.TransportVelocity(
        transport if hasattr(transport, "map") else esl.ExactTransport()
    ),
}


@pytest.mark.parametrize(
    ("transport", "velocity"),
    [*((name, "chain") for name in TRANSPORTS), ("exact", "paths"), ("sinkhorn", "maps")],
)
def test_reports_do_not_depend_on_the_unit(transport, velocity):
    def measured(c):
        positions = np.float32(recording() * c)
        solver = TRANSPORTS[transport](c)
        return esl.speed_limit(
            esl.from_snapshots(positions),
            transport=solver,
            velocity=VELOCITIES[velocity](solver),
            jackknife=3,
        )

    one = measured(1.0)
    for c in (1e-16, 1e-8, 1e8, 1e17):
        other = measured(c)
        for name in NUMBERS:
            value, right = float(getattr(other, name)) / c / c, float(getattr(one, name))
            np.testing.assert_allclose(value, right, rtol=1e-5, err_msg=f"{name} at {c}")
            error = float(other.standard_error.get(name)) / c / c
            np.testing.assert_allclose(error, float(one.standard_error.get(name)), rtol=1e-3)
        np.testing.assert_allclose(
            np.array([other.interval("gap").lower, other.interval("gap").upper]) / c / c,
            [one.interval("gap").lower, one.interval("gap").upper],
            rtol=1e-2,
        )
        assert [f.name for f in other.diagnose()] == [f.name for f in one.diagnose()]


@pytest.mark.parametrize(
    ("c", "name"), [(1e-22, "underflow"), (1e-19, "underflow"), (1e19, "overflow")]
)
def test_numbers_that_their_type_cannot_hold_are_named_with_their_size(c, name):
    report = esl.speed_limit(
        esl.from_snapshots(np.float32(recording() * c)), transport=esl.ExactTransport()
    )
    (finding,) = report.diagnose()
    assert finding.name == name
    size = np.log10(float(finding.evidence.partition("about ")[2].split(",")[0]))
    right = np.log10(action(recording())) + 2 * np.log10(c)
    np.testing.assert_allclose(size, right, atol=0.01)
    assert report.verdict().startswith(f"No verdict, by {name}: ")


def test_intervals_of_squares_do_not_depend_on_the_unit():
    def ends(c):
        made = esl.speed_limit(
            esl.from_snapshots(np.float32(recording() * c)),
            transport=esl.GaussianTransport(),
            jackknife=6,
            debias=True,
        )
        interval = made.interval("debiased_entropy_production")
        return np.array([interval.lower, interval.upper]) / c / c

    assert np.diff(ends(1.0)) > 0.1
    np.testing.assert_allclose(ends(2.0**-50), ends(1.0), rtol=1e-6)


def test_velocities_with_a_drift_are_measured_in_the_unit_of_the_members():
    def measured(c):
        start = c * (3 + jax.random.normal(jax.random.key(0), (24, 2)))
        potential, rule = esl.Quadratic(1.0), esl.Langevin(0.05, 0.1 * c**2)
        path = esl.simulate(potential, rule, start, steps=8, snapshots=4, key=jax.random.key(1))
        return esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=esl.AffineVelocity(),
            potential=potential,
            jackknife=3,
        )

    one, other = measured(1.0), measured(2.0**-48)
    for name in (*NUMBERS, "entropy_production_bound", "housekeeping", "dissipation"):
        np.testing.assert_allclose(
            getattr(other, name) * 2.0**96, getattr(one, name), rtol=1e-5, err_msg=name
        )
    error = other.standard_error.gap * 2.0**96
    np.testing.assert_allclose(error, one.standard_error.gap, rtol=1e-4)


def test_the_gradient_is_that_in_the_members_own_unit():
    def length(positions):
        path = esl.from_snapshots(positions)
        return esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0).length_squared

    x = jnp.asarray(recording(), jnp.float32)
    slope = jax.grad(length)
    np.testing.assert_allclose(slope(x * 2.0**-45) * 2.0**45, slope(x), rtol=1e-6)
    assert float(jnp.abs(slope(x)).max()) > 0.1


class Reflecting(esl.transport.AbstractWrappedTransport):
    """Knows where 0 is: no distance of it stays if both ensembles are moved."""

    def solve(self, x, y):
        return self.transport.solve(x, -y)


@pytest.mark.parametrize(
    "transport",
    [
        Reflecting(esl.ExactTransport()),
        esl.MappedTransport(esl.ExactTransport(), lambda member: member**2),
    ],
    ids=["wrapped", "mapped"],
)
def test_transports_that_know_where_0_is_see_the_members_in_place(transport):
    positions = 1e2 + recording() * 1e-2
    path = esl.from_snapshots(positions)
    assert path.origin is not None
    report = esl.speed_limit(path, transport=transport, jackknife=0)
    first, last = (jnp.asarray(x, jnp.float32) for x in (positions[0], positions[-1]))
    np.testing.assert_allclose(report.w2_squared, transport.squared(first, last), rtol=1e-3)


# Places and types


@pytest.mark.parametrize(
    ("offset", "width", "kind"),
    [
        (1e4, 1e-4, np.float64),
        (-1e4, 1e-4, np.float64),
        (np.array([1e4, 0, -1e8]), 1e-4, np.float64),
        (1e12, 1.0, np.longdouble),
        (2**40, 100, np.int64),
        (2**63, 100, np.uint64),
        (-(2**30), 100, np.int32),
        (0, 1.0, ">f8"),
        (30, 100, ">i4"),
    ],
    ids=str,
)
def test_recordings_far_from_0_keep_their_distances(offset, width, kind):
    kind = np.dtype(kind)
    near = recording() * width
    if kind.kind in "iu":
        near = np.rint(near + 10 * width).astype(np.int64)
        positions = (near.astype(object) + offset).astype(kind)
    else:
        positions = (np.asarray(near, np.longdouble) + offset).astype(kind)
    right = action(near)
    assert abs(sigma(positions) / right - 1) < 2e-3
    path = esl.from_snapshots(positions)
    there = np.asarray(path.placed.positions, np.float64)
    np.testing.assert_allclose(there, positions.astype(np.float64), rtol=2e-7, atol=1e-6 * width)
    np.testing.assert_array_equal(path.final, path.placed.positions[-1])


def test_numbers_that_lose_nothing_stay_where_they_are():
    positions = recording() + 3
    path = esl.from_snapshots(positions)
    assert path.origin is None
    np.testing.assert_array_equal(path.positions, np.float32(positions))
    assert esl.from_snapshots(np.float32(1e4 + recording()).astype(np.float64)).origin is None
    hidden = jax.jit(lambda x: esl.from_snapshots(x).positions)
    np.testing.assert_array_equal(hidden(path.positions), path.positions)


def test_several_recorded_runs_at_several_places():
    runs = [esl.from_snapshots(recording() * 1e-2 + offset) for offset in (0, 1e4)]
    assert [one.origin is None for one in runs] == [True, False]
    both = esl.speed_limit(runs, transport=esl.ExactTransport()).entropy_production
    np.testing.assert_allclose(both, action(recording() * 1e-2), rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [
        (recording()[:1] + 1e-9 * recording(), "move by more than float32 resolves: compute in"),
        (np.ma.masked_greater(recording(), 2.5), "without masked entries"),
        (recording() + 1e40, "be finite in float32"),
    ],
    ids=["motion below rounding", "masked", "too large"],
)
def test_recordings_that_their_type_cannot_hold_are_refused(positions, sentence):
    with pytest.raises(esl.InputError, match=sentence):
        esl.from_snapshots(positions)


# Rounding is no motion


def test_changes_to_the_next_number_alone_are_rounding():
    ones = 1 + 2.0**-23 * np.random.default_rng(0).integers(0, 2, size=(J + 1, N, D))
    report = esl.speed_limit(esl.from_snapshots(np.float32(ones)), transport=esl.ExactTransport())
    assert [f.name for f in report.diagnose()] == ["rounded positions without motion"]
    assert report.verdict().startswith("No verdict, by rounded positions without motion")


def test_steps_that_the_positions_cannot_take_are_named():
    start = 1 + jax.random.uniform(jax.random.key(0), (N, D))
    still = esl.simulate(
        esl.Quadratic(1.0), esl.Langevin(1e-9), start, steps=8, snapshots=4, key=jax.random.key(1)
    )
    report = esl.speed_limit(still, transport=esl.ExactTransport(), jackknife=0)
    (finding,) = report.diagnose()
    assert finding.name == "nothing moved"
    assert "learning rate times force below the spacing of the positions" in finding.causes[0]
    assert "below the spacing of the positions in float32, about 1.2e-07" in report.verdict()


@pytest.mark.parametrize("epsilon", [1e8, 1e30])
def test_an_epsilon_that_hides_the_motion_is_named(epsilon):
    report = esl.speed_limit(
        esl.from_snapshots(recording()), transport=esl.SinkhornTransport(epsilon), jackknife=0
    )
    assert report.verdict().startswith("No verdict, by ε hides the motion: ")
    assert "Nothing moved" not in report.verdict()


def test_an_epsilon_below_all_numbers_is_refused():
    with pytest.raises(esl.InputError, match=r"at least 1\.2e-38, the least number that float32"):
        esl.SinkhornTransport(1e-45)
