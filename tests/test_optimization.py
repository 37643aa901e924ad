"""The optimizer against schedules and multipliers that are known, and in trouble."""

import dataclasses
import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import systems

import esljax as esl

KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")


# Known schedules


def clock(knots):
    """U = ∫η ds of log-linear knots, exactly."""
    a, b = knots.values[:-1], knots.values[1:]
    return jnp.mean((b - a) / jnp.log(b / a))


class EntropyProduction(eqx.Module):
    """Σ of O3 at a mobility given by knots, rescaled to U = 2 or with U as a constraint."""

    system: Any
    rescaled: bool = eqx.field(static=True)

    def __call__(self, knots, key):
        mobility = esl.Knots(knots.values * 2 / clock(knots)) if self.rescaled else knots
        rule = esl.Langevin(mobility, self.system.rule.temperature)
        report = esl.gaussian.speed_limit(
            self.system.law, self.system.potential, rule, steps=1, panels=4
        )
        return (
            report.entropy_production
            if self.rescaled
            else (report.entropy_production, esl.Equality(report.learning_time / 2 - 1))
        )


def cosine_start(floor=0.02):
    rates = esl.Cosine(4.0).rates(64)
    return esl.Knots(rates + floor)


def objective_of(d, rescaled):
    system = systems.cosine_decay(d, 1)
    # Only arrays and numbers that hash travel in the objective.
    return EntropyProduction(_Bare(system.potential, system.rule, system.law), rescaled)


class _Bare(eqx.Module):
    potential: Any
    rule: Any
    law: Any


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_default_finds_the_schedule_of_constant_speed(d):
    optimum = esl.optimize(objective_of(d, True), cosine_start(), key=KEY, iterations=200)
    length_squared = oracles.O3_PATH[d][1]
    assert abs(float(optimum.value) / length_squared - 1) < 1e-4
    assert float(optimum.history.value[0]) > 2 * length_squared  # from far
    best = optimum.controls.values * 2 / clock(optimum.controls)
    exact = systems.cosine_decay(d, 1)
    rate = esl.gaussian.optimal_learning_rate(
        exact.law, exact.potential, temperature=0.1, learning_time=2.0, steps=1, knots=64
    )
    np.testing.assert_allclose(best, rate.values, rtol=0.03)
    assert best[0] < best[32] < best[-1]  # it rises


@pytest.mark.usefixtures("x64")
def test_learning_time_as_a_constraint():
    optimum = esl.optimize(
        objective_of(1, False), cosine_start(), key=KEY, iterations=300, tolerance=1e-4
    )
    assert optimum.satisfied
    assert abs(float(optimum.value) / oracles.O3_PATH[1][1] - 1) < 1e-4
    # The multiplier is the price of a little more time: dL²/dU = 2 L g(U) at U = 2, with residual
    # U/2 - 1.
    mean, variance = 2 * np.exp(-2.0), 0.1 + 0.9 * np.exp(-4.0)
    g = np.sqrt(mean**2 + (variance - 0.1) ** 2 / variance)
    np.testing.assert_allclose(
        optimum.multipliers, -4 * np.sqrt(oracles.O3_PATH[1][1]) * g, rtol=0.01
    )


@pytest.mark.usefixtures("x64")
def test_lbfgs_finds_the_schedule_of_constant_speed():
    optimum = esl.optimize(
        objective_of(1, True), cosine_start(0.2), key=KEY, iterations=120, optimizer=optax.lbfgs()
    )
    assert abs(float(optimum.value) / oracles.O3_PATH[1][1] - 1) < 1e-4


