"""Figures show the numbers they were given, on a white card, with labels on the data."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from kvlab import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def texts(ax):
    return [t.get_text() for t in ax.texts]


def test_axes_are_in_the_books_style_and_leave_other_figures_alone():
    before = plt.rcParams["figure.facecolor"], plt.rcParams["font.size"], plt.isinteractive()
    two = plots.axes(2)
    assert len(two) == 2
    assert two[0].figure.get_facecolor() == (1, 1, 1, 1)
    assert (plt.rcParams["figure.facecolor"], plt.rcParams["font.size"], plt.isinteractive()) == before


def test_decode_cost_is_in_milliseconds_with_labels_on_the_lines():
    ax = plots.decode_cost({"again": [0.1, 0.2], "cache": [0.01, 0.01]}, [64, 128])
    assert [line.get_ydata().tolist() for line in ax.lines] == [[100, 200], [10, 10]]
    assert texts(ax) == ["again", "cache"]


def test_cache_picture_is_centered_on_zero():
    matrix = torch.tensor([[-1.0, 3.0], [0.0, 2.0]])
    one, two = plots.cache_picture({"keys": matrix, "values": matrix / 2}, ["a", "b"])
    assert one.images[0].get_clim() == (-3, 3)
    assert two.images[0].get_clim() == (-1.5, 1.5)
    assert np.array_equal(one.images[0].get_array(), matrix.numpy())
    assert [t.get_text() for t in one.get_yticklabels()] == ["a", "b"]


def test_cache_sizes_has_a_bar_for_each_number():
    sizes = pd.DataFrame({"alone": [2.0, 4.0], "shared": [1.0, 0.5]}, index=["m", "n"])
    ax = plots.cache_sizes(sizes)
    assert [bar.get_width() for bar in ax.patches] == [2, 4, 1, 0.5]
    assert texts(ax) == ["2.00  alone", "4.00", "1.00  shared", "0.50"]


def test_turned_scores_draws_one_line_a_way():
    ax = plots.turned_scores([0, 1], {"both": [1, 1], "key": [1, 0]})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 1], [1, 0]]


def test_lab_report_shows_value_and_interval_of_each_model():
    names = ("target", "draft", "teacher")
    given = [{"name": f"{m}_reading", "value": v, "low": v - 0.1, "high": v} for m, v in zip(names, (1, 0.5, 0.8))]  # noqa: B905
    ax = plots.lab_report(given, {"reading": "reading"}, names)
    drawn = [line.get_xdata() for line in ax.lines]
    assert [list(d) for d in drawn[::2]] == [[f["low"], f["high"]] for f in given]
    assert [list(d) for d in drawn[1::2]] == [[f["value"]] for f in given]
    assert texts(ax) == list(names)


def test_colors_are_apart_in_lightness_or_hue():
    colors = [to_rgb(c) for c in (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.PURPLE, plots.SKY)]
    for i, one in enumerate(colors):
        for other in colors[:i]:
            assert np.abs(np.subtract(one, other)).max() > 0.2
