"""The figure of a study: what is against what, and that it says what it leaves out."""

import numpy as np
import pytest

import esljax as esl
from esljax.figures import plot_study


def group(runs=4, asked=4, failed=0, unconverged=0, sigma=10.0, loss=0.3, **settings):
    means = {"final_loss": loss, "entropy_production": sigma, "gap": sigma / 2}
    errors = {"final_loss": 0.01, "entropy_production": 1.0, "gap": 0.5}
    if not runs:
        means = dict.fromkeys(means, np.nan)
    return esl.study.Group(settings, runs, asked, failed, unconverged, means, errors)


def notes(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def bars(axes):
    """Places and errors of the points with error bars, by color."""
    found = {}
    for container in axes.containers:
        line, _, (across, up) = container
        half = [
            [(segment[1] - segment[0])[axis] / 2 for segment in kind.get_segments()]
            for axis, kind in enumerate((across, up))
        ]
        found[line.get_color()] = (line.get_xdata(), line.get_ydata(), *half)
    return found


GROUPS = [
    group(schedule=name, target=target, width=width, loss=target, sigma=scale / target + width)
    for name, scale in (("cosine", 8.0), ("constant", 5.0))
    for target in (0.4, 0.2)
    for width in (4, 8)
]


def test_by_default_sigma_against_loss_by_schedule():
    """A line for each schedule in the order of the study, with errors in both directions."""
    figure = plot_study(GROUPS, facet="none")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "final training loss"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["cosine", "constant"]
    (x, y, across, up), _ = bars(axes).values()
    # Sorted along the line, and averaged over two widths of four runs each.
    np.testing.assert_allclose(x, [0.2, 0.4])
    np.testing.assert_allclose(y, [8 / 0.2 + 6, 8 / 0.4 + 6])
    np.testing.assert_allclose(across, 0.01 / np.sqrt(2))
    np.testing.assert_allclose(up, 1 / np.sqrt(2))
    assert "averaged over width, 2 values" in notes(figure)


def test_another_setting_makes_panels_by_itself():
    figure = plot_study(GROUPS)
    assert [axes.get_title() for axes in figure.axes] == ["width 4", "width 8"]
    assert not any("averaged" in note for note in notes(figure))
    figure = plot_study(GROUPS, x="width", y="gap", hue="target", facet="schedule")
    assert [axes.get_title() for axes in figure.axes] == ["schedule cosine", "schedule constant"]
    assert figure.axes[0].get_xlabel() == "width"
    (x, y, _, _) = next(iter(bars_of_settings(figure.axes[0])))
    np.testing.assert_allclose(x, [4, 8])
    np.testing.assert_allclose(y, [(8 / 0.2 + w) / 2 for w in (4, 8)])


def bars_of_settings(axes):
    return [(c[0].get_xdata(), c[0].get_ydata(), None, None) for c in axes.containers]


def test_what_is_left_out_is_said():
    groups = [
        group(runs=3, failed=1, schedule="constant"),
        group(runs=2, asked=4, schedule="cosine", sigma=np.nan),
        group(runs=1, asked=4, failed=0, schedule="linear_decay", unconverged=1),
        group(runs=0, asked=4, failed=4, schedule="optimized"),
    ]
    said = notes(plot_study(groups))
    assert "left out: 5 failed runs" in said
    assert "left out: 5 runs not done yet" in said
    assert "left out: 2 runs without these numbers" in said
    assert "some runs failed: mean of the others" in said
    assert "some transport problem was not solved" in said
    many = [group(schedule="constant", width=i, depth=i % 2) for i in range(40)]
    said = notes(plot_study(many, hue="depth", facet="width"))
    assert "left out: 31 of 40 values of width" in said


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"x": "nothing"}, "`x` must be a setting that varies or a number of the study"),
        ({"y": "schedule"}, "`y` must be a number, but is the setting 'schedule'"),
        ({"hue": "gap"}, "`hue` must be a setting that varies"),
        ({"facet": "depth"}, "`facet` must be a setting that varies"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused(given, sentence, refused):
    refused(lambda: plot_study(GROUPS, **given), sentence)


def test_an_empty_study_is_refused(refused):
    refused(lambda: plot_study([]), "`study` must have runs that are done")
    refused(lambda: plot_study([group(runs=0, schedule="cosine")]), "`study` must have runs")
