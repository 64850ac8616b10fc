"""The executors decode alike: tokens, skips and the reasons for them, under every policy."""

import numpy as np
import pytest

from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy, TimingPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

PROMPTS = [random_prompt(length, seed=length) for length in (4, 11, 7)]
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=4),
    SamplingParams(temperature=1.2, seed=5),
]
POLICIES = [
    DensePolicy(),
    SkipPolicy(threshold=0.77, span=2, cold_start=0, cold_end=1, warmup_tokens=3),
    SkipPolicy(threshold=0.72, span=None, cold_start=1, cold_end=0, warmup_tokens=0, batch_rule="majority"),
    FixedPolicy((1, 4), warmup_tokens=2),
    RandomPolicy(0.3, seed=2, warmup_tokens=0),
    TimingPolicy(0.25),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
def test_executors_decode_alike(policy: Policy) -> None:
    module = tiny_module("qwen3", num_hidden_layers=6)
    native, reference = (
        tiny_engine(module=module, policy=policy, max_batch_size=3, executor=executor).generate(
            PROMPTS, max_new_tokens=16, sampling=SAMPLING
        )
        for executor in ("cpu", "reference")
    )
    for first, second in zip(native, reference, strict=True):
        assert first.token_ids == second.token_ids
        assert (first.skip_map == second.skip_map).all()
        np.testing.assert_allclose(first.similarity_map, second.similarity_map, atol=1e-5)
    assert any(answer.skip_map.any() for answer in native) == (policy.kind != "dense")


def native_executor(engine: Engine) -> CpuExecutor:
    executor = engine.executor_for(engine.policy)
    assert isinstance(executor, CpuExecutor)
    return executor


def test_a_profile_has_an_entry_for_every_instruction() -> None:
    policy = FixedPolicy((0, 1, 2), warmup_tokens=0)
    engine = tiny_engine(policy=policy)
    expected = engine.generate(PROMPTS[0], max_new_tokens=12)[0].token_ids
    decoding = engine.begin(PROMPTS[0], max_new_tokens=12)
    decoding.step(1)
    profile = native_executor(engine).profile(10)
    assert [op for op, _ in profile] == [ins.op for ins in native_executor(engine).program]
    seconds = {op: [s for name, s in profile if name == op] for op in ("down_proj_add", "o_proj_add")}
    assert seconds["down_proj_add"][:3] == [0.0] * 3  # skipped
    assert all(s > 0 for s in [seconds["down_proj_add"][3], *seconds["o_proj_add"]])
    row = decoding.rows[0]
    row.take_steps([0.0] * 10)
    assert row.token_ids == expected[:11]


def test_a_run_ends_with_its_steps_or_its_rows() -> None:
    engine = tiny_engine(max_batch_size=2)
    engine.begin(PROMPTS[:2], max_new_tokens=6)
    executor = native_executor(engine)
    assert executor.run(0) == []
    assert len(executor.run(4)) == 4
    assert len(executor.run(100)) == 2
    assert executor.run(100) == []
