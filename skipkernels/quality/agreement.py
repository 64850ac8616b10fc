"""Agreement with the full model, token for token on its own text, decoded by force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipkernels.passages import Passage
from skipkernels.quality.estimate import Item, Metric
from skipkernels.quality.full_text import FullText
from skipkernels.quality.method import Method, OnItem, ignore
from skipkernels.quality.task import Outcome
from skipkernels.quality.work import Work

KL = Metric("KL from full", "nats", higher_is_better=False)
TOP1 = Metric("top-1 agreement", "share", higher_is_better=True)


class Agreement:
    """How far a method's predictions are from the full model's. ``alike`` is other text of the full model."""

    name = "agreement"
    metrics = (KL, TOP1)

    def __init__(self, text: FullText, alike: FullText) -> None:
        self._text = text
        self._alike = alike

    @property
    def alike(self) -> Sequence[Passage]:
        return self._alike.passages

    @property
    def total(self) -> int:
        return len(self._text.prompts)

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompts": self.total, "new_tokens": self._text.new_tokens}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        expected = self._text.readings
        readings = method.score(self._text.passages, reference=expected, on_item=on_item)
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for full, reading in zip(expected, readings, strict=True):
            assert reading.kl is not None  # there was a reference
            positions = float(len(reading.kl))
            items[KL.name].append((float(reading.kl.sum()), positions))
            items[TOP1.name].append((float((reading.argmax == full.argmax).sum()), positions))
        return Outcome(items, sum((reading.work for reading in readings), Work()))
