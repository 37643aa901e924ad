"""The particle estimate of the speed limit: exact identities on samples, reference numbers,
calibrated errors, and honest words."""

import functools
import itertools
import warnings
from typing import ClassVar

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import systems
from hypothesis import given, settings
from hypothesis import strategies as st

import esljax as esl
from esljax.measures.report import numbers

D = 3
METRICS = {
    "exact": lambda: esl.ExactTransport(),
    "gaussian": lambda: esl.GaussianTransport(),
    "sliced": lambda: esl.SlicedTransport(2, jax.random.key(3)),
    "mapped": lambda: esl.MappedTransport(esl.ExactTransport(), jnp.tanh),
    "projected": lambda: esl.ProjectedTransport(
        esl.GaussianTransport(), np.array([[1.0, 0.3], [-0.5, 1.0], [0.2, 0.7]])
    ),
}
# Those of a chain that is not debiased.
NUMBERS = (
    "entropy_production",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "metric_action",
    "dissipation",
)


def trajectory(positions, rates=None, temperature=0.0, observed=False):
    """A path (J+1, n, d) of one's own making; by default a step of rate 1/J a link."""
    positions = jnp.asarray(positions)
    links = positions.shape[0] - 1
    rates = np.full(links, 1 / links) if rates is None else rates
    return esl.Trajectory(
        times=jnp.arange(links + 1, dtype=positions.dtype) / links,
        positions=positions,
        energies=jnp.zeros(positions.shape[:2], positions.dtype),
        rates=jnp.asarray(rates, positions.dtype),
        temperatures=jnp.full(len(rates), temperature, positions.dtype),
        final=positions[-1],
        observed=observed,
    )


def random_path(seed, links=4, n=5, d=D, spread=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (
        np.cumsum(rng.normal(size=(links + 1, n, d)) * spread, axis=0) + rng.normal(size=d)
    ).astype(dtype)


# Identities


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
def test_the_chain_obeys_the_limit_exactly(name, seed, spread):
    positions = random_path(seed, spread=spread)
    report = esl.speed_limit(trajectory(positions), transport=METRICS[name](), jackknife=0)
    sigma, length_squared, distance = (
        report.entropy_production,
        report.length_squared,
        report.w2_squared,
    )
    rounding = 1e-10 * sigma  # steps of 1e-6 from positions of 1 keep ten digits
    assert sigma >= length_squared - rounding
    assert length_squared >= distance - rounding
    assert distance > 0
    transport = METRICS[name]()
    squares = np.array([transport.squared(a, b) for a, b in itertools.pairwise(positions)])
    np.testing.assert_allclose(sigma, np.sum(squares) * 4, rtol=1e-8)
    np.testing.assert_allclose(
        report.w2_squared, transport.squared(positions[0], positions[-1]), rtol=1e-8
    )
    np.testing.assert_allclose(report.speed, 4 * np.sqrt(squares), rtol=1e-8)
    np.testing.assert_allclose(report.times, [1 / 8, 3 / 8, 5 / 8, 7 / 8])
    np.testing.assert_allclose(
        report.temporal, np.var(report.speed), rtol=1e-8, atol=float(rounding)
    )
    # A part that is not resolved adds nothing.
    np.testing.assert_allclose(
        report.temporal + report.geometric,
        report.gap,
        rtol=1e-10,
        atol=float(rounding),
    )
    np.testing.assert_allclose(
        report.dissipation, report.entropy_production, rtol=1e-12
    )  # η = 1 in unit time
    assert report.is_bound
    assert report.housekeeping is None
    assert report.circulation == "invisible"
    assert report.metric_action == sigma
    assert "holds" in report.verdict()


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-3, 1.0]))
def test_single_precision_never_reports_a_violation(name, seed, spread):
    report = esl.speed_limit(
        trajectory(random_path(seed, spread=spread, dtype=np.float32)),
        transport=METRICS[name](),
        jackknife=0,
    )
    assert report.gap > -1e-5 * report.entropy_production
    assert report.entropy_production.dtype == np.float32


