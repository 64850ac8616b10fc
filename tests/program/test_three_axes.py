"""Prompts whose tokens have positions in time, height and width: prompt rows are rotated as transformers does it."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.prompt import shifted
from skipkernels.model.weights import ModelWeights
from tests.executors.decoder import Decoder, MakeExecutor, natively, packed
from tests.executors.programs import same_bits
from tests.models import random_prompt
from tests.multimodal import tiny_multimodal
from tests.tolerances import assert_close

EXECUTORS = pytest.mark.parametrize("executor", [ReferenceExecutor, natively], ids=["reference", "native"])
NEW_TOKENS = 4


@cache
def omni() -> tuple[PreTrainedModel, ModelConfig, ModelWeights]:
    module, _ = tiny_multimodal("qwen2.5 omni")
    return module, *packed(module, max_seq_len=160)


def image_positions() -> torch.Tensor:
    """Five tokens, an image of 3 x 4, and eight tokens: fewer positions than tokens."""
    text = torch.arange(5)
    image = 5 + torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.arange(12) % 4]).long()
    return torch.cat([text.expand(3, -1), image, (9 + torch.arange(8)).expand(3, -1)], dim=1)


def video_positions() -> torch.Tensor:
    """Two frames of two tokens, 25 positions apart: more positions than tokens, so that shifted ones are negative."""
    frames = torch.tensor([[2, 2, 27, 27], [2, 2, 2, 2], [2, 3, 2, 3]])
    return torch.cat([torch.arange(2).expand(3, -1), frames, (28 + torch.arange(4)).expand(3, -1)], dim=1)


def embeddings_of(tokens: list[int], seed: int = 0) -> torch.Tensor:
    """Of no token's: what an encoder may give. The last is the last token's own."""
    weights = omni()[2]
    found = torch.randn(len(tokens), weights.embed_tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    found[-1] = weights.embed_tokens[tokens[-1]]
    return found


@torch.inference_mode()
def stock_logits(tokens: list[int], embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the module itself makes of it, greedily and without a cache: logits [new tokens, vocab]."""
    module, rows = omni()[0], []
    for _ in range(NEW_TOKENS):
        states = module.get_decoder()(inputs_embeds=embeddings[None], position_ids=positions[:, None])
        rows.append(module.lm_head(states.last_hidden_state[0, -1]))
        own = module.get_input_embeddings()(rows[-1].argmax()[None])
        embeddings, positions = torch.cat([embeddings, own]), torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.stack(rows)


def fed(
    executor: MakeExecutor,
    tokens: list[int],
    embeddings: torch.Tensor | None,
    positions: torch.Tensor | None,
    chunk: int,
) -> Decoder:
    """A decoder that has cached a prompt but for its last token, ``chunk`` tokens in a step, and is about to decode."""
    made = Decoder(*omni()[1:], executor, num_prompt_rows=chunk + 1)
    made.begin(0, tokens, new_tokens=NEW_TOKENS)
    made.give_blocks(0)
    for start in range(0, len(tokens) - 1, chunk):
        part = slice(start, min(start + chunk, len(tokens) - 1))
        made.add_prompt_rows(
            0,
            start,
            tokens[part],
            embeddings=None if embeddings is None else embeddings[part],
            positions=None if positions is None else shifted(positions)[:, part],
        )
        made.step()
    made.state.start_decoding(0)
    return made


def check_against_stock(executor: MakeExecutor, positions: torch.Tensor, chunk: int = 7) -> None:
    tokens = random_prompt(positions.shape[1])
    embeddings = embeddings_of(tokens)
    decoder = fed(executor, tokens, embeddings, positions, chunk)
    for step, logits in enumerate(stock_logits(tokens, embeddings, positions)):
        decoder.step()
        assert_close(decoder.state.logits[0], logits, "logits after layers, fp32", f"step {step}")
        assert decoder.token_ids(0)[-1] == int(logits.argmax())


@EXECUTORS
@pytest.mark.parametrize("positions", [image_positions(), video_positions()], ids=["image", "video"])
def test_positions_of_images_and_videos_are_transformers(executor: MakeExecutor, positions: torch.Tensor) -> None:
    assert bool((shifted(positions) < 0).any()) == (positions.shape[1] == 10), "the video's are negative"
    check_against_stock(executor, positions)


@EXECUTORS
@given(
    before=st.lists(st.tuples(*[st.integers(0, 60)] * 3), max_size=16),
    last=st.integers(0, 60),
    chunk=st.integers(1, 16),
)
def test_any_positions_are_transformers(
    executor: MakeExecutor, before: list[tuple[int, int, int]], last: int, chunk: int
) -> None:
    check_against_stock(executor, torch.tensor([*before, (last, last, last)]).T, chunk)


@EXECUTORS
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_counted_positions_and_the_tokens_own_embeddings_change_nothing(executor: MakeExecutor, chunk: int) -> None:
    tokens = random_prompt(25)
    counted = (40 + torch.arange(len(tokens))).expand(3, -1)
    decoders = [
        fed(executor, tokens, embeddings, positions, chunk)
        for embeddings, positions in ((None, None), (omni()[2].embed_tokens[tokens], counted))
    ]
    for _ in range(NEW_TOKENS):
        for decoder in decoders:
            decoder.step()
        assert same_bits(decoders[0].state.logits, decoders[1].state.logits)
    assert decoders[0].token_ids(0) == decoders[1].token_ids(0)
