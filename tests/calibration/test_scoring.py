"""Teacher forcing: the same positions, logits and skips as a generation over the same tokens."""

from typing import Any

import numpy as np
import pytest
import torch

from skipkernels.calibration.forced_reading import read_dense
from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import compare, score
from skipkernels.decoding.own_rows import OwnRows
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

SKIPPING = SkipPolicy(threshold=0.9, span=1, cold_start=0, cold_end=0, warmup_tokens=3)


def passage(prompt_tokens: int, new_tokens: int, seed: int = 0) -> Passage:
    return Passage(tuple(random_prompt(prompt_tokens + new_tokens, seed)), prompt_tokens)


def test_dense_scores_are_the_logits_of_transformers() -> None:
    module = tiny_module("qwen3")
    given = passage(7, 30)
    with torch.inference_mode():
        logits = module(torch.tensor([given.token_ids])).logits[0, 6:-1]
    (result,) = score(tiny_engine(module=module), [given], DensePolicy(), keep_log_probs=True)
    expected = logits.log_softmax(-1)
    assert result.all_log_probs is not None
    torch.testing.assert_close(result.all_log_probs, expected, atol=1e-4, rtol=1e-4)
    assert result.argmax.tolist() == expected.argmax(-1).tolist()
    own = expected[torch.arange(30), torch.tensor(given.token_ids[7:])]
    np.testing.assert_allclose(result.log_probs, own, atol=1e-4)
    assert not result.skip_map.any()


def test_a_forced_generation_skips_and_predicts_as_it_did_when_it_was_free() -> None:
    engine = tiny_engine(policy=SKIPPING)
    prompt = random_prompt(9)
    (generation,) = engine.generate([prompt], max_new_tokens=40, eos_token_ids=())
    (result,) = score(engine, [Passage((*prompt, *generation.token_ids), len(prompt))])
    assert generation.skip_map.any()
    assert result.argmax.tolist() == generation.token_ids
    np.testing.assert_array_equal(result.skip_map, generation.skip_map)
    np.testing.assert_array_equal(result.similarity_map, generation.similarity_map)


def test_passages_of_different_lengths_score_together_as_alone() -> None:
    passages = [passage(3, 20, seed=1), passage(11, 5, seed=2), passage(1, 33, seed=3)]
    together = score(tiny_engine(max_batch_size=2), passages, SKIPPING)
    for given, result in zip(passages, together, strict=True):
        (alone,) = score(tiny_engine(), [given], SKIPPING)
        np.testing.assert_array_equal(result.skip_map, alone.skip_map)
        np.testing.assert_array_equal(result.log_probs, alone.log_probs)


def test_the_engine_generates_as_before_after_scoring() -> None:
    engine = tiny_engine()
    prompt = random_prompt(5)
    before = engine.generate([prompt], max_new_tokens=10)[0].token_ids
    score(engine, [passage(4, 20, seed=9)], SKIPPING)
    assert engine.generate([prompt], max_new_tokens=10)[0].token_ids == before


def test_comparison_counts_positions_past_the_warm_up() -> None:
    engine, given = tiny_engine(), [passage(4, 40)]
    dense = score(engine, given, DensePolicy(), keep_log_probs=True)
    same = compare(dense, score(engine, given, DensePolicy(), reference=dense), warmup_tokens=3)
    assert (same.skip_ratio, same.top1_agreement) == (0.0, 1.0)
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.perplexity == same.dense_perplexity
    skipping = score(engine, given, SKIPPING, reference=dense)
    other = compare(dense, skipping, warmup_tokens=3)
    assert other.skip_ratio == pytest.approx(skipping[0].skip_map.mean())
    assert other.skip_ratio_past_warmup == pytest.approx(other.skip_ratio * 40 / 37)
    assert other.kl > 0.0
    assert skipping[0].kl is not None
    assert skipping[0].kl[:3] == pytest.approx(0.0, abs=1e-6)


def test_dense_similarities_are_those_that_a_decode_measures() -> None:
    engine, given = tiny_engine(), passage(5, 30)
    never = SkipPolicy(threshold=1.0, cold_start=0, cold_end=0)
    (decoded,) = score(engine, [given], never)
    similarities = read_dense(engine, given).similarities
    assert similarities.shape == (30, 4)
    np.testing.assert_allclose(similarities[:, :-1], decoded.similarity_map[:, :-1], atol=1e-5)


def test_a_dense_reading_predicts_as_a_decode() -> None:
    engine, given = tiny_engine(), passage(5, 30)
    (decoded,) = score(engine, [given], DensePolicy(), keep_log_probs=True)
    torch.testing.assert_close(read_dense(engine, given).log_probs, decoded.all_log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens", "message"),
    [(0, 5, "at least one prompt token"), (5, 0, "one token to predict"), (5, 200, "max_seq_len=96")],
)
def test_an_impossible_passage_is_refused(prompt_tokens: int, new_tokens: int, message: str) -> None:
    engine: Engine = tiny_engine()
    with pytest.raises(RequestError, match=message):
        score(engine, [passage(prompt_tokens, new_tokens)])


@pytest.mark.parametrize("checks", [1, 2, 3, 5])
def test_it_ends_before_the_prompt_or_step_at_which_it_is_to_end(monkeypatch: pytest.MonkeyPatch, checks: int) -> None:
    engine = tiny_engine(max_batch_size=2)
    asked, begun = 0, 0
    begin = OwnRows.begin

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == checks:
            raise InterruptedError

    def counted(*args: Any, **rest: Any) -> None:
        nonlocal begun
        begun += 1
        begin(*args, **rest)

    monkeypatch.setattr(OwnRows, "begin", counted)
    steps: list[int] = []
    with pytest.raises(InterruptedError):
        score(engine, [passage(7, 30), passage(7, 30, 1)], DensePolicy(), on_step=steps.append, check=check)
    assert (begun, len(steps)) == (min(2, checks - 1), max(0, checks - 3))
