"""Compare the rate σ of entropy production by every velocity estimator with the truth.

    python scripts/velocity_accuracy.py [--smoke] [--out FILE.json]

Ornstein-Uhlenbeck (k = 1, T = .1, from N(2e₁, I)) at several learning times, two modes that
diffuse, and stationary circulation, from fresh members of the exact law. Each row is one estimate
with its standard error, its ratio to the truth, and the bound that it claims. The row `true
velocity` averages the exact velocity over the same members: its error is that of their number
alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import timing

import esljax as esl

# Every estimator that works on one snapshot; a new one joins by one row.
ESTIMATORS: dict[str, Callable[[bool], esl.AbstractVelocity]] = {
    "affine": lambda smoke: esl.AffineVelocity(),
    "kernel": lambda smoke: esl.KernelVelocity(landmarks=20 if smoke else 200),
    "kde": lambda smoke: esl.KDEVelocity(),
    "histogram": lambda smoke: esl.HistogramVelocity(),
    "flow": lambda smoke: esl.FlowVelocity(jax.random.key(0), steps=5 if smoke else 1000),
    "network": lambda smoke: esl.NetworkVelocity(
        key=jax.random.key(0), iterations=20 if smoke else 400
    ),
}


def cases(n: int, smoke: bool) -> Iterator[tuple[str, Any, Any, Any, Any, float]]:
    """Yield name, positions, drift, diffusion, exact velocity and σ of each case."""
    rng = np.random.default_rng(0)
    for d in (1, 2) if smoke else (1, 2, 10):
        for u in (0.0,) if smoke else (0.0, 0.5, 1.0):
            variance, mean = 0.1 + 0.9 * np.exp(-2 * u), 2 * np.exp(-u)
            centered = np.sqrt(variance) * rng.normal(size=(n, d))
            x = centered + mean * np.eye(d)[0]
            yield (
                f"Ornstein-Uhlenbeck, d = {d}, u = {u:g}",
                x,
                -x,
                0.1,
                0.1 * centered / variance - x,
                mean**2 + d * (0.1 - variance) ** 2 / variance,
            )
    x = rng.normal(size=(n, 1)) / 2 + rng.choice([-2.0, 2.0], (n, 1))
    yield "two modes, free diffusion", x, 0 * x, 1.0, (x - 2 * np.tanh(8 * x)) / 0.25, 3.993714
    x = rng.normal(size=(n, 2)) * 0.5**0.5
    turn = np.array([[0.0, -2.0], [2.0, 0.0]])
    yield "rotation in a trap", x, x @ turn.T - x, 0.5, x @ turn.T, 4.0
    # H C + C Hᵀ = 2D, and v = (D C⁻¹ - H) θ.
    hessian, noise = np.array([[2.0, 0.5], [0.5, 1.0]]), np.diag([0.3, 0.1])
    identity = np.eye(2)
    covariance = np.linalg.solve(
        np.kron(hessian, identity) + np.kron(identity, hessian), 2 * noise.ravel()
    ).reshape(2, 2)
    x = rng.normal(size=(n, 2)) @ np.linalg.cholesky(covariance).T
    slope = noise @ np.linalg.inv(covariance) - hessian
    yield (
        "stochastic gradients at rest",
        x,
        -x @ hessian.T,
        noise,
        x @ slope.T,
        float(np.trace(slope @ covariance @ slope.T)),
    )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    members, rows = 60 if arguments.smoke else 2000, []
    print(f"{'case':<36}{'estimator':<14}{'σ':>10}{'error':>10}{'truth':>10}{'ratio':>8}  bound")
    for case, x, drift, diffusion, exact, truth in cases(members, arguments.smoke):
        sample = float(np.mean(np.sum(exact**2, axis=1)))
        rows.append(
            {
                "case": case,
                "estimator": "true velocity",
                "sigma": sample,
                "truth": truth,
                "ratio": sample / truth,
            }
        )
        print(
            f"{case:<36}{'true velocity':<14}{sample:>10.4g}{'':>10}"
            f"{truth:>10.4g}{sample / truth:>8.3f}"
        )
        for name, make in ESTIMATORS.items():
            if name == "histogram" and x.shape[1] > 3:
                continue
            velocity = make(arguments.smoke)(
                x.astype(np.float32), drift.astype(np.float32), np.float32(diffusion)
            )
            sigma, error = float(velocity.squared), float(velocity.standard_error.squared)
            row = {
                "case": case,
                "estimator": name,
                "sigma": sigma,
                "standard_error": error,
                "truth": truth,
                "ratio": sigma / truth,
            }
            rows.append({**row, "bound": velocity.bound})
            print(
                f"{case:<36}{name:<14}{sigma:>10.4g}{error:>10.2g}"
                f"{truth:>10.4g}{sigma / truth:>8.3f}  {velocity.bound}",
                flush=True,
            )
    timing.write(arguments.out, {"members": members, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
