"""Figures of schedules held against the speed limit, and of studies."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from esljax._checks import refuse
from esljax.comparison import Judgment
from esljax.report import SpeedLimit
from esljax.study_summary import Group

# Okabe and Ito's palette, told apart by all eyes; the optimized schedule is drawn in black.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def plot_schedules(judgments: Mapping[str, Judgment]) -> Figure:
    """Learning rate against training time, one line a schedule."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, style in _styles(judgments).items():
        schedule = judgments[name].schedule
        s = np.linspace(0, 1, schedule.values.size)
        axes.plot(s, np.asarray(schedule.values), label=_label(name), **style)
    axes.set(xlabel="training time $s$", ylabel="learning rate $\\eta$ per step", xlim=(0, 1), ylim=(0, None))
    axes.set_title("Learning rates that end at the same training loss", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    _clean(axes)
    return figure


def plot_speed_limit(reports: Mapping[str, SpeedLimit]) -> Figure:
    """Where Σ goes (stacked bars, with the standard error of Σ), and the metric speed along the way; one bar and line a report."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    bars, speeds = figure.subplots(1, 2, width_ratios=(1.1, 1))
    names = list(reports)
    rows = np.arange(len(names))[::-1]
    left = np.zeros(len(names))
    parts = (("w2_squared", "$W_2^2$, the limit", "#555555"), ("geometric", "geometric", "#56B4E9"), ("temporal", "temporal", "#E69F00"))
    for part, label, color in parts:
        width = np.array([float(getattr(reports[name], part)) for name in names])
        bars.barh(rows, width, left=left, color=color, label=label, height=0.7)
        left = left + width
    errors = [reports[name].standard_error for name in names]
    widths = [float(error.entropy_production) if error is not None else 0.0 for error in errors]
    bars.errorbar(left, rows, xerr=widths, fmt="none", ecolor="black", capsize=2, linewidth=1)
    bars.set(
        yticks=rows, yticklabels=[_label(name) for name in names], ylim=(-0.75, len(names) - 0.25), xlabel="entropy production $\\Sigma$"
    )
    bars.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    for name, style in _styles(reports).items():
        report = reports[name]
        speeds.plot(np.asarray(report.times), np.asarray(report.speed), label=_label(name), **style)
    limit = float(np.mean([np.sqrt(max(float(reports[name].w2_squared), 0.0)) for name in names]))
    speeds.axhline(limit, color="#555555", linestyle=":", linewidth=1.2, label="$W_2$")
    speeds.set(xlabel="training time $s$", ylabel="metric speed $\\ell(s)$", xlim=(0, 1), ylim=(0, None))
    speeds.legend(frameon=False, fontsize="small")
    _clean(bars, speeds)
    return figure


def plot_study(groups: Sequence[Group]) -> Figure:
    """Σ, W2² and the gap against each numeric setting of a study (a row of panels each): means over the seeds, with standard errors.

    Lines are the values of one other setting; any further ones are held at their middle value, which the row says.

    **Args:** `groups`: what `summarize` returns. **Raises:** `InputError` if no run is done.
    """
    groups = [group for group in groups if group.runs]
    if not groups:
        raise refuse("study", "have runs that are done", "has none yet")
    values = {name: _distinct(group.settings[name] for group in groups) for name in groups[0].settings}
    varying = [name for name, seen in values.items() if len(seen) > 1] or list(values)[:1]
    numeric = [name for name in varying if not isinstance(values[name][0], str)]
    rows = numeric or varying[:1] or [""]
    figure = Figure(figsize=(10.4, 3.0 * len(rows) + 0.3), layout="constrained")
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for along, line in zip(rows, panels, strict=True):
        _plot_along(along, groups, values, [name for name in varying if name != along], line)
    return figure


def _plot_along(along: str, groups: Sequence[Group], values: Mapping[str, list], others: list[str], panels: Any) -> None:
    # The setting with the fewest values makes the lines; the rest are held.
    others = sorted(others, key=lambda name: len(values[name]))
    by, held = others[0] if others else None, {name: values[name][len(values[name]) // 2] for name in others[1:]}
    kept = [group for group in groups if all(group.settings[name] == value for name, value in held.items())]
    lines = values[by] if by else [None]
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        heights = []
        for value, color in zip(lines, _shades(lines), strict=True):
            some = [group for group in kept if by is None or group.settings[by] == value]
            x = [values[along].index(g.settings[along]) if _named(values, along) else g.settings.get(along, 0) for g in some]
            order = np.argsort(x)
            y, errors = (np.array([getattr(group, kind)[name] for group in some])[order] for kind in ("means", "errors"))
            style = {"marker": "o", "markersize": 3.5, "linewidth": 0 if _named(values, along) else 1.3, "elinewidth": 1, "capsize": 2}
            axes.errorbar(np.array(x)[order], y, yerr=np.nan_to_num(errors), color=color, label=_value(value), **style)
            heights += list(y)
        axes.set(xlabel=_label(along), ylabel=title)
        if _named(values, along):
            axes.set_xticks(range(len(values[along])), [_value(value) for value in values[along]], rotation=20)
        elif along and _wide(values[along], 4):
            axes.set_xscale("log")
            if len(values[along]) <= 8:
                axes.set_xticks(values[along], [_value(value) for value in values[along]])
            axes.xaxis.set_minor_formatter(NullFormatter())
        if _wide(heights, 30):
            axes.set_yscale("log")
        elif min(heights) >= 0:
            axes.set_ylim(0, None)
    _clean(*panels)
    if by:
        panels[-1].legend(
            title=_label(by), frameon=False, fontsize="small", title_fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
        )
    if held:
        told = ", ".join(f"{_label(name)} {_value(value)}" for name, value in held.items())
        panels[0].set_title(f"at {told}", fontsize="small", loc="left")


_PANELS = {"entropy_production": "entropy production $\\Sigma$", "w2_squared": "$W_2^2$, the limit", "gap": "gap $\\Sigma - W_2^2$"}


def _distinct(seen: Any) -> list:
    return sorted(set(seen)) if not isinstance((seen := list(seen))[0], str) else list(dict.fromkeys(seen))


def _named(values: Mapping[str, list], name: str) -> bool:
    return bool(name) and isinstance(values[name][0], str)


def _wide(seen: Sequence[Any], ratio: int) -> bool:
    """Whether positive numbers span more than a linear scale can show."""
    return bool(min(seen) > 0 and max(seen) >= ratio * min(seen))


def _shades(lines: Sequence[Any]) -> list:
    if len(lines) <= 1:
        return [_COLORS[0]] * len(lines)
    if isinstance(lines[0], str) and len(lines) <= len(_COLORS):
        return list(_COLORS[: len(lines)])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(lines))))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _label(str(value))


def _styles(names: Collection[str]) -> dict[str, dict]:
    usual = [name for name in sorted(names) if name != "optimized"]
    styles = {name: {"color": _COLORS[i % len(_COLORS)], "linewidth": 1.4} for i, name in enumerate(usual)}
    if "optimized" in names:
        styles["optimized"] = {"color": "black", "linewidth": 2.4}
    return styles


def _label(name: str) -> str:
    return name.replace("_", " ").replace("warmup stable decay", "warmup–stable–decay")


def _clean(*all_axes) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
