"""Right answers, or fidelity to the model at its fullest, and times of requests whose work is 1."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.scoring import score
from skipkernels.chat.chat import Chat, Completion, Message
from skipkernels.chat.chat_profile import (
    QUICK,
    THOROUGH,
    ChatSample,
    Effort,
    profile_of_samples,
    profile_of_texts,
    with_own_answers,
)
from skipkernels.chat.neuron_levels import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    keep_policies,
    kept_policies,
    measured_kl,
    neuron_policies,
)
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS, PROFILED_PROMPT_TOKENS
from skipkernels.chat.text_model import TextModel, exact_match, shared_prefix
from skipkernels.chat.when_idle import WhenIdle
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.job import Request
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from tests.models import tiny_engine, tiny_module

TEXT = "".join(f"Line {number}: the quick brown fox jumps over {number * 7919 % 1000} dogs.\n" for number in range(40))
SKIPPING = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=1, target_ratio=0.3)
QUICKEST = Effort(passages=10, rounds=2, batch_sizes=(1,), memory=False)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    module = tiny_module(num_hidden_layers=10)
    return tiny_engine(module=module, tokenizer=tokenizer, max_batch_size=2, max_seq_len=200)


@pytest.fixture(scope="module")
def model(engine: Engine) -> TextModel:
    return TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: SKIPPING}, shared_prefix)


class Noted:
    """A model that tells which batches it ran."""

    def __init__(self, model: TextModel) -> None:
        self.batches: list[list[Request]] = []
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def run(self, batch: list[Request], strategy: object) -> list[Completion]:
        self.batches.append(batch)
        return self._model.run(batch, strategy)  # type: ignore[arg-type]


def test_the_dense_model_is_the_measure(model: TextModel) -> None:
    profile = profile_of_texts(model, [TEXT], QUICKEST, 2)
    profile.check(model)
    dense, skipping = profile.strategies
    assert (dense.strategy.name, dense.accuracy, dense.samples) == ("text@0", 1.0, 10)
    assert 0.0 <= skipping.accuracy < 1.0
    assert [timing.batch_size for timing in dense.timings] == [1, 2]
    assert profile.source == "measured on 10 samples; accuracy: agreement with text@0"


def test_passages_cost_1_and_are_spread_over_the_text(model: TextModel) -> None:
    noted = Noted(model)
    profile_of_texts(noted, [TEXT], QUICKEST, 2)  # type: ignore[arg-type]
    prompts = {inputs["text"] for batch in noted.batches for inputs in batch}  # type: ignore[index]
    assert len({prompt.token_ids for prompt in prompts}) == 10
    for prompt in prompts:
        assert (len(prompt.token_ids), prompt.max_new_tokens) == (PROFILED_PROMPT_TOKENS, PROFILED_NEW_TOKENS)


def samples_of(model: TextModel, *questions: str, tokens: int) -> list[ChatSample]:
    chats = [Chat((Message("user", (question,)),), max_new_tokens=tokens) for question in questions]
    return [ChatSample(model.format.request(chat)) for chat in chats]


def test_right_answers_are_the_measure_where_they_are_known(engine: Engine) -> None:
    model = TextModel("tiny", engine, {0.3: SKIPPING}, exact_match)  # needs no dense strategy then
    one, other = samples_of(model, "The quick", "The slow", tokens=8)
    (answer,) = model.run([one.request.inputs], model.strategies[0])
    samples = [ChatSample(one.request, answer.text), ChatSample(other.request, "something else")]
    profile = profile_of_samples(model, samples, QUICKEST, 1)
    assert [(entry.accuracy, entry.samples) for entry in profile.strategies] == [(0.5, 2)]
    assert profile.source == "measured on 2 samples; accuracy: right answers"


def test_times_are_those_of_a_work_of_1(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(model, "The quick", "The slow", tokens=8)
    work = sum(sample.request.work for sample in samples) / 2
    assert work < 0.5
    monkeypatch.setattr("skipkernels.modality.profiler._Profiler._time", lambda *_: 7.0)
    profile = profile_of_samples(model, samples, QUICKEST, 2)
    assert [timing.median_ms for entry in profile.strategies for timing in entry.timings] == [
        pytest.approx(7.0 / work)
    ] * 4


def test_its_own_answers_are_those_with_nothing_left_out(model: TextModel, engine: Engine) -> None:
    samples = with_own_answers(model, samples_of(model, "One", "Two", "Three", tokens=20), 2)
    for sample, question in zip(samples, ("One", "Two", "Three"), strict=True):
        (alone,) = engine.generate(question, max_new_tokens=20)
        assert sample.expected == alone.text


def test_without_a_dense_strategy_there_is_nothing_to_compare_with(engine: Engine) -> None:
    model = TextModel("tiny", engine, {0.3: SKIPPING}, shared_prefix)
    with pytest.raises(ProfileError, match="text@0, which is not among tiny's strategies"):
        profile_of_texts(model, [TEXT], QUICKEST, 2)


def test_a_text_without_two_passages_is_refused(model: TextModel) -> None:
    with pytest.raises(RequestError, match="at least"):
        profile_of_texts(model, ["short"], QUICKEST, 2)


@pytest.mark.parametrize(
    ("effort", "largest", "sizes"),
    [(QUICK, 1, [1]), (QUICK, 8, [1, 8]), (THOROUGH, 6, [1, 2, 4, 6]), (THOROUGH, 16, [1, 2, 4, 8, 16])],
)
def test_the_largest_batch_is_measured(effort: Effort, largest: int, sizes: list[int]) -> None:
    assert effort.sizes(largest) == sizes


def neuron_model(tokenizer: PreTrainedTokenizerBase) -> TextModel:
    module = tiny_module(num_hidden_layers=4)
    engine = Engine.from_pretrained(module, tokenizer=tokenizer, max_batch_size=2, max_seq_len=200, neuron_rows=True)
    return TextModel("tiny", engine, {0.0: DensePolicy()}, shared_prefix, (0.1, 0.3))


def test_open_levels_become_neurons_and_cost_what_was_measured(tokenizer: PreTrainedTokenizerBase) -> None:
    model = neuron_model(tokenizer)
    model.offer(neuron_policies(model.engine, [TEXT], model.open_levels))
    profile = profile_of_texts(model, [TEXT], QUICKEST, 2)
    assert [entry.strategy.name for entry in profile.strategies] == ["text@0", "text@0.1", "text@0.3"]
    dense, little, much = (entry.kl for entry in profile.strategies)
    assert dense is None
    assert little is not None
    assert much is not None
    assert 0.0 < little < much
    (answer,) = model.run([samples_of(model, "The quick brown", tokens=64)[0].request.inputs], model.strategies[2])
    assert answer.skip_ratio == pytest.approx(0.3, abs=0.02), "neurons count where their bytes are not read"


def test_a_divergence_is_the_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """Against torch's own, on logits of the whole passage at once, with the same neurons left out."""
    model = neuron_model(tokenizer)
    policies = {0.0: DensePolicy(), 0.3: neuron_policies(model.engine, [TEXT], (0.3,))[0.3]}
    (kl,) = measured_kl(model.engine, policies, [TEXT]).values()
    _, held_out = cut_passages(model.engine, [TEXT], 32, PROMPT_TOKENS, NEW_TOKENS)
    dense = score(model.engine, held_out, policies[0.0], keep_log_probs=True)
    other = score(model.engine, held_out, policies[0.3], keep_log_probs=True)
    pairs = [(d.all_log_probs, o.all_log_probs) for d, o in zip(dense, other, strict=True)]
    expected = [torch.nn.functional.kl_div(o, d, log_target=True, reduction="batchmean") for d, o in pairs]
    assert kl == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)


