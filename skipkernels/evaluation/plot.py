"""Quality over skip ratio: one panel per metric, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.results_file import Cell
from skipkernels.methods.method import FULL
from skipkernels.support.pictures import pyplot, save

_COLOURS = (
    "#2f6db5",
    "#f0a030",
    "#8a5fb0",
    "#c0504d",
    "#3a9a5b",
    "#7a6a55",
    "#d070a0",
    "#20a0a8",
    "#707070",
    "#90b030",
)
_MARKERS = "osv^DPX<>*"
_COLUMNS = 3


def plot_quality(cells: Sequence[Cell], panels: Sequence[tuple[str, Metric]], path: str | Path, title: str) -> None:
    """Draws (task, metric) panels with 95 % intervals; the full model is a dashed line with its interval."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot().subplots(
        rows, columns, figsize=(4.2 * columns + 0.4, 3.3 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axes, (task, metric) in zip(grid.flat, panels, strict=False):
        _draw(axes, _measured(cells, task, metric), metric)
        better = "higher" if metric.higher_is_better else "lower"
        name = metric.name if metric.name == task else f"{task}: {metric.name}"
        axes.set_title(f"{name} ({better} is better)", loc="left", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    save(figure, path)


def _measured(cells: Sequence[Cell], task: str, metric: Metric) -> list[Cell]:
    """The cells of a task that have a value for this metric."""
    return [
        cell
        for cell in cells
        if cell["task"] == task and "metrics" in cell and cell["metrics"][metric.name]["value"] is not None
    ]


def _draw(axes: Any, cells: Sequence[Cell], metric: Metric) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    methods = list(dict.fromkeys(cell["method"] for cell in cells if cell["method"] != FULL))
    logarithmic = metric.exponential or metric.unit == "nats"
    for cell in cells:
        full = cell["metrics"][metric.name]
        # where the full model is compared with itself, its value would only stretch the axis
        with_itself = metric.unit == "tokens" or (logarithmic and full["value"] <= 0)
        if cell["method"] == FULL and not with_itself:
            axes.axhline(full["value"], color="#888888", linestyle="--", linewidth=1, label=FULL)
            axes.axhspan(full["low"], full["high"], color="#888888", alpha=0.12, linewidth=0)
    for number, method in enumerate(methods):
        line = sorted((cell for cell in cells if cell["method"] == method), key=lambda cell: cell["ffn_skip_ratio"])
        ratios = [100 * cell["ffn_skip_ratio"] for cell in line]
        values, low, high = (
            np.array([cell["metrics"][metric.name][edge] for cell in line]) for edge in ("value", "low", "high")
        )
        axes.errorbar(
            ratios,
            values,
            np.clip([values - low, high - values], 0, None),
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=method,
            clip_on=False,  # a marker at the edge is whole
        )
    if logarithmic:
        axes.set_yscale("log", subs=(2, 3, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    elif metric.unit == "share":
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlim(0, None)
    axes.set_xlabel("FFN bytes not read (%); a skipped layer reads none of its FFN", fontsize=7)
    axes.tick_params(which="both", labelsize=7)
