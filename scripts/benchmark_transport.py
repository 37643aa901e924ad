"""Time every transport between two ensembles in d = 10, beside solvers of SciPy and POT.

    python scripts/benchmark_transport.py [--smoke] [--out FILE.json]

float32, two shifted Gaussian clouds. SciPy solves an assignment and POT a linear program; both get
the cost matrix for free and work in float64.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
import ot
import scipy.optimize
import timing

import esljax as esl


def contenders(n: int, d: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(n)
    x, y = (
        jax.device_put((rng.normal(size=(n, d)) + shift).astype(np.float32)) for shift in (0.0, 0.5)
    )
    cost = ((np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)) ** 2).sum(-1)
    transports = {
        "exact": esl.ExactTransport(),
        "Gaussian": esl.GaussianTransport(),
        "sliced, 100 directions": esl.SlicedTransport(100, jax.random.key(0)),
        "Sinkhorn, ε = .05 mean cost": esl.SinkhornTransport(0.05 * cost.mean()),
    }
    calls = {}
    for name, transport in transports.items():
        for what, fn in (
            ("value", eqx.filter_jit(transport.squared)),
            ("value and gradient", jax.jit(jax.value_and_grad(transport.squared, (0, 1)))),
        ):
            calls[f"{name}: {what}"] = lambda fn=fn: fn(x, y)
    calls["scipy linear_sum_assignment: value"] = lambda: cost[
        scipy.optimize.linear_sum_assignment(cost)
    ].mean()
    calls["POT emd2: value"] = lambda: ot.emd2([], [], cost)
    return calls


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    sizes, rounds = ((16,), 1) if arguments.smoke else ((64, 256, 1000), 5)

    table: dict[str, dict[str, float]] = {}
    for n in sizes:
        calls = contenders(n, d=10)
        for name, median in timing.medians(calls, rounds).items():
            table.setdefault(name, {})[str(n)] = median

    print(f"{'milliseconds':<52}" + "".join(f"{'n = ' + str(n):>12}" for n in sizes))
    for name, row in table.items():
        print(f"{name:<52}" + "".join(f"{1e3 * s:>12.3f}" for s in row.values()))
    timing.write(arguments.out, {"d": 10, "seconds": table})
    return table


if __name__ == "__main__":
    main()
