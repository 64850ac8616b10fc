"""Multimodal models: greedy tokens are transformers' for every subset, and what is left out costs nothing."""

import copy
import dataclasses
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from skipkernels.chat.chat import Chat
from skipkernels.chat.multimodal.multimodal_model import MultimodalModel
from skipkernels.chat.text_model import exact_match, shared_prefix
from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import ModelError, PolicyError, RequestError
from skipkernels.modality.strategy import Strategy
from skipkernels.skipping.policy import DensePolicy, Policy, SkipPolicy
from tests.chat.multimodal.chats import chat_of, stock_inputs, stock_tokens
from tests.models import tiny_module
from tests.multimodal import MULTIMODAL, tiny_multimodal
from tests.tolerances import assert_close

SKIPPING = SkipPolicy(
    threshold=0.9, span=1, first_dense_layers=0, last_dense_layers=0, warmup_tokens=2, target_ratio=0.2
)
POLICIES: dict[float, Policy] = {0.0: DensePolicy(), 0.2: SKIPPING}
STRATEGIES = [
    (family, Strategy(("text", *kept)))
    for family, subsets in {
        "llava": [(), ("image",)],
        "qwen2 audio": [(), ("audio",)],
        "qwen2.5 omni": [(), ("image",), ("audio",), ("audio", "image")],
    }.items()
    for kept in subsets
]
families = pytest.mark.parametrize("family", MULTIMODAL)
strategies = pytest.mark.parametrize(("family", "strategy"), STRATEGIES, ids=lambda value: str(value))


