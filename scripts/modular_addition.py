"""A small transformer on addition modulo p: usual schedules at one final loss.

python scripts/modular_addition.py [--smoke] [--out FILE.json]
esljax optimize --data modular_addition --model scripts/modular_addition.py:Transformer
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import timing
from flax import nnx

import esljax as esl


class Transformer(nnx.Module):
    """One block: attention over the tokens, then a perceptron, each beside a residual line."""

    def __init__(self, inputs, outputs, vocabulary, width=32, heads=2, *, rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.place = nnx.Param(jax.random.normal(rngs.params(), (inputs, width)) / width**0.5)
        self.attend = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.first = nnx.Linear(width, 2 * width, rngs=rngs)
        self.second = nnx.Linear(2 * width, width, rngs=rngs)
        self.last = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.place[...]
        x = x + self.attend(x)
        x = x + self.second(nnx.relu(self.first(x)))
        return self.last(jnp.mean(x, axis=1))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = timing.parser("A small transformer on addition modulo p.").parse_args(argv)
    modulus, width, steps = (5, 8, 20) if arguments.smoke else (23, 32, 1000)
    data = esl.datasets.modular_addition(modulus)
    potential = esl.FlaxLoss(
        lambda rngs: Transformer(2, modulus, modulus, width, rngs=rngs),
        data.train,
        batch_size=16 if arguments.smoke else 64,
    )
    problem = esl.Problem(potential, members=4, steps=steps, test=data.test)
    usual = esl.usual_shapes()
    names = ("constant", "cosine") if arguments.smoke else tuple(usual)
    began = time.perf_counter()
    comparison = esl.compare(
        problem,
        shapes={name: usual[name] for name in names},
        optimize=False,
        judge_runs=2 if arguments.smoke else 4,
        key=jax.random.key(0),
    )
    print(comparison)
    rows = {
        name: {
            "entropy_production": float(judgment.report.entropy_production),
            "w2_squared": float(judgment.report.w2_squared),
            "final_loss": float(judgment.final_loss),
            "test_accuracy": float(judgment.metrics["test_accuracy"]),
        }
        for name, judgment in comparison.judgments.items()
    }
    seconds = time.perf_counter() - began
    print(f"{modulus}² pairs, rate {comparison.rate:.3g}, {seconds:.0f} s")
    return timing.save({"rate": comparison.rate, "schedules": rows}, arguments.out)


if __name__ == "__main__":
    main()
