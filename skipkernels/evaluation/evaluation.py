"""Evaluation: every method at every ratio on every task, one cell after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skipkernels.errors import PolicyError
from skipkernels.evaluation.estimate import Item, estimate, estimate_relative
from skipkernels.evaluation.jsonl import digest
from skipkernels.evaluation.results_file import Cell, ResultsFile
from skipkernels.evaluation.task import Outcome, Task, Unfinished
from skipkernels.methods.method import FULL, Found, MethodKind, Progress, ignore
from skipkernels.methods.setup import Setup

_FIND_SHARE = 0.5  # of a cell's progress


@dataclass(frozen=True)
class Entry:
    """One line of the plan: a method, and the ratios to measure it at."""

    kind: MethodKind
    ratios: Sequence[float]


def evaluate(
    setup: Setup, entries: Sequence[Entry], tasks: Sequence[Task], results: ResultsFile, progress: Progress = ignore
) -> list[Unfinished]:
    """Computes the missing cells, and writes each as soon as it is done.

    Returns:
        Errors of the cells that could not be finished.
    """
    setup.memory = results.document["memory"]
    planned = [(task, entry.kind, ratio) for task in tasks for entry in entries for ratio in entry.ratios]
    unfinished: list[Unfinished] = []
    for number, (task, kind, ratio) in enumerate(planned):
        name = _label(kind, ratio)

        def report(stage: str, share: float, number: int = number, what: str = f"{task.name}, {name}") -> None:
            progress(f"{what}: {stage}", (number + share) / len(planned))

        report("", 0.0)
        if results.cell(kind.name, ratio, task.name) is not None:
            continue
        try:
            results.add(_cell(setup, task, kind, ratio, results, report))
        except Unfinished as error:
            unfinished.append(error)
    _compare_with_full(setup, tasks, results)
    results.save()
    return unfinished


def _cell(setup: Setup, task: Task, kind: MethodKind, ratio: float, results: ResultsFile, report: Progress) -> Cell:
    environment = results.document["environment"]
    cell: Cell = {
        "method": kind.name,
        "source": kind.source,
        "ratio": ratio,
        "ratio_of": kind.ratio_of,
        "task": task.name,
        "commit": environment.get("commit"),
        "date": environment.get("date"),
    }
    started = time.perf_counter()
    alike = digest(str([(passage.token_ids, passage.prompt_tokens) for passage in task.alike]))

    def find() -> Found:
        return kind.find(setup, ratio, task.alike, lambda stage, share: report(stage, _FIND_SHARE * share))

    try:
        found = setup.remember(f"{_label(kind, ratio)} like {alike}", find)
    except PolicyError as error:
        return cell | {"unreachable": str(error)}
    results.save()
    found_s = time.perf_counter() - started
    done = 0

    def on_item(count: int) -> None:
        nonlocal done
        done += count
        report(f"{done}/{task.total}", _FIND_SHARE + (1 - _FIND_SHARE) * done / task.total)

    made_of = digest(f"{setup.engine.fingerprint} {found}")[
        :6
    ]  # part of file names, so that files of another model or policy are not resumed
    outcome = task.run(kind.build(setup, found), f"{_label(kind, ratio)}-{made_of}", on_item)
    return cell | {
        "found": found,
        "metrics": _estimates(task, outcome.items, setup.seed),
        "groups": _by_group(task, outcome, setup.seed),
        "work": asdict(outcome.work),
        "ffn_skip_ratio": outcome.work.ffn_skip_ratio,
        "layer_bytes_saved": outcome.work.layer_bytes_saved,
        "find_s": found_s,
        "run_s": time.perf_counter() - started - found_s,
        "items": {name: _columns(items) for name, items in outcome.items.items()},
    }


def _label(kind: MethodKind, ratio: float) -> str:
    return kind.name if kind.ratio_of == "nothing" else f"{kind.name}@{ratio:g}"


def _estimates(task: Task, items: dict[str, list[Item]], seed: int) -> dict[str, Any]:
    return {metric.name: asdict(estimate(metric, items[metric.name], seed)) for metric in task.metrics}


def _by_group(task: Task, outcome: Outcome, seed: int) -> dict[str, Any] | None:
    if outcome.groups is None:
        return None
    groups: dict[str, Any] = {}
    for group in sorted(set(outcome.groups)):
        chosen = [index for index, name in enumerate(outcome.groups) if name == group]
        items = {name: [values[index] for index in chosen] for name, values in outcome.items.items()}
        groups[group] = {"items": len(chosen)} | _estimates(task, items, seed)
    return groups


def _columns(items: Sequence[Item]) -> dict[str, list[float]]:
    """Sums and counts as two lists, rounded."""
    sums, counts = zip(*items, strict=True)
    return {"sums": [round(value, 6) for value in sums], "counts": [round(value, 6) for value in counts]}


def _compare_with_full(setup: Setup, tasks: Sequence[Task], results: ResultsFile) -> None:
    """Adds to each cell its metrics relative to the full model's on the same items, if these were measured."""
    for task in tasks:
        full = results.cell(FULL, 0.0, task.name)
        for cell in results.cells:
            if full is None or cell["task"] != task.name or "items" not in cell:
                continue
            cell["relative_to_full"] = {
                metric.name: asdict(
                    estimate_relative(metric, _items(cell, metric.name), _items(full, metric.name), setup.seed)
                )
                for metric in task.metrics
            }


def _items(cell: Cell, name: str) -> list[Item]:
    columns = cell["items"][name]
    return list(zip(columns["sums"], columns["counts"], strict=True))
