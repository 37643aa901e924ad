"""How fast the potentials of a Sinkhorn divergence are found, by each acceleration.

    python scripts/benchmark_sinkhorn.py [--smoke] [--out FILE.json]

Value and gradient between two clouds in five dimensions that differ by a shift, for several sizes,
ε and thresholds: time over that of plain updates, medians of interleaved rounds.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing

import esljax as esl

ACCELERATIONS = ("none", "momentum", "anderson")
# Members, ε over the mean cost, threshold.
CASES = [
    (64, 0.01, 1e-5),
    (128, 0.05, 1e-4),
    (128, 0.01, 1e-4),
    (128, 0.01, 1e-5),
    (256, 0.01, 1e-4),
    (512, 0.01, 1e-4),
]


def case(members: int, share: float, threshold: float, rounds: int) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(members))
    x = jax.random.normal(first, (members, 5))
    y = 0.5 + jax.random.normal(second, (members, 5))
    epsilon = share * float(jnp.mean(jnp.sum((x[:, None] - y) ** 2, axis=-1)))

    def value(x, acceleration):
        transport = esl.SinkhornTransport(epsilon, threshold=threshold, acceleration=acceleration)
        return transport.solve(x, y).squared

    programs = {
        name: jax.jit(jax.value_and_grad(functools.partial(value, acceleration=name)))
        for name in ACCELERATIONS
    }
    seconds = timing.medians(
        {name: functools.partial(program, x) for name, program in programs.items()}, rounds
    )
    return {
        "members": members,
        "epsilon": share,
        "threshold": threshold,
        "seconds": seconds,
        "values": {name: float(program(x)[0]) for name, program in programs.items()},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(str(__doc__).splitlines()[0]).parse_args(argv)
    cases = [(16, 0.1, 1e-3)] if arguments.smoke else CASES
    print("| members, ε over the mean cost, threshold | plain | `momentum` | `anderson` |")
    print("|---|---|---|---|")
    found = []
    for each in cases:
        found.append(case(*each, rounds=1 if arguments.smoke else 9))
        plain = found[-1]["seconds"]["none"]
        ratios = [f"{found[-1]['seconds'][name] / plain:.2f}" for name in ACCELERATIONS[1:]]
        what = f"{each[0]}, {each[1]:g}, {each[2]:.0e}"
        print(f"| {what} | {1e3 * plain:.3g} ms | " + " | ".join(ratios) + " |", flush=True)
    numbers = {"cases": found}
    timing.write(arguments.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
