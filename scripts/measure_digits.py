"""Measure one digits run by every estimator that applies, and its minibatch noise.

    python scripts/measure_digits.py [--smoke] [--out FILE.json]

64 networks of 2410 parameters cannot resolve a density in 2410 dimensions, so each row names the
law of its numbers: all parameters, projections, or outputs. Σ and W2² of a row are of the same law.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
        f"{'law and estimator':<42}{'Σ':>17}{'L²':>9}{'W2²':>9}{'housekeeping':>14}"
        f"{'Σ debiased':>12}{'W2² debiased':>14}  findings"
    )
    for name, (run, given) in rows.items():
        report = esl.speed_limit(run, debias=True, **given)
        findings = [finding.name for finding in report.diagnose()]
        error = report.standard_error
        table[name] = {
            "entropy_production": float(report.entropy_production),
            "standard_error": float(error.entropy_production) if error is not None else None,
            "length_squared": float(report.length_squared),
            "w2_squared": float(report.w2_squared),
            "housekeeping": float(report.housekeeping),
            "debiased_entropy_production": float(report.debiased_entropy_production),
            "debiased_w2_squared": float(report.debiased_w2_squared),
            "findings": findings,
        }
        row = table[name]
        sigma = f"{row['entropy_production']:.3f} ± {row['standard_error'] or jnp.nan:.2g}"
        print(
            f"{name:<42}{sigma:>17}{row['length_squared']:>9.3f}{row['w2_squared']:>9.3f}"
            f"{row['housekeeping']:>14.3f}{row['debiased_entropy_production']:>12.3f}"
            f"{row['debiased_w2_squared']:>14.3f}  {', '.join(findings)}"
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


if __name__ == "__main__":
    main()