@pytest.mark.usefixtures("x64")
def test_discrete_translation_through_the_simulation():
    """Rates kη_j = 1/(N - j) move a point in equal steps: the chain is then at the limit."""
    case = systems.Translation()
    start = np.full((2, 1), case.start)

    def report_of(rates):
        rule = esl.Langevin(esl.Knots(jnp.append(rates, rates[-1]), "linear"))
        path = esl.simulate(
            case.potential, rule, start, steps=case.steps, snapshots=case.steps, key=KEY
        )
        return esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=0), path.final[
            0, 0
        ]

    def objective(logarithms, key):
        report, end = report_of(jnp.exp(logarithms))
        return report.entropy_production, esl.Equality(end / (case.remaining * case.start) - 1)

    at_optimum, end = report_of(jnp.asarray(case.optimal_rates))
    np.testing.assert_allclose(end, case.remaining * case.start, rtol=1e-12)
    np.testing.assert_allclose(at_optimum.w2_squared, case.w2_squared, rtol=1e-12)
    assert abs(at_optimum.gap) < 1e-12 * case.w2_squared

    flat = np.full(case.steps, np.log(np.mean(case.optimal_rates)))
    optimum = esl.optimize(objective, jnp.asarray(flat), key=KEY, iterations=400, tolerance=1e-3)
    found, _ = report_of(jnp.exp(optimum.controls))
    assert optimum.satisfied
    assert found.gap / found.w2_squared < 1e-6
    np.testing.assert_allclose(np.exp(optimum.controls), case.optimal_rates, rtol=2e-3)
    before, _ = report_of(jnp.exp(flat))
    assert before.gap / before.w2_squared > 0.05


# Known multipliers


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("start", [0.0, 3.0, 0.999])
def test_an_inequality_with_a_known_multiplier(start):
    optimum = esl.optimize(lambda x, key: (x**2, 1 - x), start, key=KEY, iterations=400)
    np.testing.assert_allclose(optimum.controls, 1, atol=1e-3)
    np.testing.assert_allclose(optimum.multipliers, [2], rtol=0.02)
    assert optimum.satisfied
    assert optimum.residuals.shape == (1,)


@pytest.mark.usefixtures("x64")
def test_two_constraints_one_of_them_inactive():
    # min x² + y² with x + 2y ≥ 5 and x ≤ 9: (1, 2), multipliers 2 and 0.
    def objective(point, key):
        x, y = point["x"], point["y"]
        return x**2 + y**2, {"active": 5 - x - 2 * y, "idle": x - 9}

    optimum = esl.optimize(
        objective, {"x": jnp.array(3.0), "y": jnp.array(3.0)}, key=KEY, iterations=600
    )
    np.testing.assert_allclose((optimum.controls["x"], optimum.controls["y"]), (1, 2), atol=5e-3)
    np.testing.assert_allclose(optimum.multipliers, [2, 0], atol=0.15)
    assert optimum.multipliers[1] == 0
    assert optimum.satisfied


@pytest.mark.usefixtures("x64")
def test_an_equality_beside_an_inequality():
    # min (x - 2)² + (y - 2)² with x = y and x + y ≤ 2: (1, 1), multipliers 0 and 2.
    def objective(point, key):
        x, y = point
        return (x - 2) ** 2 + (y - 2) ** 2, (esl.Equality(x - y), x + y - 2)

    optimum = esl.optimize(objective, jnp.array([0.0, 0.5]), key=KEY, iterations=600)
    np.testing.assert_allclose(optimum.controls, [1, 1], atol=5e-3)
    np.testing.assert_allclose(optimum.multipliers, [0, 2], atol=0.06)
    assert optimum.satisfied


@pytest.mark.usefixtures("x64")
def test_an_equality_binds_from_both_sides():
    for target in (-2.0, 2.0):

        def objective(x, key, target=target):
            return x**2, esl.Equality(x - target)

        optimum = esl.optimize(objective, 1.0, key=KEY, iterations=400)
        np.testing.assert_allclose(optimum.controls, target, atol=2e-3)
        np.testing.assert_allclose(optimum.multipliers, [-2 * target], rtol=0.02)


def test_constraints_that_cannot_hold_are_reported():
    optimum = esl.optimize(lambda x, key: (x**2, (1 - x, x + 1)), 0.5, key=KEY, iterations=60)
    assert not optimum.satisfied
    assert "constraints NOT satisfied, largest residual" in str(optimum)


def test_a_candidate_is_not_kept_for_being_nearer_to_its_constraints_by_next_to_nothing():
    """The start violates by a little less than the end, whose value is far smaller."""
    optimum = esl.optimize(
        lambda x, key: (1 + 100 * x**2, 0.01 + 1e-6 * (1 - jnp.abs(x))),
        1.0,
        key=KEY,
        iterations=200,
    )
    assert abs(float(optimum.controls)) < 0.1


# Noise


