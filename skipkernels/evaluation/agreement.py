"""Agreement with the full model: token by token on the full model's text, with teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.full_text import FullTextTask
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, Reading, ignore
from skipkernels.methods.work import Work

KL = Metric("KL from full", "nats", higher_is_better=False)
TOP1 = Metric("top-1 agreement", "share", higher_is_better=True)


class Agreement(FullTextTask):
    """Compares a method's predictions with the full model's."""

    name = "agreement"
    metrics = (KL, TOP1)

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        expected = self._text.readings
        readings = method.score(self._text.passages, reference=expected, on_item=on_item)
        return Outcome(compared(expected, readings), sum((reading.work for reading in readings), Work()))


def compared(expected: Sequence[Reading], readings: Sequence[Reading]) -> dict[str, list[Item]]:
    """``KL`` and ``TOP1`` of ``readings``, passage by passage, against the full model's of the same passages."""
    items: dict[str, list[Item]] = {KL.name: [], TOP1.name: []}
    for full, reading in zip(expected, readings, strict=True):
        assert reading.kl is not None  # there was a reference
        positions = float(len(reading.kl))
        items[KL.name].append((float(reading.kl.sum()), positions))
        items[TOP1.name].append((float((reading.argmax == full.argmax).sum()), positions))
    return items
