"""Compare `simulate` with a hand-written scan and with other libraries on the same two runs.

    python scripts/benchmark_simulation.py [--smoke] [--out FILE.json]

The digits MLP (32 members, d = 2410, minibatch 256, 200 steps) and a quadratic (1024 members,
d = 10, 1000 steps). All contenders return snapshots and energies at 21 times. Before anything is
timed, their answers are compared: without noise and batches all must take the same path, with them
end at the same mean energy, and `simulate` must follow the scan. A library that is not installed is
named and skipped; `pip install "esljax[benchmark]"` brings all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from other_libraries import CONTENDERS, CORES, Run, System

import esljax as esl

SCAN, OURS = "hand-written JAX", "`simulate`"


def systems(smoke: bool, quiet: bool = False) -> dict[str, System]:
    """Return the two systems; `quiet` ones are short and have no noise and no batches."""
    digits = esl.datasets.digits()
    network = esl.FlaxLoss(
        esl.models.mlp(64, 32, 10), digits.train, batch_size=None if quiet else 256, l2=1e-4
    )
    small, large, links = (4, 8, 4) if smoke else (32, 1024, 20)
    few = smoke or quiet
    return {
        f"digits MLP, {small} members": System(
            network,
            network.init(members=small, key=jax.random.key(0)),
            20 if few else 200,
            links,
            0.0 if quiet else 1e-7,
            examples=digits.train,
            hidden=32,
        ),
        f"quadratic, d = 10, {large} members": System(
            esl.Quadratic(jnp.linspace(0.5, 2.0, 10)),
            jax.random.normal(jax.random.key(0), (large, 10)),
            20 if few else 1000,
            links,
            0.0 if quiet else 0.1,
        ),
    }


def bare_scan(
    potential: Any, temperature: float, steps: int, links: int
) -> Callable[[Any, Any, Any], Any]:
    """Return the loop that a user would write for this one rule, given only the potential.

    Members of few coordinates lie in one row: noise for (1024, 10) takes 3 times as long as for
    (10240,) on a CPU.
    """

    def step(key, state, shape, k, rate):
        step_key = jax.random.fold_in(key, k)
        batches = potential.draw(jax.random.fold_in(step_key, 0), shape[0])
        positions = state.reshape(shape)
        energies, gradients = jax.vmap(potential.energy_and_gradient)(positions, batches)
        noise = jax.random.normal(jax.random.fold_in(step_key, 1), state.shape, state.dtype)
        amplitude = jnp.sqrt(2 * temperature * rate)
        return state - rate * gradients.reshape(state.shape) + amplitude * noise, energies

    @jax.jit
    def run(positions, rates, key):
        shape = positions.shape

        def link(state, xs):
            end, energies = jax.lax.scan(lambda x, kr: step(key, x, shape, *kr), state, xs)
            return end, (state, energies[0])

        xs = (jnp.arange(steps).reshape(links, -1), rates.reshape(links, -1))
        start = positions.reshape(-1) if shape[1] < 128 else positions
        final, (snapshots, energies) = jax.lax.scan(link, start, xs)
        last = step(key, final, shape, jnp.asarray(steps), rates[-1])[1]
        snapshots = jnp.concatenate([snapshots, final[None]]).reshape(-1, *shape)
        return snapshots, jnp.concatenate([energies, last[None]])

    return run


def scan(system: System) -> Run:
    run = bare_scan(system.potential, system.temperature, system.steps, system.links)
    rates = jnp.full(system.steps, system.rate)
    return lambda: run(system.positions, rates, jax.random.key(1))


def ours(system: System) -> Run:
    rule = esl.Langevin(esl.Constant(system.rate), system.temperature)

    @jax.jit
    def run(positions, rule, key):
        path = esl.simulate(
            system.potential, rule, positions, steps=system.steps, snapshots=system.links, key=key
        )
        return path.positions, path.energies

    return lambda: run(system.positions, rule, jax.random.key(1))


def installed(system: System) -> dict[str, Run]:
    """Return all contenders on one system, and say which are not there."""
    runs = {SCAN: scan(system), OURS: ours(system)}
    for name, contender in CONTENDERS.items():
        try:
            runs[name] = contender(system)
            runs[name]()
        except Exception as error:
            runs.pop(name, None)
            why = str(error).strip().splitlines() or [type(error).__name__]
            print(f"Left out: {name} ({why[0][:100]}).")
    return runs


def differences(runs: dict[str, Run], quiet: bool) -> dict[str, float]:
    """Return how far each contender ends from the scan: of a path without noise the largest
    relative difference; otherwise that of the mean energies at the end, in standard errors."""
    answers = {name: [np.asarray(x, float) for x in run()] for name, run in runs.items()}
    found = {}
    for name, answer in answers.items():
        pairs = zip(answer, answers[SCAN], strict=True)
        if quiet or name == OURS:
            found[name] = max(float(np.max(abs(x - y)) / np.max(abs(y))) for x, y in pairs)
        else:
            ends = [x[1][-1] for x in (answer, answers[SCAN])]
            error = np.sqrt(sum(np.var(x, ddof=1) / len(x) for x in ends))
            found[name] = float(abs(ends[0].mean() - ends[1].mean()) / error)
        most = 1e-3 if quiet or name == OURS else 5.0
        if not found[name] < most:
            raise SystemExit(f"{name} differs from the hand-written scan by {found[name]:.3g}.")
    return found


def peak(size: int) -> float:
    """Return the floating operations a second of a float32 product of square matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / timing.medians({"product": lambda: product(a, a)}, 5)["product"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    rounds = 1 if arguments.smoke else 5
    most = peak(512 if arguments.smoke else 2048)
    table: dict[str, dict[str, dict[str, float]]] = {}
    loud, quiet = (systems(arguments.smoke, quiet) for quiet in (False, True))
    for (name, system), silent in zip(loud.items(), quiet.values(), strict=True):
        runs = installed(system)
        exact = differences(
            {one: run for one, run in installed(silent).items() if one in runs}, quiet=True
        )
        distances = differences(runs, quiet=False)
        measured = timing.medians(runs, rounds)
        table[name] = {
            one: {
                "seconds": seconds,
                "ratio": seconds / measured[SCAN],
                "share_of_peak": system.products * system.steps / seconds / most,
                "difference_without_noise": exact[one],
                "difference": distances[one],
            }
            for one, seconds in measured.items()
        }

    print(
        f"\n{CORES} cores, {most / 1e9:.0f} GFlop/s at most. Microseconds a step, as multiples of "
    )
    print(f"{SCAN}, and in brackets the share of the peak that its products attain:\n")
    print(f"| forward | {' | '.join(table)} |\n|{'---|' * (len(table) + 1)}")
    for one in [SCAN, OURS, *CONTENDERS]:
        cells = []
        for name, rows in table.items():
            row = rows.get(one)
            if row is None:
                cells.append("not run")
                continue
            share = f" ({row['share_of_peak']:.0%})" if row["share_of_peak"] else ""
            cells.append(
                f"{row['seconds'] / loud[name].steps * 1e6:.0f} µs, {row['ratio']:.2f}{share}"
            )
        print(f"| {one} | {' | '.join(cells)} |")
    timing.write(arguments.out, {"seconds": table, "peak": most})
    return table


if __name__ == "__main__":
    main()
