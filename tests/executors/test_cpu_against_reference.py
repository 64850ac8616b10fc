"""The CPU executor does what the reference does: every buffer is compared after every instruction."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels import _C
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import (
    DensePolicy,
    FixedPolicy,
    NeuronPolicy,
    Policy,
    RandomPolicy,
    SkipPolicy,
    TimingPolicy,
)
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases

threads = st.sampled_from([1, 1, 2, 3])


def check(case: Case, isa: str, num_threads: int) -> None:
    isa = _C.usable_isas()[0] if isa == "auto" else isa
    rounds = isa == "avx512_bf16" and case.dtype == torch.bfloat16
    compare_program(case, lambda program, state: CpuExecutor(program, state, num_threads=num_threads, isa=isa), rounds)


@pytest.mark.parametrize("isa", _C.usable_isas())
@given(case=cases(experts=True), num_threads=threads)
def test_every_buffer_agrees_after_every_instruction(isa: str, case: Case, num_threads: int) -> None:
    check(case, isa, num_threads)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa", _C.usable_isas())
@settings(max_examples=500, derandomize=False)
@given(case=cases(experts=True), num_threads=threads)
def test_every_buffer_agrees_in_a_long_sweep(isa: str, case: Case, num_threads: int) -> None:
    check(case, isa, num_threads)


def plain_case(num_sequences: int, dtype: torch.dtype, **changes: Any) -> Case:
    case = Case(
        seq_lens=tuple((7 * row) % 11 for row in range(num_sequences)),
        active=(True,) * num_sequences,
        hidden_size=49,
        intermediate_size=1100,
        vocab_size=50,
        head_dim=10,
        num_key_value_heads=2,
        group_size=2,
        dtype=dtype,
        policies=(DensePolicy(),),
        seed=num_sequences,
        num_layers=1,
    )
    return replace(case, **changes)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("num_sequences", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_sequences_agrees(isa: str, num_sequences: int, dtype: torch.dtype) -> None:
    """Each number of rows has register tiles of its own; the inner size is several blocks of the largest tile."""
    check(plain_case(num_sequences, dtype), isa, num_threads=2)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize(("num_sequences", "prompt_rows"), [(1, 0), (3, 0), (9, 0), (2, 47), (1, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_agree(isa: str, num_sequences: int, prompt_rows: int, dtype: torch.dtype) -> None:
    """Few rows, of which each thread packs an expert's for itself, and many, packed once."""
    case = plain_case(num_sequences, dtype, num_experts=11, intermediate_size=150)
    if num_sequences % 3:  # as gpt-oss
        case = replace(case, expert_biases=True, sinks=True, activation="clamped_swiglu")
    if prompt_rows:
        case = replace(case, seq_lens=(prompt_rows + 5,) * num_sequences, prompt_rows=(prompt_rows,) * num_sequences)
    check(case, isa, num_threads=2)


NEURONS = (
    NeuronPolicy(gate_thresholds=(0.3, 0.0), product_thresholds=(0.2, 0.1), warmup_tokens=0),
    NeuronPolicy(gate_thresholds=(0.8, 0.5), warmup_tokens=1, target_ratio=0.2),
    DensePolicy(),
)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("policies", [NEURONS, NEURONS[2:]], ids=["neurons", "dense"])
@pytest.mark.parametrize(("num_sequences", "prompt_rows"), [(1, 0), (3, 0), (8, 0), (9, 0), (2, 47)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_of_experts_agree(
    isa: str, policies: tuple[Policy, ...], num_sequences: int, prompt_rows: int, dtype: torch.dtype
) -> None:
    """Few rows, whose tasks are chunks of an expert's neurons, and many, whose tasks are panels of columns; experts of
    several tasks, and a layer without."""
    case = plain_case(
        num_sequences, dtype, num_experts=11, intermediate_size=250, num_layers=2, neuron_rows=True, policies=policies
    )
    if num_sequences % 3:  # as gpt-oss
        case = replace(case, expert_biases=True, sinks=True, activation="clamped_swiglu")
    if prompt_rows:
        case = replace(case, seq_lens=(prompt_rows + 5,) * num_sequences, prompt_rows=(prompt_rows,) * num_sequences)
    check(case, isa, num_threads=2)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("prompt_rows", [1, 15, 47, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_prompt_rows_agrees(isa: str, prompt_rows: int, dtype: torch.dtype) -> None:
    """In one step with decode rows, far beyond what a register tile holds; positions lie in several splits."""
    case = plain_case(
        2,
        dtype,
        seq_lens=(prompt_rows + 20, 9),
        prompt_rows=(prompt_rows, 4),
        intermediate_size=60,
        sliding_window=20,
        num_layers=2,
    )
    check(case, isa, num_threads=2)


@pytest.mark.parametrize("num_sequences", [33, 64])
def test_many_sequences_agree(num_sequences: int) -> None:
    policies = (
        DensePolicy(),
        SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=2),
        SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
    )
    case = plain_case(num_sequences, torch.float32, intermediate_size=60, num_layers=4, policies=policies)
    check(case, "auto", num_threads=2)


POLICIES = [
    SkipPolicy(threshold=-1.0, span=None, cold_start=0, cold_end=0, warmup_tokens=0),
    SkipPolicy(threshold=-1.0, span=2, cold_start=0, cold_end=1, warmup_tokens=3),
    SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=2),
    SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
    SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="all"),
    SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
    FixedPolicy((0, 2), warmup_tokens=2),
    RandomPolicy(0.5, seed=-3, cold_start=0, cold_end=0, warmup_tokens=2),
    TimingPolicy(0.25),
]


def policy_case(policies: tuple[Policy, ...], seed: int) -> Case:
    """Sequences of every kind: in and past their warm-up, with and without a prompt before them, and idle."""
    return plain_case(
        7,
        torch.float32,
        seq_lens=(9, 30, 12, 0, 25, 14, 40),
        active=(True, True, False, True, True, True, True),
        prompt_rows=(0, 3, 2, 0, 5, 0, 1),
        hidden_size=75,
        intermediate_size=100,
        vocab_size=90,
        group_size=3,
        sliding_window=20,
        qkv_bias=True,
        o_proj_bias=True,
        policies=policies,
        seed=seed,
        num_layers=6,
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
@pytest.mark.parametrize("seed", range(3))
def test_every_policy_agrees(policy: Policy, seed: int) -> None:
    check(policy_case((policy,), seed), "auto", num_threads=1)


@pytest.mark.parametrize("first", range(len(POLICIES) + 1))
def test_policies_agree_side_by_side(first: int) -> None:
    policies = (DensePolicy(), *POLICIES)
    check(policy_case(policies[first:] + policies[:first], seed=first), "auto", num_threads=1)
