"""Perplexity of held-out text, decoded with teacher forcing while the method is active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False, exponential=True)


class Perplexity:
    """Scores passages that no method was tuned on; only decoded tokens count."""

    name = "perplexity"
    metrics = (PERPLEXITY,)

    def __init__(self, passages: Sequence[Passage], alike: Sequence[Passage], text: str) -> None:
        self._passages = passages
        self.alike = alike
        self._text = text

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
        readings = method.score(self._passages, on_item=on_item)
        return Outcome(
            items={PERPLEXITY.name: [(-float(r.log_probs.sum()), float(len(r.log_probs))) for r in readings]},
            work=sum((reading.work for reading in readings), Work()),
        )
