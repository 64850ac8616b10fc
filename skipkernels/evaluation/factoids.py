"""Factoids: questions of common knowledge with a short answer, in FreebaseQA's form; the paper's own task.

The prompt is fixed: five solved questions of everyday knowledge, then the question. The line that follows is the
answer. It is right when it equals the expected one after normalisation (SQuAD's: lower case, no punctuation, no
articles, single spaces).
"""

from __future__ import annotations

import csv
import re
import string
from dataclasses import dataclass
from pathlib import Path

from skipkernels.errors import RequestError
from skipkernels.evaluation.facts import Facts
from skipkernels.support.files import read_text

SOLVED = (
    ("What is the capital of Italy?", "Rome"),
    ("Which planet is known as the red planet?", "Mars"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
    ("What is the chemical symbol of gold?", "Au"),
    ("In which country are the pyramids of Giza?", "Egypt"),
)


@dataclass(frozen=True)
class Factoid:
    question: str
    answer: str
    topic: str = "factoids"

    @property
    def prompt(self) -> str:
        return prompt_of(self.question)

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


class Factoids(Facts):
    """Asks after the solved examples, greedily."""

    name = "factoids"

    @staticmethod
    def is_right(answer: str, expected: str) -> bool:
        return normalised(answer) == normalised(expected)


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
