"""The figure of the settings of a study: each number against each setting that varies.

The figure first chooses what to draw (rows of panels, their lines, settings held at one value),
then lays each setting out on an axis (its scale and labels), and then draws.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

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

# More lines than these cannot be distinguished.
MOST_LINES = 8

# Settings whose value 0 means all.
_ZERO_IS_ALL = ("batch_size", "chunk")


@runtime_checkable
class GroupLike(Protocol):
    """Anything that `plot_settings` can draw, such as an `esl.study.Group`.

    A group is a set of runs that differ in their seed alone.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that vary and their values here; every group has the same settings."""
        ...

    @property
    def runs(self) -> int:
        """The number of runs that are done."""
        ...

    @property
    def failed(self) -> int:
        """The number of runs that failed."""
        ...

    @property
    def unconverged(self) -> int:
        """The number of finished runs with a transport problem that was not solved."""
        ...

    @property
    def means(self) -> Mapping[str, float]:
        """Means over the runs: `entropy_production`, `w2_squared` and `gap` are drawn."""
        ...

    @property
    def errors(self) -> Mapping[str, float]:
        """Standard errors of the means by the same names; NaN where one is not known."""
        ...


def plot_settings(groups: Sequence[GroupLike]) -> Figure:
    """Plot Σ, W2² and the gap, with standard errors, against each numeric setting of a study.

    Each setting has a row of three panels. The lines of a panel are the values of one other
    setting, at most eight of them. Any further settings are held at the values that most groups
    share, if possible at their middle values; the title of the row names them. Where groups share
    no values, all are drawn as dots.

    Three marks, explained below the panels, show means without the runs that failed, means that
    include a transport problem that was not solved, and single runs without a standard error.

    **Args:** `groups`: the result of `esl.study.summarize`.
    **Returns:** the figure, which `savefig` writes.
    **Raises:** `InputError` if no group has a finished run with finite numbers.

    **Example:**

        >>> import esljax as esl
        >>> from esljax.figures import plot_settings
        >>> means = [{"entropy_production": 3 + i, "w2_squared": 2, "gap": 1 + i} for i in range(3)]
        >>> errors = {"entropy_production": 0.2, "w2_squared": 0.1, "gap": 0.1}
        >>> groups = [
        ...     esl.study.Group({"rate": 0.1 * 2**i}, 4, 4, 0, 0, means[i], errors)
        ...     for i in range(3)
        ... ]
        >>> [axes.get_xlabel() for axes in plot_settings(groups).axes]
        ['rate', 'rate', 'rate']
    """
    known = [
        group
        for group in groups
        if group.runs and np.isfinite([group.means[name] for name in _PANELS]).all()
    ]
    if not known:
        raise refuse("study", "have runs that are done", "has none with finite numbers yet")
    settings = {
        name: setting_of(name, [group.settings[name] for group in known])
        for name in known[0].settings
    } or {"": _SEEDS}
    rows = _rows(known, settings)
    figure = Figure(figsize=(10.4, 3.0 * len(rows) + 0.3), layout="constrained")
    for row, panels in zip(rows, figure.subplots(len(rows), 3, squeeze=False), strict=True):
        _draw(row, settings, panels)
    _explain(
        figure,
        {mark_of(group) for row in rows for line in row.lines.values() for group in line},
        len(groups) - len(known),
        len(groups),
    )
    return figure


# Choice of what is drawn


class Setting(NamedTuple):
    """The places of a setting's values on an axis, in order, and their labels there."""

    places: dict[Any, float | int]
    texts: dict[Any, str]
    scale: str
    """A scale of matplotlib, or `names`."""


# The axis of a study whose runs differ in their seed alone.
_SEEDS = Setting({None: 0.0}, {None: "all seeds"}, "names")


class _Row(NamedTuple):
    """Panels with the setting `along` on their axis, and a line for each value of `by`."""

    along: str
    by: str
    lines: dict[Any, list[GroupLike]]
    joined: bool
    title: str


def _rows(groups: list[GroupLike], settings: Mapping[str, Setting]) -> list[_Row]:
    varying = [name for name, setting in settings.items() if len(setting.places) > 1] or list(
        settings
    )[:1]
    numeric = [name for name in varying if settings[name].scale != "names"]
    return [
        _row(along, [name for name in varying if name != along], groups, settings)
        for along in numeric or varying[:1]
    ]


