"""A row of a batch gets bitwise what it gets alone."""

import numpy as np
import pytest
import torch

from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.skipping.policy import DensePolicy, Policy, RandomPolicy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

LENGTHS = [3, 17, 1, 8, 30, 5, 2, 11, 24, 9, 1, 14, 6, 21, 4, 12]
PROMPTS = [random_prompt(length, seed=row) for row, length in enumerate(LENGTHS)]
SAMPLING = [
    SamplingParams() if row % 3 == 0 else SamplingParams(temperature=0.9, top_k=40 * (row % 2), top_p=0.9, seed=row)
    for row in range(16)
]
POLICIES: dict[str, Policy] = {
    "dense": DensePolicy(),
    "similarity": SkipPolicy(threshold=0.8, span=1, cold_start=0, cold_end=0, warmup_tokens=3),
    "random": RandomPolicy(ratio=0.4, seed=5, cold_start=0, cold_end=0, warmup_tokens=0),
}


def bits(engine: Engine, row: int) -> list[int]:
    return engine.state.logits[row].view(torch.int32).tolist()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_gets_what_it_gets_alone(policy: Policy, dtype: torch.dtype) -> None:
    module = tiny_module("qwen3", dtype=dtype)
    single = tiny_engine(module=module, policy=policy)
    alone = []
    for prompt, sampling in zip(PROMPTS, SAMPLING, strict=True):
        (answer,) = single.generate(prompt, max_new_tokens=10, sampling=sampling)
        alone.append((answer, bits(single, 0)))
    for batch_size in (2, 3, 5, 8, 9, 16):
        engine = tiny_engine(module=module, policy=policy, max_batch_size=batch_size, num_threads=2)
        answers = engine.generate(PROMPTS[:batch_size], max_new_tokens=10, sampling=SAMPLING[:batch_size])
        for row, (answer, (expected, expected_bits)) in enumerate(zip(answers, alone, strict=False)):
            assert answer.token_ids == expected.token_ids
            assert bits(engine, row) == expected_bits
            assert np.array_equal(answer.skip_map, expected.skip_map)
            assert answer.similarity_map.tobytes() == expected.similarity_map.tobytes()
    if not isinstance(policy, DensePolicy):
        ratios = [answer.skip_ratio for answer, _ in alone]
        assert min(ratios) > 0
        assert max(ratios) < 1


def test_rows_that_end_early_leave_the_others_alone() -> None:
    """Rows end one after another, at tokens of their own."""
    module = tiny_module()
    single = tiny_engine(module=module)
    alone = [single.generate(prompt, max_new_tokens=20)[0].token_ids for prompt in PROMPTS[:6]]
    ends = [tokens[3 + 2 * row] for row, tokens in enumerate(alone)]
    expected = [single.generate(prompt, max_new_tokens=20, eos_token_ids=ends)[0] for prompt in PROMPTS[:6]]
    answers = tiny_engine(module=module, max_batch_size=6).generate(PROMPTS[:6], max_new_tokens=20, eos_token_ids=ends)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert len({len(answer.token_ids) for answer in answers}) > 2


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    module = tiny_module()
    expected, actual = (
        tiny_engine(module=module, policy=POLICIES["similarity"], num_threads=threads, max_seq_len=400)
        for threads in (1, num_threads)
    )
    prompt = random_prompt(330)  # more than one attention split
    first, second = (engine.generate(prompt, max_new_tokens=10)[0] for engine in (expected, actual))
    assert first.token_ids == second.token_ids
    assert first.similarity_map.tobytes() == second.similarity_map.tobytes()
    assert bits(expected, 0) == bits(actual, 0)


def test_rows_may_be_fewer_than_the_engine_holds() -> None:
    module = tiny_module()
    expected = tiny_engine(module=module).generate(PROMPTS[0], max_new_tokens=5)[0].token_ids
    engine = tiny_engine(module=module, max_batch_size=4)
    engine.generate(PROMPTS[:4], max_new_tokens=5)
    answers = engine.generate(PROMPTS[0], max_new_tokens=5)
    assert [answer.token_ids for answer in answers] == [expected]
