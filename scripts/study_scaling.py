"""A study of a thousand training runs: how Σ, W2² and the gap scale, and the cost of a run.

    python scripts/study_scaling.py [--smoke] [--out FILE.json] [--store STUDY.zarr]

The runs are students of a teacher network: rates × members × seeds, in one resumable store. The
cost of a run in the study, with its share of the store, is compared with that in a loop over
`esl.run`, and with that of 32 runs side by side in one program, with noise of the steps and
without. All are compiled first and take turns; the times are CPU times of the process.
"""

import dataclasses
import functools
import itertools
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

TINY = esl.RunConfig(data="moons", hidden=(4,), members=4, steps=10, snapshots=5, batch_size=8)
# Runs side by side.
WIDTH = 32


def costs(
    base: esl.RunConfig, members: Sequence[int], runs: int, rounds: int
) -> list[dict[str, float]]:
    """Milliseconds a run, in a study of `runs` seeds, side by side and in a loop over them."""
    rows = []
    for n, temperature in itertools.product(members, (base.temperature, 0.0)):
        own = dataclasses.replace(base, temperature=temperature)
        study = esl.study.Study(own, grid={"members": [n], "seed": range(runs)})

        def in_study(study=study, width=1):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder) / "study.zarr"
                # One task: what is written between tasks is not of the runs.
                results = esl.study.run_study(study, place, task_size=runs, width=width)
                return results["gap"].values

        def in_loop(study=study):
            outcomes = [esl.run(study.point(i)) for i in range(study.size)]
            return np.array([float(outcome.report.gap) for outcome in outcomes])

        if not np.array_equal(in_study()[0], in_loop()):
            raise RuntimeError("The study and the loop should give the same bits.")
        ways = {
            "study": in_study,
            "side by side": functools.partial(in_study, width=min(WIDTH, runs)),
            "loop": in_loop,
        }
        taken = {name: [] for name in ways}
        for turn, (name, way) in itertools.product(range(rounds + 1), ways.items()):
            started = time.process_time()
            way()
            # The first turn compiles.
            taken[name] += [time.process_time() - started] if turn else []
        milliseconds = {name: 1e3 * float(np.median(x)) / runs for name, x in taken.items()}
        rows.append({"members": n, "steps": base.steps, "temperature": temperature, **milliseconds})
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
    turns = 1 if arguments.smoke else 3
    cost = costs(TINY, (4,), 4 if arguments.smoke else 256, turns)
    cost += costs(BASE, members, 4 if arguments.smoke else 64, turns)
    ways = ("ms a run: loop of esl.run", "study", f"study, width {WIDTH}")
    lines = [("members", "steps", "T", *ways, "gain")]
    for row in cost:
        times = (f"{row[name]:.2f}" for name in ("loop", "study", "side by side"))
        gain = row["loop"] / row["side by side"]
        settings = (f"{row[name]:g}" for name in ("members", "steps", "temperature"))
        lines.append((*settings, *times, f"{gain:.2f}"))
    print("\n" + esl.results.table(lines, "rrrrrrr"))
    timing.write(arguments.out, {"wall_seconds": wall, "runs": done, "table": rows, "cost": cost})
    return {"table": rows, "cost": cost}


if __name__ == "__main__":
    main()
