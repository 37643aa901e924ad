"""Memory plans against the compiler's own account of the program; runs that cannot fit."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import esljax as esl
from esljax.command import cli
from esljax.experiment import Problem
from esljax.potentials.datasets import digits

KEY = jax.random.key(0)
AXES = [("layers/0/kernel", 1), ("layers/0/bias", 0), ("layers/1/kernel", 0)]
QUOTIENT = esl.QuotientTransport(
    esl.ExactTransport(),
    esl.symmetry.permutations(
        {"hidden": AXES},
        keys={
            "layers/0/bias": (32,),
            "layers/0/kernel": (64, 32),
            "layers/1/bias": (10,),
            "layers/1/kernel": (32, 10),
        },
    ),
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def test_a_driven_potential_is_planned():
    driven = esl.Driven(lambda center: esl.Quadratic(1.0, center), esl.Linear(0.0, 2.0))
    assert (
        esl.plan_memory(driven, jnp.zeros((64, 10)), steps=100).total
        == esl.plan_memory(esl.Quadratic(1.0), jnp.zeros((64, 10)), steps=100).total
    )


def problem(transport=None, hidden=32, batch=256, recompute=False, gradient=None, **sizes):
    data = digits()
    potential = esl.FlaxLoss(
        esl.potentials.mlp(64, hidden, 10), data.train, batch_size=batch, l2=1e-4
    )
    sizes = {"members": 32, "steps": 200, "snapshots": 20, **sizes}
    transport = esl.ExactTransport() if transport is None else transport
    return Problem(
        potential,
        test=data.test,
        temperature=1e-7,
        transport=transport,
        gradient=gradient or esl.HessianAdjoint(recompute=recompute),
        **sizes,
    )


def needed(problem: Problem, differentiated: bool) -> int:
    """The temporary bytes of the compiled program."""

    def gap(rates):
        outcome = problem.run(esl.Knots(rates), KEY)
        return outcome.report.gap, (outcome.final_loss, outcome.test_accuracy)

    program = jax.jit(jax.value_and_grad(gap, has_aux=True) if differentiated else gap)
    return program.lower(jnp.full(12, 0.1)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("differentiated", [True, slow(False)], ids=["gradient", "value"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 800, "recompute": True, "transport": esl.GaussianTransport()},
        slow({"steps": 800}),
        slow({"snapshots": 40}),
        slow({"batch": None}),
        slow({"members": 128, "hidden": 4, "steps": 100}),
        slow({"transport": esl.SlicedTransport(64, KEY)}),
        slow({"transport": esl.SinkhornTransport(1.0)}),
        slow({"transport": esl.SinkhornTransport(1.0, chunk=8)}),
        slow({"transport": esl.ProjectedTransport(esl.ExactTransport(), jnp.eye(2410)[:, :8])}),
        slow({"transport": QUOTIENT}),
        *(
            slow({"members": 512, "hidden": 2, "steps": 20, "batch": 32, "transport": transport})
            for transport in (
                esl.ExactTransport(),
                esl.GaussianTransport(),
                esl.SlicedTransport(64, KEY),
                esl.SinkhornTransport(1.0),
                esl.SinkhornTransport(1.0, chunk=16),
            )
        ),
    ],
    ids=str,
)
def test_a_plan_is_right_within_a_half(settings, differentiated):
    planned = problem(**settings).plan_memory(differentiated=differentiated).total
    measured = needed(problem(**settings), differentiated)
    # Without a gradient hardly anything of a small network is ever stored, and the plan is too
    # careful.
    assert 1 / 1.5 < planned / measured < (1.5 if differentiated else 2)


@pytest.mark.parametrize(
    ("transport", "members", "coordinates"),
    [
        (esl.ExactTransport(), 2048, 10),
        (esl.ExactTransport(), 20_000, 1),
        (esl.SlicedTransport(100, KEY), 2048, 10),
        slow(esl.SinkhornTransport(1.0, chunk=256), 10_000, 10),
        slow(esl.HierarchicalTransport(KEY), 10_000, 10),
        slow(
            esl.QuotientTransport(
                esl.ExactTransport(),
                esl.symmetry.permutations({"units": [("w", 0)]}, keys={"w": (5, 2)}),
            ),
            1024,
            10,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("differentiated", [True, slow(False)], ids=["gradient", "value"])
def test_a_plan_of_many_members_in_few_coordinates_is_right_within_a_half(
    transport, members, coordinates, differentiated
):
    """Where costs, orders and projections outweigh the members themselves."""
    start, potential = jax.ShapeDtypeStruct((members, coordinates), jnp.float32), esl.Quadratic(1.0)

    def gap(rates, start):
        path = esl.simulate(
            potential, esl.Langevin(esl.Knots(rates), 0.01), start, steps=20, snapshots=10, key=KEY
        )
        return esl.speed_limit(path, transport=transport, jackknife=0).gap

    program = jax.jit(jax.value_and_grad(gap) if differentiated else gap)
    compiled = program.lower(jnp.full(3, 0.1), start).compile()
    measured = compiled.memory_analysis().temp_size_in_bytes
    planned = esl.plan_memory(
        potential, start, steps=20, snapshots=10, transport=transport, differentiated=differentiated
    ).total
    assert 1 / 1.5 < planned / measured < 1.5


def test_a_loop_over_layers_counts_every_layer():
    def energy(layers):
        return lambda member: jnp.sum(
            jax.lax.scan(lambda x, _: (jnp.sin(x), None), member, None, length=layers)[0]
        )

    few, many = (
        esl.plan_memory(esl.FromFunction(energy(layers)), jnp.zeros((16, 50)), steps=20).network
        for layers in (10, 1000)
    )
    assert 50 < many / few < 150


def test_ways_of_differentiating_differ():
    """jax keeps what the network computed at every step, forward mode nothing of any."""
    planned = {
        name: problem(gradient=way).plan_memory().adjoint
        for name, way in (
            ("h", esl.HessianAdjoint()),
            ("a", esl.Autodiff()),
            ("f", esl.ForwardMode()),
        )
    }
    assert planned["a"] > 5 * planned["h"] > 0 == planned["f"]


def test_devices_share_what_they_can():
    one, eight = (problem().plan_memory(devices=devices) for devices in (1, 8))
    for name in ("state", "network", "snapshots", "adjoint"):
        assert getattr(eight, name) == getattr(one, name) // 8
    assert one.transport / 8 < eight.transport < one.transport / 5
    assert eight.data == one.data
    assert problem().plan_memory(differentiated=False).adjoint == 0
    assert problem(recompute=True).plan_memory().adjoint < problem().plan_memory().adjoint / 5


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"steps": 20000}, "recompute states"),
        (
            {"members": 4096, "hidden": 2, "batch": 4096, "steps": 2, "snapshots": 2},
            "smaller batches",
        ),
        ({"members": 20000, "hidden": 2, "steps": 20}, "sinkhorn transport in chunks"),
    ],
)
def test_a_run_that_does_not_fit_is_rejected_with_a_remedy(settings, remedy, refused):
    refused(
        lambda: problem(**settings).plan_memory().check(1e8),
        f"`members` must fit in 100.0 MB a device .*{remedy}.* or use more devices",
    )


def test_bad_input_is_one_sentence(refused):
    refused(lambda: problem().plan_memory(devices=0), "`devices` must be an integer of at least 1")
    ensemble = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    for change, sentence in (
        ({"snapshots": 30}, r"`snapshots` must divide the 100 steps"),
        ({"transport": "exact"}, "`transport` must be a transport"),
        ({"observe": lambda member: member[0]}, "`observe` must return shape"),
        ({"positions": [1.0, 2.0]}, r"`positions` must have shape \(n, d\)"),
        (
            {"potential": esl.Quadratic(jnp.ones(4))},
            "`potential` must accept members of 3 coordinates",
        ),
    ):
        settings = {"potential": esl.Quadratic(1.0), "positions": ensemble, "steps": 100, **change}
        refused(
            lambda settings=settings: esl.plan_memory(
                settings.pop("potential"), settings.pop("positions"), **settings
            ),
            sentence,
        )
    refused(
        lambda: problem().plan_memory(devices=3),
        "`devices` must divide the 32 members that they share, but is 3",
    )


def test_the_command(capsys, tmp_path):
    assert cli.main(["plan", "--devices", "4", "--memory", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("32 members of 2410 numbers on 4 devices")
    assert re.search(
        r"adjoint +32\.5 MB", printed
    )  # 200 times positions, noise and batches of 8 members
    assert cli.main(["plan", "--memory", "0.1"]) == 2
    assert "must fit in 100.0 MB a device" in capsys.readouterr().err
    assert cli.main(["plan", "--memory", "-1"]) == 2
    assert "`memory` must be greater than 0" in capsys.readouterr().err
    out = tmp_path / "out"
    assert cli.main(["optimize", "--members", "1000000", "--out", str(out), "--quiet"]) == 2
    assert "must fit in" in capsys.readouterr().err
