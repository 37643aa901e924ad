"""The figure of a study: any two of its numbers and settings against each other.

By default Σ against the final loss, a line for each schedule. What the figure leaves out stands
below it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from esljax._checks import refuse
from esljax.figures.study import (
    MARKS,
    MOST_LINES,
    GroupLike,
    Setting,
    label_powers,
    lay,
    setting_of,
    shades_of,
)
from esljax.figures.style import clean, in_words

# Names that a figure writes otherwise than `in_words` does.
_TITLES = {
    "entropy_production": "entropy production $\\Sigma$",
    "length_squared": "$L^2$",
    "w2_squared": "$W_2^2$, the limit",
    "gap": "gap $\\Sigma - W_2^2$",
    "final_loss": "final training loss",
    "rate": "peak learning rate",
    "target": "target loss",
}
# Settings that move along a line, where a figure has none of its own for them.
_ALONG = ("rate", "target")
# The most panels, and values of a setting that becomes panels by itself.
_MOST_PANELS, _MOST_OWN = 9, 6
_NONE = "none"


class _Point(NamedTuple):
    """Some groups as one point."""

    x: Any
    y: float
    x_error: float
    y_error: float
    mark: str


class _Choice(NamedTuple):
    """What the figure draws."""

    x: str
    y: str
    hue: str
    facet: str
    along: tuple[str, ...]
    averaged: tuple[str, ...]


def plot_study(
    groups: Sequence[GroupLike],
    *,
    x: str = "final_loss",
    y: str = "entropy_production",
    hue: str | None = None,
    facet: str | None = None,
) -> Figure:
    """Plot a number of a study against another one, or against a setting.

    Points are means over the seeds, with standard errors in both directions. Runs that differ in
    their rate or target make the points of a line, and what else varies is averaged over, unless
    it is an axis, the color or the panel. What is left out is said below the panels: failed runs,
    runs that are not done, settings averaged over, lines and panels beyond those that fit.

    **Args:**
    - `groups`: the result of `esl.study.summarize`.
    - `x`, `y`: a number, such as "gap", or a setting that varies, such as "rate".
    - `hue`: the setting of the colors; by default the schedule where it varies, else the first one
      that is left. "none" for one color.
    - `facet`: the setting of the panels; by default the first that is left with few values. "none"
      for one panel.

    **Returns:** the figure, which `savefig` writes.
    **Raises:** `InputError` for a name that the study does not have, a `y` that is not a number,
    and if no group has a finished run with finite numbers.

    **Example:**

        >>> import esljax as esl
        >>> from esljax.figures import plot_study
        >>> groups = [
        ...     esl.study.Group(
        ...         {"schedule": name, "target": loss},
        ...         4, 4, 0, 0,
        ...         {"final_loss": loss, "entropy_production": sigma / loss},
        ...         {"final_loss": 0.01, "entropy_production": 2.0},
        ...     )
        ...     for loss in (0.2, 0.3)
        ...     for name, sigma in (("constant", 90.0), ("cosine", 70.0))
        ... ]
        >>> [(axes.get_xlabel(), len(axes.lines)) for axes in plot_study(groups).axes]
        [('final training loss', 12)]
    """
    if not groups:
        raise refuse("study", "have runs that are done", "has none")
    choice = _chosen(groups, x, y, hue, facet)
    known = [group for group in groups if group.runs and _finite(group, choice)]
    if not known:
        raise refuse("study", "have runs that are done", "has none with finite numbers yet")
    panels = _panels(known, choice)
    shown = _some(list(panels), _MOST_PANELS)
    values = dict.fromkeys(group.settings[choice.hue] if choice.hue else None for group in known)
    hues = sorted(values, key=_order)
    lines = _some(hues, MOST_LINES)
    figure = Figure(figsize=_size(len(shown)), layout="constrained")
    columns = min(3, len(shown))
    grid = figure.subplots(
        -(-len(shown) // columns), columns, squeeze=False, sharex=True, sharey=True
    ).reshape(-1)
    colors = dict(zip(lines, shades_of(lines), strict=True))
    setting = None if _is_number(known[0], x) else setting_of(x, [g.settings[x] for g in known])
    marks: set[str] = set()
    for axes, value in zip(grid, shown, strict=False):
        _scale(axes, known, choice, setting)
        for name in lines:
            if name in panels[value]:
                marks |= _draw(axes, panels[value][name], colors[name], choice, setting)
        title = f"{in_words(choice.facet)} {_text(value)}" if choice.facet else ""
        axes.set_title(title, fontsize="small")
    clean(*grid)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    for i, axes in enumerate(grid[: len(shown)]):
        if i + columns >= len(shown):
            axes.set_xlabel(_title(choice.x))
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(_title(choice.y))
    if choice.hue:
        _legend(grid[min(columns, len(shown)) - 1], choice.hue, colors, len(hues))
    _say(figure, groups, known, choice, marks, (len(shown), len(panels)))
    return figure


# Choice of what is drawn


def _chosen(
    groups: Sequence[GroupLike], x: str, y: str, hue: str | None, facet: str | None
) -> _Choice:
    varying = [
        name for name in groups[0].settings if len({group.settings[name] for group in groups}) > 1
    ]
    numbers = list(groups[0].means)
    for argument, name in (("x", x), ("y", y)):
        if name not in groups[0].settings and name not in numbers:
            known = ", ".join(dict.fromkeys([*groups[0].settings, *numbers]))
            must = f"be a setting that varies or a number of the study ({known})"
            raise refuse(argument, must, f"is {name!r}")
    if not _is_number(groups[0], y) and isinstance(groups[0].settings[y], str | tuple):
        raise refuse("y", "be a number", f"is the setting {y!r}")
    for argument, name in (("hue", hue), ("facet", facet)):
        if name not in (None, _NONE) and name not in groups[0].settings:
            known = ", ".join([*groups[0].settings, _NONE])
            raise refuse(argument, f"be a setting that varies ({known})", f"is {name!r}")
    used = {x, y, hue, facet}
    along = () if not (_is_number(groups[0], x)) else _ALONG
    left = [name for name in varying if name not in used and name not in along]
    if hue is None:
        free = [name for name in varying if name not in used]
        hue = "schedule" if "schedule" in free else (left[0] if left else _NONE)
        left = [name for name in left if name != hue]
    if facet is None:
        few = [
            name for name in left if len({group.settings[name] for group in groups}) <= _MOST_OWN
        ]
        facet = few[0] if few else _NONE
        left = [name for name in left if name != facet]
    hue, facet = ("" if name == _NONE else name for name in (hue, facet))
    along = tuple(name for name in along if name in varying and name not in (x, y, hue, facet))
    return _Choice(x, y, hue, facet, along, tuple(left))


def _is_number(group: GroupLike, name: str) -> bool:
    """Whether a name is that of a number, and not of a setting."""
    return name in group.means and name not in group.settings


def _value(group: GroupLike, name: str) -> tuple[Any, float]:
    if _is_number(group, name):
        return group.means[name], group.errors[name]
    return group.settings[name], np.nan


def _finite(group: GroupLike, choice: _Choice) -> bool:
    values = [_value(group, name)[0] for name in (choice.x, choice.y)]
    return all(isinstance(value, str | tuple) or np.isfinite(value) for value in values)


def _panels(groups: Sequence[GroupLike], choice: _Choice) -> dict[Any, dict[Any, list[_Point]]]:
    """Points by panel and color."""
    together: dict[tuple, list[GroupLike]] = {}
    for group in groups:
        places = [group.settings[name] if name else None for name in (choice.facet, choice.hue)]
        more = [group.settings[name] for name in choice.along]
        more += [
            group.settings[name] for name in (choice.x, choice.y) if not _is_number(group, name)
        ]
        together.setdefault((*places, *more), []).append(group)
    panels: dict[Any, dict[Any, list[_Point]]] = {}
    for (panel, line, *_), some in together.items():
        panels.setdefault(panel, {}).setdefault(line, []).append(_pooled(some, choice))
    return dict(sorted(panels.items(), key=lambda item: _order(item[0])))


def _pooled(groups: list[GroupLike], choice: _Choice) -> _Point:
    """The mean over all runs of some groups; its error is that of the means, at these settings."""
    weights = np.array([group.runs for group in groups], float)
    weights /= weights.sum()
    numbers = []
    for name in (choice.x, choice.y):
        values, errors = zip(*(_value(group, name) for group in groups), strict=True)
        if _is_number(groups[0], name):
            error = float(np.sqrt(np.sum((weights * np.array(errors)) ** 2)))
            numbers.append((float(np.sum(weights * np.array(values))), error))
        else:
            numbers.append((values[0], np.nan))
    (x, x_error), (y, y_error) = numbers
    failed, unsolved = (sum(getattr(g, name) for g in groups) for name in ("failed", "unconverged"))
    alone = "" if np.isfinite(y_error) or not _is_number(groups[0], choice.y) else "alone"
    mark = "unconverged" if unsolved else "failed" if failed else alone
    return _Point(x, y, x_error, y_error, mark)


def _some(values: list, most: int) -> list:
    """All values, or an even choice of them if there are too many."""
    if len(values) <= most:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]


def _order(value: Any) -> tuple:
    """Numbers by size, and names as they come."""
    return (0, value) if isinstance(value, int | float) else (1, 0)


# Drawing


def _size(panels: int) -> tuple[float, float]:
    columns, rows = min(3, panels), math.ceil(panels / 3)
    return (6.4, 4.4) if panels == 1 else (3.4 * columns + 1.4, 3.1 * rows + 0.6)


def _scale(
    axes: Any, groups: Sequence[GroupLike], choice: _Choice, setting: Setting | None
) -> None:
    for name, axis in ((choice.x, "x"), (choice.y, "y")):
        if name == choice.x and setting is not None:
            lay(axes, setting)
            continue
        values = np.array([_value(group, name)[0] for group in groups], float)
        if values.min() > 0 and values.max() >= 3 * values.min():
            getattr(axes, f"set_{axis}scale")("log")
            least, greatest = float(values.min()), float(values.max())
            label_powers(getattr(axes, f"{axis}axis"), least, greatest)
            axes.tick_params(which="both", labelsize="small")


def _draw(
    axes: Any, points: list[_Point], color: Any, choice: _Choice, setting: Setting | None
) -> set[str]:
    """Draw one line and return the marks of its points."""
    places: Any = {} if setting is None else setting.places
    points = sorted(points, key=lambda point: places.get(point.x, point.x))
    x = np.array([places.get(point.x, point.x) for point in points], float)
    y = np.array([point.y for point in points], float)
    joined = bool(choice.along) or (setting is not None and setting.scale != "names")
    axes.errorbar(
        x,
        y,
        xerr=None if setting is not None else [np.nan_to_num(p.x_error) for p in points],
        yerr=[np.nan_to_num(point.y_error) for point in points],
        color=color,
        linewidth=1.3 if joined else 0.0,
        elinewidth=1,
        capsize=2,
    )
    marks = np.array([point.mark for point in points])
    for mark in np.unique(marks):
        axes.plot(
            x[marks == mark], y[marks == mark], linestyle="none", color=color, **MARKS[mark][0]
        )
    return set(marks.tolist())


def _legend(axes: Any, hue: str, colors: Mapping[Any, Any], total: int) -> None:
    handles = [
        Line2D([], [], color=color, linewidth=1.3, label=_text(value), **MARKS[""][0])
        for value, color in colors.items()
    ]
    some = f" ({len(colors)} of {total})" if len(colors) < total else ""
    axes.legend(
        handles=handles,
        title=in_words(hue) + some,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )


def _say(
    figure: Figure,
    groups: Sequence[GroupLike],
    known: Sequence[GroupLike],
    choice: _Choice,
    marks: set[str],
    panels: tuple[int, int],
) -> None:
    """Explain the marks, and say what the figure leaves out, below the panels."""
    explained = [MARKS[mark] for mark in MARKS if mark and mark in marks]
    handles = [
        Line2D([], [], linestyle="none", color="black", label=words, **style)
        for style, words in explained
    ]
    for words in left_out(groups, known, choice.averaged, choice.facet, panels):
        handles.append(Line2D([], [], linestyle="none", label=words))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2 if len(handles) > 3 else 1,
            frameon=False,
            fontsize="small",
        )


def left_out(
    groups: Sequence[GroupLike],
    known: Sequence[GroupLike],
    averaged: Sequence[str],
    facet: str,
    panels: tuple[int, int],
) -> list[str]:
    """What error bars are and what a figure does not show, in words."""
    failed = sum(group.failed for group in groups)
    to_do = sum(getattr(group, "asked", group.runs) - group.runs - group.failed for group in groups)
    lost = sum(group.runs for group in groups) - sum(group.runs for group in known)
    words = ["error bars: standard errors over the seeds"]
    if failed:
        words.append(f"left out: {failed} failed run{'s' * (failed > 1)}")
    if to_do:
        words.append(f"left out: {to_do} run{'s' * (to_do > 1)} not done yet")
    if lost:
        words.append(f"left out: {lost} run{'s' * (lost > 1)} without these numbers")
    if panels[0] < panels[1]:
        words.append(
            f"left out: {panels[1] - panels[0]} of {panels[1]} values of {in_words(facet)}"
        )
    for name in averaged:
        count = len({group.settings[name] for group in known})
        words.append(f"averaged over {in_words(name)}, {count} values")
    return words


def _title(name: str) -> str:
    return _TITLES.get(name, in_words(name))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else in_words(str(value))
