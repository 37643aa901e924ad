"""Count how often 95 % intervals cover Σ, W2² and the gap of an Ornstein-Uhlenbeck process.

    python scripts/coverage.py [--smoke] [--out FILE.json] [--repetitions 400] [--only NAMES]

Each row names an estimator and its estimand: the numbers of the exact laws of the simulated map
(Euler-Maruyama with K steps), for a chain with the chain's own links. A coverage of 95 % has an
error of 1.1 % over 400 repetitions, so a correct interval covers 92 to 98 %. Raw estimates of few
members in several dimensions carry a bias of the order of their error; that they fail is part of
the table.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import timing

import esljax as esl

K, J, TIME, TEMPERATURE, SHIFT = 100, 20, 1.0, 0.1, 2.0


def truth(d: int) -> dict[str, float]:
    """Return the numbers of the exact laws N(m_k, S_k); only the first coordinate has a mean."""
    h = TIME / K
    mean = SHIFT * (1 - h) ** np.arange(K + 1)
    variance = np.empty(K + 1)
    variance[0] = 1.0
    for k in range(K):
        variance[k + 1] = (1 - h) ** 2 * variance[k] + 2 * TEMPERATURE * h
    root = np.sqrt(variance)

    def squared(i, j):
        return (mean[j] - mean[i]) ** 2 + d * (root[j] - root[i]) ** 2

    at = np.arange(0, K + 1, K // J)
    rate = mean**2 + d * (root - TEMPERATURE / root) ** 2
    chain, whole = J * sum(squared(i, j) for i, j in itertools.pairwise(at)), squared(0, K)
    # The integrand is smooth: its mean over the midpoints of the steps.
    velocity = TIME**2 * float(np.mean((rate[1:] + rate[:-1]) / 2))
    return {"chain": chain, "velocity": velocity, "w2_squared": whole}


def cases(n: int, d: int, chosen: Sequence[str]) -> list[tuple[str, esl.AbstractTransport, Any]]:
    """Return the cases whose names begin with one of `chosen`.

    Laws are Gaussian, so every velocity may stand beside the Bures distance.
    """
    known = [
        ("Gaussian chain", esl.GaussianTransport(), None),
        ("affine velocity", esl.GaussianTransport(), esl.AffineVelocity()),
        ("kernel velocity", esl.GaussianTransport(), esl.KernelVelocity()),
        ("kde velocity", esl.GaussianTransport(), esl.KDEVelocity()),
        # Smaller and quicker than the default: 400 repetitions take minutes rather than hours.
        (
            "network velocity (width 16, 100 iterations)",
            esl.GaussianTransport(),
            esl.NetworkVelocity(key=jax.random.key(0), width=16, iterations=100),
        ),
    ]
    if d == 1 or n <= 50:
        known.append(("exact chain", esl.ExactTransport(), None))
    if d <= 3:
        known.append(("histogram velocity", esl.GaussianTransport(), esl.HistogramVelocity()))
    return [case for case in known if any(case[0].startswith(name) for name in chosen)]


def rows(
    name: str, d: int, velocity: Any, report: esl.SpeedLimit
) -> list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray, float]]:
    """Return name, quantity, estimates, lower and upper ends (repetitions,), and the estimand."""
    exact = truth(d)
    sigma = exact["chain" if velocity is None else "velocity"]
    gap = sigma - exact["w2_squared"]
    wanted = {
        "entropy_production": sigma,
        "w2_squared": exact["w2_squared"],
        "gap": exact["velocity"] - exact["w2_squared"],
    }
    if velocity is None:
        wanted |= {
            "debiased_entropy_production": exact["chain"],
            "debiased_w2_squared": exact["w2_squared"],
            "debiased_gap": gap,
        }
    else:
        del wanted["w2_squared"]
    table = []
    for number, value in wanted.items():
        interval = report.interval(number)
        table.append(
            (
                name,
                number,
                np.asarray(getattr(report, number)),
                np.asarray(interval.lower),
                np.asarray(interval.upper),
                value,
            )
        )
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=400, help="repetitions of every case")
    parser.add_argument(
        "--only",
        default="Gaussian,affine,exact",
        help="the rows to print, by how their names begin, with commas between",
    )
    arguments = parser.parse_args(argv)
    repetitions, sizes = (6, (12,)) if arguments.smoke else (arguments.repetitions, (50, 200))
    potential, rule = esl.Quadratic(1.0), esl.Langevin(TIME / K, TEMPERATURE)
    table = []
    print(
        f"{'d':>2}{'n':>5}  {'estimator':<45}{'number':<30}{'truth':>9}{'mean':>9}"
        f"{'bias/error':>12}{'width':>8}{'coverage':>10}"
    )
    for d in (1, 5):
        for n in sizes:
            for name, transport, velocity in cases(n, d, arguments.only.split(",")):

                @eqx.filter_jit
                def reports(keys, d=d, n=n, transport=transport, velocity=velocity):
                    def one(key):
                        start = (
                            jax.random.normal(jax.random.fold_in(key, 0), (n, d))
                            + SHIFT * jnp.eye(d)[0]
                        )
                        path = esl.simulate(
                            potential,
                            rule,
                            start,
                            steps=K,
                            snapshots=J,
                            key=jax.random.fold_in(key, 1),
                        )
                        given = (
                            {}
                            if velocity is None
                            else {"velocity": velocity, "potential": potential}
                        )
                        return esl.speed_limit(path, transport=transport, debias=True, **given)

                    return jax.lax.map(one, keys)

                report = reports(jax.random.split(jax.random.key(10 * d + n), repetitions))
                for estimator, number, values, lower, upper, value in rows(
                    name, d, velocity, report
                ):
                    row = {
                        "d": d,
                        "n": n,
                        "estimator": estimator,
                        "number": number,
                        "truth": value,
                        "mean": float(values.mean()),
                        "bias": float((values.mean() - value) / values.std(ddof=1)),
                        "coverage": float(np.mean((lower <= value) & (value <= upper))),
                        "width": float(np.mean(upper - lower)),
                    }
                    table.append(row)
                    mark = "" if 0.92 <= row["coverage"] <= 0.98 else "  *"
                    print(
                        f"{d:>2}{n:>5}  {estimator:<45}{number:<30}{value:>9.4f}{row['mean']:>9.4f}"
                        f"{row['bias']:>12.2f}{row['width']:>8.3f}"
                        f"{100 * row['coverage']:>8.1f} %{mark}",
                        flush=True,
                    )
    timing.write(arguments.out, {"coverage": table, "repetitions": repetitions})
    return {"coverage": table}


if __name__ == "__main__":
    main()
