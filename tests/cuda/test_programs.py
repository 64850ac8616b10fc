"""The CUDA kernels do what the reference does: every buffer is compared after every instruction of random programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.program.state import LAYOUTS
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, SkipPolicy
from tests.cuda.kernels import HostKernels
from tests.cuda_host.controls import SEEDS
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases

CUDA = LAYOUTS["cuda"]


def check(case: Case, **options: int) -> None:
    compare_program(case, lambda program, state: HostKernels(program, state, **options))


@settings(max_examples=10)  # three seconds each
@given(case=cases(layout=CUDA), seed=st.sampled_from(list(SEEDS)), num_sms=st.integers(1, 5))
def test_every_buffer_agrees_after_every_instruction(case: Case, seed: int, num_sms: int) -> None:
    check(case, seed=seed, num_sms=num_sms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"post_norms_only": True},
        {"post_norms_only": True, "rotary_share": 0.6, "qkv_bias": True, "neuron_rows": True},
        {"rotary_share": 0.6},  # 9 of 16 pairs: two tiles of them, and one of the others
        {"rotary_share": 0.6, "qk_norm": True, "grows_queries": True, "sinks": True},
        {"softcap": 1.5, "branch_norms": True, "grows_queries": True},
    ],
    ids=str,
)
def test_what_single_families_do_agrees(changes: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case(
        seq_lens=(4, 7, 90),
        active=(True, False, True),
        hidden_size=64,
        intermediate_size=96,
        vocab_size=70,
        head_dim=32,
        num_key_value_heads=3,
        group_size=2,
        sliding_window=40,
        qk_norm=False,
        qkv_bias=False,
        o_proj_bias=False,
        dtype=dtype,
        policies=(NeuronPolicy(gate_thresholds=(0.3, 0.0), product_thresholds=(0.2, 0.1), warmup_tokens=0),)
        if "neuron_rows" in changes
        else (SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0),),
        seed=7,
        prompt_rows=(2, 0, 1),
        num_layers=2,
        layout=CUDA,
    )
    check(replace(case, **changes), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sequences", [1, 3, 17])
@pytest.mark.parametrize("hidden_size", [64, 37])
def test_experts_agree(num_sequences: int, hidden_size: int, dtype: torch.dtype) -> None:
    case = Case(
        seq_lens=tuple(3 + 5 * row for row in range(num_sequences)),
        active=tuple(row % 5 != 2 for row in range(num_sequences)),
        hidden_size=hidden_size,
        intermediate_size=96,
        vocab_size=70,
        head_dim=16,
        num_key_value_heads=1,
        group_size=2,
        dtype=dtype,
        policies=(SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0),),
        seed=num_sequences,
        num_layers=3,
        num_experts=11,
        expert_biases=num_sequences != 3,  # as gpt-oss
        activation="silu" if num_sequences == 3 else "clamped_swiglu",
        layout=CUDA,
    )
    check(case, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("hidden_size", [64, 37])
def test_neurons_of_experts_agree(num_sequences: int, hidden_size: int, dtype: torch.dtype) -> None:
    """The second layer has no experts. Also the dense program of weights that lie so."""
    neurons = NeuronPolicy(gate_thresholds=(0.3, 0.5), product_thresholds=(0.2, 0.1), warmup_tokens=0)
    for policies in ((neurons, DensePolicy()), (DensePolicy(),)):
        case = Case(
            seq_lens=tuple(3 + 5 * row for row in range(num_sequences)),
            active=(True,) * num_sequences,
            hidden_size=hidden_size,
            intermediate_size=96,
            vocab_size=70,
            head_dim=16,
            num_key_value_heads=1,
            group_size=2,
            dtype=dtype,
            policies=policies,
            seed=num_sequences,
            num_layers=2,
            num_experts=7,
            expert_biases=num_sequences == 3,  # as gpt-oss
            activation="clamped_swiglu" if num_sequences == 3 else "silu",
            neuron_rows=True,
            layout=CUDA,
        )
        check(case, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=400, derandomize=False)
@given(case=cases(layout=CUDA), seed=st.sampled_from(list(SEEDS)), num_sms=st.integers(1, 5))
def test_every_buffer_agrees_in_a_long_sweep(case: Case, seed: int, num_sms: int) -> None:
    check(case, seed=seed, num_sms=num_sms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", range(1, 17))
def test_every_batch_size_agrees(batch_size: int, dtype: torch.dtype) -> None:
    """Wide enough for several rounds of loads, and with rows that skip beside rows that do not."""
    case = Case(
        seq_lens=tuple(3 + 5 * row for row in range(batch_size)),
        active=tuple(row % 5 != 4 for row in range(batch_size)),
        hidden_size=320,
        intermediate_size=544,
        vocab_size=200,
        head_dim=32,
        num_key_value_heads=2,
        group_size=4,
        sliding_window=40,
        qk_norm=bool(batch_size % 2),
        qkv_bias=bool(batch_size % 3),
        o_proj_bias=not batch_size % 3,
        dtype=dtype,
        policies=(SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2),),
        seed=batch_size,
        num_layers=2,
        layout=CUDA,
    )
    check(case, seed=batch_size % 6)
