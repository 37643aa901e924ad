"""Time the errors of a long chain beside those that solve every problem anew.

    python scripts/benchmark_errors.py [--smoke] [--n 256] [--links 4] [--anew 256]
        [--out FILE.json]

float32, d = 20, exact transport, 32 groups, debiased by halves. Each member decays and takes small
steps of its own. "Anew" is a transport whose subsets are solved one by one, as every transport was
before; it runs up to `--anew` members.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import timing

import esljax as esl


class Anew(esl.ExactTransport):
    """Exact transport that knows no help for subsets."""

    def solve(self, x: Any, y: Any) -> esl.Solution:
        return esl.ExactTransport.solve(self, x, y)


def run(n: int, links: int) -> esl.Trajectory:
    rng = np.random.default_rng(0)
    snapshots = [rng.normal(size=(n, 20))]
    for _ in range(links):
        last = snapshots[-1]
        snapshots.append(0.95 * last + 0.02 * rng.normal(size=last.shape))
    return esl.from_snapshots(np.stack(snapshots).astype(np.float32))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("Errors of a chain beside those that solve every problem anew.")
    parser.add_argument("--n", type=int, nargs="+", default=[256], help="members")
    parser.add_argument("--links", type=int, default=4)
    parser.add_argument("--anew", type=int, default=256, help="most members that are solved anew")
    arguments = parser.parse_args(argv)
    sizes, links = ([16], 2) if arguments.smoke else (arguments.n, arguments.links)
    table: dict[str, dict[str, float]] = {}
    for n in sizes:
        path = run(n, links)
        transports = {"with help": esl.ExactTransport(), "anew": Anew()}
        row = table[str(n)] = {}
        gaps = []
        for name, transport in transports.items():
            if name == "anew" and n > arguments.anew:
                continue
            for turn in ("with compilation", "compiled"):
                started = time.perf_counter()
                report = esl.speed_limit(path, transport=transport, debias=True)
                jax.block_until_ready(report)
                row[f"{name}, {turn}"] = time.perf_counter() - started
            gaps.append(float(report.standard_error.debiased_w2_squared))
        print(f"n = {n}, {links} links: errors {gaps}")
        for name, seconds in row.items():
            print(f"  {name:<32}{seconds:8.2f} s", flush=True)
    timing.write(arguments.out, {"links": links, "seconds": table})
    return table


if __name__ == "__main__":
    main()