@pytest.mark.usefixtures("x64")
def test_a_straight_path_at_constant_speed_is_at_the_limit():
    start = random_path(0)[0]
    straight = start + np.linspace(0, 1, 9)[:, None, None] * np.array([1.0, 2.0, -2.0])
    for name in ("exact", "gaussian", "sliced"):
        report = esl.speed_limit(trajectory(straight), transport=METRICS[name](), jackknife=0)
        if name != "sliced":
            np.testing.assert_allclose(report.w2_squared, 9, rtol=1e-12)
        assert abs(report.gap) < 1e-12 * report.w2_squared
        assert "holds" in report.verdict()  # rounding of either sign is no violation
    uneven = start + (np.linspace(0, 1, 9) ** 2)[:, None, None] * np.array([1.0, 2.0, -2.0])
    report = esl.speed_limit(trajectory(uneven), transport=esl.ExactTransport(), jackknife=0)
    # Displacements (2j+1)/64 of length 3: Σ = 9 · 8 Σ(2j+1)²/64² = 9 · 8 · 680/4096.
    np.testing.assert_allclose(report.entropy_production, 9 * 8 * 680 / 4096, rtol=1e-12)
    assert abs(report.geometric) < 1e-12
    np.testing.assert_allclose(report.temporal, report.gap, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_dissipation_and_learning_time():
    positions = random_path(3, links=3, n=4)
    rates = np.array([0.3, 0.1, 0.0, 0.0, 0.2, 0.5])
    report = esl.speed_limit(
        trajectory(positions, rates), transport=esl.ExactTransport(), jackknife=0
    )
    squares = np.array(
        [esl.ExactTransport().squared(a, b) for a, b in itertools.pairwise(positions)]
    )
    np.testing.assert_allclose(report.learning_time, 1.1)
    np.testing.assert_allclose(report.dissipation, squares[0] / 0.4 + squares[2] / 0.7, rtol=1e-12)
    np.testing.assert_allclose(report.entropy_production, 3 * np.sum(squares), rtol=1e-12)


def test_refinement_is_the_chain_of_every_second_snapshot():
    positions = random_path(1, links=6, dtype=np.float32)
    for transport in (esl.ExactTransport(), esl.GaussianTransport()):
        fine = esl.speed_limit(trajectory(positions), transport=transport, jackknife=0)
        coarse = esl.speed_limit(trajectory(positions[::2]), transport=transport, jackknife=0)
        np.testing.assert_allclose(
            fine.entropy_production_coarse, coarse.entropy_production, rtol=1e-6
        )
        np.testing.assert_allclose(fine.w2_squared, coarse.w2_squared, rtol=1e-6)
        assert coarse.entropy_production_coarse is None
    change = float(fine.entropy_production - fine.entropy_production_coarse)
    assert (
        f"Halving the number of snapshots changes Σ by {change:.3g}, so spacing still hides about "
        f"{change / 3:.2g}."
    ) in fine.verdict()


# Reference numbers


@pytest.mark.parametrize(
    ("case", "d", "transport"),
    [
        ("O1", 1, "exact"),
        ("O1", 1, "gaussian"),
        ("O3", 1, "exact"),
        ("O1", 10, "gaussian"),
        ("O3", 10, "gaussian"),
    ],
)
def test_ornstein_uhlenbeck(case, d, transport):
    """Within 5 standard errors of the chain of exact laws with as many links; a wrong clock, factor
    or split is off by tens of them."""
    links, steps, members = 8, 400, 20_000 if d == 1 else 8_000
    system = {"O1": systems.ornstein_uhlenbeck, "O3": systems.cosine_decay}[case](d, steps)
    start = system.sample(members, jax.random.key(0))
    path = system.run(start, links, jax.random.key(1))
    report = esl.speed_limit(path, transport=METRICS[transport](), jackknife=20)

    rates = np.concatenate([[0], np.cumsum(np.asarray(path.rates, float))])
    moments = oracles.ornstein_uhlenbeck_moments(1.0, 0.1, 1.0, 2.0, d, rates[:: steps // links])
    chain = dict(
        zip(NUMBERS[:3], oracles.gaussian_chain(*moments, np.asarray(path.times)), strict=True)
    )
    if (case, d) == ("O1", 1):
        np.testing.assert_allclose(chain["entropy_production"], oracles.O12[8], rtol=1e-7)
    # The chain is close to the theory itself: spacing hides 1 % of Σ for O1 and 3 % for the cosine.
    np.testing.assert_allclose(chain["entropy_production"], system.entropy_production, rtol=0.04)
    np.testing.assert_allclose(
        [chain["length_squared"], chain["w2_squared"]],
        [system.length_squared, system.w2_squared],
        rtol=5e-3,
    )
    for name, truth in chain.items():
        error = float(getattr(report.standard_error, name))
        # Euler steps of U/K shift Σ by about k U/2K relative, and a moment of n members carries a
        # bias of order d²/n.
        bias = 0.004 * truth + d * d / members
        assert abs(float(getattr(report, name)) - truth) < 5 * error + bias, name
        assert 10 * error < 0.3 * truth
    np.testing.assert_allclose(report.learning_time, system.learning_time, rtol=5e-3)
    np.testing.assert_allclose(report.dissipation, system.dissipation, rtol=0.04)
    assert (
        float(report.learning_time * report.dissipation)
        >= float(report.length_squared)
        >= float(report.w2_squared)
    )


@pytest.mark.usefixtures("x64")
def test_double_well_without_noise():
    """The order on the line never changes, so the chain is that of the members with themselves, and
    the flow is known."""
    wells, steps, links = systems.Wells(), 2000, 10
    path = esl.simulate(
        wells.potential,
        esl.Langevin(wells.time / steps),
        wells.start(9),
        steps=steps,
        snapshots=links,
        key=jax.random.key(0),
    )
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    truth = oracles.chain_of_pairs(wells.path(9, np.asarray(path.times)), np.asarray(path.times))
    np.testing.assert_allclose(
        (report.entropy_production, report.length_squared, report.w2_squared), truth, rtol=1e-3
    )
    np.testing.assert_allclose(
        report.dissipation * wells.time, report.entropy_production, rtol=1e-9
    )
    # F₀ - F₁ at T = 0 is the mean drop of Φ, and all of it is dissipated; the chain misses 1/J² of
    # it.
    np.testing.assert_allclose(
        report.dissipation, np.mean(path.energies[0] - path.energies[-1]), rtol=0.02
    )
    assert report.identity_fraction == 1


def test_circulation_is_invisible_to_a_chain():
    system = systems.non_symmetric(200)
    path = system.run(system.sample(4000, jax.random.key(0)), 10, jax.random.key(1))
    report = esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=20)
    tolerance = 5 * float(report.standard_error.length_squared) + 0.02 * system.length_squared
    assert abs(float(report.length_squared) - system.length_squared) < tolerance
    assert system.entropy_production - float(report.entropy_production) > 10 * float(
        report.standard_error.entropy_production
    )


# Errors


@pytest.mark.parametrize(
    ("d", "transport", "groups"), [(1, "exact", 32), (3, "gaussian", 32), (3, "gaussian", 10)]
)
def test_jackknife_errors_are_the_spread_over_runs(d, transport, groups):
    system, runs, members = systems.ornstein_uhlenbeck(d, 20), 400, 65
    report_of = functools.partial(esl.speed_limit, transport=METRICS[transport](), jackknife=groups)

    @jax.jit
    def reports(keys):
        def one(key):
            start = system.sample(members, jax.random.fold_in(key, 0))
            return report_of(system.run(start, 4, jax.random.fold_in(key, 1)))

        return jax.lax.map(one, keys)

    # The spread over 400 runs has an error of 4 %; forgetting the (g-1)/g scale of a jackknife is
    # off by a factor of g.
    stacked = reports(jax.random.split(jax.random.key(5), runs))
    assert stacked.standard_error.housekeeping is None  # not resolved by a chain
    for name in NUMBERS:
        spread = np.std(getattr(stacked, name), ddof=1)
        claimed = np.sqrt(np.mean(np.asarray(getattr(stacked.standard_error, name)) ** 2))
        # A jackknife errs on the safe side (Efron and Stein, 1981), here visibly for the geometric
        # part: a percent of Σ, and curved in q.
        assert -0.25 < claimed / spread - 1 < (0.5 if name == "geometric" else 0.25), (
            name,
            claimed,
            spread,
        )
    # Groups of one size that hold the most of 65 members, which is 5 times 13.
    count, size = {32: (32, 2), 10: (9, 7)}[groups]
    assert stacked.errors == f"jackknife over {count} groups of {size} of 65 members"


def runs_of(count=3):
    start = random_path(2, dtype=np.float32)[0]
    keys = jax.random.split(jax.random.key(0), count)

    def run(key):
        return esl.simulate(
            esl.Quadratic(1.0), esl.Langevin(0.1, 0.1), start, steps=8, snapshots=4, key=key
        )

    return [run(key) for key in keys], jax.vmap(run)(keys)


def test_several_runs_are_the_average_of_single_ones():
    singles, stacked = runs_of()
    alone = [
        esl.speed_limit(one, transport=esl.GaussianTransport(), jackknife=0) for one in singles
    ]
    for together in (
        esl.speed_limit(singles, transport=esl.GaussianTransport()),
        esl.speed_limit(stacked, transport=esl.GaussianTransport()),
    ):
        for name in NUMBERS:
            values = np.array([getattr(one, name) for one in alone])
            np.testing.assert_allclose(getattr(together, name), values.mean(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                getattr(together.standard_error, name),
                values.std(ddof=1) / np.sqrt(3),
                rtol=1e-3,
                atol=1e-5,
            )
        np.testing.assert_allclose(
            together.speed, np.mean([one.speed for one in alone], axis=0), rtol=1e-5
        )
        assert together.errors == "spread over 3 independent runs"
        assert "Several runs" not in together.verdict()
    chex.assert_trees_all_close(
        numbers(esl.measures.average(jax.tree.map(lambda *x: jnp.stack(x), *alone))),
        numbers(together),
        rtol=1e-5,
    )


def test_no_errors_where_none_can_be_taken():
    for members, groups in [(2, 32), (5, 0), (5, 1)]:
        report = esl.speed_limit(
            trajectory(random_path(0, n=members, dtype=np.float32)),
            transport=esl.ExactTransport(),
            jackknife=groups,
        )
        assert report.standard_error is None
        assert report.errors == "none"
    assert "standard errors" not in report.verdict()


# Noise


def test_noise_floor_is_the_chain_of_pure_noise():
    """Nothing but noise in d ≫ n: every member is its own best partner, and Σ is the floor, to a
    relative error of sqrt(2/Jnd)."""
    members, d, links = 6, 4000, 5
    rule = esl.Langevin(rates := 0.02, 0.3)
    path = esl.simulate(
        esl.Quadratic(0.0),
        rule,
        np.zeros((members, d), np.float32),
        steps=20,
        snapshots=links,
        key=jax.random.key(0),
    )
    # The first link starts from one point and has no best partner; what follows is spread.
    path = eqx.tree_at(
        lambda p: p.positions,
        path,
        path.positions + 10 * jax.random.normal(jax.random.key(1), (members, d)),
    )
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    np.testing.assert_allclose(report.noise_floor, links * 2 * d * 0.3 * rates * 20, rtol=1e-5)
    assert abs(float(report.entropy_production / report.noise_floor) - 1) < 5 * np.sqrt(
        2 / (links * members * d)
    )
    assert report.identity_fraction == 1
    verdict = report.verdict()
    assert "The chain is noise-dominated" in verdict
    assert "In 100 % of the links each member is its own best partner" in verdict


def test_noise_that_is_reassigned_is_not_called_dominant():
    system = systems.ornstein_uhlenbeck(1, 40)
    path = system.run(system.sample(500, jax.random.key(0)), 20, jax.random.key(1))
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    assert float(report.noise_floor) > float(report.entropy_production)  # 2·T·U·J = 4 against 2
    assert report.identity_fraction == 0
    assert "noise-dominated" not in report.verdict()
    assert "if no member changed partners" in report.verdict()


def test_noise_floor_only_where_it_is_known():
    positions = random_path(0, dtype=np.float32)
    assert (
        esl.speed_limit(
            trajectory(positions, temperature=1.0), transport=esl.GaussianTransport(), jackknife=0
        ).noise_floor
        is None
    )
    assert (
        esl.speed_limit(
            trajectory(positions, temperature=1.0, observed=True),
            transport=esl.ExactTransport(),
            jackknife=0,
        ).noise_floor
        is None
    )
    quiet = esl.speed_limit(trajectory(positions), transport=esl.ExactTransport(), jackknife=0)
    assert quiet.noise_floor == 0
    assert "noise" not in quiet.verdict().replace("sampling noise", "")


def test_identity_fraction_counts_links():
    # Far apart on a line: nobody changes partners but in the link where two members swap.
    start = np.arange(4.0, dtype=np.float32)[:, None] * 10
    positions = start + 0.1 * np.arange(5, dtype=np.float32)[:, None, None]
    positions[3:, [0, 1]] = positions[3:, [1, 0]]
    report = esl.speed_limit(trajectory(positions), transport=esl.ExactTransport(), jackknife=0)
    assert report.identity_fraction == 0.75
    np.testing.assert_allclose(report.entropy_production, 0.16, rtol=1e-5)
    assert (
        esl.speed_limit(
            trajectory(positions), transport=esl.GaussianTransport(), jackknife=0
        ).identity_fraction
        is None
    )


# Words


def test_an_approximate_transport_is_flagged():
    positions = random_path(0, dtype=np.float32)
    report = esl.speed_limit(
        trajectory(positions), transport=esl.SinkhornTransport(5.0), jackknife=0
    )
    assert not report.is_bound
    assert report.converged
    assert "not a metric" in report.verdict()
    assert "did not converge" not in report.verdict()
    assert (
        "not a metric"
        not in esl.speed_limit(
            trajectory(positions), transport=esl.GaussianTransport(), jackknife=0
        ).verdict()
    )
    mapped = esl.speed_limit(
        trajectory(positions),
        transport=esl.MappedTransport(esl.SinkhornTransport(5.0), jnp.tanh),
        jackknife=0,
    )
    assert not mapped.is_bound


def test_a_transport_that_did_not_converge_is_reported():
    hard = esl.SinkhornTransport(1e-3, threshold=1e-6, max_iterations=10)
    report = esl.speed_limit(
        trajectory(random_path(0, dtype=np.float32)), transport=hard, jackknife=0
    )
    assert not report.converged
    assert "A transport problem did not converge: do not trust these numbers." in report.verdict()


class ShortSighted(esl.AbstractTransport):
    """Converges for near ensembles only."""

    is_metric: ClassVar[bool] = True

    def solve(self, x, y):
        squared = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
        return esl.Solution(squared, squared < 4)


@pytest.mark.parametrize(
    ("snapshots", "converged"),
    [([0.0, 1.0, 1.5], True), ([0.0, 3.0, 1.0], False), ([0.0, 1.5, 3.0], False)],
)
def test_one_problem_that_did_not_converge_is_enough(snapshots, converged):
    positions = np.float32(snapshots)[:, None, None] * np.ones((3, 4, 1), np.float32)
    assert (
        bool(
            esl.speed_limit(trajectory(positions), transport=ShortSighted(), jackknife=0).converged
        )
        == converged
    )


def test_one_run_that_did_not_converge_shows_in_the_average():
    far, near = (
        trajectory(np.float32([0, step])[:, None, None] * np.ones((2, 4, 1), np.float32))
        for step in (3, 1)
    )
    for runs, converged in [([far, near], False), ([near, near], True)]:
        report = esl.speed_limit(runs, transport=ShortSighted())
        assert report.converged.shape == ()
        assert bool(report.converged) == converged


def test_an_increment_below_rounding_leaves_no_nan():
    """A Sinkhorn divergence of almost nothing may round to less than nothing."""
    start = random_path(0, n=8, dtype=np.float32)[0] * 10
    positions = start + 1e-6 * np.arange(9, dtype=np.float32)[:, None, None]
    report = esl.speed_limit(
        trajectory(positions), transport=esl.SinkhornTransport(20.0), jackknife=0
    )
    squares = [esl.SinkhornTransport(20.0).squared(a, b) for a, b in itertools.pairwise(positions)]
    assert min(squares) < 0  # or this test shows nothing
    chex.assert_tree_all_finite((report.length_squared, report.temporal, report.speed))


def planted(**values):
    report = esl.speed_limit(
        trajectory(random_path(0, dtype=np.float32), temperature=0.0),
        transport=esl.ExactTransport(),
    )
    names = tuple(values)
    return eqx.tree_at(
        lambda r: tuple(getattr(r, name) for name in names),
        report,
        tuple(jnp.asarray(v) for v in values.values()),
    )


def test_verdicts():
    """The sentences of a measured report; test_verdict.py has every one of them."""
    report = planted()
    error = float(report.standard_error.gap)
    ratio = float(report.entropy_production / report.w2_squared)
    within = report.interval("gap")
    ends = f"[{float(within.lower):.4g}, {float(within.upper):.4g}] at 95 %"
    assert report.verdict().startswith(
        f"The speed limit holds: Σ is {ratio:.3g} times W2²; the gap Σ - W2² of "
    )
    assert f" lies within {ends}.\n" in report.verdict()
    assert "A chain of laws is a lower bound of Σ" in report.verdict()
    assert "a chain of samples is neither bound until it is debiased" in report.verdict()

    doubtful = planted(w2_squared=report.entropy_production + 2 * error)
    assert doubtful.verdict().startswith("These members do not resolve a gap: ")
    assert "standard errors" not in doubtful.verdict()
    violated = planted(w2_squared=report.entropy_production + 5 * error)
    assert violated.verdict().startswith(
        f"The speed limit is violated by {5 * error:.4g}, 5.0 standard errors: Σ and W2² do not "
        "come from one geometry"
    )
    assert "holds" not in violated.verdict()
    assert float(violated.gap) < 0  # never clipped

    for name in ("entropy_production", "w2_squared", "length_squared"):
        first = planted(**{name: np.nan}).verdict().splitlines()[0]
        assert first == "No verdict: the numbers are not finite."
    assert "do not trust" in planted(converged=False).verdict()
    dominated = planted(noise_floor=report.entropy_production / 10, identity_fraction=1.0)
    assert (
        f"injected noise alone contributes up to {float(report.entropy_production) / 10:.3g} to Σ"
        in dominated.verdict()
    )
    assert (
        "noise-dominated"
        not in planted(noise_floor=report.entropy_production / 30, identity_fraction=1.0).verdict()
    )


class Counting(esl.AbstractTransport):
    """How often it is traced, to tell whether a second call compiles again."""

    is_metric: ClassVar[bool] = True
    traces: list = eqx.field(static=True)

    def solve(self, x, y):
        self.traces.append(1)
        return esl.Solution(jnp.mean((x - y) ** 2), jnp.asarray(True))


class Traces(list):
    __hash__ = object.__hash__


def test_a_second_call_compiles_nothing():
    transport = Counting(Traces())
    for seed in (0, 1):
        esl.speed_limit(trajectory(random_path(seed, dtype=np.float32)), transport=transport)
        counted = len(transport.traces) if seed == 0 else counted
    assert len(transport.traces) == counted > 0


def test_nothing_moved():
    still = np.broadcast_to(random_path(0, dtype=np.float32)[0], (4, 5, D))
    report = esl.speed_limit(trajectory(still), transport=esl.ExactTransport())
    assert report.entropy_production == report.w2_squared == report.gap == 0
    assert "Nothing moved" in report.verdict()
    assert np.isfinite(float(report.standard_error.gap))


def test_print():
    text = str(planted())
    lines = text.splitlines()
    assert lines[0] == (
        "speed limit by a chain of 4 links in ExactTransport; standard errors: jackknife over 5 "
        "groups of 1 of 5 members; units of θ²"
    )
    report = planted()
    verdict = report.verdict().splitlines()
    assert lines[-len(verdict) :] == verdict
    rows = lines[1 : -len(verdict)]
    # The signs ± stand below each other.
    assert len({line.index("±") for line in rows if "±" in line}) == 1
    cells = [line.rstrip().rsplit("  ", 1) for line in rows]
    table = {label.strip(): number.split() for label, number in cells}
    assert table["entropy production Σ"] == [
        f"{float(report.entropy_production):.6g}",
        "±",
        f"{float(report.standard_error.entropy_production):.2g}",
    ]
    assert table["learning time U (θ² per unit of the potential)"] == ["1"]
    assert table["housekeeping"] == ["not", "resolved"]
    assert table["efficiency W2²/Σ"] == [f"{float(report.efficiency):.6g}"]
    assert {
        "Wasserstein length L²",
        "Wasserstein distance W2²",
        "gap Σ - W2²",
        "temporal",
        "geometric",
        "dissipation D (units of the potential)",
    } < set(table)
    assert table["Σ, every 2nd snapshot"] == [f"{float(report.entropy_production_coarse):.6g}"]
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), report)
    assert "Several runs" in stacked.verdict()
    assert "SpeedLimit" in str(stacked)
    assert "SpeedLimit" in str(jax.eval_shape(lambda: report))
    np.testing.assert_allclose(report.efficiency, report.w2_squared / report.entropy_production)


# Transformations


@pytest.mark.parametrize("name", ["exact", "gaussian"])
def test_jit_and_vmap_change_nothing(name):
    transport = METRICS[name]()
    paths = [trajectory(random_path(seed, dtype=np.float32)) for seed in (0, 1)]

    def report_of(path):
        return esl.speed_limit(path, transport=transport, jackknife=3)

    alone = [report_of(path) for path in paths]
    chex.assert_trees_all_close(eqx.filter_jit(report_of)(paths[0]), alone[0], rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *paths)
    chex.assert_trees_all_close(
        jax.vmap(report_of)(stacked),
        jax.tree.map(lambda *x: jnp.stack(x), *alone),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METRICS)
def test_gradient_is_the_central_difference(name):
    transport, positions = METRICS[name](), random_path(4)

    def numbers(positions):
        report = esl.speed_limit(trajectory(positions), transport=transport, jackknife=0)
        return jnp.stack([getattr(report, name) for name in NUMBERS])

    jacobian = jax.jit(jax.jacrev(numbers))(positions)
    direction = np.random.default_rng(0).normal(size=positions.shape)
    difference = (
        numbers(positions + 1e-6 * direction) - numbers(positions - 1e-6 * direction)
    ) / 2e-6
    np.testing.assert_allclose(
        np.tensordot(jacobian, direction, 3), difference, rtol=1e-6, atol=1e-6
    )


def test_gradient_is_finite_where_nothing_moves():
    still = jnp.broadcast_to(random_path(0, dtype=np.float32)[0], (4, 5, D))
    for name in ("exact", "gaussian", "sliced"):
        slope = jax.grad(
            lambda x, name=name: (
                esl.speed_limit(
                    trajectory(x), transport=METRICS[name](), jackknife=0
                ).length_squared
            )
        )(still)
        chex.assert_tree_all_finite(slope)


def test_gradient_of_a_whole_run_in_the_learning_rate():
    """Σ of a translation in K steps, by hand: Σ = J Σ_j (m_j - m_{j+1})²."""
    start = np.array([[2.0], [2.0]], np.float32)

    def sigma(rate):
        path = esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(rate),
            start,
            steps=4,
            snapshots=4,
            key=jax.random.key(0),
        )
        return esl.speed_limit(
            path, transport=esl.GaussianTransport(), jackknife=0
        ).entropy_production

    rate, h = 0.3, 1e-4

    def by_hand(eta):
        return 4 * np.sum(np.diff(2 * (1 - eta) ** np.arange(5)) ** 2)

    np.testing.assert_allclose(sigma(rate), by_hand(rate), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(sigma)(rate), (by_hand(rate + h) - by_hand(rate - h)) / (2 * h), rtol=1e-4
    )


