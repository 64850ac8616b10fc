"""Facts: short questions with one right answer each, scored by exact match."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.demo.facts import Fact
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.jsonl import digest, read_jsonl
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

EXACT_MATCH = Metric("exact match", "share", higher_is_better=True)
_OTHERS = 64
_SPARE_TOKENS = 4  # beyond the longest right answer, for wrong ones that are longer


class Facts:
    """Asks ``Q: question`` and takes the line after ``A:`` as the answer."""

    name = "facts"
    metrics = (EXACT_MATCH,)

    def __init__(self, engine: Engine, facts: Sequence[Fact], others: Sequence[Fact]) -> None:
        """``facts`` are asked; ``others``, with their answers, are used to set the ratio."""
        if engine.tokenizer is None:
            raise RequestError("the task 'facts' needs a tokenizer, and this model was loaded without one")
        self._facts = facts
        self._prompts = [engine.encode(fact.prompt) for fact in facts]
        self.alike = [_answered(engine, fact) for fact in others]
        self._max_new_tokens = max(_answered(engine, fact).decoded_tokens for fact in facts) + _SPARE_TOKENS

    @property
    def total(self) -> int:
        return len(self._facts)

    @property
    def settings(self) -> dict[str, Any]:
        return {"facts": self.total, "digest": digest("".join(fact.text for fact in self._facts))}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = method.generate(self._prompts, max_new_tokens=self._max_new_tokens, stop=["\n"], on_item=on_item)
        right = [answer.text.strip() == fact.answer for answer, fact in zip(answers, self._facts, strict=True)]
        return Outcome(
            items={EXACT_MATCH.name: [(float(is_right), 1.0) for is_right in right]},
            work=sum((answer.work for answer in answers), Work()),
            groups=[fact.topic for fact in self._facts],
        )


def read_facts(path: Path) -> list[Fact]:
    """The facts of a file: one object per line with ``question``, ``answer`` and optionally ``topic``.

    Raises:
        RequestError: see ``read_jsonl``.
    """
    rows = read_jsonl(path, {"question": str, "answer": str})
    return [Fact(row["question"], row["answer"], str(row.get("topic", "facts"))) for row in rows]


def split(facts: Sequence[Fact], limit: int | None, seed: int) -> tuple[list[Fact], list[Fact]]:
    """Draws facts to ask, at most ``limit``, and others to set the ratio on.

    Raises:
        RequestError: there are fewer than two.
    """
    if len(facts) < 2:
        raise RequestError(f"the task 'facts' needs at least 2 facts, got {len(facts)}")
    drawn = random.Random(seed).sample(list(facts), len(facts))
    others = min(_OTHERS, len(facts) // 2)
    return drawn[others:][:limit], drawn[:others]


def _answered(engine: Engine, fact: Fact) -> Passage:
    assert engine.tokenizer is not None
    prompt = engine.encode(fact.prompt)
    answer = engine.tokenizer(f" {fact.answer}\n", add_special_tokens=False)["input_ids"]
    return Passage((*prompt, *answer), len(prompt))
