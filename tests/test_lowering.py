"""The gradient of the whole gap, lowered for TPU and GPU without either.

No callback, no float64, and the highest precision in every product of the package.
"""

import collections
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import pytest

import esljax as esl

KEY = jax.random.key(0)
PLATFORMS = ("tpu", "cuda")

# Every transport claims TPU support; a new one joins by one row.
TRANSPORTS = {
    "exact": esl.ExactTransport(),
    "gaussian": esl.GaussianTransport(),
    "sliced": esl.SlicedTransport(16, KEY),
    "hierarchical": esl.HierarchicalTransport(KEY, leaf=4),
    "sinkhorn": esl.SinkhornTransport(1.0),
    "sinkhorn in blocks": esl.SinkhornTransport(1.0, chunk=4),
    "projected": esl.ProjectedTransport(esl.GaussianTransport(), jnp.eye(2410)[:, :5]),
    "mapped": esl.MappedTransport(esl.ExactTransport(), lambda member: member[:7] ** 2),
    "quotient": esl.QuotientTransport(
        esl.ExactTransport(),
        esl.symmetry.permutations({"hidden": [("layers/0/kernel", 1), ("layers/1/kernel", 0)]}),
    ),
}

VELOCITIES = {
    "affine": esl.AffineVelocity(),
    "kernel": esl.KernelVelocity(landmarks=8),
    "network": esl.NetworkVelocity(key=KEY, iterations=20),
    "kernel density": esl.KDEVelocity(),
    "histogram": esl.HistogramVelocity(),
    "transport": esl.TransportVelocity(esl.ExactTransport()),
    "path": esl.PathVelocity(),
}


@pytest.fixture(scope="module")
def problem():
    potential = esl.FlaxLoss(
        esl.potentials.mlp(64, 32, 10), esl.datasets.digits().train, batch_size=256, l2=1e-4
    )
    return potential, potential.init(members=8, key=KEY)


@pytest.fixture(scope="module")
def own(problem):
    """The imprecise products of the model itself on each platform, lowered once for all tests."""
    return {platform: careless(text) for platform, text in lowered(gradient_of_gap(problem, None))}


def gradient_of_gap(problem, transport: esl.AbstractTransport | None):
    """Trace the gradient of Σ - W2² in the learning rates of a digits run.

    Without a transport, the gradient of the final positions.
    """
    potential, start = problem

    def gap(rates):
        path = esl.simulate(
            potential, esl.Langevin(esl.Knots(rates), 1e-7), start, steps=8, snapshots=2, key=KEY
        )
        return (
            jnp.sum(path.final)
            if transport is None
            else esl.speed_limit(path, transport=transport, jackknife=0).gap
        )

    return jax.jit(jax.value_and_grad(gap)).trace(jnp.full(4, 0.1))


def lowered(traced, platforms: Sequence[str] = PLATFORMS) -> Iterator[tuple[str, str]]:
    """Lower a program for each platform, or explain in place of its text why that fails."""
    for platform in platforms:
        try:
            yield platform, traced.lower(lowering_platforms=(platform,)).as_text()
        except (NotImplementedError, ValueError) as error:
            yield platform, f"does not lower: {error}"


def careless(text: str) -> collections.Counter[str]:
    """Return the matrix products that are not at the highest precision, by their shapes."""
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    return collections.Counter(
        re.findall(r": (\(.*)", line)[-1] for line in products if "HIGHEST" not in line
    )


def faults(text: str, own: collections.Counter[str] | None = None) -> list[str]:
    """Return what forbids one lowered program, apart from the imprecise products `own`.

    The products of the model have the precision that the user chooses; those that a transport or a
    velocity adds are ours.
    """
    if text.startswith("does not lower"):
        return [text]
    added = careless(text) - (own or collections.Counter())
    messages = [f"multiplies at less than the highest precision: {shape}" for shape in added]
    words = ("callback", "infeed", "outfeed", "xf64", "tensor<f64")
    return messages + [f"has {word}" for word in words if word in text]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_gradient_of_the_gap_lowers(problem, own, name):
    for platform, text in lowered(gradient_of_gap(problem, TRANSPORTS[name])):
        assert faults(text, own[platform]) == [], platform


@pytest.mark.parametrize("name", VELOCITIES)
def test_the_gradient_of_a_gap_from_velocities_lowers(name):
    """In a potential that multiplies no matrices."""
    potential = esl.DoubleWell()

    def gap(rates):
        # Enough members for every estimator to go beyond moments.
        start = jax.random.normal(KEY, (64, 2))
        path = esl.simulate(
            potential, esl.Langevin(esl.Knots(rates), 1e-2), start, steps=8, snapshots=2, key=KEY
        )
        return esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=VELOCITIES[name],
            potential=potential,
            jackknife=0,
        ).gap

    for platform, text in lowered(jax.jit(jax.value_and_grad(gap)).trace(jnp.full(4, 0.1))):
        assert faults(text) == [], platform


def test_a_flow_is_precise_but_has_callbacks():
    # flowjax checks its parameters on the host; such a program runs on its own platform and lowers
    # for no other.
    flow = esl.density.FlowDensity(KEY, steps=2)
    traced = jax.jit(lambda x: flow.estimate(x, flow.init(x))[0].score(x[0])).trace(
        jax.random.normal(KEY, (16, 2))
    )
    text = traced.lower().as_text()
    assert faults(text) == ["has callback"]
    with pytest.raises(ValueError, match="platform"):
        traced.lower(lowering_platforms=("tpu",))


class _Rough(esl.AbstractTransport):
    """A transport that multiplies at the default precision."""

    is_metric = False

    def solve(self, x, y):
        return esl.Solution(jnp.sum(jnp.sin(x @ y.T)), jnp.array(True))


class _Talkative(esl.AbstractTransport):
    """A transport that calls the host."""

    is_metric = False

    def solve(self, x, y):
        squared = jnp.sum((x - y) ** 2)
        jax.debug.print("{}", squared)
        return esl.Solution(squared, jnp.array(True))


@pytest.mark.parametrize(
    ("transport", "fault"),
    [(_Rough(), "multiplies at less"), (_Talkative(), "callback|does not lower")],
)
def test_a_fault_is_seen(problem, own, transport, fault):
    ((platform, text),) = lowered(gradient_of_gap(problem, transport), ["tpu"])
    assert re.search(fault, faults(text, own[platform])[0])


def test_double_precision_is_seen(problem, x64):
    potential = esl.FlaxLoss(
        esl.potentials.mlp(64, 32, 10), esl.datasets.digits().train, batch_size=256, l2=1e-4
    )
    double = potential, potential.init(members=8, key=KEY).astype(jnp.float64)
    ((_, text),) = lowered(gradient_of_gap(double, esl.ExactTransport()), ["cuda"])
    assert any("f64" in fault for fault in faults(text))
