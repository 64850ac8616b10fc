"""What holds for every method: the two ways to decode agree, and the work is counted in the same terms."""

import json
from collections.abc import Callable

import pytest

from skipkernels.calibration.passages import Passage
from skipkernels.errors import RequestError
from skipkernels.methods.method import Found
from skipkernels.methods.methods import METHODS, method_kind
from skipkernels.methods.setup import Setup
from skipkernels.methods.work import Work
from tests.methods.conftest import RATIO
from tests.models import EOS, random_prompt


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_it_writes_it_reads_with_the_same_work(setup: Setup, found: Callable[[str], Found], name: str) -> None:
    method = METHODS[name].build(setup, found(name))
    prompts = [random_prompt(size, seed=size) for size in (1, 5, 11)]
    done: list[int] = []
    answers = method.generate(prompts, max_new_tokens=40, eos_token_ids=(), on_item=done.append)
    assert sum(done) == 3
    passages = [Passage((*prompt, *a.token_ids), len(prompt)) for prompt, a in zip(prompts, answers, strict=True)]
    readings = method.score(passages, keep_log_probs=True)
    for answer, reading in zip(answers, readings, strict=True):
        assert len(answer.token_ids) == 40
        assert reading.argmax.tolist() == answer.token_ids
        assert reading.work == answer.work
        assert reading.all_log_probs is not None
        assert reading.log_probs == pytest.approx(reading.all_log_probs.max(-1).values.numpy())
    total = sum((answer.work for answer in answers), Work())
    assert total.tokens == 120
    assert total.ffn_skip_ratio == pytest.approx(0.0 if name == "full" else RATIO, abs=0.1)


@pytest.mark.parametrize("name", ["neuron", "random", "shortgpt"])
def test_more_prompts_than_rows_are_answered_as_in_batches(
    setup: Setup, found: Callable[[str], Found], name: str
) -> None:
    """Random draws anew for each batch of prompts."""
    method = METHODS[name].build(setup, found(name))
    rows = setup.engine.max_batch_size
    prompts = [random_prompt(3 + seed % 5, seed=seed) for seed in range(2 * rows + 3)]
    done: list[int] = []
    answers = method.generate(prompts, max_new_tokens=12, eos_token_ids=(), on_item=done.append)
    assert done == [rows, rows, 3]
    assert answers[:rows] == method.generate(prompts[:rows], max_new_tokens=12, eos_token_ids=())
    others = method.generate(prompts[rows:], max_new_tokens=12, eos_token_ids=())
    assert (answers[rows:] == others) is (name != "random")
    assert setup.engine.loop.idle


def test_it_ends_where_it_is_told_to(setup: Setup, found: Callable[[str], Found], name: str) -> None:
    method = METHODS[name].build(setup, found(name))
    prompts = [random_prompt(6, seed) for seed in range(4)]
    answers = method.generate(prompts, max_new_tokens=80, eos_token_ids=())
    prompt, free, place = next(  # a printable character that ends the text where it first stands
        (prompt, answer, at)
        for prompt, answer in zip(prompts, answers, strict=True)
        for at, token in enumerate(answer.token_ids)
        if at and 32 < token < 127 and token not in answer.token_ids[:at]
    )
    ids = free.token_ids
    (ended,) = method.generate([prompt], max_new_tokens=80, eos_token_ids=(EOS, ids[place]))
    assert ended.token_ids == ids[: place + 1]
    assert ended.work.tokens == place + 1
    (stopped,) = method.generate([prompt], max_new_tokens=80, stop=[chr(ids[place])], eos_token_ids=())
    assert stopped.token_ids == ids[: place + 1]
    assert stopped.text == free.text[: free.text.index(chr(ids[place]))]


def test_its_first_token_is_the_full_models(setup: Setup, found: Callable[[str], Found], name: str) -> None:
    if name == "shortgpt":
        return  # what is removed is removed for the prompt as well
    prompt = random_prompt(7, seed=8)
    method, full = (METHODS[kind].build(setup, found(kind)) for kind in (name, "full"))
    passage = [Passage((*prompt, 1, 2, 3), len(prompt))]
    (reading,), (expected,) = method.score(passage), full.score(passage)
    assert reading.log_probs[0] == pytest.approx(expected.log_probs[0], abs=1e-4)


def test_the_found_is_json(setup: Setup, found: Callable[[str], Found], name: str) -> None:
    values = found(name)
    again = METHODS[name].build(setup, json.loads(json.dumps(values)))
    prompt = [random_prompt(5)]
    method = METHODS[name].build(setup, values)
    assert again.generate(prompt, max_new_tokens=12) == method.generate(prompt, max_new_tokens=12)


@pytest.mark.parametrize("passage", [Passage((1, 2), 0), Passage((1, 2), 2), Passage((1,) * 200, 5)])
def test_an_impossible_passage_is_refused(
    setup: Setup, found: Callable[[str], Found], name: str, passage: Passage
) -> None:
    with pytest.raises(RequestError):
        METHODS[name].build(setup, found(name)).score([passage])


def test_a_prompt_that_does_not_fit_is_refused(setup: Setup, found: Callable[[str], Found], name: str) -> None:
    with pytest.raises(RequestError, match="max_seq_len=96"):
        METHODS[name].build(setup, found(name)).generate([random_prompt(90)], max_new_tokens=20)


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'skipp'.*full, neuron, skip, mixed, held, cats, teal, random, fixed"):
        method_kind("skipp")


def test_a_warm_up_of_no_token_is_refused(setup: Setup) -> None:
    with pytest.raises(RequestError, match="at least 1, got 0"):
        Setup(setup.engine, [], warmup_tokens=0)
