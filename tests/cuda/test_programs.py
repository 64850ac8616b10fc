"""The CUDA kernels do what the reference does: every buffer is compared after every instruction of random programs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.program.state import LAYOUTS
from skipkernels.skipping.policy import SkipPolicy
from tests.cuda.kernels import HostKernels
from tests.cuda_host.controls import SEEDS
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases

CUDA = LAYOUTS["cuda"]


def check(case: Case, **options: int) -> None:
    compare_program(case, lambda program, state: HostKernels(program, state, **options))


@given(case=cases(layout=CUDA), seed=st.sampled_from(list(SEEDS)), num_sms=st.integers(1, 5))
def test_every_buffer_agrees_after_every_instruction(case: Case, seed: int, num_sms: int) -> None:
    check(case, seed=seed, num_sms=num_sms)


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