@cache
def stock(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    return tiny_multimodal(family)


@cache
def served(family: str) -> MultimodalModel:
    module, processor = stock(family)
    return build(copy.deepcopy(module), processor)


def build(
    module: PreTrainedModel, processor: ProcessorMixin, policies: dict[float, Policy] = POLICIES
) -> MultimodalModel:
    return MultimodalModel(
        "tiny", module, processor, policies, exact_match, max_seq_len=256, max_batch_size=3, num_threads=1
    )


def tokens_of(model: MultimodalModel, chat: Chat, strategy: Strategy) -> list[int]:
    """What the engine decodes for a chat of more modalities than the strategy keeps."""
    inputs = model.format.request(chat).inputs
    (answer,) = model.run([inputs], strategy)
    prompt_tokens = len(inputs["text"].token_ids[strategy.modalities])
    assert answer.prompt_tokens == prompt_tokens
    return model.engine.state.token_ids[0, prompt_tokens:][: answer.new_tokens].tolist()


@strategies
def test_dense_tokens_are_those_of_transformers(family: str, strategy: Strategy) -> None:
    """The chat holds everything; transformers is given what the strategy keeps, and never sees the rest."""
    model = served(family)
    expected = stock_tokens(*stock(family), chat_of(strategy.modalities))
    assert len(set(expected)) > 4, "the model repeats itself too much to show anything"
    assert tokens_of(model, chat_of(model.modalities), strategy) == expected


@strategies
def test_logits_of_the_first_token_are_those_of_transformers(family: str, strategy: Strategy) -> None:
    module, processor = stock(family)
    model = served(family)
    with torch.inference_mode():
        expected = module(**stock_inputs(processor, chat_of(strategy.modalities))).logits[0, -1]
    prompt = model.prompt(model.format.request(chat_of(model.modalities)).inputs, strategy)
    next(model.engine.stream(prompt, max_new_tokens=1))
    assert_close(model.engine.state.logits[0], expected, "logits after layers, fp32")


@families
def test_requests_of_a_batch_get_what_they_get_alone(family: str) -> None:
    model = served(family)
    for strategy in model.strategies:
        requests = [model.format.request(chat_of(model.modalities, seed)).inputs for seed in range(3)]
        together = model.run(requests, strategy)
        assert together == [model.run([inputs], strategy)[0] for inputs in requests]
        assert len({answer.text for answer in together}) == 3


@families
def test_every_subset_that_keeps_the_text_is_offered_at_every_skip_level(family: str) -> None:
    model = served(family)
    subsets = {strategy.modalities for strategy in model.strategies}
    assert subsets == {strategy.modalities for name, strategy in STRATEGIES if name == family}
    assert len(model.strategies) == len(subsets) * len(POLICIES)


@families
def test_encoders_of_what_is_left_out_do_not_run(family: str) -> None:
    """Their weights are poisoned: what is decoded without them is as before, and with them it is nonsense."""
    module, processor = copy.deepcopy(stock(family)[0]), stock(family)[1]
    towers = {"image": "vision_tower" if family == "llava" else "visual", "audio": "audio_tower"}
    model = build(module, processor)
    for seed, poisoned in enumerate(model.modalities):
        if poisoned == "text":
            continue
        # another one each time, which no cache knows
        request = model.format.request(chat_of(model.modalities, seed=10 * seed)).inputs
        parameters = [p for name, p in module.named_parameters() if f".{towers[poisoned]}." in f".{name}"]
        saved = [parameter.data.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.fill_(float("nan"))
        for strategy in model.strategies:
            embeddings = model.prompt(request, strategy).embeddings
            assert bool(embeddings.isnan().any()) == (poisoned in strategy.modalities)
        for parameter, values in zip(parameters, saved, strict=True):
            parameter.data.copy_(values)


@families
def test_what_is_left_out_has_no_tokens(family: str) -> None:
    model = served(family)
    prompt = model.format.request(chat_of(model.modalities)).inputs["text"]
    everything = len(prompt.token_ids[max(prompt.token_ids, key=len)])
    for subset, token_ids in prompt.token_ids.items():
        assert (len(token_ids) == everything) == (set(subset) == set(model.modalities))
    placeholders = set(prompt.token_ids[max(prompt.token_ids, key=len)]) - set(prompt.token_ids[("text",)])
    assert not placeholders & set(prompt.token_ids[("text",)])


@families
def test_a_skip_level_is_its_policy(family: str) -> None:
    model = served(family)
    request = model.format.request(chat_of(model.modalities, max_new_tokens=80)).inputs
    for strategy in model.strategies:
        (answer,) = model.run([request], strategy)
        assert answer.skip_ratio == pytest.approx(strategy.skip_level, abs=0.01)
        assert (answer.skip_ratio == 0.0) == (strategy.skip_level == 0.0)


def test_sampling_and_stop_strings_are_the_chats() -> None:
    model = served("llava")
    strategy = Strategy(("image", "text"))
    chat = chat_of(("text", "image"))
    (greedy,) = model.run([model.format.request(chat).inputs], strategy)
    sampled = dataclasses.replace(chat, sampling=SamplingParams(temperature=1.5, seed=7))
    (other,) = model.run([model.format.request(sampled).inputs], strategy)
    assert other.text != greedy.text
    stop = greedy.text[len(greedy.text) // 2]
    stopped = dataclasses.replace(chat, stop=(stop,))
    (shorter,) = model.run([model.format.request(stopped).inputs], strategy)
    assert shorter.text == greedy.text[: greedy.text.index(stop)]
    assert shorter.finish_reason == "stop"


def test_the_score_is_the_metric() -> None:
    module, processor = tiny_multimodal("llava")
    model = MultimodalModel(
        "tiny", module, processor, POLICIES, shared_prefix, max_seq_len=128, max_batch_size=1, num_threads=1
    )
    (answer,) = model.run([model.format.request(chat_of(("text",))).inputs], Strategy(("text",)))
    assert model.score(answer, answer.text) == 1.0
    assert 0.0 < model.score(answer, answer.text + answer.text) < 1.0


def test_half_precision() -> None:
    module, processor = tiny_multimodal("qwen2.5 omni", dtype=torch.bfloat16)
    model = build(module, processor)
    assert model.dtype == "bf16"
    request = model.format.request(chat_of(model.modalities)).inputs
    for strategy in model.strategies:
        assert model.run([request], strategy)[0].new_tokens == 16


@pytest.fixture
def fresh() -> tuple[PreTrainedModel, ProcessorMixin]:
    return tiny_multimodal("qwen2.5 omni")


def test_the_fingerprint_tells_weights_and_policies_apart(fresh: tuple[PreTrainedModel, ProcessorMixin]) -> None:
    module, processor = fresh
    other_encoder = copy.deepcopy(module)
    bias = next(p for name, p in other_encoder.named_parameters() if "audio_tower" in name and name.endswith("bias"))
    bias.data += 1.0
    other_decoder = copy.deepcopy(module)
    other_decoder.get_decoder().norm.weight.data += 1.0
    same = copy.deepcopy(module)
    models = [
        build(module, processor),
        build(other_encoder, processor),
        build(other_decoder, processor),
        build(copy.deepcopy(stock("qwen2.5 omni")[0]), processor, {0.0: DensePolicy()}),
    ]
    assert len({model.fingerprint for model in models}) == 4
    assert build(same, processor).fingerprint == models[0].fingerprint


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({0.0: SKIPPING}, "only level 0 skips nothing"),
        ({0.5: DensePolicy()}, "only level 0 skips nothing"),
        ({0.2: dataclasses.replace(SKIPPING, last_dense_layers=9)}, "leave nothing to skip"),
    ],
)
def test_policies_that_cannot_be_leave_the_module_whole(
    fresh: tuple[PreTrainedModel, ProcessorMixin], policies: dict[float, Policy], message: str
) -> None:
    module, processor = fresh
    decoder = module.get_decoder()
    with pytest.raises(PolicyError, match=message):
        build(module, processor, policies)
    assert module.get_decoder() is decoder


def test_a_batch_larger_than_the_engine_is_refused() -> None:
    model = served("llava")
    inputs = model.format.request(chat_of(model.modalities)).inputs
    with pytest.raises(RequestError, match="4 prompts do not fit max_batch_size=3"):
        model.run([inputs] * 4, model.strategies[0])


def test_a_model_of_text_is_not_served_here(fresh: tuple[PreTrainedModel, ProcessorMixin]) -> None:
    with pytest.raises(ModelError, match="'llama' is not served as a multimodal model; served are llava, qwen2_audio"):
        build(tiny_module(), fresh[1])
