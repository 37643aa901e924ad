"""When the gap to the speed limit closes: geodesics, two modes, and schedules of one path.

    python scripts/experiment_gap.py [--smoke] [--folder FOLDER] [--store FOLDER] [--processes P]

Written down before the full run. Hypothesis: Σ - W2² is closed by exactly those controls that lead
along a geodesic at constant speed; a rate alone removes the temporal part and leaves the geometric.

1. *Geodesics.* A translation in the plane (T = .1, U = 2) at the optimal rate, and a path whose
   rate and temperature move mean and width at constant speed (d = 1, 4). Relative gap
   (Σ - W2²)/W2²: of the exact law at most 1e-6; of members on their own deterministic paths
   (`ProbabilityFlow`, where the gap is ≥ 0 on samples) at most 1e-3 for every key; of noisy members
   by affine velocities an interval over keys that holds 0 and lies within 1e-2. (A first run, of
   1000 steps and 10 keys, gave -.0076 ± .0052 for the translation: steps are now 4000, keys 20.)
2. *O5*, stiffness (1, 10), T = 0, U = 1, at a constant and at the optimal rate: the exact numbers
   of the point mass against the reference, members of a cloud of width .1 against its exact law.
   Confirmed if the optimal rate leaves a temporal part within 1 % of Σ, and L² and the geometric
   part are those of the constant rate within 2 % (steps are finite).
3. *O3*: six schedules of one relaxation, U = 2, d = 1 and 10. Confirmed if the 95 % interval over
   keys of the gap holds the exact one in at least ten of the twelve rows; keys are paired, so D, L²
   and W2² should agree over schedules far better than over keys.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import experiments
import jax
import jax.numpy as jnp
import laws
import matplotlib.figure
import numpy as np

import esljax as esl
from esljax.figures.style import COLORS

SHAPES = {
    "constant": esl.Constant(2.0),
    "linear to 0": esl.Linear(4.0, 0.0),
    "cosine": esl.Cosine(4.0),
    "e^(-5s)": esl.Exponential(10 / (1 - np.exp(-5)), 10 / (np.exp(5) - 1)),
    "linear from 0": esl.Linear(0.0, 4.0),
    "optimum": None,
}
TRAP, MODES, HEAT = esl.Quadratic(1.0), esl.Quadratic([1.0, 10.0]), 0.1


class Straight(esl.AbstractSchedule):
    """The rate at which the mean in a trap of stiffness 1 shrinks linearly, by a share."""

    share: Any
    steps: int

    def __call__(self, s):
        return self.share / (1 - self.share * s) / self.steps


class Narrowing(esl.AbstractSchedule):
    """The temperature at which, at the rate of `Straight`, the width falls linearly from 1."""

    share: Any
    slope: Any

    def __call__(self, s):
        width = 1 + self.slope * s
        return width * (width + self.slope * (1 - self.share * s) / self.share)


def optimum(law: Any, potential: Any, temperature: float, time: float, steps: int) -> esl.Knots:
    given: Any = {"temperature": temperature, "learning_time": time, "steps": steps, "knots": 8193}
    return esl.gaussian.optimal_learning_rate(law, potential, **given)


def numbers(report: esl.SpeedLimit) -> dict[str, Any]:
    best = ("entropy_production", "length_squared", "w2_squared", "dissipation")
    parts = {name: getattr(report, name) for name in ("temporal", "geometric", "gap")}
    relative = report.gap / report.best("w2_squared")
    return {name: report.best(name) for name in best} | parts | {"relative": relative}


def exactly(law: Any, potential: Any, rule: Any, steps: int) -> dict[str, float]:
    report = esl.gaussian.speed_limit(law, potential, rule, steps=steps)
    return {name: float(value) for name, value in numbers(report).items()}


def by_members(law, potential, rule, n: int, steps: int, seed: Any, keys: int) -> dict[str, Any]:
    """The numbers of simulated runs: by the members' paths if those have no noise, else affine."""
    # Exact numbers are made in double precision, runs in single.
    law, rule = jax.tree.map(lambda x: jnp.float32(x) if eqx.is_array(x) else x, (law, rule))
    flows = isinstance(rule, esl.ProbabilityFlow)

    def one(key):
        first, second = jax.random.split(key)
        start = laws.members_of(law, n, first)
        path = esl.simulate(
            potential, rule, start, steps=steps, snapshots=min(100, steps), key=second
        )
        report = esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=esl.PathVelocity() if flows else esl.AffineVelocity(),
            potential=potential,
            debias=not flows,
            jackknife=0,
        )
        return numbers(report)

    return laws.over_keys(one, seed, keys)


