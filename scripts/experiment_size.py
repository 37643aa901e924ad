"""Ensemble size: how many members for which number, by which estimator.

    python scripts/experiment_size.py [--smoke] [--folder FOLDER] [--store FOLDER] [--processes P]

Written down before the full run. Question: bias, spread and coverage of every Σ, L² and W2² against
the members n and the dimension d, and where a run tells of paths and not of laws.

Laws. `relaxation, d`: an Ornstein-Uhlenbeck process in 2, 10 and 50 dimensions (T = .1, U = 1, from
N(2 e₁, I)), members of its exact transitions, 10 links; the truth is that of the exact laws (of the
chain of the laws for chains). `moons`: networks 2-10-2 (d = 52). `digits`: networks 64-32-10 (d =
2410, batches of 256, T = 1e-7), in 5 fixed principal directions, as outputs on 8 inputs, and in all
parameters. Networks have no known law: the reference is the debiased value of moments or affine
velocities over `LARGEST` members of another key, also for the exact transport, whose W2² is no less
than that of the moments; in all parameters, where the members pair with themselves, it is the
action of the members' paths. Every cell holds independent runs; none is dropped.

Statistics, for each of Σ, L², W2², raw and debiased (of velocities the raw Σ is their lower bound):
relative bias with its 95 % interval, spread over runs, and how often the 95 % interval of Σ and W2²
covers. Recommended for an accuracy a is the least n tested from which on the root mean square error
of Σ, and of W2², stays below a times the truth, with intervals that cover at least 88 %; "none" if
no n tested does. Expected: debiased spreads fall as n^(-1/2) and debiased biases stay below them
for moments and affine fields if n > 2 d; the exact transport needs n that grows exponentially in d.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import experiments
import jax
import jax.numpy as jnp
import laws
import matplotlib.figure
import numpy as np

import esljax as esl
from esljax.figures.style import COLORS

LINKS, ACCURACIES, LEAST = 10, (0.3, 0.1, 0.03), 0.88
RAW = {"Σ": "entropy_production", "L²": "length_squared", "W2²": "w2_squared"}
LARGEST = {"moons": 4000, "digits": 1000}
RUNS = {10: 200, 20: 200, 50: 200, 100: 100, 500: 40, 2000: 20}
_EXACT, _MOMENTS = esl.ExactTransport(), esl.GaussianTransport()


class Estimator(NamedTuple):
    """A way to measure, and the most members and dimensions that it is tried with."""

    transport: esl.AbstractTransport
    velocity: esl.AbstractVelocity | None = None
    members: int = 10_000
    dimensions: int = 10_000


def estimators(d: int) -> dict[str, Estimator]:
    # In an isotropic relaxation, d directions measure all of W2².
    sliced = esl.SlicedTransport(d, jax.random.key(0))
    return {
        "chain of moments": Estimator(_MOMENTS),
        "chain, exact": Estimator(_EXACT, members=500),
        "chain, sliced": Estimator(sliced, members=500, dimensions=10),
        "chain, Sinkhorn ε = .5": Estimator(esl.SinkhornTransport(0.5), members=50, dimensions=10),
        "affine velocity": Estimator(_MOMENTS, esl.AffineVelocity()),
        "kernel velocity": Estimator(_MOMENTS, esl.KernelVelocity(), 100, 10),
        "KDE velocity": Estimator(_MOMENTS, esl.KDEVelocity(), 100, 10),
        "transport velocity": Estimator(_EXACT, esl.TransportVelocity(_EXACT), 100, 10),
    }


class Trained(NamedTuple):
    """Networks that are trained anew in every run, and the ways to look at them."""

    potential: esl.FlaxLoss
    rule: esl.Langevin
    ways: dict[str, Estimator]

    def run(self, n: int, key: Any) -> esl.Trajectory:
        first, second = jax.random.split(key)
        start = self.potential.init(members=n, key=first)
        given: Any = {"steps": 200, "snapshots": LINKS, "key": second}
        return esl.simulate(self.potential, self.rule, start, **given)


def trained(law: str) -> Trained:
    if law == "moons":
        data = esl.datasets.two_moons(samples=250)
        potential = esl.FlaxLoss(esl.models.mlp(2, 10, 2), data.train, l2=1e-4)
        names = ("chain of moments", "chain, exact", "affine velocity")
        ways = {name: estimators(52)[name] for name in names}
        return Trained(potential, esl.Langevin(0.05, 1e-4), ways)
    data = esl.datasets.digits()
    potential = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
    look = Trained(potential, esl.Langevin(0.25, 1e-7), {})
    directions = esl.principal_directions(look.run(64, jax.random.key(21)).positions, 5)

    def outputs(theta):
        return potential.predict(theta, data.test.inputs[:8]).reshape(-1)

    five = esl.ProjectedTransport(_MOMENTS, directions)
    ways = {
        "5 directions: chain of moments": Estimator(five),
        "5 directions: chain, exact": Estimator(
            esl.ProjectedTransport(_EXACT, directions), members=100
        ),
        "5 directions: affine velocity": Estimator(five, esl.AffineVelocity()),
        "outputs: chain of moments": Estimator(esl.MappedTransport(_MOMENTS, outputs)),
        "outputs: chain, exact": Estimator(esl.MappedTransport(_EXACT, outputs), members=100),
        "parameters: chain of moments": Estimator(_MOMENTS, members=100),
        "parameters: chain, exact": Estimator(_EXACT, members=100),
    }
    return look._replace(ways=ways)


def cell(law: str, n: int, keys: int, seed: int, few: int = 100) -> dict[str, Any]:
    """Every number of every estimator that is tried with n members of this law, run by run."""
    if law.startswith("relaxation"):
        d = int(law.split()[-1])
        system, potential = laws.relaxation(d), esl.Quadratic(1.0)
        transitions = jax.tree.map(jnp.float32, system.transitions(1.0, LINKS))
        ways = {
            name: way
            for name, way in list(estimators(d).items())[:few]
            if d <= way.dimensions and n <= way.members
        }

        def run(key):
            return system.run(jnp.float32(1.0), transitions, n, key)
    else:
        networks = trained(law)
        potential = networks.potential
        ways = {name: way for name, way in networks.ways.items() if n <= way.members}
        if seed:
            ways = {name: way for name, way in ways.items() if way.transport.moments_only}

        def run(key):
            return networks.run(n, key)

    def one(key):
        path = run(key)
        steps, whole = jnp.diff(path.positions, axis=0), path.positions[-1] - path.positions[0]
        squares = jnp.mean(jnp.sum(steps**2, axis=-1), axis=-1)
        rows = {
            "paths|Σ": LINKS * jnp.sum(squares),
            "paths|L²": jnp.sum(jnp.sqrt(squares)) ** 2,
            "paths|W2²": jnp.mean(jnp.sum(whole**2, axis=-1)),
        }
        for name, way in ways.items():
            report = esl.speed_limit(
                path,
                transport=way.transport,
                velocity=way.velocity,
                potential=potential if way.velocity is not None else None,
                debias=True,
                jackknife=0 if seed else 20,
            )
            for symbol, number in RAW.items():
                rows[f"{name}|{symbol}"] = report.best(number)
                rows[f"{name}|raw {symbol}"] = getattr(report, number)
                if report.standard_error is not None and symbol != "L²":
                    at = report.interval(number)
                    rows |= {f"{name}|low {symbol}": at.lower, f"{name}|high {symbol}": at.upper}
            if way.velocity is not None and report.entropy_production_bound is not None:
                rows[f"{name}|raw Σ"] = report.entropy_production_bound
        return rows

    return laws.over_keys(one, (9, n, seed), keys)


def aims(law: str, reference: Any) -> Callable[[str, str], float]:
    """The truth of a number by the name of its estimator, or the reference of a network."""
    if reference is None:
        system = laws.relaxation(int(law.split()[-1]))
        chain, field = (laws.truth(system, 1.0, LINKS, kind) for kind in ("chain", "affine"))
        return lambda name, symbol: (chain if "chain" in name else field)[RAW[symbol]]

    def of_network(name, symbol):
        # All parameters: the action of paths, which is the raw exact chain of any n.
        name = "paths" if name.startswith("parameters") else name.replace(", exact", " of moments")
        return float(np.mean(reference[f"{name}|{symbol}"]))

    return of_network


def summary(of: Any, name: str, aim: Callable[[str, str], float]) -> dict[str, Any]:
    """Relative bias, spread and error of each number of one estimator in one cell."""
    row = {}
    for symbol in RAW:
        true = aim(name, symbol)
        for kind in (symbol, f"raw {symbol}"):
            values = np.asarray(of[f"{name}|{kind}"]) / true - 1
            row[kind] = {
                "bias": experiments.effect(values)._asdict(),
                "spread": float(values.std(ddof=1)),
                "error": float(np.sqrt(np.mean(values**2))),
            }
        if f"{name}|low {symbol}" in of:
            low, high = (np.asarray(of[f"{name}|{end} {symbol}"]) for end in ("low", "high"))
            row[symbol]["covers"] = float(np.mean((low <= true) & (true <= high)))
    return row


def main(argv: Sequence[str] | None = None) -> None:
    arguments = experiments.parser("How many members.").parse_args(argv)
    page, smoke = experiments.Page("size", arguments, seed=20), arguments.smoke
    small = ["relaxation, d = 2"] if smoke else [f"relaxation, d = {d}" for d in (50, 10, 2)]
    tasks: list[Any] = [
        {"law": law, "n": n, "keys": RUNS[n] if not smoke else 3, "seed": 0}
        for law in small
        for n in ((10, 20) if smoke else sorted(RUNS, reverse=True))
    ]
    if smoke:
        tasks = [{**task, "few": 2} for task in tasks]
    else:
        tasks += [{"law": "moons", "n": n, "keys": RUNS[n] // 2, "seed": 0} for n in RUNS]
        tasks += [{"law": "digits", "n": n, "keys": 20, "seed": 0} for n in (100, 50, 20, 10)]
        tasks += [{"law": law, "n": n, "keys": 1, "seed": 1} for law, n in LARGEST.items()]
    # The longest first.
    tasks.sort(
        key=lambda task: task["n"] * task["keys"] * (100 if task["law"] == "digits" else 1),
        reverse=True,
    )
    found = experiments.each(cell, tasks, arguments)
    references = {t["law"]: of for t, of in zip(tasks, found, strict=True) if t["seed"]}
    rows = []
    for task, of in zip(tasks, found, strict=True):
        if task["seed"]:
            continue
        aim = aims(task["law"], references.get(task["law"]))
        for name in dict.fromkeys(key.split("|")[0] for key in of if "raw" in key):
            about = {"law": task["law"], "estimator": name, "n": task["n"], "runs": task["keys"]}
            rows.append(about | summary(of, name, aim))
    rows.sort(key=lambda row: (row["law"], row["estimator"], row["n"]))
    page.write(tables(rows), draw(rows), {"cells": rows})


def needed(rows: list[dict[str, Any]], symbol: str, accuracy: float) -> str:
    """The least n from which on one number of one estimator is this accurate."""
    good = [
        row[symbol]["error"] <= accuracy and row[symbol].get("covers", 1.0) >= LEAST for row in rows
    ]
    if not good[-1]:
        return "none"
    return str(rows[len(good) - [*good[::-1], False].index(False)]["n"])


def falls(rows: list[dict[str, Any]], symbol: str) -> float:
    """The slope of log spread in log n, of the debiased number."""
    spreads = [row[symbol]["spread"] for row in rows]
    if len(rows) < 2:
        return float("nan")
    return float(np.polyfit(np.log([row["n"] for row in rows]), np.log(spreads), 1)[0])


def tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    heading = ("law", "estimator", "n", "runs")
    kinds = [kind for symbol in RAW for kind in (f"raw {symbol}", symbol)]
    bias: list[tuple[str, ...]] = [(*heading, *kinds, "Σ covers", "W2² covers")]
    for row in rows:
        cells = [f"{row[k]['bias']['mean']:+.1%} ± {row[k]['spread']:.1%}" for k in kinds]
        covers = [row[s].get("covers") for s in ("Σ", "W2²")]
        ends = ["" if cover is None else f"{cover:.0%}" for cover in covers]
        bias.append((*(str(row[name]) for name in heading), *cells, *ends))
    members = [
        (
            "law",
            "estimator",
            "n tried",
            *(f"{s} to {a:.0%}" for s in ("Σ", "W2²") for a in ACCURACIES),
            "spread of Σ, W2² falls as",
        )
    ]
    for law, name in dict.fromkeys((row["law"], row["estimator"]) for row in rows):
        mine = [row for row in rows if (row["law"], row["estimator"]) == (law, name)]
        tried = f"{mine[0]['n']} to {mine[-1]['n']}"
        least = [needed(mine, symbol, a) for symbol in ("Σ", "W2²") for a in ACCURACIES]
        powers = [falls(mine, symbol) for symbol in ("Σ", "W2²")]
        members.append((law, name, tried, *least, f"n^{powers[0]:.2f}, n^{powers[1]:.2f}"))
    return {
        "Members needed": members,
        "Bias ± spread of one run, relative; how often 95 % intervals cover": bias,
    }


def draw(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    known = list(dict.fromkeys(row["law"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(2.6 * len(known) + 1.5, 4.6), layout="constrained")
    panels = figure.subplots(2, len(known), squeeze=False, sharex="col", sharey="row")
    shown = ("chain of moments", "chain, exact", "affine velocity")
    for column, law in enumerate(known):
        for row, symbol in enumerate(("Σ", "W2²")):
            axes = panels[row, column]
            for name in dict.fromkeys(r["estimator"] for r in rows if r["law"] == law):
                kind = next((k for k in shown if name.endswith(k)), None)
                if kind is None or name.startswith(("outputs", "parameters")):
                    continue
                mine = [r for r in rows if (r["law"], r["estimator"]) == (law, name)]
                n, color = np.array([r["n"] for r in mine]), COLORS[shown.index(kind)]
                for which, style in ((f"raw {symbol}", ":"), (symbol, "-")):
                    mean = np.array([r[which]["bias"]["mean"] for r in mine])
                    axes.plot(n, mean, style, color=color, label=kind if style == "-" else None)
                spread = np.array([r[symbol]["spread"] for r in mine])
                axes.fill_between(n, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
            axes.axhline(0, color="k", lw=0.8)
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if not column:
                axes.set_ylabel(f"relative error of {symbol}")
        panels[0, column].set_title(law, fontsize=9)
        panels[1, column].set_xlabel("members n")
    panels[0, 0].legend(fontsize=7, frameon=False, title="dotted: raw; band: spread of one run")
    panels[0, 0].get_legend().get_title().set_fontsize(7)
    return figure


if __name__ == "__main__":
    main()
