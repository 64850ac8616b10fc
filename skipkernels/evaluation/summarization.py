"""Summarisation: ROUGE-1, -2 and -L (Lin 2004) of generated summaries against those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.evaluation.asking import tokenizer_of
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.jsonl import digest, read_jsonl
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

_ROUGE = {
    name: Metric(shown, "share", higher_is_better=True)
    for name, shown in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L"))
}
_PROMPT = "{article}\n\nTL;DR:"  # works for models without instruction tuning (GPT-2's report)
_INSTRUCTION = "Summarize: {article}"  # for models with a chat template, as Spec-Bench asks
_STOP = ["\n\n"]


@dataclass(frozen=True)
class Pair:
    article: str
    summary: str


class Summarization:
    """F-measures with Porter's stemmer; a summary ends at an empty line."""

    name = "summarization"
    metrics = tuple(_ROUGE.values())

    def __init__(
        self,
        engine: Engine,
        path: Path,
        alike: Sequence[Passage],
        *,
        limit: int | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        pairs = read_pairs(path)
        self._scorer = rouge_scorer(list(_ROUGE))  # raises now, not after the work, if the package is missing
        chats = bool(tokenizer_of(engine, self.name).chat_template)
        self._pairs = pairs[:limit]
        self._max_new_tokens = max_new_tokens
        self._asked_as = _INSTRUCTION if chats else _PROMPT
        asked = [self._asked_as.format(article=pair.article) for pair in self._pairs]
        self._prompts = [engine.encode([{"role": "user", "content": text}] if chats else text) for text in asked]
        room = engine.max_seq_len - max_new_tokens + 1
        for number, prompt in enumerate(self._prompts, start=1):
            if len(prompt) > room:
                raise RequestError(
                    f"{path}: article {number} has {len(prompt)} tokens with its prompt, and {max_new_tokens} new ones "
                    f"leave room for {room} in max_seq_len={engine.max_seq_len}; shorten it"
                )
        self.alike = alike

    @property
    def total(self) -> int:
        return len(self._pairs)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "pairs": self.total,
            "digest": digest("".join(pair.article + pair.summary for pair in self._pairs)),
            "max_new_tokens": self._max_new_tokens,
            "prompt": self._asked_as,
        }

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = method.generate(self._prompts, max_new_tokens=self._max_new_tokens, stop=_STOP, on_item=on_item)
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for answer, pair in zip(answers, self._pairs, strict=True):
            scores = self._scorer.score(pair.summary, answer.text)
            for name, metric in _ROUGE.items():
                items[metric.name].append((float(scores[name].fmeasure), 1.0))
        return Outcome(items, sum((answer.work for answer in answers), Work()))


def read_pairs(path: Path) -> Sequence[Pair]:
    """The pairs of a file: one object per line with ``article`` and ``summary``; or Spec-Bench's questions, of which
    those of the category ``summarization`` are taken.

    Raises:
        RequestError: see ``read_jsonl``; or no line asks for a summary.
    """
    if "category" not in read_jsonl(path, {})[0]:
        return [Pair(row["article"], row["summary"]) for row in read_jsonl(path, {"article": str, "summary": str})]
    asked = read_jsonl(path, {"category": str, "turns": list})
    pairs = [
        Pair(str(row["turns"][0]).removeprefix("Summarize: "), str(row["reference"][0]))
        for row in asked
        if row["category"] == "summarization" and row["turns"] and row.get("reference")
    ]
    if not pairs:
        raise RequestError(f"{path}: no question of the category 'summarization' with a reference")
    return pairs


def rouge_scorer(kinds: list[str]) -> Any:
    """Raises SkipkernelsError where rouge-score is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise SkipkernelsError(
            "ROUGE needs rouge-score, which is not installed; `pip install skipkernels[eval]` brings it"
        ) from error
    return RougeScorer(kinds, use_stemmer=True)
