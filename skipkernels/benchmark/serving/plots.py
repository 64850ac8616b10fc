"""Pictures of profiles and comparisons, as PNG; matplotlib is the optional extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipkernels.benchmark.serving.comparison import Result
from skipkernels.modality.profile import Profile
from skipkernels.support.pictures import pyplot, save

_BLUE, _ORANGE, _GREY = "#2f6db5", "#f0a030", "#b8bfc8"


def plot_frontier(profile: Profile, path: str | Path) -> None:
    """Accuracy over time of one request, by strategy: the measured mean, with a bar down to the promised accuracy.
    Dominated strategies are grey.

    Raises:
        SkipkernelsError: there is no matplotlib, or the file cannot be written.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8.0, 4.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    frontier = profile.frontier(profile.modalities)
    line = sorted((entry.median_ms(1), entry.promised_accuracy) for entry in frontier)
    axes.step(*zip(*line, strict=True), where="post", color=_BLUE, linewidth=1, alpha=0.6)
    for entry in profile.strategies:
        colour = _BLUE if entry in frontier else _GREY
        below = [[entry.accuracy - entry.promised_accuracy], [0.0]]
        axes.errorbar(entry.median_ms(1), entry.accuracy, yerr=below, color=colour, marker="o", capsize=3)
        axes.annotate(
            entry.strategy.name,
            (entry.median_ms(1), entry.accuracy),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
            rotation=50,  # skip levels of the same modalities lie side by side
            color=colour,
        )
    axes.margins(x=0.1, y=0.18)
    axes.set(
        xlabel="median time of one request (ms; left is better)",
        ylabel="accuracy, down to the promised bound (up is better)",
    )
    axes.set_title(f"{profile.model} · {profile.device} · {profile.source.partition(':')[0]}", loc="left", fontsize=10)
    save(figure, path)


def plot_comparison(results: Sequence[Result], path: str | Path, title: str) -> None:
    """By contender: throughput with few violations; completion time, violations and accuracy under overload. Accuracy
    is drawn beside the promised and the required one.

    Raises:
        SkipkernelsError: there is no matplotlib, or the file cannot be written.
    """
    plt = pyplot()
    height = 1.5 + 0.35 * len(results)
    figure, panels = plt.subplots(1, 4, figsize=(12.0, height), layout="constrained", sharey=True)
    names = [result.contender for result in results]
    overload = f"at {results[0].overload.offered_per_s:.0f}/s"
    achieved = [result.overload.achieved_accuracy or 0.0 for result in results]
    throughput = [result.capacity.throughput_per_s for result in results]
    completion = [result.overload.completion_mean_ms for result in results]
    late = [result.overload.violation_ratio for result in results]
    rows = (
        ("requests/s with few violations\n(higher is better)", throughput, "{:.3g}"),
        (f"mean completion (ms) {overload}\n(lower is better)", completion, "{:,.0f}"),
        (f"violations {overload}\n(lower is better)", late, "{:.1%}"),
        (f"accuracy {overload}\n(right of the required is enough)", achieved, "{:.3f}"),
    )
    for axes, (label, values, form) in zip(panels, rows, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        bars = axes.barh(names, values, color=_BLUE)
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=8, padding=3)
        axes.margins(x=0.25)
        axes.set_title(label, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].invert_yaxis()
    panels[1].set_xscale("log")
    required = results[0].overload.required_accuracy
    promised = [result.overload.promised_accuracy for result in results]
    panels[3].plot(promised, names, color=_ORANGE, marker="|", markersize=12, linestyle="none", label="promised")
    panels[3].axvline(required, color=_ORANGE, linestyle="--", linewidth=1, label="required")
    panels[3].set_xlim(required - 0.03, max(*achieved, *promised) + 0.03)
    panels[3].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
