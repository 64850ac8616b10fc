"""Pictures, as PNG. matplotlib is the optional extra ``plot`` and imported at the first picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels.calibration import SimilarityCurve
from skipkernels.errors import SkipkernelsError
from skipkernels.policy import SkipPolicy
from skipkernels.trace import MEANINGS, Cell, TraceMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db5", "#f0a030", "#3a9a5b", "#eceff3"
_COLOURS = {Cell.RUN: _BLUE, Cell.SKIPPED: _GREY, Cell.TRIGGERED: _ORANGE}
_LINES = (_BLUE, _ORANGE, "#8a5fb0", "#c0504d")
_DPI = 150
_LABELLED_TOKENS = 150


def plot_similarity(curve: SimilarityCurve, policy: SkipPolicy, path: str | Path) -> None:
    """Similarity of every layer, with the threshold and the cold layers of ``policy``.

    Drawn as the distance from 1 on a logarithmic scale, upside down: near 1 is where the differences are.
    """
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8.0, 4.2), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    layers = np.arange(len(curve.mean))
    mean, p10, p90 = (np.maximum(1.0 - np.array(row), 1e-7) for row in (curve.mean, curve.p10, curve.p90))
    axes.fill_between(layers, p10, p90, color=_BLUE, alpha=0.18, linewidth=0, label="10th to 90th percentile")
    axes.plot(layers, mean, color=_BLUE, marker="o", markersize=4, label="mean")
    if policy.layer_thresholds is None:
        axes.axhline(1.0 - policy.threshold, color=_ORANGE, linestyle="--", label=f"threshold {policy.threshold:.4f}")
    else:
        tested = list(policy.plan(len(layers)).tested_layers)
        distances = np.maximum(1.0 - np.array(policy.layer_thresholds)[tested], 1e-7)
        axes.plot(tested, distances, color=_ORANGE, marker="_", linestyle="none", markersize=12, label="thresholds")
    first, last = policy.cold_start, len(layers) - policy.cold_end - 1
    for begin, end in ((-0.5, first + 0.5), (last + 0.5, len(layers) - 0.5)):
        axes.axvspan(begin, end, color=_GREY, zorder=0, label="always run" if begin < 0 else None)
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter(lambda distance, _: f"{1.0 - distance:.6f}".rstrip("0").rstrip("."))
    axes.set(xlim=(-0.5, len(layers) - 0.5), xlabel="layer", ylabel="cosine similarity across the FFN")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(facecolor="white", framealpha=1.0, edgecolor="none", loc="lower right")
    save(figure, path)


def plot_trace(trace: TraceMap, path: str | Path, title: str) -> None:
    """The trace map, tokens from left to right and layers from bottom to top, with both totals."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    tokens, layers = trace.cells.shape
    figure, axes = plt.subplots(figsize=(min(40.0, 3.0 + 0.17 * tokens), 2.6 + 0.13 * layers), layout="constrained")
    colours = ListedColormap([_COLOURS[cell] for cell in Cell])
    axes.pcolormesh(trace.cells.T, cmap=colours, vmin=-0.5, vmax=len(Cell) - 0.5, edgecolors="white", linewidth=0.4)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("layer")
    step = 4 if layers > 16 else 2
    axes.set_yticks(np.arange(0, layers, step) + 0.5, np.arange(0, layers, step))
    if tokens <= _LABELLED_TOKENS:
        axes.set_xticks(np.arange(tokens) + 0.5, [_plain(text) for text in trace.tokens], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("generated token")
    axes.tick_params(length=0)
    share = axes.inset_axes((1.01, 0.0, 0.7 / figure.get_figwidth(), 1.0), sharey=axes)
    share.barh(np.arange(layers) + 0.5, trace.skipped.mean(axis=0), height=0.8, color=_GREEN)
    share.set(xlim=(0, 1), xticks=(0, 1), xticklabels=("0", "100 %"))
    share.set_title("share", fontsize=8)
    share.tick_params(length=0, labelleft=False, labelsize=7)
    for extra in (axes, share):
        extra.spines[:].set_visible(False)
    handles = [Patch(facecolor=_COLOURS[cell], edgecolor="#c0c5cc", label=MEANINGS[cell]) for cell in Cell]
    axes.legend(
        handles=handles, frameon=False, ncols=3, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0
    )
    save(figure, path)


def plot_decode(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """Time per token of a decode bench over its skip ratio, one line per batch size, over what the bytes alone take."""
    figure, axes = pyplot().subplots(figsize=(7.5, 4.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    ours = [row for row in rows if row["system"] == "skipkernels"]
    # the first row of a batch size and ratio: a second one at ratio 0 measures the test alone
    ours = list({(row["batch_size"], row["ffn_skip_ratio"]): row for row in reversed(ours)}.values())
    for colour, batch_size in zip(_LINES * 2, sorted({row["batch_size"] for row in ours}), strict=False):
        line = sorted((row for row in ours if row["batch_size"] == batch_size), key=lambda row: row["ffn_skip_ratio"])
        ratios = [100 * row["ffn_skip_ratio"] for row in line]
        times = np.array([row["ms_per_token"] for row in line])
        low, high = (np.array([row[f"ms_per_token_{edge}"] for row in line]) for edge in ("p20", "p80"))
        spread = np.clip([times - low, high - times], 0, None)
        label = f"skipkernels, batch {batch_size}"
        axes.errorbar(ratios, times, spread, color=colour, marker="o", capsize=3, label=label)
        floor = [row["bytes_per_token"] / row["probe_gb_per_s"] / 1e6 for row in line]
        axes.plot(ratios, floor, color=colour, linestyle=":", label="its bytes at the probed bandwidth")
    for row in rows:
        if row["system"] != "skipkernels":
            label = f"{row['system']}, batch {row['batch_size']}"
            axes.axhline(row["ms_per_token"], color=_GREEN, linestyle="--", label=label)
    axes.set(xlabel="FFN executions skipped (%)", ylabel="ms per token", ylim=(0, None))
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_kernels(rows: Sequence[dict[str, Any]], path: str | Path, title: str) -> None:
    """A roofline of decoding, where everything is bound by memory: bytes an instruction moves, and how fast it does,
    beside the bandwidth that was probed."""
    figure, axes = pyplot().subplots(figsize=(7.5, 4.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    cases = list(dict.fromkeys((row["shapes"], row["batch_size"], row["kv_len"]) for row in rows))
    markers = {case: "os^Dv<>pP*"[number % 10] for number, case in enumerate(cases)}
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colours = pyplot().get_cmap("tab10")
    for row in rows:
        marker = markers[row["shapes"], row["batch_size"], row["kv_len"]]
        axes.plot(row["bytes"] / 1e6, row["gb_per_s"], marker, color=colours(ops.index(row["op"]) % 10))
    probe = float(np.median([row["gb_per_s"] / row["bandwidth_fraction"] for row in rows]))
    axes.axhline(probe, color=_GREEN, linestyle="--")
    for op in ops:
        axes.plot([], [], "s", color=colours(ops.index(op) % 10), label=op)
    for (shapes, batch, length), marker in markers.items():
        axes.plot([], [], marker, color="#888888", label=f"{shapes}, batch {batch}, {length} positions")
    axes.plot([], [], "--", color=_GREEN, label=f"probed bandwidth, {probe:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="MB moved by one instruction", ylabel="GB/s")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    save(figure, path)


def pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        SkipkernelsError: there is no matplotlib. Call this before the work that a picture is made of.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SkipkernelsError(
            "a picture needs matplotlib, which is not installed; `pip install skipkernels[plot]` brings it"
        ) from error
    return pyplot


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG and forgets the figure.

    Raises:
        SkipkernelsError: the file cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a token in a script the font lacks becomes a box
            figure.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise SkipkernelsError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        pyplot().close(figure)


def _plain(text: str) -> str:
    """Safe for matplotlib, which reads $...$ as formulas."""
    return text.replace("$", r"\$")
