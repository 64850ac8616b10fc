"""Free generation beside the full model's: how soon it departs, how far its predictions are off, whether it collapses.

The method and the full model continue the same prompts greedily, past the end of a document if it comes. Then the
method decodes the full model's text by force, so that the two are compared on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

from skipkernels.passages import Passage
from skipkernels.quality.estimate import Item, Metric
from skipkernels.quality.method import Method, OnItem, Reading, ignore
from skipkernels.quality.task import Outcome
from skipkernels.quality.work import Work

KL = Metric("KL from full", "nats", higher_is_better=False)
TOP1 = Metric("top-1 agreement", "share", higher_is_better=True)
COMMON_PREFIX = Metric("common prefix", "tokens", higher_is_better=True)
REPETITION = Metric("repeated 4-grams", "share", higher_is_better=False)
_N = 4


class FreeGeneration:
    """Continues the prompts of ``passages`` by as many tokens as they have; what follows there is not looked at."""

    name = "generation"
    metrics = (KL, TOP1, COMMON_PREFIX, REPETITION)

    def __init__(self, passages: Sequence[Passage], alike: Sequence[Passage], full: Method, text: str) -> None:
        self._prompts = [passage.token_ids[: passage.prompt_tokens] for passage in passages]
        self._new_tokens = passages[0].decoded_tokens
        self._full = full
        self._text = text
        self.alike = alike

    @property
    def total(self) -> int:
        return 2 * len(self._prompts)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "text": self._text,
            "prompts": len(self._prompts),
            "prompt_tokens": len(self._prompts[0]),
            "new_tokens": self._new_tokens,
        }

    @cached_property
    def _expected(self) -> tuple[list[Passage], list[Reading]]:
        """What the full model writes, and its predictions there."""
        answers = self._full.generate(self._prompts, max_new_tokens=self._new_tokens, eos_token_ids=())
        passages = [
            Passage((*prompt, *answer.token_ids), len(prompt))
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        return passages, self._full.score(passages, keep_log_probs=True)

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        passages, expected = self._expected
        answers = method.generate(self._prompts, max_new_tokens=self._new_tokens, eos_token_ids=(), on_item=on_item)
        readings = method.score(passages, reference=expected, on_item=on_item)
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for passage, dense, answer, reading in zip(passages, expected, answers, readings, strict=True):
            assert reading.kl is not None
            positions = float(len(reading.kl))
            items[KL.name].append((float(reading.kl.sum()), positions))
            items[TOP1.name].append((float((reading.argmax == dense.argmax).sum()), positions))
            written = passage.token_ids[passage.prompt_tokens :]
            items[COMMON_PREFIX.name].append((float(common_prefix(answer.token_ids, written)), 1.0))
            items[REPETITION.name].append(repeated(answer.token_ids))
        return Outcome(items, sum((answer.work for answer in answers), Work()))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def repeated(token_ids: Sequence[int]) -> Item:
    """How many of the 4-grams stood in the sequence before, and how many there are."""
    grams = [tuple(token_ids[start : start + _N]) for start in range(len(token_ids) - _N + 1)]
    return float(len(grams) - len(set(grams))), float(len(grams))
