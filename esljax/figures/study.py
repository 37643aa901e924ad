"""The figure of a study: each number against each setting that varies.

First what is drawn is chosen (the rows of panels, their lines, what is held), then each setting is laid out on an axis (its scale, its
labels), and only then drawn.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from esljax._checks import refuse
from esljax.figures.style import COLORS, clean, in_words

_PANELS = {
    "entropy_production": "entropy production $\\Sigma$",
    "w2_squared": "$W_2^2$, the limit",
    "gap": "gap $\\Sigma - W_2^2$",
}

# More lines than these are not told apart.
_MOST_LINES = 8

# The settings of which zero means all.
_ZERO_IS_ALL = ("batch_size", "chunk")


def plot_study(groups: Sequence[Any]) -> Figure:
    """Σ, W2² and the gap against each numeric setting of a study (a row of panels each): means over the seeds, with standard errors.

    Lines are the values of one other setting, eight of them at most. Any further ones are held where most runs share them, if possible at
    their middle value; the row says which. Where nothing is shared, all groups are drawn as dots.

    Means without the runs that failed, means with a transport problem that was not solved, and single runs without a standard error have
    marks of their own, explained below the panels.

    **Args:** `groups`: what `summarize` returns. **Raises:** `InputError` if no run is done.
    """
    known = [
        group
        for group in groups
        if group.runs and np.isfinite([group.means[name] for name in _PANELS]).all()
    ]
    if not known:
        raise refuse("study", "have runs that are done", "has none yet")
    settings = {
        name: _setting(name, [group.settings[name] for group in known])
        for name in known[0].settings
    } or {"": _SEEDS}
    rows = _rows(known, settings)
    figure = Figure(figsize=(10.4, 3.0 * len(rows) + 0.3), layout="constrained")
    for row, panels in zip(rows, figure.subplots(len(rows), 3, squeeze=False), strict=True):
        _draw(row, settings, panels)
    _explain(
        figure,
        {_mark(group) for row in rows for some in row.lines.values() for group in some},
        len(groups) - len(known),
        len(groups),
    )
    return figure


# --- What is drawn ------------------------------------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    """Where each value of a setting lies on an axis, in order, and what it is called there."""

    places: dict[Any, float | int]
    texts: dict[Any, str]
    scale: str
    """A scale of matplotlib's, or `names`."""


# Of a study whose runs differ in their seed alone.
_SEEDS = _Setting({None: 0.0}, {None: "all seeds"}, "names")


class _Row(NamedTuple):
    """Panels with the setting `along` on their axis, and a line for each value of the setting `by`."""

    along: str
    by: str
    lines: dict[Any, list[Any]]
    joined: bool
    title: str


def _rows(groups: list[Any], settings: Mapping[str, _Setting]) -> list[_Row]:
    varying = [name for name, setting in settings.items() if len(setting.places) > 1] or list(
        settings
    )[:1]
    numeric = [name for name in varying if settings[name].scale != "names"]
    return [
        _row(along, [name for name in varying if name != along], groups, settings)
        for along in numeric or varying[:1]
    ]


def _row(
    along: str, others: list[str], groups: list[Any], settings: Mapping[str, _Setting]
) -> _Row:
    # The setting with the fewest values makes the lines; the rest are held.
    by, *rest = sorted(others, key=lambda name: len(settings[name].places)) or [""]
    held = _held(along, rest, groups, settings)
    lines: dict[Any, list[Any]] = {value: [] for value in settings[by].places} if by else {None: []}
    for group in groups:
        if all(group.settings[name] == value for name, value in held.items()):
            lines[group.settings[by] if by else None].append(group)
    if others and not any(_goes_along(along, some) for some in lines.values()):
        return _Row(along, "", {None: groups}, False, "the other settings vary as well")
    lines = _clearest(along, lines)
    if by and len(lines) == 1:
        held[by], by = next(iter(lines)), ""
    told = ", ".join(
        f"{in_words(name)} {settings[name].texts[held[name]]}" for name in settings if name in held
    )
    return _Row(along, by, lines, settings[along].scale != "names", f"at {told}" if told else "")


