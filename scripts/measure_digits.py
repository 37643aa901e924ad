"""Measure one digits run by every estimator that applies, and its minibatch noise.

    python scripts/measure_digits.py [--smoke] [--out FILE.json]

64 networks of 2410 parameters cannot resolve a density in 2410 dimensions, so each row names the
law of its numbers: all parameters, projections, or outputs. Σ and W2² of a row are of the same law.
Σ, L² and W2² are debiased; an L² that the members do not resolve is the interval that brackets it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import timing

import esljax as esl


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args(argv)
    members, steps, snapshots, probes = (16, 8, 4, 2) if arguments.smoke else (64, 200, 20, 8)
    data = esl.datasets.digits()
    potential = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
    key, start_key, noise_key = jax.random.split(jax.random.key(0), 3)
    start = potential.init(members=members, key=start_key)
    rule = esl.Langevin(0.25, 1e-7)
    path = esl.simulate(potential, rule, start, steps=steps, snapshots=snapshots, key=key)
    inputs = data.test.inputs[:probes]
    outputs = esl.simulate(
        potential,
        rule,
        start,
        steps=steps,
        snapshots=snapshots,
        key=key,
        observe=lambda theta: potential.predict(theta, inputs).reshape(-1),
    )
    gaussian, exact = esl.GaussianTransport(), esl.ExactTransport()
    rows = {
        "members' paths: chain, exact": (path, {"transport": exact}),
        "all parameters: chain of moments": (path, {"transport": gaussian}),
        f"outputs on {probes} inputs: chain, exact": (outputs, {"transport": exact}),
        f"outputs on {probes} inputs: chain of moments": (outputs, {"transport": gaussian}),
        f"outputs on {probes} inputs: transport velocity": (
            outputs,
            {"transport": gaussian, "velocity": esl.TransportVelocity(gaussian)},
        ),
    }
    for p in (2, 5):
        directions = esl.principal_directions(path.positions, p)
        moments, whole = (
            esl.ProjectedTransport(gaussian, directions),
            esl.ProjectedTransport(exact, directions),
        )
        of_run = {"potential": potential}
        rows[f"{p} principal: chain of moments"] = (path, {"transport": moments})
        rows[f"{p} principal: affine velocity"] = (
            path,
            {"transport": moments, "velocity": esl.AffineVelocity(), **of_run},
        )
        rows[f"{p} principal: kernel velocity"] = (
            path,
            {"transport": whole, "velocity": esl.KernelVelocity(), **of_run},
        )
        rows[f"{p} principal: kde velocity"] = (
            path,
            {"transport": whole, "velocity": esl.KDEVelocity(), **of_run},
        )
        if p <= 3:
            rows[f"{p} principal: histogram velocity"] = (
                path,
                {"transport": whole, "velocity": esl.HistogramVelocity(), **of_run},
            )
        rows[f"{p} principal: transport velocity"] = (
            path,
            {"transport": whole, "velocity": esl.TransportVelocity(exact)},
        )
    table = {}
    print(
        f"{'law and estimator':<42}{'Σ':>17}{'Σ bound':>10}{'L²':>20}{'W2²':>10}"
        f"{'housekeeping':>16}{'Σ plug-in':>12}{'W2² plug-in':>13}  findings"
    )
    for name, (run, given) in rows.items():
        report = esl.speed_limit(run, debias=True, **given)
        by_velocity = report.entropy_production_chain is not None
        error = report.standard_error.get(
            "entropy_production" if by_velocity else "debiased_entropy_production"
        )
        length: float | list[float] = float(report.best("length_squared"))
        if not report.length_resolved:
            within = report.interval("length_squared")
            length = [float(within.lower), float(within.upper)]
        table[name] = row = {
            "entropy_production": float(report.best("entropy_production")),
            "standard_error": float(error),
            "entropy_production_bound": _known(report.entropy_production_bound),
            "length_squared": length,
            "w2_squared": float(report.best("w2_squared")),
            "housekeeping": _known(report.housekeeping),
            "plug_in": {
                "entropy_production": float(report.entropy_production),
                "length_squared": float(report.length_squared),
                "w2_squared": float(report.w2_squared),
            },
            "findings": [finding.name for finding in report.diagnose()],
        }
        sigma = f"{row['entropy_production']:.3f} ± {row['standard_error']:.2g}"
        inside = f"[{length[0]:.2f}, {length[1]:.2f}]" if isinstance(length, list) else ""
        print(
            f"{name:<42}{sigma:>17}{_text(row['entropy_production_bound'], ''):>10}"
            f"{inside or _text(length):>20}{row['w2_squared']:>10.3f}"
            f"{_text(row['housekeeping'], 'not resolved'):>16}"
            f"{row['plug_in']['entropy_production']:>12.3f}{row['plug_in']['w2_squared']:>13.3f}"
            f"  {', '.join(row['findings'])}"
        )
    noise = esl.minibatch_noise(path, potential, key=noise_key)
    print(f"\n{noise}")
    batches = {
        "floor": float(noise.floor),
        "floor_error": float(noise.standard_error.floor),
        "temperature": noise.temperature.tolist(),
    }
    timing.write(arguments.out, {"rows": table, "minibatch_noise": batches})
    return {"rows": table}


def _known(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
