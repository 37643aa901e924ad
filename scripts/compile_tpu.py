"""Compile the gradient of the whole gap for real TPU slices, on a machine without one: memory of each chip, and what chips tell each other.

    pip install '.[tpu-compile]'
    python scripts/compile_tpu.py [--members 256] [--topologies v5e:2x2 v5e:16x16] [--points 100000] [--smoke] [--out FILE.json]

The digits run of `esljax optimize`, its members shared by the chips of the slice, in every transport; and one distance between very large
ensembles in ten dimensions, with its gradient, on one chip. Nothing is run: this is what the compiler of the TPU makes of the programs and
says of them. Install it into an environment of its own: beside it jax looks for a TPU whenever it starts.
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
    """What the compiler says of value and gradient of Σ - W2² on one slice; `transport` None for the run alone."""
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
    """What the compiler says of the Sinkhorn divergence of two ensembles (points, 10), and its gradient, on one chip of a slice."""
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
        "--chunk", type=int, default=1024, help="those whose distances are held at a time"
    )
    asked = parser.parse_args(argv)
    topologies, transports = asked.topologies, {"run alone": None, **TRANSPORTS}
    if asked.smoke:
        topologies, transports = topologies[:1], {"run alone": None, "sliced": TRANSPORTS["sliced"]}
    found = []
    print(
        "| slice | chips | program | MB a chip | collectives | compiled in |\n|---|---|---|---|---|---|"
    )

    def show(name: str, row: dict[str, Any]) -> None:
        said = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "none"
        print(
            f"| {row['topology']} | {row['chips']} | {name} | {row['megabytes']:.1f} | {said} | {row['seconds']:.0f} s |",
            flush=True,
        )
        found.append({"program": name, **row})

    for topology in topologies:
        for name, transport in transports.items():
            show(
                name,
                compiled(topology, asked.members, 20 if asked.smoke else asked.steps, transport),
            )
    for points in [256] if asked.smoke else asked.points:
        chunk = min(asked.chunk, points // 4)
        show(
            f"sinkhorn of {points} members in blocks of {chunk}",
            compiled_transport(topologies[0], points, chunk),
        )
    timing.write(asked.out, {"table": found})
    return found


if __name__ == "__main__":
    main()
