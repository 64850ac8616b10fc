"""Every argument of ``generate`` that changes transformers' output is honoured by ``hf_generate``, or refused."""

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skipkernels import SkipkernelsError, hf_generate
from skipkernels.errors import RequestError
from tests.models import byte_tokenizer, random_prompt, stock_tokens, tiny_module

PROMPTS = [random_prompt(length, seed=length) for length in (9, 4, 6)]


def both(module: PreTrainedModel, prompts: list[list[int]] = PROMPTS[:1], **options: Any) -> tuple[Any, Any]:
    """What our loop and transformers' own give."""
    return generate(module, prompts, True, **options), generate(module, prompts, False, **options)


def generate(module: PreTrainedModel, prompts: list[list[int]], ours: bool, **options: Any) -> torch.Tensor:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    loop = {"custom_generate": hf_generate, "skip_threads": 1} if ours else {}
    defaults = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    return module.generate(ids, **defaults | options | loop)


class Own(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -scores


class StrongerPenalty(RepetitionPenaltyLogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids, super().__call__(input_ids, scores))


class Colder(TemperatureLogitsWarper):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


POSITIONS = torch.arange(9)[None]

REFUSED: list[dict[str, Any]] = [
    {"position_ids": POSITIONS * 2},
    {"position_ids": POSITIONS + 5},
    {"position_ids": POSITIONS.flip(1)},
    {"position_ids": torch.zeros(3, 1, 9, dtype=torch.long)},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"prompt_lookup_num_tokens": 3},
    {"num_beams": 3},
    {"num_beams": 2, "do_sample": True},
    {"output_scores": True, "return_dict_in_generate": True},
    {"output_hidden_states": True, "return_dict_in_generate": True},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.3},
    {"bad_words_ids": [[3]]},
    {"suppress_tokens": [3]},
    {"begin_suppress_tokens": [3]},
    {"forced_bos_token_id": 3},
    {"forced_eos_token_id": 3},
    {"min_new_tokens": 4, "eos_token_id": 3},
    {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
    {"sequence_bias": {(3,): 9.0}},
    {"guidance_scale": 2.0},
    {"prefix_allowed_tokens_fn": lambda *_: [3, 4]},
    {"do_sample": True, "typical_p": 0.5},
    {"do_sample": True, "epsilon_cutoff": 0.1},
    {"do_sample": True, "eta_cutoff": 0.1},
    {"do_sample": True, "top_h": 0.4},
    {"cache_implementation": "quantized"},
    {"past_key_values": DynamicCache()},
    {"logits_processor": LogitsProcessorList([Own()])},
    {"logits_processor": LogitsProcessorList([StrongerPenalty(1.8)])},
    {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=4)])},
    {"logits_processor": LogitsProcessorList([Colder(0.5)]), "do_sample": True},
    {"logits_processor": LogitsProcessorList([TopKLogitsWarper(4, filter_value=-1.0)]), "do_sample": True},
    {"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5, min_tokens_to_keep=5)]), "do_sample": True},
    {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.5, min_tokens_to_keep=5)]), "do_sample": True},
    {
        "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5), TemperatureLogitsWarper(0.5)]),
        "do_sample": True,
        "top_k": 0,
    },
    {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(value) for value in (1.2, 1.3)])},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: " ".join(options))
def test_what_is_not_honoured_is_refused(options: dict[str, Any]) -> None:
    module = tiny_module()
    with pytest.raises((SkipkernelsError, ImportError, ValueError)) as caught:  # some by transformers itself
        generate(module, PROMPTS[:1], True, **options)
    if not isinstance(caught.value, SkipkernelsError):
        with pytest.raises(type(caught.value)):
            generate(module, PROMPTS[:1], False, **options)
    assert generate(module, PROMPTS[:1], True)[0, 9:].tolist() == stock_tokens(module, PROMPTS[0], 16)


HONOURED: list[dict[str, Any]] = [
    {"position_ids": POSITIONS},
    {"repetition_penalty": 1.7},
    {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"num_return_sequences": 1},
    {"renormalize_logits": True},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.2, "min_p": 0.4},
    {"eos_token_id": [3, 216]},
    {"max_length": 14, "max_new_tokens": None},
    {"min_length": 2},
    {"logits_to_keep": 1},
    {"return_dict_in_generate": True},
    {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.3, pad_token_id=0)},
    {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(12)])},
]


@pytest.mark.parametrize("options", HONOURED, ids=lambda options: " ".join(options))
def test_what_is_honoured_gives_transformers_tokens(options: dict[str, Any]) -> None:
    ours, stock = both(tiny_module(), **options)
    if options.get("return_dict_in_generate"):
        ours, stock = ours.sequences, stock.sequences
    assert torch.equal(ours, stock)


def test_a_penalty_leaves_padding_out_as_transformers_does() -> None:
    ours, stock = both(tiny_module(), PROMPTS, repetition_penalty=1.7)
    assert torch.equal(ours, stock)


class AtToken(StoppingCriteria):
    """Ends a row at a token that is divisible by seven; transformers gives it no scores."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None
        return input_ids[:, -1] % 7 == 0


@pytest.mark.parametrize("eos", [None, 3])
def test_rows_that_a_criterion_ends_go_on_as_in_transformers(eos: int | None) -> None:
    options = {"stopping_criteria": StoppingCriteriaList([AtToken()]), "eos_token_id": eos}
    ours, stock = both(tiny_module(), PROMPTS, **options)
    assert torch.equal(ours, stock)


def test_stop_strings_are_a_criterion_that_has_its_tokenizer() -> None:
    module, tokenizer = tiny_module(), byte_tokenizer()
    token = next(token for token in stock_tokens(module, PROMPTS[0], 16)[3:] if 32 < token < 127)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [chr(token)])])
    ours, stock = both(module, stopping_criteria=criteria)
    assert torch.equal(ours, stock)
    assert ours.shape[1] < 9 + 16
    with pytest.raises(ValueError, match="tokenizer"):
        generate(module, PROMPTS[:1], True, stop_strings=[chr(token)], tokenizer=tokenizer)


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(RequestError, match="padding must stand on the left"):
        tiny_module().generate(
            torch.tensor([[1, 2], [0, 0]]),
            attention_mask=torch.tensor([[1, 1], [0, 0]]),
            custom_generate=hf_generate,
            max_new_tokens=2,
            pad_token_id=0,
        )


def test_length_beyond_the_configuration_is_transformers_under_yarn() -> None:
    module = tiny_module("llama with yarn rope", max_position_embeddings=20)
    ours, stock = both(module, max_new_tokens=40)
    assert torch.equal(ours, stock)
