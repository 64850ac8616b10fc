"""Prefill: a prompt's keys and values into the cache, in PyTorch. Every FFN runs; skipping is a property of decoding.

Rows are prefilled one at a time, so a row's cache cannot depend on its neighbours. The prompt's last token is left to
the decode program, whose first step (always dense) turns it into the first generated token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from skipkernels.model.config import ModelConfig
from skipkernels.model.prompt import EmbeddedPrompt, shifted
from skipkernels.model.weights import LayerWeights, ModelWeights
from skipkernels.program.reference import apply_rope
from skipkernels.program.state import DecodeState

CHUNK = 512
"""Prompt tokens computed at a time: bounds the memory of long prompts."""


Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called as (layer, before, after) with the residual stream [tokens, hidden] around each FFN."""


@torch.inference_mode()
def prefill(
    config: ModelConfig,
    weights: ModelWeights,
    state: DecodeState,
    row: int,
    prompt: torch.Tensor,
    observe: Observer | None = None,
    embedded: EmbeddedPrompt | None = None,
) -> None:
    """Caches ``prompt`` (i32 [tokens], at least one) for ``row`` and makes the row active on its last token. The
    embeddings and positions of ``embedded``, where given, take the place of the tokens' own."""
    device = weights.embed_tokens.device
    cached = prompt[:-1].to(device).long()
    positions = embedded.positions if embedded else None
    at = None if positions is None else shifted(positions).to(device)
    for start in range(0, cached.numel(), CHUNK):
        end = min(start + CHUNK, cached.numel())
        hidden = weights.embed_tokens[cached[start:end]]
        if embedded:
            hidden = embedded.embeddings[start:end].to(hidden)
        rope = _rope(config, weights, start, end, at)
        for index, layer in enumerate(weights.layers):
            k_cache, v_cache = state.k_cache[index, row], state.v_cache[index, row]
            hidden = hidden + _attention(config, layer, index, hidden, start, rope, k_cache, v_cache)
            before, hidden = hidden, hidden + _ffn(config, layer, hidden)
            if observe:
                observe(index, before, hidden)
    state.begin_row(row, prompt)


def _attention(
    config: ModelConfig,
    layer: LayerWeights,
    index: int,
    hidden: torch.Tensor,
    start: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """Self-attention of a chunk [tokens, hidden] at positions ``start``.. over the cache
    [kv_heads, max_seq_len, head_dim], which gains the chunk's keys and values."""
    eps, dtype = config.rms_norm_eps, hidden.dtype
    heads, kv_heads, end = config.num_attention_heads, config.num_key_value_heads, start + hidden.shape[0]
    x = _rms_norm(hidden, layer.input_layernorm, eps)
    bias = None if layer.qkv_bias is None else layer.qkv_bias.to(dtype)
    qkv = F.linear(x, layer.qkv_proj, bias).view(-1, heads + 2 * kv_heads, config.head_dim).transpose(0, 1)
    query, key, value = qkv.split([heads, kv_heads, kv_heads])
    if layer.q_norm is not None and layer.k_norm is not None:
        query, key = _rms_norm(query, layer.q_norm, eps), _rms_norm(key, layer.k_norm, eps)
    k_cache[:, start:end] = apply_rope(key, *rope)
    v_cache[:, start:end] = value
    window = config.sliding_windows[index]
    begin = max(0, start + 1 - window) if window else 0
    positions = torch.arange(begin, end, device=hidden.device)
    offsets = torch.arange(start, end, device=hidden.device)[:, None] - positions
    mask = offsets >= 0 if window is None else (offsets >= 0) & (offsets < window)
    attended = F.scaled_dot_product_attention(
        apply_rope(query, *rope)[None],
        k_cache[None, :, begin:end],
        v_cache[None, :, begin:end],
        attn_mask=mask,
        enable_gqa=heads != kv_heads,
    )
    o_bias = None if layer.o_proj_bias is None else layer.o_proj_bias.to(dtype)
    return F.linear(attended[0].transpose(0, 1).reshape(len(hidden), -1), layer.o_proj, o_bias)


def _rope(
    config: ModelConfig, weights: ModelWeights, start: int, end: int, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [tokens, head_dim / 2] of a chunk, in the weights' dtype. With positions [3, tokens] each channel
    pair has a position of its own, that of its axis; negative ones are the tables' mirror images."""
    cos, sin = weights.rope_cos[start:end], weights.rope_sin[start:end]
    if positions is not None:
        at = positions[list(config.position_axes or ()), start:end].T
        cos, sin = weights.rope_cos.gather(0, at.abs()), weights.rope_sin.gather(0, at.abs()) * at.sign()
    return cos.to(weights.dtype), sin.to(weights.dtype)


def _ffn(config: ModelConfig, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
    """The FFN branch of a layer for [tokens, hidden], without the residual."""
    x = _rms_norm(hidden, layer.post_attention_layernorm, config.rms_norm_eps)
    gate, up = F.linear(x, layer.gate_up_proj).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down_proj)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers: normalised in fp32, scaled in the model's dtype."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)