def _row(
    along: str, others: list[str], groups: list[GroupLike], settings: Mapping[str, Setting]
) -> _Row:
    # The setting with the fewest values makes the lines; the others are held.
    by, *rest = sorted(others, key=lambda name: len(settings[name].places)) or [""]
    held = _held(along, rest, groups, settings)
    lines: dict[Any, list[GroupLike]] = (
        {value: [] for value in settings[by].places} if by else {None: []}
    )
    for group in groups:
        if all(group.settings[name] == value for name, value in held.items()):
            lines[group.settings[by] if by else None].append(group)
    if others and not any(_goes_along(along, line) for line in lines.values()):
        return _Row(along, "", {None: groups}, False, "the other settings vary as well")
    lines = _clearest(along, lines)
    if by and len(lines) == 1:
        held[by], by = next(iter(lines)), ""
    values = ", ".join(
        f"{in_words(name)} {settings[name].texts[held[name]]}" for name in settings if name in held
    )
    title = f"at {values}" if values else ""
    return _Row(along, by, lines, settings[along].scale != "names", title)


def _held(
    along: str, names: list[str], groups: list[GroupLike], settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """The combination of values with the most groups to draw; of equals, the one in the middle.

    A list of points need not have the middle values together, and diverged runs leave holes in a
    grid.
    """
    sharing: dict[tuple, list[GroupLike]] = {}
    for group in groups:
        sharing.setdefault(tuple(group.settings[name] for name in names), []).append(group)
    ranks = [{value: i for i, value in enumerate(settings[name].places)} for name in names]

    def worth(values: tuple) -> tuple:
        off = sum(
            abs(rank[value] - len(rank) // 2) for rank, value in zip(ranks, values, strict=True)
        )
        return _goes_along(along, sharing[values]), len(sharing[values]), -off

    return dict(zip(names, max(sharing, key=worth), strict=True))


def _goes_along(along: str, groups: list[GroupLike]) -> bool:
    """Whether the groups have two or more places on the axis."""
    return len({group.settings.get(along) for group in groups}) > 1


def _clearest(along: str, lines: Mapping[Any, list[GroupLike]]) -> dict[Any, list[GroupLike]]:
    """The lines that are not empty; if there are too many, an even choice of the longer ones."""
    drawn = {value: groups for value, groups in lines.items() if groups}
    if len(drawn) <= MOST_LINES:
        return drawn
    values = [value for value, groups in drawn.items() if _goes_along(along, groups)]
    chosen = np.linspace(0, len(values) - 1, min(len(values), MOST_LINES)).round().astype(int)
    return {values[i]: drawn[values[i]] for i in chosen}


# Settings on axes


def setting_of(name: str, seen: list) -> Setting:
    """The axis of a setting with the values that were seen."""
    values = list(dict.fromkeys(seen))
    if isinstance(values[0], str):
        return Setting(
            {value: float(i) for i, value in enumerate(values)},
            {value: in_words(value) for value in values},
            "names",
        )
    values = sorted(values)
    if not (name in _ZERO_IS_ALL and values[0] == 0):
        return Setting(dict(zip(values, values, strict=True)), _texts(values), _scale(values))
    counts = values[1:]
    scale = _scale(counts)
    return Setting(
        {**dict(zip(counts, counts, strict=True)), 0: _beyond(counts, scale)},
        {**_texts(counts), 0: "all"},
        scale,
    )


def _beyond(counts: Sequence[float | int], scale: str) -> float | int:
    """The place of "all": one step of the usual size beyond the last count."""
    if len(counts) < 2:
        return 2.0 * counts[0] if counts else 0.0
    steps = len(counts) - 1
    if scale == "log":
        return counts[-1] * (counts[-1] / counts[0]) ** (1 / steps)
    return counts[-1] + (counts[-1] - counts[0]) / steps


def _scale(values: Sequence[float | int]) -> str:
    """The scale on which the two closest values are further apart.

    Without a difference, the logarithmic one if the values span a factor of four.
    """
    positive = [value for value in values if value > 0]
    if len(values) < 2 or values[0] < 0 or values[-1] < 4 * positive[0]:
        return "linear"
    curved = "log" if values[0] else "symlog"
    closest = {scale: np.diff(_positions(values, scale)).min() for scale in ("linear", curved)}
    return curved if closest[curved] >= closest["linear"] * (1 - 1e-9) else "linear"


def _positions(places: Sequence[float | int], scale: str) -> np.ndarray:
    """The places along the axis, as fractions of its length."""
    x = np.array(places, float)
    if scale == "names":
        return (x + 0.5) / len(x)
    if scale in ("log", "symlog"):
        # Zero is a decade below the rest, as on matplotlib's axis.
        x = np.log10(np.where(x > 0, x, x[x > 0].min() / 10))
    return (x - x.min()) / (np.ptp(x) or 1.0)


def _texts(values: Sequence[float | int]) -> dict[Any, str]:
    """The numbers in the fewest digits, at least three, that distinguish them."""
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


def _labeled(setting: Setting, slanted: bool) -> list:
    """The values to label, as many as do not touch each other.

    Zero has priority, because it cannot be guessed from the others; then ends and short labels.
    """
    at = dict(
        zip(setting.places, _positions(list(setting.places.values()), setting.scale), strict=True)
    )
    # In widths of a panel, of which a character takes a thirtieth.
    half = {
        value: 0.03 if slanted else max(0.06, 0.017 * len(text) + 0.015)
        for value, text in setting.texts.items()
    }
    labeled, ends = [], {min(at.values()), max(at.values())}
    for value in sorted(
        at, key=lambda value: (value != 0, at[value] not in ends, len(setting.texts[value]))
    ):
        if all(abs(at[value] - at[other]) >= half[value] + half[other] for other in labeled):
            labeled.append(value)
    return sorted(labeled, key=lambda value: at[value])


# Drawing


# The marks of points and their explanations, the worst last; an ordinary point needs none.
MARKS = {
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


def mark_of(group: GroupLike) -> str:
    """The mark of a point, by the worst of what there is to say about it."""
    if group.unconverged:
        return "unconverged"
    if group.failed:
        return "failed"
    return "" if np.isfinite(group.errors["gap"]) else "alone"


def _draw(row: _Row, settings: Mapping[str, Setting], panels: Any) -> None:
    setting = settings[row.along]
    colors = shades_of(list(row.lines))
    width = 1.3 if row.joined else 0.0
    # Over a name, lines are drawn side by side.
    apart = 0.6 / max(len(colors), 5) if setting.scale == "names" else 0.0
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        # Laid out before the lines, whose margins depend on the scale.
        lay(axes, setting)
        for i, (line, color) in enumerate(zip(row.lines.values(), colors, strict=True)):
            shift = apart * (i - (len(colors) - 1) / 2)
            _draw_line(
                axes,
                name,
                [(setting.places[group.settings.get(row.along)] + shift, group) for group in line],
                color,
                width,
            )
        drawn = [group for line in row.lines.values() for group in line]
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
    axes: Axes,
    name: str,
    points: list[tuple[float | int, GroupLike]],
    color: Any,
    width: float | int,
) -> None:
    points = sorted(points, key=lambda point: point[0])
    x, y = (
        np.array([place for place, _ in points]),
        np.array([group.means[name] for _, group in points]),
    )
    errors = np.array([group.errors[name] for _, group in points])
    axes.errorbar(x, y, yerr=errors, color=color, linewidth=width, elinewidth=1, capsize=2)
    marks = np.array([mark_of(group) for _, group in points])
    for mark in np.unique(marks):
        axes.plot(
            x[marks == mark], y[marks == mark], linestyle="none", color=color, **MARKS[mark][0]
        )


def _name_lines(
    axes: Axes, row: _Row, setting: Setting, colors: Sequence[Any], width: float | int
) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=color,
            linewidth=width,
            label=textwrap.fill(setting.texts[value], 24),
            **MARKS[""][0],
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


def lay(axes: Axes, setting: Setting) -> None:
    """Scale and label the horizontal axis of a setting."""
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
        # The place of "all" is no number, so no minor ticks lead up to it.
        axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize="small")
    if slanted:
        axes.tick_params("x", rotation=25)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")


def _scale_heights(axes: Axes, means: np.ndarray, errors: np.ndarray) -> None:
    """Scale an axis of numbers: from zero, unless some error bars go below it.

    The scale is logarithmic if all means are positive and span a factor of thirty.
    """
    lowest = float((means - np.nan_to_num(errors)).min())
    if means.min() > 0 and means.max() >= 30 * means.min():
        axes.set_yscale("log")
        # A bar that reaches zero would stretch the axis without end.
        axes.set_ylim(bottom=max(lowest, means.min() / 3) / 1.2)
        label_powers(axes.yaxis, float(means.min()), float(means.max()))
    elif lowest >= 0:
        axes.set_ylim(0, None)
    else:
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)


def label_powers(axis: Any, least: float, greatest: float) -> None:
    """Label a logarithmic axis of numbers between two."""
    axis.set_minor_formatter(NullFormatter())
    if greatest < 300 * least:
        # Too few powers of ten to read numbers from.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda y, _: _number(y, 3, not 1e-3 <= y < 1e5))


def shades_of(lines: Sequence[Any]) -> list:
    """A color for each line: of a few names distinct ones, of numbers in their order."""
    if len(lines) <= 1:
        return [COLORS[0]] * len(lines)
    if isinstance(lines[0], str) and len(lines) <= len(COLORS):
        return list(COLORS[: len(lines)])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(lines))))


def _explain(figure: Figure, marks: set[str], missing: int, total: int) -> None:
    """Explain the marks, and count the missing groups, below the panels."""
    explained = [MARKS[mark] for mark in MARKS if mark and mark in marks]
    handles = [
        Line2D([], [], linestyle="none", color="black", label=words, **style)
        for style, words in explained
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
