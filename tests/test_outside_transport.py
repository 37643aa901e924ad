"""Transports from outside of the package: each works in every public function or is rejected."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.density import KDEEntropy

KEY = jax.random.key(0)
N, D = 8, 12
POTENTIAL = esl.Quadratic(1.0)
ENSEMBLE = jax.ShapeDtypeStruct((64, 20), jnp.float32)


class MeanTransport(esl.AbstractTransport):
    """Between means: an outsider's least class."""

    is_metric: ClassVar[bool] = True

    def solve(self, x, y):
        squared = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
        return esl.Solution(squared, jnp.isfinite(squared))


class PairedTransport(esl.AbstractTransport):
    """Every member with itself, in coordinates of its own: an outsider's class with all methods."""

    is_metric: ClassVar[bool] = True
    in_turn: ClassVar[bool] = True
    pairs_members: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    epsilon: float
    weights: jax.Array

    @property
    def name(self):
        return "Paired"

    @property
    def projection(self):
        return self.weights

    def coordinates(self, positions):
        return positions @ self.weights

    def coarser(self):
        return PairedTransport(2 * self.epsilon, self.weights)

    def numbers_held(self, n, d, differentiated):
        return 1000

    def numbers_waiting(self, n, d, differentiated):
        return 10

    def solve(self, x, y):
        return self._answer((x - y) @ self.weights)

    def map(self, x, y):
        return y

    def _answer(self, moved):
        squared = jnp.mean(jnp.sum(moved**2, axis=1)) + self.epsilon
        return esl.Solution(squared, jnp.isfinite(squared))


class RelabelledTransport(esl.transport.AbstractWrappedTransport):
    """Members in the opposite order: an outsider's wrapper that changes no number."""

    def solve(self, x, y):
        return self.transport.solve(x[::-1], y[::-1])


class ShiftedTransport(esl.transport.AbstractWrappedTransport):
    """An outsider's wrapper with coordinates of its own."""

    def coordinates(self, positions):
        return self.transport.coordinates(positions + 1)

    def solve(self, x, y):
        return self.transport.solve(x + 1, y + 1)


@pytest.fixture(scope="module")
def path():
    """A heated run: each of the few members stays its own best partner."""
    start = 3 + jax.random.normal(KEY, (N, D))
    rule = esl.Langevin(0.01, 0.1)
    return esl.simulate(POTENTIAL, rule, start, steps=40, snapshots=4, key=KEY)


def names(report):
    return {finding.name for finding in report.diagnose()}


def warned(report):
    return float(report.noise_floor), float(report.identity_fraction), names(report)


# The least class


def test_two_methods_are_enough_for_a_report(path):
    report = esl.speed_limit(path, transport=MeanTransport(), debias=True, jackknife=4)
    means = np.asarray(path.positions).mean(axis=1)
    squares = np.sum(np.diff(means, axis=0) ** 2, axis=1)
    np.testing.assert_allclose(report.entropy_production, 4 * squares.sum(), rtol=1e-5)
    np.testing.assert_allclose(report.w2_squared, np.sum((means[-1] - means[0]) ** 2), rtol=1e-5)
    assert np.isfinite(float(report.standard_error.debiased_gap))
    assert report.noise_floor is report.identity_fraction is None
    assert "noise-dominated chain" not in names(report)
    assert "a chain of 4 links in MeanTransport;" in str(report)


def test_two_methods_are_enough_for_a_free_energy(path):
    report = esl.free_energy(
        path, POTENTIAL, entropy=KDEEntropy(), transport=MeanTransport(), jackknife=4
    )
    means = np.asarray(path.positions).mean(axis=1)
    by_hand = np.sum(np.diff(means, axis=0) ** 2, axis=1) / 0.1
    np.testing.assert_allclose(report.dissipation_of_links, by_hand, rtol=1e-4)


def test_two_methods_take_fields_of_drift_but_not_of_moments(path, refused):
    def report(velocity):
        return esl.speed_limit(
            path, transport=MeanTransport(), velocity=velocity, potential=POTENTIAL, jackknife=0
        )

    assert float(report(esl.KernelVelocity()).entropy_production) > 0
    refused(
        lambda: report(esl.AffineVelocity()),
        r"be GaussianTransport\(\) beside AffineVelocity.*but is MeanTransport",
    )


@pytest.mark.parametrize(
    "transport",
    [
        MeanTransport(),
        RelabelledTransport(MeanTransport()),
        esl.MappedTransport(MeanTransport(), jnp.tanh),
    ],
    ids=lambda transport: transport.name,
)
def test_a_memory_that_is_not_known_is_not_planned(transport, refused):
    refused(
        lambda: esl.plan_memory(POTENTIAL, ENSEMBLE, steps=20, transport=transport),
        r"`transport` must define `numbers_held\(n, d, differentiated\)`.*that of "
        f"{transport.name} returns None",
    )


# The class with all methods


