"""One-sided centered W2²: do W(X, Y') - W(X, X') and W(X, Y') - W(Y, Y') bracket the truth?

    python scripts/centered_values.py [--smoke] [--out FILE.json]

After Papp and Sherlock (arXiv 2203.11627), for laws whose W2² is known. X, X' are n members of the
start each and Y, Y' of the end, all independent; Y is wider in most systems. The last column is the
share of repetitions in which the truth lies between both values, which an error bar of one standard
error would make 68 %.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

import esljax as esl

D = 10
# Shift and standard deviations of the end; the start is N(0, I).
NORMAL = {
    "shifted": (np.full(D, 1.0), np.ones(D)),
    "wider": (np.zeros(D), np.full(D, 2.0)),
    "shifted and wider": (np.full(D, 1.0), np.full(D, 1.5)),
    "half wider, half narrower": (np.zeros(D), np.array([2.0, 0.5] * (D // 2))),
}
# Hidden units with numbers of their own, which are twice as wide at the end.
UNITS, NUMBERS, WIDER = 8, 3, 2.0


def systems() -> dict[str, tuple[esl.AbstractTransport, Callable[[Any, Any], Any], float, int]]:
    """The transport, the end from standard normal members, the true W2², and numbers a member."""
    exact, found = esl.ExactTransport(), {}
    for name, (shift, widths) in NORMAL.items():
        truth = float(np.sum(shift**2) + np.sum((widths - 1) ** 2))
        found[name] = (exact, lambda z, a=shift, s=widths: a + s * z, truth, D)
    symmetry = esl.symmetry.permutations(
        {"hidden": [("units", 0)]}, signs=("hidden",), keys={"units": (UNITS, NUMBERS)}
    )
    numbers = UNITS * NUMBERS
    truth = numbers * (WIDER - 1) ** 2

    def end(z):
        return WIDER * z

    found["units, plain"] = (exact, end, truth, numbers)
    found["units, modulo symmetry"] = (
        esl.QuotientTransport(exact, symmetry),
        end,
        truth,
        numbers,
    )
    return found


def centered(
    transport: esl.AbstractTransport, end: Callable[[Any], Any], n: int, d: int, repetitions: int
) -> np.ndarray:
    """The lower, the upper and the debiased value of each repetition, shape (repetitions, 3)."""

    @jax.jit
    def values(key):
        x, x2, y, y2 = jax.random.normal(key, (4, n, d))
        y, y2 = end(y), end(y2)
        across, of_x, of_y = (transport.squared(a, b) for a, b in ((x, y2), (x, x2), (y, y2)))
        return jnp.stack([across - of_y, across - of_x, across - of_x / 2 - of_y / 2])

    keys = jax.random.split(jax.random.key(0), repetitions)
    return np.stack([np.asarray(values(key)) for key in keys])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    sizes, repetitions = ((8,), 3) if arguments.smoke else ((32, 128), 100)
    table: dict[str, Any] = {}
    print("| laws | n | truth | minus W(Y, Y') | minus W(X, X') | debiased | truth between |")
    print("|---|---|---|---|---|---|---|")
    for name, (transport, end, truth, d) in systems().items():
        for n in sizes:
            found = centered(transport, end, n, d, repetitions)
            means, errors = found.mean(axis=0), found.std(axis=0, ddof=1) / repetitions**0.5
            within = float(np.mean((found[:, 0] <= truth) & (truth <= found[:, 1])))
            cells = (f"{m:.2f} ± {e:.2f}" for m, e in zip(means, errors, strict=True))
            print(f"| {name} | {n} | {truth:g} | {' | '.join(cells)} | {within:.0%} |", flush=True)
            names = ("lower", "upper", "debiased")
            table.setdefault(name, {})[str(n)] = {
                "truth": truth,
                "within": within,
                **dict(zip(names, map(float, means), strict=True)),
            }
    numbers = {"table": table}
    timing.write(arguments.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
