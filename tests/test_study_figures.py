"""The figure of a study, of groups made by hand: its lines, its words, and that all can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

import esljax as esl
from esljax.figures import plot_schedules, plot_settings, plot_speed_limit
from esljax.figures.schedules import ReportLike
from esljax.figures.study import GroupLike


def group(settings, gap=1.0, error=0.1, runs=4, failed=0, unconverged=0):
    """A group whose Σ and W2² go with its gap."""
    means = {"entropy_production": 5 * abs(gap) + gap, "w2_squared": 5 * abs(gap), "gap": gap}
    errors = dict.fromkeys(means, error)
    return esl.study.Group(settings, runs, runs + failed, failed, unconverged, means, errors)


def grid(gap=lambda **settings: 1.0, **values):
    """One group for each combination of the values."""
    combinations = (
        dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())
    )
    return [group(settings, gap(**settings)) for settings in combinations]


def one_at_a_time(base, **values):
    """A list of points: each setting varies where the others are at their base."""
    settings = [
        {**base, name: value}
        for name, some in values.items()
        for value in some
        if value != base[name]
    ]
    return [group(some) for some in [base, *settings]]


def drawn(groups):
    """A figure whose text lies within it, and whose tick labels do not overlap."""
    figure = plot_settings(groups)
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)
    for text in figure.findobj(
        lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text()
    ):
        box = text.get_window_extent()
        # Ticks beyond the ends of an axis are kept, but not drawn.
        if all(
            text not in axis.get_ticklabels(which="both") or text in labels(axis)
            for axes in figure.axes
            for axis in _two(axes)
        ):
            assert inside.contains(box.x0, box.y0), text
            assert inside.contains(box.x1, box.y1), text
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in labels(axes.xaxis) if not text.get_rotation()]
        for left, right in itertools.pairwise(sorted(boxes, key=lambda box: box.x0)):
            assert left.x1 < right.x0, labels(axes.xaxis)
    return figure


def _two(axes):
    return (axes.xaxis, axes.yaxis)


def labels(axis):
    """The visible tick labels of an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)]
    ticks += zip(axis.get_minorticklocs(), axis.get_minorticklabels(), strict=True)
    return [text for place, text in ticks if low <= place <= high and text.get_text()]


def words(axis):
    return [text.get_text() for text in labels(axis)]


def rows(figure):
    """The first panel of each row."""
    return figure.axes[::3]


def data(axes):
    """The points of each line of a panel."""
    return [bars.lines[0].get_xydata() for bars in axes.containers]


def notes(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def markers(axes):
    """Marker, filling and points of all that is marked in a panel."""
    lines = [
        line
        for line in axes.lines
        if line.get_linestyle() == "None" and line.get_marker() in ("o", "x", "D")
    ]
    return {
        (line.get_marker(), line.get_markerfacecolor() == "white"): line.get_xdata().tolist()
        for line in lines
    }


# Held settings


def test_one_setting_at_a_time():
    """The middle values of other settings need not occur together."""
    base = {"rate": 0.1, "members": 8, "temperature": 1e-7, "schedule": "constant"}
    values = {
        "rate": [0.1, 0.2, 0.4, 0.8],
        "members": [8, 16, 32],
        "temperature": [1e-7, 1e-6, 1e-5],
        "schedule": ["constant", "cosine"],
    }
    figure = drawn(one_at_a_time(base, **values))
    assert [axes.get_xlabel() for axes in rows(figure)] == ["rate", "members", "temperature"]
    for axes, name in zip(rows(figure), values, strict=False):
        longest = max(data(axes), key=len)
        np.testing.assert_allclose(longest[:, 0], values[name])


def test_settings_are_held_where_most_groups_are():
    """The middle of a full grid is held, unless its runs have diverged."""
    full = grid(rate=[0.1, 0.2, 0.4], members=[4, 8, 16], schedule=["constant", "cosine"])
    assert "members 8" in drawn(full).axes[1].get_title()
    nan = dict.fromkeys(("entropy_production", "w2_squared", "gap"), np.nan)
    partial = [
        one._replace(runs=0, failed=4, means=nan)
        if one.settings["members"] == 8 and one.settings["rate"] > 0.1
        else one
        for one in full
    ]
    figure = drawn(partial)
    assert figure.axes[1].get_title() == "at members 4"
    assert "combinations without a run that is done: 4 of 18" in notes(figure)


def test_settings_that_nothing_shares_are_dots():
    """A random search: no line has two points, so all points are drawn, and none are joined."""
    numbers = np.random.default_rng(0).uniform(0.1, 1, (12, 3))
    groups = [
        group(dict(zip(("rate", "epsilon", "l2"), some, strict=True))) for some in numbers.tolist()
    ]
    figure = drawn(groups)
    assert [axes.get_xlabel() for axes in rows(figure)] == ["rate", "epsilon", "l2"]
    for axes in rows(figure):
        assert [len(line) for line in data(axes)] == [12]
        assert axes.containers[0].lines[0].get_linewidth() == 0
    assert [axes.get_title() for axes in figure.axes[1::3]] == [
        "the other settings vary as well"
    ] * 3


def test_many_held_settings_stay_in_the_figure():
    base = {
        "rate": 0.123456789,
        "l2": 0.333333333333,
        "epsilon": 0.1,
        "temperature": 1e-7,
        "members": 8,
        "steps": 100000,
    }
    base |= {
        "directions": 64,
        "jackknife": 0,
        "batch_size": 512,
        "chunk": 0,
        "schedule": "warmup_stable_decay",
    }
    # Settings that are all names have one row.
    groups = [
        group({**{name: f"{name} {value}" for name, value in base.items()}, "schedule": shape})
        for shape in ("constant", "cosine")
    ]
    groups += [group({**groups[0].settings, name: "other"}) for name in base]
    title = drawn(groups).axes[1].get_title()
    assert "steps steps 100000" in title
    assert "\n" in title


# Axes


def test_an_axis_of_many_values_has_labels():
    """Between 0.2 and 0.9 there is no decade."""
    values = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9]
    axes = rows(drawn(grid(rate=values)))[0]
    assert 4 <= len(words(axes.xaxis)) <= 8
    assert set(map(float, words(axes.xaxis))) <= set(values)