def test_all_methods_enter_the_report(path):
    weights = 3 * jnp.eye(D)[:, :5]
    report = esl.speed_limit(path, transport=PairedTransport(0.5, weights), jackknife=0)
    assert report.source == "a chain of 4 links in Paired"
    # 2 tr(WᵀW) T η per unit of time, four links of ten steps: heat .01 each over a quarter.
    np.testing.assert_allclose(report.noise_floor, 2 * 45 * 4 * 0.01 / 0.25, rtol=1e-5)
    assert float(report.identity_fraction) == 1
    assert report.evidence.coordinates == 5
    np.testing.assert_allclose(report.evidence.doubled_epsilon, report.w2_squared + 0.5, rtol=1e-5)


def test_all_methods_enter_the_plan():
    transport = PairedTransport(0.5, jnp.eye(20))
    sizes = {"steps": 20, "snapshots": 20, "transport": transport}
    # Twenty links, the whole run and ten links of every second snapshot, solved in turn on a CPU.
    together = 31 if jax.default_backend() != "cpu" else 1
    expected = 4 * (31 * 1000 if together == 31 else 31 * 10 + 1000)
    assert esl.plan_memory(POTENTIAL, ENSEMBLE, **sizes).transport == expected


def test_drift_and_noise_are_projected_by_its_matrix(path):
    def report(transport):
        return esl.speed_limit(
            path,
            transport=transport,
            velocity=esl.KernelVelocity(),
            potential=POTENTIAL,
            jackknife=0,
        ).entropy_production

    weights = jnp.eye(D)[:, :2] * 2
    ours = esl.ProjectedTransport(esl.ExactTransport(), weights)
    np.testing.assert_allclose(report(PairedTransport(0.0, weights)), report(ours), rtol=1e-5)


def test_its_map_makes_velocities(path):
    transport = PairedTransport(0.0, jnp.eye(D))
    report = esl.speed_limit(
        path, transport=transport, velocity=esl.TransportVelocity(transport), jackknife=0
    )
    times, positions = np.arange(5), np.asarray(path.positions)
    after, before = np.minimum(times + 1, 4), np.maximum(times - 1, 0)
    velocities = (positions[after] - positions[before]) / (0.1 * (after - before))[:, None, None]
    squares = np.mean(np.sum(velocities**2, axis=2), axis=1)
    assert report.entropy_production_chain is not None
    # On the clock of learning time, of .4 in all, with trapezoids between the snapshots.
    expected = 0.4 * 0.1 * np.sum(squares[1:] + squares[:-1]) / 2
    np.testing.assert_allclose(report.entropy_production, expected, rtol=2e-2)


# Wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        RelabelledTransport,
        lambda inner: esl.ProjectedTransport(inner, jnp.eye(D)),
        lambda inner: esl.ProjectedTransport(RelabelledTransport(inner), jnp.eye(D)),
        lambda inner: RelabelledTransport(esl.ProjectedTransport(inner, jnp.eye(D))),
    ],
    ids=["outside", "projected", "projected outside", "outside projected"],
)
def test_a_wrapper_that_changes_nothing_silences_nothing(path, wrap):
    bare, wrapped = (
        esl.speed_limit(path, transport=transport, debias=True, jackknife=4)
        for transport in (esl.ExactTransport(), wrap(esl.ExactTransport()))
    )
    assert {"noise-dominated chain", "n too small for d"} <= names(bare)
    assert warned(wrapped) == warned(bare)
    np.testing.assert_allclose(wrapped.entropy_production, bare.entropy_production, rtol=1e-5)
    np.testing.assert_allclose(
        wrapped.standard_error.debiased_gap, bare.standard_error.debiased_gap, rtol=1e-3
    )
    assert wrapped.verdict() == bare.verdict()


def test_the_noise_floor_is_that_of_the_composed_projection(path):
    first, second = np.random.default_rng(0).normal(size=(2, D, D))[:, :, :5]
    second = second[:5, :3]
    inner = esl.ProjectedTransport(esl.ExactTransport(), second)
    report = esl.speed_limit(
        path, transport=RelabelledTransport(esl.ProjectedTransport(inner, first)), jackknife=0
    )
    bare = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
    share = np.trace((first @ second).T @ (first @ second)) / D
    np.testing.assert_allclose(report.noise_floor, share * bare.noise_floor, rtol=1e-5)
    assert report.evidence.coordinates == 3


@pytest.mark.parametrize(
    "wrap",
    [lambda inner: esl.MappedTransport(inner, lambda member: member[:3] ** 2), ShiftedTransport],
    ids=["mapped", "outside"],
)
def test_pairs_are_found_in_features_and_their_noise_floor_is_unknown(path, wrap, refused):
    transport = wrap(esl.ExactTransport())
    report = esl.speed_limit(path, transport=transport, jackknife=0)
    features = np.asarray(transport.coordinates(path.positions))
    paired = np.mean(np.sum(np.diff(features, axis=0) ** 2, axis=2), axis=1)
    squares = [float(esl.ExactTransport().squared(*features[[j, j + 1]])) for j in range(4)]
    optimal = np.mean(np.isclose(squares, paired, rtol=2e-5))
    assert float(report.identity_fraction) == optimal
    assert report.noise_floor is None
    refused(
        lambda: esl.speed_limit(
            path, transport=transport, velocity=esl.KernelVelocity(), potential=POTENTIAL
        ),
        f"is KernelVelocity in a {transport.name}",
    )