# In rounds


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("transport", "links", "members", "jackknife", "debias"),
    [
        (esl.ExactTransport(), 20, 9, 4, True),
        (esl.ExactTransport(), 3, 6, 32, False),
        (esl.SinkhornTransport(epsilon=1.0), 4, 6, 0, False),
        (esl.GaussianTransport(), 5, 8, 8, True),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_progress_changes_no_number(transport, links, members, jackknife, debias, named):
    """In rounds on the host, as in one program; pairs that do not come out even among them."""
    positions = np.random.default_rng(0).normal(size=(links + 1, members, 3)).cumsum(axis=0)
    path = esl.from_snapshots(positions, keys={"a": (2,), "b": (1,)} if named else None)
    options = {"transport": transport, "jackknife": jackknife, "debias": debias}
    calls = []
    ours = esl.speed_limit(path, **options, progress=lambda *numbers: calls.append(numbers))
    theirs = esl.speed_limit(path, **options)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert ours.errors == theirs.errors
    done, total = zip(*calls, strict=True)
    assert done[0] == 0 < done[1]
    assert all(a < b for a, b in itertools.pairwise(done))
    assert done[-1] == total[0] == total[-1]
    # Of 20 links of debiased distances and subsets of the members: some ten for each kind.
    assert links < 20 or 60 <= len(calls) <= 120


def test_rounds_count_the_problems_of_subsets():
    """3 links and the whole run, of 6 members and of 6 subsets."""
    path, calls = trajectory(random_path(0, dtype=np.float32)), []
    snapshots, members = path.positions.shape[:2]
    esl.speed_limit(
        path, transport=esl.ExactTransport(), progress=lambda *numbers: calls.append(numbers)
    )
    pairs = snapshots + (snapshots - 1) // 2 * (snapshots % 2)
    assert calls[-1] == (pairs * (1 + members),) * 2


# Bad input


def test_a_run_that_left_the_numbers_is_refused_with_the_snapshot():
    positions = random_path(0, dtype=np.float32)
    positions[2:, 1] = np.nan
    positions[3:, 4, 0] = np.inf
    sentence = (
        "must hold finite members, but 2 of them are not at the end, the first from snapshot 2 on; "
        "the likely cause is a learning rate"
    )
    with pytest.raises(esl.InputError, match=sentence):
        esl.speed_limit(trajectory(positions), transport=esl.ExactTransport())
    good = random_path(1, dtype=np.float32)
    with pytest.raises(esl.InputError, match=sentence):
        esl.speed_limit([trajectory(good), trajectory(positions)], transport=esl.ExactTransport())
    lost = eqx.filter_jit(
        lambda path: esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    )(trajectory(positions))
    assert np.isnan(lost.entropy_production)
    assert not lost.converged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        diverged = esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(1e3),
            np.ones((3, 1), np.float32),
            steps=40,
            snapshots=20,
            key=jax.random.key(0),
        )
    with pytest.raises(
        esl.InputError, match=r"from snapshot 7 on"
    ):  # 10^39 is beyond single precision after 13 steps
        esl.speed_limit(diverged, transport=esl.ExactTransport())


