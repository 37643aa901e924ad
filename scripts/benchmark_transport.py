"""Seconds per transport between two ensembles of n members in d = 10, beside scipy's assignment and POT's linear program.

    python scripts/benchmark_transport.py [--smoke] [--out FILE.json]

Every contender is compiled and warmed first; rounds are interleaved, so that a disturbance of the machine falls on all alike; each
measurement repeats its call until it has lasted at least `LEAST` seconds; the median over rounds is reported. float32, two shifted
Gaussian clouds. scipy and POT are given the cost matrix for free, and work in float64.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import ot
import scipy.optimize

from esljax.transport import ExactTransport, GaussianTransport, SinkhornTransport, SlicedTransport

LEAST = 0.1


def contenders(n: int, d: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(n)
    x, y = (jax.device_put((rng.normal(size=(n, d)) + shift).astype(np.float32)) for shift in (0.0, 0.5))
    cost = ((np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)) ** 2).sum(-1)
    transports = {
        "exact": ExactTransport(),
        "Gaussian": GaussianTransport(),
        "sliced, 100 directions": SlicedTransport(100, jax.random.key(0)),
        "Sinkhorn, ε = .05 mean cost": SinkhornTransport(0.05 * cost.mean()),
    }
    calls = {}
    for name, transport in transports.items():
        for what, fn in (
            ("value", eqx.filter_jit(transport.squared)),
            ("value and gradient", jax.jit(jax.value_and_grad(transport.squared, (0, 1)))),
        ):
            calls[f"{name}: {what}"] = lambda fn=fn: jax.block_until_ready(fn(x, y))
    calls["scipy linear_sum_assignment: value"] = lambda: cost[scipy.optimize.linear_sum_assignment(cost)].mean()
    calls["POT emd2: value"] = lambda: ot.emd2([], [], cost)
    return calls


def seconds(call: Callable[[], object]) -> float:
    start, repeats = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < LEAST:
        call()
        repeats += 1
    return elapsed / repeats


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small size, one round")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    arguments = parser.parse_args(argv)
    sizes, rounds = ((16,), 1) if arguments.smoke else ((64, 256, 1000), 5)

    table: dict[str, dict[str, float]] = {}
    for n in sizes:
        calls = contenders(n, d=10)
        for call in calls.values():
            call()
        measured = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
        for name in calls:
            table.setdefault(name, {})[str(n)] = statistics.median(m[name] for m in measured)

    print(f"{'milliseconds':<52}" + "".join(f"{'n = ' + str(n):>12}" for n in sizes))
    for name, row in table.items():
        print(f"{name:<52}" + "".join(f"{1e3 * s:>12.3f}" for s in row.values()))
    if arguments.out:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "d": 10, "unit": "s"}
        arguments.out.write_text(json.dumps({"about": about, "seconds": table}, indent=2, ensure_ascii=False) + "\n")
    return table


if __name__ == "__main__":
    main()
