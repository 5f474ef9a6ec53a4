"""Every figure of the book: one palette, one function a figure, each returns its Axes.

Figures stand on a white card, so that they read the same on a light and on a dark page.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import Tensor

# Okabe and Ito (2008), distinguishable with any color vision; black and yellow are left out.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, FAINT = "#222222", "#BBBBBB"
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


def axes(columns: int = 1, width: float = 6.4, height: float = 3.2, **options) -> np.ndarray:
    """An array of Axes in the book's style, side by side on one card."""
    plt.draw_if_interactive()  # chooses the backend now: inside the context, a notebook would forget to show figures
    with plt.rc_context(STYLE):
        return plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)[1][0]


def decode_cost(seconds: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> Axes:
    """Milliseconds of each new token against the tokens before it, one line a way of decoding."""
    ax = axes()[0]
    for (label, values), color in zip(seconds.items(), (RED, BLUE, GREEN), strict=False):
        ax.plot(tokens, 1000 * np.asarray(values), "o-", color=color, ms=4)
        ax.annotate(
            label, (tokens[-1], 1000 * values[-1]), (6, 0), textcoords="offset points", color=color, va="center"
        )
    ax.set(xlabel="tokens already read", ylabel="milliseconds for the next token", ylim=(0, None))
    return ax


def cache_picture(matrices: Mapping[str, Tensor], tokens: Sequence[str]) -> np.ndarray:
    """Keys or values of one head, (T, D) each, as heat maps side by side with the tokens beside their rows."""
    places = axes(len(matrices), height=0.7 + 0.17 * len(tokens), sharey=True)
    for ax, (name, matrix) in zip(places, matrices.items(), strict=True):
        matrix = matrix.float().cpu().numpy()
        limit = np.abs(matrix).max()
        image = ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.set(title=name, xlabel="dimension of the head")
        ax.figure.colorbar(image, ax=ax, shrink=0.8)
    places[0].set_yticks(range(len(tokens)), tokens, fontsize=7)
    return places


def cache_sizes(gigabytes: pd.DataFrame) -> Axes:
    """Bars of cache size by model (rows), one color for each of two columns."""
    ax = axes(height=0.6 + 0.5 * len(gigabytes))[0]
    places = np.arange(len(gigabytes))
    for i, (name, color) in enumerate(zip(gigabytes, (FAINT, BLUE), strict=True)):
        bars = ax.barh(places + 0.2 - 0.4 * i, gigabytes[name], 0.38, color=color)
        labels = [f"{value:.2f}" for value in gigabytes[name]]
        ax.bar_label(bars, [f"{labels[0]}  {name}", *labels[1:]], padding=3, fontsize=9)
    ax.set_yticks(places, gigabytes.index)
    ax.set(xlabel="GB of cache for 8192 tokens, float16", xlim=(0, 1.25 * gigabytes.to_numpy().max()))
    ax.invert_yaxis()
    return ax


def turned_scores(differences: Sequence[int], scores: Mapping[str, Sequence[float]]) -> Axes:
    """Attention score of one query and one key against how far both are moved, one line a way of moving."""
    ax = axes(height=2.6)[0]
    for (label, values), color in zip(scores.items(), (BLUE, RED), strict=False):
        ax.plot(differences, values, color=color)
        ax.annotate(label, (differences[-1], values[-1]), (6, 0), textcoords="offset points", color=color, va="center")
    ax.set(xlabel="positions moved", ylabel="query · key")
    return ax


def lab_report(figures: Sequence[Mapping], tasks: Mapping[str, str], models: Sequence[str]) -> Axes:
    """Scores of models by task with 95 % intervals; names are MODEL_TASK, `tasks` gives each task's words."""
    ax = axes(height=0.5 + 0.5 * len(tasks))[0]
    by_name = {f["name"]: f for f in figures}
    for i, (model, color, marker) in enumerate(zip(models, (BLUE, ORANGE, GREEN), "osD", strict=True)):
        rows = [(y + 0.25 * (i - 1), by_name[f"{model}_{task}"]) for y, task in enumerate(tasks)]
        for y, f in rows:
            ax.plot([f["low"], f["high"]], [y, y], color=color, lw=2, alpha=0.5)
        ax.plot([f["value"] for _, f in rows], [y for y, _ in rows], marker, color=color, ms=5, clip_on=False)
        y, f = rows[0]
        ax.annotate(model, (f["high"], y), (8, 0), textcoords="offset points", color=color, va="center", fontsize=9)
    ax.set_yticks(range(len(tasks)), tasks.values())
    ax.set(xlim=(-0.02, 1.02), xlabel="fraction right, with 95 % interval")
    ax.grid(axis="x", color="#EEEEEE")
    ax.set_axisbelow(True)
    ax.invert_yaxis()
    return ax
