"""Fidelity to the dense model, measured on text without answers."""

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.engine import Engine
from skipkernels.policy import DensePolicy, SkipPolicy
from skipkernels.serving.chat.text_format import PROFILED_NEW_TOKENS
from skipkernels.serving.chat.text_model import TextModel, shared_prefix
from skipkernels.serving.chat.text_profile import Effort, dense_continuations, measure_text_profile
from skipkernels.serving.errors import ProfileError
from tests.models import tiny_engine, tiny_module

TEXT = "".join(f"Line {number}: the quick brown fox jumps over {number * 7919 % 1000} dogs.\n" for number in range(40))
SKIPPING = SkipPolicy(threshold=0.5, span=2, cold_start=0, warmup_tokens=1, target_ratio=0.3)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    module = tiny_module(num_hidden_layers=10)
    return tiny_engine(module=module, tokenizer=tokenizer, max_batch_size=2, max_seq_len=200)


@pytest.fixture(scope="module")
def model(engine: Engine) -> TextModel:
    return TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: SKIPPING}, shared_prefix)


def test_the_dense_model_is_the_measure(model: TextModel) -> None:
    profile = measure_text_profile(model, [TEXT], Effort(samples=10, rounds=2, memory=False))
    profile.check(model)
    dense, skipping = profile.strategies
    assert (dense.strategy.name, dense.accuracy, dense.samples) == ("text@0", 1.0, 10)
    assert 0.0 <= skipping.accuracy < 1.0
    assert [timing.batch_size for timing in dense.timings] == [1, 2]


def test_samples_cost_1_and_are_spread_over_the_text(model: TextModel, engine: Engine) -> None:
    samples = dense_continuations(model, [TEXT], 10)
    prompts = [sample.inputs["text"] for sample in samples]
    assert len({prompt.token_ids for prompt in prompts}) == 10
    for sample, prompt in zip(samples, prompts, strict=True):
        cost = prompt.max_new_tokens + model.prefill_share * len(prompt.token_ids)
        assert cost == pytest.approx(PROFILED_NEW_TOKENS, abs=0.5) or prompt.max_new_tokens == 1
        (alone,) = engine.generate([prompt.token_ids], max_new_tokens=prompt.max_new_tokens)
        assert sample.expected == alone.text


def test_without_a_dense_strategy_there_is_nothing_to_compare_with(engine: Engine) -> None:
    model = TextModel("tiny", engine, {0.3: SKIPPING}, shared_prefix)
    with pytest.raises(ProfileError, match="fidelity is measured against the dense model"):
        dense_continuations(model, [TEXT], 10)
