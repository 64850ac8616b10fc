"""Factoids, choices, likeness of chats, decode speed: figures that are known beforehand, and files that are wrong."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from skipkernels.calibration.passages import Passage
from skipkernels.errors import RequestError
from skipkernels.evaluation.asking import split
from skipkernels.evaluation.chat import Chat
from skipkernels.evaluation.choices import Choices, read_choices
from skipkernels.evaluation.decode_speed import DecodeSpeed
from skipkernels.evaluation.factoids import SOLVED, Factoids, normalised, prompt_of, read_factoids
from skipkernels.evaluation.summarization import Pair, read_pairs
from skipkernels.methods.method import Reading
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from tests.evaluation.fakes import WORK, FakeMethod
from tests.methods.conftest import ALIKE
from tests.models import byte_tokenizer, tiny_engine


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(tokenizer=byte_tokenizer(), max_batch_size=4)


@pytest.mark.parametrize(
    ("written", "same"),
    [("The Beatles.", "beatles"), (" an  Apple ", "apple"), ("king solomon's mines", "King Solomons Mines"), ("a", "")],
)
def test_answers_are_compared_without_case_punctuation_and_articles(written: str, same: str) -> None:
    assert normalised(written) == normalised(same)
    assert normalised("rome") != normalised("romes")


def test_factoids_score_the_line_after_the_prompt(engine, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text('"What is a ""b"" | c?" | The N1 \n' + "".join(f"What is {n}? | n{n}\n" for n in range(2, 10)))
    drawn, others = split(read_factoids(path), 3, 0, Factoids.name)
    task = Factoids(engine, drawn, others)
    assert task.total == 3
    asked = [one.answer for one in drawn]
    method = FakeMethod([asked[0].upper() + ".", "wrong", f"the {asked[2]}"])
    outcome = task.run(method, "x")
    assert [item for item, _ in outcome.items["exact match"]] == [1.0, 0.0, 1.0]
    assert method.options["stop"] == ["\n"]
    prompt = engine.tokenizer.decode(method.prompts[0], skip_special_tokens=True)
    assert prompt == prompt_of(drawn[0].question)
    assert prompt.count("Question:") == len(SOLVED) + 1
    assert not {one.answer for one in drawn} & {passage_answer(engine, p) for p in task.alike}
    assert read_factoids(path)[0].question == 'What is a "b" | c?'


def passage_answer(engine, passage: Passage) -> str:
    return engine.tokenizer.decode(passage.token_ids[passage.prompt_tokens :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("line", ["no answer", "question | ", " | answer"])
def test_a_factoid_without_two_sides_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(f"What? | this\n{line}\n")
    with pytest.raises(RequestError, match="line 2: expected 'question"):
        read_factoids(path)


class Likely(FakeMethod):
    """Finds texts that contain ``good`` more likely by a fixed sum of log probabilities."""

    def __init__(self, tokenizer, good: str, good_sum: float, bad_sum: float) -> None:
        super().__init__([])
        self._tokenizer, self._good, self._sums = tokenizer, good, (bad_sum, good_sum)

    def score(self, passages: Sequence[Passage], *, on_item=lambda count: None, **_):
        readings = []
        for passage in passages:
            text = self._tokenizer.decode(passage.token_ids)
            answer = len(text.partition("Answer:")[2].encode())
            log_probs = np.full(passage.decoded_tokens, -7.0, np.float32)  # of the question: must not count
            log_probs[-answer:] = self._sums[self._good in text] / answer
            readings.append(Reading(np.zeros(passage.decoded_tokens, np.int64), log_probs, None, None, WORK))
            on_item(1)
        return readings


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    path = tmp_path / "piqa.jsonl"
    rows = [{"goal": f"do {n}", "sol1": "good short", "sol2": "a much longer bad way to do it"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa-labels.lst").write_text("0\n" * 6)
    return path


def test_choices_take_the_likelier_way(engine, choices: Path) -> None:
    task = Choices(engine, *split(read_choices(choices), 2, 0, Choices.name))
    done: list[int] = []
    outcome = task.run(Likely(engine.tokenizer, "good", -10.0, -20.0), "x", done.append)
    assert outcome.items["accuracy"] == [(1.0, 1.0)] * 2
    assert outcome.items["accuracy, per byte"] == [(0.0, 1.0)] * 2  # -10 / 10 bytes beside -20 / 30
    assert sum(done) == task.total == 4
    assert task.alike[0].prompt_tokens == 1  # the method is active in the question as well


@pytest.mark.parametrize(
    ("labels", "message"),
    [("0\n", "has 1 labels, piqa.jsonl has 6"), ("0\n1\n2\n0\n0\n0\n", "line 3: a label is 0 or 1")],
)
def test_labels_that_do_not_fit_are_refused(choices: Path, labels: str, message: str) -> None:
    choices.with_name("piqa-labels.lst").write_text(labels)
    with pytest.raises(RequestError, match=message):
        read_choices(choices)


def test_spec_bench_gives_summaries(tmp_path: Path) -> None:
    path = tmp_path / "spec.jsonl"
    rows = [
        {"question_id": 1, "category": "qa", "turns": ["who?"]},
        {"question_id": 2, "category": "summarization", "turns": ["Summarize: long"], "reference": ["short"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(path) == [Pair("long", "short")]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(RequestError, match="no question of the category 'summarization'"):
        read_pairs(path)


def test_chat_without_a_judge_is_compared_with_the_full_model(engine, tmp_path: Path) -> None:
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "writing", "turns": ["one", "two"]}) + "\n")
    full = FakeMethod(["the cat sat here", "yes"])
    task = Chat(engine, path, tmp_path / "out", (), full=full)
    outcome = task.run(FakeMethod(["the cat sat there", "yes"]), "other")
    assert outcome.items["like full's answer"] == [(pytest.approx(0.75 + 1.0), 2.0)]
    same = task.run(FakeMethod(["the cat sat here", "yes"]), "same")
    assert same.items["like full's answer"] == [(2.0, 2.0)]


def test_speed_is_measured_beside_the_full_model(setup: Setup) -> None:
    full = METHODS["full"].build(setup, METHODS["full"].find(setup, 0.0, ALIKE))
    task = DecodeSpeed(ALIKE[:2], ALIKE, full)
    outcome = task.run(full, "full")
    for (tokens, seconds), (full_seconds, again) in zip(*(outcome.items[m.name] for m in task.metrics), strict=True):
        assert tokens == max(passage.decoded_tokens for passage in ALIKE[:2]) - 1
        assert seconds == again > 0
        assert full_seconds > 0
    layers = METHODS["shortgpt"].build(setup, METHODS["shortgpt"].find(setup, 0.4, ALIKE))
    assert all(seconds > 0 for _, seconds in task.run(layers, "shortgpt").items["decode speed"])
    slow = METHODS["exit"].build(setup, {"confidence": 0.5})
    assert task.run(slow, "exit").items["decode speed"] == [(0.0, 0.0)] * 2  # no kernel: no figure
