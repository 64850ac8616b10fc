"""Right answers, or fidelity to the model at its fullest, and times of requests whose work is 1."""

import pytest
from transformers import PreTrainedTokenizerBase

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
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS, PROFILED_PROMPT_TOKENS
from skipkernels.chat.text_model import TextModel, exact_match, shared_prefix
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.job import Request
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
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
