"""Free generation compared with the full model's: length of the common prefix, and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.full_text import FullTextTask
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

COMMON_PREFIX = Metric("common prefix", "tokens", higher_is_better=True)
REPETITION = Metric("repeated 4-grams", "share", higher_is_better=False)
_N = 4


class FreeGeneration(FullTextTask):
    """Continues the prompts greedily, as the full model did."""

    name = "generation"
    metrics = (COMMON_PREFIX, REPETITION)

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = method.generate(
            self._text.prompts, max_new_tokens=self._text.new_tokens, eos_token_ids=(), on_item=on_item
        )
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for passage, answer in zip(self._text.passages, answers, strict=True):
            written = passage.token_ids[passage.prompt_tokens :]
            items[COMMON_PREFIX.name].append((float(common_prefix(answer.token_ids, written)), 1.0))
            items[REPETITION.name].append(repeated(answer.token_ids))
        return Outcome(items, sum((answer.work for answer in answers), Work()))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def repeated(token_ids: Sequence[int]) -> Item:
    """The number of 4-grams that occurred earlier in the sequence, and of all 4-grams."""
    grams = [tuple(token_ids[start : start + _N]) for start in range(len(token_ids) - _N + 1)]
    return float(len(grams) - len(set(grams))), float(len(grams))
