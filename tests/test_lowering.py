"""The gradient of the whole gap, lowered for TPU and GPU without either: no callback, no float64, full precision in every transport."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from esljax.datasets import digits
from esljax.dynamics import Langevin
from esljax.models import mlp
from esljax.potentials import FlaxLoss
from esljax.schedules import Knots
from esljax.simulation import simulate
from esljax.sinkhorn import SinkhornTransport
from esljax.speed_limit import speed_limit
from esljax.transport import AbstractTransport, ExactTransport, GaussianTransport, Mapped, Projected, SlicedTransport, Solution

KEY = jax.random.key(0)

# Every transport claims TPU support; a new one joins by one row.
TRANSPORTS = {
    "exact": ExactTransport(),
    "gaussian": GaussianTransport(),
    "sliced": SlicedTransport(16, KEY),
    "sinkhorn": SinkhornTransport(1.0),
    "sinkhorn in blocks": SinkhornTransport(1.0, chunk=4),
    "projected": Projected(GaussianTransport(), jnp.eye(2410)[:, :5]),
    "mapped": Mapped(ExactTransport(), lambda member: member[:7] ** 2),
}


@pytest.fixture(scope="module")
def problem():
    potential = FlaxLoss(mlp(64, 32, 10), digits().train, batch_size=256, l2=1e-4)
    return potential, potential.init(members=8, key=KEY)


def lowered(problem, transport: AbstractTransport | None, platform: str) -> str:
    """The program of the gradient of Σ - W2² in the learning rates of a digits run; without a transport, of its final positions."""
    potential, start = problem

    def gap(rates):
        path = simulate(potential, Langevin(Knots(rates), 1e-7), start, steps=8, snapshots=2, key=KEY)
        return jnp.sum(path.final) if transport is None else speed_limit(path, transport=transport, jackknife=0).gap

    return jax.jit(jax.value_and_grad(gap)).trace(jnp.full(4, 0.1)).lower(lowering_platforms=(platform,)).as_text()


def careless(text: str) -> collections.Counter[str]:
    """The matrix products that are not at the highest precision, by the shapes that they multiply."""
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    return collections.Counter(re.findall(r": (\(.*)", line)[-1] for line in products if "HIGHEST" not in line)


def faults(problem, transport: AbstractTransport, platform: str) -> list[str]:
    try:
        text = lowered(problem, transport, platform)
    except (NotImplementedError, ValueError) as error:
        return [f"does not lower: {error}"]
    # What the model multiplies is the user's choice of precision; only what a transport adds to it is ours.
    added = careless(text) - careless(lowered(problem, None, platform))
    found = [f"multiplies at less than the highest precision: {shape}" for shape in added]
    found += [f"has {word}" for word in ("callback", "infeed", "outfeed", "xf64", "tensor<f64") if word in text]
    return found


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_gradient_of_the_gap_lowers(problem, name, platform):
    assert faults(problem, TRANSPORTS[name], platform) == []


class _Rough(AbstractTransport):
    """A transport that multiplies at the default precision."""

    is_metric = False

    def solve(self, x, y):
        return Solution(jnp.sum(jnp.sin(x @ y.T)), jnp.array(True))


class _Talkative(AbstractTransport):
    """A transport that calls the host."""

    is_metric = False

    def solve(self, x, y):
        squared = jnp.sum((x - y) ** 2)
        jax.debug.print("{}", squared)
        return Solution(squared, jnp.array(True))


@pytest.mark.parametrize(("transport", "fault"), [(_Rough(), "multiplies at less"), (_Talkative(), "callback|does not lower")])
def test_a_fault_is_seen(problem, transport, fault):
    (first, *_) = faults(problem, transport, "tpu")
    assert re.search(fault, first)


def test_double_precision_is_seen(problem, x64):
    potential = FlaxLoss(mlp(64, 32, 10), digits().train, batch_size=256, l2=1e-4)
    double = potential, potential.init(members=8, key=KEY).astype(jnp.float64)
    assert any("f64" in fault for fault in faults(double, ExactTransport(), "cuda"))
