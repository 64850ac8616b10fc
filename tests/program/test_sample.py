"""The sample op against transformers' logits processors, and its draws against the distribution they leave."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skipkernels.program.reference import adjusted_scores, kept_tokens, penalised_scores, sample
from skipkernels.program.table import Instruction, instruction
from tests.program.native import run_natively
from tests.tolerances import assert_close

VOCAB = 61


@given(
    seed=st.integers(0, 1 << 20),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
)
def test_filters_are_those_of_transformers(
    seed: int, penalty: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, generator=generator) * 3
    seen_ids = torch.randint(VOCAB, (9,), generator=generator)
    stock = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    stock += [TopKLogitsWarper(top_k)] if top_k else []
    stock += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    stock += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(stock)(seen_ids[None], logits[None].clone())[0]

    seen = torch.zeros(VOCAB, dtype=torch.uint8)
    seen[seen_ids] = 1
    scores = penalised_scores(logits, seen, torch.tensor(penalty)) / torch.tensor(temperature)
    kept = kept_tokens(scores, top_k, top_p, min_p)
    assert torch.equal(kept, expected.isfinite())
    assert_close(scores[kept], expected[kept], "fp32")


def sample_instruction(logits: torch.Tensor, **settings: Any) -> Instruction:
    """A sample instruction over 16 rows of the same ``logits`` [vocab]."""
    rows = 16
    operands: dict[str, torch.Tensor] = {
        "logits": logits.repeat(rows, 1),
        "seen": torch.zeros(rows, logits.numel(), dtype=torch.uint8),
        "num_generated": torch.zeros(rows, dtype=torch.int32),
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "repetition_penalty": torch.ones(rows),
        "adjusts": torch.zeros(rows, dtype=torch.int32),
        "logit_bias": torch.zeros(rows, logits.numel()),
        "frequency_penalty": torch.zeros(rows),
        "presence_penalty": torch.zeros(rows),
        "token_mask": torch.zeros(rows, -(-logits.numel() // 32), dtype=torch.int32),
        "num_logprobs": torch.zeros(rows, dtype=torch.int32),
        "logprobs": torch.full((rows, 300, 6), torch.nan),
        "top_tokens": torch.full((rows, 300, 5), -1, dtype=torch.int32),
        "seed": torch.arange(rows),
        "next_token": torch.zeros(rows, dtype=torch.int32),
    }
    for name, value in settings.items():
        operands[name] = operands[name].clone().fill_(value)
    return instruction("sample", row_mask=torch.ones(rows, dtype=torch.int32), **operands)


def test_draws_follow_the_softmax_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    ins = sample_instruction(logits, temperature=0.8)
    counts = torch.zeros(len(logits), dtype=torch.double)
    for step in range(250):
        ins.tensors["num_generated"].fill_(step)
        sample(ins)
        counts += torch.bincount(ins.tensors["next_token"], minlength=len(logits))
    expected = (logits.double() / 0.8).softmax(0) * counts.sum()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded with probability 0.001 by right draws


def test_draws_differ_between_rows_and_steps_and_repeat_with_their_seed() -> None:
    ins = sample_instruction(torch.zeros(1000))
    sample(ins)
    first = ins.tensors["next_token"].clone()
    assert len(first.unique()) > 12
    ins.tensors["num_generated"].fill_(1)
    sample(ins)
    assert (ins.tensors["next_token"] != first).sum() > 12
    ins.tensors["num_generated"].fill_(0)
    sample(ins)
    assert torch.equal(ins.tensors["next_token"], first)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_only_surviving_tokens_are_drawn(settings: dict[str, float]) -> None:
    logits = torch.linspace(0, 4, 20)
    kept = kept_tokens(logits, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings})
    assert 1 < kept.sum() < 8
    ins, drawn = sample_instruction(logits, **settings), set()
    for step in range(20):
        ins.tensors["num_generated"].fill_(step)
        sample(ins)
        drawn.update(ins.tensors["next_token"].tolist())
    assert drawn == set(kept.nonzero()[:, 0].tolist())


def test_temperature_zero_takes_the_first_of_equal_logits() -> None:
    ins = sample_instruction(torch.tensor([0.0, 2.0, 1.0, 2.0]), temperature=0.0)
    sample(ins)
    assert ins.tensors["next_token"].tolist() == [1] * 16


def test_repetition_penalty_decides_greedy_tokens() -> None:
    ins = sample_instruction(torch.tensor([1.0, 1.2, -1.0]), temperature=0.0, repetition_penalty=1.5)
    ins.tensors["seen"][:8, 1] = 1
    sample(ins)
    assert ins.tensors["next_token"].tolist() == [0] * 8 + [1] * 8


def test_top_p_keeps_at_least_the_likeliest_token() -> None:
    assert kept_tokens(torch.tensor([math.log(0.9), math.log(0.1)]), 0, 1e-6, 0.0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([1.0, math.nan, 9.0, math.nan], 1),
        ([math.nan] * 4, 0),
        ([1.0, 5.0, math.inf, 2.0], 2),
        ([-math.inf] * 4, 0),
    ],
)
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}]
)
@pytest.mark.parametrize("run", [sample, run_natively], ids=["reference", "native"])
def test_without_finite_scores_there_is_no_draw(
    run: Callable[[Instruction], None], settings: dict[str, float], logits: list[float], token: int
) -> None:
    ins = sample_instruction(torch.tensor(logits), **settings)
    run(ins)
    assert ins.tensors["next_token"].tolist() == [token] * 16


def adjusted_instruction(seed: int, vocab: int = 70, **settings: Any) -> Instruction:
    """Rows with bias, counts, masks and logprobs of all kinds, some of each switched off."""
    generator = torch.Generator().manual_seed(seed)

    def randint(below: int, *shape: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator).to(kind)

    ins = sample_instruction(torch.randn(vocab, generator=generator) * 2, **settings)
    t, rows = ins.tensors, 16
    t["logits"].add_(torch.randn(rows, vocab, generator=generator))
    t["seen"].copy_(randint(10, rows, vocab, kind=torch.uint8) * randint(2, rows, vocab, kind=torch.uint8))
    t["num_generated"].copy_(randint(300, rows))
    t["adjusts"].copy_(torch.arange(rows) % 8)
    t["logit_bias"].copy_(torch.randn(rows, vocab, generator=generator) * 3)
    t["frequency_penalty"].copy_(torch.randn(rows, generator=generator))
    t["presence_penalty"].copy_(torch.randn(rows, generator=generator))
    t["token_mask"].copy_(torch.randint(-(1 << 31), 1 << 31, t["token_mask"].shape, generator=generator))
    t["repetition_penalty"].fill_(1.3)
    t["num_logprobs"].copy_(randint(7, rows))
    return ins


def assert_samples_alike(actual: Instruction, expected: Instruction) -> None:
    """Same tokens; log probabilities to the last bits of a sum in another order."""
    for name in ("next_token", "top_tokens"):
        assert torch.equal(actual.tensors[name], expected.tensors[name]), name
    torch.testing.assert_close(
        actual.tensors["logprobs"], expected.tensors["logprobs"], rtol=1e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_native_rows_adjust_and_tell_as_the_reference_does(seed: int, temperature: float) -> None:
    settings = {"temperature": temperature, "top_k": 40 * (seed % 2), "top_p": 0.9}
    actual, expected = (adjusted_instruction(seed, **settings) for _ in range(2))
    run_natively(actual)
    sample(expected)
    assert_samples_alike(actual, expected)


def test_adjustments_are_those_of_others() -> None:
    """Bias and repetition penalty as transformers applies them, in its order; frequency and presence by OpenAI's
    formula; what the mask forbids cannot be chosen."""
    ins = adjusted_instruction(5)
    t, vocab = ins.tensors, 70
    for row in range(16):
        adjusts, seen = row % 8, t["seen"][row]
        stock = LogitsProcessorList()
        if adjusts & 1:
            bias = {(token,): float(t["logit_bias"][row, token]) for token in range(vocab)}
            stock.append(SequenceBiasLogitsProcessor(bias))
        stock.append(RepetitionPenaltyLogitsProcessor(1.3))
        expected = stock(seen.nonzero()[:, 0][None], t["logits"][row][None].clone())[0]
        if adjusts & 2:
            for token in range(vocab):
                if times := int(seen[token]) // 2:
                    expected[token] -= times * t["frequency_penalty"][row] + t["presence_penalty"][row]
        if adjusts & 4:
            words = t["token_mask"][row].tolist()
            for token in range(vocab):
                if not (words[token // 32] >> (token % 32)) & 1:
                    expected[token] = -math.inf
        torch.testing.assert_close(adjusted_scores(t, row), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [sample, run_natively], ids=["reference", "native"])
def test_logprobs_are_of_the_models_own_logits(run: Callable[[Instruction], None]) -> None:
    ins = adjusted_instruction(6)
    run(ins)
    t = ins.tensors
    for row in range(16):
        step, count = int(t["num_generated"][row]), int(t["num_logprobs"][row])
        expected = torch.log_softmax(t["logits"][row], 0)
        values, tokens = expected.topk(max(0, count - 1))
        told = t["logprobs"][row, step]
        assert told.isnan().sum() == 6 - count
        if count:
            torch.testing.assert_close(told[0], expected[int(t["next_token"][row])], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(told[1:count] if count else told[:0], values, rtol=1e-5, atol=1e-5)
        assert t["top_tokens"][row, step, : max(0, count - 1)].tolist() == tokens.tolist()
        assert t["logprobs"][row, :step].isnan().all()


def test_what_the_mask_leaves_is_all_that_is_drawn() -> None:
    ins = sample_instruction(torch.linspace(9, 0, 70), temperature=2.0, adjusts=4)
    ins.tensors["token_mask"].zero_()
    ins.tensors["token_mask"][:, 2] = 0b101000  # tokens 67 and 69
    drawn = set()
    for step in range(20):
        ins.tensors["num_generated"].fill_(step)
        run_natively(ins)
        drawn.update(ins.tensors["next_token"].tolist())
    assert drawn == {67, 69}
