"""The same image is encoded once, and memory is bounded."""

from typing import Any

import pytest
import torch
from torch import nn

from skipkernels.chat.multimodal.encoder_cache import EncoderCache
from skipkernels.chat.multimodal.multimodal_model import MultimodalModel
from skipkernels.chat.text_model import exact_match
from skipkernels.skipping.policy import DensePolicy
from tests.chat.multimodal.chats import chat_of
from tests.multimodal import MULTIMODAL, tiny_multimodal


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, pixels: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        self.runs += 1
        return pixels.double() * scale, None


def module_and_cache(max_bytes: int) -> tuple[Any, EncoderCache]:
    module = nn.Module()
    module.vision_tower = Tower()
    return module, EncoderCache(module, max_bytes)


def test_content_counts_and_so_does_how_it_is_encoded() -> None:
    module, cache = module_and_cache(1 << 20)
    tower, ones = module.vision_tower, torch.ones(2, 3)
    first, _ = tower(ones)
    again, _ = tower(torch.ones(2, 3))
    assert tower.runs == 1
    assert again is first
    for other in (
        lambda: tower(torch.ones(3, 2)),
        lambda: tower(ones.to(torch.bfloat16)),
        lambda: tower(2 * ones),
        lambda: tower(ones, scale=2.0),
        lambda: tower(ones, 2.0),
    ):
        before = tower.runs
        other()
        assert tower.runs == before + 1
    assert (cache.hits, cache.misses) == (1, tower.runs)


def test_what_was_not_used_for_longest_goes() -> None:
    module, cache = module_and_cache(3 * 80)  # three outputs of ten doubles
    tower = module.vision_tower
    for value in (0, 1, 2, 0, 3):
        tower(torch.full((10,), float(value)))
    assert (tower.runs, cache.nbytes) == (4, 240)
    tower(torch.full((10,), 0.0))
    assert tower.runs == 4
    tower(torch.full((10,), 1.0))
    assert tower.runs == 5, "it was the oldest"
    tower(torch.zeros(100))
    tower(torch.full((10,), 1.0))
    assert (tower.runs, cache.nbytes) == (6, 240), "what is larger than all is not kept and displaces nothing"


@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_family_encodes_once_and_answers_the_same(family: str) -> None:
    module, processor = tiny_multimodal(family)
    model = MultimodalModel("tiny", module, processor, {0.0: DensePolicy()}, exact_match, max_seq_len=512)
    cache, fullest, media = model.encoders.cache, model.strategies[0], len(model.modalities) - 1
    inputs = model.format.request(chat_of(model.modalities)).inputs
    (first,) = model.run([inputs], fullest)
    assert (cache.hits, cache.misses) == (0, media)
    (again,) = model.run([inputs], fullest)
    assert (cache.hits, cache.misses) == (media, media)
    assert again.text == first.text
    assert model.run([inputs], fullest)[0].text == first.text
    other = model.format.request(chat_of(model.modalities, seed=5)).inputs
    model.run([other], fullest)
    assert (cache.hits, cache.misses) == (2 * media, 2 * media)
