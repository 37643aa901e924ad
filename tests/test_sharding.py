"""Members on many devices and in several processes: the same numbers, and no more talk between
devices than the design allows."""

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import PATIENCE

import esljax as esl
from esljax.sharding import choose_mesh, map_pairs, shard_members

PROGRAM = Path(__file__).with_name("sharded_program.py")
# float32 sums in another order: a few units in the last place.
ROUNDING = 1e-6


@pytest.fixture(scope="module", params=["quick", pytest.param("optimized", marks=pytest.mark.slow)])
def compiled(request, environment) -> dict[str, str]:
    """How the processes compile."""
    return (
        environment
        if request.param == "quick"
        else {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    )


@pytest.fixture(scope="module")
def devices(tmp_path_factory, compiled) -> dict[str, np.ndarray]:
    """One process with eight fake devices."""
    out = tmp_path_factory.mktemp("devices") / "found.npz"
    subprocess.run(
        [sys.executable, PROGRAM, out, "1,8", "8"], env=compiled, check=True, timeout=PATIENCE
    )
    return dict(np.load(out))


@pytest.fixture(scope="module")
def processes(tmp_path_factory, compiled) -> dict[str, np.ndarray]:
    """Two processes that find each other over loopback, with one device each."""
    out = tmp_path_factory.mktemp("processes") / "found.npz"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, PROGRAM, out, "2", "1", address, "2"]
    started = [subprocess.Popen([*command, str(index)], env=compiled) for index in range(2)]
    try:
        assert [process.wait(timeout=PATIENCE) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return {**np.load(out), "checkpoints": out.parent / "checkpoints"}


def compared(
    found: dict[str, np.ndarray], other: dict[str, np.ndarray], size: int, kind: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    names = [name for name in found if name.startswith("1 ") and kind in name]
    pairs = [
        (found[name], other[f"{size} {name[2:]}"])
        for name in names
        if f"{size} {name[2:]}" in other
    ]
    assert pairs
    return pairs


def rounding(kind: str) -> float:
    """Relative differences that are none; a jackknife of four multiplies them by four."""
    return {"positions": 0, "debiased": 4 * ROUNDING}.get(kind, ROUNDING)


@pytest.mark.parametrize(
    "kind",
    ["positions", "energies", "report", "velocity", "debiased", "exact", "gradient", "optimum"],
)
def test_eight_devices_give_the_numbers_of_one(devices, kind):
    for one, eight in compared(devices, devices, 8, kind):
        np.testing.assert_allclose(eight, one, rtol=0, atol=rounding(kind) * np.abs(one).max())


@pytest.mark.parametrize(
    "kind",
    ["positions", "energies", "report", "velocity", "debiased", "exact", "gradient", "optimum"],
)
def test_two_processes_give_the_numbers_of_one(devices, processes, kind):
    for one, two in compared(devices, processes, 2, kind):
        np.testing.assert_allclose(two, one, rtol=0, atol=rounding(kind) * np.abs(one).max())


def test_one_process_resumes_a_run_saved_by_two(devices, processes):
    np.testing.assert_array_equal(processes["2 saved"], devices["1 positions trap"])
    folder = processes["checkpoints"]
    shutil.rmtree(folder / "10")
    # As `simulate` of the program has it.
    key = jax.random.key(0)
    trap, rule = (
        esl.Quadratic(jnp.linspace(1.0, 3.0, 5)),
        esl.Langevin(esl.Knots(jnp.array([0.1, 0.2, 0.3])), 0.01),
    )
    start = np.asarray(jax.random.normal(key, (16, 5)))
    path = esl.simulate(
        trap,
        rule,
        start,
        steps=20,
        snapshots=10,
        key=key,
        checkpoints=esl.Checkpoints(folder, resume=True),
    )
    np.testing.assert_allclose(path.positions, processes["2 saved"], rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(
        path.positions[:-1], processes["2 saved"][:-1]
    )  # read, not run again


def test_a_run_and_its_gradient_hardly_talk(devices):
    assert list(devices["collectives of a run"]) == []
    (one,) = devices["collectives of a gradient"]
    assert one.startswith("all-reduce")


def test_no_device_gathers_the_history(devices):
    """Between devices the history (11, 16, 2410) travels in eighths, all-to-all; what is gathered
    or summed is no larger than one snapshot, or the means of the members at all of them."""
    largest = {}
    for line in devices["collectives of distances"]:
        name, result = line.split(" ", 1)
        sizes = [
            np.prod([int(x) for x in shape.split(",") if x])
            for shape in re.findall(r"f32\[([\d,]*)\]", result)
        ]
        largest[name] = max([largest.get(name, 0), *sizes])
    assert largest.pop("all-to-all") <= 11 * 16 * 2410 / 8
    assert max(largest.values()) <= 16 * 2410


def test_iterations_of_a_whole_report_wait_for_no_other_device(devices):
    """Also those at the doubled ε that a diagnosis asks for; each sweep of those was gathered block
    by block."""
    assert 5 < len(devices["collectives of a sinkhorn report"]) < 20


def test_a_mesh_beside_that_of_set_mesh_is_refused(devices):
    """jax would say it in the terms of its compiler."""
    sentence = (
        "Argument `mesh` must be that of jax.set_mesh, with auto axes as member_mesh() has them: "
        "set is {'members': 8} with "
    )
    automatic, explicit = devices["refusals"]
    assert automatic == sentence + "auto axes, but is {'members': 4} with auto axes."
    assert explicit == sentence + "explicit axes, but is {'members': 4} with auto axes."


def on_one_device() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (6, 2))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: esl.member_mesh(0), "`devices` must be between 1 and 1"),
        (lambda: esl.member_mesh(2), "`devices` must be between 1 and 1"),
        (
            lambda: esl.member_mesh(2.0),
            "`devices` must be a number of devices, or devices themselves, but is 2.0",
        ),
        (
            lambda: esl.member_mesh("cpu"),
            "`devices` must be a number of devices, or devices themselves, but is .cpu.",
        ),
        (lambda: esl.member_mesh([]), "`devices` must name at least one device"),
        (
            lambda: esl.member_mesh(jax.devices() * 2),
            "`devices` must name at least one device, each once",
        ),
        (lambda: choose_mesh("cpu", on_one_device()), "`mesh` must be a jax.sharding.Mesh"),
        (
            lambda: esl.optimize(
                lambda x, key: x**2, 1.0, key=jax.random.key(0), iterations=1, mesh=2
            ),
            "`mesh` must be a jax.sharding.Mesh",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, refused):
    refused(call, sentence)


def test_members_that_cannot_be_shared_evenly_are_refused(refused, monkeypatch):
    mesh = esl.member_mesh()
    monkeypatch.setattr(type(mesh), "size", property(lambda self: 4), raising=False)
    refused(
        lambda: choose_mesh(mesh, on_one_device()),
        r"hold a multiple of 4 members, to be shared by as many devices \(or be given "
        r"mesh=member_mesh\(3\)\)",
    )


def test_one_device_needs_no_mesh_and_an_explicit_one_becomes_automatic():
    assert choose_mesh(None, on_one_device()) is None
    assert choose_mesh(None, np.zeros((6, 2))) is None
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
    assert choose_mesh(mesh, on_one_device()).axis_types == (AxisType.Auto,)


def test_a_mesh_of_one_changes_nothing():
    start = on_one_device()

    def run(mesh):
        return esl.simulate(
            esl.Quadratic(1.0),
            esl.Langevin(0.1, 0.1),
            start,
            steps=4,
            snapshots=2,
            key=jax.random.key(1),
            mesh=mesh,
        )

    plain, meshed = run(None), run(esl.member_mesh(1))
    np.testing.assert_array_equal(plain.positions, meshed.positions)
    assert plain.mesh is None
    assert "on 1 devices" not in str(plain)
    assert isinstance(meshed.positions.sharding, NamedSharding)


@pytest.mark.parametrize("at_once", [1, 12, 100])
@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("meshed", [True, False])
def test_pairs_are_mapped_in_order(at_once, in_turn, meshed, monkeypatch):
    """On a mesh and off it, together, one by one, and two by two (the last of them with one that is
    solved already)."""
    monkeypatch.setattr(esl.sharding, "AT_ONCE", at_once)
    snapshots = jnp.arange(24.0).reshape(4, 3, 2)

    def function(scale, x, y):
        return scale * jnp.sum(x - 2 * y)

    def mapped(scale):
        return map_pairs(
            function,
            scale,
            snapshots,
            [0, 2, 1],
            [3, 1, 1],
            esl.member_mesh(1) if meshed else None,
            in_turn=in_turn,
        )

    expected = [np.sum(snapshots[i] - 2 * snapshots[j]) for i, j in ((0, 3), (2, 1), (1, 1))]
    np.testing.assert_allclose(mapped(jnp.array(3.0)), 3 * np.array(expected))
    np.testing.assert_allclose(jax.grad(lambda scale: jnp.sum(mapped(scale)))(3.0), sum(expected))


def test_how_many_pairs_are_solved_at_once():
    together = functools.partial(esl.sharding.side_by_side, in_turn=False, platform="gpu")
    assert together(31, 32, 2410) == 31
    assert together(31, 100_000, 10) == 1
    assert together(31, 2048, 2048) == 16
    assert together(4, 10**6, 10) == 1
    assert esl.sharding.side_by_side(31, 8, 2, in_turn=True, platform="cpu") == 1
    assert esl.sharding.side_by_side(31, 8, 2, in_turn=True, platform="tpu") == 31


def test_pairs_that_wait_leave_little_to_the_reverse_sweep(monkeypatch):
    """The memory of a gradient grows with the pairs by their ends, and by little that a problem
    went through."""
    x = jax.ShapeDtypeStruct((21, 64, 50), jnp.float32)
    first = np.arange(20)

    def needed(transport, at_once):
        monkeypatch.setattr(esl.sharding, "AT_ONCE", at_once)

        def squared(x):
            return jnp.sum(
                map_pairs(
                    lambda transport, *pair: transport.solve(*pair).squared,
                    transport,
                    x,
                    first,
                    first + 1,
                    None,
                )
            )

        return jax.jit(jax.grad(squared)).lower(
            x
        ).compile().memory_analysis().temp_size_in_bytes / (20 * 64 * 50 * 4)

    for transport in (
        esl.SinkhornTransport(1.0, chunk=8),
        esl.SinkhornTransport(1.0),
        esl.ExactTransport(),
    ):
        assert needed(transport, 1) < 6.5 < needed(transport, 2**26)


def test_a_cpu_factorizes_no_stacks():
    """Two stacks of factorizations side by side may wait for each other forever, on a machine of
    two cores and jaxlib 0.10."""
    positions = jax.random.normal(jax.random.key(0), (5, 50, 3))

    def squared(positions, in_turn):
        def solve(transport, x, y):
            return transport.solve(x, y).squared

        return jnp.sum(
            map_pairs(
                solve,
                esl.GaussianTransport(),
                positions,
                [0, 1, 2, 3],
                [1, 2, 3, 4],
                None,
                in_turn=in_turn,
            )
        )

    def ranks(in_turn):
        text = (
            jax.jit(jax.grad(functools.partial(squared, in_turn=in_turn)))
            .lower(positions)
            .compile()
            .as_text()
        )
        results = re.findall(r"= \(?f32\[([\d,]*)\].*lapack_s(?:geqrf|orgqr|gesdd)", text)
        assert len(results) >= 3
        return {result.count(",") + 1 for result in results}

    assert ranks(esl.GaussianTransport().in_turn) == {2}
    assert ranks(False) == {3}


def test_sharding_of_an_axis_within_and_outside_of_jit():
    mesh, x = esl.member_mesh(1), jnp.zeros((2, 3))
    for placed in (
        shard_members(x, mesh, axis=1),
        jax.jit(lambda x: shard_members(x, mesh, axis=1))(x),
    ):
        assert placed.sharding.is_equivalent_to(
            NamedSharding(mesh, PartitionSpec(None, "members")), 2
        )


WITHIN = """
import jax
import jax.numpy as jnp
import numpy as np
import esljax as esl

jax.config.update("jax_num_cpu_devices", 2)
start, key, rule = jnp.ones((3, 2)), jax.random.key(0), esl.Langevin(0.1, 0.2)


def final(key, mesh=None):
    return esl.simulate(
        esl.Quadratic(1.0), rule, start, steps=4, snapshots=2, key=key, mesh=mesh
    ).final


keys = jax.random.split(key, 2)
across = jax.sharding.PartitionSpec("members")
mesh = esl.member_mesh(2)
replicas = jax.shard_map(
    lambda keys: final(keys[0])[None], mesh=mesh, in_specs=across, out_specs=across, check_vma=False
)(keys)
alone = [final(one, esl.member_mesh(1)) for one in keys]
np.testing.assert_allclose(replicas, alone, rtol=1e-6)
"""


def test_replicas_within_a_shard_map_stay_on_their_devices(environment):
    """Three members, which two devices could not share, from an array that lies outside."""
    done = subprocess.run(
        [sys.executable, "-c", WITHIN], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