def test_every_iteration_sees_fresh_noise_and_candidates_are_judged_on_other_keys():
    def noise(key):
        return 0.1 * jax.random.normal(key)

    optimum = esl.optimize(
        lambda x, key: (x - 1) ** 2 + noise(key), 1.0, key=KEY, iterations=30, validation=5
    )
    assert len(np.unique(optimum.history.value)) == 30
    expected = [noise(jax.random.fold_in(KEY, i)) for i in range(35)]
    np.testing.assert_allclose(optimum.history.value, expected[:30], rtol=1e-5, atol=1e-7)
    held_out = np.array(expected[30:])
    np.testing.assert_allclose(optimum.value, held_out.mean(), rtol=1e-5)
    error = optimum.standard_error.value
    np.testing.assert_allclose(error, held_out.std(ddof=1) / np.sqrt(5), rtol=1e-4)
    assert f"± {float(error):.2g}" in str(optimum)
    assert optimum.errors == "spread over 5 held-out keys"
    with pytest.warns(DeprecationWarning, match=r"Optimum\.standard_error\.value"):
        assert optimum.value_error == error
    with pytest.warns(DeprecationWarning, match=r"Optimum\.standard_error\.residuals"):
        assert optimum.residuals_error.shape == (0,)


def test_a_noisy_optimum_under_a_constraint():
    """min E|x + ξ|² with E(1 - x + ξ') ≤ 0: x = 1, to the noise of 16 draws a time."""

    def objective(x, key):
        one, two = jax.random.split(key)
        return jnp.mean((x + 0.5 * jax.random.normal(one, (16,))) ** 2), 1 - x + jnp.mean(
            0.1 * jax.random.normal(two, (16,))
        )

    optimum = esl.optimize(objective, 2.0, key=KEY, iterations=300, validation=64)
    # The residual wanders by .025 an iteration, and its mean over the last half of the search by
    # .01.
    assert abs(float(optimum.controls) - 1) < 0.03
    assert abs(float(optimum.multipliers[0]) - 2) < 0.3
    assert 0 < float(optimum.standard_error.residuals[0]) < 0.01


def test_the_best_on_held_out_keys_is_kept():
    """A search that only gets worse returns where it began."""
    optimum = esl.optimize(
        lambda x, key: x**2, 1.0, key=KEY, iterations=20, optimizer=optax.sgd(-0.1)
    )
    assert optimum.controls == 1
    assert optimum.value == 1
    assert optimum.history.value[-1] > 10


def test_same_key_same_answer():
    def objective(x, key):
        return jnp.sum((x - 1) ** 2) + x[0] * jax.random.normal(key)

    one, two, other = (
        esl.optimize(objective, np.zeros(2, np.float32), key=jax.random.key(k), iterations=20)
        for k in (0, 0, 1)
    )
    chex.assert_trees_all_equal((one.controls, one.history), (two.controls, two.history))
    assert not np.array_equal(one.controls, other.controls)


# Trouble


def test_a_search_that_runs_into_nan_keeps_what_it_had():
    """No gradient beyond x = 2, which the search reaches in its ninth step of .1 from 1.15."""
    optimum = esl.optimize(
        lambda x, key: jnp.where(x < 2, -x, jnp.nan),
        1.15,
        key=KEY,
        iterations=100,
        optimizer=optax.sgd(0.115),
        rounds=1,
    )
    assert optimum.message.startswith(
        "Stopped at iteration 9: the objective or a residual is not finite; the likely cause is a "
        "learning rate"
    )
    assert "stability limit" in optimum.message
    assert optimum.message in str(optimum)
    assert len(optimum.history.value) == 9
    assert np.isfinite(optimum.history.value).all()
    # The last finite point, although no round had ended yet.
    np.testing.assert_allclose(optimum.controls, 1.95, rtol=1e-5)
    np.testing.assert_allclose(optimum.value, -1.95, rtol=1e-5)
    assert not optimum.interrupted


def test_a_gradient_that_is_not_finite_stops_the_search():
    optimum = esl.optimize(
        lambda x, key: jnp.sqrt(jnp.maximum(x, 0)),
        0.25,
        key=KEY,
        iterations=50,
        optimizer=optax.sgd(0.05),
    )
    assert "Stopped at iteration" in optimum.message
    assert "gradient" in optimum.message
    assert np.isfinite(optimum.controls)


