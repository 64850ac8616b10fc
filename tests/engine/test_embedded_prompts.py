"""Prompts that come as embeddings: the tokens' own change nothing, and three positions a token are transformers'."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.decoding.prefill import CHUNK
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.model.prompt import EmbeddedPrompt, shifted
from tests.models import FAMILIES, random_prompt, tiny_engine, tiny_module
from tests.multimodal import tiny_multimodal
from tests.tolerances import assert_close

PROMPT = random_prompt(21)
OMNI, _ = tiny_multimodal("qwen2.5 omni")
NEW_TOKENS = 12


def own(engine: Engine, tokens: list[int], positions: torch.Tensor | None = None) -> EmbeddedPrompt:
    """The tokens' own embeddings, scaled as the model scales them."""
    scale = engine.config.embed_scale_in(engine.weights.dtype)
    return EmbeddedPrompt(tokens, engine.weights.embed_tokens[tokens].float() * scale, positions)


@pytest.fixture(scope="module")
def omni_engine() -> Engine:
    return tiny_engine(module=OMNI, max_seq_len=160)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_own_embeddings_change_nothing(family: str) -> None:
    engine = tiny_engine(family)
    (expected,) = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    logits = engine.state.logits.clone()
    (answer,) = engine.generate(own(engine, PROMPT), max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == expected.token_ids
    assert torch.equal(engine.state.logits, logits)
    assert answer.prompt_tokens == len(PROMPT)


def test_embeddings_longer_than_a_prefill_chunk() -> None:
    module = tiny_module("mistral with a sliding window", max_position_embeddings=1200)
    engine = tiny_engine(module=module, max_seq_len=1200)
    prompt = random_prompt(CHUNK + 70)
    (expected,) = engine.generate(prompt, max_new_tokens=NEW_TOKENS)
    (answer,) = engine.generate(own(engine, prompt), max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == expected.token_ids


def test_embeddings_count_and_not_the_ids_beside_them() -> None:
    engine = tiny_engine("qwen2")
    (expected,) = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    placeholders = [7] * (len(PROMPT) - 1) + PROMPT[-1:]
    (answer,) = engine.generate(
        EmbeddedPrompt(placeholders, engine.weights.embed_tokens[PROMPT]), max_new_tokens=NEW_TOKENS
    )
    assert answer.token_ids == expected.token_ids


def test_embeddings_and_tokens_in_one_batch() -> None:
    engine = tiny_engine("llama", max_batch_size=3)
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (9, 4, 14)]
    expected = [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=NEW_TOKENS)]
    mixed = [own(engine, prompts[0]), prompts[1], own(engine, prompts[2])]
    assert [answer.token_ids for answer in engine.generate(mixed, max_new_tokens=NEW_TOKENS)] == expected


def test_the_text_decoder_of_a_multimodal_module_is_taken(omni_engine: Engine) -> None:
    assert omni_engine.config.model_type == "qwen2_5_omni_text"
    assert not omni_engine.config.tie_word_embeddings, "as the module has it, whatever its text configuration says"
    assert omni_engine.config.position_axes == (0, 1, 1, 2, 2)
    weight = OMNI.get_decoder().layers[1].mlp.down_proj.weight
    assert weight.data_ptr() == omni_engine.weights.layers[1].down_proj.data_ptr(), "storage is shared"


def image_positions() -> torch.Tensor:
    """Five tokens, an image of 3 x 4, and eight tokens: fewer positions than tokens."""
    text = torch.arange(5)
    image = 5 + torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.arange(12) % 4]).long()
    return torch.cat([text.expand(3, -1), image, (9 + torch.arange(8)).expand(3, -1)], dim=1)


def video_positions() -> torch.Tensor:
    """Two frames of two tokens, 25 positions apart: more positions than tokens, so that shifted ones are negative."""
    frames = torch.tensor([[2, 2, 27, 27], [2, 2, 2, 2], [2, 3, 2, 3]])
    return torch.cat([torch.arange(2).expand(3, -1), frames, (28 + torch.arange(4)).expand(3, -1)], dim=1)


