"""A study of a thousand training runs: how Σ, W2² and the gap scale, and the cost of a run.

    python scripts/study_scaling.py [--smoke] [--out FILE.json] [--store STUDY.zarr]

The runs are students of a teacher network: rates × members × seeds, in one resumable store. The
cost of a run in the study, with its share of the store, is compared with that in a loop over
`esl.run`. Both are compiled first and take turns.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing

import esljax as esl

BASE = esl.RunConfig(
    data="teacher", hidden=(8,), steps=50, snapshots=10, batch_size=32, temperature=1e-7
)


def costs(
    base: esl.RunConfig, members: Sequence[int], runs: int, rounds: int
) -> list[dict[str, float]]:
    """Milliseconds a run, in a study of `runs` seeds and in a loop over them."""
    rows = []
    for n in members:
        study = esl.study.Study(base, grid={"members": [n], "seed": range(runs)})

        def in_study(study=study):
            with tempfile.TemporaryDirectory() as folder:
                return esl.study.run_study(study, Path(folder) / "study.zarr")["gap"].values

        def in_loop(study=study):
            outcomes = [esl.run(study.point(i)) for i in range(study.size)]
            return np.array([float(outcome.report.gap) for outcome in outcomes])

        if not np.array_equal(in_study()[0], in_loop()):
            raise RuntimeError("The study and the loop should give the same bits.")
        medians = timing.medians({"study": in_study, "loop": in_loop}, rounds)
        rows.append(
            {"members": n, **{name: 1e3 * seconds / runs for name, seconds in medians.items()}}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--store", type=Path, help="where to store the results; by default they are deleted"
    )
    arguments = parser.parse_args(argv)
    rates, seeds, members = (
        ([0.1, 0.4], 2, (4, 6))
        if arguments.smoke
        else ([0.05, 0.1, 0.2, 0.4, 0.8, 1.6], 60, (8, 16, 32))
    )
    study = esl.study.Study(BASE, grid={"members": members, "rate": rates, "seed": range(seeds)})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        results = esl.study.run_study(study, arguments.store or Path(folder) / "study.zarr").load()
        wall = time.perf_counter() - started
    done = int((results["done"] == 1).sum())
    print(f"{done} of {study.size} runs in {wall:.0f} s, with {len(members)} programs compiled")
    numbers = ("entropy_production", "w2_squared", "gap", "test_accuracy")
    rows, lines = [], [("members", "rate", "Σ", "W2²", "gap", "accuracy")]
    for group in esl.study.summarize(results):
        cells = {name: (group.means[name], group.errors[name]) for name in numbers}
        rows.append({**group.settings, "runs": group.runs, **cells})
        lines.append(
            (
                f"{group.settings['members']}",
                f"{group.settings['rate']:g}",
                *(esl.results.concise(mean, error) for mean, error in cells.values()),
            )
        )
    print(esl.results.table(lines, "rrrrrr"))
    cost = costs(BASE, members, *((4, 1) if arguments.smoke else (64, 5)))
    lines = [("members", "ms a run: study", "loop of esl.run", "ratio")]
    for row in cost:
        ratio = row["study"] / row["loop"]
        lines.append(
            (f"{row['members']}", f"{row['study']:.2f}", f"{row['loop']:.2f}", f"{ratio:.2f}")
        )
    print("\n" + esl.results.table(lines, "rrrr"))
    timing.write(arguments.out, {"wall_seconds": wall, "runs": done, "table": rows, "cost": cost})
    return {"table": rows, "cost": cost}


if __name__ == "__main__":
    main()
