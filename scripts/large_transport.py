"""Time the Sinkhorn divergence of ensembles too large for the matrix of their distances.

    python scripts/large_transport.py [--smoke] [--n 1000 3000 10000] [--chunk 256] [--rounds 3]
        [--out FILE.json]

float32, two shifted Gaussian clouds in d = 10, ε = .05 of the mean squared distance. The table
holds the temporary memory that the compiler counts and that of one (n, n) matrix. For an
accelerator: `--n 100000 --chunk 1024`.
"""

import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import timing

import esljax as esl

HEADER = (
    "n",
    "matrix, MB",
    "value, s",
    "memory, MB",
    "and gradient, s",
    "memory, MB",
    "squared",
    "converged",
)


def row(n: int, d: int, chunk: int, rounds: int) -> dict[str, float | bool]:
    rng = np.random.default_rng(n)
    x, y = (
        jax.device_put((rng.normal(size=(n, d)) + shift).astype(np.float32)) for shift in (0.0, 0.5)
    )
    mean_cost = (
        jnp.mean(jnp.sum(x**2, axis=1))
        + jnp.mean(jnp.sum(y**2, axis=1))
        - 2 * jnp.sum(jnp.mean(x, axis=0) * jnp.mean(y, axis=0))
    )
    transport = esl.SinkhornTransport(0.05 * mean_cost, chunk=chunk)

    def with_gradient(
        x: jax.Array, y: jax.Array
    ) -> tuple[esl.Solution, tuple[jax.Array, jax.Array]]:
        def squared(x: jax.Array, y: jax.Array) -> tuple[jax.Array, esl.Solution]:
            solution = transport.solve(x, y)
            return solution.squared, solution

        (_, solution), gradient = jax.value_and_grad(squared, (0, 1), has_aux=True)(x, y)
        return solution, gradient

    numbers: dict[str, float | bool] = {"matrix_megabytes": 4e-6 * n**2}
    solutions: list[esl.Solution] = []
    for name, fn in (
        ("value", lambda x, y: (transport.solve(x, y), None)),
        ("gradient", with_gradient),
    ):
        compiled = jax.jit(fn).lower(x, y).compile()

        def call(compiled: jax.stages.Compiled = compiled) -> None:
            solution, _ = jax.block_until_ready(compiled(x, y))
            solutions.append(solution)

        numbers[f"{name}_seconds"] = statistics.median(timing.seconds(call) for _ in range(rounds))
        numbers[f"{name}_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {
        **numbers,
        "squared": float(solutions[-1].squared),
        "converged": all(bool(solution.converged) for solution in solutions),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float | bool]]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--n", type=int, nargs="+", default=[1000, 3000, 10000], help="members of either ensemble"
    )
    parser.add_argument(
        "--chunk", type=int, default=256, help="members whose distances are held at a time"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each program")
    arguments = parser.parse_args(argv)
    sizes, chunk, rounds = (
        ([40], 16, 1) if arguments.smoke else (arguments.n, arguments.chunk, arguments.rounds)
    )

    table = {}
    print("".join(f"{word:>16}" for word in HEADER))
    for n in sizes:
        numbers = table[str(n)] = row(n, 10, chunk, rounds)
        megabytes, value, value_mb, gradient, gradient_mb, squared, converged = numbers.values()
        print(
            f"{n:>16}{megabytes:>16.4g}{value:>16.3g}{value_mb:>16.3g}"
            f"{gradient:>16.3g}{gradient_mb:>16.3g}{squared:>16.4f}{converged!s:>16}",
            flush=True,
        )
    print(f"d = 10, blocks of {chunk} members, medians of {rounds}")
    timing.write(arguments.out, {"d": 10, "chunk": chunk, "table": table})
    return table


if __name__ == "__main__":
    main()
