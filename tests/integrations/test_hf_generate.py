"""``model.generate(custom_generate=skipkernels.hf_generate)``: the same tokens through transformers' own door."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from skipkernels import hf_generate
from skipkernels.errors import RequestError
from skipkernels.skipping.policy import FixedPolicy, SkipPolicy
from tests.models import FAMILIES, random_prompt, stock_tokens, tiny_engine, tiny_module

PROMPT = random_prompt(9)
POLICY = SkipPolicy(threshold=0.8, span=1, cold_start=0, cold_end=0, warmup_tokens=0)


def through_transformers(module: PreTrainedModel, prompts: list[list[int]], **options: Any) -> torch.Tensor:
    """Left-pads the prompts and generates; eos is off unless given."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    defaults: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 16,
        "pad_token_id": 0,
        "custom_generate": hf_generate,
        "skip_threads": 1,
    }
    if "custom_generate" in options and options["custom_generate"] is None:
        defaults.pop("skip_threads")
    return module.generate(ids, attention_mask=mask, **{**defaults, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_tokens_are_those_of_stock_generate(family: str) -> None:
    module = tiny_module(family)
    expected = stock_tokens(module, PROMPT, 16)
    assert through_transformers(module, [PROMPT])[0].tolist() == [*PROMPT, *expected]
    assert stock_tokens(module, PROMPT, 16) == expected  # and the module is as good as before


def test_skipping_tokens_are_those_of_the_engine() -> None:
    (expected,) = tiny_engine(policy=POLICY).generate(PROMPT, max_new_tokens=16)
    assert 0 < expected.skip_ratio < 1
    output = through_transformers(tiny_module(), [PROMPT], skip_policy=POLICY)
    assert output[0, 9:].tolist() == expected.token_ids


def test_a_padded_batch_gives_every_row_its_own_tokens() -> None:
    module, prompts = tiny_module(), [random_prompt(length, seed=length) for length in (9, 3, 6)]
    output = through_transformers(module, prompts)
    assert output.shape == (3, 9 + 16)
    assert [row[9:].tolist() for row in output] == [stock_tokens(module, prompt, 16) for prompt in prompts]
    assert torch.equal(output, through_transformers(module, prompts, custom_generate=None))


def test_rows_that_ended_are_padded_as_in_stock_generate() -> None:
    module, prompts = tiny_module(), [random_prompt(length, seed=length) for length in (9, 3, 6)]
    eos = [stock_tokens(module, prompts[0], 4)[-1], stock_tokens(module, prompts[1], 8)[-1]]
    output, stock = (
        through_transformers(module, prompts, eos_token_id=eos, pad_token_id=258, custom_generate=custom)
        for custom in (hf_generate, None)
    )
    assert torch.equal(output, stock)
    assert (output == 258).any()


@pytest.mark.parametrize("options", [{"max_length": 12, "max_new_tokens": None}, {"max_new_tokens": 1}])
def test_length_limits_are_those_of_transformers(options: dict[str, Any]) -> None:
    module = tiny_module()
    output, stock = (
        through_transformers(module, [PROMPT], custom_generate=custom, **options) for custom in (hf_generate, None)
    )
    assert torch.equal(output, stock)


def test_a_repetition_penalty_is_that_of_stock_generate() -> None:
    module = tiny_module()
    output, stock = (
        through_transformers(module, [PROMPT], repetition_penalty=1.8, custom_generate=custom)
        for custom in (hf_generate, None)
    )
    assert torch.equal(output, stock)
    assert output[0, 9:].tolist() != stock_tokens(module, PROMPT, 16)


def test_sampling_repeats_with_torchs_seed() -> None:
    module, answers = tiny_module(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(
            through_transformers(module, [PROMPT, PROMPT], do_sample=True, temperature=0.9, top_k=40, top_p=0.95)
        )
    first, again, other = answers
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[0].tolist() != first[1].tolist()


def test_top_k_of_one_is_greedy() -> None:
    module = tiny_module()
    output = through_transformers(module, [PROMPT], do_sample=True, top_k=1, temperature=2.0)
    assert output[0, 9:].tolist() == stock_tokens(module, PROMPT, 16)


class Tokens:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_every_token() -> None:
    module, streamer = tiny_module(), Tokens()
    output = through_transformers(module, [PROMPT], skip_streamer=streamer)
    assert streamer.given == [PROMPT, *([token] for token in output[0, 9:].tolist())]
    assert streamer.ended


def test_transformers_own_streamer_prints_the_text(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = through_transformers(tiny_module(), [PROMPT], skip_streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(output[0, 9:]) + "\n"


def test_a_stopping_criterion_of_the_user_is_asked_after_every_token() -> None:
    asked = []

    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            asked.append(input_ids.shape[1])
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9 + 5)

    output = through_transformers(tiny_module(), [PROMPT], stopping_criteria=StoppingCriteriaList([AfterFive()]))
    assert asked == [10, 11, 12, 13, 14]
    assert output[0, 9:].tolist() == stock_tokens(tiny_module(), PROMPT, 5)


def test_a_dictionary_is_returned_where_it_is_asked_for() -> None:
    output = through_transformers(tiny_module(), [PROMPT], return_dict_in_generate=True)
    assert output.sequences[0, 9:].tolist() == stock_tokens(tiny_module(), PROMPT, 16)


def test_a_change_of_the_module_shows() -> None:
    module = tiny_module()
    before = through_transformers(module, [PROMPT])
    with torch.no_grad():
        module.model.norm.weight[:20].mul_(-1)
        module.model.layers[1].mlp.down_proj.weight.mul_(-2)
    after = through_transformers(module, [PROMPT])
    assert after[0, 9:].tolist() == stock_tokens(module, PROMPT, 16)
    assert not torch.equal(before, after)
    module.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(72, 40))
    assert through_transformers(module, [PROMPT])[0, 9:].tolist() == stock_tokens(module, PROMPT, 16)


def test_another_policy_is_used_at_once() -> None:
    module = tiny_module()
    dense = through_transformers(module, [PROMPT])
    assert not torch.equal(dense, through_transformers(module, [PROMPT], skip_policy=FixedPolicy((0, 1, 2, 3), 0)))
    assert torch.equal(dense, through_transformers(module, [PROMPT]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True is not supported"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits=True is not supported"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is not supported; supported are temperature"),
        ({"bad_words_ids": [[3]]}, "NoBadWordsLogitsProcessor is not supported"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper is not supported"),
        ({"skip_policy": FixedPolicy((9,))}, "fixed layer 9 is outside"),
    ],
)
def test_what_is_not_supported_is_an_error(options: dict[str, Any], message: str) -> None:
    module = tiny_module()
    with pytest.raises(ValueError, match=message):
        through_transformers(module, [PROMPT], **options)
    assert through_transformers(module, [PROMPT])[0, 9:].tolist() == stock_tokens(module, PROMPT, 16)


def test_a_streamer_takes_one_sequence() -> None:
    with pytest.raises(RequestError, match="a streamer takes one sequence, got a batch of 2"):
        through_transformers(tiny_module(), [PROMPT, PROMPT], skip_streamer=Tokens())


def test_padding_on_the_right_is_an_error() -> None:
    with pytest.raises(RequestError, match="padding must stand on the left"):
        tiny_module().generate(
            torch.tensor([[1, 2, 3]]),
            attention_mask=torch.tensor([[1, 1, 0]]),
            custom_generate=hf_generate,
            max_new_tokens=4,
            pad_token_id=0,
        )


def test_embeddings_as_input_are_an_error() -> None:
    with pytest.raises(RequestError, match="inputs_embeds is not supported; pass input_ids"):
        tiny_module().generate(
            inputs_embeds=torch.zeros(1, 3, 40), custom_generate=hf_generate, max_new_tokens=4, pad_token_id=0
        )


def test_it_is_no_function_to_call_by_itself() -> None:
    with pytest.raises(RequestError, match=r"is called by model\.generate"):
        hf_generate(tiny_module(), torch.tensor([PROMPT]))
