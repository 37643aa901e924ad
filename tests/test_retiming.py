"""The re-timing of a measured path against the closed form, and run again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

TRAP, HEAT, STEPS = esl.Quadratic(1.0), 0.1, 1000
# O3: schedules of one path with U = 2, and the best of them.
SAME_PATH = {
    "constant": lambda: esl.Constant(2.0 / STEPS),
    "decay": lambda: esl.Linear(4.0 / STEPS, 0.0),
    "rise": lambda: esl.Linear(0.0, 4.0 / STEPS),
    "cosine": lambda: esl.Cosine(4.0 / STEPS),
}
LEAST, AT = 3.4379491, {0.0: 0.84542908, 0.5: 1.4918779, 1.0: 6.7437645}


def exact(rate, stiffness=1.0, law=None, heat=HEAT):
    start = esl.gaussian.Law([2.0], [[1.0]]) if law is None else law
    return esl.gaussian.speed_limit(
        start, esl.Quadratic(stiffness), esl.Langevin(rate, heat), steps=STEPS
    )


@pytest.mark.parametrize("name", SAME_PATH)
def test_any_schedule_of_one_path_gives_the_best_one(name, x64):
    report = exact(SAME_PATH[name]())
    rate = esl.constant_speed(report, STEPS)
    np.testing.assert_allclose(rate.rates(STEPS).sum(), 2.0, rtol=1e-12)
    for s, printed in AT.items():
        # The nodes of a rate that starts or ends at 0 are far apart on the clock there.
        value = STEPS * float(rate(s - 0.5 / STEPS if 0 < s < 1 else s))
        np.testing.assert_allclose(value, printed, rtol=5e-3)
    again = exact(rate)
    np.testing.assert_allclose(again.entropy_production, LEAST, rtol=2e-3)
    np.testing.assert_allclose(report.length_squared, LEAST, rtol=1e-7)
    assert report.entropy_production > 1.1 * LEAST


def test_out_of_a_saddle_the_best_rate_falls(x64):
    """Constant speed slows down where forces grow: the rise is a matter of the potential."""
    law, saddle = esl.gaussian.Law([0.5, 0.5], 0.1 * np.eye(2)), jnp.array([-2.0, 1.0])
    best = esl.gaussian.optimal_learning_rate(
        law, esl.Quadratic(saddle), temperature=0.01, learning_time=1.0, steps=STEPS
    )
    assert bool(jnp.all(jnp.diff(best.values) < 0))
    # L/g at both ends, by quadrature of the two independent coordinates outside of the package.
    ends = 2.8870198, 0.4362938
    np.testing.assert_allclose(STEPS * best.values[np.array([0, -1])], ends, rtol=1e-5)
    rates = esl.constant_speed(exact(esl.Constant(1.0 / STEPS), saddle, law, 0.01), STEPS).rates(
        STEPS
    )
    middle = (jnp.arange(STEPS) + 0.5) / STEPS
    np.testing.assert_allclose(rates, jax.vmap(best)(middle), rtol=2e-3)


def simulated(rate, key, members=4000, steps=200):
    start_key, path_key = jax.random.split(jax.random.key(key))
    start = 2.0 + jax.random.normal(start_key, (members, 1))
    return esl.simulate(
        TRAP, esl.Langevin(rate, HEAT), start, steps=steps, snapshots=20, key=path_key
    )


def measured(path, **settings):
    return esl.speed_limit(path, transport=esl.GaussianTransport(), **settings)


@pytest.fixture(scope="module")
def decayed():
    return simulated(esl.Cosine(4.0 / 200), 0)


def test_run_again_it_produces_what_it_promises(decayed):
    report = measured(decayed)
    again = measured(simulated(esl.constant_speed(report), 1))
    promised, errors = report.length_squared, (report.standard_error, again.standard_error)
    error = np.hypot(errors[0].length_squared, errors[1].entropy_production)
    assert abs(again.entropy_production - promised) < 5 * error
    assert report.entropy_production - promised > 50 * error
    # The same path: what timing cannot change stays.
    same = np.hypot(errors[0].dissipation, errors[1].dissipation)
    assert abs(again.dissipation - report.dissipation) < 5 * same
    np.testing.assert_allclose(again.learning_time, report.learning_time, rtol=1e-5)
    assert again.temporal < 0.01 * promised


def test_a_recorded_run_gets_the_relative_rate(decayed):
    """It re-times training time itself: uneven snapshots are passed at constant speed."""
    kept = np.array([0, 1, 2, 4, 6, 8, 11, 14, 17, 20])
    recorded = esl.from_snapshots(decayed.positions[kept], decayed.times[kept])
    report = measured(recorded, jackknife=0)
    relative = esl.constant_speed(report, 2000, limit=1e6)
    rates = np.asarray(relative.values[:-1], float)
    np.testing.assert_allclose(rates.mean(), 1.0, rtol=1e-5)
    clock = np.concatenate([[0.0], np.cumsum(rates) / rates.size])
    arcs = np.concatenate([[0.0], np.cumsum(np.asarray(report.speed) * np.diff(recorded.times))])
    reached = np.interp(recorded.times, clock, np.linspace(0, 1, clock.size))
    np.testing.assert_allclose(reached, arcs / arcs[-1], atol=3e-3)
    assert np.abs(np.asarray(recorded.times) - arcs / arcs[-1]).max() > 0.1
    steady = simulated(esl.Constant(2.0 / 200), 0)
    alone = esl.from_snapshots(steady.positions)
    np.testing.assert_allclose(
        2.0 / 200 * esl.constant_speed(measured(alone, jackknife=0), 200).rates(200),
        esl.constant_speed(measured(steady, jackknife=0)).rates(200),
        rtol=1e-3,
    )


def test_the_limit_bounds_the_rate_where_the_path_comes_to_rest(x64):
    resting = exact(esl.Constant(20.0 / STEPS))
    for limit in (2.0, 10.0):
        rates = esl.constant_speed(resting, STEPS, limit=limit).rates(STEPS)
        assert float(rates.max()) < 2.0 * limit * 20.0 / STEPS
        np.testing.assert_allclose(rates.sum(), 20.0, rtol=1e-12)
    free = esl.constant_speed(resting, STEPS, limit=1e9).rates(STEPS)
    assert float(free.max()) > 100 * 20.0 / STEPS


def test_one_link_keeps_a_constant_rate(decayed):
    path = esl.from_snapshots(decayed.positions[:: decayed.positions.shape[0] - 1])
    rate = esl.constant_speed(measured(path, jackknife=0), 7)
    np.testing.assert_allclose(rate.rates(7), 1.0, rtol=1e-5)


def test_transformations(decayed):
    report = measured(decayed, jackknife=0)
    assert report.speed.dtype == esl.constant_speed(report).values.dtype == jnp.float32
    plain = esl.constant_speed(report)
    compiled = eqx.filter_jit(esl.constant_speed)(report, 200)
    np.testing.assert_allclose(compiled.values, plain.values, rtol=1e-3)

    def first(speed):
        changed = eqx.tree_at(lambda r: r.speed, report, speed)
        return esl.constant_speed(changed).values[0]

    slope = jax.grad(first)(report.speed)
    direction = jax.random.normal(jax.random.key(3), slope.shape) * report.speed
    step = 1e-3
    up, down = (first(report.speed + sign * step * direction) for sign in (1, -1))
    np.testing.assert_allclose(slope @ direction, (up - down) / (2 * step), rtol=2e-2)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), report)
    both = jax.vmap(lambda each: esl.constant_speed(each).values)(several)
    np.testing.assert_allclose(both[1], plain.values, rtol=1e-3)


def noise(members=16):
    x = jax.random.normal(jax.random.key(5), (11, members, 1))
    return esl.speed_limit(
        esl.from_snapshots(x), transport=esl.ExactTransport(), debias=True, jackknife=8
    )


def test_what_cannot_be_retimed_is_refused(decayed, refused):
    report = measured(decayed, jackknife=0)
    refused(lambda: esl.constant_speed(0.1), "`report` must be a SpeedLimit")
    refused(lambda: esl.constant_speed(report, limit=1.0), "`limit` must be greater than 1")
    refused(lambda: esl.constant_speed(report, 0), "`steps` must be an integer of at least 1")
    refused(lambda: esl.constant_speed(exact(0.002)), "`steps` must be given for an exact law")
    still = esl.from_snapshots(jnp.ones((4, 3, 2)) * jnp.arange(3)[:, None])
    refused(
        lambda: esl.constant_speed(measured(still, jackknife=0)),
        "`report` must be of a path along which the ensemble moves",
    )
    refused(lambda: esl.constant_speed(noise()), "`report` must resolve the speed")
    several = jax.vmap(lambda _: measured(decayed, jackknife=0))(jnp.arange(2))
    refused(lambda: esl.constant_speed(several), "`report` must be of one run or an average")
