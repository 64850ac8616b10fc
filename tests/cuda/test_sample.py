"""sample: tokens of large vocabularies, found by many blocks and by the one that truncates, are the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.program.reference import sample
from skipkernels.program.table import Instruction, instruction
from tests.cuda.comparison import run_with_kernels
from tests.program.test_sample import adjusted_instruction, assert_samples_alike

LISTED = 4096  # tokens that the truncating block looks at in shared memory


def sample_instruction(logits: torch.Tensor, **settings: Any) -> Instruction:
    """Over rows of ``logits`` [rows, vocab], each with its own seed."""
    rows = logits.shape[0]
    operands: dict[str, torch.Tensor] = {
        "logits": logits,
        "seen": torch.zeros(logits.shape, dtype=torch.uint8),
        "num_generated": torch.arange(rows, dtype=torch.int32),
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "repetition_penalty": torch.ones(rows),
        "adjusts": torch.zeros(rows, dtype=torch.int32),
        "logit_bias": torch.zeros(rows, logits.shape[1]),
        "frequency_penalty": torch.zeros(rows),
        "presence_penalty": torch.zeros(rows),
        "token_mask": torch.zeros(rows, -(-logits.shape[1] // 32), dtype=torch.int32),
        "num_logprobs": torch.zeros(rows, dtype=torch.int32),
        "logprobs": torch.full((rows, rows, 6), torch.nan),
        "top_tokens": torch.full((rows, rows, 5), -1, dtype=torch.int32),
        "seed": torch.arange(rows) - 2,
        "next_token": torch.full((rows,), -1, dtype=torch.int32),
    }
    for name, value in settings.items():
        operands[name] = value if isinstance(value, torch.Tensor) else operands[name].clone().fill_(value)
    return instruction("sample", row_mask=torch.ones(rows, dtype=torch.int32), **operands)


def compare(logits: torch.Tensor, schedule: int = 0, **settings: Any) -> list[int]:
    """The tokens of kernel and reference agree; returns them."""
    ins, expected = sample_instruction(logits, **settings), sample_instruction(logits, **settings)
    run_with_kernels(ins, seed=schedule)
    sample(expected)
    assert_samples_alike(ins, expected)
    return ins.tensors["next_token"].tolist()


SETTINGS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 2.0, "top_k": 50},
    {"temperature": 2.0, "top_k": 2 * LISTED},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.97},  # the kept ones do not fit into the list
    {"temperature": 2.0, "top_p": 1e-9},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 5000, "top_p": 0.99, "min_p": 0.01},
    {"temperature": 2.0, "min_p": 0.05},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_large_vocabularies(settings: dict[str, float]) -> None:
    logits = torch.randn(3, 3 * LISTED + 77, generator=torch.Generator().manual_seed(5)) * 3
    compare(logits, schedule=4, **settings)


@given(
    seed=st.integers(0, 1 << 20),
    levels=st.sampled_from([1, 2, 5, 40, 10000]),  # few levels: many ties
    vocab_size=st.integers(1, 90),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 95),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.25, 0.1, 1e-12]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
    holes=st.booleans(),
)
def test_ties_and_holes(
    seed: int,
    levels: int,
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    holes: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels + 1, (2, vocab_size), generator=generator) / levels * 4
    logits[logits == 0] *= -1  # some are -0
    if holes:
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
    settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
    seen = torch.randint(2, logits.shape, generator=generator, dtype=torch.uint8)
    compare(logits, schedule=seed % 6, temperature=temperature, seen=seen, **settings)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_without_finite_scores_there_is_no_draw(settings: dict[str, float], special: float) -> None:
    logits = torch.randn(2, LISTED + 9, generator=torch.Generator().manual_seed(1))
    logits[:, [LISTED + 3, 77, LISTED - 1]] = special
    assert compare(logits, **settings) == [77, 77]
    assert compare(torch.full((1, 300), -torch.inf), **settings) == [0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_adjustments_and_log_probabilities(temperature: float, seed: int) -> None:
    actual, expected = (adjusted_instruction(seed, temperature=temperature) for _ in range(2))
    run_with_kernels(actual, seed=seed)
    sample(expected)
    assert_samples_alike(actual, expected)


def test_log_probabilities_of_a_large_vocabulary() -> None:
    logits = torch.randn(2, 3 * LISTED + 77, generator=torch.Generator().manual_seed(5)).round(decimals=1)  # ties
    compare(logits, temperature=0.0, num_logprobs=6)
