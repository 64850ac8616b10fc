"""Choices: two ways to reach a goal, of which one is right, in PIQA's form (Bisk et al. 2020, arXiv 1911.11641).

A way is as good as it is likely after ``Question: goal\\nAnswer:``. The method is active while question and answer are
read: only the first token is computed in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.evaluation.asking import answered
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.jsonl import digest, read_jsonl
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work
from skipkernels.support.files import read_text

ACCURACY = Metric("accuracy", "share", higher_is_better=True)
BY_LENGTH = Metric("accuracy, per byte", "share", higher_is_better=True)


@dataclass(frozen=True)
class Choice:
    goal: str
    ways: tuple[str, str]
    right: int

    def prompt(self) -> str:
        return f"Question: {self.goal}\nAnswer:"


@dataclass(frozen=True)
class _Way:
    passage: Passage
    answer_tokens: int
    answer_bytes: int


class Choices:
    """Takes the likelier way: by the sum of its log probabilities, and by that sum per byte, as
    lm-evaluation-harness's ``acc`` and ``acc_norm`` do."""

    name = "choices"
    metrics = (ACCURACY, BY_LENGTH)

    def __init__(self, engine: Engine, choices: Sequence[Choice], others: Sequence[Choice]) -> None:
        """``choices`` are asked; ``others``, with the right way, are used to set the ratio.

        Raises:
            RequestError: the model has no tokenizer.
        """
        self._asked = choices
        self._ways = [tuple(_way(engine, choice, way) for way in choice.ways) for choice in choices]
        self.alike = [_way(engine, choice, choice.ways[choice.right]).passage for choice in others]

    @property
    def total(self) -> int:
        return 2 * len(self._asked)

    @property
    def settings(self) -> dict[str, Any]:
        return {"questions": len(self._asked), "digest": digest(str(self._asked))}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        flat = [way for ways in self._ways for way in ways]
        by_length = sorted(range(len(flat)), key=lambda index: flat[index].passage.decoded_tokens)
        read = method.score([flat[index].passage for index in by_length], on_item=on_item)
        readings = dict(zip(by_length, read, strict=True))
        sums = [float(readings[index].log_probs[-way.answer_tokens :].sum()) for index, way in enumerate(flat)]
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for number, choice in enumerate(self._asked):
            pair = [sums[2 * number], sums[2 * number + 1]]
            per_byte = [value / way.answer_bytes for value, way in zip(pair, self._ways[number], strict=True)]
            for metric, scores in ((ACCURACY, pair), (BY_LENGTH, per_byte)):
                taken = int(scores[1] > scores[0])
                items[metric.name].append((float(taken == choice.right), 1.0))
        return Outcome(items, sum((reading.work for reading in read), Work()))


def read_choices(path: Path) -> list[Choice]:
    """PIQA's files: objects with ``goal``, ``sol1`` and ``sol2``; beside them ``NAME-labels.lst`` with 0 or 1 a line.

    Raises:
        RequestError: see ``read_jsonl``; or the labels are missing, of another number, or not 0 and 1.
    """
    rows = read_jsonl(path, {"goal": str, "sol1": str, "sol2": str})
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    labels = read_text(labels_path).split()
    if len(labels) != len(rows):
        raise RequestError(f"{labels_path}: has {len(labels)} labels, {path.name} has {len(rows)} questions")
    for number, label in enumerate(labels, start=1):
        if label not in ("0", "1"):
            raise RequestError(f"{labels_path}, line {number}: a label is 0 or 1, got {label!r}")
    return [
        Choice(row["goal"], (row["sol1"], row["sol2"]), int(label)) for row, label in zip(rows, labels, strict=True)
    ]


def _way(engine: Engine, choice: Choice, way: str) -> _Way:
    whole = answered(engine, choice.prompt(), f" {way.strip()}", Choices.name)
    return _Way(Passage(whole.token_ids, 1), whole.decoded_tokens, len(way.strip().encode()))
