"""The CPU executor does what the reference does: every buffer is compared after every instruction."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels import _C
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.policy import BATCH_RULES, DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy, TimingPolicy
from skipkernels.state import KV_SPLIT
from tests.executors.programs import Case, compare_instruction, snapshot

LAYERS = 4
threads = st.sampled_from([1, 1, 2, 3])
policies = st.one_of(
    st.just(DensePolicy()),
    st.builds(
        SkipPolicy,
        threshold=st.sampled_from([-1.0, 0.3, 0.7, 0.9]),
        span=st.sampled_from([None, 1, 2]),
        cold_start=st.just(0),
        cold_end=st.sampled_from([0, 1]),
        warmup_tokens=st.sampled_from([0, 2]),
        batch_rule=st.sampled_from(BATCH_RULES),
    ),
    st.builds(FixedPolicy, layers=st.sampled_from([(0,), (1, 3), (0, 1, 2, 3)]), warmup_tokens=st.sampled_from([0, 3])),
    st.builds(
        RandomPolicy,
        ratio=st.sampled_from([0.2, 0.5]),
        seed=st.integers(-(2**63), 2**63 - 1),
        warmup_tokens=st.just(2),
    ),
    st.builds(TimingPolicy, ratio=st.sampled_from([0.0, 0.25, 0.5])),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    longest = draw(st.sampled_from([5, 40, KV_SPLIT, 2 * KV_SPLIT + 40]))
    batch_size = draw(st.integers(1, 16 if longest < KV_SPLIT else 4))
    seq_lens = draw(st.lists(st.integers(0, longest), min_size=batch_size, max_size=batch_size))
    active = draw(st.lists(st.sampled_from([True, True, False]), min_size=batch_size, max_size=batch_size))
    return Case(
        batch_size=batch_size,
        seq_lens=tuple(seq_lens),
        active=tuple(active),
        hidden_size=draw(st.integers(1, 140)),
        intermediate_size=draw(st.integers(1, 140)),
        vocab_size=draw(st.integers(2, 300)),
        head_dim=draw(st.sampled_from([2, 6, 10, 64, 80, 96, 128])),
        num_key_value_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        sliding_window=draw(st.sampled_from([None, 1, 7, KV_SPLIT, KV_SPLIT + 50])),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_proj_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        policy=draw(policies),
        seed=draw(st.integers(0, 1 << 30)),
        num_layers=LAYERS,
    )


def check(case: Case, isa: str, num_threads: int) -> None:
    weights, state, expected = case.weights(), case.state(), case.state()
    cpu = CpuExecutor(case.program(weights, state), state, num_threads=num_threads, isa=isa)
    reference = ReferenceExecutor(case.program(weights, expected), expected)
    for index, ins in enumerate(cpu.program):
        before = snapshot(state)
        cpu.run_instruction(index)
        reference.run_instruction(index)
        compare_instruction(ins, state, expected, before)
        for item in fields(state):  # the next instruction starts from the same bits again
            getattr(state, item.name).copy_(getattr(expected, item.name))


@pytest.mark.parametrize("isa", _C.usable_isas())
@given(case=cases(), num_threads=threads)
def test_every_buffer_agrees_after_every_instruction(isa: str, case: Case, num_threads: int) -> None:
    check(case, isa, num_threads)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa", _C.usable_isas())
@settings(max_examples=500, derandomize=False)
@given(case=cases(), num_threads=threads)
def test_every_buffer_agrees_in_a_long_sweep(isa: str, case: Case, num_threads: int) -> None:
    check(case, isa, num_threads)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("batch_size", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_batch_size_agrees(isa: str, batch_size: int, dtype: torch.dtype) -> None:
    """Each batch size has register tiles of its own; the inner size is several blocks of the largest tile."""
    case = Case(
        batch_size=batch_size,
        seq_lens=tuple((7 * row) % 11 for row in range(batch_size)),
        active=(True,) * batch_size,
        hidden_size=49,
        intermediate_size=1100,
        vocab_size=50,
        head_dim=10,
        num_key_value_heads=2,
        group_size=2,
        sliding_window=None,
        qk_norm=False,
        qkv_bias=False,
        o_proj_bias=False,
        dtype=dtype,
        policy=DensePolicy(),
        seed=batch_size,
        num_layers=1,
    )
    check(case, isa, num_threads=2)


@pytest.mark.parametrize(
    "policy",
    [
        SkipPolicy(threshold=-1.0, span=None, cold_start=0, cold_end=0, warmup_tokens=0),
        SkipPolicy(threshold=-1.0, span=2, cold_start=0, cold_end=1, warmup_tokens=3),
        SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=2),
        SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
        SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="all"),
        FixedPolicy((0, 2), warmup_tokens=2),
        RandomPolicy(0.5, seed=-3, cold_start=0, cold_end=0, warmup_tokens=2),
        TimingPolicy(0.25),
    ],
    ids=lambda policy: policy.label,
)
@pytest.mark.parametrize("seed", range(3))
def test_every_policy_agrees(policy: Policy, seed: int) -> None:
    """Rows of every kind: in and past their warm-up, with and without a prompt before them, and idle."""
    case = Case(
        batch_size=7,
        seq_lens=(9, 30, 12, 0, 25, 14, 40),
        active=(True, True, False, True, True, True, True),
        hidden_size=75,
        intermediate_size=100,
        vocab_size=90,
        head_dim=10,
        num_key_value_heads=2,
        group_size=3,
        sliding_window=20,
        qk_norm=False,
        qkv_bias=True,
        o_proj_bias=True,
        dtype=torch.float32,
        policy=policy,
        seed=seed,
        num_layers=6,
    )
    check(case, "auto", num_threads=1)
