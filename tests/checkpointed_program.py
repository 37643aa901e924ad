"""A simulation and a search with checkpoints after every round, which test_checkpoints.py kills.

    python checkpointed_program.py OUT.npz FOLDER [--devices N] [--pause SECONDS]

Prints a line before the simulation, after it, and after each iteration of the search, so that a
test can kill it in the middle.
"""

import argparse
import time
from pathlib import Path

import jax


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.02)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)

    import jax.numpy as jnp
    import numpy as np

    import esljax as esl

    key = jax.random.key(3)
    trap = esl.Quadratic(jnp.linspace(1.0, 3.0, 5))
    start = np.asarray(jax.random.normal(key, (16, 5)))

    def simulate(learning_rate, key, checkpoints=None):
        rule = esl.Langevin(learning_rate, 0.01)
        mesh = esl.member_mesh()
        return esl.simulate(
            trap, rule, start, steps=120, snapshots=40, key=key, mesh=mesh, checkpoints=checkpoints
        )

    def objective(learning_rate, key):
        path = simulate(learning_rate, key)
        sigma = esl.speed_limit(
            path, transport=esl.GaussianTransport(), jackknife=0
        ).entropy_production
        return sigma, jnp.mean(trap(path.final)) / 0.1 - 1

    def pause(seen):
        print("round", seen.iteration, flush=True)
        time.sleep(arguments.pause)

    print("starts", flush=True)
    path = simulate(
        esl.Cosine(0.3), key, esl.Checkpoints(arguments.folder / "run", resume=True, every=0)
    )
    print("simulated", flush=True)
    optimum = esl.optimize(
        objective,
        esl.Knots(jnp.full(4, 0.05)),
        key=key,
        iterations=20,
        callback=pause,
        checkpoints=esl.Checkpoints(arguments.folder / "search", resume=True, every=0),
    )
    leaves = jax.tree.leaves((path, optimum))
    np.savez(arguments.out, **{str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})


if __name__ == "__main__":
    main()