def test_requests_come_between_two_readings(tokenizer: PreTrainedTokenizerBase) -> None:
    """Somebody asks all the time; what is measured is what it is alone."""
    model = neuron_model(tokenizer)
    alone = neuron_policies(model.engine, [TEXT], (0.3,))
    asking, asked = threading.Event(), []

    def ask() -> None:
        while not asking.is_set():
            asked.append(model.engine.generate("The quick", max_new_tokens=3))
            asking.wait(0.01)

    busy = threading.Thread(target=ask)
    busy.start()
    try:
        beside = neuron_policies(model.engine, [TEXT], (0.3,), WhenIdle(lambda: not model.engine.loop.idle, 0.0))
    finally:
        asking.set()
        busy.join()
    assert asked
    assert beside == alone


def test_a_level_that_was_compared_is_kept_when_somebody_asks(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = neuron_model(tokenizer)
    policies = {0.0: DensePolicy(), **neuron_policies(model.engine, [TEXT], model.open_levels)}
    alone = measured_kl(model.engine, policies, [TEXT])
    scored: list[str] = []
    asks = False

    def noted(engine: Engine, passages: object, policy: Policy, *, check: Callable[[], None], **rest: Any) -> object:
        nonlocal asks
        scored.append(f"{policy.target_ratio:g}" if isinstance(policy, NeuronPolicy) else "dense")
        asks = len(scored) == 3  # while the second level is compared
        try:
            return score(engine, passages, policy, check=check, **rest)  # type: ignore[arg-type]
        finally:
            asks = False

    monkeypatch.setattr("skipkernels.chat.neuron_levels.score", noted)
    assert measured_kl(model.engine, policies, [TEXT], WhenIdle(lambda: asks, 0.0)) == alone
    assert scored == ["dense", "0.1", "0.3", "0.3"]


def test_thresholds_are_kept_for_the_same_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = neuron_model(tokenizer)
    policies: dict[float, Policy] = {0.2: NeuronPolicy(product_thresholds=(0.1,) * 4, target_ratio=0.2)}
    assert kept_policies(model.engine, (0.2,)) is None
    keep_policies(model.engine, policies)
    assert kept_policies(model.engine, (0.2,)) == policies
    assert kept_policies(model.engine, (0.2, 0.3)) is None
    other = tiny_engine(module=tiny_module(num_hidden_layers=4, seed=1), tokenizer=tokenizer, max_seq_len=64)
    assert kept_policies(other, (0.2,)) is None
