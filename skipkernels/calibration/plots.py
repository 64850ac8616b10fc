"""Pictures of a calibration and of a trace, as PNG."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from skipkernels.calibration.calibration import Calibration
from skipkernels.calibration.trace import MEANINGS, Cell, TraceMap
from skipkernels.support.pictures import BLUE, GREEN, GREY, ORANGE, pyplot, save

_COLOURS = {Cell.RUN: BLUE, Cell.SKIPPED: GREY, Cell.TRIGGERED: ORANGE}
_LABELLED_TOKENS = 150
_LETTERS_PER_INCH = 11  # of a title


def plot_calibration(calibration: Calibration, path: str | Path) -> None:
    """What each kind costs at what saving on held-out text, and the similarity of every layer.

    Similarity is drawn as the distance from 1 on an inverted logarithmic scale, because the differences are near 1.
    """
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, (cost, axes) = plt.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained")
    for each in (cost, axes):
        each.spines[["top", "right"]].set_visible(False)
    names = [trial.kind for trial in calibration.verified]
    cost.barh(names, [max(trial.comparison.kl, 1e-5) for trial in calibration.verified], color=[GREEN] + [BLUE] * 9)
    for number, trial in enumerate(calibration.verified):
        saved = f" {trial.comparison.kl:.3f} at {trial.comparison.skip_ratio:.1%}"
        cost.text(max(trial.comparison.kl, 1e-5), number, saved, va="center", fontsize=8)
    cost.set(xscale="log", xlabel="KL from dense, nats, at the share of FFN bytes not read (shorter is better)")
    cost.margins(x=0.25)
    cost.invert_yaxis()
    curve = calibration.curve
    layers = np.arange(len(curve.mean))
    mean, p10, p90 = (np.maximum(1.0 - np.array(row), 1e-7) for row in (curve.mean, curve.p10, curve.p90))
    axes.fill_between(layers, p10, p90, color=BLUE, alpha=0.18, linewidth=0, label="10th to 90th percentile")
    axes.plot(layers, mean, color=BLUE, marker="o", markersize=4, label="mean")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter(lambda distance, _: f"{1.0 - distance:.6f}".rstrip("0").rstrip("."))
    axes.set(
        xlim=(-0.5, len(layers) - 0.5),
        xlabel="layer",
        ylabel="cosine similarity across the FFN\n(higher: the FFN changes less)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(facecolor="white", framealpha=1.0, edgecolor="none", loc="lower right")
    save(figure, path)


def plot_trace(trace: TraceMap, path: str | Path, title: str) -> None:
    """The trace map, tokens from left to right and layers from bottom to top, with both totals."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    tokens, layers = trace.cells.shape
    figure, axes = plt.subplots(
        figsize=(min(40.0, max(5.5, 3.0 + 0.17 * tokens)), 2.6 + 0.13 * layers), layout="constrained"
    )
    colours = ListedColormap([_COLOURS[cell] for cell in Cell])
    axes.pcolormesh(trace.cells.T, cmap=colours, vmin=-0.5, vmax=len(Cell) - 0.5, edgecolors="white", linewidth=0.4)
    left_out = trace.left_out.T
    if left_out.any():
        shades = axes.pcolormesh(
            np.ma.masked_equal(left_out, 0), cmap="YlGnBu_r", vmin=0, vmax=2 / 3, edgecolors="white", linewidth=0.4
        )
        bar = figure.colorbar(shades, ax=axes, location="bottom", fraction=0.03, aspect=60, pad=0.01)
        bar.set_label("share of the FFN's bytes not read, neurons left out", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    width = max(40, int(_LETTERS_PER_INCH * figure.get_figwidth()))
    axes.set_title(textwrap.fill(title, width), loc="left", fontsize=10, pad=20)  # above the legend
    axes.set_ylabel("layer")
    step = 4 if layers > 16 else 2
    axes.set_yticks(np.arange(0, layers, step) + 0.5, np.arange(0, layers, step))
    if tokens <= _LABELLED_TOKENS:
        axes.set_xticks(np.arange(tokens) + 0.5, [_plain(text) for text in trace.tokens], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("generated token")
    axes.tick_params(length=0)
    share = axes.inset_axes((1.01, 0.0, 0.7 / figure.get_figwidth(), 1.0), sharey=axes)
    share.barh(np.arange(layers) + 0.5, trace.unread.mean(axis=0), height=0.8, color=GREEN)
    share.set(xlim=(0, 1), xticks=(0, 1), xticklabels=("0", "100 %"))
    share.set_title("not read", fontsize=8)
    share.tick_params(length=0, labelleft=False, labelsize=7)
    for extra in (axes, share):
        extra.spines[:].set_visible(False)
    handles = [Patch(facecolor=_COLOURS[cell], edgecolor="#c0c5cc", label=MEANINGS[cell]) for cell in Cell]
    axes.legend(
        handles=handles, frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0
    )
    save(figure, path)


def _plain(text: str) -> str:
    """Safe for matplotlib, which reads $...$ as formulas."""
    return text.replace("$", r"\$")
