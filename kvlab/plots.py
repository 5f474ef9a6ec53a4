"""Every figure of the book: one palette, four primitives, one function per figure.

The primitives are lines, dots with intervals, bars and heat maps. Each function returns its Axes.
Figures have a white background, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator
from torch import Tensor

if TYPE_CHECKING:
    from IPython.display import HTML
    from transformers import PreTrainedTokenizerBase

    from kvlab.speculate import Round, Summary

Interval = tuple[float, float, float]  # value, low end, high end
Rows = Mapping[str, Interval]
Curves = Mapping[str, Sequence]  # numbers or intervals, by label
Maps = Mapping[str, "Tensor | np.ndarray"]

# Okabe and Ito (2008), distinguishable with any color vision; black and yellow are left out.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
INK, GRAY, FAINT = "#222222", "#666666", "#BBBBBB"
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GRAY, INK)
LINES = tuple(zip(COLORS, "osD^vPx*", 2 * ("-", "--", "-.", ":"), strict=True))
SEGMENT_COLORS = (SKY, ORANGE, GREEN)  # prompt, reasoning, answer


def axes(columns=1, width=6.4, height=3.2, rows=1, **options) -> np.ndarray:
    """An array of Axes in the book's style in one figure, row after row; sizes in inches."""
    # Chooses the backend now: inside the context, a notebook would forget to show figures.
    plt.draw_if_interactive()
    with plt.style.context(Path(__file__).with_suffix(".mplstyle")):
        _, panels = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return panels.flatten()


# The four primitives


def draw_lines(ax: Axes, x: Sequence[float], curves: Curves, styles=LINES, **settings) -> None:
    """Curves with their labels at their right ends; points that are (value, low, high) get a band.

    Args:
        curves: points by label, NaN where there is none; a curve may have fewer points than x.
        styles: (color, marker, dash) of each curve.
        settings: passed to `ax.set` before the labels are placed.
    """
    ends = {}
    for (label, points), (color, marker, dash) in zip(curves.items(), cycle(styles)):
        values, *band = np.array(points, dtype=float).reshape(len(points), -1).T
        ax.plot(x[: len(values)], values, color=color, marker=marker, ls=dash, ms=4.5)
        if band:
            ax.fill_between(x[: len(values)], *band, color=color, alpha=0.15, lw=0)
        last = np.flatnonzero(np.isfinite(values))[-1]
        if label:
            ends[label] = (x[last], values[last], color)
    ax.set(**settings)
    if ends:
        _label_ends(ax, ends)


def draw_dots(ax: Axes, rows: Rows, spec=".3g", style=(BLUE, "o"), offset=0.0) -> None:
    """Values as dots with intervals, one row per label from the top.

    Args:
        spec: format of the number beside each dot; an empty one writes none.
        style: color and marker.
        offset: how far below its row a dot is placed, for several dots per row.
    """
    color, marker = style
    for y, (value, low, high) in enumerate(rows.values()):
        ax.plot([low, high], [y + offset] * 2, color=color, lw=2, alpha=0.5)
        ax.plot(value, y + offset, marker, color=color, ms=5.5, clip_on=False)
        if spec:
            _note(ax, format(value, spec), high, y + offset)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="x", color="#EEEEEE")
    ax.set_axisbelow(True)


def draw_bars(ax: Axes, y, widths, fill: tuple[str, str], height: float = 0.6, left=0):
    """Horizontal bars of one fill, (color, hatch), with white edges."""
    color, hatch = fill
    return ax.barh(y, widths, height, left, color=color, hatch=hatch, edgecolor="white", lw=0)


def draw_heat_maps(maps: Maps, limits: Sequence[float] = (), **options) -> np.ndarray:
    """Matrices as colored cells, one panel each; without limits, each has its own scale."""
    panels = axes(len(maps), **options)
    for ax, (title, matrix) in zip(panels, maps.items(), strict=True):
        matrix = torch.as_tensor(matrix).float().cpu().numpy()
        low, high = limits or (-abs(matrix).max(), abs(matrix).max())
        cmap = "PuOr" if low < 0 else "Blues"
        ax.imshow(matrix, cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        _title(ax, title)
        if matrix.shape[1] <= 12:  # in more columns the numbers would not fit
            for (y, x), value in np.ndenumerate(matrix):
                _text(ax, x, y, f"{value:.2f}".replace("0.", "."), fontsize=7.5)
    return panels


def _draw_cells(ax: Axes, cells: np.ndarray, colors: Sequence[str], edge: str) -> None:
    """Draw a grid whose cells have the color of their number, from the bottom."""
    options = {"cmap": ListedColormap(colors), "vmin": 0, "vmax": len(colors) - 1}
    ax.pcolormesh(cells, edgecolor=edge, lw=0.6, **options)


# Labels


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=10)