def geodesic(d: int, n: int, keys: int, steps: int) -> dict[str, Any]:
    """d = 2: a translation at the optimal rate; else mean and width both move."""
    with jax.enable_x64(True):
        law = esl.gaussian.Law(2 * np.eye(d)[0], (HEAT if d == 2 else 1.0) * np.eye(d))
        rate, heat = Straight(0.8, steps), Narrowing(0.8, -0.5)
        if d == 2:
            rate, heat = optimum(law, TRAP, HEAT, 2.0, steps), esl.Constant(HEAT)
        noisy = esl.Langevin(rate, heat)
        flow = esl.ProbabilityFlow(rate, heat, esl.AffineVelocity())
        rows = {"exact": exactly(law, TRAP, noisy, steps)}
    for name, rule in (("flow", flow), ("noisy", noisy)):
        rows[name] = by_members(law, TRAP, rule, n, steps, (6, d), keys)
    return rows


def two_modes(optimal: bool, n: int, keys: int, steps: int) -> dict[str, Any]:
    """O5, of its point mass exactly, and of a cloud about it by members too."""
    rows = {}
    with jax.enable_x64(True):
        for name, width in (("reference", 0.0), ("exact", 0.1)):
            law = esl.gaussian.Law(np.ones(2), width**2 * np.eye(2))
            rate = optimum(law, MODES, 0.0, 1.0, steps) if optimal else esl.Constant(1 / steps)
            rule = esl.Langevin(rate)
            rows[name] = exactly(law, MODES, rule, steps)
    return rows | {"noisy": by_members(law, MODES, rule, n, steps, (7,), keys)}


def schedule(shape: str, d: int, n: int, keys: int, steps: int) -> dict[str, Any]:
    """One row of O3; all schedules of one dimension have common keys."""
    with jax.enable_x64(True):
        law = esl.gaussian.Law(2 * np.eye(d)[0], np.eye(d))
        rate = SHAPES[shape]
        if rate is None:
            rate = optimum(law, TRAP, HEAT, 2.0, steps)
        else:
            rate = jax.tree.map(lambda x: x / steps, rate)
        rule = esl.Langevin(rate, HEAT)
        exact = exactly(law, TRAP, rule, steps)
    return {"exact": exact, "noisy": by_members(law, TRAP, rule, n, steps, (8, d), keys)}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = experiments.parser("When the gap closes.").parse_args(argv)
    page, smoke = experiments.Page("gap", arguments, seed=20), arguments.smoke
    small = {"n": 40, "keys": 2, "steps": 40}

    def size(n: int, keys: int, steps: int) -> dict[str, Any]:
        return small if smoke else {"n": n, "keys": keys, "steps": steps}

    straight = [{"d": d, **size(4000, 20, 4000)} for d in ((2, 1, 4) if not smoke else (1,))]
    modes = [{"optimal": optimal, **size(1000, 10, 4000)} for optimal in (False, True)]
    shapes = [
        {"shape": shape, "d": d, **size(1000, 20, 2000)}
        for d in ((1, 10) if not smoke else (1,))
        for shape in (SHAPES if not smoke else ("constant", "optimum"))
    ]
    geodesics = experiments.each(geodesic, straight, arguments)
    o5, o3 = (
        experiments.each(function, tasks, arguments)
        for function, tasks in ((two_modes, modes), (schedule, shapes))
    )
    found = {"geodesics": geodesics, "two_modes": o5, "schedules": o3}
    page.write(tables(straight, shapes, **found), draw(straight, shapes, **found), found)


