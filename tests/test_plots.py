"""Figures show their numbers, on a white background, with labels on the data."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from kvlab import lab, plots
from kvlab.speculate import Round, summarize


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def texts(ax):
    return [t.get_text() for t in ax.texts]


def boxes(ax):
    """Where the words of an Axes are on the card, without the lines that tie them to data."""
    ax.figure.canvas.draw()
    return [Text.get_window_extent(text) for text in ax.texts]


def overlaps(ax):
    words = boxes(ax)
    return any(one.overlaps(other) for i, one in enumerate(words) for other in words[:i])


def on_card(ax):
    (right, top) = ax.figure.bbox.max
    return all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= right and box.y1 <= top for box in boxes(ax)
    )


def summary(conditional):
    """A summary with this acceptance by position."""
    return replace(
        summarize([]), conditional=conditional, unconditional=np.cumprod(conditional).tolist()
    )


def test_axes_are_in_the_books_style_and_leave_other_figures_alone():
    before = plt.rcParams["figure.facecolor"], plt.rcParams["font.size"], plt.isinteractive()
    two = plots.axes(2)
    assert len(two) == 2
    assert two[0].figure.get_facecolor() == (1, 1, 1, 1)
    assert (
        plt.rcParams["figure.facecolor"],
        plt.rcParams["font.size"],
        plt.isinteractive(),
    ) == before


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


def test_lab_report_shows_value_and_interval_of_each_model():
    names = ("target", "draft", "teacher")
    figures = [
        {"name": f"{m}_reading", "value": v, "low": v - 0.1, "high": v}
        for m, v in zip(names, (1, 0.5, 0.8))
    ]
    ax = plots.lab_report(figures, {"reading": "reading"}, names)
    drawn = [line.get_xdata() for line in ax.lines]
    assert [list(d) for d in drawn[::2]] == [[f["low"], f["high"]] for f in figures]
    assert [list(d) for d in drawn[1::2]] == [[f["value"]] for f in figures]
    assert texts(ax) == list(names)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first task is on top


def test_colors_are_apart_in_lightness_or_hue():
    colors = [
        to_rgb(c)
        for c in (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.PURPLE, plots.SKY)
    ]
    for i, one in enumerate(colors):
        for other in colors[:i]:
            assert np.abs(np.subtract(one, other)).max() > 0.2


def test_apart_moves_only_what_overlaps_and_stays_in_bounds():
    assert plots._apart(np.array([0.1, 0.5]), 0.25).tolist() == [0.1, 0.5]
    assert plots._apart(np.array([0.5, 0.5, 0.5]), 0.25).tolist() == [0.25, 0.5, 0.75]
    assert plots._apart(np.array([0.0, 1.0]), 0.25).tolist() == [0, 1]
    assert plots._apart(np.array([1.0, 1.0, 1.0]), 0.25).tolist() == [0.5, 0.75, 1]
    assert plots._apart(np.array([0.0, 0.0]), 0.25).tolist() == [0, 0.25]


def test_acceptance_by_position_draws_both_meanings_with_labels_apart():
    summaries = {
        "a": summary([1.0, 0.5]),
        "b": summary([0.99, 0.51, 0.8]),
        "c": summary([0.98, 0.5]),
    }
    panels = plots.acceptance_by_position(summaries)
    for ax, kind in zip(panels, ("conditional", "unconditional"), strict=True):
        drawn = [line.get_ydata().tolist() for line in ax.lines]
        assert drawn == [getattr(s, kind) for s in summaries.values()]
        assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2], [1, 2, 3], [1, 2]]
        assert (
            len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines})
            == 3
        )
        assert sorted(texts(ax)) == ["a", "b", "c"]
        assert {t.get_text(): tuple(t.xy) for t in ax.texts}["b"] == (
            3,
            getattr(summaries["b"], kind)[-1],
        )
        assert not overlaps(ax)
        assert on_card(ax)
        assert ax.get_ylim() == (-0.02, 1.02)


def test_acceptance_leaves_out_positions_that_no_text_reached():
    summaries = summarize([Round([[5, 6, 7]], [1], [[5, 9]], 0.1, 0.2, 0.3)])
    left, right = plots.acceptance_by_position({"one": summaries})
    assert left.lines[0].get_ydata()[:2].tolist() == [1, 0]
    assert np.isnan(left.lines[0].get_ydata()[2])  # the third guess was not reached
    assert right.lines[0].get_ydata().tolist() == [1, 0, 0]
    assert left.texts[0].xy == (2, 0)


def test_speedup_over_gamma_shows_points_intervals_and_curves():
    measured, curves = (
        [(1.2, 1.1, 1.4), (1.5, 1.3, 1.6), (1.01, 0.9, 1.2)],
        {"by position": [1.2, 1.4, 1.0]},
    )
    ax = plots.speedup_over_gamma([1, 2, 8], {"measured": measured}, curves)
    curve, points, plain = ax.lines
    assert list(plain.get_ydata()) == [1, 1, 1]
    assert list(curve.get_ydata()) == curves["by position"]
    assert list(zip(points.get_xdata(), points.get_ydata(), strict=True)) == [
        (1, 1.2),
        (2, 1.5),
        (8, 1.01),
    ]
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(1, 1.1), (1, 1.4), (8, 0.9), (8, 1.2)}
    assert ax.get_xticks().tolist() == [1, 2, 8]
    assert ax.get_ylim()[0] == 0
    assert sorted(texts(ax)) == ["by position", "measured", "plain decoding"]
    assert not overlaps(ax)
    assert on_card(ax)


def test_time_spent_adds_up_in_milliseconds_and_labels_do_not_overlap():
    parts = {
        "plain": {"target": 0.04, "rest": 0.0005},
        "gamma 8": {"draft": 0.0009, "target": 0.0008, "rest": 0.0002},
    }
    ax = plots.time_spent(parts)
    drawn = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    expected = [(0, 0), (0, 40), (40, 0.5), (0, 0.9), (0.9, 0.8), (1.7, 0.2)]
    assert np.allclose(drawn, expected)
    assert texts(ax) == [
        "target 40 + rest 0.5 = 40.5 ms",
        "draft 0.9 + target 0.8 + rest 0.2 = 1.9 ms",
    ]
    assert len({bar.get_hatch() for bar in ax.patches}) == 3
    assert [t.get_text() for t in ax.get_yticklabels()] == ["plain", "gamma 8"]
    assert not overlaps(ax)
    assert on_card(ax)


def test_joint_histogram_draws_shares_with_the_exact_probability_on_each():
    expected, counts = (
        np.array([0.5, 0.25, 0.25]),
        {"right": np.array([5, 3, 2]), "wrong": np.array([1, 1, 2])},
    )
    panels = plots.joint_histogram(expected, counts)
    for ax, (label, count) in zip(panels, counts.items(), strict=True):
        assert np.allclose([bar.get_height() for bar in ax.patches], count / count.sum())
        assert ax.lines[0].get_ydata().tolist() == expected.tolist()
        assert ax.get_title("left") == label
    assert panels[-1].get_title("right") == "◇ exact"
    assert panels[0].get_ylim() == panels[1].get_ylim()


@pytest.mark.parametrize(
    ("p", "q", "labels"),
    [
        (
            [0.6, 0.28, 0.08, 0.04],
            [0.35, 0.5, 0.1, 0.05],
            {"accepted", "rejected", "from the residual"},
        ),
        ([0.5, 0.5], [0.5, 0.5], {"accepted"}),
        ([1.0, 0.0], [0.0, 1.0], {"rejected", "from the residual"}),
    ],
)
def test_residual_splits_both_distributions_and_gives_the_target_back(p, q, labels):
    _, two, three = panels = plots.residual(p, q)
    widths = [[[bar.get_width() for bar in bars] for bars in ax.containers] for ax in panels]
    assert widths[0] == [q, p]
    dropped, accepted, rest = widths[1]
    assert np.allclose(accepted, np.minimum(p, q))
    assert np.allclose(np.add(accepted, dropped), q)
    assert np.allclose(np.add(accepted, rest), p)
    assert np.isclose(sum(dropped), sum(rest))  # what is rejected is what the residual gives
    assert widths[2] == [accepted, rest]
    assert list(three.lines[0].get_xdata()) == p
    assert two.get_title("left") == f"{100 * sum(accepted):.0f} % of drafted tokens accepted"
    assert set(texts(two)) == labels
    assert not any(overlaps(ax) or not on_card(ax) for ax in panels)


class Reader(HTMLParser):
    """Text of each marked token, line by line; the first line is the key."""

    def __init__(self, view):
        super().__init__()
        self.lines, self.attributes, self.open = [], {}, []
        self.feed(view.data)
        assert not self.open  # every element is closed

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.attributes |= dict(attributes)
        if tag == "div":
            self.lines.append([])
        if tag in "usb":
            self.lines[-1].append((tag, ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if set("usb") & set(self.open):
            tag, before = self.lines[-1][-1]
            self.lines[-1][-1] = (tag, before + text)

    @property
    def tokens(self):
        return self.lines[2:]  # after the outer element and the key


class Letters:
    """A tokenizer of fixed texts; the last is half of a character."""

    texts = ("a", "<b>&", " c", "\n", '"d"', "\ufffd")

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, i):
        return f"byte{i}"


SECONDS = (0.1, 0.2, 0.3)
ROUNDS = [
    Round([[], []], [0, 0], [[0], [0]], *SECONDS, is_prefill=True),
    Round([[], []], [0, 0], [[], []], *SECONDS, is_prefill=True),
    Round([[1, 2, 3], [1, 1, -1]], [1, 0], [[1, 4], [0]], *SECONDS),
    Round(
        [[2, 5], [1, 0]], [2, 1], [[2, 5, 3], [1]], *SECONDS
    ),  # the second row ends at an accepted token
    Round([[0, 0], [0, 0]], [2, 2], [[0], []], *SECONDS),  # the first ends among accepted ones
]


def test_token_view_marks_what_was_accepted_rejected_and_the_targets_own():
    read = Reader(plots.token_view(ROUNDS, Letters()))
    assert read.tokens == [
        [("b", "a")],
        [("u", "<b>&"), ("s", "·c"), ("s", "↵"), ("b", '"d"')],
        [("u", "·c"), ("u", "byte5"), ("b", "↵")],
        [("u", "a")],
    ]
    assert read.attributes["role"] == "figure"
    words = "One text in 4 rounds: 7 tokens drafted, 4 of them accepted; 3 of the target's own."
    assert read.attributes["aria-label"] == words


def test_token_view_of_a_row_that_ended_sooner_and_had_fewer_guesses():
    read = Reader(plots.token_view(ROUNDS, Letters(), row=1))
    assert read.tokens == [
        [("b", "a")],
        [("s", "<b>&"), ("s", "<b>&"), ("b", "a")],
        [("u", "<b>&")],
    ]
    assert "3 rounds: 4 tokens drafted, 1 of them accepted; 2 of" in read.attributes["aria-label"]


def test_token_view_is_static_escaped_and_inherits_the_color_of_the_page():
    page = plots.token_view(ROUNDS, Letters()).data
    assert "<u><b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "<script" not in page
    assert not re.search(r"[^-]color:", page)
    key = [tag for tag, _ in Reader(plots.token_view([], Letters())).lines[1]]
    assert key == ["u", "s", "b"]


def test_token_view_shows_parts_of_characters_by_name():
    tokenizer = lab.load_tokenizer("lab-target")
    ids = tokenizer("€ \n").input_ids
    tokens = Reader(plots.token_view([Round([[]], [0], [ids], *SECONDS)], tokenizer)).tokens[0]
    assert "".join(text for _, text in tokens) == "â" + "Ĥ" + "¬" + "·↵"


def test_speed_ratios_show_each_figure_with_its_interval():
    ratios = {"over one": (2.5, 2.25, 2.75), "over another": (0.5, 0.25, 0.75)}
    ax = plots.speed_ratios(ratios)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(ratios)
    intervals, dots = (
        [line for line in ax.lines if line.get_marker() == mark] for mark in ("None", "o")
    )
    assert [list(line.get_xdata()) for line in intervals if len(set(line.get_xdata())) == 2] == [
        [2.25, 2.75],
        [0.25, 0.75],
    ]
    assert [line.get_xdata()[0] for line in dots] == [2.5, 0.5]
    assert {text.get_text() for text in ax.texts} == {"2.50", "0.50", "same speed"}
    assert ax.get_xlim()[0] == 0


# knowledge caching


def test_splice_strips_have_a_strip_per_arm_and_end_with_the_question():
    ax = plots.splice_strips([40, 20], question=10)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "full",
        "prefix",
        "concat",
        "shift",
    ]
    bars = [bar for container in ax.containers for bar in container]
    assert len(bars) == 4 * 3
    assert max(bar.get_x() + bar.get_width() for bar in bars) <= 70
    words = texts(ax)
    assert words[:3] == ["read"] * 3
    assert words[-3:] == ["piece 1", "piece 2", "question"]
    assert on_card(ax)


def test_seed_strips_show_every_run_and_the_mean():
    ax = plots.seed_strips({"a teacher": [0.2, 0.6, 0.7], "none": [0.1, 0.3]}, "solved")
    points = [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"]
    assert points == [[0.2, 0.6, 0.7], [0.1, 0.3]]
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"]
    assert means == pytest.approx([0.5, 0.2])
    assert texts(ax) == ["0.50", "0.20"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a teacher", "none"]
    assert ax.get_xlabel() == "solved"
    assert on_card(ax)


def test_splice_panels_show_every_value_with_its_interval():
    panels = {
        "KL": {"full": (0.0, 0.0, 0.0), "shift": (0.02, 0.01, 0.04)},
        "MB": {"full": (0, 0, 0), "shift": (3, 3, 3)},
    }
    places = plots.splice_panels(panels)
    assert [ax.get_xlabel() for ax in places] == ["KL", "MB"]
    intervals = [line.get_xdata() for line in places[0].lines if len(line.get_xdata()) == 2]
    assert [list(x) for x in intervals] == [[0.0, 0.0], [0.01, 0.04]]
    assert texts(places[0]) == ["0", "0.02"]
    assert places[0].get_ylim()[0] > places[0].get_ylim()[1]  # the first arm is on top
    assert all(on_card(ax) for ax in places)


def test_hits_over_threshold_draws_each_kind_and_the_choice():
    ax = plots.hits_over_threshold(
        [0.2, 0.5, 0.8], {"right": [0.9, 0.8, 0.1], "outside": [1.0, 0.2, 0.0]}, chosen=0.5
    )
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[0.9, 0.8, 0.1], [1.0, 0.2, 0.0]]
    assert list(ax.lines[2].get_xdata()) == [0.5, 0.5]
    assert {"right", "outside", "chosen"} == set(texts(ax))
    assert not overlaps(ax)


def test_computed_tokens_have_a_panel_per_arm_with_its_own_tokens():
    masks = {"recompute": np.eye(3, 8), "legolink": np.ones((3, 8))}
    panels = plots.computed_tokens(masks, starts=[0, 5])
    assert [ax.get_title(loc="left") for ax in panels] == ["recompute", "legolink"]
    for ax, mask in zip(panels, masks.values(), strict=True):
        assert np.array_equal(ax.collections[0].get_array().reshape(3, 8), mask)
        assert [line.get_xdata()[0] for line in ax.lines] == [0, 5]
        assert on_card(ax)


def test_token_differences_mark_the_chosen_and_where_pieces_begin():
    ax = plots.token_differences([0, 0, 3.0, 1.0, 2.0], starts=[0, 2], chosen=[2, 4])
    colors = [to_rgb(bar.get_facecolor()) for bar in ax.containers[0]]
    assert [color == to_rgb(plots.RED) for color in colors] == [False, False, True, False, True]
    assert [bar.get_height() for bar in ax.containers[0]] == [0, 0, 3, 1, 2]
    assert texts(ax) == ["piece 1", "piece 2"]


def test_reading_or_loading_is_in_milliseconds_on_two_logarithmic_scales():
    ax = plots.reading_or_loading([64, 128], {"read it": [0.01, 0.02], "load it": [0.002, 0.002]})
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [list(line.get_ydata()) for line in ax.lines] == [[10, 20], [2, 2]]
    low, high = ax.get_ylim()
    assert [y for y in ax.get_yticks() if low <= y <= high] == [2, 5, 10, 20]
    assert sorted(texts(ax)) == ["load it", "read it"]


def test_a_shared_cache_picture_has_one_scale_of_colors():
    keys = {
        "alone": torch.ones(3, 4),
        "behind": 5 * torch.ones(3, 4),
        "difference": torch.zeros(3, 4),
    }
    places = plots.cache_picture(keys, ["a", "b", "c"], shared=True)
    assert [ax.get_title("left") for ax in places] == list(keys)
    assert {ax.images[0].get_clim() for ax in places} == {(-5.0, 5.0)}
    assert [label.get_text() for label in places[0].get_yticklabels()] == ["a", "b", "c"]


def test_cut_layers_number_the_layers_that_are_taken():
    ax = plots.cut_layers(4, {"first:2": [0, 1], "uniform:2": [0, 3]})
    assert texts(ax) == ["0", "1", "2", "3", "0", "1", "0", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "target",
        "first:2",
        "uniform:2",
    ]
    assert ax.collections[0].get_array().tolist() == [[1] * 4, [2, 2, 0, 0], [2, 0, 0, 2]]


def test_with_and_without_puts_each_question_against_the_diagonal():
    panels = plots.with_and_without(
        {"new": ([0.2, 0.4], [0.6, 0.8]), "outside": ([0.5], [0.5])}, ("not", "reading")
    )
    assert [ax.get_title(loc="left") for ax in panels] == [
        "new: 0.30 → 0.70",
        "outside: 0.50 → 0.50",
    ]
    assert [list(panels[0].lines[1].get_xdata()), list(panels[0].lines[1].get_ydata())] == [
        [0.2, 0.4],
        [0.6, 0.8],
    ]
    assert (panels[0].get_xlabel(), panels[0].get_ylabel()) == ("not", "reading")


# KV-Distill


def test_retention_curves_show_each_method_and_the_full_cache_with_labels_that_stay_apart():
    one = {2: (0.1, 0.05, 0.15), 25: (0.9, 0.8, 1.0), 50: (0.95, 0.9, 1.0)}
    two = {2: (0.0, 0.0, 0.1), 25: (0.3, 0.2, 0.4), 50: (0.94, 0.9, 1.0)}
    ax = plots.retention_curves({"learned": one, "a score": two}, full=0.97)
    *curves, full = ax.lines
    assert [list(line.get_ydata()) for line in curves] == [[0.1, 0.9, 0.95], [0.0, 0.3, 0.94]]
    assert [list(line.get_xdata()) for line in curves] == [[2, 25, 50]] * 2
    assert list(full.get_ydata()) == [0.97, 0.97]
    assert {"learned", "a score", "full cache"} == set(texts(ax))
    assert not overlaps(ax)
    assert on_card(ax)


def test_score_maps_with_names_write_each_number_into_its_place():
    maps = {"all": np.array([[1.0, 0.5]]), "some": np.array([[0.25, 0.0]])}
    one, two = plots.score_maps(maps, "facts", "depth", (8,), (0, 100))
    assert texts(one) == ["1.00", ".50"]
    assert texts(two) == [".25", ".00"]
    assert [t.get_position() for t in two.texts] == [(0, 0), (1, 0)]
    assert two.images[0].get_clim() == one.images[0].get_clim()


def test_score_view_underlines_what_is_kept_and_shades_by_rank():
    page = plots.score_view([0, 1, 2], {"one": ([5.0, float("inf"), -1.0], [1])}, Letters()).data
    shades = re.findall(r"<(u|s) style=\"background: rgba\(0, 114, 178, (0\.\d+)\)\">", page)
    assert shades == [("s", "0.23"), ("u", "0.45"), ("s", "0.00")]
    assert "one</b> (1 of 3 kept)" in page
    assert "3 tokens" in page
    assert "<script" not in page


# 4D alignment


def test_cache_shapes_draw_a_cell_for_each_token_and_layer_in_its_segments_color():
    one, two = plots.cache_shapes(
        {"teacher": (3, [0, 2, 3, 5], "wide"), "student": (2, [0, 1, 2, 3], "narrow")}
    )
    cells = [ax.collections[0].get_array() for ax in (one, two)]
    assert [c.tolist() for c in cells] == [[[0, 0, 1, 2, 2]] * 3, [[0, 1, 2]] * 2]
    two.figure.canvas.draw()
    drawn = two.collections[0].get_facecolor()[:3, :3]
    assert [tuple(color) for color in drawn] == [to_rgb(color) for color in plots.SEGMENT_COLORS]
    assert [ax.get_title(loc="left") for ax in (one, two)] == ["teacher: wide", "student: narrow"]
    assert texts(one) == ["prompt", "reasoning", "answer"]


def test_token_links_join_a_student_token_to_what_it_is_made_of():
    ways = {"by index": [(0, 0, 1.0), (1, 1, 1.0)], "mixed": [(1, 0, 0.25), (1, 2, 0.75)]}
    one, two = plots.token_links(["a", "b", "c"], ["x", "y"], ([0, 1, 2, 3], [0, 1, 2, 2]), ways)
    assert [list(line.get_xdata()) for line in one.lines] == [[0.0, 0.0], [1.0, 0.5]]
    assert [list(line.get_xdata()) for line in two.lines] == [[1.0, 0.0], [1.0, 1.0]]
    assert [line.get_alpha() for line in two.lines] == [0.25, 0.75]
    assert [line.get_color() for line in one.lines] == [*plots.SEGMENT_COLORS[:2]]
    assert texts(one) == ["a", "b", "c", "x", "y"]


def test_score_maps_write_each_number_and_share_their_colors():
    one, two = plots.score_maps(
        {"keys": torch.tensor([[1.0, 0.25]]), "values": torch.tensor([[0.5, -0.1]])},
        "student",
        "teacher",
    )
    assert texts(one) == ["1.00", ".25"]
    assert texts(two) == [".50", "-.10"]
    assert one.images[0].get_clim() == two.images[0].get_clim()
    assert (one.get_ylabel(), two.get_xlabel()) == ("student", "teacher")


def test_lines_have_labels_and_bands_that_hold_their_values():
    ax = plots.lines(
        [1, 2], {"one": [(0.2, 0.1, 0.3), (0.5, 0.4, 0.6)], "two": [(0.1, 0, 0.2)] * 2}, "x", "y"
    )
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.2, 0.5], [0.1, 0.1]]
    assert texts(ax) == ["two", "one"]
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(1, 0.1), (1, 0.3), (2, 0.4), (2, 0.6)}
    assert list(plots.lines([1, 2], {"one": [3, 4]}, "x", "y").lines[0].get_ydata()) == [3, 4]
    assert on_card(ax)


def test_intervals_hold_what_is_compared_with_even_if_it_lies_outside():
    ax = plots.intervals({"fused": (0.8, 0.75, 0.85)}, "accepted", (0.2, "alone"))
    low, high = ax.get_xlim()
    assert low < 0.2 < 0.85 < high
    assert {text.get_text() for text in ax.texts} == {"0.80", "alone"}
    assert ax.get_xlabel() == "accepted"


def test_gates_have_a_bar_for_keys_and_values_of_each_layer():
    logits, sizes = torch.tensor([[4.0, -1.0], [0.5, 2.0], [0.0, 1.0]]), torch.rand(3, 2)
    panels = plots.gates(logits, sizes)
    for ax, values in zip(panels, (logits, sizes), strict=True):
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(
            values.T.flatten().tolist()
        )
        assert [text.get_text() for text in ax.texts] == ["keys", "values"]


def test_a_waterfall_goes_from_total_to_total():
    totals = {"plain": 100.0, "faster": 60.0, "slower": 70.0}
    savings = {"faster": (40.0, 30.0, 50.0), "slower": (-10.0, -12.0, -8.0)}
    ax = plots.waterfall(totals, savings, "ms")
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 100), (100, 60), (60, 70)]
    assert [text.get_text() for text in ax.texts] == [
        "100",
        "60  (-40 [-50, -30])",
        "70  (+10 [+8, +12])",
    ]
    intervals = [sorted(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "-"]
    assert intervals == [[50, 70], [68, 72]]