def test_a_gradient_that_explodes_stops_the_search():
    def steep(x, key):
        return jnp.where(x < 2, -x, -2 - 1e8 * (x - 2))

    optimum = esl.optimize(steep, 1.0, key=KEY, iterations=100)
    assert (
        "the gradient exploded to 1e+08; the likely cause is a learning rate above the stability "
        "limit" in optimum.message
    )
    assert 1.8 < optimum.controls < 2


def test_settling_on_an_optimum_is_no_explosion():
    """Gradients that had all but vanished may come back to their usual size."""

    def objective(x, key):
        return jnp.sum((x - 1) ** 2) * jnp.where(jax.random.uniform(key) < 0.1, 1.0, 1e-12)

    optimum = esl.optimize(objective, 0.0, key=KEY, iterations=60)
    assert optimum.message == "Ran all iterations."
    still = esl.optimize(
        lambda x, key: jnp.maximum(x, 0) ** 2 + jnp.where(jax.random.bernoulli(key), x, 0),
        -1.0,
        key=KEY,
        iterations=30,
    )
    assert still.message == "Ran all iterations."


@pytest.mark.parametrize(
    "objective",
    [lambda x, key: jnp.log(x), lambda x, key: jnp.sqrt(x + 1), lambda x, key: (x, jnp.log(x))],
)
def test_a_start_that_is_not_finite_is_refused(objective):
    with pytest.raises(
        esl.InputError,
        match="`controls` must start where the objective and its gradient are finite, but give",
    ):
        esl.optimize(objective, -1.0, key=KEY, iterations=5)


def test_an_objective_that_starts_at_nothing():
    optimum = esl.optimize(lambda x, key: (x - 1) ** 2, 1.0, key=KEY, iterations=5)
    assert optimum.value == 0
    assert optimum.message == "Ran all iterations."


def test_an_interrupt_keeps_the_best_so_far():
    def stop(iteration):
        if iteration.iteration == 24:
            raise KeyboardInterrupt

    optimum = esl.optimize(lambda x, key: (x - 3) ** 2, 0.0, key=KEY, iterations=500, callback=stop)
    assert optimum.interrupted
    assert optimum.message == "Interrupted after 25 of 500 iterations; this is the best so far."
    assert len(optimum.history.value) == 25
    assert 1.5 < optimum.controls < 3  # 25 steps of .1
    assert not esl.optimize(lambda x, key: x**2, 1.0, key=KEY, iterations=5).interrupted
    assert optimum.as_interrupted().interrupted


def test_what_a_callback_raises_ends_the_search():
    def fail(iteration):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        esl.optimize(lambda x, key: x**2, 1.0, key=KEY, iterations=5, callback=fail)


# Shapes and pytrees


class Target(eqx.Module):
    center: Any

    def __call__(self, controls, key):
        misfit = (
            jnp.sum((controls["schedule"].values - self.center) ** 2)
            + (controls["pair"][0] - 2.0) ** 2
        )
        return (
            misfit,
            (controls["pair"][0] - 10, jnp.stack([misfit - 1e6, -misfit])),
            {"misfit": misfit},
        )


def test_controls_of_any_form_keep_what_is_not_a_number_to_move():
    controls = {
        "schedule": esl.Knots([1.0, 2.0]),
        "pair": (0.5, 7),
        "name": "cosine",
        "count": np.arange(3),
        "nothing": None,
    }
    seen = []
    optimum = esl.optimize(
        Target(jnp.array([3.0, 4.0])), controls, key=KEY, iterations=300, callback=seen.append
    )
    np.testing.assert_allclose(optimum.controls["schedule"].values, [3, 4], rtol=0.02)
    np.testing.assert_allclose(optimum.controls["pair"][0], 2, rtol=0.02)
    assert optimum.controls["pair"][1] == 7
    assert isinstance(optimum.controls["pair"][1], int)
    assert optimum.controls["name"] == "cosine"
    assert optimum.controls["nothing"] is None
    np.testing.assert_array_equal(optimum.controls["count"], [0, 1, 2])
    history = optimum.history
    assert (history.value.shape, history.residuals.shape, history.gradient_norm.shape) == (
        (300,),
        (300, 3),
        (300,),
    )
    assert (
        optimum.residuals.shape
        == optimum.standard_error.residuals.shape
        == optimum.multipliers.shape
        == (3,)
    )
    assert [each.iteration for each in seen] == list(range(300))
    assert isinstance(seen[-1].controls["schedule"], esl.Knots)
    np.testing.assert_allclose(seen[5].auxiliary["misfit"], seen[5].value)
    np.testing.assert_allclose(history.value[5], seen[5].value)