def _held(
    along: str, names: list[str], groups: list[Any], settings: Mapping[str, _Setting]
) -> dict[str, Any]:
    """The combination of values that leaves most to see; of equals, the one in the middle.

    A list of points need not hold the middle values together, and what diverges leaves holes in a grid.
    """
    sharing: dict[tuple, list[Any]] = {}
    for group in groups:
        sharing.setdefault(tuple(group.settings[name] for name in names), []).append(group)
    ranks = [{value: i for i, value in enumerate(settings[name].places)} for name in names]

    def worth(values: tuple) -> tuple:
        off = sum(
            abs(rank[value] - len(rank) // 2) for rank, value in zip(ranks, values, strict=True)
        )
        return _goes_along(along, sharing[values]), len(sharing[values]), -off

    return dict(zip(names, max(sharing, key=worth), strict=True))


def _goes_along(along: str, groups: list[Any]) -> bool:
    """Whether these are two points or more on the axis."""
    return len({group.settings.get(along) for group in groups}) > 1


def _clearest(along: str, lines: Mapping[Any, list[Any]]) -> dict[Any, list[Any]]:
    """The lines with something on them; of too many the longer ones, evenly chosen."""
    kept = {value: some for value, some in lines.items() if some}
    if len(kept) <= _MOST_LINES:
        return kept
    values = [value for value, some in kept.items() if _goes_along(along, some)]
    chosen = np.linspace(0, len(values) - 1, min(len(values), _MOST_LINES)).round().astype(int)
    return {values[i]: kept[values[i]] for i in chosen}


# --- How a setting lies on an axis --------------------------------------------------------------------------------------------------------


def _setting(name: str, seen: list) -> _Setting:
    values = list(dict.fromkeys(seen))
    if isinstance(values[0], str):
        return _Setting(
            {value: float(i) for i, value in enumerate(values)},
            {value: in_words(value) for value in values},
            "names",
        )
    values = sorted(values)
    if not (name in _ZERO_IS_ALL and values[0] == 0):
        return _Setting(dict(zip(values, values, strict=True)), _texts(values), _scale(values))
    counts = values[1:]
    scale = _scale(counts)
    return _Setting(
        {**dict(zip(counts, counts, strict=True)), 0: _beyond(counts, scale)},
        {**_texts(counts), 0: "all"},
        scale,
    )


def _beyond(counts: Sequence[float | int], scale: str) -> float | int:
    """One more step of the usual size."""
    if len(counts) < 2:
        return 2.0 * counts[0] if counts else 0.0
    steps = len(counts) - 1
    if scale == "log":
        return counts[-1] * (counts[-1] / counts[0]) ** (1 / steps)
    return counts[-1] + (counts[-1] - counts[0]) / steps


def _scale(values: Sequence[float | int]) -> str:
    """The scale on which the two closest values are further apart; where there is no difference, the logarithmic one if they span much."""
    positive = [value for value in values if value > 0]
    if len(values) < 2 or values[0] < 0 or values[-1] < 4 * positive[0]:
        return "linear"
    curved = "log" if values[0] else "symlog"
    closest = {scale: np.diff(_positions(values, scale)).min() for scale in ("linear", curved)}
    return curved if closest[curved] >= closest["linear"] * (1 - 1e-9) else "linear"


def _positions(places: Sequence[float | int], scale: str) -> np.ndarray:
    """Where places lie along the axis, in its lengths."""
    x = np.array(places, float)
    if scale == "names":
        return (x + 0.5) / len(x)
    if scale in ("log", "symlog"):
        # Zero is a decade below the rest, as on matplotlib's axis.
        x = np.log10(np.where(x > 0, x, x[x > 0].min() / 10))
    return (x - x.min()) / (np.ptp(x) or 1.0)


def _texts(values: Sequence[float | int]) -> dict[Any, str]:
    """The numbers in the fewest digits, three at least, that tell them apart."""
    if all(isinstance(value, int) for value in values):
        return {value: str(value) for value in values}
    sizes = [abs(value) for value in values if value]
    powers = bool(sizes) and (min(sizes) < 1e-3 or max(sizes) >= 1e5)
    tries = ({value: _number(value, digits, powers) for value in values} for digits in range(3, 18))
    return next(texts for texts in tries if len(set(texts.values())) == len(values))


def _number(value: float | int, digits: int, powers: bool) -> str:
    if not powers or value == 0:
        return f"{float(f'{value:.{digits}g}'):.{max(digits, 6)}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _labeled(setting: _Setting, slanted: bool) -> list:
    """The values with a label, as many as do not touch: zero first, which cannot be guessed from others, then ends and round numbers."""
    at = dict(
        zip(setting.places, _positions(list(setting.places.values()), setting.scale), strict=True)
    )
    # In widths of a panel: a character takes a thirtieth.
    half = {
        value: 0.03 if slanted else max(0.06, 0.017 * len(text) + 0.015)
        for value, text in setting.texts.items()
    }
    kept, ends = [], {min(at.values()), max(at.values())}
    for value in sorted(
        at, key=lambda value: (value != 0, at[value] not in ends, len(setting.texts[value]))
    ):
        if all(abs(at[value] - at[other]) >= half[value] + half[other] for other in kept):
            kept.append(value)
    return sorted(kept, key=lambda value: at[value])


# --- Drawing ------------------------------------------------------------------------------------------------------------------------------


# What a point has to say of itself, the worst last; most have nothing to.
_MARKS = {
    "": ({"marker": "o", "markersize": 3.5}, ""),
    "alone": (
        {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"},
        "one run, without a standard error",
    ),
    "failed": (
        {"marker": "D", "markersize": 4.5, "markerfacecolor": "white"},
        "some runs failed: mean of the others",
    ),
    "unconverged": (
        {"marker": "x", "markersize": 7, "markeredgewidth": 1.8},
        "some transport problem was not solved",
    ),
}


def _mark(group: Any) -> str:
    if group.unconverged:
        return "unconverged"
    if group.failed:
        return "failed"
    return "" if np.isfinite(group.errors["gap"]) else "alone"


def _draw(row: _Row, settings: Mapping[str, _Setting], panels: Any) -> None:
    setting = settings[row.along]
    colors = _shades(list(row.lines))
    width = 1.3 if row.joined else 0.0
    # Over a name, lines stand side by side.
    apart = 0.6 / max(len(colors), 5) if setting.scale == "names" else 0.0
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        # Before the lines, whose margins depend on the scale.
        _lay(axes, setting)
        for i, (some, color) in enumerate(zip(row.lines.values(), colors, strict=True)):
            shift = apart * (i - (len(colors) - 1) / 2)
            _draw_line(
                axes,
                name,
                [(setting.places[group.settings.get(row.along)] + shift, group) for group in some],
                color,
                width,
            )
        drawn = [group for some in row.lines.values() for group in some]
        _scale_heights(
            axes,
            *(
                np.array([getattr(group, kind)[name] for group in drawn])
                for kind in ("means", "errors")
            ),
        )
        axes.set(xlabel=in_words(row.along), ylabel=title)
    clean(*panels)
    # Over the middle, where a title may be as wide as the row.
    panels[1].set_title(textwrap.fill(row.title, 130), fontsize="small")
    if row.by:
        _name_lines(panels[-1], row, settings[row.by], colors, width)


def _draw_line(
    axes: Axes, name: str, points: list[tuple[float | int, Any]], color: Any, width: float | int
) -> None:
    points = sorted(points, key=lambda point: point[0])
    x, y = (
        np.array([place for place, _ in points]),
        np.array([group.means[name] for _, group in points]),
    )
    errors = np.array([group.errors[name] for _, group in points])
    axes.errorbar(x, y, yerr=errors, color=color, linewidth=width, elinewidth=1, capsize=2)
    marks = np.array([_mark(group) for _, group in points])
    for mark in np.unique(marks):
        axes.plot(
            x[marks == mark], y[marks == mark], linestyle="none", color=color, **_MARKS[mark][0]
        )


def _name_lines(
    axes: Axes, row: _Row, setting: _Setting, colors: Sequence[Any], width: float | int
) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=color,
            linewidth=width,
            label=textwrap.fill(setting.texts[value], 24),
            **_MARKS[""][0],
        )
        for value, color in zip(row.lines, colors, strict=True)
    ]
    left_out = len(setting.places) - len(row.lines)
    title = in_words(row.by) + (f" ({len(row.lines)} of {len(setting.places)})" if left_out else "")
    axes.legend(
        handles=handles,
        title=title,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )


