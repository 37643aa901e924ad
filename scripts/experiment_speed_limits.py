"""Do trained networks follow the speed-limit law of linear models, and with which exponent?

    python scripts/experiment_speed_limits.py [--smoke] [--processes 2] [--folder FOLDER]

THE LAW (Seroussi, Alemi, Helias and Ringel, arXiv 2307.14653). Gradient flow of a linear model with
curvatures λ_k = k^-α and squared residuals r_k² = k^-δ. With a = (1-δ)/α in (0, 1)

    Σ/W2² = 2^a (1+a)/(4 (2^a-1)),    Σ/L² = (1+a)²/(4a),    L²/W2² = a 2^a/((1+a)(2^a-1)).

Derivation: D = ½ Σ_k r_k² (1 - e^{-2λ_k t}) and W2² = Σ_k r_k² (1 - e^{-λ_k t})²/λ_k. With many
modes the sums are integrals over λ^{-a-1} dλ; by λ → λ/t, D is t^a and W2² is t^{1+a} times a
number, and Σ = tD. D ∝ t^a alone gives Σ/L². The limit is one in the middle, λ_1 t → ∞ and λ_N t →
0: some modes are long done and others not begun. A cut spectrum lacks (λ_1 t)^-a at the top and
(λ_N t)^(1-a) at the bottom.

A, EXACT. To be reproduced to 1e-3: `speed_limit` on the exact path of modes with λt from 1/c to c,
and `gaussian.speed_limit`, which integrates the equations, where its panels allow it (c = 64).

B, NETWORKS. Hypothesis: trained networks follow the law with a fitted a. 16 members, MLP 64-16-10
or a small CNN, 400 digits, full batch, T = 0, squared error (the setting of the law) or cross
entropy; 1000 steps of ηλ = .1, λ the sharpness at the start, so that λ_1 t reaches 100; 8 keys.
Members' paths, of all steps. a is fitted to Σ/L² of the whole run (the root a ≤ 1). Decides: the
measured L²/W2² over that of the law at this a (1 within .02 for the cut law itself, as A shows, so
the cut does not decide). Confirmed if the 95 % t-interval over keys lies within .95 to 1.05,
refuted if outside, undecided otherwise. Beside it the growth of D over the last decade,
d log D/d log t, which the law says is a as well.

C, OWN SPECTRA. Which a do they give? The Gauss-Newton matrix of the loss at initialization, with
the eigenvalues of the NTK, of 2 members a key: λ_k, r_k² = (u_k·∇Φ)²/λ_k, and α, δ by regression
on log k over the modes with λ_k t > .1 at the end. Decides: whether the interval of a(spectrum) -
a(fitted) holds 0. The linear model itself, with this spectrum and no power law, is trained as many
steps by `gaussian.descent`: measured over linear ratios, paired, show what the change of the kernel
adds.
"""

from collections.abc import Sequence
from typing import Any

import experiments
import jax
import jax.numpy as jnp
import matplotlib.figure
import networks
import numpy as np
from experiments import column, effect
from scipy.optimize import brentq

import esljax as esl
from esljax.figures.style import COLORS, clean

AT = (10, 33, 100, 333, 1000)
EXPONENTS, CUTS = (0.3, 0.5, 0.8), (64.0, 1e4, 1e6, 1e8, 1e12)


def law(a: Any) -> tuple[Any, Any]:
    """Σ/L² and L²/W2² of the law."""
    return (1 + a) ** 2 / (4 * a), a * 2**a / ((1 + a) * (2**a - 1))


def fitted(timing: float) -> float:
    """The exponent a ≤ 1 whose Σ/L² is `timing`; NaN has none."""
    return float(brentq(lambda a: law(a)[0] - timing, 1e-9, 1)) if timing > 1 else timing**0  # pyright: ignore


def ratios(report: Any) -> dict[str, float]:
    sigma, length, w2 = report.entropy_production, report.length_squared, report.w2_squared
    return {"total": sigma / w2, "timing": sigma / length, "bend": length / w2}