def _note(ax: Axes, text: str, x: float, y: float, color: str = INK) -> None:
    """Write a text right of a point."""
    options = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    ax.annotate(text, (x, y), (6, 0), color=color, **options)


def _text(ax: Axes, x: float, y: float, text: str, fontsize: float = 8, **options) -> None:
    """Write a text around a point."""
    ax.text(x, y, text, ha="center", va="center", fontsize=fontsize, **options)


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights between 0 and 1, a gap apart, near the wanted ones (ascending)."""
    offsets = gap * np.arange(len(wanted))
    free = wanted - offsets  # labels do not overlap where this does not decrease
    up = np.maximum.accumulate(free)
    down = np.minimum.accumulate(free[::-1])[::-1]
    return np.clip((up + down) / 2, 0, 1 - offsets[-1]) + offsets


def _label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write labels right of the axes, level with the ends (x, y, color) of lines, or tied."""
    ax.figure.draw_without_rendering()  # the height of the axes is known only after layout
    to_axes = ax.transData - ax.transAxes
    # Ascending; of equal ends, the first is on top.
    ordered = sorted(ends.items(), key=lambda item: item[1][1], reverse=True)[::-1]
    wanted = [to_axes.transform((x, y))[1] for _, (x, y, _) in ordered]
    gap = 13 / 72 * ax.figure.dpi / ax.get_window_extent().height  # 13 points per label
    heights = _apart(np.array(wanted), gap)
    tie = {"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkB": 4, "relpos": (0, 0.5)}
    options = {"textcoords": "axes fraction", "va": "center", "fontsize": 9}
    for (label, (x, y, color)), height in zip(ordered, heights, strict=True):
        ax.annotate(label, (x, y), (1.06, height), color=color, arrowprops=tie, **options)


# Lines


def lines(x: Sequence, curves: Curves, xlabel: str, ylabel: str, height=3, **settings) -> Axes:
    """Labeled lines over one x; points that are (value, low, high) get a band."""
    ax = axes(width=7.0, height=height)[0]
    draw_lines(ax, x, curves, xlabel=xlabel, ylabel=ylabel, **settings)
    return ax


def acceptance_by_position(summaries: Mapping[str, Summary]) -> np.ndarray:
    """Acceptance by drafted position: of the tokens reached, and of all drafted tokens."""
    panels = axes(2, width=7.6, height=3, sharey=True)
    titles = ("of the drafted tokens reached", "of all drafted tokens")
    for ax, kind, title in zip(panels, ("conditional", "unconditional"), titles, strict=True):
        curves = {label: getattr(summary, kind) for label, summary in summaries.items()}
        positions = range(1, 1 + max(map(len, curves.values())))
        limits = {"xlim": (0.6, len(positions) + 0.4), "ylim": (-0.02, 1.02)}
        ax.grid(axis="y", color="#EEEEEE")
        draw_lines(ax, positions, curves, xlabel="drafted position", **limits)
        _title(ax, title)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panels[0].set_ylabel("fraction accepted")
    return panels


def speedup_over_gamma(gammas: Sequence[int], measured: Curves, predicted: Curves) -> Axes:
    """Speed over plain decoding by gamma: measured (value, low, high) and predicted."""
    curves = {**predicted, **measured, "plain decoding": np.ones(len(gammas))}
    styles = [(color, "", dash) for color, _, dash in LINES[: len(predicted)]]
    colors = [INK, *COLORS[len(predicted) :]]
    styles += [(colors[i], LINES[i][1], "") for i in range(len(measured))] + [(FAINT, "", "-")]
    words = ("gamma, drafted tokens per round", "times faster than plain")
    return lines(gammas, curves, *words, styles=styles, xticks=gammas, ylim=(0, None))


