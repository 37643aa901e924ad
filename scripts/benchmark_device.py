"""Benchmark a device: member-steps a second, gradients and distances against the members.

    python scripts/benchmark_device.py [--members 32 128 512 2048] [--points 128 512 2048]
        [--smoke] [--out FILE.json]

The digits MLP (d = 2410, minibatches of 256, 100 steps, 10 links) and two Gaussian clouds in 10
dimensions. The floor is the bare scan of `benchmark_simulation.py`. The table holds the memory that
the compiler counts and the memory that `esl.plan_memory` predicts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing
from benchmark_simulation import bare_scan

import esljax as esl

LINKS = 10


def run(members: int, steps: int, rounds: int) -> dict[str, float]:
    """Time a run, as a share of the bare scan too, and the gradient of its gap.

    The run is also timed with the network in bfloat16.
    """
    data, key = esl.datasets.digits(), jax.random.key(1)
    networks = {
        dtype: esl.FlaxLoss(
            esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4, dtype=dtype
        )
        for dtype in (None, "bfloat16")
    }
    start = networks[None].init(members=members, key=jax.random.key(0))
    rates = jnp.full(steps, 0.05)

    def simulate(potential: Any, rates: jax.Array) -> Any:
        return esl.simulate(
            potential,
            esl.Langevin(esl.Knots(rates), 1e-7),
            start,
            steps=steps,
            snapshots=LINKS,
            key=key,
        )

    bare = bare_scan(networks[None], 1e-7, steps, LINKS)
    ours, rounded = (
        jax.jit(lambda rates, potential=potential: simulate(potential, rates))
        for potential in networks.values()
    )
    measured = timing.medians(
        {
            "ours": lambda: ours(rates),
            "bfloat16": lambda: rounded(rates),
            "bare": lambda: bare(start, rates, key),
        },
        rounds,
    )

    transport = esl.GaussianTransport()

    def gap(rates):
        return esl.speed_limit(
            simulate(networks[None], rates), transport=transport, jackknife=0
        ).gap

    compiled = jax.jit(jax.value_and_grad(gap)).lower(rates).compile()
    planned = esl.plan_memory(
        networks[None], start, steps=steps, snapshots=LINKS, transport=transport
    )
    work = members * steps
    return {
        "member_steps_per_second": work / measured["ours"],
        "share_of_bare_scan": measured["bare"] / measured["ours"],
        "bfloat16_member_steps_per_second": work / measured["bfloat16"],
        "gradient_seconds": timing.medians({"gradient": lambda: compiled(rates)}, rounds)[
            "gradient"
        ],
        "gradient_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "planned_megabytes": planned.total / 1e6,
    }


def distance(points: int, rounds: int) -> dict[str, float]:
    """Return the seconds of W2² and its gradient in every transport."""
    x, y = (jax.random.normal(jax.random.key(seed), (points, 10)) + seed / 2 for seed in (0, 1))
    transports = {
        "exact": esl.ExactTransport(),
        "gaussian": esl.GaussianTransport(),
        "sliced": esl.SlicedTransport(64, jax.random.key(0)),
        "sinkhorn": esl.SinkhornTransport(1.0),
        "sinkhorn in chunks": esl.SinkhornTransport(1.0, chunk=256),
    }
    programs = {
        name: jax.jit(jax.value_and_grad(transport.squared, (0, 1)))
        for name, transport in transports.items()
    }
    return timing.medians(
        {name: lambda program=program: program(x, y) for name, program in programs.items()}, rounds
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--members", type=int, nargs="+", default=[32, 128, 512, 2048], help="members of the runs"
    )
    parser.add_argument(
        "--points",
        type=int,
        nargs="+",
        default=[128, 512, 2048],
        help="members of either ensemble of a distance",
    )
    arguments = parser.parse_args(argv)
    members, points, steps, rounds = (
        ([4], [16], 20, 1) if arguments.smoke else (arguments.members, arguments.points, 100, 5)
    )

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; medians of {rounds}\n")
    print(
        "| members | member-steps / s | of the bare scan | in bfloat16 / s "
        "| gradient, s | memory, MB | planned, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    runs = {}
    for n in members:
        runs[str(n)] = row = run(n, steps, rounds)
        speed, share, rounded, seconds, memory, planned = row.values()
        print(
            f"| {n} | {speed:,.0f} | {share:.3f} | {rounded:,.0f} "
            f"| {seconds:.3g} | {memory:.0f} | {planned:.0f} |",
            flush=True,
        )
    print("\nSeconds for W2² and its gradient:\n")
    distances = {}
    for n in points:
        distances[str(n)] = row = distance(n, rounds)
        if len(distances) == 1:
            print(f"| members | {' | '.join(row)} |\n|{'---|' * (len(row) + 1)}")
        print(f"| {n} | {' | '.join(f'{seconds:.3g}' for seconds in row.values())} |", flush=True)
    timing.write(arguments.out, {"runs": runs, "distances": distances})
    return {"runs": runs, "distances": distances}


if __name__ == "__main__":
    main()
