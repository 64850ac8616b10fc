"""Factoids: questions of common knowledge with a short answer, in FreebaseQA's form; the paper's own task.

The prompt is fixed: five solved questions of everyday knowledge, then the question. The line that follows is the
answer. It is right when it equals the expected one after normalisation (SQuAD's: lower case, no punctuation, no
articles, single spaces).
"""

from __future__ import annotations

import csv
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.evaluation.estimate import Metric
from skipkernels.evaluation.jsonl import digest
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work
from skipkernels.support.files import read_text

EXACT_MATCH = Metric("exact match", "share", higher_is_better=True)
SOLVED = (
    ("What is the capital of Italy?", "Rome"),
    ("Which planet is known as the red planet?", "Mars"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
    ("What is the chemical symbol of gold?", "Au"),
    ("In which country are the pyramids of Giza?", "Egypt"),
)
_OTHERS = 32
_MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Factoid:
    question: str
    answer: str


class Factoids:
    """Asks after the solved examples, greedily."""

    name = "factoids"
    metrics = (EXACT_MATCH,)

    def __init__(self, engine: Engine, path: Path, *, limit: int | None = None, seed: int = 0) -> None:
        """Raises:
        RequestError: the file is unreadable or a line has no answer; or the model has no tokenizer.
        """
        if engine.tokenizer is None:
            raise RequestError("the task 'factoids' needs a tokenizer, and this model was loaded without one")
        drawn = read_factoids(path)
        random.Random(seed).shuffle(drawn)
        if len(drawn) < 2:
            raise RequestError(f"{path}: the task 'factoids' needs at least 2 questions, got {len(drawn)}")
        others = min(_OTHERS, len(drawn) // 2)
        self._asked = drawn[others:][:limit]
        self._prompts = [engine.encode(prompt_of(one.question)) for one in self._asked]
        self.alike = [_answered(engine, one) for one in drawn[:others]]

    @property
    def total(self) -> int:
        return len(self._asked)

    @property
    def settings(self) -> dict[str, Any]:
        return {"questions": self.total, "digest": digest(str(self._asked)), "prompt": prompt_of("{question}")}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = method.generate(self._prompts, max_new_tokens=_MAX_NEW_TOKENS, stop=["\n"], on_item=on_item)
        right = [
            normalised(answer.text) == normalised(one.answer) for answer, one in zip(answers, self._asked, strict=True)
        ]
        return Outcome(
            items={EXACT_MATCH.name: [(float(is_right), 1.0) for is_right in right]},
            work=sum((answer.work for answer in answers), Work()),
        )


def prompt_of(question: str) -> str:
    """The few-shot prompt, up to where the answer begins."""
    solved = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in SOLVED)
    return f"{solved}Question: {question}\nAnswer:"


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces (SQuAD, Rajpurkar et al. 2016)."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def read_factoids(path: Path) -> list[Factoid]:
    """The questions of a file: ``question | answer`` in each line, CSV quoting allowed.

    Raises:
        RequestError: it cannot be read, or a line has no question or no answer.
    """
    found = []
    rows = csv.reader(read_text(path).splitlines(), delimiter="|", skipinitialspace=True)
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        question, answer = "|".join(row[:-1]).strip(), row[-1].strip()
        if not question or not answer:
            raise RequestError(f"{path}, line {number}: expected 'question | answer', got {'|'.join(row)!r}")
        found.append(Factoid(question, answer))
    return found


def _answered(engine: Engine, one: Factoid) -> Passage:
    assert engine.tokenizer is not None
    prompt = engine.encode(prompt_of(one.question))
    answer: Sequence[int] = engine.tokenizer(f" {one.answer}\n", add_special_tokens=False)["input_ids"]
    return Passage((*prompt, *answer), len(prompt))
