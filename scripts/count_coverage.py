"""Count how often 95 % intervals cover Σ, L², W2² and the split of runs whose laws are known.

    python scripts/count_coverage.py [--smoke] [--out FILE.json] [--only NAMES]
        [--cells SYSTEM:U:n,...] [--repetitions R] [--batch B] [--done FILE.json,...]

Each line is one number of one cell: an estimator, a system of `laws`, a learning time U and n
members, which are drawn from the exact process at 21 times. Its estimand is the number of the exact
laws (`laws.truth`); affine fields are held to the best affine field, chains to the chain of the
laws. All numbers are debiased. Of 400 repetitions a right interval covers 92 to 98 %.

The last column says what kind of interval was counted: `mean` (symmetric), `square` (the interval
of a square, see `esljax.measures.errors`), or, where some runs do not resolve L², `bracket`, which
covers too often by its construction. Other fields than affine ones miss a part of the velocity of
the mixture: what follows from it is a `bound`. --out is written after every cell; --done holds
files of cells that are not counted again.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import timing
from laws import SYSTEMS, TIMES, truth

import esljax as esl

LINKS, GROUPS = 20, 25
SIZES = (50, 200, 1000)
NUMBERS = ("entropy_production", "w2_squared", "gap", "length_squared", "temporal", "geometric")
SYMBOLS = dict(zip(NUMBERS, ("Σ", "W2²", "gap", "L²", "temporal", "geometric"), strict=True))
UNRESOLVED = ("length_squared", "temporal", "geometric")
GOOD, LEAST, SHIFT = (0.92, 0.98), 0.89, 0.3


class Estimator(NamedTuple):
    """One way to measure a run, the truth that it is held to, and how often it is repeated."""

    transport: esl.AbstractTransport
    velocity: esl.AbstractVelocity | None
    kind: str
    repetitions: int


def estimators() -> dict[str, Estimator]:
    gaussian = esl.GaussianTransport()
    # Smaller and quicker than the default, so that a cell takes a minute.
    network = esl.NetworkVelocity(key=jax.random.key(0), width=16, iterations=100)
    return {
        "affine": Estimator(gaussian, esl.AffineVelocity(), "affine", 400),
        "moments": Estimator(gaussian, None, "chain", 400),
        "exact": Estimator(esl.ExactTransport(), None, "chain", 400),
        "kernel": Estimator(gaussian, esl.KernelVelocity(), "field", 100),
        "kde": Estimator(gaussian, esl.KDEVelocity(), "field", 100),
        "histogram": Estimator(gaussian, esl.HistogramVelocity(), "field", 100),
        "flow": Estimator(gaussian, esl.FlowVelocity(key=jax.random.key(0)), "field", 100),
        "network": Estimator(gaussian, network, "field", 100),
    }


class Cell(NamedTuple):
    estimator: str
    system: str
    time: float
    members: int

    def __str__(self) -> str:
        return f"{self.estimator:<10}{self.system:<9}{self.time:<5g}{self.members:>5}"


def wanted(name: str) -> Iterator[Cell]:
    """The cells of one estimator: all, every second one, or a few."""
    grid = itertools.product(SYSTEMS, enumerate(TIMES), enumerate(SIZES))
    for system, (i, time), (j, members) in grid:
        one_dimensional = SYSTEMS[system].d == 1
        chosen = {
            "affine": True,
            "moments": members == 200 and (time == 1.0 or (time == 10.0 and one_dimensional)),
            "exact": members == 50 and time in (1.0, 10.0) and one_dimensional,
            # A cell of 1000 members in several dimensions takes ten minutes: one of 50 stands in.
            "kernel": ((i + j) % 2 == 0 and (one_dimensional or members < 1000))
            or (members == 50 and not one_dimensional),
            "kde": (i + j) % 2 == 0,
            "histogram": one_dimensional and members == 200 and time in (1.0, 10.0),
            "flow": members == 200 and time == 1.0,
            "network": members == 200 and time == 1.0,
        }
        if chosen[name]:
            yield Cell(name, system, time, members)


@functools.cache
def _counting(name: str, system: str, members: int, batch: int) -> Any:
    """The compiled measurement of one cell, for any learning time, over keys batch by batch."""
    estimator, of = estimators()[name], SYSTEMS[system]

    def one(duration, transitions, key):
        potential, path = of.potential(duration), of.run(duration, transitions, members, key)
        given = {} if estimator.velocity is None else {"velocity": estimator.velocity}
        report = esl.speed_limit(
            path,
            transport=estimator.transport,
            potential=potential if given else None,
            debias=True,
            jackknife=GROUPS,
            **given,
        )
        known = {}
        for number in NUMBERS:
            at = report.interval(number)
            best = getattr(report, number)
            if number in ("entropy_production", "w2_squared", "length_squared"):
                best = report.best(number)
            known[number] = jnp.stack([best, at.lower, at.upper])
        return known, report.length_resolved

    @eqx.filter_jit
    def all_of(duration, transitions, keys):
        each = functools.partial(one, duration, transitions)
        # A batch of one is not a run: its axis would keep XLA from the fast solvers of a CPU.
        return jax.lax.map(each, keys, batch_size=None if batch == 1 else batch)

    return all_of


def count(cell: Cell, repetitions: int, batch: int = 1) -> list[dict[str, Any]]:
    """One row for each number: how its value and its interval fared against the truth."""
    # Every cell has draws of its own.
    seed = [TIMES.index(cell.time), cell.members, list(SYSTEMS).index(cell.system)]
    key = functools.reduce(jax.random.fold_in, seed, jax.random.key(17))
    transitions = SYSTEMS[cell.system].transitions(cell.time, LINKS)
    duration, transitions = jax.tree.map(jnp.float32, (cell.time, transitions))
    values, resolved = _counting(cell.estimator, cell.system, cell.members, batch)(
        duration, transitions, jax.random.split(key, repetitions)
    )
    resolved = np.asarray(resolved)
    kind = estimators()[cell.estimator].kind
    exact = truth(cell.system, cell.time, LINKS, kind)
    rows = []
    for number in NUMBERS:
        value, lower, upper = np.asarray(values[number], np.float64).T
        aim, within = exact[number], (lower <= exact[number]) & (exact[number] <= upper)
        interval = "mean"
        if number in ("entropy_production", "w2_squared"):
            interval = "square"
        elif number == "gap":
            interval = "bracket" if kind == "chain" else "mean"
        elif not resolved.all():
            interval = "bracket"
        if kind == "field" and len(SYSTEMS[cell.system].weights) > 1 and number != "w2_squared":
            interval = "bound"
        clear = resolved if number in UNRESOLVED else np.ones_like(resolved)
        rows.append(
            {
                **cell._asdict(),
                "number": number,
                "truth": aim,
                "mean": value.mean(),
                "spread": value.std(ddof=1),
                "bias": (value.mean() - aim) / value.std(ddof=1),
                "width": np.mean(upper - lower),
                "coverage": within.mean(),
                "above": np.mean(lower > aim),
                "resolved": clear.mean(),
                "coverage_resolved": within[clear].mean() if clear.any() else None,
                "interval": interval,
                "repetitions": repetitions,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    marks = " *" if off(row) else ""
    marks += " bias" if abs(row["bias"]) > SHIFT else ""
    return (
        f"{_cell(row)}  {SYMBOLS[row['number']]:<10}"
        f"{row['truth']:>10.4f}{row['mean']:>10.4f}{row['spread']:>10.4f}{row['bias']:>7.2f}"
        f"{row['width']:>10.4f}{100 * row['coverage']:>7.1f} %{100 * row['resolved']:>6.0f} %"
        f"  {row['interval']}{marks}"
    )


def off(row: dict[str, Any]) -> bool:
    """Whether an interval covers too rarely, or too often if it is no bracket or bound."""
    most = 1.0 if row["interval"] in ("bracket", "bound") else GOOD[1]
    return not GOOD[0] <= row["coverage"] <= most


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The coverage in per cent and, in parentheses, the bias in spreads, in Markdown.

    Brackets and bounds in italics, failures in bold; one table an estimator, of affine fields one
    a system.
    """
    lines = []
    by_cell: dict[Cell, dict[str, Any]] = {}
    for row in rows:
        by_cell.setdefault(_cell(row), {})[row["number"]] = row

    def table(cell: Cell) -> tuple[str, ...]:
        return (cell.estimator, cell.system) if cell.estimator == "affine" else (cell.estimator,)

    for names, group in itertools.groupby(by_cell, key=table):
        heads = ["U", "n", *SYMBOLS.values(), "L² resolved"]
        heads = heads if len(names) > 1 else ["system", *heads]
        lines += ["", ", ".join(names), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for cell in group:
            texts = [f"{cell.time:g}", f"{cell.members}"]
            if len(names) == 1:
                texts.insert(0, cell.system)
            for row in by_cell[cell].values():
                mark = "**" if off(row) else "*" if row["interval"] in ("bracket", "bound") else ""
                texts.append(f"{mark}{100 * row['coverage']:.1f}{mark} ({row['bias']:+.2f})")
            texts.append(f"{100 * by_cell[cell]['length_squared']['resolved']:.0f} %")
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many cells cover as often as they claim, and the least coverage; brackets apart."""
    lines = [""]
    for name, group in itertools.groupby(rows, key=lambda row: row["estimator"]):
        mine = list(group)
        plain = [row for row in mine if row["interval"] in ("mean", "square")]
        brackets, bounds = (
            [row for row in mine if row["interval"] == kind] for kind in ("bracket", "bound")
        )
        good = [row for row in plain if not off(row)]
        shifted = [row for row in plain if abs(row["bias"]) > SHIFT]
        low = [row for row in mine if row["coverage"] < LEAST and row not in bounds]
        least = min((row["coverage"] for row in plain), default=float("nan"))
        under = min((row["coverage"] for row in brackets), default=float("nan"))
        lines.append(
            f"{name}: {len(good)} of {len(plain)} intervals cover 92-98 %, the least "
            f"{100 * least:.1f} %; {len(brackets)} brackets, the least {100 * under:.1f} %; "
            f"{len(low)} under 89 %; {len(shifted)} of {len(plain)} means are off by more than "
            f"{SHIFT:g} spreads" + (f"; {len(bounds)} numbers are bounds" if bounds else "")
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, help="of every cell; default by estimator")
    parser.add_argument("--batch", type=int, default=1, help="repetitions at a time, on a device")
    parser.add_argument("--only", default="affine,moments,exact", help="estimators, with commas")
    parser.add_argument("--cells", default="", help="such as trap:10:50,ou5,mixture:1")
    parser.add_argument("--done", default="", help="files of cells that are not counted again")
    arguments = parser.parse_args(argv)
    chosen = [cell for name in arguments.only.split(",") for cell in wanted(name)]
    if arguments.cells:
        asked = [one.split(":") for one in arguments.cells.split(",")]
        chosen = [
            cell
            for cell in chosen
            if any(all(a == b for a, b in zip(one, _names(cell), strict=False)) for one in asked)
        ]
    if arguments.smoke:
        chosen = [Cell("affine", "trap", 1.0, 12), Cell("moments", "trap", 1.0, 12)]
    rows = [
        row
        for file in filter(None, arguments.done.split(","))
        for row in json.loads(Path(file).read_text(encoding="utf-8"))["coverage"]
    ]
    # Results of few members come first.
    chosen.sort(key=lambda cell: cell.members)
    counted = set(map(_cell, rows))
    print(
        f"{'estimator':<10}{'system':<9}{'U':<5}{'n':>5}  {'number':<10}{'truth':>10}{'mean':>10}"
        f"{'spread':>10}{'bias':>7}{'width':>10}{'covered':>9}{'clear':>8}  interval"
    )
    for cell in chosen:
        if cell in counted:
            continue
        repetitions = arguments.repetitions or estimators()[cell.estimator].repetitions
        of_cell = count(cell, 6 if arguments.smoke else repetitions, arguments.batch)
        rows += of_cell
        print("\n".join(map(line, of_cell)), flush=True)
        timing.write(arguments.out, {"coverage": rows})
    order = list(estimators()), list(SYSTEMS)
    rows.sort(
        key=lambda row: (
            order[0].index(row["estimator"]),
            order[1].index(row["system"]),
            row["time"],
            row["members"],
        )
    )
    print(tables(rows))
    print(summary(rows))
    timing.write(arguments.out, {"coverage": rows})
    return {"coverage": rows}


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def _names(cell: Cell) -> tuple[str, str, str]:
    return cell.system, f"{cell.time:g}", str(cell.members)


if __name__ == "__main__":
    main()
