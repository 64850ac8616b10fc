"""sample draws the reference's tokens: same seed, same token, whatever the filters and the ties."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import sample
from skipkernels.program.table import Instruction, instruction
from tests.program.test_sample import adjusted_instruction, assert_samples_alike, sample_instruction


@st.composite
def draws(draw: st.DrawFn, max_vocab: int = 60) -> dict[str, Any]:
    vocab = draw(st.integers(2, max_vocab))
    return {
        "vocab": vocab,
        "spread": draw(st.sampled_from([0.1, 1.0, 5.0, 40.0])),
        "levels": draw(st.sampled_from([0, 0, 2, 7])),  # equal scores, where not 0
        "minus_infinity": draw(st.booleans()),
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "top_k": draw(st.integers(0, vocab + 2)),
        "top_p": draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1])),
        "min_p": draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 0.7, 1.3])),
        "data": draw(st.integers(0, 1 << 30)),
    }


def build(settings: dict[str, Any], rows: int) -> Instruction:
    values = dict(settings)
    generator = torch.Generator().manual_seed(values.pop("data"))
    vocab, levels = values.pop("vocab"), values.pop("levels")
    logits = torch.randn(rows, vocab, generator=generator)
    if levels:
        logits = (logits * levels).round() / levels
    logits = logits * values.pop("spread")
    if values.pop("minus_infinity"):
        logits[:, 1:][torch.rand(rows, vocab - 1, generator=generator) < 0.3] = -math.inf
    per_row = {name: torch.full((rows,), values[name]) for name in ("temperature", "top_p", "min_p")}
    return instruction(
        "sample",
        row_mask=torch.tensor([1] * (rows - 1) + [0], dtype=torch.int32),
        logits=logits,
        seen=(torch.rand(rows, vocab, generator=generator) < 0.3).to(torch.uint8)
        * torch.randint(1, 256, (rows, vocab), generator=generator, dtype=torch.uint8),
        num_generated=torch.randint(100, (rows,), generator=generator, dtype=torch.int32),
        top_k=torch.full((rows,), values["top_k"], dtype=torch.int32),
        repetition_penalty=torch.full((rows,), values["repetition_penalty"]),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        next_token=torch.full((rows,), -7, dtype=torch.int32),
        adjusts=torch.randint(8, (rows,), generator=generator, dtype=torch.int32),
        logit_bias=torch.randn(rows, vocab, generator=generator),
        frequency_penalty=torch.randn(rows, generator=generator),
        presence_penalty=torch.randn(rows, generator=generator),
        token_mask=torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), generator=generator).int(),
        num_logprobs=torch.randint(5, (rows,), generator=generator, dtype=torch.int32),
        logprobs=torch.full((rows, 100, 5), torch.nan),
        top_tokens=torch.full((rows, 100, 4), -1, dtype=torch.int32),
        **per_row,
    )


def check(settings: dict[str, Any], rows: int = 3) -> None:
    actual, expected = build(settings, rows), build(settings, rows)
    TRITON["sample"](actual)
    sample(expected)
    assert_samples_alike(actual, expected)


@settings(max_examples=15)
@given(draws())
def test_tokens_are_those_of_the_reference(settings: dict[str, Any]) -> None:
    check(settings)


@pytest.mark.slow
@settings(max_examples=800, derandomize=False)
@given(draws(max_vocab=3000))
def test_tokens_are_those_of_the_reference_in_a_long_sweep(settings: dict[str, Any]) -> None:
    check(settings)


@pytest.mark.parametrize("levels", [0, 1])
def test_a_vocabulary_of_several_blocks(levels: int) -> None:
    """With few levels, the edges of top-k and top-p lie among equal scores in several blocks."""
    check({
        "vocab": 2500, "spread": 2.0, "levels": levels, "minus_infinity": True, "temperature": 0.8, "top_k": 1200,
        "top_p": 0.8, "min_p": 0.0, "repetition_penalty": 1.2, "data": 3,
    }, rows=2)  # fmt: skip


def test_top_p_cuts_equal_scores_in_the_order_of_their_ids() -> None:
    """Half of two equal scores is the first: its weight is all that is before the second."""
    actual, expected = (sample_instruction(torch.zeros(2), top_p=0.5) for _ in range(2))
    for ins in (actual, expected):
        ins.row_mask[5:] = 0
        ins.tensors["top_p"][4] = 0.51
    TRITON["sample"](actual)
    sample(expected)
    assert actual.tensors["next_token"].tolist() == expected.tensors["next_token"].tolist()
    assert actual.tensors["next_token"][:5].tolist() == [0, 0, 0, 0, 1]  # 1, 1, 1, 0, 1 without the cut


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zeros_of_either_sign_are_equal(sign: float) -> None:
    logits = torch.tensor([-0.0, 0.0, -0.0, -1.0]) * sign
    for changes in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}):
        actual, expected = (sample_instruction(logits, **changes) for _ in range(2))
        for ins in (actual, expected):
            ins.row_mask[2:] = 0
        TRITON["sample"](actual)
        sample(expected)
        assert actual.tensors["next_token"].tolist() == expected.tensors["next_token"].tolist()


@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([1.0, math.nan, 9.0, math.nan], 1),
        ([math.nan] * 4, 0),
        ([1.0, 5.0, math.inf, 2.0], 2),
        ([-math.inf] * 4, 0),
        ([-math.inf] * 3 + [-math.nan], 3),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}])
def test_without_finite_scores_there_is_no_draw(settings: dict[str, float], logits: list[float], token: int) -> None:
    ins = sample_instruction(torch.tensor(logits), **settings)
    TRITON["sample"](ins)
    assert ins.tensors["next_token"].tolist() == [token] * 16


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_adjustments_and_log_probabilities(temperature: float) -> None:
    actual, expected = (adjusted_instruction(3, temperature=temperature) for _ in range(2))
    TRITON["sample"](actual)
    sample(expected)
    assert_samples_alike(actual, expected)
