"""Figures that hold schedules against the speed limit."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from esljax._checks import refuse
from esljax.figures.style import COLORS, clean, in_words


@runtime_checkable
class JudgmentLike(Protocol):
    """Anything that `plot_schedules` can draw, such as the judgments of a comparison."""

    @property
    def schedule(self) -> Any:
        """A table of learning rates: its `values` (K,) are evenly spaced over training time."""
        ...


@runtime_checkable
class ReportLike(Protocol):
    """Anything that `plot_speed_limit` can draw, such as an `esl.SpeedLimit`.

    Its parts are stacked and add up to Σ.
    """

    def best(self, name: str) -> SupportsFloat:
        """W2² between start and end, for the name "w2_squared": the limit."""
        ...

    @property
    def geometric(self) -> SupportsFloat:
        """The part of Σ - W2² that a bent path costs, L² - W2²."""
        ...

    @property
    def temporal(self) -> SupportsFloat:
        """The part of Σ - W2² that an uneven speed ℓ costs, ∫ℓ² ds - L²."""
        ...

    @property
    def housekeeping(self) -> SupportsFloat | None:
        """The part of Σ - W2² that moves no mass; None where it is not resolved."""
        ...

    @property
    def length_resolved(self) -> Any:
        """Whether `geometric` and `temporal` can be told apart: None or a boolean."""
        ...

    @property
    def standard_error(self) -> Any:
        """None, or an object with the attribute `entropy_production`, the standard error of Σ."""
        ...

    @property
    def times(self) -> ArrayLike:
        """The training times of `speed`, between 0 and 1, shape (J,)."""
        ...

    @property
    def speed(self) -> ArrayLike:
        """The metric speed in W2 per unit of training time, shape (J,)."""
        ...


def plot_schedules(judgments: Mapping[str, JudgmentLike]) -> Figure:
    """Plot learning rates against training time, with one line for each schedule.

    **Args:** `judgments`: by name; anything with a `schedule` that has `values`. The one named
    "optimized" is drawn in black.
    **Returns:** the figure, which `savefig` writes.
    **Raises:** `InputError` if there are none.

    **Example:**

        >>> import types
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> from esljax.figures import plot_schedules
        >>> rates = {"constant": jnp.full(11, 0.1), "optimized": jnp.linspace(0.2, 0.1, 11)}
        >>> judgments = {
        ...     name: types.SimpleNamespace(schedule=esl.Knots(values))
        ...     for name, values in rates.items()
        ... }
        >>> [line.get_label() for line in plot_schedules(judgments).axes[0].lines]
        ['constant', 'optimized']
    """
    if not judgments:
        raise refuse("judgments", "hold at least one schedule", "is empty")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, style in _styles(judgments).items():
        schedule = judgments[name].schedule
        s = np.linspace(0, 1, schedule.values.size)
        axes.plot(s, np.asarray(schedule.values), label=in_words(name), **style)
    axes.set(
        xlabel="training time $s$",
        ylabel="learning rate $\\eta$ per step",
        xlim=(0, 1),
        ylim=(0, None),
    )
    axes.set_title("Learning rates that end at the same training loss", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    clean(axes)
    return figure


def plot_speed_limit(
    reports: Mapping[str, ReportLike], *, limit: str = "$W_2^2$, the limit"
) -> Figure:
    """Plot the parts of Σ as stacked bars, and the metric speed against training time.

    The bars end in the standard error of Σ. A dotted line marks W2 (with several reports their
    mean), the constant speed at which Σ would equal W2².

    **Args:** `reports`: by name, one bar and one line each; the one named "optimized" is drawn in
    black. `limit`: the label of W2², which says of what it is one: of laws, of the moments, or of
    members that are their own best partners.
    **Returns:** the figure, which `savefig` writes.
    **Raises:** `InputError` if there are none.

    **Example:**

        >>> import jax
        >>> import esljax as esl
        >>> from esljax.figures import plot_speed_limit
        >>> start, key = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.key(1)
        >>> path = esl.simulate(esl.Quadratic(1.0), esl.Langevin(0.1), start, steps=20, key=key)
        >>> report = esl.speed_limit(path, transport=esl.GaussianTransport())
        >>> bars, speeds = plot_speed_limit({"constant": report}).axes
        >>> [text.get_text() for text in bars.get_yticklabels()]
        ['constant']
    """
    if not reports:
        raise refuse("reports", "hold at least one report", "is empty")
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    bars, speeds = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_parts(bars, reports, limit)
    _draw_speeds(speeds, reports)
    clean(bars, speeds)
    return figure


def _draw_parts(axes: Any, reports: Mapping[str, ReportLike], limit: str) -> None:
    rows = np.arange(len(reports))[::-1]
    left = np.zeros(len(reports))
    parts = [_parts(report) for report in reports.values()]
    for part, label, color in (
        ("limit", limit, "#555555"),
        ("geometric", "geometric", "#56B4E9"),
        ("temporal", "temporal", "#E69F00"),
        ("unresolved", "geometric and temporal, not resolved", "#BBBBBB"),
        ("housekeeping", "housekeeping", "#CC79A7"),
    ):
        width = np.array([each.get(part, 0.0) for each in parts])
        if width.any() or part in ("limit", "geometric", "temporal"):
            axes.barh(rows, width, left=left, color=color, label=label, height=0.7)
        left = left + width
    errors = [report.standard_error for report in reports.values()]
    widths = [0.0 if error is None else float(error.entropy_production) for error in errors]
    axes.errorbar(left, rows, xerr=widths, fmt="none", ecolor="black", capsize=2, linewidth=1)
    axes.set(
        yticks=rows,
        yticklabels=[in_words(name) for name in reports],
        ylim=(-0.75, len(reports) - 0.25),
        xlabel="entropy production $\\Sigma$",
    )
    axes.legend(
        frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3
    )


def _parts(report: ReportLike) -> dict[str, float]:
    """The widths of the parts of Σ by name."""
    moving = {"geometric": float(report.geometric), "temporal": float(report.temporal)}
    if report.length_resolved is not None and not bool(report.length_resolved):
        moving = {"unresolved": sum(moving.values())}
    housekeeping = 0.0 if report.housekeeping is None else float(report.housekeeping)
    return {"limit": float(report.best("w2_squared")), **moving, "housekeeping": housekeeping}


def _draw_speeds(axes: Any, reports: Mapping[str, ReportLike]) -> None:
    for name, style in _styles(reports).items():
        report = reports[name]
        axes.plot(np.asarray(report.times), np.asarray(report.speed), label=in_words(name), **style)
    limits = [np.sqrt(max(float(report.best("w2_squared")), 0.0)) for report in reports.values()]
    limit = float(np.mean(limits))
    axes.axhline(limit, color="#555555", linestyle=":", linewidth=1.2, label="$W_2$")
    axes.set(
        xlabel="training time $s$", ylabel="metric speed $\\ell(s)$", xlim=(0, 1), ylim=(0, None)
    )
    axes.legend(frameon=False, fontsize="small")


def _styles(names: Collection[str]) -> dict[str, dict]:
    # The optimized schedule is drawn in black; dashes tell apart lines that share a color.
    others = [name for name in sorted(names) if name != "optimized"]
    styles = {
        name: {
            "color": COLORS[i % len(COLORS)],
            "linestyle": ("-", "--", ":")[i // len(COLORS) % 3],
            "linewidth": 1.4,
        }
        for i, name in enumerate(others)
    }
    if "optimized" in names:
        styles["optimized"] = {"color": "black", "linewidth": 2.4}
    return styles
