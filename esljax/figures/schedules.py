"""Figures of schedules held against the speed limit."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esljax.figures.style import COLORS, clean, in_words


def plot_schedules(judgments: Mapping[str, Any]) -> Figure:
    """Learning rate against training time, one line a schedule."""
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


def plot_speed_limit(reports: Mapping[str, Any]) -> Figure:
    """Where Σ goes (stacked bars, with the standard error of Σ), and the metric speed along the way; one bar and line a report."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    bars, speeds = figure.subplots(1, 2, width_ratios=(1.1, 1))
    names = list(reports)
    rows = np.arange(len(names))[::-1]
    left = np.zeros(len(names))
    parts = (
        ("w2_squared", "$W_2^2$, the limit", "#555555"),
        ("geometric", "geometric", "#56B4E9"),
        ("temporal", "temporal", "#E69F00"),
    )
    for part, label, color in parts:
        width = np.array([float(getattr(reports[name], part)) for name in names])
        bars.barh(rows, width, left=left, color=color, label=label, height=0.7)
        left = left + width
    errors = [reports[name].standard_error for name in names]
    widths = [float(error.entropy_production) if error is not None else 0.0 for error in errors]
    bars.errorbar(left, rows, xerr=widths, fmt="none", ecolor="black", capsize=2, linewidth=1)
    bars.set(
        yticks=rows,
        yticklabels=[in_words(name) for name in names],
        ylim=(-0.75, len(names) - 0.25),
        xlabel="entropy production $\\Sigma$",
    )
    bars.legend(
        frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3
    )
    for name, style in _styles(reports).items():
        report = reports[name]
        speeds.plot(
            np.asarray(report.times), np.asarray(report.speed), label=in_words(name), **style
        )
    limit = float(np.mean([np.sqrt(max(float(reports[name].w2_squared), 0.0)) for name in names]))
    speeds.axhline(limit, color="#555555", linestyle=":", linewidth=1.2, label="$W_2$")
    speeds.set(
        xlabel="training time $s$", ylabel="metric speed $\\ell(s)$", xlim=(0, 1), ylim=(0, None)
    )
    speeds.legend(frameon=False, fontsize="small")
    clean(bars, speeds)
    return figure


def _styles(names: Collection[str]) -> dict[str, dict]:
    # The optimized schedule is drawn in black.
    usual = [name for name in sorted(names) if name != "optimized"]
    styles = {
        name: {"color": COLORS[i % len(COLORS)], "linewidth": 1.4} for i, name in enumerate(usual)
    }
    if "optimized" in names:
        styles["optimized"] = {"color": "black", "linewidth": 2.4}
    return styles
