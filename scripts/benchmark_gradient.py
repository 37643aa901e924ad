"""Time and memory of each way to differentiate Σ of the digits run in the knots of its schedule.

    python scripts/benchmark_gradient.py [--smoke] [--out FILE.json] [--growth]

Times are those of value and gradient together, also as multiples of the forward run of the same
length. Memory is what the compiled program allocates besides its arguments and results. `--growth`
adds K = 1000 and 5000 steps (minutes). A way that needs more than `MOST_MEMORY` is compiled and its
memory reported, but it is not run. Beside the ways of this package stand those of others, on the
same run: a scan over optax's SGD, the recipe of MixFlow-MG (arXiv 2505.00793), and diffrax, which
is named and skipped where it is not installed. Values and gradients are compared
before anything is timed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.ad_checkpoint import checkpoint_name
from other_libraries import System, diffrax_run

import esljax as esl

MOST_MEMORY = 8e9
TEMPERATURE = 1e-7

WAYS = {
    "`HessianAdjoint()`": esl.HessianAdjoint(),
    "`HessianAdjoint(recompute=True)`": esl.HessianAdjoint(recompute=True),
    "`Autodiff()`": esl.Autodiff(),
    "`Autodiff(recompute=True)`": esl.Autodiff(recompute=True),
}
Snapshots = Callable[[Any], Any]
"""Rates (K,) to snapshots (J+1, n, d)."""


def scanned(system: System, step: Callable[..., Any]) -> Snapshots:
    """A scan of `step(positions, gradients of positions, rate)` with the batches and the noise of
    `simulate`."""
    potential, key, start = system.potential, jax.random.key(1), system.positions

    def snapshots(rates):
        def body(positions, each):
            k, rate = each
            own = jax.random.fold_in(key, k)
            batches = potential.draw(jax.random.fold_in(own, 0), len(positions))
            noise = jax.random.normal(jax.random.fold_in(own, 1), positions.shape)
            moved = step(positions, batches, rate)
            return moved + jnp.sqrt(2 * system.temperature * rate) * noise, None

        def link(positions, each):
            return jax.lax.scan(body, positions, each)[0], positions

        each = jnp.arange(system.steps), rates
        each = jax.tree.map(lambda x: x.reshape(system.links, -1), each)
        final, snapshots = jax.lax.scan(link, start, each)
        return jnp.concatenate([snapshots, final[None]])

    return snapshots


def by_optax(system: System, checkpoint: bool) -> Snapshots:
    """Unrolled SGD of optax, differentiated by JAX."""

    def step(positions, batches, rate):
        _, gradients = jax.vmap(system.potential.energy_and_gradient)(positions, batches)
        optimizer = optax.sgd(rate)
        updates, _ = optimizer.update(gradients, optimizer.init(positions))
        return optax.apply_updates(positions, updates)

    return scanned(system, jax.checkpoint(step, prevent_cse=False) if checkpoint else step)


def by_mixflow(system: System) -> Snapshots:
    """The recipe of MixFlow-MG: each gradient returns Hessian-vector products by forward over
    reverse, each step is checkpointed, and its gradient is kept."""
    potential = system.potential

    def slopes(positions, batches):
        return jax.vmap(potential.energy_and_gradient)(positions, batches)[1]

    @jax.custom_vjp
    def gradients(positions, batches):
        return slopes(positions, batches)

    def forward(positions, batches):
        return slopes(positions, batches), (positions, batches)

    def backward(kept, cotangent):
        positions, batches = kept
        product = jax.jvp(lambda x: slopes(x, batches), (positions,), (cotangent,))[1]
        return product, np.zeros(batches.shape, jax.dtypes.float0)

    gradients.defvjp(forward, backward)

    def step(positions, batches, rate):
        return positions - rate * checkpoint_name(gradients(positions, batches), "gradients")

    policy = jax.checkpoint_policies.save_only_these_names("gradients")
    return scanned(system, jax.checkpoint(step, policy=policy, prevent_cse=False))


def others(system: System) -> dict[str, Snapshots]:
    """Return the ways of others, and say which are not there."""
    found = {
        "optax SGD in a scan": by_optax(system, checkpoint=False),
        "optax SGD in a scan, each step checkpointed": by_optax(system, checkpoint=True),
        "MixFlow-MG: forward over reverse": by_mixflow(system),
    }
    try:
        run = diffrax_run(system, tree=True)
        found["diffrax, `RecursiveCheckpointAdjoint`"] = lambda rates: run(
            system.positions, rates, jax.random.key(1)
        )
    except ImportError as error:
        print(f"Left out: diffrax, `RecursiveCheckpointAdjoint` ({error}).")
    return found


def check(answers: dict[str, tuple[Any, Any]]) -> None:
    """Compare values and gradients with those of the first way.

    diffrax draws noise of its own, which moves Σ by its part of the noise.
    """
    first = next(iter(answers.values()))
    for name, answer in answers.items():
        most = 0.02 if name.startswith("diffrax") else 1e-3
        for x, y in zip(answer, first, strict=True):
            off = float(np.max(np.abs(np.asarray(x) - y)) / np.max(np.abs(y)))
            if not off < most:
                raise SystemExit(f"{name} differs from {next(iter(answers))} by {off:.3g}.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--growth", action="store_true", help="also K = 1000 and 5000")
    arguments = parser.parse_args(argv)
    members, lengths, rounds = (
        (4, (20,), 1)
        if arguments.smoke
        else (32, (200, 1000, 5000) if arguments.growth else (200,), 5)
    )
    data = esl.datasets.digits()
    potential = esl.FlaxLoss(esl.models.mlp(64, 32, 10), data.train, batch_size=256, l2=1e-4)
    start = potential.init(members=members, key=jax.random.key(0))
    knots = esl.Knots(jnp.full(12, 0.25))
    key = jax.random.key(1)
    measure = {"transport": esl.ExactTransport(), "jackknife": 0}
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for steps in lengths:

        def rates(knots, steps=steps):
            # The same learning time for every number of steps.
            return esl.Knots(knots.values * lengths[0] / steps)

        def ours(knots, way, rates=rates, steps=steps):
            rule = esl.Langevin(rates(knots), TEMPERATURE)
            path = esl.simulate(potential, rule, start, steps=steps, key=key, gradient=way)
            return esl.speed_limit(path, **measure).entropy_production

        def theirs(knots, snapshots, rates=rates, steps=steps):
            path = esl.from_snapshots(snapshots(rates(knots).rates(steps)))
            return esl.speed_limit(path, **measure).entropy_production

        system = System(potential, start, steps, 20, TEMPERATURE)
        functions = {
            name: lambda knots, way=way, ours=ours: ours(knots, way) for name, way in WAYS.items()
        } | {
            name: lambda knots, run=run, theirs=theirs: theirs(knots, run)
            for name, run in others(system).items()
        }
        forward = jax.jit(functions["`HessianAdjoint()`"]).lower(knots).compile()
        compiled = {"forward": forward} | {
            name: jax.jit(jax.value_and_grad(function)).lower(knots).compile()
            for name, function in functions.items()
        }
        memory = {
            name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
        }
        calls = {
            name: lambda program=program: program(knots)
            for name, program in compiled.items()
            if memory[name] < MOST_MEMORY
        }
        check(
            {
                name: (value, slope.values)
                for name, call in calls.items()
                if name != "forward"
                for value, slope in [call()]
            }
        )
        times = timing.medians(calls, rounds if steps == lengths[0] else 1)
        table[str(steps)] = {
            name: {
                "seconds": times.get(name),
                "ratio": times[name] / times["forward"] if name in times else None,
                "bytes": memory[name],
            }
            for name in compiled
        }

    print("\nValue and gradient of Σ in 12 knots, as multiples of the forward run (memory):\n")
    heads = [
        f"K = {steps} ({rows['forward']['seconds']:.2g} s forward)" for steps, rows in table.items()
    ]
    print(f"| way | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name in list(next(iter(table.values())))[1:]:
        rows = [row[name] for row in table.values()]
        times = [f"{row['ratio']:.2f}" if row["seconds"] else "not run" for row in rows]
        cells = [
            f"{time} ({row['bytes'] / 1e6:.0f} MB)" for time, row in zip(times, rows, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    timing.write(arguments.out, {"runs": table})
    return table


if __name__ == "__main__":
    main()
