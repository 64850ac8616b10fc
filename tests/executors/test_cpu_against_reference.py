"""The CPU executor does what the reference does: every buffer is compared after every instruction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels import _C
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy, TimingPolicy
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases

threads = st.sampled_from([1, 1, 2, 3])


def check(case: Case, isa: str, num_threads: int) -> None:
    compare_program(case, lambda program, state: CpuExecutor(program, state, num_threads=num_threads, isa=isa))


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
        SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
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
