"""Train logistic regressions by stochastic gradients in NumPy alone, and measure them.

    python scripts/measure_numpy.py [--smoke] [--out FILE.json]

For users of other frameworks: any program that writes arrays can be measured. The snapshots are
checkpoints in a folder, numpy-run/member_000/step_000000.npz and so on, one file for each member
and time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing

from esljax.command import main as esljax_main


def problem(
    rng: np.random.Generator, examples: int = 400, features: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two overlapping classes."""
    labels = rng.integers(0, 2, examples)
    return rng.normal(size=(examples, features)) + np.where(labels, 0.7, -0.7)[:, None], labels


def train(
    folder: Path, members: int, steps: int, every: int, rate: float = 0.05, batch: int = 32
) -> float:
    """Write a checkpoint of every member each `every` steps; return the final training accuracy."""
    inputs, labels = problem(np.random.default_rng(0))
    right = []
    for member in range(members):
        rng = np.random.default_rng([1, member])
        weights, bias = rng.normal(size=inputs.shape[1]), rng.normal()
        inside = folder / f"member_{member:03d}"
        inside.mkdir(parents=True, exist_ok=True)
        for step in range(steps + 1):
            if step % every == 0:
                np.savez(inside / f"step_{step:06d}.npz", weights=weights, bias=bias)
            rows = rng.integers(0, len(labels), batch)
            error = 1 / (1 + np.exp(-(inputs[rows] @ weights + bias))) - labels[rows]
            weights = weights - rate * inputs[rows].T @ error / batch
            bias = bias - rate * error.mean()
        right.append(np.mean((inputs @ weights + bias > 0) == labels))
    return float(np.mean(right))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    members, steps, every = (5, 6, 2) if arguments.smoke else (64, 400, 20)
    folder = Path("numpy-smoke" if arguments.smoke else "numpy-run")
    accuracy = train(folder, members, steps, every)
    print(f"training accuracy after {steps} steps: {accuracy:.3f}\n")
    code = esljax_main(
        [
            "measure",
            str(folder),
            "--jackknife",
            "0" if arguments.smoke else "32",
            "--out",
            "numpy-measured",
        ]
    )
    report = json.loads((Path("numpy-measured") / "report.json").read_text(encoding="utf-8"))
    timing.write(arguments.out, {"accuracy": accuracy, "exit_code": code, "measured": report})
    return report


if __name__ == "__main__":
    main()
