"""The front of loss and Σ of noisy quadratics, exactly: which learning rate is best, and why.

    python scripts/exact_front.py [--smoke] [--out FILE.json] [--figure FILE.png]

Spectra are k_i = i^-a with noise of batches C = c diag(k), members start at one place, and Σ is
that of K steps. Beside each point of the front stands the best of each usual shape at the same
weight: how much higher log loss + λ log Σ is at its own best peak.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import timing

import esljax as esl

SHAPES: dict[str, Callable[[Any], esl.AbstractSchedule]] = {
    "constant": esl.Constant,
    "cosine": esl.Cosine,
    "linear_decay": lambda peak: esl.Linear(peak, 0.0),
    "warmup_stable_decay": esl.WarmupStableDecay,
}


def of_shapes(start: Any, potential: esl.Quadratic, steps: int, weights: Any) -> dict[str, Any]:
    """The least log loss + λ log Σ of each usual shape over its peak, for every weight λ."""
    peaks = jnp.geomspace(0.01, 2, 200)

    @eqx.filter_jit
    def numbers(shape):
        def at(peak):
            rule = esl.Langevin(shape(peak))
            run = esl.gaussian.descent(start, potential, rule, steps=steps)
            return jnp.log(run.final_loss), jnp.log(run.entropy_production)

        return jax.lax.map(at, peaks)

    least = {}
    for name, shape in SHAPES.items():
        loss, sigma = (np.asarray(x) for x in numbers(shape))
        values = loss + np.asarray(weights)[:, None] * sigma
        # A run that does not move has Σ = 0, so the minimum is that beyond the last maximum.
        inside = (values[:, 1:-1] < values[:, :-2]) & (values[:, 1:-1] < values[:, 2:])
        least[name] = np.where(inside, values[:, 1:-1], np.inf).min(axis=1)
    return least


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("The front of loss and Σ of noisy quadratics, exactly.")
    parser.add_argument("--figure", type=Path, help="where to draw the schedules of the fronts")
    arguments = parser.parse_args(argv)
    smoke = arguments.smoke
    modes, steps, weights = (6, 20, [0.2, 0.4]) if smoke else (100, 400, [0.1, 0.15, 0.2, 0.3, 0.4])
    rows = []
    for power, noise in [(1.0, 1.0)] if smoke else [(1.0, 0.1), (1.0, 1.0), (1.5, 1.0), (0.8, 1.0)]:
        spectrum = jnp.arange(1.0, modes + 1) ** -power
        start = esl.gaussian.Independent(jnp.ones(modes), 0.0)
        potential = esl.Quadratic(spectrum, gradient_noise=noise * spectrum)
        began = time.perf_counter()
        front = jax.block_until_ready(
            esl.gaussian.front(start, potential, steps=steps, weights=weights)
        )
        seconds = time.perf_counter() - began
        size = f"{modes} modes, {steps} steps, {seconds:.1f} s"
        print(f"k = i^-{power:g}, C = {noise:g} diag(k): {size}")
        print(front)
        objective = np.log(front.final_loss) + np.asarray(weights) * np.log(
            front.entropy_production
        )
        above = {
            name: least - objective
            for name, least in of_shapes(start, potential, steps, weights).items()
        }
        lines = [("λ", *above), *_lines(weights, above)]
        print("log loss + λ log Σ above the front, each shape at its best peak")
        print(esl.results.table(lines, "r" * len(lines[0])), end="\n\n")
        rows.append(
            {
                "power": power,
                "noise": noise,
                "seconds": seconds,
                "weights": list(map(float, weights)),
                "final_loss": front.final_loss.tolist(),
                "entropy_production": front.entropy_production.tolist(),
                "w2_squared": front.w2_squared.tolist(),
                "converged": front.converged.tolist(),
                "rates": front.rates.tolist(),
                "above": {
                    name: [value if np.isfinite(value) else None for value in values.tolist()]
                    for name, values in above.items()
                },
            }
        )
    if arguments.figure is not None:
        draw(rows).savefig(arguments.figure, dpi=150, bbox_inches="tight")
    timing.write(arguments.out, {"fronts": rows})
    return {"fronts": rows}


def _lines(weights: Any, above: dict[str, Any]) -> list[tuple[str, ...]]:
    columns = zip(*above.values(), strict=True)
    return [
        (f"{weight:.2g}", *(f"{value:.3f}" for value in values))
        for weight, values in zip(weights, columns, strict=True)
    ]


def draw(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    """The learning rates along each front, from low to high loss."""
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(rows), 2.6))
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for i, rates in enumerate(row["rates"]):
            if not row["converged"][i]:
                continue
            shade = f"{0.8 * i / len(row['rates']):.2f}"
            loss = row["final_loss"][i]
            axes.plot(np.linspace(0, 1, len(rates)), rates, color=shade, label=f"loss {loss:.3g}")
        axes.set_title(f"k = i^-{row['power']:g}, C = {row['noise']:g} diag(k)", fontsize=9)
        axes.set_xlabel("training time s")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6, frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