def test_one_compilation_for_a_whole_search():
    traces = []

    def objective(x, key):
        traces.append(None)
        return x**2, 1 - x

    counts = []
    for iterations in (3, 30):
        traces.clear()
        esl.optimize(
            functools.partial(objective),
            2.0,
            key=KEY,
            iterations=iterations,
            optimizer=optax.adam(0.1),
        )
        counts.append(len(traces))
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("x64")
def test_precision_is_that_of_the_controls():
    for dtype in (np.float32, np.float64):
        optimum = esl.optimize(
            lambda x, key: (jnp.sum(x**2), 1 - x[0]), np.ones(2, dtype), key=KEY, iterations=5
        )
        assert optimum.controls.dtype == optimum.value.dtype == optimum.residuals.dtype == dtype


def test_without_constraints():
    optimum = esl.optimize(lambda x, key: (x - 3) ** 2, 0.0, key=KEY, iterations=200)
    np.testing.assert_allclose(optimum.controls, 3, atol=1e-2)
    assert optimum.satisfied
    assert optimum.residuals.shape == (0,)
    assert optimum.history.residuals.shape == (200, 0)
    assert np.isnan(optimum.standard_error.value)  # one held-out key has no spread
    assert optimum.errors == "none"
    assert str(optimum).startswith("Optimum: value ")
    assert "±" not in str(optimum)
    assert str(optimum).splitlines()[1] == f"Controls: {float(optimum.controls):.4g}"


def test_the_controls_are_printed():
    start = {"rate": esl.Knots([0.5, 0.25]), "drive": (esl.Constant(1.0), np.zeros(40))}
    optimum = esl.optimize(
        lambda x, key: jnp.sum(x["rate"].values),
        start,
        key=KEY,
        iterations=1,
        optimizer=optax.sgd(0.0),
    )
    lines = str(optimum).splitlines()
    assert lines[1] == "Controls['drive'][0]: Constant: 1"
    assert lines[2] == f"Controls['drive'][1]: {'0 ' * 8}… {'0 ' * 8}".rstrip()
    assert lines[3] == "Controls['rate']: Knots: 2 log-linear knots from 0.5 to 0.25: 0.5 0.25"
    many = dataclasses.replace(optimum, controls=list(range(40)))
    assert str(many).splitlines()[13] == "... and 28 more controls"


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("`iterations` must be an integer of at least 1, but is 0", {"iterations": 0}),
        ("`iterations` must be an integer of at least 1, but is 2.5", {"iterations": 2.5}),
        ("`rounds` must be an integer of at least 1, but is 0", {"rounds": 0}),
        ("`validation` must be an integer of at least 1, but is 0", {"validation": 0}),
        ("`penalty` must be greater than 0, but is -1", {"penalty": -1.0}),
        ("`tolerance` must be at least 0", {"tolerance": -1.0}),
        (
            "`controls` must have at least one floating-point leaf to optimize, but has none",
            {"controls": {"a": 1}},
        ),
        (
            r"`objective` must return a scalar, or \(scalar, residuals\), but returned shape \(2,",
            {"objective": lambda x, key: jnp.ones(2) * x},
        ),
        (r"`objective` must be a function of \(controls, key\), but is 3", {"objective": 3}),
        ("`optimizer` must be an optax optimizer, but is 'adam'", {"optimizer": "adam"}),
        ("`key` must be made by `jax.random.key`", {"key": 0}),
    ],
)
def test_bad_input(sentence, arguments, refused):
    arguments = {
        "objective": lambda x, key: x**2,
        "controls": 1.0,
        "key": KEY,
        "iterations": 3,
        **arguments,
    }
    objective, controls = arguments.pop("objective"), arguments.pop("controls")
    refused(lambda: esl.optimize(objective, controls, **arguments), sentence)
