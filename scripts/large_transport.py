"""Time distances between ensembles too large for the matrix of their distances.

    python scripts/large_transport.py [--smoke] [--n 1000 3000 10000] [--chunk 256] [--rounds 3]
        [--hierarchical] [--out FILE.json]

float32, two shifted Gaussian clouds in d = 10. The Sinkhorn divergence, ε = .05 of the mean squared
distance, or with `--hierarchical` the upper value of `HierarchicalTransport`, with the part by
which it is above the exact one up to 3000 members. The table holds the temporary memory that the
compiler counts and that of one (n, n) matrix. For an accelerator: `--n 100000 --chunk 1024`.
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
    "above exact",
)
# The largest problem that is solved exactly beside the others.
LARGEST = 3000


def row(n: int, d: int, chunk: int | None, rounds: int) -> dict[str, float | bool]:
    rng = np.random.default_rng(n)
    x, y = (
        jax.device_put((rng.normal(size=(n, d)) + shift).astype(np.float32)) for shift in (0.0, 0.5)
    )
    mean_cost = (
        jnp.mean(jnp.sum(x**2, axis=1))
        + jnp.mean(jnp.sum(y**2, axis=1))
        - 2 * jnp.sum(jnp.mean(x, axis=0) * jnp.mean(y, axis=0))
    )
    transport = (
        esl.HierarchicalTransport(jax.random.key(0))
        if chunk is None
        else esl.SinkhornTransport(0.05 * mean_cost, chunk=chunk)
    )

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
    squared, above = float(solutions[-1].squared), float("nan")
    if chunk is None and n <= LARGEST:
        above = squared / float(esl.ExactTransport().squared(x, y)) - 1
    return {
        **numbers,
        "squared": squared,
        "converged": all(bool(solution.converged) for solution in solutions),
        "above": above,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float | bool]]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--n", type=int, nargs="+", default=[1000, 3000, 10000], help="members of either ensemble"
    )
    parser.add_argument(
        "--chunk", type=int, default=256, help="members whose distances are held at a time"
    )
    parser.add_argument(
        "--hierarchical", action="store_true", help="an upper value in place of the divergence"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each program")
    arguments = parser.parse_args(argv)
    sizes, chunk, rounds = (
        ([40], 16, 1) if arguments.smoke else (arguments.n, arguments.chunk, arguments.rounds)
    )

    table: dict[str, dict[str, float | bool]] = {}
    chunk = None if arguments.hierarchical else chunk
    print("".join(f"{word:>16}" for word in HEADER))
    for n in sizes:
        numbers = table[str(n)] = row(n, 10, chunk, rounds)
        megabytes, value, value_mb, gradient, gradient_mb, squared, converged, above = (
            numbers.values()
        )
        print(
            f"{n:>16}{megabytes:>16.4g}{value:>16.3g}{value_mb:>16.3g}"
            f"{gradient:>16.3g}{gradient_mb:>16.3g}{squared:>16.4f}{converged!s:>16}"
            f"{above:>16.4f}",
            flush=True,
        )
    how = "hierarchical" if chunk is None else f"Sinkhorn, blocks of {chunk} members"
    print(f"d = 10, {how}, medians of {rounds}")
    timing.write(arguments.out, {"d": 10, "chunk": chunk, "table": table})
    return table


if __name__ == "__main__":
    main()
