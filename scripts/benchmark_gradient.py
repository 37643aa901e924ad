"""Time and memory of each way to differentiate Σ of the digits run in the knots of its schedule.

    python scripts/benchmark_gradient.py [--smoke] [--out FILE.json] [--growth]

Times are those of value and gradient together, also as multiples of the forward run of the same
length. Memory is what the compiled program allocates besides its arguments and results. `--growth`
adds K = 1000 and 5000 steps (minutes). A way that needs more than `MOST_MEMORY` is compiled and its
memory reported, but it is not run.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing

import esljax as esl

MOST_MEMORY = 8e9

WAYS = {
    "Hessian adjoint, every state kept": esl.HessianAdjoint(),
    "Hessian adjoint, √K checkpoints": esl.HessianAdjoint(recompute=True),
    "autodiff": esl.Autodiff(),
    "autodiff, √K checkpoints": esl.Autodiff(recompute=True),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--growth", action="store_true", help="also K = 1000 and 5000")
    arguments = parser.parse_args(argv)
    members, lengths, rounds = (
        (4, (20,), 1)
        if arguments.smoke
        else (32, (200, 1000, 5000) if arguments.growth else (200,), 5)
    )
    data = esl.datasets.digits()
    potential = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
    start = potential.init(members=members, key=jax.random.key(0))
    knots = esl.Knots(jnp.full(12, 0.25))
    transport = esl.ExactTransport()
    key = jax.random.key(1)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for steps in lengths:

        def entropy_production(knots, key, way, steps=steps):
            # The same learning time for every number of steps.
            rule = esl.Langevin(esl.Knots(knots.values * 200 / steps), 1e-7)
            path = esl.simulate(potential, rule, start, steps=steps, key=key, gradient=way)
            return esl.speed_limit(path, transport=transport, jackknife=0).entropy_production

        forward = (
            jax.jit(lambda knots, f=entropy_production: f(knots, key, esl.HessianAdjoint()))
            .lower(knots)
            .compile()
        )
        compiled = {"forward": forward}
        for name, way in WAYS.items():
            gradient = jax.value_and_grad(
                lambda knots, f=entropy_production, way=way: f(knots, key, way)
            )
            compiled[name] = jax.jit(gradient).lower(knots).compile()
        memory = {
            name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
        }
        calls = {
            name: lambda program=program: program(knots)
            for name, program in compiled.items()
            if memory[name] < MOST_MEMORY
        }
        times = timing.medians(calls, rounds if steps == lengths[0] else 1)
        table[str(steps)] = {
            name: {
                "seconds": times.get(name),
                "ratio": times[name] / times["forward"] if name in times else None,
                "bytes": memory[name],
            }
            for name in compiled
        }

    print(f"{'K':>6}  {'value and gradient':<36}{'time':>10}{'ratio':>8}{'temporary memory':>20}")
    for steps, rows in table.items():
        for name, row in rows.items():
            time = (
                f"{row['seconds']:>8.2f} s{row['ratio']:>8.2f}"
                if row["seconds"]
                else f"{'not run':>18}"
            )
            print(f"{steps:>6}  {name:<36}{time}{row['bytes'] / 1e6:>17.1f} MB")
    timing.write(arguments.out, {"runs": table})
    return table


if __name__ == "__main__":
    main()
