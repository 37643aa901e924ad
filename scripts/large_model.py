"""Time networks of up to a million parameters, measured by their outputs: a run and its gradient.

    python scripts/large_model.py [--smoke] [--hidden 32 150 440 960] [--members 8]
        [--out FILE.json]

Digits, two hidden layers, 8 members, minibatches of 64, 50 steps, 10 links, `observe` = the
outputs on 20 held-out images (200 numbers); `HessianAdjoint(recompute=True)`. The table holds the
temporary memory that the compiler counts, the memory that `esl.plan_memory` predicts, and the
most that this process has held so far.
"""

import resource
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing

import esljax as esl

HEADER = (
    "d",
    "history, MB",
    "run, s",
    "memory, MB",
    "gradient, s",
    "memory, MB",
    "planned, MB",
    "process, MB",
    "Σ",
    "W2²",
)


def row(hidden: int, members: int, steps: int, rounds: int) -> dict[str, float]:
    data, key, links = esl.datasets.digits(), jax.random.key(1), 10
    potential = esl.FlaxLoss(esl.models.mlp(64, hidden, hidden, 10), data.train, batch_size=64)
    start = potential.init(members=members, key=jax.random.key(0))
    inputs, transport, adjoint = (
        data.test.inputs[:20],
        esl.ExactTransport(),
        esl.HessianAdjoint(recompute=True),
    )

    def observe(theta):
        return potential.predict(theta, inputs).reshape(-1)

    rates = jnp.full(12, 0.1)

    def report(rates: jax.Array) -> Any:
        rule = esl.Langevin(esl.Knots(rates), 1e-7)
        path = esl.simulate(
            potential,
            rule,
            start,
            steps=steps,
            snapshots=links,
            key=key,
            observe=observe,
            gradient=adjoint,
        )
        return esl.speed_limit(path, transport=transport, jackknife=0)

    d = start.shape[1]
    numbers: dict[str, float] = {"d": d, "history_megabytes": 4e-6 * (links + 1) * members * d}
    for name, program in (
        ("run", report),
        ("gradient", jax.value_and_grad(lambda rates: report(rates).gap)),
    ):
        compiled = jax.jit(program).lower(rates).compile()
        numbers[f"{name}_seconds"] = statistics.median(
            timing.seconds(lambda compiled=compiled: compiled(rates)) for _ in range(rounds)
        )
        numbers[f"{name}_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    planned = esl.plan_memory(
        potential,
        start,
        steps=steps,
        snapshots=links,
        transport=transport,
        observe=observe,
        gradient=adjoint,
    )
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform == "darwin" else 1
    )
    measured = jax.jit(report)(rates)
    return {
        **numbers,
        "planned_megabytes": planned.total / 1e6,
        "process_megabytes": kilobytes * 1024e-6,
        "entropy_production": float(measured.entropy_production),
        "w2_squared": float(measured.w2_squared),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        default=[32, 150, 440, 960],
        help="widths of the hidden layers",
    )
    parser.add_argument("--members", type=int, default=8)
    arguments = parser.parse_args(argv)
    widths, members, steps, rounds = (
        ([8], 4, 10, 1) if arguments.smoke else (arguments.hidden, arguments.members, 50, 3)
    )

    table = {}
    print("".join(f"{word:>13}" for word in HEADER))
    for hidden in widths:
        numbers = table[str(hidden)] = row(hidden, members, steps, rounds)
        print(
            "".join(
                f"{value:>13.4g}" if value < 1e5 else f"{value:>13,.0f}"
                for value in numbers.values()
            ),
            flush=True,
        )
    print(f"{members} members, {steps} steps, medians of {rounds}")
    timing.write(arguments.out, {"members": members, "steps": steps, "table": table})
    return table


if __name__ == "__main__":
    main()