BAD = {
    r"`transport` must be a transport such as ExactTransport\(\)": lambda path: {
        "transport": "exact"
    },
    "`trajectory` must be a Trajectory or a sequence of at least two, but is a int": lambda path: {
        "trajectory": 3
    },
    "`trajectory` must be a Trajectory or a sequence of at least two, but is a sequence of 1": (
        lambda path: {"trajectory": [path]}
    ),
    "`trajectory` must be a Trajectory or a sequence of at least two, but is a ": lambda path: {
        "trajectory": path.positions
    },
    "`trajectory` must hold runs of one shape": lambda path: {
        "trajectory": [path, trajectory(path.positions[::2])]
    },
    "`trajectory` must hold runs of one shape, but holds 2 runs": lambda path: {
        "trajectory": [path, trajectory(path.positions, observed=True)]
    },
    "`trajectory` must hold at least two snapshots of at least two members": lambda path: {
        "trajectory": trajectory(path.positions[:, :1])
    },
    r"`trajectory` must hold positions \(J\+1, n, d\)": lambda path: {
        "trajectory": eqx.tree_at(lambda p: p.positions, path, jnp.ones((3, 2)))
    },
    "`jackknife` must be an integer of at least 0, but is -1": lambda path: {"jackknife": -1},
    "`jackknife` must be an integer of at least 0, but is 2.5": lambda path: {"jackknife": 2.5},
    "`progress` must be None for several runs": lambda path: {
        "trajectory": [path, path],
        "progress": print,
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input(sentence, refused):
    path = trajectory(random_path(0, dtype=np.float32))
    refused(
        lambda: esl.speed_limit(
            **{"trajectory": path, "transport": esl.ExactTransport(), **BAD[sentence](path)}
        ),
        sentence,
    )
