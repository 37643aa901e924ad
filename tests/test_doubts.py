"""Searches that are not to be believed say so, healthy ones do not, and both by known numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esljax as esl
from esljax.optimization.doubts import judged_multipliers
from esljax.optimization.lagrangian import Dual
from esljax.optimization.probes import compared, no_probes
from esljax.optimization.search import Candidate, State

KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")


# Multipliers under noise


def exact(point) -> float:
    """The objective of `noisy` without noise: 100 at its free optimum, (1, 1, 1)."""
    return 100 * (1 + float(np.sum((np.asarray(point) - 1) ** 2)))


def noisy(point, key, offset, scatter):
    """p₀ ≤ 1 + offset, with a residual that scatters by `scatter` over keys."""
    one, two = jax.random.split(key)
    value = 100 * (1 + jnp.sum((point - 1) ** 2)) * (1 + 0.02 * jax.random.normal(one))
    return value, point[0] - 1 - offset + scatter * jax.random.normal(two)


def searches(offset, scatter, iterations, seeds=3):
    objective = functools.partial(noisy, offset=offset, scatter=scatter)
    return [
        esl.optimize(
            objective,
            jnp.array([0.0, 0.0, 2.0]),
            key=jax.random.key(seed),
            iterations=iterations,
            validation=64,
        )
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(("scatter", "most"), [(0.3, 105), (1.0, 112), (3.0, 145)])
def test_noise_does_not_drive_a_slack_constraint(scatter, most):
    """With one penalty for all, these searches ended at 110, 150 and 270 on average, with
    multipliers of up to 205, 1280 and 4670."""
    for optimum in searches(0.1, scatter, 40):
        assert exact(optimum.controls) < most
        assert optimum.multipliers[0] < 160
        slack = -optimum.residuals[0] > 3 * optimum.standard_error.residuals[0] + 1e-3
        product = -optimum.multipliers[0] * optimum.residuals[0]
        if slack and product > max(1, 3 * optimum.standard_error.value):
            assert any("Complementarity fails" in doubt for doubt in optimum.doubts)


def test_a_multiplier_is_found_under_noise():
    """p₀ ≤ .5 binds: λ = 200 · .5. With one penalty for all, noise left 0."""
    found = searches(-0.5, 0.3, 200)
    multipliers = [float(optimum.multipliers[0]) for optimum in found]
    # One multiplier scatters by 25.
    assert abs(np.mean(multipliers) - 100) < 5 * 25 / np.sqrt(len(found))
    assert abs(np.mean([exact(optimum.controls) for optimum in found]) - 125) < 5
    assert not any(optimum.doubts for optimum in found)


def test_the_penalty_follows_the_scatter_of_each_residual():
    probes = no_probes(2, 3, 4).with_draws(
        np.array([[1.0, 0.0, 0.5, 2.0], [1.0, 0.0, -0.5, -2.0], [1.0, 0.0, 0.0, 0.0]])
    )
    np.testing.assert_allclose(probes.spread, [0, 0, 0.5, 2])
    probes = probes._replace(reference=np.array([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(probes.penalty(10.0), [10, 0.4, 0.4])
    # Noise below the threshold leaves the penalty as it is, to the last bit.
    assert probes.penalty(0.1).tolist() == [0.1, 0.1, 0.1]


def ended(pull, residual, error):
    """A search that ended with a multiplier beside a residual known to within `error`."""
    one = jnp.ones(1)
    dual = Dual(one, one, jnp.array(10.0), pull * one)
    best = Candidate(0.0, jnp.array(10.0), jnp.array(0.01), residual * one, error * one)
    return State(None, None, dual, best, None, no_probes(1, 1, 8), None)


@pytest.mark.parametrize(
    ("pull", "residual", "error", "multiplier", "sentence"),
    [
        (6.0, -0.5, 0.05, 60, "residual 0 is slack by 0.5 ± 0.05 beside a multiplier of 60."),
        (0.01, -0.5, 0.05, 0, None),  # λ r is half a percent of the value
        (6.0, -0.5, 0.2, 60, None),  # not slack within its errors
        (6.0, 0.5, 0.05, 60, None),  # violated, which `satisfied` reports
        (0.0, -0.5, 0.05, 0, None),
    ],
)
def test_a_multiplier_beside_a_slack_residual(pull, residual, error, multiplier, sentence):
    state = ended(pull, residual, error)
    multipliers, doubts = judged_multipliers(state, np.array([False]), 1e-3, 16)
    np.testing.assert_allclose(multipliers, [multiplier], rtol=1e-6)
    assert len(doubts) == (sentence is not None)
    if sentence:
        assert sentence in doubts[0]
    # An equality has no slack side.
    assert judged_multipliers(state, np.array([True]), 1e-3, 16)[1] == []


# Gradients of two noises

WELLS = esl.FromFunction(lambda x: jnp.sum(1 - jnp.cos(x) + 0.05 * x**2))


def final_loss_of(steps):
    """Descent in sines, θ ← θ - η(sin θ + θ/10), a circle map: chaos at rates above about 3."""

    def final_loss(rate, key):
        start = 2 + 0.5 * jax.random.normal(key, (16, 1))
        path = esl.simulate(WELLS, esl.Langevin(rate), start, steps=steps, snapshots=1, key=key)
        return jnp.mean(WELLS(path.final))

    return final_loss


LOSS = final_loss_of(20)


def test_gradients_agree_below_the_edge_and_disagree_above():
    for seed in range(2):
        start = esl.Knots(jnp.full(6, 0.05))
        optimum = esl.optimize(LOSS, start, key=jax.random.key(seed), iterations=40)
        assert optimum.doubts == ()
        assert optimum.agreement.shape == (9,)
        assert optimum.agreement[0] > 0.9
    named = []
    for seed in range(3):
        start = esl.Knots(jnp.full(6, 6.0))
        optimum = esl.optimize(LOSS, start, key=jax.random.key(seed), iterations=16)
        assert optimum.doubts
        assert np.nanmean(optimum.agreement) < 0.5
        named.append(optimum.doubts[0].startswith("Gradients of two noises agree to "))
        assert f"Doubt: {optimum.doubts[0]}" in str(optimum)
        assert (
            "the learning rate is above the edge for gradients" in optimum.doubts[0]
            or not (named[-1])
        )
    assert sum(named) >= 2


def test_the_agreement_of_two_known_gradients():
    """Gradients (1, ±a) with a = ½ over two keys: g₁·g₂ = ¾, lengths² 5/4, agreement .6 or 1."""

    def objective(x, key):
        return x[0] + 0.5 * jnp.where(jax.random.bernoulli(key), 1.0, -1.0) * x[1]

    start = jnp.array([2.0, 0.0])  # a value of 2 or so: both are divided by it
    optimum = esl.optimize(
        objective, start, key=KEY, iterations=32, rounds=16, optimizer=optax.sgd(1e-3)
    )
    near = {float(x) for x in optimum.agreement.round(5)}
    assert near == {0.6, 1.0}
    assert optimum.doubts == ()


def test_gradients_of_one_direction_and_other_lengths_do_not_agree_in_full():
    """Their cosine is 1: g₁ = (1, 0), g₂ = (3, 0) agree to 3/5 with noise √2."""
    for scale in (1.0, 1e200):
        found = compared(np.array([scale, 0.0]), np.array([3 * scale, 0.0]))
        np.testing.assert_allclose(found, (0.6, np.sqrt(3) * scale, np.sqrt(2) * scale))


def test_noise_that_exceeds_all_signal_is_named_but_an_optimum_is_not():
    def around(x, key, noise):
        return 1 + jnp.sum(x**2) + noise * x @ jax.random.normal(key, (8,))

    for noise, far, doubted in [(0.3, 1.0, False), (0.3, 0.0, True), (30.0, 1.0, True)]:
        objective = functools.partial(around, noise=noise)
        optimum = esl.optimize(objective, jnp.full(8, far), key=KEY, iterations=48)
        assert bool(optimum.doubts) == doubted
        # At the optimum two noises disagree in either case.
        assert np.mean(optimum.agreement[-4:]) < 0.5


# Gradients of unusual size


def is_one_of(key, iterations):
    data = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(KEY, i)))(iterations)
    return jnp.any(jnp.all(jax.random.key_data(key) == data, axis=1))


def spiky(x, key):
    """A slope of 1, and of 1000 at iterations 7 and 12."""
    return -x * jnp.where(is_one_of(key, jnp.array([7, 12])), 1e3, 1.0)


def adam(slopes):
    """Where the default optimizer goes along these slopes; whole slopes of -1000 lead to 1.69."""
    x = mean = square = 0.0
    for i, slope in enumerate(slopes):
        mean, square = 0.8 * mean + 0.2 * slope, 0.95 * square + 0.05 * slope**2
        rate = 0.15 * 0.5 * (1 + np.cos(np.pi * i / len(slopes)))
        x -= rate * mean / (1 - 0.8 ** (i + 1)) / (np.sqrt(square / (1 - 0.95 ** (i + 1))) + 1e-8)
    return x


def test_a_gradient_of_unusual_size_is_cut_and_named():
    cut = esl.optimize(spiky, 0.0, key=KEY, iterations=40)
    assert cut.doubts[0].startswith(
        "2 gradients were more than 10 times the usual size, the largest 1e+03 times at iteration "
        "7, and cut to 10 times it:"
    )
    np.testing.assert_allclose(cut.history.gradient_norm[[6, 7, 12, 13]], [1, 1e3, 1e3, 1])
    smooth = esl.optimize(lambda x, key: -x, 0.0, key=KEY, iterations=40)
    assert smooth.doubts == ()
    slopes = np.where(np.isin(np.arange(40), [7, 12]), -10.0, -1.0)
    np.testing.assert_allclose(cut.controls, adam(slopes), rtol=1e-5)
    np.testing.assert_allclose(smooth.controls, adam(np.full(40, -1.0)), rtol=1e-5)


def test_an_optimizer_of_the_users_own_follows_them_as_they_are():
    followed = esl.optimize(spiky, 0.0, key=KEY, iterations=20, optimizer=optax.sgd(0.1))
    assert "7, and followed as they are: the likely cause is" in followed.doubts[0]
    np.testing.assert_allclose(followed.controls, 0.1 * (18 + 2000), rtol=1e-5)


# Controls that nothing moves


def energy(controls, key):
    rule = esl.Langevin(0.1, esl.Knots(controls["temperature"], "linear"))
    start = jnp.full((4, 1), controls["start"])
    path = esl.simulate(esl.Quadratic(1.0), rule, start, steps=6, snapshots=1, key=key)
    return jnp.mean(path.final**2)


@pytest.mark.parametrize(
    ("temperature", "names"),
    [
        ([0.0, 0.0], "controls['temperature'] is"),
        ([0.1, 0.0], None),
        ([0.0, 0.0, 0.1], "controls['temperature'][0] is"),
        ([0.1, 0.1], None),
    ],
)
def test_a_temperature_that_starts_at_zero_is_named(temperature, names):
    controls = {"temperature": jnp.array(temperature), "start": jnp.array(1.0)}
    doubts = esl.optimize(energy, controls, key=KEY, iterations=2).doubts
    still = [doubt for doubt in doubts if "exactly 0" in doubt]
    assert len(still) == (names is not None)
    if names:
        name = names.removesuffix(" is")
        assert still[0] == (
            f"The gradient of {names} exactly 0 at the start on two noises; {name} starts at 0, "
            "where the slope of a temperature is 0 by convention: start a temperature above 0."
        )


def test_controls_that_the_objective_does_not_feel_are_listed():
    controls = {name: jnp.ones(2) for name in "abcde"}
    optimum = esl.optimize(
        lambda x, key: x["a"] @ jnp.array([1.0, 0.0]) + 3, controls, key=KEY, iterations=2
    )
    assert optimum.doubts == (
        "The gradient of controls['a'][1], controls['b'], controls['c'] and 2 more are exactly 0 "
        "at the start on two noises: the objective does not depend on it there, or starts at an "
        "optimum.",
    )


# The whole


HEALTHY = {
    "parabola": (lambda x, key: jnp.sum((x - 3) ** 2), jnp.zeros(2)),
    "active": (lambda x, key: (x**2, 1 - x), 0.0),
    "slack, then active": (lambda x, key: (x**2, 1 - x), 3.0),
    "nearly at the constraint": (lambda x, key: (x**2, 1 - x), 0.999),
    "idle": (lambda x, key: ((x - 2) ** 2, x - 9), 3.0),
    "equality": (lambda x, key: (x**2, esl.Equality(x - 2)), 1.0),
    "noisy slope": (
        lambda x, key: jnp.sum((x - 3 + 0.2 * jax.random.normal(key, x.shape)) ** 2),
        jnp.zeros(4),
    ),
    "noisy constraint": (
        lambda x, key: (x**2, 1 - x + 0.05 * jax.random.normal(key)),
        2.0,
    ),
    "from a plateau": (lambda x, key: 1 - jnp.exp(-((x - 3) ** 2)), 1.0),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_search_has_no_doubts(name):
    objective, start = HEALTHY[name]
    optimum = esl.optimize(objective, start, key=KEY, iterations=150)
    assert optimum.doubts == ()
    assert "Doubt" not in str(optimum)
    assert optimum.agreement[0] > 0.7


def test_a_resumed_search_has_the_same_doubts(tmp_path):
    def objective(controls, key):
        value = jnp.sum((controls["x"] - 3 + 0.5 * jax.random.normal(key, (3,))) ** 2)
        return value * (1 + 99 * is_one_of(key, jnp.array([4]))), jnp.sum(controls["x"]) - 5 + (
            jax.random.normal(key)
        )

    class Stop(Exception):
        pass

    def stop(seen):
        if seen.iteration == 6:
            raise Stop

    start = {"x": jnp.zeros(3), "idle": jnp.zeros(())}
    search = functools.partial(esl.optimize, objective, start, key=KEY, iterations=12)
    with pytest.raises(Stop):
        search(checkpoints=esl.Checkpoints(tmp_path, every=0), callback=stop)
    whole = search()
    resumed = search(checkpoints=esl.Checkpoints(tmp_path, every=0, resume=True))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert whole.doubts == resumed.doubts
    assert "controls['idle']" in whole.doubts[0]
    assert "at iteration 4" in " ".join(whole.doubts)


# Gradient against horizon


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rate", [0.3, 1.2, 2.2])
def test_gradient_norms_of_a_quadratic(rate):
    """f = ½ k x₀² (1 - ηk)^{2K}: its slope in η is -k² K (1 - ηk)^{2K-1} x₀², k = 1."""

    def start_of(key):
        return 1 + 0.1 * jax.random.normal(key, (4, 1))

    def objective_of(steps):
        def objective(rate, key):
            rule = esl.Langevin(rate)
            path = esl.simulate(
                esl.Quadratic(1.0), rule, start_of(key), steps=steps, snapshots=1, key=key
            )
            return jnp.mean(esl.Quadratic(1.0)(path.final)), jnp.zeros(()), "auxiliary"

        return objective

    steps = np.array([5, 10, 40])
    norms = esl.optimization.gradient_norms(
        objective_of, esl.Constant(rate), steps=(40, 5, 10), key=KEY, keys=3
    )
    squares = np.array(
        [float(jnp.mean(start_of(jax.random.fold_in(KEY, r)) ** 2)) for r in range(3)]
    )
    factor = steps * np.abs(1 - rate) ** (2 * steps - 1)
    assert norms.steps == (5, 10, 40)
    np.testing.assert_allclose(norms.norm, factor * squares.mean(), rtol=1e-8)
    np.testing.assert_allclose(norms.largest, factor * squares.max(), rtol=1e-8)
    np.testing.assert_allclose(norms.spread, squares.std(ddof=1) / squares.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        norms.standard_error.norm, factor * squares.std(ddof=1) / np.sqrt(3), rtol=1e-6
    )
    values = 0.5 * (1 - rate) ** (2 * steps) * squares.mean()
    np.testing.assert_allclose(norms.value, values, rtol=1e-8)
    pairs = [
        2 * a * b / (a**2 + b**2) for a, b in [squares[[0, 1]], squares[[0, 2]], squares[[1, 2]]]
    ]
    np.testing.assert_allclose(norms.agreement, np.mean(pairs), rtol=1e-6)
    # From 5 to 10 steps 2 · 1.2^10 = 12.4 times; the cube of the horizon grows 8 times.
    assert norms.exploding == (10 if rate > 2 else None)
    assert norms.disagreeing is None
    assert norms.verdict == (
        "Gradients grow 12 times from 5 to 10 steps: they explode. Lower the learning rate, or "
        "take fewer steps."
        if rate > 2
        else "Gradients of two noises agree and do not explode up to 40 steps."
    )
    assert norms.verdict in str(norms)
    assert norms.errors == "spread over 3 keys"


def test_gradient_norms_across_the_edge():
    def measure(rate):
        return esl.optimization.gradient_norms(
            final_loss_of, esl.Knots(jnp.full(6, rate)), steps=(10, 20), key=KEY
        )

    below, above = measure(0.05), measure(6.0)
    assert below.exploding is below.disagreeing is None
    assert below.agreement.min() > 0.9
    assert above.exploding == 20
    assert above.disagreeing == 10
    assert above.agreement.max() < 0.34
    assert "steps: they explode. At 10 steps gradients of two noises agree to" in above.verdict
    assert str(above).splitlines()[0].split() == [
        *("steps", "value", "gradient", "norm", "spread", "/", "norm", "largest", "agreement")
    ]


def test_gradient_norms_that_are_not_numbers_or_nothing():
    def norms(objective):
        return esl.optimization.gradient_norms(
            lambda steps: functools.partial(objective, steps), 1.0, steps=(1, 2), key=KEY, keys=2
        )

    infinite = norms(lambda steps, x, key: jnp.where(steps > 1, jnp.inf, 1.0) * x)
    assert infinite.exploding == 2
    assert infinite.verdict.startswith("Gradients are not finite at 2 steps: they explode.")
    still = norms(lambda steps, x, key: 0 * x)
    assert still.verdict == "Gradients are exactly 0 at 1 steps: nothing there says where to go."
    assert "not resolved" in str(still)


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        (r"`steps` must be at least one number of steps, but is \(\)", {"steps": ()}),
        ("`steps` must be an integer of at least 1, but is 0", {"steps": (0,)}),
        ("`keys` must be an integer of at least 2, but is 1", {"keys": 1}),
        ("`key` must be made by `jax.random.key`", {"key": 0}),
        ("`objective_of` must be a function of the steps", {"objective_of": 3}),
        ("`controls` must have at least one floating-point leaf", {"controls": 1}),
    ],
)
def test_bad_horizons(sentence, arguments, refused):
    arguments = {"objective_of": lambda steps: LOSS, "controls": 1.0, "key": KEY, **arguments}
    objective_of, controls = arguments.pop("objective_of"), arguments.pop("controls")
    refused(lambda: esl.optimization.gradient_norms(objective_of, controls, **arguments), sentence)
