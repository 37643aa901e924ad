"""Compile the gradient of the gap for TPU slices without one: memory of a chip and collectives.

    pip install '.[tpu-compile]'
    python scripts/compile_tpu.py [--members 256] [--topologies v5e:2x2 v5e:16x16]
        [--points 100000] [--smoke] [--out FILE.json]

The chips of the slice share the members of the digits run of `esljax optimize`, in every transport.
One distance between very large ensembles in ten dimensions, with its gradient, is compiled for one
chip. Nothing runs: the compiler of the TPU reports on its programs. Install it into an environment
of its own, because jax looks for a TPU at every start once it is installed.
"""

import collections
import os
import re
import time
from collections.abc import Sequence
from typing import Any

# Before jax is imported: compile as for a slice, look for none.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import esljax as esl

TRANSPORTS = {
    "exact": esl.ExactTransport(),
    "gaussian": esl.GaussianTransport(),
    "sliced": esl.SlicedTransport(64, jax.random.key(0)),
    "sinkhorn": esl.SinkhornTransport(1.0),
}
_COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def compiled(topology: str, members: int, steps: int, transport: Any) -> dict[str, Any]:
    """Describe value and gradient of Σ - W2² on one slice, or the run alone without a transport."""
    devices = get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.asarray(devices), ("members",), axis_types=(AxisType.Auto,))
    potential = esl.FlaxLoss(
        esl.models.mlp(64, 32, 10), esl.datasets.digits().train, batch_size=256, l2=1e-4
    )
    numbers = jax.eval_shape(
        lambda key: potential.init(members=2, key=key), jax.random.key(0)
    ).shape[1]

    def gap(rates, start, seed):
        rule = esl.Langevin(esl.Knots(rates), 1e-7)
        path = esl.simulate(
            potential, rule, start, steps=steps, snapshots=20, key=jax.random.key(seed), mesh=mesh
        )
        if transport is None:
            return jnp.mean(potential(path.final))
        return esl.speed_limit(path, transport=transport, jackknife=0).gap

    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = (
        jax.ShapeDtypeStruct((12,), jnp.float32, sharding=everywhere),
        jax.ShapeDtypeStruct(
            (members, numbers), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("members"))
        ),
        jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere),
    )
    return described(jax.value_and_grad(gap), arguments, topology, len(devices))


def compiled_transport(topology: str, points: int, chunk: int) -> dict[str, Any]:
    """Describe the Sinkhorn divergence of ensembles (points, 10), and its gradient, on one chip."""
    chip = get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    ensemble = jax.ShapeDtypeStruct((points, 10), jnp.float32, sharding=SingleDeviceSharding(chip))
    transport = esl.SinkhornTransport(2.0, chunk=chunk)
    return described(
        jax.value_and_grad(lambda x, y: transport.solve(x, y).squared, (0, 1)),
        (ensemble, ensemble),
        topology,
        1,
    )


def described(function: Any, arguments: tuple, topology: str, chips: int) -> dict[str, Any]:
    started = time.perf_counter()
    program = jax.jit(function).trace(*arguments).lower().compile()
    memory = program.memory_analysis()
    return {
        "topology": topology,
        "chips": chips,
        "megabytes": (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        )
        / 1e6,
        "collectives": dict(collections.Counter(re.findall(_COLLECTIVES, program.as_text()))),
        "seconds": time.perf_counter() - started,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5e:16x16"])
    parser.add_argument(
        "--points",
        type=int,
        nargs="*",
        default=[100_000],
        help="members of the very large ensembles",
    )
    parser.add_argument(
        "--chunk", type=int, default=1024, help="members whose distances are held at a time"
    )
    arguments = parser.parse_args(argv)
    topologies, transports = arguments.topologies, {"run alone": None, **TRANSPORTS}
    if arguments.smoke:
        topologies, transports = topologies[:1], {"run alone": None, "sliced": TRANSPORTS["sliced"]}
    table = []
    print(
        "| slice | chips | program | MB a chip | collectives | compiled in |\n"
        "|---|---|---|---|---|---|"
    )

    def show(name: str, row: dict[str, Any]) -> None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
        print(
            f"| {row['topology']} | {row['chips']} | {name} | {row['megabytes']:.1f} "
            f"| {kinds or 'none'} | {row['seconds']:.0f} s |",
            flush=True,
        )
        table.append({"program": name, **row})

    for topology in topologies:
        for name, transport in transports.items():
            show(
                name,
                compiled(
                    topology,
                    arguments.members,
                    20 if arguments.smoke else arguments.steps,
                    transport,
                ),
            )
    for points in [256] if arguments.smoke else arguments.points:
        chunk = min(arguments.chunk, points // 4)
        show(
            f"sinkhorn of {points} members in blocks of {chunk}",
            compiled_transport(topologies[0], points, chunk),
        )
    timing.write(arguments.out, {"table": table})
    return table


if __name__ == "__main__":
    main()