def _lay(axes: Axes, setting: _Setting) -> None:
    labeled, names = _labeled(setting, False), setting.scale == "names"
    slanted = names and len(labeled) < len(setting.places)
    if slanted:
        labeled = _labeled(setting, True)
    if names:
        axes.set_xlim(-0.5, len(setting.places) - 0.5)
    elif setting.scale == "symlog":
        axes.set_xscale(
            "symlog", linthresh=min(place for place in setting.places.values() if place > 0)
        )
    else:
        axes.set_xscale(setting.scale)
    axes.set_xticks(
        [setting.places[value] for value in labeled], [setting.texts[value] for value in labeled]
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    if "all" in setting.texts.values():
        # Where all lies is no number, and no ticks lead up to it.
        axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize="small")
    if slanted:
        axes.tick_params("x", rotation=25)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")


def _scale_heights(axes: Axes, means: np.ndarray, errors: np.ndarray) -> None:
    """From zero, unless some bars go below; logarithmic where all means are positive and a linear axis would not tell them apart."""
    lowest = float((means - np.nan_to_num(errors)).min())
    if means.min() > 0 and means.max() >= 30 * means.min():
        axes.set_yscale("log")
        # A bar that reaches zero would stretch the axis without end.
        axes.set_ylim(bottom=max(lowest, means.min() / 3) / 1.2)
        axes.yaxis.set_minor_formatter(NullFormatter())
        if means.max() < 300 * means.min():
            # Too few powers of ten to read numbers from.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda y, _: _number(y, 3, not 1e-3 <= y < 1e5))
    elif lowest >= 0:
        axes.set_ylim(0, None)
    else:
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)


def _shades(lines: Sequence[Any]) -> list:
    if len(lines) <= 1:
        return [COLORS[0]] * len(lines)
    if isinstance(lines[0], str) and len(lines) <= len(COLORS):
        return list(COLORS[: len(lines)])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(lines))))


def _explain(figure: Figure, marks: set[str], missing: int, total: int) -> None:
    """What the marks mean and how much is not there, below the panels."""
    told = [_MARKS[mark] for mark in _MARKS if mark and mark in marks]
    handles = [
        Line2D([], [], linestyle="none", color="black", label=words, **style)
        for style, words in told
    ]
    if missing:
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                label=f"combinations without a run that is done: {missing} of {total}",
            )
        )
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small"
        )
