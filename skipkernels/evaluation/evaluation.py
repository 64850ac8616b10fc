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


@dataclass(frozen=True)
class Entry:
    """One line of the plan: a method, and the ratios to measure it at."""

    kind: MethodKind
    ratios: Sequence[float]


def evaluate(
    setup: Setup, entries: Sequence[Entry], tasks: Sequence[Task], results: ResultsFile, progress: Progress = ignore
) -> list[Unfinished]:
    """Computes the missing cells, task by task, and writes each as soon as it is done.

    Returns:
        Errors of the cells that could not be finished.
    """
    setup.memory = results.document["memory"]
    pairs = [(entry.kind, ratio) for entry in entries for ratio in entry.ratios]
    unfinished: list[Unfinished] = []
    for number, task in enumerate(tasks):
        missing = [(kind, ratio) for kind, ratio in pairs if results.cell(kind.name, ratio, task.name) is None]

        def part(index: int, part: int, number: int = number, task: Task = task, count: int = len(missing)) -> Progress:
            """Of the progress: of the task's methods, its searches or its runs, one."""
            return lambda what, share: progress(
                f"{task.name}, {what}", (number + (part + (index + share) / count) / 2) / len(tasks)
            )

        # first all searches: they take much of the cache, and behind them the prompts of the task, which most methods
        # compute in full, stay in it from the first method that runs to the last
        searches = []
        for index, (kind, ratio) in enumerate(missing):
            searches.append(_search(setup, task, kind, ratio, part(index, 0)))
            results.save()
        for index, (search, (kind, ratio)) in enumerate(zip(searches, missing, strict=True)):
            try:
                results.add(_cell(setup, task, kind, ratio, search, results, part(index, 1)))
            except Unfinished as error:
                unfinished.append(error)
    _compare_with_full(setup, tasks, results)
    results.save()
    return unfinished


@dataclass(frozen=True)
class _Search:
    """What was found for a method and a task, or why nothing was."""

    found: Found | None
    problem: str
    seconds: float


def _search(setup: Setup, task: Task, kind: MethodKind, ratio: float, report: Progress) -> _Search:
    started, name = time.perf_counter(), _label(kind, ratio)
    alike = digest(str([(passage.token_ids, passage.prompt_tokens) for passage in task.alike]))

    def find() -> Found:
        return kind.find(setup, ratio, task.alike, lambda stage, share: report(f"{name}: {stage}", share))

    report(name, 0.0)
    try:
        found = setup.remember(f"{name} like {alike}", find)
    except PolicyError as error:
        return _Search(None, str(error), time.perf_counter() - started)
    return _Search(found, "", time.perf_counter() - started)


def _cell(
    setup: Setup,
    task: Task,
    kind: MethodKind,
    ratio: float,
    search: _Search,
    results: ResultsFile,
    report: Progress,
) -> Cell:
    environment, name, found = results.document["environment"], _label(kind, ratio), search.found
    cell: Cell = {
        "method": kind.name,
        "source": kind.source,
        "ratio": ratio,
        "ratio_of": kind.ratio_of,
        "task": task.name,
        "commit": environment.get("commit"),
        "date": environment.get("date"),
    }
    if found is None:
        return cell | {"unreachable": search.problem}
    started, done = time.perf_counter(), 0

    def on_item(count: int) -> None:
        nonlocal done
        done += count
        report(f"{name}: {done}/{task.total}", done / task.total)

    report(name, 0.0)
    # part of file names, so that files of another model or policy are not resumed
    made_of = digest(f"{setup.engine.fingerprint} {found}")[:6]
    outcome = task.run(kind.build(setup, found), f"{name}-{made_of}", on_item)
    return cell | {
        "found": found,
        "metrics": _estimates(task, outcome.items, setup.seed),
        "groups": _by_group(task, outcome, setup.seed),
        "work": asdict(outcome.work),
        "ffn_skip_ratio": outcome.work.ffn_skip_ratio,
        "layer_bytes_saved": outcome.work.layer_bytes_saved,
        "find_s": search.seconds,
        "run_s": time.perf_counter() - started,
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
