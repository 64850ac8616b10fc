"""The tables of an evaluation, from the cells of its results file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.results_file import Cell

_METRICS_PER_TABLE = 2  # as many as fit in 80 columns
_SHOWN_RATIO = 0.25  # results by group are shown at the ratio nearest to this

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def tables(cells: Sequence[Cell], task: str, metrics: Sequence[Metric]) -> Iterator[Table]:
    """The results of a task; several tables if it has many metrics."""
    chosen = _measured(cells, task)
    for start in range(0, len(metrics), _METRICS_PER_TABLE):
        shown = metrics[start : start + _METRICS_PER_TABLE]
        compared = len(metrics) == 1 and any("relative_to_full" in cell for cell in chosen)
        headings = ["method", "at", "FFN", "bytes", *(metric.name for metric in shown)]
        rows = []
        for cell in chosen:
            row = [*_name(cell), f"{cell['ffn_skip_ratio']:.1%}", f"{cell['layer_bytes_saved']:.1%}"]
            row += [with_interval(metric, cell["metrics"][metric.name]) for metric in shown]
            if compared:
                row.append(with_interval(_OF_FULL, cell["relative_to_full"][shown[0].name]))
            rows.append(row)
        yield [*headings, "of full"] if compared else headings, rows


def group_table(cells: Sequence[Cell], task: str, metric: Metric) -> tuple[str, Table] | None:
    """A metric by group of items, for every method at the ratio nearest to 25 %, with its title; None if the task has
    no groups."""
    chosen: dict[str, Cell] = {}
    for cell in _measured(cells, task):
        before = chosen.get(cell["method"])
        if before is None or abs(cell["ratio"] - _SHOWN_RATIO) < abs(before["ratio"] - _SHOWN_RATIO):
            chosen[cell["method"]] = cell
    groups = next((cell["groups"] for cell in chosen.values() if cell["groups"]), None)
    if groups is None or len(groups) < 2:
        return None
    ratios = sorted({_name(cell)[1] for cell in chosen.values()} - {""})
    title = f"{metric.name}, % by kind" if metric.unit == "share" else f"{metric.name} by kind"
    rows = []
    for group, values in groups.items():
        in_group = (cell["groups"][group][metric.name]["value"] for cell in chosen.values())
        shown = (
            f"{100 * value:.0f}" if metric.unit == "share" and value is not None else shown_value(metric, value)
            for value in in_group
        )
        rows.append([group, str(values["items"]), *shown])
    return " at ".join([title, *ratios[:1]]), (["kind", "items", *chosen], rows)


def unreachable(cells: Sequence[Cell]) -> Iterator[str]:
    """The cells that could not be measured, with reasons."""
    for cell in cells:
        if "unreachable" in cell:
            yield f"{cell['task']}, {' '.join(_name(cell))}: {cell['unreachable']}"


def with_interval(metric: Metric, estimate: dict[str, Any]) -> str:
    """A value and its interval, with the unit once."""
    if estimate["value"] is None:
        return "-"
    low, high = (shown_value(metric, estimate[edge]).rstrip("%") for edge in ("low", "high"))
    return f"{shown_value(metric, estimate['value'])} ({low}..{high})"


def shown_value(metric: Metric, value: float | None) -> str:
    """A value in the unit of its metric; None if the count is 0."""
    if value is None:
        return "-"
    formats = {
        "share": "{:.1%}",
        "nats": "{:.4f}",
        "perplexity": "{:.2f}",
        "tokens": "{:.1f}",
        "points": "{:.2f}",
        "tokens/s": "{:.1f}",
        "ratio": "{:.2f}",
    }
    return formats.get(metric.unit, "{:.4g}").format(value)


_OF_FULL = Metric("of full", "share", higher_is_better=True)


def _measured(cells: Sequence[Cell], task: str) -> list[Cell]:
    return [cell for cell in cells if cell["task"] == task and "metrics" in cell]


def _name(cell: Cell) -> tuple[str, str]:
    return cell["method"], "" if cell["ratio_of"] == "nothing" else f"{100 * cell['ratio']:g}%"