@torch.inference_mode()
def stock_logits(tokens: list[int], positions: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """What the module itself makes of it, greedily and without a cache: logits [new_tokens, vocab]."""
    rows = []
    for _ in range(new_tokens):
        embeddings = OMNI.get_input_embeddings()(torch.tensor([tokens]))
        hidden = OMNI.get_decoder()(inputs_embeds=embeddings, position_ids=positions[:, None]).last_hidden_state
        rows.append(OMNI.lm_head(hidden[0, -1]))
        tokens = [*tokens, int(rows[-1].argmax())]
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.stack(rows)


def check_against_stock(engine: Engine, positions: torch.Tensor) -> None:
    tokens = random_prompt(positions.shape[1])
    expected = stock_logits(tokens, positions, NEW_TOKENS)
    stream = engine.stream(own(engine, tokens, positions), max_new_tokens=NEW_TOKENS)
    for step, (chunk, logits) in enumerate(zip(stream, expected, strict=False)):
        assert_close(engine.state.logits[0], logits, "logits after layers, fp32", f"step {step}")
        assert chunk.token_id == int(logits.argmax())


@pytest.mark.parametrize("positions", [image_positions(), video_positions()], ids=["image", "video"])
def test_positions_of_images_and_videos_are_transformers(omni_engine: Engine, positions: torch.Tensor) -> None:
    check_against_stock(omni_engine, positions)


@given(st.lists(st.tuples(*[st.integers(0, 60)] * 3), max_size=16), st.integers(0, 60))
def test_any_positions_are_transformers(omni_engine: Engine, before: list[tuple[int, int, int]], last: int) -> None:
    check_against_stock(omni_engine, torch.tensor([*before, (last, last, last)]).T)


def test_counted_positions_are_the_same_as_none(omni_engine: Engine) -> None:
    (expected,) = omni_engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    counted = torch.arange(40, 40 + len(PROMPT)).expand(3, -1)
    (answer,) = omni_engine.generate(own(omni_engine, PROMPT, counted), max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == expected.token_ids


def test_shifted_positions_end_where_decoding_goes_on() -> None:
    for positions in (image_positions(), video_positions()):
        moved = shifted(positions)
        assert moved[:, -1].tolist() == [positions.shape[1] - 1] * 3
        assert torch.equal(moved.diff(), positions.diff())


EMBEDDINGS = OMNI.get_input_embeddings().weight.detach()


def prompt(tokens: list[int] = PROMPT, **fields: Any) -> EmbeddedPrompt:
    return EmbeddedPrompt(tokens, **{"embeddings": EMBEDDINGS[tokens], **fields})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (prompt([]), "the prompt is empty"),
        (prompt(embeddings=EMBEDDINGS[:5]), r"embeddings have shape \(5, 40\), expected \(21, 40\)"),
        (prompt(embeddings=EMBEDDINGS[PROMPT, :8]), r"embeddings have shape \(21, 8\), expected \(21, 40\)"),
        (prompt(embeddings=EMBEDDINGS[PROMPT] + 1), "is not embedded as the model embeds it; end the prompt with text"),
        (prompt(positions=torch.zeros(3, 20)), r"positions have shape \(3, 20\), expected \(3, 21\)"),
        (prompt(positions=torch.arange(63).view(3, 21)), r"positions are \[20, 41, 62\], expected equal ones"),
        (
            prompt(positions=torch.arange(0, 210, 10).expand(3, -1)),
            "span more than 180, the rotary tables hold max_seq_len=160",
        ),
        (prompt(random_prompt(200)), "the prompt has 200 tokens, the cache holds max_seq_len=160"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_next_is_fine(omni_engine: Engine, given: EmbeddedPrompt, message: str) -> None:
    expected = omni_engine.generate(PROMPT, max_new_tokens=8)[0].token_ids
    with pytest.raises(RequestError, match=message):
        omni_engine.generate(given)
    assert omni_engine.generate(PROMPT, max_new_tokens=8)[0].token_ids == expected


def test_a_model_with_one_position_a_token_refuses_three() -> None:
    engine = tiny_engine("qwen2")
    with pytest.raises(RequestError, match="qwen2 rotates by one position a token; leave positions out"):
        engine.generate(own(engine, PROMPT, torch.arange(21).expand(3, -1)))


def test_an_embedded_prompt_is_empty_also_where_a_tokenizer_could_begin_it(tokenizer: Any) -> None:
    engine = tiny_engine(module=tiny_module(), tokenizer=tokenizer)
    with pytest.raises(RequestError, match="the prompt holds no tokens"):
        engine.generate(own(engine, []))
