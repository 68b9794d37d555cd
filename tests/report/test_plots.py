"""Plots are drawn from what the results hold."""

import numpy as np
import pytest

from helpers.report_runs import METHODS, SCORES, runs
from recombine.errors import UsageError
from recombine.report import plot_axes, plots
from recombine.report.records import Runs


def figure(given: dict, found: Runs | None = None):
    return plots.figures({"p": given}, found or runs())["p"]


def test_xy_averages_within_a_seed_and_then_over_the_seeds():
    """One run is missing: its seed does not count for that method, the others do."""
    found = runs(lambda c: c != {"method": "LoRA", "data.task": "b", "seed": "2"})
    ax = figure(
        {"kind": "xy", "x": "account.trained", "xlog": True, "y": "test.acc", "scale": 100, "point": "method"}, found
    ).axes[0]
    drawn = {tuple(np.round(c.lines[0].get_xydata()[0], 6)) for c in ax.containers}
    expected = {(10.0**i, round(100 * SCORES[i][:, : 3 if i else 2].mean(), 6)) for i in range(3)}
    assert drawn == expected and {t.get_text() for t in ax.texts} == set(METHODS)
    bar = ax.containers[0].lines[2][0].get_segments()[0]  # of LoRA: two seeds
    assert np.ptp(bar[:, 1]) / 2 == pytest.approx(100 * SCORES[0][:, :2].mean(0).std(ddof=1))


def test_xy_over_an_axis_joins_numbers_and_not_words():
    seeds = figure({"kind": "xy", "x": "seed", "y": "test.acc", "line": "method", "hline": {"chance": 0.1}}).axes[0]
    line = seeds.containers[1].lines[0]
    assert line.get_linestyle() == "-" and line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata() == pytest.approx(SCORES[1].mean(0)) and [t.get_text() for t in seeds.get_xticklabels()] == [
        "0",
        "1",
        "2",
    ]
    words = figure({"kind": "xy", "x": "method", "y": "test.acc", "line": "data.task"}).axes[0]
    assert words.containers[0].lines[0].get_linestyle() == "None"
    assert [t.get_text() for t in words.get_xticklabels()] == list(METHODS)


def test_ranks_by_layer_and_role():
    made = figure({"kind": "ranks", "y": "rank", "line": "method", "where": {"method": ["CERSA", "SVFit"]}})
    assert [ax.get_title() for ax in made.axes] == ["query", "attention output"]
    assert [list(line.get_ydata()) for line in made.axes[0].lines] == [[5.0, 7.0], [6.0, 8.0]]
    assert {len(ax.get_legend_handles_labels()[1]) for ax in made.axes} == {2}


def test_curves_have_the_seeds_spread():
    ax = figure({"kind": "curves", "y": "curves.train/loss", "line": "method"}).axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([3.0, 2.1, 1.0]) and len(ax.collections) == 3
    band = ax.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].max() == pytest.approx(2.1 + np.std([0, 0.1, 0.2], ddof=1))


def test_bars_beside_their_reference():
    more = {"before": lambda c: 0.5, "after": lambda c: {"x": 0.4, "y": 0.3}}
    given = {
        "kind": "bars",
        "x": "value",
        "y": {"X": "after.x", "Y": "after.y"},
        "line": "method",
        "reference": "before",
    }
    ax = figure(given | {"scale": 100}, runs(**more)).axes[0]
    heights = sorted(patch.get_height() for patch in ax.patches)
    assert heights == pytest.approx([30] * 3 + [40] * 3 + [50] * 2)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["X", "Y"]


def test_heat_maps_share_one_scale():
    made = figure({"kind": "heat", "y": "similarity", "nines": True})
    image = made.axes[0].images[0]
    assert np.allclose(image.get_array(), [[1.0, 0.9], [0.99, 0.999]]) and made.axes[0].get_title() == "query"
    at = image.norm(np.array([0.9, 0.99, 0.999]))
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], rel=1e-3)  # a nine more is a step further


def test_a_plot_without_numbers_is_left_out_and_a_wrong_one_refused():
    assert plots.figures({"p": {"kind": "xy", "x": "seed", "y": "test.f1"}}, runs()) == {}
    for given, why in (
        ({"kind": "pie", "y": "test.acc"}, "kind=pie: must be one of ranks, xy, curves, bars, heat"),
        ({"kind": "xy", "y": "test.acc"}, "needs x"),
        ({"kind": "ranks"}, "needs y"),
        ({"kind": "curves", "y": "curves.train/loss", "colour": "red"}, "colour: there is no such option"),
        ({"kind": "curves", "y": "curves.train/loss", "line": "role"}, "role is no axis; choose from method"),
        ({"kind": "bars", "x": "seed", "y": {"a": "test.acc"}}, "say which of x, line, panel or point"),
    ):
        with pytest.raises(UsageError, match=why):
            plots.figures({"p": given}, runs())


@pytest.mark.parametrize("most", [300, 1e7])
def test_numbers_below_a_logarithmic_axis_are_apart(most):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.6))
    ax = figure.subplots()
    ax.set_xscale("log")
    ax.plot([20, most], [1, 2])
    plot_axes.number_ticks(ax, True, None)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    low, high = ax.bbox.x0, ax.bbox.x1
    shown = sorted((box for box in boxes if low <= (box.x0 + box.x1) / 2 <= high), key=lambda box: box.x0)
    assert len(shown) >= 2 and all(a.x1 < b.x0 for a, b in zip(shown, shown[1:], strict=False))
