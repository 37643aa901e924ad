"""W2² between start and end of a digits run: plain, modulo permutations, modulo signed ones.

    python scripts/quotient_table.py [--smoke] [--out FILE.json]

64-32-10 tanh, batches of 256, rate .25, 200 steps, T = 1e-7. Every row takes 2n members: one half
stands against the other. Then the time of a whole report modulo the symmetry, chain, start-end and
debiasing, of 32 members at 21 snapshots.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing

import esljax as esl


def row(transport: esl.AbstractTransport, x: Any, y: Any, n: int) -> dict[str, float]:
    """The distances of one row of the table, between the first and the last snapshot."""
    across, of_x, of_y, same = (
        float(transport.squared(one, other))
        for one, other in ((x[:n], y[n:]), (x[:n], x[n:]), (y[:n], y[n:]), (x[:n], y[:n]))
    )
    return {
        "across": across,
        "within start": of_x,
        "within end": of_y,
        "debiased": across - of_x / 2 - of_y / 2,
        "same members": same,
        "paths": float(jnp.mean(jnp.sum((x[:n] - y[:n]) ** 2, axis=1))),
    }


def seconds_of_report(path: Any, transport: esl.AbstractTransport, jackknife: int) -> Any:
    """Seconds of the second of two reports, and the report."""
    for _ in range(2):
        started = time.perf_counter()
        report = esl.speed_limit(path, transport=transport, debias=True, jackknife=jackknife)
        jax.block_until_ready(report)
        elapsed = time.perf_counter() - started
    return elapsed, report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    smoke = arguments.smoke
    sizes, hidden, steps = ((4,), 4, 6) if smoke else ((16, 32, 64, 128), 32, 200)
    data = esl.datasets.digits()
    potential = esl.FlaxLoss(esl.models.mlp(64, hidden, 10), data.train, batch_size=256, l2=1e-4)
    signed = esl.symmetry.of(potential)
    print(signed, signed.check(potential), sep="\n")
    (group,) = signed.groups
    plain = esl.symmetry.permutations({group.name: group.axes}, keys=signed.keys)
    exact = esl.ExactTransport()
    transports = {
        "plain": exact,
        "permutations": esl.QuotientTransport(exact, plain),
        "signed permutations": esl.QuotientTransport(exact, signed),
    }
    rule = esl.Langevin(0.25, 1e-7)
    table: dict[str, dict[str, dict[str, float]]] = {}
    print(f"\n{'n':>4} {'':<20} {'W(X,Y′)':>9} {'W(X,X′)':>9} {'W(Y,Y′)':>9} {'debiased':>9}")
    for n in sizes:
        start = potential.init(members=2 * n, key=jax.random.key(5))
        key = jax.random.key(6)
        path = esl.simulate(potential, rule, start, steps=steps, snapshots=1, key=key)
        for name, transport in transports.items():
            numbers = row(transport, path.positions[0], path.positions[-1], n)
            table.setdefault(name, {})[str(n)] = numbers
            cells = "".join(
                f" {numbers[x]:9.2f}" for x in ("across", "within start", "within end", "debiased")
            )
            print(f"{n:4} {name:<20}{cells}", flush=True)
        same = f"{numbers['same members']:9.2f} {numbers['paths']:9.2f}"
        print(f"{n:4} {'same members, paths':<20} {same}")
    members, snapshots, jackknife = (8, 2, 2) if smoke else (32, 20, 8)
    start = potential.init(members=members, key=jax.random.key(5))
    path = esl.simulate(
        potential, rule, start, steps=steps, snapshots=snapshots, key=jax.random.key(6)
    )
    transport = transports["signed permutations"]
    bare, _ = seconds_of_report(path, transport, 0)
    whole, report = seconds_of_report(path, transport, jackknife)
    bracket = esl.measures.w2_bracket(path, report)
    size = f"n = {members}, {snapshots + 1} snapshots, signed permutations"
    print(f"\n{size}: {bare:.1f} s for chain, start-end and debiasing, compiled;")
    print(f"{whole:.1f} s with a jackknife of {jackknife} groups.\n{bracket}")
    numbers = {
        "table": table,
        "seconds": bare,
        "seconds_with_jackknife": whole,
        "groups": jackknife,
        "bracket": {
            name: float(getattr(bracket, name))
            for name in ("lower", "lower_error", "upper", "upper_error")
        },
    }
    timing.write(arguments.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
