"""`esljax optimize` and `esljax plan`: a comparison of schedules as a command."""

import jax
import rich.console
import rich.table

from esljax._checks import memory_of_a_device
from esljax.command.job import blamed, problem_of, spread
from esljax.command.progress import ComparisonBar
from esljax.command.running import Finished, run_command
from esljax.command.settings import DONE, ComparisonConfig, OutsidePlanConfig, PlanConfig
from esljax.command.streams import legible
from esljax.command.unfinished import Kept
from esljax.experiment import SCHEDULES, Comparison, compare, enable, telling
from esljax.files import Checkpoints


def optimize_command(config: ComparisonConfig) -> int:
    """Run `esljax optimize` and return its exit code."""

    def work(kept: Kept, console: rich.console.Console) -> Finished:
        found = _compare(config, kept, console)
        printed = (_table(found), *telling.sentences(found))
        return Finished(found.leaves(), printed, found.interrupted, found.misses_target)

    return run_command(
        config,
        work,
        report="report.json",
        figures=("schedules.png", "speed_limit.png"),
        # Their names alone: shapes are arrays, and no device may be used before processes join.
        schedules=[*SCHEDULES, "retimed", "optimized"],
        stages=("matching", "search"),
    )


def plan_command(config: PlanConfig | OutsidePlanConfig) -> int:
    """Run `esljax plan` and return its exit code."""
    config.check()
    enable(config.dtype)
    devices = config.devices or jax.device_count()
    with blamed(config):
        problem = problem_of(config, jax.random.key(config.seed))
        plan = problem.plan_memory(devices=devices)
    if not config.quiet:
        print(plan)
    plan.check(memory_of_a_device() if config.memory is None else config.memory * 1e9)
    return DONE


def _compare(config: ComparisonConfig, kept: Kept, console: rich.console.Console) -> Comparison:
    """Make the problem of the settings and compare schedules on it."""
    bar = ComparisonBar(
        console,
        shapes=len(SCHEDULES),
        iterations=config.iterations,
        match_runs=config.match_runs,
        judge_runs=config.judge_runs,
    )
    with bar:
        key = jax.random.key(config.seed)
        problem = spread(problem_of(config, jax.random.split(key, 4)[0]), config)
        return compare(
            problem,
            rate=config.known_rate,
            key=key,
            target=config.target,
            knots=config.knots,
            iterations=config.iterations,
            match_runs=config.match_runs,
            judge_runs=config.judge_runs,
            watcher=bar,
            checkpoints=Checkpoints(
                kept.folder, resume=config.resume, every=config.checkpoint_every
            ),
        )


def _table(comparison: Comparison) -> rich.table.Table:
    heading, *rows = telling.rows(comparison)
    table = rich.table.Table(
        title=telling.title(comparison),
        title_justify="left",
        title_style="",
        box=None,
        pad_edge=False,
    )
    for i, each in enumerate(heading):
        table.add_column(legible(each), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
