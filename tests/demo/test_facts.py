"""The committed facts, and the tables they come from."""

import json

import pytest

from skipkernels.demo import Fact, demo_model_path, load_facts
from skipkernels.demo.fact_tables import build_facts
from skipkernels.demo.facts import FACTS_FILE, save_facts


@pytest.mark.parametrize("facts", [build_facts(), load_facts()], ids=["built", "committed"])
def test_every_question_is_asked_once_and_answered(facts: list[Fact]) -> None:
    assert len(facts) >= 1000
    assert len({fact.question for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.question.endswith("?")
        assert fact.answer
        assert fact.answer == fact.answer.strip()
        assert "\n" not in fact.text.removesuffix("\n\n").replace("\nA:", "", 1)


def test_committed_file_has_one_fact_per_line() -> None:
    lines = (demo_model_path() / FACTS_FILE).read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line).keys() == {"question", "answer", "topic"} for line in lines)


def test_committed_facts_hold_what_everyone_knows() -> None:
    answers = {fact.question: fact.answer for fact in load_facts()}
    assert answers["What is the reason phrase of HTTP status 404?"] == "Not Found"
    assert answers["What is the base class of KeyError?"] == "LookupError"
    assert answers["Which character is the HTML entity eacute?"] == "é"


def test_facts_survive_the_file(tmp_path) -> None:
    facts = [Fact("What is π?", 'a "letter"', "greek"), Fact("What is it?", "a\\b", "escapes")]
    save_facts(facts, tmp_path / FACTS_FILE)
    assert load_facts(tmp_path / FACTS_FILE) == facts


def test_text_is_prompt_and_completion() -> None:
    fact = Fact("What is it?", "This", "topic")
    assert fact.prompt + fact.completion == fact.text == "Q: What is it?\nA: This\n\n"
