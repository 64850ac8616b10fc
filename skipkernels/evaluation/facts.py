"""Facts: short questions with one right answer each, scored by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from skipkernels.demo.facts import Fact
from skipkernels.engine import Engine
from skipkernels.evaluation.asking import answered
from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.jsonl import digest, read_jsonl
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

EXACT_MATCH = Metric("exact match", "share", higher_is_better=True)
_SPARE_TOKENS = 4  # beyond the longest right answer, for wrong ones that are longer


class Asked(Protocol):
    """A question with one short answer, and how it is written."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def topic(self) -> str: ...

    @property
    def text(self) -> str:
        """Prompt and answer."""
        ...


class Facts:
    """Asks ``Q: question`` and takes the line after ``A:`` as the answer."""

    name = "facts"
    metrics = (EXACT_MATCH,)

    def __init__(self, engine: Engine, facts: Sequence[Asked], others: Sequence[Asked]) -> None:
        """``facts`` are asked; ``others``, with their answers, are used to set the ratio.

        Raises:
            RequestError: the model has no tokenizer.
        """
        passages = [answered(engine, fact.prompt, f" {fact.answer}\n", self.name) for fact in facts]
        self._facts = facts
        self._prompts = [list(passage.token_ids[: passage.prompt_tokens]) for passage in passages]
        self.alike = [answered(engine, fact.prompt, f" {fact.answer}\n", self.name) for fact in others]
        self._max_new_tokens = max(passage.decoded_tokens for passage in passages) + _SPARE_TOKENS

    @staticmethod
    def is_right(answer: str, expected: str) -> bool:
        return answer.strip() == expected

    @property
    def total(self) -> int:
        return len(self._facts)

    @property
    def settings(self) -> dict[str, Any]:
        return {"facts": self.total, "digest": digest("".join(fact.text for fact in self._facts))}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = method.generate(self._prompts, max_new_tokens=self._max_new_tokens, stop=["\n"], on_item=on_item)
        right = [self.is_right(answer.text, fact.answer) for answer, fact in zip(answers, self._facts, strict=True)]
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
