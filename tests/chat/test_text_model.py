"""The engine behind a scheduler: batches of unlike requests, each answered as it would be alone."""

import dataclasses

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.chat import Completion
from skipkernels.chat.progress import ChatInputs
from skipkernels.chat.text_format import TextPrompt
from skipkernels.chat.text_model import TextModel, exact_match, shared_prefix
from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError, RequestError
from skipkernels.modality.strategy import Strategy
from skipkernels.skipping.policy import DensePolicy, Policy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS = 10
SKIPPING = SkipPolicy(threshold=0.5, span=2, cold_start=0, cold_end=1, warmup_tokens=1, target_ratio=0.3)
POLICIES: dict[float, Policy] = {0.0: DensePolicy(), 0.3: SKIPPING}
DENSE, SKIPS = Strategy(("text",)), Strategy(("text",), 0.3)


class Recorded:
    """A progress that remembers, and gives up after ``patience`` pieces."""

    def __init__(self, patience: int = 1000) -> None:
        self.pieces: list[str] = []
        self.restarts = 0
        self.patience = patience

    @property
    def given_up(self) -> bool:
        return len(self.pieces) >= self.patience

    def restart(self) -> None:
        self.restarts += 1

    def add(self, text: str, logprobs: object = ()) -> None:
        self.pieces.append(text)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    module = tiny_module(num_hidden_layers=LAYERS)
    return tiny_engine(module=module, tokenizer=tokenizer, max_batch_size=4, max_seq_len=200)


@pytest.fixture(scope="module")
def model(engine: Engine) -> TextModel:
    return TextModel("tiny", engine, POLICIES, exact_match)


def prompts(count: int) -> list[TextPrompt]:
    return [
        TextPrompt(
            tuple(random_prompt(5 + 3 * number, seed=number)),
            max_new_tokens=10 + 17 * number,
            sampling=SamplingParams(temperature=1.2, seed=number),
            stop=("e", "qu") if number % 2 else (),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("strategy", [DENSE, SKIPS])
def test_each_request_of_a_batch_is_answered_as_the_engine_answers_it_alone(
    model: TextModel, engine: Engine, strategy: Strategy
) -> None:
    asked = prompts(4)
    progress = [Recorded() for _ in asked]
    batch = [ChatInputs({"text": prompt}, one) for prompt, one in zip(asked, progress, strict=True)]
    answers = model.run(batch, strategy)
    for prompt, one, answer in zip(asked, progress, answers, strict=True):
        (alone,) = engine.generate(
            [prompt.token_ids],
            max_new_tokens=prompt.max_new_tokens,
            sampling=prompt.sampling,
            stop=prompt.stop,
            policy=POLICIES[strategy.skip_level],
        )
        reason = "length" if alone.finish_reason == "length" else "stop"
        assert answer == Completion(
            alone.text, reason, alone.prompt_tokens, len(alone.token_ids), pytest.approx(alone.skip_ratio)
        )
        assert "".join(one.pieces) == alone.text
        assert one.restarts == 1
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert (max(answer.skip_ratio for answer in answers) > 0) == (strategy == SKIPS)


def test_an_end_of_sequence_ends_one_row_only(
    model: TextModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [dataclasses.replace(prompt, stop=(), max_new_tokens=20) for prompt in prompts(2)]
    (alone,) = engine.generate([asked[0].token_ids], max_new_tokens=20, sampling=asked[0].sampling)
    end = alone.token_ids[5]
    monkeypatch.setattr(engine, "default_eos_token_ids", (end,))
    first, _ = model.run([{"text": prompt} for prompt in asked], DENSE)
    assert first.finish_reason == "stop"
    assert first.new_tokens == alone.token_ids.index(end) + 1
    assert alone.text.startswith(first.text)
    assert len(first.text) < len(alone.text)


def test_who_gives_up_ends_early_and_others_do_not(model: TextModel) -> None:
    asked = [dataclasses.replace(prompt, stop=(), max_new_tokens=30) for prompt in prompts(2)]
    batch = [ChatInputs({"text": asked[0]}, Recorded(patience=3)), ChatInputs({"text": asked[1]}, Recorded())]
    left, stayed = model.run(batch, DENSE)
    assert left.new_tokens == 3
    assert stayed.new_tokens == 30


def test_the_fingerprint_tells_weights_and_policies_apart(model: TextModel, engine: Engine) -> None:
    same = TextModel("another name", engine, dict(POLICIES), shared_prefix)
    other = TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: dataclasses.replace(SKIPPING, span=3)}, exact_match)
    assert same.fingerprint == model.fingerprint != other.fingerprint
    assert model.fingerprint.startswith(engine.fingerprint)


@pytest.mark.parametrize("policies", [{0.0: SKIPPING}, {0.2: DensePolicy()}])
def test_only_level_0_skips_nothing(engine: Engine, policies: dict[float, Policy]) -> None:
    with pytest.raises(PolicyError, match="only level 0 skips nothing"):
        TextModel("tiny", engine, policies, exact_match)


def test_a_model_without_a_tokenizer_cannot_chat() -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        TextModel("tiny", tiny_engine(), {0.0: DensePolicy()}, exact_match)


@pytest.mark.parametrize(
    ("text", "exact", "prefix"),
    [(" 404\n", 1, 0), ("404", 1, 1), ("405", 0, 2 / 3), ("", 0, 0), ("40", 0, 2 / 3), ("4041", 0, 1)],
)
def test_metrics(text: str, exact: float, prefix: float) -> None:
    assert exact_match(text, "404") == exact
    assert shared_prefix(text, "404") == prefix
    assert shared_prefix("", "") == 1
