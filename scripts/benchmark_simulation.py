"""Compare `simulate` with a hand-written scan of the same map, noise, batches and snapshots.

    python scripts/benchmark_simulation.py [--smoke] [--out FILE.json]

Two systems: the digits MLP (32 members, d = 2410, minibatch 256, 200 steps) and a quadratic (1024
members, d = 10, 1000 steps). Both contenders return snapshots and energies at 21 times, from one
compiled call each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing

import esljax as esl


def systems(smoke: bool) -> dict[str, tuple[Any, Any, int, float]]:
    """Return potential, ensemble, steps and temperature of each system."""
    digits = esl.datasets.digits()
    network = esl.FlaxLoss(esl.models.mlp(64, 32, 10), digits.train, batch_size=256, l2=1e-4)
    quadratic = esl.Quadratic(jnp.linspace(0.5, 2.0, 10))
    small, large = (4, 8) if smoke else (32, 1024)
    return {
        "digits MLP": (
            network,
            network.init(members=small, key=jax.random.key(0)),
            20 if smoke else 200,
            1e-7,
        ),
        "quadratic, d = 10": (
            quadratic,
            jax.random.normal(jax.random.key(0), (large, 10)),
            20 if smoke else 1000,
            0.1,
        ),
    }


def bare_scan(
    potential: Any, temperature: float, steps: int, links: int
) -> Callable[[Any, Any, Any], Any]:
    """Return the loop that a user would write for this one rule, given only the potential."""

    def step(key, positions, k, rate):
        step_key = jax.random.fold_in(key, k)
        batches = potential.draw(jax.random.fold_in(step_key, 0), positions.shape[0])
        energies, gradients = jax.vmap(potential.energy_and_gradient)(positions, batches)
        noise = jax.random.normal(jax.random.fold_in(step_key, 1), positions.shape, positions.dtype)
        return positions - rate * gradients + jnp.sqrt(2 * temperature * rate) * noise, energies

    @jax.jit
    def run(positions, rates, key):
        def link(positions, xs):
            end, energies = jax.lax.scan(lambda x, kr: step(key, x, *kr), positions, xs)
            return end, (positions, energies[0])

        xs = (jnp.arange(steps).reshape(links, -1), rates.reshape(links, -1))
        final, (snapshots, energies) = jax.lax.scan(link, positions, xs)
        last = step(key, final, jnp.asarray(steps), rates[-1])[1]
        return jnp.concatenate([snapshots, final[None]]), jnp.concatenate([energies, last[None]])

    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    links, rounds = (4, 1) if arguments.smoke else (20, 9)
    key = jax.random.key(1)
    table = {}
    for name, (potential, positions, steps, temperature) in systems(arguments.smoke).items():
        rule = esl.Langevin(esl.Constant(0.05), temperature)
        rates = rule.learning_rate.rates(steps)
        bare = bare_scan(potential, temperature, steps, links)

        @jax.jit
        def ours(positions, rule, key, potential=potential, steps=steps):
            return esl.simulate(potential, rule, positions, steps=steps, snapshots=links, key=key)

        path, (snapshots, energies) = ours(positions, rule, key), bare(positions, rates, key)
        difference = max(
            float(jnp.max(jnp.abs(path.positions - snapshots))),
            float(jnp.max(jnp.abs(path.energies - energies))),
        )
        calls = {
            "simulate": lambda ours=ours, positions=positions, rule=rule: ours(
                positions, rule, key
            ),
            "bare scan": lambda bare=bare, positions=positions, rates=rates: bare(
                positions, rates, key
            ),
        }
        measured = timing.medians(calls, rounds)
        table[name] = {
            **measured,
            "ratio": measured["simulate"] / measured["bare scan"],
            "largest difference": difference,
        }

    print(f"{'system':<22}{'simulate':>12}{'bare scan':>12}{'ratio':>8}{'largest difference':>22}")
    for name, row in table.items():
        print(
            f"{name:<22}{row['simulate']:>10.4f} s{row['bare scan']:>10.4f} s"
            f"{row['ratio']:>8.3f}{row['largest difference']:>22.2e}"
        )
    timing.write(arguments.out, {"seconds": table})
    return table


if __name__ == "__main__":
    main()