def hits_over_threshold(thresholds: Sequence[float], hits: Curves, chosen: float) -> Axes:
    """Fraction of questions for which an item is retrieved, by threshold and kind of question."""
    words = ("threshold, cosine similarity", "fraction with an item")
    limits = {"xlim": (thresholds[0], thresholds[-1]), "ylim": (-0.02, 1.02)}
    ax = lines(thresholds, hits, *words, **limits)
    ax.axvline(chosen, color=GRAY, lw=1, zorder=0)
    _note(ax, "chosen", chosen, 1.02, GRAY)
    return ax


def reading_or_loading(tokens: Sequence[int], seconds: Curves) -> Axes:
    """Milliseconds by tokens, both logarithmic, one line per way to obtain their cache."""
    ms = {label: 1000 * np.asarray(values) for label, values in seconds.items()}
    ax = lines(tokens, ms, "tokens of knowledge", "milliseconds", xscale="log", yscale="log")
    ax.set_xticks(tokens, tokens)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    return ax


def retention_curves(curves: Mapping[str, Mapping], full: float, dashed=()) -> Axes:
    """Score by the percentage of entries kept, one curve per method, beside the full cache's.

    Args:
        curves: (value, low, high) by percentage, by method.
        full: score of the full cache.
        dashed: methods whose curve is dashed.
    """
    percents = sorted(next(iter(curves.values())))
    points = {name: [curve[p] for p in percents] for name, curve in curves.items()}
    dashes = ["--" if name in dashed else "-" for name in curves]
    styles = [(*style[:2], dash) for style, dash in zip(LINES, dashes, strict=False)]
    words = ("entries kept (%)", "answers word for word (fraction)")
    settings = {"xscale": "log", "xlim": (percents[0] * 0.9, percents[-1] * 1.1)}
    ax = lines(percents, points, *words, 4.2, styles=styles, ylim=(-0.02, 1.06), **settings)
    ax.axhline(full, color=INK, lw=1, ls=":")
    _note(ax, "full cache", percents[0], full + 0.03)
    ax.set_xticks(percents, percents)
    ax.minorticks_off()
    return ax


# Dots with intervals


def intervals(rows: Rows, xlabel: str, mark: tuple[float, str]) -> Axes:
    """Values with 95 % intervals, one row per label, and a line (x, label) to compare with."""
    ax = axes(height=0.7 + 0.38 * len(rows))[0]
    draw_dots(ax, rows, ".2f")
    x, label = mark
    ax.axvline(x, color=FAINT, zorder=0)
    ax.text(x, -0.75, label, color=GRAY, ha="center", fontsize=9)
    low = min(x, *(low for _, low, _ in rows.values()))
    high = max(x, *(high for _, _, high in rows.values()))
    ax.set(xlabel=xlabel, xlim=(low - 0.05 * (high - low), high + 0.15 * (high - low)))
    return ax


def speed_ratios(ratios: Rows) -> Axes:
    """Ratios of speed with 95 % intervals, one row per label, beside the ratio of equal speed."""
    ax = intervals(ratios, "times as many tokens per second", (1, "same speed"))
    ax.set_xlim(0)
    return ax


def seed_strips(runs: Mapping[str, Sequence[float]], xlabel: str) -> Axes:
    """One dot for each run, one row per label from the top, and a mark and a number for the mean."""
    ax = axes(height=0.7 + 0.3 * len(runs))[0]
    spans = {label: (np.mean(x), min(x), max(x)) for label, x in runs.items()}
    draw_dots(ax, spans, ".2f", (INK, "|"))
    for y, values in enumerate(runs.values()):
        ax.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.45, ms=6, clip_on=False)
    top = max(map(max, runs.values()))
    ax.set(xlabel=xlabel, xlim=(-0.02 * top, 1.1 * top))
    return ax


def splice_panels(panels: Mapping[str, Rows]) -> np.ndarray:
    """One panel per quantity and one row per arm, each (value, low, high)."""
    height = max(2.6, 0.34 * max(map(len, panels.values())))
    places = axes(len(panels), width=max(6.4, 2.4 * len(panels)), height=height, sharey=True)
    for ax, (name, arms) in zip(places, panels.items(), strict=True):
        top = max(high for _, _, high in arms.values())
        draw_dots(ax, arms)
        ax.set(xlabel=name, xlim=(-0.03 * top, 1.38 * top))
    return places


