"""The front of loss and Σ on handwritten digits, with every usual family at its best.

    python scripts/front_digits.py [--smoke] [--out FILE.json] [--folder FOLDER] [--batch 8]

Eight networks 64-16-10 on digits, 200 steps, without injected noise. All searches see the same
initializations and batches, and all points are judged on six runs that no search has seen.
`--folder` takes front.json, front.png and the schedules.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import timing

import esljax as esl


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = timing.parser("The front of loss and Σ on handwritten digits.")
    parser.add_argument("--folder", type=Path, help="where to save the front")
    parser.add_argument("--batch", type=int, default=8, help="examples per step; 0 for all")
    arguments = parser.parse_args(argv)
    smoke = arguments.smoke
    data = esl.datasets.digits()
    width, members, steps = (4, 3, 20) if smoke else (16, 8, 200)
    problem = esl.Problem(
        esl.FlaxLoss(esl.models.mlp(64, width, 10), data.train, batch_size=arguments.batch or None),
        members=members,
        steps=steps,
        test=data.test,
    )
    families = esl.usual_families()
    settings: dict[str, Any] = (
        {"points": 2, "knots": 3, "iterations": 3, "judge_runs": 2, "rate": 0.3} if smoke else {}
    )
    families = {"cosine": families["cosine"]} if smoke else families
    started = time.perf_counter()
    front = esl.front(problem, key=jax.random.key(0), families=families, **settings)
    print(front)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.folder is not None:
        front.save(arguments.folder)
    timing.write(arguments.out, front.as_dict())
    return front.as_dict()


if __name__ == "__main__":
    main()
