"""The fusion classifier as a module: frames become embeddings, and a Llama decodes one label per segment.

    prompt    [frames of the kept modalities, segment by segment] start
    decoded   (segment 0, its label), (segment 1, its label), ...

Each segment has label tokens of its own, so the decoder always knows which segment is next. The time of a request has
two parts: the prompt, which depends on its modalities, and the labels, which depend on the skip level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from skipkernels.demo.model import random_llama
from skipkernels.errors import ModelError
from skipkernels.workloads.fusion.clips import FEATURES, MODALITIES

START, _LABELS = 0, 1 + len(MODALITIES)
PLACEHOLDERS = {modality: 1 + number for number, modality in enumerate(MODALITIES)}
CLASSES = 2

_SHAPE, _WEIGHTS, _DECODER = "fusion.json", "encoders.safetensors", "decoder"


@dataclass(frozen=True)
class FusionShape:
    """Sizes of the classifier.

    Args:
        segments: of a clip, at most.
        max_frames: of a clip, all modalities together, at most.
        layers, hidden, intermediate, heads: of the decoder.
    """

    segments: int
    max_frames: int
    layers: int = 12
    hidden: int = 64
    intermediate: int = 256
    heads: int = 4


class FusionNetwork(nn.Module):
    """Encoders of the modalities and the decoder."""

    def __init__(self, shape: FusionShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoders = nn.ModuleDict({modality: nn.Linear(FEATURES, shape.hidden) for modality in MODALITIES})
        self.segments = nn.Embedding(shape.segments, shape.hidden)
        self.decoder = _decoder(shape)
        self._align()

    @torch.no_grad()
    def _align(self) -> None:
        """Initialises attention so that a label attends to the frames of its segment: the token before it is embedded
        like these frames, and keys equal queries. Otherwise most of the training would go into learning that."""
        nn.init.normal_(self.segments.weight, std=0.5)
        named = self.segments.weight.repeat_interleave(CLASSES, dim=0)  # the segment of each label
        table, head = self.decoder.model.embed_tokens.weight, self.decoder.lm_head.weight
        table[START] += self.segments.weight[0]
        table[_LABELS:-CLASSES] += named[CLASSES:]
        classes = torch.randn(CLASSES, self.shape.hidden).repeat(self.shape.segments, 1)
        head[_LABELS:] += 0.2 * named + 0.1 * classes
        for layer in self.decoder.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight.mul_(8.0))

    def encode(self, modality: str, frames: torch.Tensor) -> torch.Tensor:
        """f32 [clips, segments, frames, FEATURES] -> [clips, segments * frames, hidden]."""
        encoded = self.encoders[modality](frames) + self.segments.weight[: frames.shape[1], None]
        return encoded.flatten(1, 2)

    def label_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """The token of each label; i64 [clips, segments]."""
        return _LABELS + CLASSES * torch.arange(labels.shape[1]) + labels

    def forward(
        self, frames: Mapping[str, torch.Tensor], labels: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of every label, given all before it: [clips, segments, vocabulary].

        Args:
            frames: of the kept modalities, in the order of ``MODALITIES``; as for ``encode``.
            labels: i64 [clips, segments].
            positions: i64 [tokens] of the whole sequence; None: 0, 1, 2 and so on.
        """
        table = self.decoder.get_input_embeddings()
        encoded = [self.encode(modality, frames[modality]) for modality in MODALITIES if modality in frames]
        start = table(torch.full((len(labels), 1), START))
        embeddings = torch.cat([*encoded, start, table(self.label_tokens(labels)[:, :-1])], dim=1)
        position_ids = None if positions is None else positions[None]
        mask = torch.ones(
            embeddings.shape[:2]
        )  # without a mask, transformers treats gaps in positions as sequence boundaries
        output = self.decoder(inputs_embeds=embeddings, position_ids=position_ids, attention_mask=mask, use_cache=False)
        return output.logits[:, -labels.shape[1] :]

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder / _DECODER)
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("decoder.")}
        save_file(kept, folder / _WEIGHTS)
        (folder / _SHAPE).write_text(json.dumps(asdict(self.shape), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> FusionNetwork:
        """
        Raises:
            ModelError: not a folder that ``save`` wrote.
        """
        try:
            network = cls(FusionShape(**json.loads((folder / _SHAPE).read_text())))
            network.decoder = LlamaForCausalLM.from_pretrained(folder / _DECODER)
            network.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"{folder}: holds no fusion classifier ({' '.join(str(error).split())}); train one with "
                "`python -m skipkernels.workloads.fusion.train`"
            ) from error
        return network


def label_of(token: int, segment: int) -> int | None:
    """The label that a decoded token gives a segment; None: the token is not one of the segment's."""
    label = token - _LABELS - CLASSES * segment
    return label if 0 <= label < CLASSES else None


def _decoder(shape: FusionShape) -> LlamaForCausalLM:
    return random_llama(
        LlamaConfig(
            vocab_size=_LABELS + CLASSES * shape.segments,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.max_frames + 1 + shape.segments,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            bos_token_id=START,
            eos_token_id=None,
        )
    )
