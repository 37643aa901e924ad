"""Curriculum against standard training: Σ at the same steps and the same final loss on all data.

    python scripts/experiment_curriculum.py [--smoke] [--folder FOLDER] [--store FOLDER]
        [--processes P]

Written down before the full run. Digits, networks 64-16-10 (d = 1210), 24 members, batches of 128,
K = 200 steps, T = 0. A drive λ(s) moves the weights of the examples (`Curriculum`): easy examples
weigh more at λ > 0; at the end all count alike (`after=0`), so the final loss is that of all data.

Drives, from 1.5 (or -1.5) to 0 linearly: *easy first*, by the margin of a reference of the same
size, and by the loss of a wider and longer trained teacher (Hacohen and Weinshall, ICML 2019);
*hard first*; *random*, the same weights in an order of chance, another for each key; *none*. Beside
them, and not judged, a third of the strength. Difficulties are ranks, scaled to mean 0 and variance
1. Every drive has a constant rate, scaled for every key until the final loss is `TARGET` within
1e-3. Σ, L², W2² are those of the members' paths
(exact chain, 20 links): the endpoints agree in loss, start and steps, not in law.

Hypothesis: easy first lowers Σ. Statistic: log(Σ/Σ of none) for each of 8 keys, paired, with a 95 %
t-interval. *Confirmed* if both easy-first intervals lie below 0; *refuted* if none does and both
lie above -.02; else *undecided*. Also W2², the gap, U, the work W of the drive and the heat Q: they
balance the change of the loss, ΔΦ = W + Q for every member, and -Q is dissipated.

*The best drive.* Rate (8 knots) alone, and rate and drive (8 knots each, margin), minimize log Σ at
the target by gradient, 60 iterations, two searches each, on keys of their own; then the rate is
scaled for each of the 8 keys as above. The best curriculum beats none if the interval of log(Σ of
rate and drive / Σ of rate alone), both means over searches, lies below 0.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import experiments
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

import esljax as esl
from esljax.experiment import match_endpoint
from esljax.figures.style import COLORS

TARGET, STRENGTH, KNOTS, STEPS, MEMBERS = 0.35, 1.5, 8, 200, 24
DRIVES = {
    "none": (0.0, "margin"),
    "easy first, margin": (STRENGTH, "margin"),
    "easy first, teacher": (STRENGTH, "teacher"),
    "hard first, margin": (-STRENGTH, "margin"),
    "random order": (STRENGTH, "chance"),
    "easy first, a third": (STRENGTH / 3, "margin"),
    "hard first, a third": (-STRENGTH / 3, "margin"),
}


@functools.cache
def potential() -> esl.FlaxLoss:
    data = esl.datasets.digits()
    return esl.FlaxLoss(esl.models.mlp(64, 16, 10), data.train, batch_size=128, l2=1e-4)


def scaled_ranks(values: Any) -> Any:
    ranks = np.argsort(np.argsort(np.asarray(values))).astype(float)
    return jnp.asarray((ranks - ranks.mean()) / ranks.std(), jnp.float32)


@functools.cache
def difficulty(kind: str) -> Any:
    """Ranks of the training examples, the hardest last, by what other networks make of them."""
    inputs, labels = potential().inputs, potential().labels
    hidden, steps, members = (16, 300, 16) if kind == "margin" else (64, 1500, 4)
    reference = esl.FlaxLoss(esl.models.mlp(64, hidden, 10), (inputs, labels), batch_size=128)
    key = jax.random.key(31)
    start = reference.init(members=members, key=key)
    run = esl.simulate(reference, esl.Langevin(0.3), start, steps=steps, snapshots=1, key=key)
    outputs = jnp.mean(jax.nn.log_softmax(reference.predict(run.final, inputs)), axis=0)
    own = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    if kind == "teacher":
        return scaled_ranks(-own)
    others = jnp.where(jnp.arange(10) == labels[:, None], -jnp.inf, outputs)
    return scaled_ranks(jnp.max(others, axis=1) - own)


def problem(hard: Any, drive: Any, steps: int, members: int) -> esl.Problem:
    loss = potential()
    return esl.Problem(
        esl.Driven(esl.Curriculum(loss, hard), drive, before=0.0, after=0.0),
        members=members,
        steps=steps,
        start=fresh(members),
    )


@functools.cache
def fresh(members: int) -> Any:
    """The initializations of a key; one function, so that all problems share compiled code."""
    loss = potential()
    return lambda key: loss.init(members=members, key=key)


@eqx.filter_jit
def measured(of: esl.Problem, rate: Any, key: Any) -> dict[str, Any]:
    path = of.path(rate, key)
    report = esl.speed_limit(path, transport=of.transport, jackknife=0)
    energy = [
        at(ends)
        for at, ends in (
            (of.potential.at_start(), path.positions[0]),
            (of.potential.at_end(), path.final),
        )
    ]
    done: Any = path.work
    drop, work = jnp.mean(energy[0] - energy[1]), jnp.mean(done)
    return {
        "Σ": report.entropy_production,
        "L²": report.length_squared,
        "W2²": report.w2_squared,
        "gap": report.gap,
        "D": report.dissipation,
        "U": report.learning_time,
        "drop": drop,
        "work": work,
        "dissipated": drop + work,
        "loss": jnp.mean(energy[1]),
    }


def judged(
    hard: Any, drive: Any, rate: Any, key: Any, steps: int, members: int
) -> dict[str, float]:
    """The numbers of one key, its rate scaled until the final loss is the target."""
    of = problem(hard, drive, steps, members)
    given: Any = {"target": goal(steps), "learning_time": 0.1 * steps, "keys": key[None]}
    scaled = match_endpoint(of, rate, **given)
    return {name: float(value) for name, value in measured(of, scaled, key).items()}


def keys_of(count: int, seed: int = 32) -> Any:
    return jax.random.split(jax.random.key(seed), count)


def goal(steps: int) -> float:
    """The final loss of all runs; a smoke run ends early."""
    return TARGET if steps == STEPS else 2.0


def fixed_drive(name: str, keys: int, steps: int, members: int) -> dict[str, Any]:
    strength, kind = DRIVES[name]
    rows = []
    for i, key in enumerate(keys_of(keys)):
        hard = difficulty("margin" if kind == "chance" else kind)
        if kind == "chance":
            hard = jax.random.permutation(jax.random.key(33 + i), hard)
        rows.append(judged(hard, esl.Linear(strength, 0.0), esl.Constant(1.0), key, steps, members))
    return {"keys": rows}


def best_drive(
    driven: bool, seed: int, iterations: int, keys: int, steps: int, members: int
) -> dict[str, Any]:
    """Search for the rate, and with `driven` for the drive too; then judge as the others."""
    hard, resting = difficulty("margin"), esl.Knots(np.zeros(KNOTS), "linear")
    of, target = problem(hard, resting, steps, members), goal(steps)
    first: Any = {"target": target, "learning_time": 0.1 * steps, "keys": keys_of(1, 34)}
    level = match_endpoint(of, esl.Constant(1.0), **first).values[0]
    controls: dict[str, Any] = {"rate": esl.Knots(jnp.full(KNOTS, level))}
    if driven:
        controls["drive"] = resting

    def objective(controls, key):
        drive = controls.get("drive", resting)
        run = eqx.tree_at(lambda each: each.potential.drive, of, drive).run(controls["rate"], key)
        return jnp.log(run.report.entropy_production), run.final_loss / target - 1

    search: Any = {"key": jax.random.key(40 + seed), "iterations": iterations, "validation": 2}
    found = esl.optimize(objective, controls, tolerance=5e-3, **search)
    rate, drive = found.controls["rate"], found.controls.get("drive", resting)
    rows = [judged(hard, drive, rate, key, steps, members) for key in keys_of(keys)]
    shapes = {"rate": rate.values.tolist(), "drive": drive.values.tolist()}
    return {"keys": rows, "doubts": list(found.doubts), **shapes}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = experiments.parser("Curriculum against standard training.").parse_args(argv)
    page, smoke = experiments.Page("curriculum", arguments, seed=32), arguments.smoke
    size = {"keys": 8, "steps": STEPS, "members": MEMBERS}
    searches: list[dict[str, Any]] = [
        {"driven": driven, "seed": seed, "iterations": 60, **size}
        for seed in (0, 1)
        for driven in (True, False)
    ]
    if smoke:
        size = {"keys": 2, "steps": 20, "members": 4}
        searches = [{**search, **size, "iterations": 8} for search in searches[:2]]
    drives = {name: {"name": name, **size} for name in ("none", "easy first, margin")}
    if not smoke:
        drives = {name: {"name": name, **size} for name in DRIVES}
    optima = experiments.each(best_drive, searches, arguments)
    fixed = experiments.each(fixed_drive, list(drives.values()), arguments)
    runs = {name: of["keys"] for name, of in zip(drives, fixed, strict=True)}
    for driven in (False, True):
        mine = [
            of["keys"]
            for search, of in zip(searches, optima, strict=True)
            if search["driven"] == driven
        ]
        # The mean over searches, key by key.
        runs["rate and drive, best" if driven else "rate, best"] = [
            {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            for rows in zip(*mine, strict=True)
        ]
    page.write(tables(runs), draw(runs, searches, optima), {"runs": runs, "searches": optima})


def column(runs: Any, name: str, number: str) -> Any:
    return np.array([row[number] for row in runs[name]])


def against(runs: Any, name: str, other: str, number: str = "Σ") -> experiments.Effect:
    """The paired log ratio of a number, as an effect."""
    return experiments.effect(
        np.log(column(runs, name, number)), np.log(column(runs, other, number))
    )


def reference(name: str) -> str:
    return "rate, best" if name == "rate and drive, best" else "none"


def tables(runs: Any) -> dict[str, Any]:
    numbers = ("Σ", "L²", "W2²", "gap", "D", "U", "drop", "work", "dissipated", "loss")
    rows: list[tuple[str, ...]] = [("drive", *numbers)]
    for name in runs:
        cells = [str(experiments.effect(column(runs, name, number))) for number in numbers]
        rows.append((name, *cells))
    effects: list[tuple[str, ...]] = [
        ("drive", "against", *(f"log ratio of {one}" for one in ("Σ", "W2²", "gap", "U")))
    ]
    for name in runs:
        if name != "none":
            other = reference(name)
            cells = [str(against(runs, name, other, one)) for one in ("Σ", "W2²", "gap", "U")]
            effects.append((name, other, *cells))
    return {
        "Paired effects: mean over keys [95 % interval]": effects,
        "Means over keys [95 % interval]": rows,
    }


def draw(runs: Any, searches: Any, optima: Any) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    names = [name for name in runs if name != "none"]
    for i, name in enumerate(names):
        of = against(runs, name, reference(name))
        each = np.log(column(runs, name, "Σ") / column(runs, reference(name), "Σ"))
        left.plot(each, [i] * len(each), ".", color="0.6", ms=4)
        left.errorbar(of.mean, i, xerr=of.bar, fmt="o", color=COLORS[0], capsize=3)
    left.axvline(0, color="k", lw=0.8)
    labels = [f"{name}\n(against {reference(name)})" for name in names]
    left.set_yticks(range(len(names)), labels, fontsize=7)
    left.set(xlabel="log(Σ / Σ of the other), at equal final loss")
    left.invert_yaxis()
    for search, of in zip(searches, optima, strict=True):
        style, color = ("-", COLORS[4]) if search["driven"] else ("--", COLORS[0])
        s = np.linspace(0, 1, len(of["rate"]))
        words = "rate and drive" if search["driven"] else "rate alone"
        middle.plot(s, of["rate"], style, color=color, label=None if search["seed"] else words)
        if search["driven"]:
            right.plot(s, of["drive"], style, color=color, marker="o", ms=3)
    middle.set(xlabel="training time s", ylabel="best rate η per step")
    middle.set_ylim(bottom=0)
    middle.legend(fontsize=8, frameon=False)
    right.axhline(0, color="k", lw=0.8)
    right.set(xlabel="training time s", ylabel="best drive λ (> 0: easy examples weigh more)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
