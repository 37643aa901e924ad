"""Velocities, fields, densities and entropies from outside: they work, or fail in one sentence."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.velocity.density import AbstractDensityVelocity

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

POTENTIAL = esl.Quadratic(1.0)
KEY = jax.random.key(0)


# Classes as a user writes them


class Translation(esl.AbstractVelocity):
    """All members move as their mean does."""

    moments_only, needs_drift, between = True, True, False

    def init(self, positions):
        return None

    def estimate(self, snapshot, state):
        values = self.flow(snapshot)
        squares = jnp.sum(values**2, axis=1)
        nothing = jnp.zeros_like(squares)
        return esl.velocity.Velocity(values, squares, squares, nothing, bound="lower"), state

    def flow(self, snapshot):
        return jnp.broadcast_to(jnp.mean(snapshot.drift, axis=0), snapshot.drift.shape)


class ConstantField(esl.velocity.AbstractField):
    mean: jax.Array

    def evaluate(self, positions, diffusion):
        nothing = jnp.zeros(len(positions))
        return jnp.broadcast_to(self.mean, positions.shape), nothing, nothing


class Constant(esl.velocity.AbstractVariationalVelocity):
    """The same, fitted and cross-fitted by the base class, with a warm start that counts fits."""

    moments_only, note = True, "constant fields"

    def init(self, positions):
        return [jnp.zeros(()) for _ in range(6)]

    def fit(self, snapshot, gradient, state):
        return ConstantField(jnp.mean(snapshot.drift, axis=0)), state + 1


class Normal(esl.density.AbstractLogDensity):
    mean: jax.Array
    width: jax.Array

    def log_density(self, x):
        y = (x - self.mean) / self.width
        return -jnp.sum(y**2 / 2 + jnp.log(2 * jnp.pi) / 2 + jnp.log(self.width))

    def score(self, x):
        return (self.mean - x) / self.width**2


class NormalDensity(esl.density.AbstractDensity):
    """A Gaussian along each axis."""

    note = "Gaussian along each axis"

    def init(self, positions):
        return None

    def estimate(self, positions, state):
        return Normal(jnp.mean(positions, axis=0), jnp.std(positions, axis=0)), state


class NormalVelocity(AbstractDensityVelocity):
    density = NormalDensity()


class NormalEntropy(esl.density.AbstractEntropy):
    """By the density above, with its members in it."""

    def estimate(self, positions):
        law, _ = NormalDensity().estimate(positions, None)
        return esl.density.Entropy(-jax.vmap(law.log_density)(positions), "by hand")


def run(rule=None, d=2, spread=1.0):
    start = 2.0 + spread * jax.random.normal(KEY, (64, d))
    rule = esl.Langevin(0.1, 0.05) if rule is None else rule
    return esl.simulate(POTENTIAL, rule, start, steps=8, snapshots=4, key=KEY)


@pytest.fixture(scope="module")
def path():
    return run()


def limit(path, velocity):
    return esl.speed_limit(
        path,
        transport=esl.GaussianTransport(),
        velocity=velocity,
        potential=POTENTIAL,
        jackknife=0,
    )


def books(path, entropy, velocity=None):
    return esl.free_energy(path, POTENTIAL, entropy=entropy, velocity=velocity, jackknife=0)


# They work


@pytest.mark.parametrize("velocity", [Translation(), Constant()], ids=["base", "variational"])
def test_a_velocity_from_outside_works_wherever_ours_does(path, velocity):
    # A narrow cloud without noise is only translated, so that the affine field is constant too.
    narrow = run(esl.Langevin(0.1, 0.0), spread=1e-3)
    np.testing.assert_allclose(
        limit(narrow, velocity).entropy_production,
        limit(narrow, esl.AffineVelocity()).entropy_production,
        rtol=1e-4,
    )
    assert type(velocity).__name__ in limit(path, velocity).source
    report = books(path, esl.density.TransportedEntropy(NormalEntropy()), velocity)
    # A translation carries the entropy along unchanged.
    np.testing.assert_allclose(report.entropy[0], report.entropy[-1], rtol=1e-6)
    moved = run(esl.ProbabilityFlow(0.1, 0.05, velocity))
    # Members keep their places about the mean, which shrinks as that of gradient descent.
    start, end = (np.asarray(moved.positions[i]) for i in (0, -1))
    np.testing.assert_allclose(end - end.mean(0), start - start.mean(0), atol=1e-5)
    np.testing.assert_allclose(end.mean(0), 0.9**8 * start.mean(0), rtol=1e-5)


def test_an_entropy_from_outside_works_wherever_ours_does(path):
    ours, outside = (
        books(path, entropy).entropy for entropy in (esl.density.GaussianEntropy(), NormalEntropy())
    )
    # Ours corrects a bias of d(d + 3)/4n, and knows a correlation of about 1/√n.
    np.testing.assert_allclose(ours, outside, atol=0.1)
    assert "NormalEntropy" in books(path, NormalEntropy()).source


def test_a_density_from_outside_works_wherever_ours_does(path):
    law = NormalDensity().fit(path.final)
    # Terms of the size of log(2π), each rounded in single precision.
    np.testing.assert_allclose(
        law.log_density(law.mean), -np.log(2 * np.pi * np.prod(law.width)), rtol=0, atol=2.5e-7
    )
    report = limit(path, NormalVelocity())
    np.testing.assert_allclose(
        report.entropy_production, limit(path, esl.AffineVelocity()).entropy_production, rtol=0.05
    )
    flow = run(esl.ProbabilityFlow(0.1, 0.05, NormalVelocity()))
    assert np.isfinite(flow.final).all()


# Or they are rejected in one sentence


def altered(cls, **methods):
    """A subclass with other methods; `equinox` forbids overriding, so it is made from the bases."""
    own = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    own = {name: value for name, value in own.items() if name != "_abc_impl"}
    return type("Outside", cls.__bases__, {**own, **methods})()


def bare(self, snapshot, state):
    return snapshot.drift


def alone(self, snapshot, state):
    return Translation().estimate(snapshot, state)[0]


def short(self, snapshot, state):
    velocity, state = Translation().estimate(snapshot, state)
    return eqx.tree_at(lambda v: v.contributions, velocity, velocity.contributions[1:]), state


def flat(self, snapshot, state):
    velocity, state = Translation().estimate(snapshot, state)
    return eqx.tree_at(lambda v: v.divergence, velocity, jnp.zeros((64, 1))), state


def misnamed(self, snapshot, state):
    squares = jnp.zeros(64)
    return esl.velocity.Velocity(snapshot.drift, squares, None, None, bound="below"), state


def growing(self, snapshot, state):
    return Translation().estimate(snapshot, state)[0], jnp.zeros(2)


class Lopsided(esl.velocity.AbstractField):
    def evaluate(self, positions, diffusion):
        return positions, jnp.zeros(()), jnp.zeros(len(positions))


class Partial(esl.velocity.AbstractField):
    def evaluate(self, positions, diffusion):
        return positions, jnp.zeros(len(positions))


WRONG_VELOCITIES = {
    "a bare array": (
        lambda: altered(Translation, estimate=bare),
        r"`velocity` must return a Velocity and a state from `estimate`, "
        r"but Outside.estimate returns an array of shape \(64, 2\)",
    ),
    "no state": (
        lambda: altered(Translation, estimate=alone),
        "a Velocity and a state from `estimate`, but Outside.estimate returns Velocity",
    ),
    "members missing": (
        lambda: altered(Translation, estimate=short),
        r"contributions of shape \(64,\) .* an array of shape \(63,\)",
    ),
    "a column": (
        lambda: altered(Translation, estimate=flat),
        r"divergence of shape \(64,\) .* an array of shape \(64, 1\)",
    ),
    "another bound": (
        lambda: altered(Translation, estimate=misnamed),
        "`bound` must be one of 'lower', 'upper', 'none', but is 'below'",
    ),
    "another state": (
        lambda: altered(Translation, estimate=growing),
        "`velocity` must return a state .* that `init` returns, but Outside.estimate",
    ),
    "a function for a field": (
        lambda: altered(Constant, fit=lambda self, snapshot, gradient, state: jnp.sin),
        "`velocity` must return an AbstractField and a state from `fit`, but Outside.fit",
    ),
    "a function and a state": (
        lambda: altered(Constant, fit=lambda self, snapshot, gradient, state: (bare, state)),
        r"but Outside.fit returns \(function bare, an array of shape \(\)\)",
    ),
    "a field of another shape": (
        lambda: altered(Constant, fit=lambda self, snapshot, gradient, state: (Lopsided(), state)),
        r"`field` must return tr\(D ∇w\) of shape \(22,\) from `evaluate`",
    ),
    "a field without divergence": (
        lambda: altered(Constant, fit=lambda self, snapshot, gradient, state: (Partial(), state)),
        "`field` must return w, .* but Partial.evaluate returns",
    ),
    "one state for six fits": (
        lambda: altered(Constant, init=lambda self, positions: jnp.zeros(3)),
        "None or a list of 6 states from `init`, but Outside.init",
    ),
    "a density that is a function": (
        lambda: altered(
            NormalVelocity,
            density=altered(NormalDensity, estimate=lambda self, positions, state: (bare, state)),
        ),
        "`density` must return an AbstractLogDensity and a state from `estimate`",
    ),
    "a mean without direction": (
        lambda: altered(
            NormalVelocity,
            density=altered(
                NormalDensity,
                estimate=lambda self, positions, state: (
                    Blunt(jnp.mean(positions, axis=0), jnp.std(positions, axis=0)),
                    state,
                ),
            ),
        ),
        r"`density` must return means of shape \(2,\) from `smooth`, but Blunt.smooth",
    ),
    "a score without direction": (
        lambda: altered(
            NormalVelocity,
            density=altered(
                NormalDensity,
                estimate=lambda self, positions, state: (Scalar(), state),
            ),
        ),
        r"`density` must return a score of shape \(2,\) from `score`, but Scalar.score",
    ),
}


class Blunt(Normal, esl.density.AbstractSmoother):
    """A density that smooths a drift to one number."""

    def smooth(self, positions, values):
        return eqx.Partial(lambda mean, x: mean, jnp.mean(values))


class Scalar(esl.density.AbstractLogDensity):
    def log_density(self, x):
        return jnp.sum(x)

    def score(self, x):
        return jnp.sum(x)


@pytest.mark.parametrize("case", WRONG_VELOCITIES)
def test_a_velocity_that_answers_otherwise_is_rejected(path, refused, case):
    make, sentence = WRONG_VELOCITIES[case]
    refused(lambda: limit(path, make()), sentence)
    entropy = esl.density.TransportedEntropy(NormalEntropy())
    refused(lambda: books(path, entropy, make()), sentence)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: altered(Translation, flow=lambda self, snapshot: snapshot.drift[0]),
            r"`velocity` must return velocities of shape \(64, 2\) from `flow`",
        ),
        (
            lambda: altered(Constant, fit=lambda self, snapshot, gradient, state: jnp.sin),
            "`velocity` must return an AbstractField and a state from `fit`",
        ),
        (
            lambda: altered(
                Constant, fit=lambda self, snapshot, gradient, state: (Lopsided(), state)
            ),
            r"`field` must return tr\(D ∇w\) of shape \(64,\) from `evaluate`",
        ),
        (
            lambda: altered(Constant, init=lambda self, positions: jnp.zeros(6)),
            "None or a list of 6 states from `init`, but Outside.init",
        ),
        (lambda: Translation, "`velocity` must estimate from one snapshot"),
        (
            lambda: altered(Translation, between=True),
            "`velocity` must estimate from one snapshot",
        ),
    ],
)
def test_a_flow_that_answers_otherwise_is_rejected(refused, make, sentence):
    refused(lambda: run(esl.ProbabilityFlow(0.1, 0.05, make())), sentence)


WRONG_ENTROPIES = {
    "a number": (
        lambda self, positions: jnp.zeros(()),
        r"`entropy` must return an Entropy from `estimate`, "
        r"but Outside.estimate returns an array of shape \(\)",
    ),
    "members missing": (
        lambda self, positions: esl.density.Entropy(jnp.zeros(3)),
        r"`entropy` must return contributions of shape \(64,\) .* an array of shape \(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_ENTROPIES)
def test_an_entropy_that_answers_otherwise_is_rejected(path, refused, case):
    estimate, sentence = WRONG_ENTROPIES[case]
    entropy = altered(NormalEntropy, estimate=estimate)
    refused(lambda: books(path, entropy), sentence)
    refused(
        lambda: books(path, esl.density.TransportedEntropy(entropy), Translation()),
        sentence,
    )
    refused(lambda: entropy(path.final), sentence)


def test_no_entropy_is_carried_along(refused):
    refused(lambda: esl.density.TransportedEntropy(Translation()), "`start` must be an entropy")


def test_a_density_that_answers_otherwise_is_rejected(path, refused):
    density = altered(NormalDensity, estimate=lambda self, positions, state: jnp.zeros(3))
    refused(
        lambda: density.fit(path.final),
        r"`density` must return an AbstractLogDensity and a state from `estimate`, but Outside"
        r".estimate returns an array of shape \(3,\)",
    )


class Mute(esl.AbstractTransport):
    """A transport without a map."""

    is_metric = False

    def solve(self, x, y):
        return esl.Solution(jnp.sum((x - y) ** 2), jnp.array(True))


class Blurred(Mute):
    """A transport that maps members to numbers."""

    def map(self, x, y):
        return jnp.sum(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: esl.SlicedTransport(4, KEY),
        lambda: esl.MappedTransport(esl.ExactTransport(), lambda member: member),
        lambda: esl.MappedTransport(esl.ExactTransport(), lambda member, power=2: member**power),
        lambda: esl.ProjectedTransport(esl.ExactTransport(), jnp.eye(2)),
        lambda: Mute(),
        lambda: esl.ExactTransport,
    ],
)
def test_a_transport_without_a_map_is_rejected_at_once(refused, make):
    refused(
        lambda: esl.TransportVelocity(make()),
        "`transport` must have a method `map`, as ExactTransport",
    )


def test_a_map_that_answers_otherwise_is_rejected(path, refused):
    velocity = esl.TransportVelocity(Blurred())
    refused(
        lambda: esl.speed_limit(path, transport=esl.ExactTransport(), velocity=velocity),
        r"`velocity` must return values of shape \(64, 2\) from `estimate`",
    )


@pytest.mark.parametrize("part", ["drift", "diffusion", "before", "elapsed"])
def test_a_snapshot_without_a_part_is_rejected(refused, part):
    x = jnp.ones((8, 1))
    whole = {
        "drift": x,
        "diffusion": jnp.ones(()),
        "before": x,
        "after": x,
        "elapsed": jnp.ones(()),
    }
    snapshot = esl.velocity.Snapshot(x, **{name: whole[name] for name in whole if name != part})
    of_drift = [esl.AffineVelocity(), esl.KDEVelocity()]
    of_paths = [esl.PathVelocity(), esl.TransportVelocity(esl.ExactTransport())]
    for velocity in of_drift if part in ("drift", "diffusion") else of_paths:
        refused(
            lambda velocity=velocity: velocity.flow(snapshot),
            f"`snapshot` must carry .* but has no `{part}`",
        )
