"""Chat: answers to multi-turn questions, in MT-Bench's file formats (Zheng et al. 2023, arXiv 2306.05685).

Questions and answers are written as FastChat reads them (``question.jsonl``, ``model_answer/<model>.jsonl``), so its
tools work on them as well. A judge may grade every turn; grades go to ``model_judgment/<judge>_single.jsonl``.
Answers are appended as soon as a batch of questions is answered, grades one by one; what is there is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.free_generation import REPETITION, repeated
from skipkernels.evaluation.jsonl import digest, read_jsonl
from skipkernels.evaluation.judge import Judge, JudgeUnreachable
from skipkernels.evaluation.summarization import rouge_scorer
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Answer, Method, OnItem, ignore
from skipkernels.methods.work import Work

SCORE = Metric("judge's score", "points", higher_is_better=True)
SIMILARITY = Metric("like full's answer", "share", higher_is_better=True)
LENGTH = Metric("answer length", "tokens", higher_is_better=True)

Question = dict[str, Any]


class Chat:
    """Asks every turn of every question, through the tokenizer's chat template.

    Without a judge, and with a method ``full``, an answer is scored by how much of the full model's it has: the ROUGE-L
    F-measure of each turn. That says how far a method departs, not which answer is better.
    """

    name = "chat"

    def __init__(
        self,
        engine: Engine,
        path: Path,
        folder: Path,
        alike: Sequence[Passage],
        *,
        judge: Judge | None = None,
        full: Method | None = None,
        limit: int | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        self._questions = read_questions(path)[:limit]
        if engine.tokenizer is None or not engine.tokenizer.chat_template:
            raise RequestError("the task 'chat' needs a tokenizer with a chat template, which this model lacks")
        self._engine = engine
        self._folder = folder
        self._judge = judge
        self._max_new_tokens = max_new_tokens
        self._unreachable: JudgeUnreachable | None = None
        self._full = None if judge else full
        self._scorer = rouge_scorer(["rougeL"]) if self._full else None
        self.alike = alike
        scored = [SCORE] if judge else [SIMILARITY] if self._full else []
        self.metrics: tuple[Metric, ...] = (*scored, REPETITION, LENGTH)

    @property
    def total(self) -> int:
        return len(self._questions) * (2 if self._judge else 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "questions": len(self._questions),
            "digest": digest(json.dumps(self._questions)),
            "max_new_tokens": self._max_new_tokens,
            "judge": self._judge.model if self._judge else None,
        }

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        answers = self._answers(method, label, on_item)
        if self._unreachable:
            raise self._unreachable  # the judge has failed once: the other methods only write their answers
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        for question, answer in zip(self._questions, answers, strict=True):
            turns = answer["skipkernels"]["token_ids"]
            items[LENGTH.name].append((float(sum(map(len, turns))), float(len(turns))))
            repetitions = [repeated(turn) for turn in turns]
            items[REPETITION.name].append((sum(r[0] for r in repetitions), sum(r[1] for r in repetitions)))
            if self._full:
                likeness = self._likeness(question, answer["choices"][0]["turns"])
                items[SIMILARITY.name].append((sum(likeness), float(len(likeness))))
            if self._judge:
                try:
                    scores = list(self._scores(self._judge, label, question, answer["choices"][0]["turns"]))
                except JudgeUnreachable as error:
                    self._unreachable = error
                    raise
                items[SCORE.name].append((sum(scores), float(len(scores))))
                on_item(1)
        work = sum((Work(**answer["skipkernels"]["work"]) for answer in answers), Work())
        return Outcome(items, work, groups=[question["category"] for question in self._questions])

    def _answers(self, method: Method, label: str, on_item: OnItem) -> list[dict[str, Any]]:
        """The line of the answer file for each question, in order."""
        path = self._folder / "model_answer" / f"{_file_name(label)}.jsonl"
        known = {line["question_id"]: line for line in _lines(path)}
        open_ones = [question for question in self._questions if question["question_id"] not in known]
        on_item(len(self._questions) - len(open_ones))
        for start in range(0, len(open_ones), self._engine.max_batch_size):
            together = open_ones[start : start + self._engine.max_batch_size]
            for line in self._asked_together(method, label, together):
                _append(path, line)
                known[line["question_id"]] = line
            on_item(len(together))
        answers = [known[question["question_id"]] for question in self._questions]
        lengths = {answer["skipkernels"]["max_new_tokens"] for answer in answers}
        if lengths != {self._max_new_tokens}:
            raise RequestError(
                f"{path}: holds answers of at most {', '.join(map(str, sorted(lengths)))} tokens, this command wants "
                f"{self._max_new_tokens}; give the same, or another folder"
            )
        return answers

    def _asked_together(self, method: Method, label: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Answers turn by turn; the prompt of each turn is the conversation up to it."""
        answers: list[list[Answer]] = [[] for _ in questions]
        for turn in range(max(len(question["turns"]) for question in questions)):
            asked = [index for index, question in enumerate(questions) if turn < len(question["turns"])]
            prompts = [
                self._engine.encode(_conversation(questions[index], [answer.text for answer in answers[index]], turn))
                for index in asked
            ]
            for index, answer in zip(asked, method.generate(prompts, max_new_tokens=self._max_new_tokens), strict=True):
                answers[index].append(answer)
        return [self._line(label, *pair) for pair in zip(questions, answers, strict=True)]

    def _line(self, label: str, question: Question, answers: Sequence[Answer]) -> dict[str, Any]:
        """A line of the answer file."""
        turns = [answer.text for answer in answers]
        return {
            "question_id": question["question_id"],
            "answer_id": hashlib.sha256(f"{label}{question['question_id']}{turns}".encode()).hexdigest()[:22],
            "model_id": label,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "skipkernels": {
                "token_ids": [answer.token_ids for answer in answers],
                "work": asdict(sum((answer.work for answer in answers), Work())),
                "max_new_tokens": self._max_new_tokens,
            },
        }

    def _likeness(self, question: Question, turns: Sequence[str]) -> list[float]:
        assert self._scorer is not None
        expected = self._full_turns[question["question_id"]]
        return [
            1.0 if turn == full else float(self._scorer.score(full, turn)["rougeL"].fmeasure)
            for turn, full in zip(turns, expected, strict=True)
        ]

    @cached_property
    def _full_turns(self) -> dict[int, list[str]]:
        """The full model's answers. They go to a file of their own, because a label also names the model's version."""
        assert self._full is not None
        label = f"full-to-compare-{self._engine.fingerprint[:12]}"
        answers = self._answers(self._full, label, ignore)
        return {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers}

    def _scores(self, judge: Judge, label: str, question: Question, turns: list[str]) -> Iterator[float]:
        path = self._folder / "model_judgment" / f"{_file_name(judge.model)}_single.jsonl"
        known = {(line["question_id"], line["model"], line["turn"]): line["score"] for line in _lines(path)}
        for number in range(len(turns)):
            key = (question["question_id"], label, number + 1)
            if key not in known:
                conversation = _conversation(question, turns, number)
                judgment = judge.grade([*conversation, {"role": "assistant", "content": turns[number]}])
                known[key] = judgment.score
                _append(
                    path,
                    {
                        "question_id": question["question_id"],
                        "model": label,
                        "judge": [judge.model, "single-v1" if number == 0 else "single-v1-multi-turn"],
                        "user_prompt": judgment.prompt,
                        "judgment": judgment.text,
                        "score": judgment.score,
                        "turn": number + 1,
                        "tstamp": time.time(),
                    },
                )
            yield known[key]


def read_questions(path: Path) -> list[Question]:
    """MT-Bench's questions: one object per line with ``question_id``, ``category`` and ``turns``, a list of texts.

    Raises:
        RequestError: see ``read_jsonl``; or a question has no turns or the number of another one.
    """
    questions = read_jsonl(path, {"question_id": int, "category": str, "turns": list})
    seen = set()
    for question in questions:
        number, turns = question["question_id"], question["turns"]
        if not turns or not all(isinstance(turn, str) for turn in turns):
            raise RequestError(f"{path}, question {number}: 'turns' must be a list of one text or more, got {turns!r}")
        if number in seen:
            raise RequestError(f"{path}: question_id {number} appears twice")
        seen.add(number)
    return questions


def _conversation(question: Question, answered: Sequence[str], turn: int) -> list[dict[str, str]]:
    """The messages up to the user's in ``turn``."""
    messages = []
    for asked, answer in zip(question["turns"][:turn], answered, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question["turns"][turn]}]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file. An incomplete last line, left by an interruption, is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@_-]", "-", label)