def tables(straight, shapes, geodesics, two_modes, schedules) -> dict[str, Any]:
    effect = experiments.effect
    closed = [("path", "exact", "own paths, the largest of all keys", "noisy members, mean")]
    for task, row in zip(straight, geodesics, strict=True):
        name = "translation, d = 2" if task["d"] == 2 else f"mean and width, d = {task['d']}"
        largest, noisy = max(row["flow"]["relative"]), effect(row["noisy"]["relative"])
        closed.append((name, f"{row['exact']['relative']:.1e}", f"{largest:.1e}", str(noisy)))
    kinds = {"entropy_production": "Σ", "length_squared": "L²", "w2_squared": "W2²"}
    kinds |= {"temporal": "temporal", "geometric": "geometric"}
    modes = [("rate", "of", *kinds.values())]
    for rate, row in zip(("constant", "optimal"), two_modes, strict=True):
        for name, words in (("reference", "point mass, exact"), ("exact", "cloud, exact")):
            modes.append((rate, words, *(f"{row[name][kind]:.7f}" for kind in kinds)))
        modes.append((rate, "cloud, members", *(str(effect(row["noisy"][kind])) for kind in kinds)))
    held, rows = 0, [("d", "η(s)", "Σ, exact", "gap, exact", "gap, members", "W2²/Σ", "D", "L²")]
    for task, row in zip(shapes, schedules, strict=True):
        exact, of = row["exact"], {name: effect(values) for name, values in row["noisy"].items()}
        held += of["gap"].low <= exact["gap"] <= of["gap"].high
        ends = (f"{exact['w2_squared'] / exact['entropy_production']:.3f}",)
        ends += (str(of["dissipation"]), str(of["length_squared"]))
        sigma, gap = (f"{exact[name]:.7f}" for name in ("entropy_production", "gap"))
        rows.append((str(task["d"]), task["shape"], sigma, gap, str(of["gap"]), *ends))
    apart = {}
    for d in sorted({task["d"] for task in shapes}):
        pairs = zip(shapes, schedules, strict=True)
        means = np.array(
            [
                [np.mean(row["noisy"][name]) for name in ("dissipation", "length_squared")]
                for task, row in pairs
                if task["d"] == d
            ]
        )
        apart[d] = np.ptp(means, axis=0) / means.mean(axis=0)
    return {
        "Relative gap along geodesics": closed,
        "O5: two modes": modes,
        "O3: schedules of one path": rows,
        "Judged": [
            ("rule", "found"),
            ("intervals of the gap that hold the exact one", f"{held} of {len(schedules)}"),
            *(
                (f"largest difference over schedules, d = {d}", f"D {a:.2%}, L² {b:.2%}")
                for d, (a, b) in apart.items()
            ),
        ],
    }


def draw(straight, shapes, geodesics, two_modes, schedules) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, row in enumerate(geodesics):
        left.plot(i, max(abs(row["exact"]["relative"]), 1e-12), "s", color=COLORS[0])
        left.plot([i] * len(row["flow"]["relative"]), row["flow"]["relative"], "_", color=COLORS[4])
    left.axhline(
        1e-6, color=COLORS[0], ls="--", lw=1, label="1e-6: exact law (squares; 1e-12 if below)"
    )
    left.axhline(1e-3, color=COLORS[4], ls="--", lw=1, label="1e-3: members' paths (bars)")
    left.set_xticks(range(len(straight)), [f"d = {task['d']}" for task in straight])
    left.set(yscale="log", ylabel="(Σ − W2²) / W2²", xlabel="geodesics", ylim=(3e-13, 1))
    for i, row in enumerate(two_modes):
        bottom = 0.0
        for name, color in (
            ("w2_squared", COLORS[5]),
            ("geometric", COLORS[2]),
            ("temporal", COLORS[1]),
        ):
            of, label = experiments.effect(row["noisy"][name]), name.replace("w2_squared", "W2²")
            middle.bar(
                i, of.mean, 0.6, bottom, color=color, yerr=of.bar, label=label if i else None
            )
            bottom += of.mean
        middle.plot([i - 0.3, i + 0.3], [row["exact"]["entropy_production"]] * 2, "k--", lw=1)
    middle.set_xticks(range(2), ["constant", "optimal"])
    middle.set(ylabel="parts of Σ, units of θ²", xlabel="rate, two modes (dashed: exact Σ)")
    for d, color, shift in zip(
        sorted({task["d"] for task in shapes}), COLORS, (-0.12, 0.12), strict=False
    ):
        mine = [(t["shape"], r) for t, r in zip(shapes, schedules, strict=True) if t["d"] == d]
        x = np.arange(len(mine)) + shift
        gaps = [experiments.effect(np.asarray(row["noisy"]["relative"])) for _, row in mine]
        right.errorbar(
            x,
            [g.mean for g in gaps],
            [g.bar for g in gaps],
            fmt="o",
            ms=4,
            color=color,
            capsize=3,
            label=f"members, d = {d}",
        )
        right.plot(x, [row["exact"]["relative"] for _, row in mine], "_", ms=14, color="k")
        right.set_xticks(
            range(len(mine)), [shape for shape, _ in mine], rotation=40, ha="right", fontsize=8
        )
    right.set(yscale="log", ylabel="(Σ − W2²) / W2²", title="schedules of one path (dashes: exact)")
    right.title.set_fontsize(9)
    for axes in (left, middle, right):
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
