"""What a plan foretells against the compiler's own account of the program, and the refusal of what cannot fit."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from esljax import cli
from esljax.adjoint import HessianAdjoint
from esljax.comparison import Problem
from esljax.datasets import digits
from esljax.models import mlp
from esljax.potentials import FlaxLoss
from esljax.schedules import Constant, Knots
from esljax.sinkhorn import SinkhornTransport
from esljax.transport import ExactTransport, GaussianTransport, Projected, SlicedTransport

KEY = jax.random.key(0)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def problem(transport=None, hidden=32, batch=256, recompute=False, **sizes):
    data = digits()
    potential = FlaxLoss(mlp(64, hidden, 10), data.train, batch_size=batch, l2=1e-4)
    sizes = {"members": 32, "steps": 200, "snapshots": 20, **sizes}
    transport = ExactTransport() if transport is None else transport
    return Problem(potential, data.test, Constant(1e-7), transport, gradient=HessianAdjoint(checkpoint=recompute), **sizes)


def needed(problem: Problem, differentiated: bool) -> int:
    """What the compiler says."""

    def gap(rates):
        outcome = problem.run(Knots(rates), KEY)
        return outcome.report.gap, (outcome.final_loss, outcome.test_accuracy)

    program = jax.jit(jax.value_and_grad(gap, has_aux=True) if differentiated else gap)
    return program.lower(jnp.full(12, 0.1)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("differentiated", [True, slow(False)], ids=["gradient", "value"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 800, "recompute": True, "transport": GaussianTransport()},
        slow({"steps": 800}),
        slow({"snapshots": 40}),
        slow({"batch": None}),
        slow({"members": 128, "hidden": 4, "steps": 100}),
        slow({"transport": SlicedTransport(64, KEY)}),
        slow({"transport": SinkhornTransport(1.0)}),
        slow({"transport": SinkhornTransport(1.0, chunk=8)}),
        slow({"transport": Projected(ExactTransport(), jnp.eye(2410)[:, :8])}),
        *(
            slow({"members": 512, "hidden": 2, "steps": 20, "batch": 32, "transport": transport})
            for transport in (
                ExactTransport(),
                GaussianTransport(),
                SlicedTransport(64, KEY),
                SinkhornTransport(1.0),
                SinkhornTransport(1.0, chunk=16),
            )
        ),
    ],
    ids=str,
)
def test_a_plan_is_right_within_a_half(settings, differentiated):
    planned = problem(**settings).plan(differentiated=differentiated).total
    found = needed(problem(**settings), differentiated)
    # Without a gradient hardly anything of a small network is ever stored, and the plan is too careful.
    assert 1 / 1.5 < planned / found < (1.5 if differentiated else 2)


def test_devices_share_what_they_can():
    one, eight = (problem().plan(devices=devices) for devices in (1, 8))
    for name in ("state", "network", "snapshots", "adjoint"):
        assert getattr(eight, name) == getattr(one, name) // 8
    assert one.transport / 8 < eight.transport < one.transport / 5
    assert eight.data == one.data
    assert problem().plan(differentiated=False).adjoint == 0
    assert problem(recompute=True).plan().adjoint < problem().plan().adjoint / 5


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"steps": 20000}, "recompute states"),
        ({"members": 4096, "hidden": 2, "batch": 4096, "steps": 2, "snapshots": 2}, "smaller batches"),
        ({"members": 20000, "hidden": 2, "steps": 20}, "sinkhorn transport in chunks"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(settings, remedy, refused):
    refused(lambda: problem(**settings).plan().check(1e8), f"`members` must fit in 100.0 MB a device .*{remedy}.* or use more devices")


def test_bad_input_is_one_sentence(refused):
    refused(lambda: problem().plan(devices=0), "`devices` must be an integer of at least 1")
    refused(lambda: problem().plan(devices=3), "`devices` must divide the 32 members that they share, but is 3")


def test_the_command(capsys, tmp_path):
    assert cli.main(["plan", "--devices", "4", "--memory", "16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("32 members of 2410 numbers on 4 devices")
    assert re.search(r"adjoint +32\.5 MB", said)  # 200 times positions, noise and batches of 8 members
    assert cli.main(["plan", "--memory", "0.1"]) == 2
    assert "must fit in 100.0 MB a device" in capsys.readouterr().err
    assert cli.main(["plan", "--memory", "-1"]) == 2
    assert "`memory` must be greater than 0" in capsys.readouterr().err
    out = tmp_path / "out"
    assert cli.main(["optimize", "--members", "1000000", "--out", str(out), "--quiet"]) == 2
    assert "must fit in" in capsys.readouterr().err