def test_thirty_values_are_labelled_now_and_then():
    axes = rows(drawn(grid(rate=np.geomspace(0.0123456, 9.87654, 30).tolist())))[0]
    assert axes.get_xscale() == "log"
    assert 4 <= len(words(axes.xaxis)) <= 8
    assert max(map(len, words(axes.xaxis))) <= 6


def test_zero_among_spaced_values_is_apart():
    temperatures = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
    axes = rows(drawn(grid(temperature=temperatures, rate=[0.1, 0.2, 0.4])))[0]
    assert words(axes.xaxis) == ["0", "10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³"]
    assert np.diff(axes.transData.transform(data(axes)[0])[:, 0]).min() > 0.15 * axes.bbox.width


@pytest.mark.parametrize(
    ("name", "values"),
    [("batch_size", [0, 32, 64, 128]), ("chunk", [16, 0]), ("batch_size", [64, 96, 0])],
)
def test_all_comes_last(name, values):
    """0 examples are all of them, not fewer than one."""
    axes = rows(drawn(grid(lambda **settings: settings[name] or 1000, **{name: values})))[0]
    counts = sorted(value for value in values if value)
    assert words(axes.xaxis) == [*map(str, counts), "all"]
    line = data(axes)[0]
    np.testing.assert_allclose(line[:-1, 0], counts)
    assert line[-1, 0] > counts[-1]
    assert axes.xaxis.get_minorticklocs().size == 0
    assert line[-1, 1] == max(line[:, 1])


def test_all_is_named_where_it_is_held_or_a_line():
    figure = drawn(grid(rate=[0.1, 0.2, 0.4], batch_size=[0, 32]))
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["32", "all"]
    figure = drawn(grid(rate=[0.1, 0.2, 0.4], batch_size=[0], chunk=[0, 64, 128], members=[8, 16]))
    assert figure.axes[1].get_title() == "at chunk 128"


def test_close_values_are_thinned():
    axes = rows(drawn(grid(rate=[0.1, 0.11, 0.12, 0.13, 1.0])))[0]
    assert words(axes.xaxis)[0] == "0.1"
    assert words(axes.xaxis)[-1] == "1"
    axes = rows(drawn(grid(rate=[0.1, 0.11, 0.12, 0.13])))[0]
    assert words(axes.xaxis) == ["0.1", "0.11", "0.12", "0.13"]
    axes = rows(drawn(grid(rate=[0.1, 0.11, 0.12, 0.13, 50.0])))[0]
    assert words(axes.xaxis) == ["0.1", "50"]


def test_labels_have_as_few_digits_as_distinguish_them():
    axes = rows(drawn(grid(rate=[0.123456789, 0.2, 1 / 3])))[0]
    assert words(axes.xaxis) == ["0.123", "0.2", "0.333"]
    axes = rows(drawn(grid(rate=[0.123456, 0.123466])))[0]
    assert words(axes.xaxis) == ["0.12346", "0.12347"]
    axes = rows(drawn(grid(epsilon=[1500.0, 3000.0])))[0]
    assert words(axes.xaxis) == ["1500", "3000"]


def test_numbers_that_are_not_positive_are_on_the_axis():
    gaps = {0.1: -0.02, 0.2: 0.01, 0.4: 0.0, 0.8: 5.0}
    figure = drawn([group({"rate": rate}, gap, error=0.001) for rate, gap in gaps.items()])
    panel = figure.axes[2]
    low, high = panel.get_ylim()
    assert panel.get_yscale() == "linear"
    assert low < -0.02 < 5 < high
    assert [line for line in panel.lines if not np.any(line.get_ydata())], (
        "zero is marked where something is below it"
    )


