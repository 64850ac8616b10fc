"""ShortGPT (Men et al. 2024, arXiv 2403.03853): the layers that change the residual stream least are removed.

Block Influence of a layer is 1 - cosine of the residual stream before and after the whole layer, averaged over the
tokens of a calibration text. Removal is static: the prompt skips these layers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError
from skipkernels.methods.engine_method import EngineMethod
from skipkernels.methods.ffn_methods import round_half_up
from skipkernels.methods.layer_decoder import LayerDecoder
from skipkernels.methods.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup
from skipkernels.methods.work import UnreadMap, Work
from skipkernels.skipping.policy import DensePolicy


class Shortened(EngineMethod):
    """The engine on the layers that are left."""

    def __init__(self, engine: Engine, removed: Sequence[int]) -> None:
        super().__init__(engine.without_layers(removed), lambda batch: DensePolicy())
        self._whole = engine
        self._skipped = np.isin(np.arange(engine.config.num_hidden_layers), removed)

    def _work(self, unread_map: UnreadMap) -> Work:
        skipped = np.tile(self._skipped, (len(unread_map), 1))
        return Work.of_layers(self._whole.config, self._whole.weights, skipped, fills_cache=False)


class ShortGPT:
    """Static removal of the least influential layers."""

    name: ClassVar[str] = "shortgpt"
    source: ClassVar[str] = "ShortGPT (Men et al. 2024, arXiv 2403.03853)"
    ratio_of: ClassVar[RatioOf] = "layers"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        layers = setup.engine.config.num_hidden_layers
        count = round_half_up(ratio * layers)
        if not 0 < count < layers:
            raise PolicyError(
                f"a ratio of {ratio} removes {count} of {layers} layers; between 1 and {layers - 1} are possible, "
                f"ratios from {1 / layers:.3f} to {1 - 1 / layers:.3f}"
            )
        influence = setup.remember("block influence", lambda: _mean_influence(setup, progress))
        removed = sorted(range(layers), key=lambda layer: influence[layer])[:count]
        return {"removed": sorted(removed)}

    def build(self, setup: Setup, found: Found) -> Method:
        return Shortened(setup.engine, found["removed"])


def _mean_influence(setup: Setup, progress: Progress) -> list[float]:
    passages = setup.text_passages
    total = torch.zeros(setup.engine.config.num_hidden_layers)
    for number, passage in enumerate(passages, start=1):
        total += block_influence(setup.layer_decoder, torch.tensor(passage.token_ids))
        progress("reading the text", number / len(passages))
    return [round(value, 6) for value in (total / len(passages)).tolist()]


def block_influence(decoder: LayerDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Block Influence of every layer, f32 [layers], over tokens i64 [tokens]."""
    streams: list[list[torch.Tensor]] = [[] for _ in range(decoder.config.num_hidden_layers)]

    class Observer:
        def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            streams[layer].append(hidden)
            return torch.ones_like(ran)

    decoder.begin()
    last, _ = decoder.read(tokens, Observer(), 0)
    whole = [*(torch.cat(parts) for parts in streams), last]
    return torch.stack([1.0 - cosine_similarity(*pair, dim=-1).mean() for pair in pairwise(whole)]).cpu()
