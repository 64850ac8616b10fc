"""Seeds reproduce: on either executor, alone or in a batch."""

import pytest

from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import RequestError
from tests.models import random_prompt, tiny_engine, tiny_module

PROMPT = random_prompt(6)
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_a_seed_gives_the_same_tokens_on_both_executors(settings: dict, seed: int) -> None:
    sampling = SamplingParams(seed=seed, **settings)
    module = tiny_module()
    first, second, again = (
        tiny_engine(module=module, executor=executor)
        .generate(PROMPT, max_new_tokens=24, sampling=sampling)[0]
        .token_ids
        for executor in ("cpu", "reference", "cpu")
    )
    assert first == second == again


def test_other_seeds_give_other_tokens() -> None:
    engine, answers = tiny_engine(), set()
    for seed in range(6):
        (answer,) = engine.generate(PROMPT, max_new_tokens=8, sampling=SamplingParams(temperature=1.0, seed=seed))
        answers.add(tuple(answer.token_ids))
    assert len(answers) == 6


def test_rows_have_parameters_of_their_own() -> None:
    engine = tiny_engine(max_batch_size=3)
    greedy, hot = SamplingParams(), SamplingParams(temperature=2.0, seed=1)
    first, second, third = engine.generate([PROMPT] * 3, max_new_tokens=8, sampling=[greedy, hot, greedy])
    assert first.token_ids == third.token_ids != second.token_ids


def test_a_repetition_penalty_counts_prompt_and_output() -> None:
    """At a penalty this high every token is new while new ones have positive logits."""
    engine = tiny_engine()
    (answer,) = engine.generate(PROMPT, max_new_tokens=40, sampling=SamplingParams(repetition_penalty=1e6))
    assert len({*PROMPT, *answer.token_ids}) == len(set(PROMPT)) + 40


def test_a_repetition_penalty_knows_nothing_of_the_request_before() -> None:
    module, sampling = tiny_module(), SamplingParams(repetition_penalty=3.0)
    expected = tiny_engine(module=module).generate(PROMPT, max_new_tokens=20, sampling=sampling)[0].token_ids
    engine = tiny_engine(module=module)
    engine.generate(random_prompt(20, seed=1), max_new_tokens=40, sampling=sampling)
    assert engine.generate(PROMPT, max_new_tokens=20, sampling=sampling)[0].token_ids == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0"),
        ({"seed": 2**63}, "seed must be a 64-bit integer"),
    ],
)
def test_impossible_parameters_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)
