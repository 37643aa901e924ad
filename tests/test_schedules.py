"""Schedules: one contract table for every class, and NumPy formulas for each."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import esljax as esl
import esljax.schedules as schedules_module
from esljax.experiment import Problem
from esljax.schedules import as_schedule

TABLE = [0.3, 0.7, 0.1, 0.2]
OPTAX = optax.warmup_cosine_decay_schedule(0.1, 0.9, 5, 25, 0.05)

# Every class with skewed numbers, beside its formula in NumPy. Functions, so that no array is made
# before a test chooses its precision.
SCHEDULES = {
    "constant": (lambda: esl.Constant(0.3), lambda s: 0.3 + 0 * s),
    "linear": (lambda: esl.Linear(0.3, 0.7), lambda s: 0.3 + 0.4 * s),
    "cosine": (lambda: esl.Cosine(0.7, 0.1), lambda s: 0.1 + 0.3 * (1 + np.cos(np.pi * s))),
    "exponential": (
        lambda: esl.Exponential(0.7, 0.01),
        lambda s: 0.7 * np.exp(s * np.log(0.01 / 0.7)),
    ),
    "wsd": (
        lambda: esl.WarmupStableDecay(0.7, 0.13, 0.29, 0.05, 0.02),
        lambda s: np.interp(s, [0, 0.13, 0.71, 1], [0.05, 0.7, 0.7, 0.02]),
    ),
    "wsd with a root": (
        lambda: esl.WarmupStableDecay(0.7, 0.13, 0.29, 0.05, 0.02, "1-sqrt"),
        lambda s: np.where(
            s < 0.71,
            np.interp(s, [0, 0.13], [0.05, 0.7]),
            0.02 + 0.68 * (1 - np.sqrt(np.clip((s - 0.71) / 0.29, 0, 1))),
        ),
    ),
    "piecewise": (
        lambda: esl.Piecewise([0.3, 0.7, 0.1], [0.13, 0.71]),
        lambda s: np.select([s < 0.13, s < 0.71], [0.3, 0.7], 0.1),
    ),
    "warmup": (
        lambda: esl.Warmup(esl.Linear(0.7, 0.1), 0.2, 0.05),
        lambda s: np.interp(s, [0, 0.2, 1], [0.05, 0.7, 0.1]),
    ),
    "scaled": (
        lambda: esl.Scaled(esl.Linear(0.2, 0.4), 1.5),
        lambda s: 0.3 + 0.3 * s,
    ),
    "log-linear knots": (
        lambda: esl.Knots(TABLE),
        lambda s: np.exp(np.interp(s, np.linspace(0, 1, 4), np.log(TABLE))),
    ),
    "linear knots": (
        lambda: esl.Knots(TABLE, "linear"),
        lambda s: np.interp(s, np.linspace(0, 1, 4), TABLE),
    ),
    "optax": (
        lambda: esl.FromOptax(OPTAX, 25),
        lambda s: oracles.warmup_cosine(25 * s, 0.1, 0.9, 5, 25, 0.05),
    ),
}
every = pytest.mark.parametrize("name", SCHEDULES)
# Knots and corners of the table, both ends, and times between.
TIMES = np.array([0.0, 0.05, 0.13, 0.2, 1 / 3, 0.5, 0.71, 0.8, 0.95, 1.0])


def test_the_table_holds_every_class():
    final = {
        cls
        for _, cls in inspect.getmembers(schedules_module, inspect.isclass)
        if issubclass(cls, esl.AbstractSchedule)
    }
    assert {type(make()) for make, _ in SCHEDULES.values()} == final - {esl.AbstractSchedule}


@every
def test_values_are_the_formula(name, x64):
    make, formula = SCHEDULES[name]
    schedule = make()
    np.testing.assert_allclose([schedule(s) for s in TIMES], formula(TIMES), rtol=1e-12)


@every
def test_rates_are_read_at_the_start_of_each_step(name, x64):
    make, formula = SCHEDULES[name]
    rates = make().rates(25)
    assert rates.shape == (25,)
    np.testing.assert_allclose(rates, formula(np.arange(25) / 25), rtol=1e-12)
    np.testing.assert_allclose(make().rates(1), formula(np.zeros(1)), rtol=1e-12)


@every
def test_compiled_is_uncompiled_and_vmap_is_a_loop(name):
    schedule = SCHEDULES[name][0]()
    loop = np.array([schedule(s) for s in TIMES])
    compiled = jax.jit(lambda schedule, s: schedule(s))
    np.testing.assert_allclose([compiled(schedule, s) for s in TIMES], loop, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(TIMES)), loop, rtol=1e-6)
    # Over schedules as well: two of them stacked leaf by leaf.
    if not jax.tree.leaves(schedule):
        return
    pair = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), schedule)
    both = jax.vmap(lambda one: one.rates(25))(pair)
    for i in range(2):
        np.testing.assert_allclose(
            both[i], jax.tree.map(lambda x, i=i: x[i], pair).rates(25), rtol=1e-6
        )


@every
def test_one_trace_for_two_calls(name):
    schedule = SCHEDULES[name][0]()
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda schedule, s: schedule(s), n=1))
    traced(schedule, jnp.asarray(0.2))
    traced(jax.tree.map(lambda x: 1.1 * x, schedule), jnp.asarray(0.4))
    # An optimizer's step strips weak types; the schedule must not have any, or it would be compiled
    # anew.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(schedule))


@every
def test_precision_follows_the_leaves(name, x64):
    make, formula = SCHEDULES[name]
    double = make()
    assert double.rates(7).dtype == np.float64
    single = jax.tree.map(lambda x: x.astype(jnp.float32), double)
    value = single(jnp.asarray(0.4, jnp.float32))
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, formula(0.4), rtol=1e-6)


def test_float32_is_the_default():
    for make, _ in SCHEDULES.values():
        assert make().rates(7).dtype == np.float32
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(make()))


@every
def test_gradient_is_the_central_difference(name, x64):
    """In every leaf, at times clear of the corners."""
    schedule = SCHEDULES[name][0]()
    leaves, structure = jax.tree.flatten(schedule)
    assert len(leaves) == {
        "constant": 1,
        "linear": 2,
        "cosine": 2,
        "exponential": 2,
        "wsd": 5,
        "wsd with a root": 5,
        "warmup": 4,
        "scaled": 3,
        "optax": 0,
    }.get(name, 1)
    times, weights = (
        jnp.array([0.03, 0.11, 0.4, 0.6, 0.77, 0.9]),
        jnp.array([1.0, -2.0, 0.5, 3.0, 1.5, -0.7]),
    )

    def value(leaves):
        return jnp.dot(weights, jax.vmap(structure.unflatten(leaves))(times))

    gradient = jax.grad(value)(leaves) if leaves else []
    for i, leaf in enumerate(leaves):
        for entry in np.ndindex(leaf.shape):
            direction = jnp.zeros_like(leaf).at[entry].set(1)

            def moved(x, i=i):
                return value([*leaves[:i], x, *leaves[i + 1 :]])

            difference = oracles.central_difference(moved, leaf, direction)
            assert abs(difference) > 1e-3  # a leaf that does nothing would agree with anything
            np.testing.assert_allclose(gradient[i][entry], difference, rtol=1e-7)


@every
def test_slope_in_time_is_the_central_difference(name, x64):
    schedule = SCHEDULES[name][0]()
    for s in (0.07, 0.42, 0.83):
        np.testing.assert_allclose(
            jax.grad(schedule)(s),
            oracles.central_difference(schedule, s, 1.0),
            rtol=1e-7,
            atol=1e-9,
        )


def test_from_optax_reads_the_function_at_the_count():
    np.testing.assert_allclose(
        esl.FromOptax(OPTAX, 25).rates(25), [OPTAX(count) for count in range(25)], rtol=1e-6
    )
    np.testing.assert_allclose(
        esl.FromOptax(OPTAX, 25).rates(5), [OPTAX(count) for count in range(0, 25, 5)], rtol=1e-6
    )
    # Steps down at every count: a rounded count on the wrong side of one would read the value
    # before.
    stairs = optax.piecewise_constant_schedule(1.0, {count: 0.9 for count in range(1, 49)})
    np.testing.assert_allclose(
        esl.FromOptax(stairs, 49).rates(49), [stairs(count) for count in range(49)], rtol=1e-6
    )


def test_from_optax_takes_the_steps_of_the_run(refused):
    schedule = esl.FromOptax(OPTAX)
    truth = [OPTAX(count) for count in range(10)]
    np.testing.assert_allclose(schedule.rates(10), truth, rtol=1e-6)
    for rule in (
        esl.Langevin(schedule, schedule),
        esl.ProbabilityFlow(schedule, schedule, esl.AffineVelocity()),
    ):
        run = esl.simulate(
            esl.Quadratic(1.0), rule, np.eye(4), steps=10, snapshots=5, key=jax.random.key(0)
        )
        np.testing.assert_allclose(run.rates, truth, rtol=1e-6)
        np.testing.assert_allclose(run.temperatures, truth, rtol=1e-6)
    assert schedule.over(10).steps == 10
    assert esl.FromOptax(OPTAX, 25).over(10).steps == 25
    cosine = esl.Cosine(1.0)
    assert cosine.over(10) is cosine
    sentence = r"`steps` must be given where no run supplies it, as FromOptax\(fn, steps\)"
    refused(lambda: schedule(0.5), sentence)
    refused(lambda: esl.Driven(esl.Quadratic, schedule), sentence)
    law, trap = esl.gaussian.Law([2.0], [[1.0]]), esl.Quadratic(1.0)
    of_the_run, given = (
        esl.gaussian.speed_limit(law, trap, esl.Langevin(each), steps=10).entropy_production
        for each in (schedule, esl.FromOptax(OPTAX, 10))
    )
    assert of_the_run == given


def test_the_table_of_a_problem_counts_the_steps_of_its_run():
    data = esl.datasets.two_moons(samples=20)
    problem = Problem(
        esl.FlaxLoss(esl.models.mlp(2, 2), data.train),
        test=data.test,
        temperature=0.0,
        transport=esl.ExactTransport(),
        members=2,
        steps=10,
        snapshots=5,
    )
    table = problem.table(esl.FromOptax(OPTAX))
    np.testing.assert_allclose(table.values, [OPTAX(count) for count in range(11)], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 49, 200])
def test_a_table_of_knots_is_exact_at_every_step(steps):
    """K+1 knots at k/K give back their values in the default precision, however k/K is rounded."""
    table = np.random.default_rng(steps).uniform(0.1, 5.0, steps + 1).astype(np.float32)
    np.testing.assert_array_equal(esl.Knots(table, "linear").rates(steps), table[:-1])
    np.testing.assert_allclose(esl.Knots(table).rates(steps), table[:-1], rtol=1e-6)
    np.testing.assert_allclose(esl.Knots(table).values, table, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_knots_from_rates_read_them_back(dtype, x64):
    """K values are those of the steps; taken for K knots on [0, 1] they would be off."""
    for steps in (1, 2, 49, 200):
        rates = np.random.default_rng(steps).uniform(0.1, 5.0, steps).astype(dtype)
        rates[steps // 3] = 0
        knots = esl.Knots.from_rates(rates)
        assert knots.values.dtype == dtype
        np.testing.assert_array_equal(knots.rates(steps), rates)
        assert knots(1.0) == rates[-1]
    np.testing.assert_array_equal(jax.jit(lambda knots: knots.rates(200))(knots), rates)
    np.testing.assert_array_equal(esl.Knots.from_rates([1, 0]).rates(2), [1, 0])
    slope = jax.grad(lambda rates: esl.Knots.from_rates(rates).rates(3)[1])(jnp.ones(3))
    np.testing.assert_array_equal(slope, [0, 1, 0])


def test_a_piece_begins_at_its_own_step():
    """However a compiler rounds k/K."""
    stairs = esl.Piecewise(np.arange(49), np.arange(1, 49) / 49)
    np.testing.assert_array_equal(stairs.rates(49), np.arange(49))
    np.testing.assert_array_equal(jax.jit(lambda stairs: stairs.rates(49))(stairs), np.arange(49))


def test_a_warmup_leaves_the_counts_that_are_left_to_its_shape():
    warm = esl.Warmup(esl.FromOptax(OPTAX), 0.2)
    counts = [OPTAX(count) for count in range(40)]
    np.testing.assert_allclose(warm.rates(50)[10:], counts, rtol=1e-5)
    np.testing.assert_allclose(warm.rates(50)[:10], OPTAX(0) * np.arange(10) / 10, rtol=1e-6)
    assert float(warm.over(50).shape.steps) == 40
    assert esl.Warmup(0.3, 0.5).rates(4).tolist() == pytest.approx([0, 0.15, 0.3, 0.3])


@pytest.mark.parametrize("name", ["wsd with a root", "piecewise", "warmup", "linear knots"])
def test_the_exact_law_splits_its_panels_at_corners(name, x64):
    """Learning time is K ∫η ds, in closed form for each of them."""
    integral = {
        "wsd with a root": (0.05 + 0.7) / 2 * 0.13 + 0.7 * 0.58 + (0.02 + 0.68 / 3) * 0.29,
        "piecewise": 0.3 * 0.13 + 0.7 * 0.58 + 0.1 * 0.29,
        "scaled": 0.45,
        "warmup": (0.05 + 0.7) / 2 * 0.2 + (0.7 + 0.1) / 2 * 0.8,
        "linear knots": (0.3 / 2 + 0.7 + 0.1 + 0.2 / 2) / 3,
    }[name]
    rule = esl.Langevin(SCHEDULES[name][0]())
    law = esl.gaussian.Law([2.0], [[1.0]])
    report = esl.gaussian.speed_limit(law, esl.Quadratic(1.0), rule, steps=2)
    np.testing.assert_allclose(report.learning_time, 2 * integral, rtol=1e-9)


@settings(max_examples=50, deadline=None, database=None)
@given(logs=st.lists(st.floats(-30, 30), min_size=2, max_size=6), s=st.floats(0, 1))
def test_log_linear_knots_stay_positive_and_between_their_neighbors(logs, s):
    value = esl.Knots(np.exp(logs))(s)
    left = min(int(s * (len(logs) - 1)), len(logs) - 2)
    low, high = sorted(np.exp(logs[left : left + 2]))
    assert value > 0
    assert low * (1 - 1e-4) <= value <= high * (1 + 1e-4)


def test_log_linear_parameters_are_logarithms():
    schedule = esl.Knots(TABLE)
    np.testing.assert_allclose(schedule.parameters, np.log(TABLE), rtol=1e-6)
    moved = jax.tree.map(lambda x: x - 100.0, schedule)
    assert bool(jnp.all(moved.rates(9) >= 0))
    np.testing.assert_allclose(
        jax.tree.map(lambda x: x + np.log(2.0), schedule).rates(9), 2 * schedule.rates(9), rtol=1e-6
    )


def test_as_schedule():
    cosine = esl.Cosine(1.0)
    assert as_schedule(cosine) is cosine
    assert as_schedule(2).rates(1).item() == 2.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: esl.Constant(1.0).rates(0),
            r"Argument `steps` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.Constant(1.0).rates(2.0),
            r"Argument `steps` must be an integer of at least 1, but is 2\.0\.",
        ),
        (
            lambda: esl.Constant(1.0).rates(True),
            r"Argument `steps` must be an integer of at least 1, but is True\.",
        ),
        (lambda: esl.Exponential(0.0, 1.0), r"Argument `start` must be greater than 0, but is 0\."),
        (lambda: esl.Exponential(1.0, -1.0), r"Argument `end` must be greater than 0, but is -1\."),
        (
            lambda: esl.WarmupStableDecay(1.0, warmup=0.0),
            r"Argument `warmup` must be greater than 0, but is 0\.",
        ),
        (
            lambda: esl.WarmupStableDecay(1.0, decay=-0.1),
            r"Argument `decay` must be greater than 0, but is -0\.1\.",
        ),
        (
            lambda: esl.WarmupStableDecay(1.0, 0.6, 0.5),
            r"Argument `decay` must leave warmup \+ decay at most 1, but makes it 1\.1\.",
        ),
        (
            lambda: esl.Knots([1.0]),
            r"Argument `values` must have shape \(m,\) with m of at least 2, but has shape "
            r"\(1,\)\.",
        ),
        (
            lambda: esl.Knots([[1.0, 2.0]]),
            r"Argument `values` must have shape \(m,\) with m of at least 2, but has shape "
            r"\(1, 2\)\.",
        ),
        (
            lambda: esl.Knots([1.0, 0.0]),
            r"Argument `values` must be greater than 0, but is an array with minimum 0\.",
        ),
        (lambda: esl.Knots([1.0, np.nan]), r"Argument `values` must be greater than 0"),
        (
            lambda: esl.Knots([1.0, 2.0], "cubic"),
            r"Argument `interpolation` must be one of 'log-linear', 'linear', but is 'cubic'\.",
        ),
        (
            lambda: esl.WarmupStableDecay(1.0, decay_shape="cosine"),
            r"Argument `decay_shape` must be one of 'linear', '1-sqrt', but is 'cosine'\.",
        ),
        (lambda: esl.Warmup(1.0, 0.0), r"Argument `fraction` must be greater than 0, but is 0\."),
        (lambda: esl.Warmup(1.0, 1.0), r"Argument `fraction` must be less than 1, but is 1\."),
        (lambda: esl.Warmup(abs), r"Argument `shape` must be a number or a schedule, .*abs\."),
        (
            lambda: esl.Piecewise([1.0, 2.0], [0.5, 0.6]),
            r"Argument `boundaries` must be 1, one less than the values, but is 2\.",
        ),
        (
            lambda: esl.Piecewise([1.0, 2.0, 3.0], [0.5, 0.5]),
            r"Argument `boundaries` must increase within \(0, 1\), but is \(0\.5, 0\.5\)\.",
        ),
        (lambda: esl.Piecewise([1.0, 2.0], [np.nan]), r"must increase within \(0, 1\)"),
        (lambda: esl.Piecewise([1.0, 2.0], 0.5), r"`boundaries` must be a list of times"),
        (lambda: esl.Piecewise(1.0, []), r"`values` must have shape \(m,\) with m of at least 1"),
        (
            lambda: jax.jit(lambda time: esl.Piecewise([1.0, 2.0], [time]).values)(0.5),
            r"Argument `boundaries` must be known numbers, outside of jit and grad, but is traced",
        ),
        (
            lambda: esl.Knots.from_rates([]),
            r"Argument `rates` must have shape \(K,\) with K of at least 1, but has shape \(0,\)",
        ),
        (lambda: esl.Knots.from_rates(0.1), r"`rates` must have shape \(K,\).*has shape \(\)"),
        (lambda: esl.Knots.from_rates([1.0, np.inf]), r"`rates` must be finite"),
        (
            lambda: esl.FromOptax(OPTAX, 0),
            r"Argument `steps` must be an integer of at least 1, but is 0\.",
        ),
        (
            lambda: esl.FromOptax(0.1, 10),
            r"Argument `fn` must be optax\'s function of a count of steps, but is 0\.1\.",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)


def test_knots_may_touch_zero_when_linear():
    np.testing.assert_allclose(esl.Knots([1.0, 0.0], "linear").rates(4), [1.0, 0.75, 0.5, 0.25])
