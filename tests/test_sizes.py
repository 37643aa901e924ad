"""Sizes that are declared are held against memory before anything is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax import _checks
from esljax._numerics import divisors

KEY = jax.random.key(0)
CLOUD = np.zeros((600, 2), np.float32)
LAW = esl.gaussian.Law([0.5, 0.5], [[0.1, 0], [0, 0.1]])
TRAP, RULE = esl.Quadratic(jnp.array([1.0, 2.0])), esl.Langevin(0.1)
EXACT, SINKHORN = esl.ExactTransport(), esl.SinkhornTransport(1.0)
PATH = esl.from_snapshots(np.stack([CLOUD, CLOUD + 1]))
EIGHT = np.ones((8, 2), np.float32)


def simulated(**more):
    given = {"steps": 10, "snapshots": 10, "key": KEY} | more
    return esl.simulate(TRAP, RULE, EIGHT, **given)


CALLS = {
    "squared": (lambda: EXACT.squared(CLOUD, CLOUD), "transport", "600 members of 2 .* 1.5 MB"),
    "map": (lambda: EXACT.map(jnp.asarray(CLOUD), jnp.asarray(CLOUD)), "transport", "chunk=..."),
    "sinkhorn": (lambda: SINKHORN.squared(CLOUD, CLOUD), "transport", "7.2 MB"),
    "sinkhorn map": (lambda: SINKHORN.map(jnp.asarray(CLOUD), CLOUD), "transport", "7.2 MB"),
    "speed limit": (lambda: esl.speed_limit(PATH, transport=EXACT), "transport", "1.5 MB"),
    "projected": (
        lambda: esl.speed_limit(PATH, transport=esl.ProjectedTransport(EXACT, np.eye(2))),
        "transport",
        "Projected",
    ),
    "in jit": (
        lambda: jax.jit(lambda x: esl.speed_limit(x, transport=EXACT).gap)(PATH),
        "transport",
        "1.5 MB",
    ),
    "directions": (
        lambda: esl.SlicedTransport(10**9, KEY).squared(EIGHT, EIGHT),
        "transport",
        "Sliced",
    ),
    "snapshots": (lambda: simulated(steps=10**4, snapshots=10**4), "snapshots", "1.3 MB"),
    "steps": (lambda: simulated(steps=10**12), "steps", "1,000,000,000,000 steps"),
    "rates": (lambda: esl.Cosine(0.1).rates(10**12), "steps", "16,000.0 GB"),
    "knots": (
        lambda: esl.gaussian.optimal_learning_rate(
            LAW, TRAP, temperature=0.1, learning_time=1.0, steps=1, knots=10**12
        ),
        "knots",
        "16,000.0 GB",
    ),
    "panels": (
        lambda: esl.gaussian.speed_limit(LAW, TRAP, RULE, steps=10, panels=10**12),
        "panels",
        "GB",
    ),
    "sizes": (
        lambda: esl.models.mlp(64, 10**9, 10)(None),
        "sizes",
        "75,000,000,010 parameters of layers of 64, 1000000000, 10 need about 300.0 GB",
    ),
    "samples": (lambda: esl.datasets.teacher(10**10), "samples", "4,960.0 GB"),
    "features": (lambda: esl.datasets.teacher(100, features=10**10, hidden=1), "samples", "GB"),
    "moons": (lambda: esl.datasets.two_moons(10**11), "samples", "3,200.0 GB"),
    "coordinates": (lambda: esl.random_directions(10**6, 10**5, KEY), "coordinates", "1,200.0 GB"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_refused_with_its_bytes(name, refused, monkeypatch):
    monkeypatch.setattr(_checks, "memory_of_the_machine", lambda: 1e6)
    call, argument, words = CALLS[name]
    refused(call, f"Argument `{argument}` must fit in the 1.0 MB of memory of this .*{words}")


def test_members_are_refused_before_they_are_drawn(refused, monkeypatch):
    network = esl.FlaxLoss(esl.models.mlp(2, 4, 2), esl.datasets.two_moons().train)
    monkeypatch.setattr(_checks, "memory_of_the_machine", lambda: 1e6)
    refused(
        lambda: network.init(members=10**12, key=KEY),
        "`members` must fit in the 1.0 MB .* 1,000,000,000,000 members of 22 numbers need about",
    )


def test_snapshots_of_very_many_steps_are_counted_at_once(refused):
    """By the divisors up to the root of the steps: all numbers below took minutes."""
    refused(
        lambda: esl.plan_memory(TRAP, EIGHT, steps=2 * (10**12 + 39), snapshots=10),
        r"`snapshots` must divide the 2000000000078 steps \(such as 2 or 1000000000039\)",
    )


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97])
def test_divisors(number):
    assert divisors(number) == [i for i in range(1, number + 1) if number % i == 0]


def test_a_container_grants_less_than_the_machine_has(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "unlimited").write_text("max\n")
    places = (str(tmp_path / name) for name in ("unlimited", "memory.max", "absent"))
    monkeypatch.setattr(_checks, "_GRANTED", tuple(places))
    assert _checks.memory_of_the_machine() == 1e6
