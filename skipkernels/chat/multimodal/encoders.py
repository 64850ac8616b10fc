"""Encoders of a multimodal module, and the merge of their outputs with the text: everything before the decoder's first
layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from skipkernels.chat.multimodal.encoder_cache import EncoderCache
from skipkernels.model.prompt import EmbeddedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_BYTES = 256 << 20
"""Some 100 images of 576 patches of 1,024 numbers in fp32, with the state of a layer beside the last."""


class Encoders:
    """Removes the text decoder from a module; the rest computes the decoder's inputs.

    Args:
        module: a multimodal module of transformers. It is changed, and cannot generate afterwards.
        cache_bytes: of the encoders' outputs that are kept for images and sounds that come again.
    """

    def __init__(self, module: PreTrainedModel, cache_bytes: int = CACHE_BYTES) -> None:
        self._seen = _FirstLayer(module.get_input_embeddings())
        _replace(module, module.get_decoder(), self._seen)
        module.set_output_embeddings(nn.Identity())
        self._module = module.eval()
        self.cache = EncoderCache(module, cache_bytes)

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int], media: Sequence[Mapping[str, torch.Tensor]]) -> EmbeddedPrompt:
        """The prompt of one request. Encoders of absent modalities do not run.

        Args:
            token_ids: with placeholders for what is in ``media``.
            media: pixels or spectrograms of each modality, as the module's processor names them.
        """
        device, dtype = self._module.device, self._module.dtype
        ids = torch.tensor([list(token_ids)], device=device)
        tensors = {name: tensor.to(device) for tensors in media for name, tensor in tensors.items()}
        floats = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
        self._module(input_ids=ids, attention_mask=torch.ones_like(ids), **{**tensors, **floats})
        embeddings, positions = self._seen.embeddings, self._seen.positions
        # [1, tokens], or three axes, before which some releases put the text positions
        axes = positions[-3:, 0] if positions is not None and positions.dim() == 3 else None
        return EmbeddedPrompt(token_ids, embeddings[0], axes)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, without the text decoder's."""
        decoder = set(self._seen.parameters())
        return {name: parameter for name, parameter in self._module.named_parameters() if parameter not in decoder}


def _replace(module: nn.Module, part: nn.Module, by: nn.Module) -> None:
    """Replaces ``part`` wherever it is; transformers' ``set_decoder`` does nothing for some families."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if child is part:
                setattr(parent, name, by)
                return


class _FirstLayer(nn.Module):
    """Takes the place of the text decoder, and records the inputs of its first layer."""

    embeddings: torch.Tensor  # [1, tokens, hidden]
    positions: torch.Tensor | None  # [1, tokens], [3, 1, tokens] or [4, 1, tokens]

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def get_input_embeddings(self) -> nn.Module:  # the modules around it ask for them
        return self.embed_tokens

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        self.embeddings, self.positions = inputs_embeds, position_ids
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)
