"""Pictures of the decode bench and of the kernel bench, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skipkernels.support.pictures import BLUE, GREEN, ORANGE, pyplot, save

_LINES = (BLUE, ORANGE, "#8a5fb0", "#c0504d")


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
            axes.axhline(row["ms_per_token"], color=GREEN, linestyle="--", label=label)
    axes.set(xlabel="FFN bytes not read (%)", ylabel="ms per token (lower is better)", ylim=(0, None))
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
    axes.axhline(probe, color=GREEN, linestyle="--")
    for op in ops:
        axes.plot([], [], "s", color=colours(ops.index(op) % 10), label=op)
    for (shapes, batch, length), marker in markers.items():
        axes.plot([], [], marker, color="#888888", label=f"{shapes}, batch {batch}, {length} positions")
    axes.plot([], [], "--", color=GREEN, label=f"probed bandwidth, {probe:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="MB moved by one instruction", ylabel="GB/s (higher is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    save(figure, path)
