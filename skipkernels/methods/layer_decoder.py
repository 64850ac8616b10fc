"""LayerDecoder: a decoder in which each token may skip whole layers; the reference path of the baselines.

A rule decides for each layer which tokens run it. The hidden state of a token that skips a layer is passed on
unchanged, and the layer's keys and values are computed from it: state propagation, as in CALM (Schuster et al. 2022)
and the depth-adaptive transformer (Elbayad et al. 2020), so that the cache has an entry for every token in every layer.

A token's decisions never depend on those of another token, so any number of tokens is processed at once.
Activations are fp32 and keys and values are rounded to the model's dtype, as in the decode program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F

from skipkernels.decoding.prefill import attend, of_experts, split_heads
from skipkernels.model.config import ModelConfig
from skipkernels.model.matrix import dequantized, float_tensor, weight_rows
from skipkernels.model.weights import LayerWeights, ModelWeights
from skipkernels.program.reference import activation_of, apply_rope, rms_norm, softened

_CHUNK = 512  # tokens processed at a time: bounds the memory of attention


class LayerRule(Protocol):
    """Which tokens run which layers."""

    def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Whether each token runs ``layer``.

        Args:
            hidden: f32 [tokens, hidden], the residual stream before the layer.
            ran: bool [tokens], whether the token ran the previous layer; True at layer 0.
            step: i64 [tokens], index of the generated token that a position predicts: 0 at the prompt's last position,
                negative before it.

        Returns:
            bool [tokens].
        """
        ...


class EveryLayer:
    """The full model."""

    def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(ran)


class LayerDecoder:
    """One sequence at a time. Holds an fp32 copy of the weights, unless they are fp32 themselves."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_seq_len: int) -> None:
        self.config = config
        self.dtype = weights.dtype
        self._device = weights.embed_tokens.device
        self.max_seq_len = max_seq_len
        self._embed_tokens = weights.embed_tokens
        self._layers = [_in_fp32(layer) for layer in weights.layers]
        self._query_scale = weights.query_scale
        self._norm, self._lm_head = weights.norm, dequantized(weights.lm_head)
        self._ropes = [weights.rope_of(config, index) for index in range(config.num_hidden_layers)]
        shape = (config.num_hidden_layers, config.num_key_value_heads, max_seq_len, config.head_dim)
        self._k_cache = torch.zeros(shape, dtype=weights.dtype, device=self._device)
        self._v_cache = torch.zeros_like(self._k_cache)
        self._length = 0

    def begin(self) -> None:
        """Empties the cache."""
        self._length = 0

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor, rule: LayerRule, first_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens to the cached ones.

        Args:
            tokens: i64 [tokens], at least one.
            first_step: the ``step`` of the first of them, see ``LayerRule``.

        Returns:
            The residual stream after the last layer, f32 [tokens, hidden], and which layers ran, bool [tokens, layers].
        """
        parts = []
        for chunk in tokens.to(self._device).split(_CHUNK):
            steps = first_step + torch.arange(len(chunk), device=self._device)
            parts.append(self._read_chunk(chunk, rule, steps))
            self._length += len(chunk)
            first_step += len(chunk)
        hidden, ran = zip(*parts, strict=True)
        return torch.cat(hidden), torch.cat(ran)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and lm_head of hidden [tokens, hidden]: f32 [tokens, vocab]."""
        logits = F.linear(rms_norm(hidden, self._norm, self.config.rms_norm_eps), self._lm_head)
        return softened(logits, self.config.logits_softcap)

    def _read_chunk(
        self, tokens: torch.Tensor, rule: LayerRule, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = weight_rows(self._embed_tokens, tokens).float() * self.config.embed_scale_in(self.dtype)
        ran = torch.ones_like(tokens, dtype=torch.bool)
        maps = []
        for index, layer in enumerate(self._layers):
            ran = rule.runs(index, hidden, ran, steps)
            maps.append(ran)
            query = self._project(index, layer, hidden)
            if ran.any():
                after = hidden + self._branch(layer.attention_branch_norm, self._attend(index, layer, query))
                after = after + self._branch(layer.ffn_branch_norm, self._ffn(layer, after))
                hidden = torch.where(ran[:, None], after, hidden)
        return hidden, torch.stack(maps, dim=1)

    def _project(self, index: int, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """Appends keys and values of hidden [tokens, hidden]; returns the queries [heads, tokens, head_dim]."""
        c, start, end = self.config, self._length, self._length + len(hidden)
        x = rms_norm(hidden, layer.input_layernorm, c.rms_norm_eps)
        qkv = F.linear(x, float_tensor(layer.qkv_proj), layer.qkv_bias)
        query, key, value = split_heads(c, layer, qkv, rms_norm)
        if self._query_scale is not None:
            query = query * self._query_scale[start:end, None]
        cos, sin = (table[start:end] for table in self._ropes[index])
        self._k_cache[index, :, start:end] = apply_rope(key, cos, sin)
        self._v_cache[index, :, start:end] = value
        return apply_rope(query, cos, sin)

    def _attend(self, index: int, layer: LayerWeights, query: torch.Tensor) -> torch.Tensor:
        """The attention branch [tokens, hidden] of the newest tokens, without the residual."""
        tokens, start = query.shape[1], self._length
        window = self.config.sliding_windows[index]
        begin = max(0, start + 1 - window) if window else 0
        positions = torch.arange(begin, start + tokens, device=self._device)
        offsets = positions[-tokens:, None] - positions
        mask = (offsets >= 0) & (offsets < window) if window else offsets >= 0
        keys, values = (cache[index, :, begin : start + tokens].float() for cache in (self._k_cache, self._v_cache))
        attended = attend(self.config, layer, query, keys, values, mask).transpose(0, 1).reshape(tokens, -1)
        return F.linear(attended, float_tensor(layer.o_proj), layer.o_proj_bias)

    def _branch(self, norm: torch.Tensor | None, change: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, of what attention or the FFN gave."""
        normed = change if norm is None else rms_norm(change, norm, self.config.rms_norm_eps)
        return normed * self.config.residual_multiplier

    def _ffn(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """The FFN branch [tokens, hidden], without the residual."""
        x = self._ffn_input(rms_norm(hidden, layer.post_attention_layernorm, self.config.rms_norm_eps))
        if layer.router is not None:
            return of_experts(self.config, layer, x)
        gate, up = F.linear(x, float_tensor(layer.gate_up_proj)).chunk(2, dim=-1)
        return F.linear(
            self._down_input(activation_of(self.config.activation)(gate) * up), float_tensor(layer.down_proj)
        )

    def _ffn_input(self, x: torch.Tensor) -> torch.Tensor:
        """What gate_proj and up_proj read; methods that leave out columns override it."""
        return x

    def _down_input(self, x: torch.Tensor) -> torch.Tensor:
        """What down_proj reads."""
        return x


def _in_fp32(layer: LayerWeights) -> LayerWeights:
    return replace(
        layer,
        qkv_proj=dequantized(layer.qkv_proj),
        o_proj=dequantized(layer.o_proj),
        gate_up_proj=dequantized(layer.gate_up_proj),
        down_proj=dequantized(layer.down_proj),
        router=None if layer.router is None else dequantized(layer.router),
    )
