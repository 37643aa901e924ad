"""Does fast training waste more? A sweep of the learning rate on three clocks.

    python scripts/experiment_sweep.py [--smoke] [--processes 2] [--folder docs/experiments/results]

HYPOTHESIS, of the source: faster training widens the gap Σ - W2², slow training approaches the
limit. Faster is a larger learning rate η a step; the clock is what stays the same: the steps, K =
100 (slow training then ends earlier on its way); the learning time, U = ηK = 10; or the final loss,
1 nat, to which the rate of each K is matched key by key.

DESIGN. 16 networks, MLP 64-16-10 or a small CNN, on 400 digits, T = 0, full batch or 32 examples a
step. Five rates from .01 to 1, where ηλ > 2 for the sharpness λ of the start: beyond the edge of
stability. 6 keys, common to all (paired). A run that diverges or cannot reach the loss is counted;
its rate has no interval and no place in a fit.

MEASURED. Σ of the steps as made, K Σ_k E‖Δ_k‖², its L², W2² and D = ∫E‖v‖²/η ds in members' paths
(16 members do not resolve a law in 810 dimensions), and ηλ/2 at the end. From chains of 10 links:
paths again, also in 30 random coordinates and of the outputs on 16 held-out digits; and the law in
3 principal coordinates (debiased moments). The most that the noise of batches adds to a chain.

DECIDES. Of the relative gap 1 - W2²/Σ, with the Σ of the steps as made and with that of 10 links,
the ratio between η = .1 and .01, and between 1 and .1, paired, 95 % t-intervals over keys. "Slow
training approaches the limit": confirmed if the first lies above 2, refuted if below 1.1. "Faster
training widens the gap": confirmed if the second lies above 1, refuted if below. Anything else is
undecided. Exponents are those of each number in η, one fit a key, over all rates and over those
below .5, where full-batch steps are stable.

BESIDE IT a quadratic of 64 modes with the spectrum 1.9/i, exactly. At fixed ends Σ = U D and D, the
drop of Φ, do not depend on η once steps are small. With η counted as part of the potential, as in
the source, the dissipation is ηD = Σ/K, and that falls as one over the duration K.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import experiments
import jax
import matplotlib.figure
import networks
import numpy as np
from experiments import column, effect

import esljax as esl
from esljax.experiment import match_endpoint
from esljax.figures.style import COLORS, clean

CLOCKS = {"steps": "steps, 100", "time": "learning time, 10", "loss": "final loss, 1 nat"}
NAMES = {"sigma": "Σ", "w2": "W2²", "D": "D", "gap": "Σ - W2²", "step": "(Σ - W2²)/K"}
VIEWS = ("paths", "30 random coordinates", "3 principal", "outputs")
RATES, LINKS = (0.01, 0.0333, 0.1, 0.333, 1.0), 10


def steps_of(clock: str, rate: float) -> int:
    return 100 if clock == "steps" else round(1 / rate) * LINKS


def runs(clock: str, model: str, batch: int | None, seed: int, smoke: bool) -> dict[str, Any]:
    """All rates of one clock, network, batch size and key; a reason where there are no numbers."""
    potential = networks.loss(model, 40 if smoke else 400, batch)
    key, rows = jax.random.key(seed), []
    for rate in RATES[2:] if smoke else RATES:
        steps = steps_of(clock, rate)
        n = 4 if smoke else 16
        problem = esl.Problem(potential, members=n, steps=steps, snapshots=steps)
        try:
            if clock == "loss":
                ends: Any = {"target": 1.0, "learning_time": 10.0, "keys": key[None]}
                rate = float(match_endpoint(problem, esl.Constant(1.0), **ends)(0.0))
            rows.append(measured(problem, potential, rate, key))
        except esl.InputError as error:
            rows.append({"rate": rate, "reason": str(error)[:300]})
    return {"rows": rows}


def measured(problem: esl.Problem, potential: Any, rate: float, key: jax.Array) -> dict[str, float]:
    """The numbers of one run: of its steps as made, and of 10 links in every view."""
    exact: Any = {"transport": esl.ExactTransport(), "jackknife": 0}
    path, every = problem.path(rate, key), problem.steps // LINKS
    fine = esl.speed_limit(path, **exact)
    ends = {"positions": path.positions[::every], "times": path.times[::every]}
    coarse = dataclasses.replace(path, **ends, energies=None, work_of_links=None)
    places, d = coarse.positions, path.final.shape[1]
    outputs = potential.predict(places, esl.datasets.digits().test.inputs[:16])
    outputs = esl.from_snapshots(outputs.reshape(*places.shape[:2], -1), observed=True)
    random = esl.from_snapshots(places @ esl.random_directions(d, 30, key))
    principal = esl.from_snapshots(places @ esl.principal_directions(places, 3))
    moments: Any = {"transport": esl.GaussianTransport(), "jackknife": 0, "debias": True}
    views = [esl.speed_limit(one, **exact) for one in (coarse, random, outputs)]
    views.insert(2, esl.speed_limit(principal, **moments))
    noisy = potential.batch_size is not None
    noise: Any = esl.minibatch_noise(coarse, potential, key=key).floor if noisy else 0.0
    sigma, before = fine.entropy_production, potential(path.positions[0]).mean()
    numbers: dict[str, Any] = {
        "rate": rate,
        "sigma": sigma,
        "w2": fine.w2_squared,
        "D": fine.dissipation,
        "gap": fine.gap,
        "step": fine.gap / problem.steps,
        "relative": fine.gap / sigma,
        "temporal": fine.temporal / sigma,
        "geometric": fine.geometric / sigma,
        "loss": potential(path.final).mean(),
        "drop": before - potential(path.final).mean(),
        "sharpness": rate * networks.sharpness(potential, path.final) / 2,
        "noise": noise / views[0].entropy_production,
    }
    for name, view in zip(VIEWS, views, strict=True):
        numbers[name] = view.gap / view.best("entropy_production")
    return {name: float(number) for name, number in numbers.items()}


def quadratic(clock: str) -> list[float]:
    """The relative gap of the quadratic at the same rates and steps, of the steps as made."""
    law, potential = (
        esl.gaussian.Independent(np.ones(64), 0.0),
        esl.Quadratic(1.9 / np.arange(1, 65)),
    )
    rules = [(esl.Langevin(rate), steps_of(clock, rate)) for rate in RATES]
    runs = [esl.gaussian.descent(law, potential, rule, steps=k).report for rule, k in rules]
    return [float(one.gap / one.entropy_production) for one in runs]


def verdict(effect: experiments.Effect, yes: float, no: float) -> str:
    word = "confirmed" if effect.low > yes else "refuted" if effect.high < no else "undecided"
    return f"{effect}: {word}"


def tables(results: dict[Any, Any]) -> dict[str, list[list[str]]]:
    head = ["at the same", "network", "batch"]
    verdicts = [[*head, "Σ", "η = .1 over .01: approaches the limit?", "η = 1 over .1: widens?"]]
    exponents = [[*head, "rates", *NAMES.values()]]
    gaps = [[*head, *(f"η ≈ {rate:.2g}" for rate in RATES), "ηλ/2 at η ≈ 1", "runs without"]]
    views = [[*head, "η", "temporal", "geometric", *VIEWS, "noise of batches"]]
    for (clock, model, batch), keys in results.items():
        group = [CLOCKS[clock], model, str(batch or "all")]
        relative, rate = column(keys, "relative"), column(keys, "rate")
        for words, name in {"of steps": "relative", "of 10 links": "paths"}.items():
            gap = column(keys, name)
            slow, fast = (effect(gap[:, i] / gap[:, j]) for i, j in ((-3, 0), (-1, -3)))
            verdicts.append([*group, words, verdict(slow, 2, 1.1), verdict(fast, 1, 1)])
        whole = np.atleast_1d(np.isfinite(relative).all(axis=0))
        for words, few in {"all": len(RATES), "below .5": -1}.items():
            fitted = np.flatnonzero(whole[:few])
            fits = [
                experiments.exponent(rate[:, fitted], column(keys, x)[:, fitted]) for x in NAMES
            ]
            exponents.append([*group, words, *map(str, fits)])
        points = [""] * (5 - relative.shape[1]) + [str(effect(x)) for x in relative.T]
        sharp = effect(column(keys, "sharpness")[:, -1])
        gaps.append([*group, *points, str(sharp), str((~np.isfinite(relative)).sum())])
        for i in (0, -1):
            names = ("temporal", "geometric", *VIEWS, "noise")
            cells = [str(effect(column(keys, x)[:, i])) for x in names]
            views.append([*group, f"{np.mean(rate[:, i]):.2g}", *cells])
    titles = (
        "Verdicts, on the ratio of relative gaps 1 - W2²/Σ",
        "Exponents in η, of the steps as made",
        "Relative gap 1 - W2²/Σ of the steps as made",
        "Its two parts, and the relative gap of 10 links by what is seen of the members",
    )
    return dict(zip(titles, (verdicts, exponents, gaps, views), strict=True))


def draw(results: dict[Any, Any]) -> matplotlib.figure.Figure:
    """Relative gaps above, and the numbers of the full-batch MLP below, against the rate."""
    figure = matplotlib.figure.Figure(figsize=(9.5, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    clean(*panels.flat)
    for (clock, model, batch), keys in results.items():
        above, below = panels[:, list(CLOCKS).index(clock)]
        rate = column(keys, "rate").mean(axis=0)
        color = COLORS[2 * (model == "CNN") + bool(batch)]
        style = {"color": color, "marker": "os"[bool(batch)], "ls": "-" if model == "MLP" else "--"}
        label = f"{model}, {f'batch {batch}' if batch else 'full batch'}"
        experiments.curve(above, rate, column(keys, "relative"), label=label, **style)
        if (model, batch) == ("MLP", None):
            for (name, words), color in zip(NAMES.items(), COLORS, strict=False):
                experiments.curve(below, rate, column(keys, name), label=words, color=color)
    for clock, axes in zip(CLOCKS, panels.T, strict=True):
        axes[0].set(title=f"at the same {CLOCKS[clock]}", ylim=(0, 1.02))
        if clock != "loss":
            axes[0].plot(RATES, quadratic(clock), "k:", label="quadratic, exact")
        axes[1].set(xscale="log", yscale="log", xlabel="learning rate η a step (θ² per nat)")
        axes[1].set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    panels[0, 0].set_ylabel("relative gap 1 - W2²/Σ")
    panels[1, 0].set_ylabel("MLP, full batch (θ²; D: nats)")
    # Where the last panel is empty.
    shown = panels[0, 0].get_legend_handles_labels()
    panels[0, 2].legend(*shown, fontsize=8, frameon=False, loc="center right")
    panels[1, 0].legend(fontsize=8, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = experiments.parser(str(__doc__).splitlines()[0]).parse_args(argv)
    smoke, page = arguments.smoke, experiments.Page("sweep", arguments, seed=20)
    models, keys = ["MLP"] if smoke else list(networks.MODELS), range(20, 22 if smoke else 26)
    # The longest first, so that no process is left alone with them.
    groups = [
        (clock, model, batch) for clock in list(CLOCKS)[::-1] for model in models[::-1]
        for batch in (None, 32)
    ]  # fmt: skip
    names: Any = ("clock", "model", "batch", "seed", "smoke")
    tasks = [dict(zip(names, (*one, seed, smoke), strict=True)) for one in groups for seed in keys]
    done = experiments.each(runs, tasks, arguments)
    parts = {group: done[i * len(keys) :][: len(keys)] for i, group in enumerate(groups)}
    content = [{"group": group, "keys": part} for group, part in parts.items()]
    page.write(tables(parts), draw(parts), {"groups": content})


if __name__ == "__main__":
    main()