def exact(a: float, cut: float, snapshots: int, panels: int = 0) -> dict[str, float]:
    """Ratios for modes with λt from 1/cut to cut: of snapshots of the exact path, or of the flow.

    Modes lie in equal steps of log λ: the trapezoid rule of the integral, exact to 1e-10.
    """
    with jax.enable_x64(True):
        curvature = np.exp(np.arange(-np.log(cut), np.log(cut), 0.25))
        size = np.sqrt(curvature ** (-a - 1))
        if panels:
            start = esl.gaussian.Law(size, np.zeros(2 * size.shape))
            flow, rule = esl.Quadratic(curvature), esl.Langevin(1.0)
            report = esl.gaussian.speed_limit(start, flow, rule, steps=1, panels=panels)
        else:
            times = np.append(0.0, np.geomspace(1e-3 / cut, 1, snapshots))
            moved = -size * np.expm1(-np.outer(times, curvature))
            # Two members, on mirrored paths.
            path = esl.from_snapshots(np.stack([moved, -moved], axis=1), times)
            report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)
        return {name: float(value) for name, value in ratios(report).items()}


def network(model: str, squares: bool, seed: int, smoke: bool) -> dict[str, Any]:
    """One ensemble along its run, and the linear models of two of its members."""
    potential = networks.loss(model, 40 if smoke else 400, squares=squares)
    steps = AT[-1] // (10 if smoke else 1)
    ends = np.maximum(np.array(AT) * steps // AT[-1], 2)
    problem = esl.Problem(potential, members=4 if smoke else 16, steps=steps, snapshots=steps)
    key = jax.random.key(seed)
    start = problem.positions(jax.random.split(key)[0])
    rate = 0.1 / float(networks.sharpness(potential, start))
    path = problem.path(rate, key)
    transport = esl.ExactTransport()
    report = esl.speed_limit(path, transport=transport, jackknife=0)
    before, after = (float(potential(path.positions[k]).mean()) for k in (0, -1))
    w2 = [transport.squared(path.positions[0], path.positions[k]) for k in ends]
    rows = along(report, ends, w2)
    models = [linear(potential, member, rate, steps, ends) for member in start[:2]]
    for i, row in enumerate(rows):
        for name in ("timing", "bend"):
            row[f"linear {name}"] = float(np.mean([one["rows"][i][name] for one in models]))
    spectra = {x: float(np.mean([one[x] for one in models])) for x in ("alpha", "delta", "a")}
    about = {"D over drop": float(report.dissipation) / (before - after), "loss": after}  # pyright: ignore
    return {"rows": rows, **spectra, **about, "models": models}


def along(report: Any, ends: np.ndarray, w2: Any) -> list[dict[str, float]]:
    """The ratios of the run up to each end, and the growth of D over the decade before it."""
    moved = np.asarray(report.speed * report.elapsed, float)
    action, length = np.cumsum(moved**2)[ends - 1], np.cumsum(moved)[ends - 1]
    before = np.cumsum(moved**2)[np.maximum(ends // 10, 1) - 1]
    total, bend = ends * action / np.asarray(w2, float), length**2 / np.asarray(w2, float)
    growth = np.log(action / before) / np.log(ends / np.maximum(ends // 10, 1))
    names = ("total", "timing", "bend", "growth")
    columns = (total, total / bend, bend, growth)
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def linear(potential: Any, member: jax.Array, rate: float, steps: int, ends: np.ndarray) -> Any:
    """The Gauss-Newton spectrum of one member, its exponents, and a run of its linear model."""

    def outputs(position):
        return potential.predict(position, potential.inputs)

    def of_example(output, label):
        return potential.loss(output[None], label[None])[0]

    jacobian, place = jax.jacfwd(outputs)(member), outputs(member)
    block = jax.vmap(jax.hessian(of_example))(place, potential.labels)
    slope = jax.vmap(jax.grad(of_example))(place, potential.labels)
    matrix = jnp.einsum("mid,mij,mje->de", jacobian, block, jacobian) / len(place)
    gradient = jnp.einsum("mid,mi->d", jacobian, slope) / len(place)
    curvature, vectors = np.linalg.eigh(np.asarray(matrix, float))
    force, used = vectors.T @ np.asarray(gradient, float), curvature > 1e-7 * curvature[-1]
    curvature, force = curvature[used][::-1], force[used][::-1]
    start, rule = esl.gaussian.Independent(force / curvature, 0.0), esl.Langevin(rate)
    run = esl.gaussian.descent(start, esl.Quadratic(curvature), rule, steps=steps)
    means = np.asarray(run.laws.mean, float)
    rows = along(run.report, ends, np.sum((means[ends] - means[0]) ** 2, axis=1))
    begun = curvature * rate * steps > 0.1
    ranks, residual = np.log(np.arange(1, begun.sum() + 1)), force**2 / curvature
    alpha, delta = (-np.polyfit(ranks, np.log(x[begun]), 1)[0] for x in (curvature, residual))
    exponents = {"alpha": float(alpha), "delta": float(delta), "a": float((1 - delta) / alpha)}
    return {**exponents, "rows": rows, "curvature": (curvature * rate * steps)[begun].tolist()}


def tables(checks: dict[Any, Any], flows: dict[float, Any], groups: dict[Any, Any]) -> Any:
    first = [["a", "modes with λt", "Σ/W2²", "Σ/L²", "L²/W2²", "Σ/W2² over the law"]]
    first[0].append("L²/W2² over that of the fitted a")
    for a in EXPONENTS:
        timing, bend = law(a)
        cells = [f"{x:.5f}" for x in (timing * bend, timing, bend)]
        first.append([f"{a}", "the law", *cells, "", ""])
        rows = {f"{c:.0e}" if c > 64 else "64": checks[a, c] for c in CUTS}
        rows |= {"64, integrated": flows[a]}
        for name, row in rows.items():
            cells = [f"{row[x]:.5f}" for x in ("total", "timing", "bend")]
            over = row["total"] / timing / bend, row["bend"] / law(fitted(row["timing"]))[1]
            first.append([f"{a}", f"1/c to c = {name}", *cells, *(f"{x:.5f}" for x in over)])
    second = [["network", "loss", "Σ/W2²", "Σ/L²", "L²/W2²", "fitted a", "L²/W2² over the law's",
               "growth of D", "D over the drop of Φ", "final loss"]]  # fmt: skip
    third = [["network", "loss", "α", "δ", "a of the spectrum", "less the fitted a",
              "Σ/L² over linear", "L²/W2² over linear"]]  # fmt: skip
    for (model, squares), keys in groups.items():
        name = [model, "squared error" if squares else "cross entropy"]
        ends = {x: column(keys, x)[:, -1] for x in keys[0]["rows"][0]}
        own = {
            x: np.array([key[x] for key in keys])
            for x in ("alpha", "delta", "a", "loss", "D over drop")
        }
        a = np.array([fitted(x) for x in ends["timing"]])
        ratio = effect(ends["bend"] / law(a)[1])
        inside = ratio.low > 0.95 and ratio.high < 1.05
        outside = ratio.low > 1.05 or ratio.high < 0.95
        word = "confirmed" if inside else "refuted" if outside else "undecided"
        cells = [effect(ends[x]) for x in ("total", "timing", "bend")]
        others = [effect(x) for x in (ends["growth"], own["D over drop"], own["loss"])]
        second.append(
            [*name, *map(str, cells), str(effect(a)), f"{ratio}: {word}", *map(str, others)]
        )
        less = effect(own["a"], a)
        same = "not told apart" if less.low < 0 < less.high else "differs"
        cells = [str(effect(own[x])) for x in ("alpha", "delta", "a")]
        changes = [str(effect(ends[x] / ends[f"linear {x}"])) for x in ("timing", "bend")]
        third.append([*name, *cells, f"{less}: {same}", *changes])
    titles = ("A: the law, by the package", "B: networks after 1000 steps", "C: their own spectra")
    return dict(zip(titles, (first, second, third), strict=True))


def draw(checks: dict[Any, Any], groups: dict[Any, Any]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(10, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    clean(left, middle, right)
    for a, color in zip(EXPONENTS, COLORS, strict=False):
        miss = [abs(checks[a, c]["total"] / np.prod(law(a)) - 1) for c in CUTS]
        left.loglog(CUTS, miss, "o", color=color, label=f"a = {a}")
        order = min(a, 1 - a)
        left.loglog(CUTS, miss[1] * (np.array(CUTS) / CUTS[1]) ** -order, ":", color=color)
    left.axhline(1e-3, color="0.7", lw=0.8)
    left.set(xlabel="cut c: modes with λt from 1/c to c", ylabel="|Σ/W2² over the law - 1|")
    left.set_title("A: dotted, c to the power -min(a, 1-a)", fontsize=10)
    line = np.linspace(0.08, 1, 100)
    middle.plot(*law(line), "k", lw=1)
    for a in (0.1, 0.2, 0.3, 0.5, 1.0):
        middle.plot(*law(a), "k.", ms=4)
        middle.annotate(f"a = {a}", law(a), fontsize=7, xytext=(4, -8), textcoords="offset points")
    for i, ((model, squares), keys) in enumerate(groups.items()):
        label = f"{model}, {'squared error' if squares else 'cross entropy'}"
        x, y = ([effect(one) for one in column(keys, name).T] for name in ("timing", "bend"))
        bars = {"xerr": [one.bar for one in x], "yerr": [one.bar for one in y]}
        means = [one.mean for one in x], [one.mean for one in y]
        middle.errorbar(*means, **bars, fmt="o-", ms=4, lw=1, capsize=2, color=COLORS[i])
        flat = (column(keys, f"linear {name}").mean(axis=0) for name in ("timing", "bend"))
        middle.plot(*flat, ":x", color=COLORS[i], lw=1, ms=4)
        experiments.curve(
            right, np.array(AT) / 10, column(keys, "total"), color=COLORS[i], label=label
        )
    middle.set(xlabel="temporal, Σ/L²", ylabel="geometric, L²/W2²")
    middle.set_title("B: networks, crosses: their linear models", fontsize=10)
    right.set(xscale="log", xlabel="λt, with the sharpness λ of the start", ylabel="Σ/W2²")
    left.legend(fontsize=8, frameon=False)
    right.legend(fontsize=8, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = experiments.parser(str(__doc__).splitlines()[0]).parse_args(argv)
    smoke, page = arguments.smoke, experiments.Page("speed_limits", arguments, seed=20)
    keys = range(20, 22 if smoke else 28)
    groups = [(m, s) for m in (["MLP"] if smoke else networks.MODELS) for s in (True, False)]
    tasks = [
        {"model": m, "squares": s, "seed": seed, "smoke": smoke} for m, s in groups for seed in keys
    ]
    cases = [(a, c) for a in EXPONENTS for c in CUTS]
    snapshots = 500 if smoke else 4000
    done = experiments.each(network, tasks, arguments)
    paths = experiments.each(
        exact, [{"a": a, "cut": c, "snapshots": snapshots} for a, c in cases], arguments
    )
    panels = [{"a": a, "cut": 64.0, "snapshots": 0, "panels": 64} for a in EXPONENTS]
    flows = dict(zip(EXPONENTS, experiments.each(exact, panels, arguments), strict=True))
    checks = dict(zip(cases, paths, strict=True))
    parts = {group: done[i * len(keys) :][: len(keys)] for i, group in enumerate(groups)}
    content = {"law": [[*case, row] for case, row in checks.items()], "flow": flows}
    content["networks"] = [{"group": group, "keys": part} for group, part in parts.items()]  # pyright: ignore
    page.write(tables(checks, flows, parts), draw(checks, parts), content)


if __name__ == "__main__":
    main()
