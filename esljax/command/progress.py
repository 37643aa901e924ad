"""One bar for the whole job of a command, so that the time left is that of the whole.

Work is counted in forward runs: a gradient takes about 2.3 of them, and a judged run 1.3, because
it is measured too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

from esljax.experiment import Judgment, in_words
from esljax.optimization import Iteration

GRADIENT, JUDGED = 2.3, 1.3


class Bar:
    """A bar on a terminal, and nothing elsewhere.

    **Args:** `total`: the work in forward runs.
    """

    def __init__(self, console: rich.console.Console, total: float):
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
        )
        self.bar = rich.progress.Progress(
            *columns,
            console=console,
            transient=True,
            # Elsewhere than on a terminal, all that would be left of a bar is an empty line.
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total, numbers="")

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.bar.update(self.task, description=in_words(name))

    def trial(self, loss: float) -> None:
        """Some work has ended with this mean final loss."""
        self.bar.update(self.task, numbers=f"final loss {loss:.4f}")

    def iteration(self, iteration: Iteration) -> None:
        """A step of a search is done."""
        numbers = _numbers(iteration.value, *iteration.auxiliary)
        self.bar.update(self.task, advance=GRADIENT, numbers=numbers)

    def judged(self, judgment: Judgment) -> None:
        """A schedule has been judged."""
        report = judgment.report
        numbers = _numbers(report.entropy_production, report.w2_squared, judgment.final_loss)
        work = JUDGED * judgment.entropy_productions.size
        self.bar.update(self.task, advance=work, numbers=numbers)


class ComparisonBar(Bar):
    """The bar of a comparison of `shapes` usual schedules."""

    def __init__(
        self,
        console: rich.console.Console,
        *,
        shapes: int,
        iterations: int,
        match_runs: int,
        judge_runs: int,
    ):
        self.iterations, self.match_runs = iterations, match_runs
        # A matching takes about two trials. Two schedules are made here, one by the search and one
        # by re-timing.
        matched, judged = (2 * shapes + 6) * match_runs, (shapes + 2) * judge_runs
        super().__init__(console, matched + GRADIENT * iterations + JUDGED * judged)

    def trial(self, loss: float) -> None:
        """Runs with one scale of a schedule have ended with this mean final loss."""
        super().trial(loss)
        self.bar.update(self.task, advance=self.match_runs)

    def iteration(self, iteration: Iteration) -> None:
        """A step of the search is done."""
        super().iteration(iteration)
        description = f"optimizing {iteration.iteration + 1}/{self.iterations}"
        self.bar.update(self.task, description=description)


class FrontBar(Bar):
    """The bar of a front and its families.

    **Args:** `gradients`: of each point of the front and then of each family, by name.
    `judge_runs`: of each point.
    """

    def __init__(
        self,
        console: rich.console.Console,
        *,
        gradients: Mapping[str, Sequence[int]],
        judge_runs: int,
    ):
        self.judge_runs, self._searching = judge_runs, False
        # Work that is done when a stage begins: all searches come first.
        self._starts: dict[str, float] = {}
        done = 0.0
        for prefix in "", "judging ":
            for name, counts in gradients.items():
                for point, count in enumerate(counts, 1):
                    self._starts[f"{prefix}{name} {point}/{len(counts)}"] = done
                    done += JUDGED * judge_runs if prefix else GRADIENT * count
        super().__init__(console, done)

    def stage(self, name: str) -> None:
        """A stage begins: "rate", "NAME 2/5" or "judging NAME 2/5", or one between them."""
        super().stage(name)
        self._searching = name in self._starts and not name.startswith("judging ")
        # A resumed run skips the points that are saved.
        if name in self._starts:
            self.bar.update(self.task, completed=self._starts[name])

    def trial(self, loss: float) -> None:
        """A gradient of a search, or runs of another stage, have ended with this loss."""
        super().trial(loss)
        if self._searching:
            self.bar.update(self.task, advance=GRADIENT)


class MeasureBar(Bar):
    """The bar of a recording: of its bytes while they are read in blocks, and then of its transport
    problems."""

    def __init__(self, console: rich.console.Console):
        super().__init__(console, 0.0)
        self.bar.update(self.task, visible=False)

    def read(self, done: int, total: int) -> None:
        """So many bytes have been read."""
        self._show("reading", f"{done / 1e9:.1f} of {total / 1e9:.1f} GB", done, total)

    def solved(self, done: int, total: int) -> None:
        """So many transport problems have been solved."""
        if not done:
            # The time left is that of the problems alone.
            self.bar.reset(self.task)
        self._show("measuring", f"{done} of {total} transport problems", done, total)

    def _show(self, stage: str, numbers: str, done: int, total: int) -> None:
        self.bar.update(
            self.task,
            visible=True,
            description=stage,
            total=total,
            completed=done,
            numbers=numbers,
        )


def _numbers(sigma: Any, w2_squared: Any, loss: Any) -> str:
    return f"Σ {float(sigma):.4g}  W2² {float(w2_squared):.4g}  final loss {float(loss):.4f}"
