"""The facts task: exact match line by line, kinds, and which facts only set the ratio."""

from pathlib import Path

import pytest

from skipkernels.demo.facts import Fact
from skipkernels.errors import RequestError
from skipkernels.evaluation.asking import split
from skipkernels.evaluation.facts import EXACT_MATCH, Facts, read_facts
from skipkernels.methods.setup import Setup
from tests.evaluation.fakes import WORK, FakeMethod
from tests.models import tiny_engine

FACTS = [Fact(f"What is {number}?", f"n{number}", "even" if number % 2 == 0 else "odd") for number in range(12)]


def test_an_answer_is_right_word_for_word(setup: Setup) -> None:
    method = FakeMethod([" n0", "n1", " n2 indeed", "", " N4", " n5 "])
    done: list[int] = []
    outcome = Facts(setup.engine, FACTS[:6], FACTS[6:]).run(method, "fake", done.append)
    assert [item for item, _ in outcome.items[EXACT_MATCH.name]] == [1, 1, 0, 0, 0, 1]
    assert outcome.groups == ["even", "odd"] * 3
    assert outcome.work.tokens == 6 * WORK.tokens
    assert sum(done) == 6


def test_the_prompt_is_the_question_and_the_line_ends_the_answer(setup: Setup) -> None:
    method = FakeMethod([""] * 6)
    Facts(setup.engine, FACTS[:6], FACTS[6:]).run(method, "fake")
    assert method.prompts[1] == setup.engine.encode("Q: What is 1?\nA:")
    assert method.options["stop"] == ["\n"]
    assert method.options["max_new_tokens"] > len(" n5\n")


def test_facts_alike_are_answered(setup: Setup) -> None:
    passage = Facts(setup.engine, FACTS[:6], FACTS[6:]).alike[0]
    assert list(passage.token_ids) == setup.engine.encode("Q: What is 6?\nA: n6\n")
    assert passage.decoded_tokens == len(" n6\n")


def test_asked_and_others_are_disjoint_and_drawn() -> None:
    asked, others = split(FACTS, None, seed=3)
    assert sorted([*asked, *others], key=FACTS.index) == FACTS
    assert len(others) == 6
    assert (asked, others) == split(FACTS, None, seed=3)
    assert asked != split(FACTS, None, seed=4)[0]
    assert split(FACTS, 2, seed=3) == (asked[:2], others)
    many = [Fact(f"q{number}", "a", "t") for number in range(1000)]
    assert [len(part) for part in split(many, None, 0)] == [936, 64]
    with pytest.raises(RequestError, match="at least 2 facts, got 1"):
        split(FACTS[:1], None, 0)


def test_settings_change_with_the_facts(setup: Setup) -> None:
    one, other = Facts(setup.engine, FACTS[:6], FACTS[6:]), Facts(setup.engine, FACTS[1:7], FACTS[7:])
    assert one.settings["facts"] == 6
    assert one.settings != other.settings


def test_a_file_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"question": "a", "answer": "b", "topic": "c"}\n{"question": "d", "answer": "e"}\n')
    assert read_facts(path) == [Fact("a", "b", "c"), Fact("d", "e", "facts")]
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "d"}\n')
    with pytest.raises(RequestError, match="line 2: the field 'answer' is missing"):
        read_facts(path)


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Facts(tiny_engine(), FACTS[:6], FACTS[6:])
