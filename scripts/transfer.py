"""Do schedules found on a small run serve where nobody searched?

    python scripts/transfer.py [--smoke] [--out FILE.json] [--folder FOLDER] [--keys N]
        [--processes N]

The front and the tuned family are searched once, at home: digits, networks 64-16-10, batches of 8,
200 steps. Their shapes, scaled only, and the usual shapes are then used elsewhere: more steps,
wider networks, larger batches, other data. There each shape gets its own best peak, the one of
`_PEAKS` with the lowest final loss over tuning keys, and is judged on keys that nothing has seen.
Ratios to the front's shape are paired by key, with t-intervals of 95 %. All keys count.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import timing
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import esljax as esl
from esljax.experiment import stable_rate

_PEAKS = np.geomspace(0.5, 8.0, 9)
_SMALL: dict[str, Any] = {
    "points": 2,
    "knots": 3,
    "iterations": 3,
    "judge_runs": 2,
    "rate": 0.3,
}
_TUNED, _FOUND, _KNEE = "tuned warmup-stable-decay", "front", "front, at the knee"


def settings() -> dict[str, tuple[esl.datasets.Dataset, int, int, int]]:
    """Data, width, batch and steps of each place, by name; the first is home."""
    digits, moons = esl.datasets.digits(), esl.datasets.two_moons()
    return {
        "home: digits, width 16, batch 8, 200 steps": (digits, 16, 8, 200),
        "800 steps": (digits, 16, 8, 800),
        "800 steps, width 48": (digits, 48, 8, 800),
        "batch 64": (digits, 16, 64, 200),
        "moons": (moons, 16, 8, 200),
        "breast cancer": (esl.datasets.breast_cancer(), 16, 8, 200),
    }


def problem_of(data: Any, width: int, batch: int, steps: int, members: int) -> esl.Problem:
    classes = int(data.train.labels.max()) + 1
    model = esl.models.mlp(data.train.inputs.shape[1], width, classes)
    potential = esl.FlaxLoss(model, data.train, batch_size=batch)
    return esl.Problem(potential, members=members, steps=steps, test=data.test)


def shapes_of(front: esl.Front) -> dict[str, esl.schedules.AbstractSchedule]:
    """Shapes to scale: those found at home, and those in common use."""
    tuned = front.families["warmup_stable_decay_tuned"]
    usual = {name: shape for name, shape in esl.usual_shapes().items() if "rise" not in name}
    warm = {f"warmed-up {name}": esl.Warmup(usual[name], 0.1) for name in ("cosine",)}
    found = {_FOUND: front.schedules[-1], _KNEE: front.schedules[front.knee]}
    return {**found, _TUNED: tuned.schedules[-1], **usual, **warm}


@eqx.filter_jit
def _run(problem: esl.Problem, table: Any, key: Any) -> tuple[Any, Any, Any]:
    outcome = problem.run(esl.Knots(table, "linear"), key)
    return outcome.final_loss, outcome.report.entropy_production, outcome.test_accuracy


def judged(problem: esl.Problem, shape: Any, rate: float, keys: Any) -> dict[str, Any]:
    """One shape at its best peak: numbers on the judging keys, each (keys,)."""
    table = problem.table(shape).values
    table = table / jnp.max(table)

    def runs(peak: float, keys: Any) -> np.ndarray:
        answers = [_run(problem, peak * table, key) for key in keys]
        return np.array([[float(number) for number in answer] for answer in answers])

    losses = [runs(peak * rate, keys["tuning"])[:, 0].mean() for peak in _PEAKS]
    best = int(np.nanargmin(losses))
    loss, sigma, accuracy = runs(_PEAKS[best] * rate, keys["judging"]).T
    at_end = best in (0, len(_PEAKS) - 1)
    return {
        "peak": float(_PEAKS[best] * rate),
        "at_end_of_grid": at_end,
        "final_loss": loss.tolist(),
        "entropy_production": sigma.tolist(),
        "test_accuracy": accuracy.tolist(),
    }


def of_place(place: str, front: esl.Front, judging: int, smoke: bool) -> dict[str, Any]:
    """Every shape judged in one place."""
    places = settings()
    data, width, batch, steps = places[place]
    sizes = (4, 8, 20) if smoke else (width, batch, steps)
    problem = problem_of(data, *sizes, 3 if smoke else 8)
    key = jax.random.key(100 + list(places).index(place))
    of_rate, of_tuning, of_judging = jax.random.split(key, 3)
    keys = {
        "tuning": jax.random.split(of_tuning, 1 if smoke else 3),
        "judging": jax.random.split(of_judging, 2 if smoke else judging),
    }
    rate = float(stable_rate(problem, of_rate))
    return {name: judged(problem, shape, rate, keys) for name, shape in shapes_of(front).items()}


def interval(values: Any) -> tuple[float, float]:
    """Mean and half of the 95 % t-interval over the keys."""
    values = np.asarray(values)
    half = scipy.stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / values.size**0.5
    return float(values.mean()), float(half)


def table(place: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A setting in words: final loss, its ratio to the front's shape, Σ, accuracy, peak."""
    lines = [
        f"| {place} | final loss | loss / front's | Σ | test accuracy | peak |",
        "|---|---|---|---|---|---|",
    ]
    home = np.array(rows[_FOUND]["final_loss"])
    for name, row in sorted(rows.items(), key=lambda item: np.mean(item[1]["final_loss"])):
        cells = (
            "{:.4f} ± {:.4f}".format(*interval(row["final_loss"])),
            "{:.3f} ± {:.3f}".format(*interval(np.array(row["final_loss"]) / home)),
            "{:.4g} ± {:.2g}".format(*interval(row["entropy_production"])),
            "{:.4f} ± {:.4f}".format(*interval(row["test_accuracy"])),
            f"{row['peak']:.3g}" + " (the highest or lowest tried)" * row["at_end_of_grid"],
        )
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The final loss of every shape over that of the front's shape, in every place."""
    names = list(next(iter(results.values())))
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    for panel, (place, rows) in zip(np.atleast_1d(axes), results.items(), strict=True):
        home = np.array(rows[_FOUND]["final_loss"])
        for i, name in enumerate(names):
            ratio, half = interval(np.array(rows[name]["final_loss"]) / home)
            color = "#0072B2" if name in (_FOUND, _KNEE, _TUNED) else "#D55E00"
            panel.errorbar(ratio, -i, xerr=half, fmt="o", color=color, capsize=2, markersize=4)
        panel.axvline(1, color="#999999", linewidth=0.8, zorder=0)
        panel.set_title(place.replace(": ", ":\n").replace(", ", ",\n"), fontsize="small")
        panel.set(xscale="log")
        panel.xaxis.set_major_locator(FixedLocator([0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3]))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize="small")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    np.atleast_1d(axes)[0].set_yticks(
        range(0, -len(names), -1), [name.replace("_", " ") for name in names], fontsize="small"
    )
    figure.supxlabel("final training loss over that of the front's shape (95 % intervals)")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("Schedules found on a small run, used elsewhere.")
    parser.add_argument("--folder", type=Path, help="where to save the figure and the tables")
    parser.add_argument("--keys", type=int, default=8, help="held-out runs that judge a shape")
    parser.add_argument("--processes", type=int, default=1, help="places side by side")
    arguments = parser.parse_args(argv)
    smoke, started = arguments.smoke, time.perf_counter()
    places = settings()
    first = next(iter(places.values()))
    home = problem_of(*((first[0], 4, 8, 20, 3) if smoke else (*first, 8)))
    family = "warmup_stable_decay_tuned"
    front = esl.front(
        home,
        key=jax.random.key(0),
        families={family: esl.usual_families()[family]},
        **(_SMALL if smoke else {}),
    )
    print(front)
    names = list(places)[: 2 if smoke else None]
    judge = functools.partial(of_place, front=front, judging=arguments.keys, smoke=smoke)
    results = dict(zip(names, timing.in_processes(judge, names, arguments.processes), strict=True))
    tables = [table(place, rows) for place, rows in results.items()]
    print("\n\n".join(tables))
    numbers = {"places": results, "wall_seconds": time.perf_counter() - started}
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        plot(results).savefig(arguments.folder / "transfer.png", dpi=150)
        (arguments.folder / "transfer.md").write_text("\n\n".join(tables) + "\n", "utf-8")
    timing.write(arguments.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