def lab_report(figures: Sequence[Mapping], tasks: Mapping[str, str], models: Sequence[str]) -> Axes:
    """Scores of models by task with 95 % intervals.

    Args:
        figures: what `kvlab.lab.report.report` returns; their names are MODEL_TASK.
        tasks: label of each task.
    """
    ax = axes(height=0.5 + 0.5 * len(tasks))[0]
    by_name = {f["name"]: (f["value"], f["low"], f["high"]) for f in figures}
    for i, (model, style) in enumerate(zip(models, LINES, strict=False)):
        rows = {label: by_name[f"{model}_{task}"] for task, label in tasks.items()}
        offset = 0.25 * (i - 1)
        draw_dots(ax, rows, "", style[:2], offset)
        _, _, high = next(iter(rows.values()))
        _note(ax, model, high, offset, style[0])
    ax.set(xlim=(-0.02, 1.02), xlabel="fraction correct, with 95 % interval")
    return ax


def with_and_without(pairs: Mapping[str, tuple], ways: tuple[str, str]) -> np.ndarray:
    """One panel per group of questions: the acceptance of each, the second way against the first.

    Args:
        pairs: acceptances with the first and with the second way, by group.
        ways: what the two axes are called.
    """
    panels = axes(len(pairs), width=3.1 * len(pairs) + 0.4, height=3.4, sharex=True, sharey=True)
    for ax, (label, (before, after)) in zip(panels, pairs.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=FAINT, zorder=0)
        ax.plot(before, after, "o", color=BLUE, ms=5, alpha=0.5, mew=0, clip_on=False)
        _title(ax, f"{label}: {np.mean(before):.2f} → {np.mean(after):.2f}")
        ax.set(xlabel=ways[0], xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panels[0].set_ylabel(ways[1])
    return panels


# Bars


def cache_sizes(gigabytes: pd.DataFrame) -> Axes:
    """Bars of cache size by model (rows), one color for each of two columns."""
    ax = axes(height=0.6 + 0.5 * len(gigabytes))[0]
    style = {"color": [FAINT, BLUE], "width": 0.76, "edgecolor": "white", "lw": 0}
    gigabytes.plot.barh(ax=ax, legend=False, **style)
    for bars, (name, values) in zip(ax.containers, gigabytes.items(), strict=True):
        labels = [f"{value:.2f}" for value in values]
        labels[0] += f"  {name}"
        ax.bar_label(bars, labels, padding=3, fontsize=9)
    ax.set(xlabel="GB of cache for 8192 tokens, float16", xlim=(0, 1.25 * gigabytes.max(axis=None)))
    ax.invert_yaxis()
    return ax


def time_spent(
    parts: Mapping[str, Mapping[str, float]],
    kinds: Sequence[str] = ("draft", "target", "rest"),
    xlabel: str = "milliseconds per token",
) -> Axes:
    """Milliseconds, one bar per label, from seconds in each of three kinds, of which some may be missing."""
    fills = dict(zip(kinds, ((ORANGE, "///"), (SKY, ""), (FAINT, "...")), strict=True))
    ax = axes(height=0.6 + 0.62 * len(parts))[0]
    for y, seconds in enumerate(parts.values()):
        left, label = 0.0, ""
        for name, fill in fills.items():
            width = 1000 * seconds.get(name, 0.0)
            draw_bars(ax, y, width, fill, 0.42, left)
            left += width
            if width:
                label += f"{' + ' if label else ''}{name} {width:.3g}"
        ax.text(0, y - 0.24, f"{label} = {left:.3g} ms", va="bottom", fontsize=8)
    ax.set_yticks(range(len(parts)), parts)
    ax.set(xlabel=xlabel, ylim=(len(parts) - 0.6, -0.65))
    return ax


def waterfall(totals: Mapping[str, float], savings: Rows, xlabel: str) -> Axes:
    """Bars from the total before each step to the total after it, with intervals.

    Args:
        totals: total after each step; the first bar shows it whole.
        savings: what each step but the first saves; the interval is drawn around the bar's end.
    """
    ax = axes(width=7.4, height=0.8 + 0.46 * len(totals))[0]
    before = 0.0
    for y, (name, after) in enumerate(totals.items()):
        label, end = f"{after:.0f}", max(before, after)
        fill = (SKY, "")
        if name in savings:
            saved, low, high = savings[name]
            fill = (GREEN, "") if after < before else (RED, "///")
            label += f"  ({-saved:+.0f} [{-high:+.0f}, {-low:+.0f}])"
            end = max(end, before - low)
            ax.plot([before - low, before - high], [y, y], color=INK, lw=1.2)
            ax.plot([before, before], [y - 1.3, y + 0.3], color=GRAY, lw=0.8, ls=":")
        draw_bars(ax, y, after - before, fill, left=before)
        _note(ax, label, end, y)
        before = after
    ax.set_yticks(range(len(totals)), totals)
    ax.set(xlabel=xlabel, xlim=(0, 1.45 * max(totals.values())))
    ax.invert_yaxis()
    return ax


def joint_histogram(expected: np.ndarray, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Observed frequency of each outcome as a bar, its exact probability as a diamond, by label."""
    panels = axes(len(counts), width=1 + 3.3 * len(counts), height=2.8, sharey=True, sharex=True)
    outcomes = range(len(expected))
    for ax, (label, count), (color, *_) in zip(panels, counts.items(), LINES, strict=False):
        ax.bar(outcomes, np.asarray(count) / np.sum(count), color=color, alpha=0.55)
        ax.plot(outcomes, expected, "D", color=INK, mfc="white", ms=3, mew=0.9)
        _title(ax, label)
        ax.set_xlabel("outcome")
    panels[-1].set_title("◇ exact", loc="right", fontsize=9)
    panels[0].set(ylabel="frequency", xlim=(-0.8, len(expected) - 0.2))
    panels[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return panels


def residual(p: Sequence[float], q: Sequence[float]) -> np.ndarray:
    """How a token drafted from q becomes a sample of p: both; accepted and rejected; the result."""
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    both = np.minimum(p, q)
    tokens = np.arange(len(p))
    panels = axes(3, width=8.4, height=1 + 0.4 * len(p), sharex=True, sharey=True)
    one, two, three = panels
    _label_longest(draw_bars(one, tokens - 0.2, q, (ORANGE, "///"), 0.38), "draft q")
    _label_longest(draw_bars(one, tokens + 0.2, p, (BLUE, ""), 0.38), "target p")
    outline = {"color": "white", "edgecolor": GRAY, "ls": ":", "lw": np.where(q > p, 1, 0)}
    _label_longest(two.barh(tokens, q - both, 0.7, both, **outline), "rejected")
    for ax in (three, two):
        draw_bars(ax, tokens, both, (GREEN, ""), 0.7)
        from_residual = draw_bars(ax, tokens, p - both, (PURPLE, "xxx"), 0.7, both)
    _label_longest(from_residual, "from the residual")
    if both.any():
        _note(two, "accepted", 0, both.argmax())
    three.plot(p, tokens, "D", color=INK, mfc="white", ms=5)
    _note(three, "p", p.max(), p.argmax())
    _title(one, "a token from q, wanted: p")
    _title(two, f"{100 * both.sum():.0f} % of drafted tokens accepted")
    _title(three, "together: exactly p")
    one.set(ylabel="token", yticks=tokens, xlim=(0, 1.6 * max(p.max(), q.max())))
    one.invert_yaxis()
    two.set_xlabel("probability")
    return panels


def _label_longest(bars, label: str) -> None:
    """Write a label right of the longest bar."""
    bar = max(bars, key=lambda bar: bar.get_width())
    if bar.get_width() > 0:
        x, y = bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2
        _note(bar.axes, label, x, y)


def splice_strips(lengths: Sequence[int], question: int) -> Axes:
    """What splicing does with the tokens of pieces and question, one strip per arm that chooses none."""
    fills = {"read": (ORANGE, "///"), "loaded": (SKY, ""), "moved": (GREEN, "")}
    fills["wrong position"] = (RED, "xx")
    arms = ("full", "prefix", "concat", "shift")
    of_first = ("read", "loaded", "loaded", "loaded")
    of_later = ("read", "read", "wrong position", "moved")
    ax = axes(width=7.2, height=2.5)[0]
    starts = np.cumsum([0, *lengths])
    middles = starts + np.divide([*lengths, question], 2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
    for y, (first, later) in enumerate(zip(of_first, of_later, strict=True)):
        kinds = [first, *[later] * (len(lengths) - 1), "read"]
        for kind, start, x in zip(kinds, starts, middles, strict=True):
            draw_bars(ax, y, 2 * (x - start) - 0.8, fills[kind], 0.62, start)
            _text(ax, x, y, kind, bbox=box)
    for i, x in enumerate(middles):
        head = f"piece {i + 1}" if i < len(lengths) else "question"
        _text(ax, x, -0.72, head, color=GRAY)
    ax.set_yticks(range(len(arms)), arms)
    limits = {"xlim": (-1, starts[-1] + question), "ylim": (len(arms) - 0.5, -0.95)}
    ax.set(xlabel="position in the prompt", **limits)
    return ax


def token_differences(difference: Sequence, starts: Sequence[int], chosen: Iterable) -> Axes:
    """Distance of each token's stored keys and values from the true ones, by piece."""
    ax = axes(width=7.2, height=2.7)[0]
    tokens = np.arange(len(difference))
    colors = np.where(np.isin(tokens, list(chosen)), RED, SKY)
    ax.bar(tokens, difference, 1.0, color=colors)
    top = max(difference)
    for number, start in enumerate(starts):
        ax.axvline(start - 0.5, color=GRAY, lw=0.8, ls=":")
        _note(ax, f"piece {number + 1}", start, 1.1 * top, GRAY)
    limits = {"xlim": (-0.5, len(tokens) - 0.5), "ylim": (0, 1.16 * top)}
    ax.set(xlabel="token", ylabel="difference", **limits)
    ax.set_title("computed again", loc="right", fontsize=9, color=RED)
    return ax


def computed_tokens(masks: Maps, starts: Sequence[int]) -> np.ndarray:
    """The tokens that each arm computes again in each layer, (L, T) by arm, and where pieces begin."""
    panels = axes(width=7.2, height=1.35 * len(masks), rows=len(masks), sharex=True)
    for ax, (arm, mask) in zip(panels, masks.items(), strict=True):
        ax.pcolormesh(np.asarray(mask), cmap=ListedColormap(("white", RED)), vmin=0, vmax=1)
        for start in starts:
            ax.axvline(start, color=GRAY, lw=0.8, ls=":")
        _title(ax, arm)
        ax.set(ylabel="layer")
    ax.set(xlabel="token")
    return panels


def cut_layers(depth: int, cuts: Mapping[str, Sequence[int]]) -> Axes:
    """The layers of a target in a row, and below, one row per cut with the layers it takes."""
    ax = axes(width=7.2, height=0.9 + 0.42 * len(cuts))[0]
    cells = np.zeros((1 + len(cuts), depth))
    cells[0] = 1
    for y, chosen in enumerate([range(depth), *cuts.values()]):
        cells[y, list(chosen)] = 2 if y else 1
        for layer in chosen:
            color = "white" if y else INK
            _text(ax, layer + 0.5, y + 0.5, layer, color=color, fontsize=7)
    _draw_cells(ax, cells, ("white", FAINT, BLUE), GRAY)
    ax.set_yticks(np.arange(len(cells)) + 0.5, ["target", *cuts])
    ax.set(ylim=(len(cells), 0), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(left=False)
    return ax


def gates(logits: Tensor, changes: Tensor) -> np.ndarray:
    """Gates of a fuser by layer, for keys and values, (L, 2): logits, and relative changes."""
    panels = axes(2, width=7.4, height=2.8)
    titles = ("logit of the gate", "change / size before")
    for ax, values, title in zip(panels, (logits, changes), titles, strict=True):
        for i, (name, color, hatch) in enumerate((("keys", BLUE, ""), ("values", ORANGE, "///"))):
            x = np.arange(len(values)) + 0.4 * i - 0.2
            ax.bar(x, values[:, i], 0.38, color=color, hatch=hatch, edgecolor="white", lw=0)
            top = max(0.0, float(values[0, i]))
            ax.text(x[0], top, name, ha="center", va="bottom", fontsize=8)
        ax.axhline(0, color=INK, lw=0.8)
        _title(ax, title)
        ax.set(xlabel="layer of the receiver", ymargin=0.15)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return panels


# Heat maps


def cache_picture(matrices: Maps, tokens: Sequence[str], shared: bool = False) -> np.ndarray:
    """Keys or values of one head, (T, D), with the tokens beside their rows.

    Args:
        shared: one color scale for all, and not one for each.
    """
    limit = max(matrix.abs().max().item() for matrix in matrices.values())
    limits = (-limit, limit) if shared else ()
    height = 0.7 + 0.17 * len(tokens)
    panels = draw_heat_maps(matrices, limits, width=7.4, height=height, sharey=True)
    panels[0].set_yticks(range(len(tokens)), tokens, fontsize=7)
    panels[0].figure.supxlabel("dimension of the head", fontsize=10)
    for ax in panels[:1] if shared else panels:
        ax.figure.colorbar(ax.images[0], ax=panels if shared else ax, shrink=0.8)
    return panels


def score_maps(
    maps: Maps, ylabel: str, xlabel: str, rows: Sequence = (), columns: Sequence = ()
) -> np.ndarray:
    """Scores between 0 and 1 side by side on one scale, such as CKA of each pair of layers.

    Args:
        rows, columns: names of the matrices' rows and columns, where they are not 0, 1, 2 ...
    """
    height = 0.9 + 0.24 * max(map(len, maps.values()))
    panels = draw_heat_maps(maps, (0, 1.6), width=7.8, height=height)
    for ax in panels:
        ax.locator_params(integer=True, nbins=13)
        if len(rows):
            ax.set_xticks(range(len(columns)), columns)
            ax.set_yticks(range(len(rows)), rows)
        ax.set_xlabel(xlabel)
    panels[0].set_ylabel(ylabel)
    return panels


def cache_shapes(caches: Mapping[str, tuple[int, Sequence[int], str]]) -> np.ndarray:
    """Caches of one text: one column per token, one row per layer, colored by segment.

    Args:
        caches: layers, token borders of prompt, reasoning and answer, and a description, by name.
    """
    panels = axes(len(caches), width=7.6, height=2.6, sharex=True, sharey=True)
    width = max(borders[-1] for _, borders, _ in caches.values())
    deepest = max(layers for layers, *_ in caches.values())
    for ax, (name, (layers, borders, description)) in zip(panels, caches.items(), strict=True):
        segments = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
        _draw_cells(ax, np.tile(segments, (layers, 1)), SEGMENT_COLORS, "white")
        heights = (0.02, 0.02, 0.11)  # the last label is above the others
        labels = ("prompt", "reasoning", "answer")
        for label, start, height in zip(labels, borders[:-1], heights, strict=False):
            ax.text(start, layers + height * deepest, label, va="bottom", fontsize=8)
        _title(ax, f"{name}: {description}")
        ax.set(xlim=(-1, width + 3), ylim=(-0.3, 1.22 * deepest), xlabel="token")
        shown = np.arange(0, deepest, max(1, deepest // 6))
        ax.set_yticks(shown + 0.5, shown)
    panels[0].set_ylabel("layer")
    return panels


def token_links(
    teacher: Sequence[str], student: Sequence[str], borders: tuple, ways: Mapping[str, Iterable]
) -> np.ndarray:
    """Which teacher tokens (top) each student token (bottom) is made of, one panel per way.

    Args:
        borders: of the teacher's and the student's prompt, reasoning and answer, which give the
            colors.
        ways: entries (student token, teacher token, weight), by name.
    """
    panels = axes(width=8.2, height=2.5 * len(ways), rows=len(ways), sharex=True)
    teacher_colors, colors = (np.repeat(SEGMENT_COLORS, np.diff(ends)) for ends in borders)
    above = np.linspace(0, 1, len(teacher))
    below = np.linspace(0, 1, len(student))
    style = {"rotation": 90, "fontsize": 5.5, "ha": "center"}
    for ax, (name, entries) in zip(panels, ways.items(), strict=True):
        for i, j, weight in entries:
            alpha = max(0.15, weight)
            ax.plot([below[i], above[j]], [0, 1], color=colors[i], lw=1.6, alpha=alpha)
        ax.scatter(above, np.ones(len(above)), c=teacher_colors, marker="s", s=14, zorder=3)
        ax.scatter(below, np.zeros(len(below)), c=colors, marker="s", s=14, zorder=3)
        for x, token in zip(above, teacher, strict=True):
            ax.text(x, 1.06, token, va="bottom", **style)
        for x, token in zip(below, student, strict=True):
            ax.text(x, -0.06, token, va="top", **style)
        ax.set(ylim=(-0.5, 1.5), xlim=(-0.01, 1.01), xticks=[])
        ax.set_yticks([0, 1], ["student", "teacher"])
        _title(ax, name)
        ax.spines[:].set_visible(False)
        ax.tick_params(left=False)
    return panels


# Tokens as HTML


def score_view(
    ids: Sequence[int], scores: Mapping[str, tuple], tokenizer: PreTrainedTokenizerBase
) -> HTML:
    """Show a text once per method: darker tokens have higher scores, kept tokens are underlined.

    Args:
        scores: for each method one score per token, of which only the order is shown, and the
            positions kept.

    Example:
        >>> from kvlab import lab
        >>> scores = {"any": ([0.2, 0.1], [0])}
        >>> view = score_view([37, 82], scores, lab.load_tokenizer("lab-target"))
        >>> view.data.splitlines()[-2].split("<br>")[0]
        '<p><b>any</b> (1 of 2 kept)'
    """
    lines = []
    for name, (values, kept) in scores.items():
        ranks = np.argsort(np.argsort(values)) / max(1, len(ids) - 1)
        marked = f"<p><b>{name}</b> ({len(kept)} of {len(ids)} kept)<br>"
        for i, (token, rank) in enumerate(zip(ids, ranks, strict=True)):
            tag, text = "u" if i in kept else "s", _token_html(token, tokenizer)
            if text.startswith("<i>"):  # lines break where there is a space
                marked += "<wbr>"
            color = f"rgba(0, 114, 178, {0.45 * rank:.2f})"
            marked += f'<{tag} style="background: {color}">{text}</{tag}>'
        lines.append(marked + "</p>")
    alt = f"One text of {len(ids)} tokens, colored by the scores of {', '.join(scores)};"
    return _figure("kv-scores", f"{alt} kept tokens are underlined.", lines)


def token_view(rounds: Sequence[Round], tokenizer: PreTrainedTokenizerBase, row: int = 0) -> HTML:
    """Show one text as it was decoded, one line per round: drafted tokens and the target's.

    Accepted tokens are underlined, rejected ones struck through, the target's own in a box. Rounds
    in which the row gained nothing are left out.

    Example:
        >>> from kvlab import lab, speculate
        >>> rounds = [speculate.Round([[37, 82]], [1], [[37, 18]], 0.1, 0.2, 0.3)]
        >>> print(token_view(rounds, lab.load_tokenizer("lab-target")).data.splitlines()[-2])
        <div><u>A</u><s>n</s><b>.</b></div>
    """
    key = "<u>drafted, accepted</u> <s>drafted, rejected</s> <b>the target's own</b>"
    lines = []
    drafted = 0
    for r in rounds:
        if not r.tokens[row]:
            continue
        matched = r.tokens[row][: r.accepted[row]]
        extra = r.tokens[row][r.accepted[row] :]
        guesses = [token for token in r.drafted[row] if token >= 0]
        drafted += len(guesses)
        # A text that ends with an accepted token rejects none.
        rejected = guesses[len(matched) :] if extra else []
        line = ""
        for tag, ids in {"u": matched, "s": rejected, "b": extra}.items():
            line += "".join(f"<{tag}>{_token_html(i, tokenizer)}</{tag}>" for i in ids)
        lines.append(f"<div>{line}</div>")
    accepted = "".join(lines).count("<u>")
    alt = f"One text in {len(lines)} rounds: {drafted} tokens drafted, {accepted} of them accepted;"
    alt += f" {''.join(lines).count('<b>')} of the target's own."
    return _figure("kv-tokens", alt, [f'<div class="key">{key}</div>', *lines])


def _figure(name: str, alt: str, lines: Sequence[str]) -> HTML:
    from IPython.display import HTML

    style = (Path(__file__).with_name("widgets") / "tokens.css").read_text()
    start = f'<div class="{name}" role="figure" aria-label="{alt}">'
    return HTML("\n".join([f"<style>\n{style}</style>", start, *lines, "</div>"]))


def _token_html(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of one token, or its name if it is part of a character, with visible white space."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token) or f"[{token}]"  # more rows than tokens
    text = html.escape(text)
    for space, sign in {" ": "·", "\n": "↵", "\t": "⇥"}.items():
        text = text.replace(space, f"<i>{sign}</i>")
    return text