def test_a_bar_that_reaches_zero_leaves_the_axis_readable():
    gaps = {0.1: 0.01, 0.2: 0.1, 0.4: 1.0}
    groups = [group({"rate": rate}, gap, error=gap * 0.999999) for rate, gap in gaps.items()]
    panel = drawn(groups).axes[2]
    assert panel.get_yscale() == "log"
    assert 1e-3 < panel.get_ylim()[0] < 0.01
    assert len(words(panel.yaxis)) >= 2


# Lines


def test_a_choice_of_many_lines_is_drawn_and_counted():
    figure = drawn(
        grid(rate=np.linspace(0.1, 1, 30).tolist(), temperature=np.linspace(0.1, 1, 31).tolist())
    )
    legends = [axes.get_legend() for axes in figure.axes[2::3]]
    assert [legend.get_title().get_text() for legend in legends] == [
        "temperature (8 of 31)",
        "rate (8 of 30)",
    ]
    texts = [text.get_text() for text in legends[1].get_texts()]
    assert len(texts) == 8
    assert (texts[0], texts[-1]) == ("0.1", "1")


def test_a_long_line_is_drawn_before_single_dots():
    base = {"rate": 0.1, "members": 9}
    figure = drawn(
        one_at_a_time(base, rate=np.linspace(0.1, 1, 12).tolist(), members=list(range(2, 22)))
    )
    assert [len(line) for line in data(rows(figure)[0])] == [12]
    assert [axes.get_title() for axes in figure.axes[1::3]] == ["at members 9", "at rate 0.1"]


def test_a_study_of_names_alone():
    figure = drawn(
        grid(
            schedule=[
                "constant",
                "linear_decay",
                "cosine",
                "warmup_stable_decay",
                "exponential_decay",
            ]
        )
    )
    axes = rows(figure)[0]
    assert words(axes.xaxis)[-2:] == ["warmup stable decay", "exponential decay"]
    assert axes.get_legend() is None
    figure = drawn(grid(data=["moons", "digits"], schedule=["constant", "cosine", "linear_decay"]))
    assert words(rows(figure)[0].xaxis) == ["moons", "digits"]
    # Side by side, so that none hides another.
    assert len({line[0, 0] for line in data(rows(figure)[0])}) == 3


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0.25}, {}, {"schedule": "cosine"}, {"batch_size": 0}, {"temperature": 0.0}],
)
def test_a_single_group(settings):
    figure = drawn([group(settings, error=np.nan)])
    assert len(figure.axes) == 3
    assert [len(line) for line in data(figure.axes[0])] == [1]
    assert len(words(figure.axes[0].xaxis)) == 1


# Marks


def test_doubtful_points_are_marked_and_explained():
    groups = [
        group({"rate": 0.1}),
        group({"rate": 0.2}, runs=1, failed=3, error=np.nan),
        group({"rate": 0.3}, unconverged=1),
        group({"rate": 0.4}, runs=1, error=np.nan),
        group({"rate": 0.5}, failed=1, unconverged=1),
    ]
    figure = drawn(groups)
    assert markers(figure.axes[2]) == {
        ("o", False): [0.1],
        ("D", True): [0.2],
        ("x", False): [0.3, 0.5],
        ("o", True): [0.4],
    }
    assert notes(figure) == [
        "one run, without a standard error",
        "some runs failed: mean of the others",
        "some transport problem was not solved",
    ]


def test_only_marks_that_occur_are_explained():
    assert drawn(grid(rate=[0.1, 0.2])).legends == []
    # A single run with a standard error of its own, by the jackknife, is an ordinary point.
    assert drawn([group({"rate": 0.1}, runs=1)]).legends == []


def test_an_empty_study_is_rejected(refused):
    refused(lambda: plot_settings([]), "Argument `study` must have runs that are done")
    refused(
        lambda: plot_settings([group({"rate": 0.1}, gap=np.nan)]),
        "Argument `study` must have runs that are done",
    )


def test_empty_comparisons_are_rejected(refused):
    refused(lambda: plot_schedules({}), "Argument `judgments` must hold at least one schedule")
    refused(lambda: plot_speed_limit({}), "Argument `reports` must hold at least one report")


def test_results_of_the_package_can_be_drawn():
    """The protocols of the figures ask for nothing that these classes lack."""
    report = esl.speed_limit(
        esl.from_snapshots(np.random.default_rng(0).normal(size=(3, 4, 2))),
        transport=esl.GaussianTransport(),
    )
    assert isinstance(report, ReportLike)
    assert isinstance(group({}), GroupLike)
    bars, speeds = plot_speed_limit({"optimized": report, "cosine": report}).axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["optimized", "cosine"]
    ends = [bar.get_x() + bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(max(ends), report.entropy_production, rtol=1e-5)
    np.testing.assert_allclose(speeds.lines[0].get_ydata(), report.speed)
