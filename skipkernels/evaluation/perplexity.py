"""Held-out text, decoded with teacher forcing while the method is active: its perplexity, and how far the method is
from the full model on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.evaluation.agreement import KL, TOP1, compared
from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, Reading, ignore
from skipkernels.methods.work import Work

PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False, exponential=True)


class Perplexity:
    """Scores passages that no method was tuned on; only decoded tokens count. Unlike ``Agreement``, which reads what
    the full model wrote, this is text that people wrote, where the full model is less sure of itself."""

    name = "perplexity"
    metrics = (PERPLEXITY, KL, TOP1)

    def __init__(self, passages: Sequence[Passage], alike: Sequence[Passage], text: str, full: Method) -> None:
        self._passages = passages
        self.alike = alike
        self._text = text
        self._full = full

    @cached_property
    def _readings(self) -> list[Reading]:
        """The full model's."""
        return self._full.score(self._passages, keep_log_probs=True)

    @property
    def total(self) -> int:
        return len(self._passages)

    @property
    def settings(self) -> dict[str, Any]:
        first = self._passages[0]
        return {
            "text": self._text,
            "passages": self.total,
            "prompt_tokens": first.prompt_tokens,
            "new_tokens": first.decoded_tokens,
        }

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        readings = method.score(self._passages, reference=self._readings, on_item=on_item)
        own = [(-float(r.log_probs.sum()), float(len(r.log_probs))) for r in readings]
        return Outcome(
            items={PERPLEXITY.name: own} | compared(self._readings, readings),
            work=sum((reading.work for reading in readings), Work()),
        )
