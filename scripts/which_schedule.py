"""Which schedule? The front of loss and Σ on five problems, with every usual family at its best.

    python scripts/which_schedule.py [--smoke] [--out FILE.json] [--folder FOLDER] [--only NAME ...]
        [--processes N]

Eight networks with 16 hidden units, 200 steps, without injected noise: handwritten digits with
batches of 8 and 64 and with all of 144 examples, two moons with batches of 8, and a regression
(diabetes) with batches of 8. All searches of a problem see the same initializations and batches,
and all points are judged on six runs that no search has seen. Beside each front stands the noise of
the batches along the schedule of its knee, as the temperature whose injected noise would spread the
members as fast. Where slopes have no minimum, `esl.front` takes final losses by itself. `--folder`
takes each front, its figure and its schedules, and one figure of all.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from matplotlib.figure import Figure

import esljax as esl


def problems(smoke: bool) -> dict[str, esl.Problem]:
    digits, moons, diabetes = (
        esl.datasets.digits(),
        esl.datasets.two_moons(),
        esl.datasets.diabetes(),
    )
    few = digits._replace(train=type(digits.train)(*(part[:144] for part in digits.train)))
    return {
        "digits, batch 8": _problem(digits, 10, 8, smoke),
        "digits, batch 64": _problem(digits, 10, 64, smoke),
        "digits, all of 144": _problem(few, 10, None, smoke),
        "moons, batch 8": _problem(moons, 2, 8, smoke),
        "diabetes, batch 8": _problem(diabetes, 1, 8, smoke, loss="squared_error"),
    }


def _problem(
    data: Any, outputs: int, batch: int | None, smoke: bool, loss: str = "cross_entropy"
) -> esl.Problem:
    width, members, steps = (4, 3, 20) if smoke else (16, 8, 200)
    model = esl.models.mlp(data.train.inputs.shape[1], width, outputs)
    potential = esl.FlaxLoss(model, data.train, loss=loss, batch_size=batch)
    return esl.Problem(potential, members=members, steps=steps, test=data.test)


def noise_at_knee(problem: esl.Problem, front: esl.Front, key: Any) -> list[float] | None:
    """The lowest and highest noise temperature along the knee's schedule; None without batches."""
    if problem.potential.at_start().draw(key, 1) is None:
        return None
    path = problem.path(front.schedules[front.knee], key)
    noise = esl.minibatch_noise(path, problem.potential, key=jax.random.fold_in(key, 1))
    temperature: Any = noise.temperature
    return [float(jnp.min(temperature)), float(jnp.max(temperature))]


def of_problem(name: str, smoke: bool) -> tuple[esl.Front, list[float] | None, float]:
    """The front of a problem, the noise at its knee, and the seconds that they took."""
    started, problem, families = time.perf_counter(), problems(smoke)[name], esl.usual_families()
    settings: dict[str, Any] = {}
    if smoke:
        families = {"cosine": families["cosine"]}
        settings = {"points": 2, "knots": 3, "iterations": 3, "judge_runs": 2, "rate": 0.3}
    front = esl.front(problem, key=jax.random.key(0), families=families, **settings)
    noise = noise_at_knee(problem, front, jax.random.key(1))
    return front, noise, time.perf_counter() - started


def row(name: str, front: esl.Front, noise: list[float] | None) -> str:
    """A problem in one line of a table: what its best schedule is, and how far others are."""
    rates = np.asarray(front.judgments[front.knee].schedule.values)
    top = rates.max()
    shape = f"{rates[0] / top:.2f} → 1 at s = {rates.argmax() / (rates.size - 1):.2f} → "
    shares = {family: front.share(other) for family, other in front.families.items()}
    known = [
        f"{family.replace('_', ' ')} {share[0]:.2f} ± {share[1]:.2f}"
        if share
        else f"{family.replace('_', ' ')}: no loss in common"
        for family, share in shares.items()
    ]
    spread = "none" if noise is None else f"{noise[0]:.1e} to {noise[1]:.1e}"
    return f"| {name} | {spread} | {shape}{rates[-1] / top:.2f} | {'; '.join(known)} |"


def plot(fronts: Mapping[str, esl.Front]) -> Figure:
    """The rates along each front over their peak: what changes with the noise of the batches."""
    figure = Figure(figsize=(2.3 * len(fronts), 2.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(fronts), sharey=True))
    for panel, (name, front) in zip(axes, fronts.items(), strict=True):
        for i, judgment in enumerate(front.judgments):
            rates = np.asarray(judgment.schedule.values)
            shade = str(0.75 * (1 - i / max(1, len(front.judgments) - 1)))
            panel.plot(np.linspace(0, 1, rates.size), rates / rates.max(), color=shade)
        panel.set_title(name, fontsize="medium")
        panel.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="training time $s$")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[0].set_ylabel("learning rate over its peak")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("The front of loss and Σ on five problems.")
    parser.add_argument("--folder", type=Path, help="where to save the fronts")
    parser.add_argument("--only", nargs="+", help="the names of some problems, such as moons")
    parser.add_argument("--processes", type=int, default=1, help="problems side by side")
    arguments = parser.parse_args(argv)
    names = [
        name
        for name in problems(arguments.smoke)
        if not arguments.only or any(word in name for word in arguments.only)
    ]
    fronts, rows, numbers = {}, [], {}
    solve = functools.partial(of_problem, smoke=arguments.smoke)
    for name, (front, noise, seconds) in zip(
        names, timing.in_processes(solve, names, arguments.processes), strict=True
    ):
        fronts[name] = front
        rows.append(row(name, front, noise))
        numbers[name] = {**front.as_dict(), "noise_temperature": noise, "seconds": seconds}
        print(f"{name}\n{front}\n{rows[-1]}\n{seconds:.0f} s\n", flush=True)
        if arguments.folder is not None:
            front.save(arguments.folder / name.replace(", ", "_").replace(" ", "_"))
        timing.write(arguments.out, numbers)
    if arguments.folder is not None:
        plot(fronts).savefig(arguments.folder / "which_schedule.png", dpi=150)
        head = "| problem | noise temperature | rates at the knee | Σ of the front over that of |"
        lines = [head, "|---|---|---|---|", *rows]
        (arguments.folder / "which_schedule.md").write_text("\n".join(lines) + "\n", "utf-8")
    return numbers


if __name__ == "__main__":
    main()
