"""Bias, penalties, grammars and log probabilities of a request, alone and beside others."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from skipkernels.decoding.generation import Generation, SamplingParams
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from tests.models import random_prompt, tiny_engine, tiny_module

MODULE = tiny_module(num_hidden_layers=3)
VOCAB = MODULE.config.vocab_size
PROMPT = random_prompt(40, seed=3)


def answer(engine: Engine, new: int = 24, **fields: Any) -> Generation:
    return engine.submit(PROMPT, max_new_tokens=new, sampling=SamplingParams(**fields), eos_token_ids=()).result()


def engine_of(**options: Any) -> Engine:
    return tiny_engine(module=MODULE, max_seq_len=128, **options)


@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_log_probabilities_are_transformers(executor: str) -> None:
    told = answer(engine_of(executor=executor), logprobs=3)
    assert told.logprobs is not None
    with torch.no_grad():
        logits = MODULE(torch.tensor([PROMPT + told.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    for token, row, own in zip(told.token_ids, expected, told.logprobs, strict=True):
        assert own.logprob == pytest.approx(float(row[token]), abs=2e-4)
        values, tokens = row.topk(3)
        assert [token for token, _ in own.top] == tokens.tolist()
        assert [value for _, value in own.top] == pytest.approx(values.tolist(), abs=2e-4)
    assert answer(engine_of(executor=executor)).logprobs is None


def test_a_biased_token_comes_always_or_never() -> None:
    engine = engine_of()
    plain = answer(engine).token_ids
    assert set(answer(engine, logit_bias=((7, 100.0),)).token_ids) == {7}
    assert plain[0] not in answer(engine, logit_bias=((plain[0], -100.0),)).token_ids
    assert answer(engine).token_ids == plain  # whoever has the slot next finds no bias


def test_penalties_fall_on_what_was_generated_only() -> None:
    engine = engine_of()
    once = answer(engine, new=60, presence_penalty=1000.0).token_ids
    assert len(set(once)) == 60
    biased = answer(engine, new=60, logit_bias=((7, 500.0), (9, 500.0)), frequency_penalty=20.0).token_ids
    assert set(biased[:40]) == {7, 9}  # 20 times each, then 100 is left of either
    assert all(abs(biased[:at].count(7) - biased[:at].count(9)) <= 1 for at in range(40))


class Rising:
    """Tokens by their number, three steps at a time; the fourth token is free."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def allow(self, words: npt.NDArray[np.int32]) -> None:
        words[:] = 0
        free = len(self.came) % 4 == 3
        for token in range(VOCAB) if free else [3 * len(self.came)]:
            words[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))

    def accept(self, token_id: int) -> None:
        self.came.append(token_id)


def test_a_grammar_is_followed_beside_others_and_after_a_preemption() -> None:
    block_bytes = 3 * 2 * 2 * 32 * (MODULE.config.hidden_size // MODULE.config.num_attention_heads) * 4
    plain = answer(engine_of(), new=40, temperature=1.0, seed=5, presence_penalty=0.7, logprobs=1)
    for options in ({}, {"cache_bytes": 4 * block_bytes}):
        engine = engine_of(max_batch_size=2, **options)
        grammar = Rising()
        handles = [
            engine.submit(PROMPT, max_new_tokens=40, sampling=sampling, eos_token_ids=())
            for sampling in (
                SamplingParams(temperature=1.0, seed=5, presence_penalty=0.7, logprobs=1),
                SamplingParams(temperature=1.0, seed=6, grammar=grammar),
            )
        ]
        beside, ruled = (handle.result() for handle in handles)
        assert beside.token_ids == plain.token_ids
        assert beside.logprobs == plain.logprobs
        assert grammar.came == ruled.token_ids
        assert all(token == 3 * at for at, token in enumerate(ruled.token_ids) if at % 4 != 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 21}, "logprobs must be in 0 to 20"),
        ({"logprobs": True}, "logprobs must be an integer"),
        ({"logit_bias": ((0, math.inf),)}, "finite"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "outside the vocabulary"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        answer(engine_of(), **fields)
