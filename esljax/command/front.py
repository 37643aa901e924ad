"""`esljax front`: the trade of loss and entropy production as a command."""

import jax
import rich.console

from esljax.command.job import problem_of, spread
from esljax.command.progress import FrontBar
from esljax.command.running import Finished, Whole, run_command
from esljax.command.settings import FAMILIES, OutsideFrontConfig
from esljax.command.unfinished import Kept
from esljax.experiment import Front, front, gradients_of_front, name_of_point, place_of
from esljax.files import Checkpoints

_STAGE = "points"


def front_command(config: OutsideFrontConfig) -> int:
    """Run `esljax front` and return its exit code."""

    def work(kept: Kept, console: rich.console.Console) -> Finished:
        found = _front(config, kept, console)
        rows, sentences = found.lines()
        printed = (*map(Whole, rows), *sentences, Whole(_use(config, found)))
        return Finished(found.leaves(), printed)

    return run_command(
        config,
        work,
        report="front.json",
        figures=("front.png",),
        schedules=[name_of_point(i) for i in range(len(config.targets) or config.points)],
        stages=(_STAGE,),
    )


def _front(config: OutsideFrontConfig, kept: Kept, console: rich.console.Console) -> Front:
    names = [name for name in config.families if name != "none"]
    points = len(config.targets) or config.points
    bar = FrontBar(
        console,
        gradients=gradients_of_front(points, config.iterations, names),
        judge_runs=config.judge_runs,
    )
    with bar:
        key, transport_key = jax.random.split(jax.random.key(config.seed))
        problem = spread(problem_of(config, transport_key), config)
        return front(
            problem,
            key=key,
            points=config.points,
            knots=config.knots,
            targets=config.targets or None,
            families={name: FAMILIES[name] for name in names},
            judge_runs=config.judge_runs,
            rate=config.rate,
            iterations=config.iterations,
            watcher=bar,
            checkpoints=Checkpoints(
                kept.folder / _STAGE, resume=config.resume, every=config.checkpoint_every
            ),
        )


def _use(config: OutsideFrontConfig, found: Front) -> str:
    """How to use a schedule of the front elsewhere."""
    path = config.out / place_of(name_of_point(found.knee))
    return (
        f"Use one at any length, here that of the knee: "
        f"esljax.load_schedule({str(path)!r}).to_optax(steps)"
    )
