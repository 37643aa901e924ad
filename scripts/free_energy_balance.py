"""Check that books of the free energy balance, and that drives of least work need the least.

    python scripts/free_energy_balance.py [--smoke] [--out FILE.json]

First table: every entropy estimator on the Ornstein-Uhlenbeck relaxation from N(2 e₁, I) at T = .1
in one and two dimensions, with D from the affine velocity, which is exact there: D by balance, D
measured, and the residual in standard errors. Second table: the work of moving and stiffening a
trap at T = 1 in unit time, by drives of least work and, for the first, a straight one, beside the
references (Schmiedl and Seifert, PRL 98, 108301 (2007)). The work is exact for the steps of the
run; in 400 steps it lies within .003 of the references.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

import esljax as esl

DISSIPATION = {1: 2.04312999, 2: 2.35693055}
LEAST_WIDTH = (1 + np.sqrt(5)) / 4


def entropies(smoke: bool) -> dict[str, Any]:
    return {
        "Gaussian": esl.density.GaussianEntropy(),
        "along the velocity": esl.density.TransportedEntropy(esl.density.GaussianEntropy()),
        "nearest neighbors": esl.density.NearestNeighborEntropy(),
        "kernels": esl.density.KDEEntropy(),
        "histogram": esl.density.HistogramEntropy(),
        "flow": esl.density.FlowEntropy(jax.random.key(3), steps=5 if smoke else 500),
    }


def drives() -> dict[str, tuple[esl.Driven, float]]:
    """Return potential and reference work of each drive."""

    def moving(center):
        return esl.Quadratic(1.0, center)

    s = jnp.linspace(0, 1, 401)
    speed = LEAST_WIDTH - 1
    width = 1 + speed * s
    return {
        "moving trap, straight": (esl.Driven(moving, esl.Linear(0.0, 5.0)), 9.1969860),
        "moving trap, least": (
            esl.Driven(moving, esl.Linear(5 / 3, 10 / 3), before=0.0, after=5.0),
            25 / 3,
        ),
        "stiffening trap, least": (
            esl.Driven(
                esl.Quadratic,
                esl.Knots((1 - width * speed) / width**2, "linear"),
                before=1.0,
                after=2.0,
            ),
            0.40291836,
        ),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    smoke = arguments.smoke
    members, steps, links = (64, 20, 4) if smoke else (4000, 400, 20)
    balance: dict[str, Any] = {}
    print(
        f"{'entropy':<20}{'d':>3}{'D (exact)':>12}"
        f"{'D by balance':>22}{'D measured':>22}{'residual':>20}"
    )
    for d, exact in list(DISSIPATION.items())[: 1 if smoke else 2]:
        potential, rule = esl.Quadratic(1.0), esl.Langevin(1 / steps, 0.1)
        start = 2 * jnp.eye(d)[0] + jax.random.normal(jax.random.key(1), (members, d))
        path = esl.simulate(
            potential, rule, start, steps=steps, snapshots=links, key=jax.random.key(2)
        )
        for name, entropy in entropies(smoke).items():
            books = esl.free_energy(
                path,
                potential,
                entropy=entropy,
                velocity=esl.AffineVelocity(),
                jackknife=8 if smoke else 32,
            )
            row = {
                key: [float(getattr(books, key)), float(getattr(books.standard_error, key))]
                for key in ROWS
            }
            balance[f"{name}, d = {d}"] = row
            cells = "".join(f"{value:>14.4f} ± {error:.4f}" for value, error in row.values())
            print(f"{name:<20}{d:>3}{exact:>12.4f}{cells}")

    works: dict[str, Any] = {}
    many = members if smoke else 5 * members
    print(
        f"\n{'drive':<28}{'work (reference)':>18}{'work':>20}"
        f"{'Σ':>18}{'W2²':>18}{'final width':>13}"
    )
    for name, (potential, reference) in drives().items():
        start = jax.random.normal(jax.random.key(4), (many, 1))
        path = esl.simulate(
            potential,
            esl.Langevin(1 / steps, 1.0),
            start,
            steps=steps,
            snapshots=links,
            key=jax.random.key(5),
        )
        books = esl.free_energy(
            path, potential, entropy=esl.density.GaussianEntropy(), velocity=esl.AffineVelocity()
        )
        limit = esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=esl.AffineVelocity(),
            potential=potential,
        )
        row = {
            "work": [float(books.work), float(books.standard_error.work)],
            "entropy_production": [
                float(limit.entropy_production),
                float(limit.standard_error.entropy_production),
            ],
            "w2_squared": [float(limit.w2_squared), float(limit.standard_error.w2_squared)],
        }
        width = float(jnp.std(path.final))
        works[name] = {"reference": reference, **row, "final_width": width}
        cells = "".join(f"{value:>11.4f} ± {error:.4f}" for value, error in row.values())
        print(f"{name:<28}{reference:>18.4f}  {cells}{width:>13.4f}")
    timing.write(arguments.out, {"balance": balance, "work": works})
    return {"balance": balance, "work": works}


ROWS = ("dissipation_by_balance", "dissipation", "residual")

if __name__ == "__main__":
    main()