def test_a_wrapper_is_planned_by_the_coordinates_that_it_compares():
    def planned(transport):
        return esl.plan_memory(POTENTIAL, ENSEMBLE, steps=20, transport=transport).transport

    few = esl.ProjectedTransport(esl.GaussianTransport(), jnp.ones((20, 2)))
    assert planned(RelabelledTransport(few)) == planned(few) < planned(esl.GaussianTransport())


def test_a_wrapper_of_means_and_covariances_stands_beside_affine_fields(path):
    def report(transport):
        return esl.speed_limit(
            path,
            transport=esl.ProjectedTransport(transport, jnp.eye(D)[:, :2]),
            velocity=esl.AffineVelocity(),
            potential=POTENTIAL,
            jackknife=0,
        ).entropy_production

    assert report(RelabelledTransport(esl.GaussianTransport())) == report(esl.GaussianTransport())


def test_a_wrapper_between_whole_members_enters_a_free_energy(path, refused):
    def report(transport):
        return esl.free_energy(
            path, POTENTIAL, entropy=KDEEntropy(), transport=transport, jackknife=0
        ).dissipation

    wrapped = report(RelabelledTransport(esl.GaussianTransport()))
    np.testing.assert_allclose(wrapped, report(esl.GaussianTransport()), rtol=1e-4)
    for transport in (
        ShiftedTransport(esl.GaussianTransport()),
        esl.ProjectedTransport(esl.GaussianTransport(), jnp.eye(D)),
        PairedTransport(0.0, jnp.eye(D)),
    ):
        refused(
            lambda transport=transport: report(transport),
            f"`transport` must be a transport between whole members.*but is a {transport.name}",
        )


# Wrong answers


class Wrong(esl.AbstractTransport):
    """Right but for what a test changes."""

    is_metric: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    answer: Any = eqx.field(static=True, default=None)
    compared: Any = eqx.field(static=True, default=None)
    matrix: Any = eqx.field(static=True, default=None)

    @property
    def projection(self):
        return None if self.matrix is None else self.matrix(D)

    def coordinates(self, positions):
        return positions if self.compared is None else self.compared(positions)

    def solve(self, x, y):
        right = MeanTransport().solve(x, y)
        return right if self.answer is None else self.answer(right)


BARE = r"return `Solution\(squared, converged\)` from `solve`, but Wrong returns a "
SHAPES = r"one number and one boolean, each of shape \(\), in the `Solution` of `solve`, but Wrong"
WRONG = {
    "a number": (Wrong(lambda right: right.squared), BARE),
    "a pair": (Wrong(lambda right: (right.squared, right.converged)), BARE + "tuple"),
    "nothing": (Wrong(lambda right: []), BARE + "list"),
    "two numbers": (
        Wrong(lambda right: esl.Solution(jnp.stack([right.squared] * 2), right.converged)),
        SHAPES + r" returns float32\(2,\) and bool\(\)",
    ),
    "a flag that is no boolean": (
        Wrong(lambda right: esl.Solution(right.squared, right.squared)),
        SHAPES + r" returns float32\(\) and float32\(\)",
    ),
    "one coordinate without its axis": (
        Wrong(compared=lambda positions: positions[..., 0]),
        rf"return shape \(1, {N}, p\) from `coordinates` for positions of shape \(1, {N}, {D}\), "
        rf"but Wrong returns shape \(1, {N}\)",
    ),
    "fewer members": (
        Wrong(compared=lambda positions: positions[:, 1:]),
        rf"from `coordinates`.*but Wrong returns shape \(1, {N - 1}, {D}\)",
    ),
    "coordinates that are no array": (
        Wrong(compared=lambda positions: "all"),
        "from `coordinates`.*but Wrong returns no array",
    ),
    "a linear map without its matrix": (
        Wrong(compared=lambda positions: positions[..., :2]),
        rf"have a `projection` of shape \({D}, 2\).*but that of Wrong is None",
    ),
    "a matrix of another shape": (
        Wrong(matrix=lambda d: jnp.ones((d, 2))),
        rf"have a `projection` of shape \({D}, {D}\).*but that of Wrong has shape \({D}, 2\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_one_sentence(path, kind, refused):
    transport, sentence = WRONG[kind]
    sentence = f"Argument `transport` must .*{sentence}"
    refused(lambda: esl.speed_limit(path, transport=transport), sentence)
    refused(
        lambda: esl.free_energy(path, POTENTIAL, entropy=KDEEntropy(), transport=transport),
        sentence,
    )
    if transport.answer is not None:
        refused(lambda: transport.squared(path.positions[0], path.positions[1]), sentence)
        mapped = esl.MappedTransport(transport, jnp.tanh)
        refused(
            lambda: esl.speed_limit(path, transport=mapped),
            sentence.replace("Wrong", "MappedTransport Wrong"),
        )


def test_a_wrapper_wraps_a_transport(refused):
    refused(
        lambda: esl.ProjectedTransport("exact", np.eye(2)),
        r"`transport` must be a transport such as ExactTransport\(\), but is 'exact'",
    )
