"""Every figure of the book: one palette, one function a figure, each returns its Axes.

Figures stand on a white card, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.image import AxesImage
from torch import Tensor

if TYPE_CHECKING:
    from IPython.display import HTML
    from transformers import PreTrainedTokenizerBase

    from kvlab.speculate import Round, Summary

# Okabe and Ito (2008), distinguishable with any color vision; black and yellow are left out.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
INK, GRAY, FAINT = "#222222", "#666666", "#BBBBBB"
LINES = ((BLUE, "o", "-"), (RED, "s", "--"), (GREEN, "D", "-."), (PURPLE, "^", ":"))
PARTS = {
    "draft": (ORANGE, "///"),
    "target": (SKY, ""),
    "rest": (FAINT, "..."),
}  # of a decoded token's time
STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def axes(
    columns: int = 1, width: float = 6.4, height: float = 3.2, rows: int = 1, **options
) -> np.ndarray:
    """An array of Axes in the book's style on one card, row after row."""
    plt.draw_if_interactive()  # chooses the backend now: inside the context, a notebook would forget to show figures
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)[
            1
        ].flatten()


def decode_cost(seconds: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> Axes:
    """Milliseconds of each new token against the tokens before it, one line a way of decoding."""
    ax = axes()[0]
    for (label, values), color in zip(seconds.items(), (RED, BLUE, GREEN), strict=False):
        ax.plot(tokens, 1000 * np.asarray(values), "o-", color=color, ms=4)
        ax.annotate(
            label,
            (tokens[-1], 1000 * values[-1]),
            (6, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
    ax.set(xlabel="tokens already read", ylabel="milliseconds for the next token", ylim=(0, None))
    return ax


def cache_picture(matrices: Mapping[str, Tensor], tokens: Sequence[str]) -> np.ndarray:
    """Keys or values of one head, (T, D) each, as heat maps side by side with the tokens beside their rows."""
    places = axes(len(matrices), height=0.7 + 0.17 * len(tokens), sharey=True)
    for ax, (name, matrix) in zip(places, matrices.items(), strict=True):
        image = _heat(ax, name, matrix, matrix.abs().max().item())
        ax.set_xlabel("dimension of the head")
        ax.figure.colorbar(image, ax=ax, shrink=0.8)
    places[0].set_yticks(range(len(tokens)), tokens, fontsize=7)
    return places


def key_differences(keys: Mapping[str, Tensor], tokens: Sequence[str]) -> np.ndarray:
    """Keys or values, (T, D) each, on one scale of colors, with the tokens beside their rows."""
    places = axes(len(keys), width=8.2, height=0.7 + 0.17 * len(tokens), sharey=True)
    limit = max(matrix.abs().max().item() for matrix in keys.values())
    for ax, (name, matrix) in zip(places, keys.items(), strict=True):
        image = _heat(ax, name, matrix, limit)
        ax.title.set_fontsize(9)
    places[0].set_yticks(range(len(tokens)), tokens, fontsize=7)
    places[0].figure.supxlabel("dimension", fontsize=10)
    places[0].figure.colorbar(image, ax=places, shrink=0.8, pad=0.02)
    return places


def _heat(ax: Axes, name: str, matrix: Tensor, limit: float) -> AxesImage:
    options = {
        "cmap": "PuOr",
        "vmin": -limit,
        "vmax": limit,
        "aspect": "auto",
        "interpolation": "nearest",
    }
    ax.set_title(name)
    return ax.imshow(matrix.float().cpu().numpy(), **options)


def cache_sizes(gigabytes: pd.DataFrame) -> Axes:
    """Bars of cache size by model (rows), one color for each of two columns."""
    ax = axes(height=0.6 + 0.5 * len(gigabytes))[0]
    places = np.arange(len(gigabytes))
    for i, (name, color) in enumerate(zip(gigabytes, (FAINT, BLUE), strict=True)):
        bars = ax.barh(places + 0.2 - 0.4 * i, gigabytes[name], 0.38, color=color)
        labels = [f"{value:.2f}" for value in gigabytes[name]]
        ax.bar_label(bars, [f"{labels[0]}  {name}", *labels[1:]], padding=3, fontsize=9)
    ax.set_yticks(places, gigabytes.index)
    ax.set(
        xlabel="GB of cache for 8192 tokens, float16", xlim=(0, 1.25 * gigabytes.to_numpy().max())
    )
    ax.invert_yaxis()
    return ax


def turned_scores(differences: Sequence[int], scores: Mapping[str, Sequence[float]]) -> Axes:
    """Attention score of one query and one key against how far both are moved, one line a way of moving."""
    ax = axes(height=2.6)[0]
    for (label, values), color in zip(scores.items(), (BLUE, RED), strict=False):
        ax.plot(differences, values, color=color)
        ax.annotate(
            label,
            (differences[-1], values[-1]),
            (6, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
    ax.set(xlabel="positions moved", ylabel="query · key")
    return ax


def lab_report(figures: Sequence[Mapping], tasks: Mapping[str, str], models: Sequence[str]) -> Axes:
    """Scores of models by task with 95 % intervals; names are MODEL_TASK, `tasks` gives each task's words."""
    ax = axes(height=0.5 + 0.5 * len(tasks))[0]
    by_name = {f["name"]: f for f in figures}
    for i, (model, color, marker) in enumerate(
        zip(models, (BLUE, ORANGE, GREEN), "osD", strict=True)
    ):
        rows = [(y + 0.25 * (i - 1), by_name[f"{model}_{task}"]) for y, task in enumerate(tasks)]
        for y, f in rows:
            ax.plot([f["low"], f["high"]], [y, y], color=color, lw=2, alpha=0.5)
        ax.plot(
            [f["value"] for _, f in rows],
            [y for y, _ in rows],
            marker,
            color=color,
            ms=5,
            clip_on=False,
        )
        y, f = rows[0]
        ax.annotate(
            model,
            (f["high"], y),
            (8, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(tasks)), tasks.values())
    ax.set(xlim=(-0.02, 1.02), xlabel="fraction right, with 95 % interval")
    ax.grid(axis="x", color="#EEEEEE")
    ax.set_axisbelow(True)
    ax.invert_yaxis()
    return ax


def _apart(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> np.ndarray:
    """Centers near the wanted ones (ascending) of labels that do not overlap and stay between low and high."""
    sizes = np.asarray(sizes)
    offsets = np.cumsum((sizes + np.roll(sizes, 1)) / 2) - (sizes[0] + sizes[-1]) / 2
    free = np.asarray(wanted) - offsets  # labels do not overlap where this does not decrease
    up, down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return (
        np.clip((up + down) / 2, low + sizes[0] / 2, high - sizes[-1] / 2 - offsets[-1]) + offsets
    )


def _label_ends(ax: Axes, ends: Iterable[tuple[str, float, float, str]]) -> None:
    """Write labels right of the axes, each (label, x, y, color) level with the end of its line, or tied to it."""
    ends = sorted(ends, key=lambda end: end[2], reverse=True)[
        ::-1
    ]  # of ends alike, the first is on top
    ax.figure.draw_without_rendering()  # the height of the axes is known only after layout
    (low, high), points = ax.get_ylim(), 72 * ax.get_window_extent().height / ax.figure.dpi
    gap = 13 * (high - low) / points
    heights = _apart([y for _, _, y, _ in ends], [gap] * len(ends), low - gap / 2, high + gap / 2)
    for (label, x, y, color), height in zip(ends, heights, strict=True):
        tie = {
            "arrowstyle": "-",
            "color": FAINT,
            "lw": 0.7,
            "shrinkA": 1,
            "shrinkB": 4,
            "relpos": (0, 0.5),
        }
        where = {
            "xycoords": "data",
            "textcoords": ("axes fraction", "data"),
            "va": "center",
            "fontsize": 9,
        }
        ax.annotate(label, (x, y), (1.06, height), color=color, arrowprops=tie, **where)


def acceptance_by_position(summaries: Mapping[str, Summary]) -> np.ndarray:
    """Share of drafted tokens accepted, by position, one line a label: of those reached, and of all drafted."""
    if not 1 <= len(summaries) <= len(LINES):
        raise ValueError(
            f"There are {len(summaries)} summaries, expected 1 to {len(LINES)}: draw fewer."
        )
    panels = axes(2, width=7.6, height=3, sharey=True)
    panels[0].set(ylabel="share accepted", ylim=(-0.02, 1.02))
    titles = {
        "conditional": "of the drafted tokens reached",
        "unconditional": "of all drafted tokens",
    }
    for ax, (kind, title) in zip(panels, titles.items(), strict=True):
        ends = []
        for (label, summary), (color, marker, dash) in zip(summaries.items(), LINES, strict=False):
            shares = np.asarray(
                getattr(summary, kind), dtype=float
            )  # not a number where no token was reached
            places = 1 + np.flatnonzero(np.isfinite(shares))
            if not len(places):
                raise ValueError(
                    f"{label!r} has no drafted tokens, expected a summary of speculative decoding."
                )
            ax.plot(
                places,
                shares[places - 1],
                color=color,
                marker=marker,
                ls=dash,
                ms=4.5,
                clip_on=False,
            )
            ends.append((label, places[-1], shares[places[-1] - 1], color))
        ax.set_title(title, loc="left", fontsize=10)
        ax.set(xlabel="drafted position", xlim=(0.6, 0.4 + max(x for _, x, *_ in ends)))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(axis="y", color="#EEEEEE")
        _label_ends(ax, ends)
    return panels


def speedup_over_gamma(
    gammas: Sequence[int],
    measured: Sequence[tuple[float, float, float]],
    predicted: Mapping[str, Sequence[float]],
) -> Axes:
    """Times faster than plain decoding by drafted tokens: measured (value, low, high) on predicted curves."""
    ax, (values, low, high) = axes(width=6.8)[0], np.transpose(measured)
    ends = [("plain decoding", gammas[-1], 1.0, GRAY), ("measured", gammas[-1], values[-1], INK)]
    ax.axhline(1, color=FAINT, lw=1, zorder=0)
    for (label, curve), (color, _, dash) in zip(predicted.items(), LINES, strict=False):
        ax.plot(gammas, curve, color=color, ls=dash)
        ends.append((label, gammas[-1], curve[-1], color))
    ax.vlines(gammas, low, high, color=INK, lw=1.5)
    ax.plot(gammas, values, "o", color=INK, ms=5)
    ax.set(xlabel="gamma, drafted tokens a round", ylabel="times faster than plain", xticks=gammas)
    ax.set_ylim(0, 1.08 * max(1, high.max(), *(max(curve) for curve in predicted.values())))
    _label_ends(ax, ends)
    return ax


def time_spent(parts: Mapping[str, Mapping[str, float]]) -> Axes:
    """Milliseconds of a token as one bar a label, from seconds spent in "draft", "target" and "rest"."""
    ax = axes(height=0.6 + 0.62 * len(parts))[0]
    ms = {
        label: {name: 1000 * seconds.get(name, 0.0) for name in PARTS}
        for label, seconds in parts.items()
    }
    for y, row in enumerate(ms.values()):
        for name, left in zip(row, np.cumsum([0, *row.values()]), strict=False):
            color, hatch = PARTS[name]
            ax.barh(y, row[name], 0.42, left, color=color, hatch=hatch, edgecolor="white", lw=0)
        ax.text(
            sum(row.values()),
            y,
            f" {sum(row.values()):.3g} ms",
            va="center",
            weight="bold",
            color=INK,
            fontsize=9,
        )
    ax.set(
        xlabel="milliseconds a token",
        xlim=(0, 1.15 * max(sum(row.values()) for row in ms.values())),
    )
    ax.set(ylim=(len(ms) - 0.6, -0.65))
    ax.set_yticks(range(len(ms)), ms)
    for y, row in enumerate(ms.values()):
        seen = {name: value for name, value in row.items() if value > 0.01 * sum(row.values())}
        _label_segments(ax, y - 0.24, seen)
    return ax


def _label_segments(ax: Axes, y: float, segments: Mapping[str, float]) -> None:
    """Write name and length of each segment of a bar above its middle, moved apart where those are close."""
    ends = np.cumsum([*segments.values()])
    labels = [f"{name} {value:.3g}" for name, value in segments.items()]
    texts = [
        ax.text(0, y, label, ha="center", va="bottom", fontsize=8, color=GRAY) for label in labels
    ]
    ax.figure.draw_without_rendering()  # sizes are known only after layout
    pixels = ax.get_xlim()[1] / ax.get_window_extent().width
    sizes = [(text.get_window_extent().width + ax.figure.dpi / 12) * pixels for text in texts]
    for text, x in zip(
        texts, _apart(ends - np.diff(ends, prepend=0) / 2, sizes, 0, ax.get_xlim()[1]), strict=True
    ):
        text.set_x(x)


def speed_ratios(figures: Mapping[str, Mapping], names: Mapping[str, str]) -> Axes:
    """Measured ratios of speeds with 95 % intervals, one row a figure; `names` gives each figure's words."""
    ax = intervals(figures, names, "times as many tokens a second", (1, "same speed"))
    ax.set_xlim(0)
    return ax


def intervals(
    figures: Mapping[str, Mapping], names: Mapping[str, str], xlabel: str, mark: tuple[float, str]
) -> Axes:
    """Measured figures with 95 % intervals, one row a figure, beside a value to compare with, (where, what it is)."""
    ax = axes(height=0.7 + 0.38 * len(names))[0]
    for y, name in enumerate(names):
        f = figures[name]
        ax.plot([f["low"], f["high"]], [y, y], color=BLUE, lw=2, alpha=0.5)
        ax.plot(f["value"], y, "o", color=BLUE, ms=6)
        ax.annotate(
            f"{f['value']:.2f}",
            (f["high"], y),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.axvline(mark[0], color=FAINT, zorder=0)
    ax.text(mark[0], -0.75, mark[1], color=GRAY, ha="center", fontsize=9)
    ax.set_yticks(range(len(names)), names.values())
    low, high = (
        pick(figures[name][end] for name in names) for pick, end in ((min, "low"), (max, "high"))
    )
    low, high = min(low, mark[0]), max(high, mark[0])
    ax.set(xlabel=xlabel, xlim=(low - 0.05 * (high - low), high + 0.15 * (high - low)))
    ax.invert_yaxis()
    return ax


def waterfall(totals: Mapping[str, Mapping], changes: Mapping[str, Mapping], xlabel: str) -> Axes:
    """What each step takes off a total, or adds to it: bars from the total before to the total after, with intervals.

    Args:
        totals: for each step its figure, the first one whole.
        changes: for each step but the first what it saved, a figure whose interval is drawn around
            the bar's end.
    """
    ax, before = axes(width=7.4, height=0.8 + 0.46 * len(totals))[0], 0.0
    longest = max(figure["value"] for figure in totals.values())
    for y, (name, figure) in enumerate(totals.items()):
        after = figure["value"]
        color, hatch = (SKY, "") if not y else (GREEN, "") if after < before else (RED, "///")
        ax.barh(y, after - before, 0.6, before, color=color, hatch=hatch, edgecolor="white", lw=0)
        told = f"{after:.0f}"
        if name in changes:
            saved = changes[name]
            ax.plot([before - saved["low"], before - saved["high"]], [y, y], color=INK, lw=1.2)
            told += f"  ({-saved['value']:+.0f} [{-saved['high']:+.0f}, {-saved['low']:+.0f}])"
            ax.plot([before, before], [y - 1.3, y + 0.3], color=GRAY, lw=0.8, ls=":")
        end = max(before, after, before - changes[name]["low"] if name in changes else 0)
        ax.annotate(
            told, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
        before = after
    ax.set_yticks(range(len(totals)), totals)
    ax.set(xlabel=xlabel, xlim=(0, 1.45 * longest))
    ax.invert_yaxis()
    return ax


def joint_histogram(expected: np.ndarray, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Observed frequency of each of n outcomes as bars, its exact probability as a diamond, one panel a label."""
    panels = axes(len(counts), width=1 + 3.3 * len(counts), height=2.8, sharey=True, sharex=True)
    for ax, (label, count), (color, *_) in zip(panels, counts.items(), LINES, strict=False):
        ax.bar(
            range(len(expected)), np.asarray(count) / np.sum(count), 0.8, color=color, alpha=0.55
        )
        ax.plot(range(len(expected)), expected, "D", color=INK, mfc="white", ms=3, mew=0.9)
        ax.set_title(label, loc="left", fontsize=10)
        ax.set_xlabel("outcome")
    panels[-1].set_title("◇ exact", loc="right", fontsize=9)
    panels[0].set(ylabel="share drawn", xlim=(-0.8, len(expected) - 0.2))
    panels[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return panels


def residual(p: Sequence[float], q: Sequence[float]) -> np.ndarray:
    """How a guess from q becomes a draw from p: the two; what is accepted, rejected, drawn instead; what results."""
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    both, tokens, hatched = np.minimum(p, q), np.arange(len(p)), {"edgecolor": "white", "lw": 0}
    one, two, three = panels = axes(3, width=8.4, height=1 + 0.4 * len(p), sharex=True, sharey=True)
    _label_longest(one.barh(tokens - 0.2, q, 0.38, color=ORANGE, hatch="///", **hatched), "draft q")
    _label_longest(one.barh(tokens + 0.2, p, 0.38, color=BLUE), "target p")
    dropped = two.barh(
        tokens, q - both, 0.7, both, color="white", edgecolor=GRAY, ls=":", lw=np.where(q > p, 1, 0)
    )
    _label_longest(dropped, "rejected")
    for ax in (two, three):
        ax.barh(tokens, both, 0.7, color=GREEN)
        ax.barh(tokens, p - both, 0.7, both, color=PURPLE, hatch="xxx", **hatched)
    _label_longest(two.containers[-1], "from the residual")
    if both.any():
        place = {"textcoords": "offset points", "va": "center"}
        two.annotate("accepted", (0, both.argmax()), (4, 0), color=INK, fontsize=8, **place)
    three.plot(p, tokens, "D", color=INK, mfc="white", ms=5)
    three.annotate(
        "p",
        (p.max(), p.argmax()),
        (7, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=9,
    )
    titles = (
        "a guess from q, wanted: p",
        f"{100 * both.sum():.0f} % of guesses accepted",
        "together: exactly p",
    )
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=10)
    one.set(ylabel="token", yticks=tokens, xlim=(0, 1.6 * max(p.max(), q.max())))
    one.invert_yaxis()
    two.set_xlabel("probability")
    return panels


def _label_longest(bars: BarContainer, label: str) -> None:
    """Write what bars are beside the longest of them."""
    bar = max(bars, key=lambda bar: bar.get_width())
    if bar.get_width() > 0:
        place = (bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2)
        bar.axes.annotate(
            label, place, (5, 0), textcoords="offset points", va="center", color=INK, fontsize=8
        )


def splice_strips(lengths: Sequence[int], question: int, share: float = 0.15) -> Axes:
    """What each arm of splicing does with the tokens of pieces and of the question, one strip an arm."""
    ax, starts = axes(width=7.2, height=2.9)[0], np.cumsum([0, *lengths])
    kinds = {
        "read": (ORANGE, "///"),
        "loaded": (SKY, ""),
        "moved": (GREEN, ""),
        "wrong place": (RED, "xx"),
    }
    first = {
        "full": "read",
        "prefix": "loaded",
        "concat": "loaded",
        "shift": "loaded",
        "recompute": "loaded",
    }
    later = {
        "full": "read",
        "prefix": "read",
        "concat": "wrong place",
        "shift": "moved",
        "recompute": "moved",
    }
    for y, arm in enumerate(first):
        for i, (start, length) in enumerate(zip(starts, [*lengths, question], strict=True)):
            kind = "read" if i == len(lengths) else later[arm] if i else first[arm]
            color, hatch = kinds[kind]
            ax.barh(y, length - 0.8, 0.62, start, color=color, hatch=hatch, edgecolor="white", lw=0)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
            ax.text(
                start + length / 2,
                y,
                kind,
                ha="center",
                va="center",
                fontsize=8,
                color=INK,
                bbox=box,
            )
        if arm == "recompute":
            spots = np.linspace(starts[1], starts[-1], 2 + round(share * (starts[-1] - starts[1])))[
                1:-1
            ]
            color, hatch = kinds["read"]
            ax.bar(spots, 0.62, 0.9, y - 0.31, color=color, lw=0)
    heads = [f"piece {i + 1}" for i in range(len(lengths))] + ["question"]
    for start, length, head in zip(starts, [*lengths, question], heads, strict=True):
        ax.text(start + length / 2, -0.62, head, ha="center", color=GRAY, fontsize=9)
    ax.set_yticks(range(len(first)), first)
    ax.set(
        xlabel="position in the prompt",
        ylim=(len(first) - 0.5, -0.95),
        xlim=(-1, starts[-1] + question),
    )
    return ax


def splice_panels(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> np.ndarray:
    """One panel a quantity and one row an arm, each (value, low, high)."""
    rows = max(map(len, panels.values()))
    places = axes(
        len(panels), width=max(6.4, 2.4 * len(panels)), height=max(2.6, 0.34 * rows), sharey=True
    )
    for ax, (name, arms) in zip(places, panels.items(), strict=True):
        top = max(high for _, _, high in arms.values())
        for y, (value, low, high) in enumerate(arms.values()):
            ax.plot([low, high], [y, y], color=BLUE, lw=2.5, alpha=0.4, solid_capstyle="butt")
            ax.plot(value, y, "o", color=BLUE, ms=5, clip_on=False)
            ax.annotate(
                f"{value:.3g}",
                (high, y),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set(xlabel=name, xlim=(-0.03 * top, 1.38 * top))
        ax.set_yticks(range(len(arms)), arms)
        ax.grid(axis="x", color="#EEEEEE")
        ax.set_axisbelow(True)
    places[0].invert_yaxis()
    return places


def hits_over_threshold(
    thresholds: Sequence[float], shares: Mapping[str, Sequence[float]], chosen: float | None = None
) -> Axes:
    """Share of questions that are given an item, by threshold, one line a kind of question."""
    ax, ends = axes(width=6.8)[0], []
    for (label, values), (color, _, dash) in zip(shares.items(), LINES, strict=False):
        ax.plot(thresholds, values, color=color, ls=dash, lw=2)
        ends.append((label, thresholds[-1], values[-1], color))
    if chosen is not None:
        ax.axvline(chosen, color=GRAY, lw=1, zorder=0)
        note = {"textcoords": "offset points", "fontsize": 9, "color": GRAY, "va": "top"}
        ax.annotate("chosen", (chosen, 1.02), (4, 0), **note)
    ax.set(xlabel="threshold, cosine similarity", ylabel="share given an item", ylim=(-0.02, 1.02))
    ax.set_xlim(thresholds[0], thresholds[-1])
    _label_ends(ax, ends)
    return ax


def token_differences(
    difference: Sequence[float], starts: Sequence[int], chosen: Iterable[int]
) -> Axes:
    """How far each token's stored keys and values are from the true ones; pieces begin at `starts`."""
    ax, difference = axes(width=7.2, height=2.7)[0], np.asarray(difference, dtype=float)
    dark = np.isin(np.arange(len(difference)), list(chosen))
    ax.bar(np.arange(len(difference)), difference, 1.0, color=np.where(dark, RED, SKY))
    top = difference.max()
    for number, start in enumerate(starts):
        ax.axvline(start - 0.5, color=GRAY, lw=0.8, ls=":")
        place = {"textcoords": "offset points", "fontsize": 9, "color": GRAY}
        ax.annotate(f"piece {number + 1}", (start, 1.06 * top), (3, 0), **place)
    ax.set(
        xlabel="token",
        ylabel="difference",
        xlim=(-0.5, len(difference) - 0.5),
        ylim=(0, 1.16 * top),
    )
    ax.set_title("computed again", loc="right", fontsize=9, color=RED)
    return ax


def reading_or_loading(tokens: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Axes:
    """Milliseconds by number of tokens on two logarithmic scales, one line a way to come by their cache."""
    ax = axes(width=6.8)[0]
    ax.set(xscale="log", yscale="log", xlabel="tokens of knowledge", ylabel="milliseconds")
    for (label, values), (color, marker, dash) in zip(seconds.items(), LINES, strict=False):
        values = 1000 * np.asarray(values)
        ax.plot(tokens, values, color=color, marker=marker, ls=dash, ms=4.5)
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": color}
        ax.annotate(label, (tokens[-1], values[-1]), (8, 0), **place)
    ax.set_xticks(tokens, tokens)
    low, high = ax.get_ylim()
    steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_yticks(steps, [f"{step:g}" for step in steps])
    ax.minorticks_off()
    return ax


def cut_layers(have: int, cuts: Mapping[str, Sequence[int]]) -> Axes:
    """The layers of a target in a row, and below, a row for each cut, the ones it takes."""
    ax = axes(width=7.2, height=0.9 + 0.42 * len(cuts))[0]
    for y, chosen in enumerate([range(have), *cuts.values()]):
        for layer in range(have):
            color = FAINT if y == 0 else BLUE if layer in chosen else "white"
            ax.add_patch(
                plt.Rectangle(
                    (layer - 0.4, y - 0.3), 0.8, 0.6, facecolor=color, edgecolor=FAINT, lw=0.8
                )
            )
            if layer in chosen:
                ax.text(
                    layer,
                    y,
                    layer,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=INK if y == 0 else "white",
                )
    ax.set_yticks(range(len(cuts) + 1), ["target", *cuts])
    ax.set(xlim=(-0.6, have - 0.4), ylim=(len(cuts) + 0.5, -0.5), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(left=False)
    return ax


def loss_gradients(accepted: Sequence[float], gradients: Mapping[str, Sequence[float]]) -> Axes:
    """Size of each loss's gradient against the acceptance of the draft it is computed for, both logarithmic."""
    ax, ends = axes(width=6.8)[0], []
    for (label, values), (color, marker, dash) in zip(gradients.items(), LINES, strict=False):
        ax.plot(accepted, values, color=color, ls=dash, marker=marker, ms=3.5)
        ends.append((label, values[-1], color))
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="acceptance α of the draft",
        ylabel="size of the gradient",
    )
    for place, (label, y, color) in enumerate(sorted(ends, key=lambda end: end[1])):
        where = {
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 9,
            "annotation_clip": False,
        }
        ax.annotate(
            label, (accepted[-1], y), (10, 13 * (place - (len(ends) - 1) / 2)), color=color, **where
        )
    return ax


def with_and_without(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], ways: tuple[str, str]
) -> np.ndarray:
    """One panel a group of questions: acceptance of each with the second way against that with the first."""
    panels = axes(len(pairs), width=3.1 * len(pairs) + 0.4, height=3.4, sharex=True, sharey=True)
    for ax, (label, (without, known)) in zip(panels, pairs.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=FAINT, zorder=0)
        ax.plot(without, known, "o", color=BLUE, ms=5, alpha=0.5, mew=0, clip_on=False)
        ax.set_title(
            f"{label}: {np.mean(without):.2f} → {np.mean(known):.2f}", fontsize=10, loc="left"
        )
        ax.set(xlabel=ways[0], xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panels[0].set_ylabel(ways[1])
    return panels


SEGMENT_COLORS = (SKY, ORANGE, GREEN)  # prompt, reasoning, answer


def cache_shapes(caches: Mapping[str, tuple[int, Sequence[int], str]]) -> np.ndarray:
    """Two caches of one problem, (layers, borders, told): a column a token, a row a layer, colors by segment."""
    width = max(borders[-1] for _, borders, _ in caches.values())
    places = axes(len(caches), width=7.6, height=2.6, sharex=True, sharey=True)
    deepest = max(layers for layers, *_ in caches.values())
    for ax, (name, (layers, borders, told)) in zip(places, caches.items(), strict=True):
        for part, (start, end) in enumerate(pairwise(borders)):
            for layer in range(layers):
                for token in range(start, end):
                    box = plt.Rectangle(
                        (token, layer), 0.85, 0.85, color=SEGMENT_COLORS[part], lw=0
                    )
                    ax.add_patch(box)
            label = ("prompt", "reasoning", "answer")[part]
            ax.text(
                start,
                layers + 0.02 * deepest + 0.09 * deepest * (part == 2),
                label,
                va="bottom",
                fontsize=8,
            )
        ax.set_title(f"{name}: {told}", fontsize=9, loc="left")
        ax.set(xlim=(-1, width + 3), ylim=(-0.3, 1.22 * deepest), xlabel="token")
        shown = range(0, deepest, max(1, deepest // 6))
        ax.set_yticks([layer + 0.4 for layer in shown], shown)
    places[0].set_ylabel("layer")
    return places


def token_links(
    teacher: Sequence[str],
    student: Sequence[str],
    borders: tuple[Sequence[int], Sequence[int]],
    ways: Mapping[str, Iterable[tuple]],
) -> np.ndarray:
    """Which teacher tokens (top) each student token (bottom) is made of, one panel a way.

    Args:
        borders: of the teacher's and the student's prompt, reasoning and answer, which give the
            colors.
        ways: names with entries (student token, teacher token, share).
    """
    places = axes(width=8.2, height=2.5 * len(ways), rows=len(ways), sharex=True)
    across = np.linspace(0, 1, len(teacher)), np.linspace(0, 1, len(student))
    colors = [
        [SEGMENT_COLORS[i] for i, n in enumerate(np.diff(side)) for _ in range(n)]
        for side in borders
    ]
    for ax, (name, entries) in zip(places, ways.items(), strict=True):
        for own, their, share in entries:
            line = {"color": colors[1][own], "lw": 1.6, "alpha": max(0.15, share)}
            ax.plot([across[1][own], across[0][their]], [0, 1], **line)
        for side, (y, texts) in enumerate(((1.06, teacher), (-0.06, student))):
            ax.scatter(
                across[side],
                np.full(len(texts), 1 - side),
                c=colors[side],
                marker="s",
                s=14,
                zorder=3,
            )
            for text, x in zip(texts, across[side], strict=True):
                options = {
                    "rotation": 90,
                    "fontsize": 5.5,
                    "ha": "center",
                    "va": "bottom" if y > 1 else "top",
                }
                ax.text(x, y, text, **options)
        ax.set(ylim=(-0.5, 1.5), xlim=(-0.01, 1.01), xticks=[], yticks=[0, 1])
        ax.set_yticklabels(["student", "teacher"])
        ax.set_title(name, fontsize=9, loc="left")
        ax.spines[:].set_visible(False)
        ax.tick_params(left=False)
    return places


def similarity_maps(maps: Mapping[str, Tensor], ylabel: str, xlabel: str) -> np.ndarray:
    """CKA of each pair of layers, (K, L) each, side by side on one scale."""
    places = axes(len(maps), width=7.8, height=0.9 + 0.24 * max(len(m) for m in maps.values()))
    for ax, (name, matrix) in zip(places, maps.items(), strict=True):
        ax.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
        if matrix.shape[1] <= 12:  # else numbers would not fit
            for (y, x), value in np.ndenumerate(matrix.numpy()):
                ax.text(
                    x, y, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7
                )
        ax.set_xticks(range(0, matrix.shape[1], 1 + matrix.shape[1] // 13))
        ax.set_yticks(range(0, matrix.shape[0], 1 + matrix.shape[0] // 13))
        ax.set_title(name, fontsize=9, loc="left")
        ax.set_xlabel(xlabel)
    places[0].set_ylabel(ylabel)
    return places


def lines(
    x: Sequence[float],
    curves: Mapping[str, Sequence],
    xlabel: str,
    ylabel: str,
    bands: bool = False,
    height: float = 3,
) -> Axes:
    """Labeled lines over one x; with bands, each point is (value, low, high)."""
    ax, ends = axes(width=7.0, height=height)[0], []
    styles = [
        (BLUE, "o"),
        (GRAY, "x"),
        (GREEN, "D"),
        (ORANGE, "v"),
        (SKY, "P"),
        (RED, "s"),
        (PURPLE, "^"),
        (INK, "*"),
    ]
    for (name, points), (color, marker) in zip(curves.items(), styles, strict=False):
        points = points if bands else [(value,) for value in points]
        ends.append((name, *_banded(ax, x, points, color=color, marker=marker, ms=4), color))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _label_ends(ax, ends)
    return ax


TOKEN_STYLE = """<style>
.kv-tokens { line-height: 1.8; }
.kv-tokens div { padding-left: 1.5em; text-indent: -1.5em; }
.kv-tokens :is(u, s, b) { display: inline-block; text-indent: 0; margin: 0 1px; padding: 0 2px; line-height: 1.35;
  border-radius: 3px; font-weight: inherit; }
.kv-tokens u { background: rgba(0, 158, 115, 0.2); text-decoration: underline 1.5px; text-underline-offset: 3px; }
.kv-tokens s { background: rgba(213, 94, 0, 0.2); text-decoration: line-through 1px; font-size: 0.85em; }
.kv-tokens b { background: rgba(0, 114, 178, 0.2); outline: 1.5px solid; outline-offset: -1px; }
.kv-tokens i { opacity: 0.4; font-style: normal; }
.kv-tokens .key { font-size: 0.9em; margin-bottom: 0.4em; }
</style>"""


def retention_curves(
    curves: Mapping[str, Mapping[float, tuple[float, float, float]]],
    full: float,
    dashed: Iterable[str] = (),
) -> Axes:
    """One curve a method over the percent of a cache that is kept, (value, low, high) each, below the whole cache's."""
    ax, dashed, ends = axes(height=4.2)[0], set(dashed), []
    styles = [
        (BLUE, "o"),
        (RED, "s"),
        (GREEN, "D"),
        (PURPLE, "^"),
        (ORANGE, "v"),
        (SKY, "P"),
        (GRAY, "x"),
        (INK, "*"),
    ]
    for (name, points), (color, marker) in zip(curves.items(), styles, strict=False):
        percents = sorted(points)
        style = {"ls": "--" if name in dashed else "-", "color": color, "marker": marker, "ms": 5}
        ends.append((name, *_banded(ax, percents, [points[p] for p in percents], **style), color))
    ax.axhline(full, color=INK, lw=1, ls=":")
    ax.annotate(
        "the whole cache", (min(percents), full), (0, 4), textcoords="offset points", fontsize=9
    )
    ax.set_xscale("log")
    ax.set_xticks(percents, [f"{p:g}" for p in percents])
    ax.minorticks_off()
    ax.set(xlabel="entries kept (%)", ylabel="answers word for word", ylim=(-0.02, 1.06))
    ax.set_xlim(min(percents) * 0.9, max(percents) * 1.1)
    _label_ends(ax, ends)
    return ax


def _banded(
    ax: Axes, x: Sequence[float], points: Sequence[tuple[float, ...]], **style
) -> tuple[float, float]:
    """A line through values, and a band from low to high if points have both; where it ends."""
    value, *band = np.array(points).T
    ax.plot(x, value, **style)
    if band:
        ax.fill_between(x, *band, color=style["color"], alpha=0.15, lw=0)
    return x[-1], value[-1]


def gates(logits: Tensor, sizes: Tensor) -> np.ndarray:
    """A fuser by layer, keys and values, both (L, 2): its gates' logits, and its changes over what they change."""
    panels = axes(2, width=7.4, height=2.8)
    for ax, values, name in zip(
        panels, (logits, sizes), ("logit of the gate", "change / what was there"), strict=True
    ):
        for i, (what, color, hatch) in enumerate((("keys", BLUE, ""), ("values", ORANGE, "///"))):
            style = {"color": color, "hatch": hatch, "edgecolor": "white", "lw": 0}
            ax.bar(np.arange(len(values)) + 0.4 * i - 0.2, values[:, i], 0.38, **style)
            top = max(0.0, float(values[0, i]))
            ax.annotate(
                what,
                (0.4 * i - 0.2, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        ax.axhline(0, color=INK, lw=0.8)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set(xlabel="layer of the receiver", ymargin=0.15)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return panels


def needle_maps(
    maps: Mapping[str, np.ndarray], lengths: Sequence[int], depths: Sequence[int]
) -> np.ndarray:
    """One map an arm: the share answered, (lengths, depths), by length of the passage and depth of the fact."""
    places = axes(len(maps), width=2.6 * len(maps), height=2.3, sharey=True)
    for ax, (name, shares) in zip(places, maps.items(), strict=True):
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.8, aspect="auto")
        for (y, x), share in np.ndenumerate(shares):
            ax.text(
                x,
                y,
                f"{share:.2f}".lstrip("0") if share < 1 else "1",
                ha="center",
                va="center",
                fontsize=9,
            )
        ax.set_xticks(range(len(depths)), depths)
        ax.set_yticks(range(len(lengths)), lengths)
        ax.set(title=name, xlabel="depth (%)")
    places[0].set_ylabel("facts")
    return places


SCORE_STYLE = """<style>
.kv-scores { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.9em; }
.kv-scores { line-height: 1.9; overflow-wrap: break-word; }
.kv-scores p { margin: 0 0 0.7em; }
.kv-scores u { text-decoration: underline 2px; text-underline-offset: 3px; padding: 1px 0; }
.kv-scores s { text-decoration: none; opacity: 0.62; padding: 1px 0; }
.kv-scores i { opacity: 0.4; font-style: normal; }
.kv-scores b { font-family: sans-serif; font-size: 0.9em; }
</style>"""


def score_view(
    ids: Sequence[int],
    scores: Mapping[str, tuple[Sequence[float], Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> HTML:
    """Show a text once a method: the darker a token the higher its score, and those that are kept underlined.

    Args:
        scores: for each method a score a token, of which only the order is shown, and the positions
            kept.

    Example:
        >>> from kvlab import lab
        >>> view = score_view([37, 82], {"any": ([0.2, 0.1], [0])}, lab.load_tokenizer("lab-target"))
        >>> view.data.splitlines()[-2].split("<br>")[0]
        '<p><b>any</b> (1 of 2 kept)'
    """
    from IPython.display import HTML

    lines = []
    for name, (values, kept) in scores.items():
        ranks, kept = np.argsort(np.argsort(values)) / max(1, len(ids) - 1), set(kept)
        marked = ""
        for i, (token, rank) in enumerate(zip(ids, ranks, strict=True)):
            tag, text = "u" if i in kept else "s", _token_html(token, tokenizer)
            marked += (
                "<wbr>" if text.startswith("<i>") else ""
            )  # lines break where there is a space
            marked += (
                f'<{tag} style="background: rgba(0, 114, 178, {0.45 * rank:.2f})">{text}</{tag}>'
            )
        lines.append(f"<p><b>{name}</b> ({len(kept)} of {len(ids)} kept)<br>{marked}</p>")
    words = f"One text of {len(ids)} tokens, colored by the scores of {', '.join(scores)}; kept tokens are underlined."
    return HTML(
        "\n".join(
            [
                SCORE_STYLE,
                f'<div class="kv-scores" role="figure" aria-label="{words}">',
                *lines,
                "</div>",
            ]
        )
    )


def token_view(rounds: Sequence[Round], tokenizer: PreTrainedTokenizerBase, row: int = 0) -> HTML:
    """Show one text as it came, a line a round: which tokens were drafted, and what the target made of them.

    Accepted tokens are underlined, rejected ones struck through, the target's own in a box. Rounds
    in which the row gained nothing are left out.

    Example:
        >>> from kvlab import lab, speculate
        >>> rounds = [speculate.Round([[37, 82]], [1], [[37, 18]], 0.1, 0.2, 0.3)]
        >>> print(token_view(rounds, lab.load_tokenizer("lab-target")).data.splitlines()[-2])
        <div><u>A</u><s>n</s><b>.</b></div>
    """
    from IPython.display import HTML

    lines, drafted, totals = [], 0, np.zeros(3, dtype=int)
    for r in (r for r in rounds if r.tokens[row]):
        guesses, n = [token for token in r.drafted[row] if token >= 0], r.accepted[row]
        accepted, own = r.tokens[row][:n], r.tokens[row][n:]
        rejected = (
            guesses[n:] if own else []
        )  # where the text ended among the accepted, nothing follows
        kinds = {"u": accepted, "s": rejected, "b": own}
        marked = [
            f"<{tag}>{_token_html(i, tokenizer)}</{tag}>" for tag, ids in kinds.items() for i in ids
        ]
        lines.append(f"<div>{''.join(marked)}</div>")
        drafted += len(guesses)
        totals += [len(ids) for ids in kinds.values()]
    words = f"One text in {len(lines)} rounds: {drafted} tokens drafted, {totals[0]} of them accepted; {totals[2]} of"
    key = '<div class="key"><u>drafted, accepted</u> <s>drafted, rejected</s> <b>the target\'s own</b></div>'
    start = f'<div class="kv-tokens" role="figure" aria-label="{words} the target\'s own.">'
    return HTML("\n".join([TOKEN_STYLE, start, key, *lines, "</div>"]))


def _token_html(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of one token, or its name where it is part of a character, with white space made visible."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token)
    text = html.escape(text)
    for space, sign in {" ": "·", "\n": "↵", "\t": "⇥"}.items():
        text = text.replace(space, f"<i>{sign}</i>")
    return text
