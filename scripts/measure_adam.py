"""Train networks by plain optax Adam, save snapshots, and measure them by `esljax measure`.

    python scripts/measure_adam.py [--smoke] [--out FILE.json]

The training uses nothing of esljax: a Flax network, optax and a scan. It writes one .npz file with
`positions` (21, 32, 2410) and `times` (21,), closer together at first, where Adam moves fastest.
The file is measured twice: as it is, where each member is its own best partner, and by its moments
in ten principal coordinates.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.flatten_util import ravel_pytree

import esljax as esl
from esljax.command import main as esljax_main


def train(
    members: int, steps: int, snapshots: int, rate: float = 1e-3, batch: int = 128
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return snapshots (J+1, n, d), their steps, and the mean test accuracy at the end."""
    data = esl.datasets.digits()
    make = esl.models.mlp(64, 32, 10)
    graph, example = nnx.split(make(nnx.Rngs(0)))
    _, unravel = ravel_pytree(example)
    adam = optax.adam(rate)
    taken = np.round(steps * np.linspace(0, 1, snapshots) ** 1.5).astype(int)

    def loss(member, inputs, labels):
        logits = nnx.merge(graph, unravel(member))(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def one(member, key):
        def step(carry, k):
            member, state = carry
            rows = jax.random.randint(
                jax.random.fold_in(key, k), (batch,), 0, len(data.train.labels)
            )
            updates, state = adam.update(
                jax.grad(loss)(member, data.train.inputs[rows], data.train.labels[rows]), state
            )
            return (optax.apply_updates(member, updates), state), None

        carry, kept = (member, adam.init(member)), [member]
        for first, last in itertools.pairwise(taken):
            carry, _ = jax.lax.scan(step, carry, jnp.arange(first, last))
            kept.append(carry[0])
        hits = (
            jnp.argmax(nnx.merge(graph, unravel(carry[0]))(data.test.inputs), axis=1)
            == data.test.labels
        )
        return jnp.stack(kept), jnp.mean(hits)

    starts = jnp.stack([ravel_pytree(nnx.state(make(nnx.Rngs(i))))[0] for i in range(members)])
    positions, accuracy = jax.jit(jax.vmap(one, out_axes=(1, 0)))(
        starts, jax.random.split(jax.random.key(1), members)
    )
    return np.asarray(positions), taken, float(jnp.mean(accuracy))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    members, steps, snapshots, groups = (4, 8, 5, "0") if arguments.smoke else (32, 1000, 21, "32")
    positions, times, accuracy = train(members, steps, snapshots)
    np.savez("adam.npz", positions=positions, times=times)
    print(f"test accuracy after {steps} steps of Adam: {accuracy:.3f}")
    table = {}
    for name, flags in {
        "adam-members": [],
        "adam-moments": [
            "--transport",
            "gaussian",
            "--project",
            "pca",
            "--coordinates",
            "2" if arguments.smoke else "10",
        ],
    }.items():
        print(f"\n{name}")
        code = esljax_main(["measure", "adam.npz", *flags, "--jackknife", groups, "--out", name])
        report = json.loads((Path(name) / "report.json").read_text(encoding="utf-8"))
        table[name] = {
            key: report[key]
            for key in (
                "entropy_production",
                "length_squared",
                "w2_squared",
                "temporal",
                "geometric",
                "verdict",
            )
        }
        table[name]["exit_code"] = code
    timing.write(arguments.out, {"accuracy": accuracy, "measured": table})
    return table


if __name__ == "__main__":
    main()
