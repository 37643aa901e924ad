"""Time exact assignment beside SciPy's, which gets its costs for free, and optax's Hungarian.

    python scripts/benchmark_assignment.py [--smoke] [--out FILE.json]

float32, d = 10, value and gradient of W2² from the positions; SciPy's value from costs in float64.
Matched clouds differ by a small step, as two snapshots of one run do; generic ones are two shifted
Gaussian clouds. A jackknife pairs all members once, and then those left by each group. All
contenders of a size take turns in one run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from optax.assignment import hungarian_algorithm
from scipy.optimize import linear_sum_assignment

import esljax as esl


def clouds(n: int, matched: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 10)).astype(np.float32)
    step = 0.03 * rng.normal(size=x.shape) if matched else rng.normal(size=x.shape) + 0.5 - x
    return x, (x + step).astype(np.float32)


def costs(x: Any, y: Any) -> Any:
    return jnp.sum((x[:, None] - y) ** 2, axis=-1)


def contenders(n: int, matched: bool, groups: int) -> dict[str, Callable[[], object]]:
    """One problem, and the jackknife of it."""
    x, y = map(jnp.asarray, clouds(n, matched))
    cost = np.asarray(costs(x, y), np.float64)
    exact = esl.ExactTransport()
    both = jax.jit(jax.value_and_grad(exact.squared, (0, 1)))
    leave = np.random.default_rng(0).permutation(n)[: n // groups * groups].reshape(groups, -1)
    kept = np.stack([np.setdiff1d(np.arange(n), group) for group in leave])
    jackknife = jax.jit(lambda x, y: exact.solve_subsets(x, y, jnp.asarray(kept)).squared)
    hungarian = jax.jit(hungarian_algorithm)
    return {
        "SciPy, value": lambda: linear_sum_assignment(cost),
        "esljax, value and gradient": lambda: both(x, y),
        "optax's Hungarian, pairs": lambda: hungarian(jnp.asarray(cost, jnp.float32)),
        f"esljax, jackknife of {groups}": lambda: jackknife(x, y),
    }


def many(count: int) -> dict[str, Callable[[], object]]:
    """Many generic problems of 32 members."""
    generator = np.random.default_rng(0)
    cost = jnp.asarray(generator.normal(size=(count, 32, 32)), jnp.float32)
    in_turn = jax.jit(lambda c: jax.lax.map(lambda one: esl.transport.assignment(one).cost, c))
    together = jax.jit(lambda c: esl.transport.assignment(c).cost)
    theirs = jax.jit(lambda c: jax.lax.map(hungarian_algorithm, c))
    plain = np.asarray(cost, np.float64)
    return {
        "SciPy, value": lambda: [linear_sum_assignment(one) for one in plain],
        "esljax, value, one after the other": lambda: in_turn(cost),
        "esljax, value, in one array": lambda: together(cost),
        "optax's Hungarian, pairs": lambda: theirs(cost),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser("Exact assignment beside that of SciPy and optax.").parse_args(argv)
    smoke = arguments.smoke
    sizes, rounds = (((16, 4),), 1) if smoke else (((32, 16), (64, 64), (256, 16), (1000, 16)), 5)
    table: dict[str, dict[str, float]] = {}
    for matched in (True, False):
        for n, groups in sizes:
            name = f"{'matched' if matched else 'generic'}, n = {n}"
            table[name] = timing.medians(contenders(n, matched, groups), rounds)
    count = 20 if smoke else 1000
    table[f"{count} generic problems, n = 32"] = timing.medians(many(count), rounds)
    for name, row in table.items():
        print(f"\n{name:<48}{'milliseconds':>14}{'over SciPy':>12}")
        scipy_takes = row["SciPy, value"]
        for contender, seconds in row.items():
            print(f"  {contender:<46}{1e3 * seconds:>14.3f}{seconds / scipy_takes:>12.2f}")
    timing.write(arguments.out, {"d": 10, "seconds": table})
    return table


if __name__ == "__main__":
    main()
