"""Prefill in PyTorch: a prompt's keys and values into the paged cache, many tokens at a time.

On a CPU the decode program computes prompts itself, as prompt rows. On a GPU many rows go to torch's matrix product,
which is built for them; and calibration looks at the residual stream of every layer, which only this form shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F

from skipkernels.model.config import ModelConfig
from skipkernels.model.matrix import AnyMatrix, as_tensor, weight_rows
from skipkernels.model.prompt import EmbeddedPrompt, shifted
from skipkernels.model.weights import LayerWeights, ModelWeights, expert_down_proj
from skipkernels.program.reference import activation_of, apply_rope, softened, softmax_with_sinks, up_factor
from skipkernels.program.state import DecodeState

CHUNK = 512
"""Prompt tokens computed at a time: bounds the memory of long prompts."""

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called as (layer, before, after) with the residual stream [tokens, hidden] around each FFN."""

Products = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called as (layer, activated gate, up), each [tokens, intermediate]; returns what goes into down_proj."""


@torch.inference_mode()
def prefill(
    config: ModelConfig,
    weights: ModelWeights,
    state: DecodeState,
    slot: int,
    tokens: torch.Tensor,
    *,
    start: int = 0,
    run_map: torch.Tensor | None = None,
    neuron_scale: torch.Tensor | None = None,
    embedded: EmbeddedPrompt | None = None,
    observe: Observer | None = None,
    products: Products | None = None,
    resume: tuple[int, torch.Tensor] | None = None,
) -> None:
    """Caches consecutive tokens of the sequence in ``slot``, whose blocks are in the table.

    Args:
        tokens: i32 [tokens].
        start: position of the first one; all before it are cached.
        run_map: u8 [tokens, layers]: which FFNs run, for tokens that were generated under a policy and are computed
            again; None: all.
        neuron_scale: f32 [tokens]: the factor on the slot's thresholds for neurons, for the same; None: keep all.
        embedded: the whole prompt's embeddings and positions, in place of the tokens' own.
        products: takes the place of activated gate times up.
        resume: a layer, and the residual stream before it: the layers below are left out. At most ``CHUNK`` tokens.
    """
    device = weights.embed_tokens.device
    ids = tokens.to(device).long()
    positions = embedded.positions if embedded else None
    axes = None if positions is None else shifted(positions).to(device)
    for offset in range(0, ids.numel(), CHUNK):
        end = min(offset + CHUNK, ids.numel())
        first, last = start + offset, start + end
        hidden = weight_rows(weights.embed_tokens, ids[offset:end]).to(weights.dtype)
        hidden = hidden * config.embed_scale_in(weights.dtype)
        if embedded:
            hidden = embedded.embeddings[first:last].to(hidden)
        begin, hidden = resume or (0, hidden)
        for index, layer in enumerate(weights.layers[begin:], start=begin):
            rope = _rope(config, weights, index, first, last, axes)
            cache = _PagedLayer(state, index, slot, last)
            attended = _attention(config, layer, index, hidden, first, rope, weights.query_scale, cache)
            hidden = hidden + _branch(config, layer.attention_branch_norm, attended)
            multiply = None if products is None else partial(products, index)
            if neuron_scale is not None:
                scale = neuron_scale[offset:end, None].to(device)
                multiply = partial(
                    _multiply_kept,
                    state.gate_thresholds[slot, index] * scale,
                    state.product_thresholds[slot, index] * scale,
                )
            change = _branch(config, layer.ffn_branch_norm, _ffn(config, layer, hidden, multiply or torch.mul))
            if run_map is not None:
                change = torch.where(run_map[offset:end, index, None].to(device) != 0, change, 0)
            before, hidden = hidden, hidden + change
            if observe:
                observe(index, before, hidden)


def final_logits(config: ModelConfig, weights: ModelWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab] of the residual stream after the last layer, [tokens, hidden]."""
    x = _rms_norm(hidden, weights.norm, config.rms_norm_eps)
    return softened(F.linear(x, as_tensor(weights.lm_head, hidden.dtype)), config.logits_softcap)


class _PagedLayer:
    """The keys and values of one layer of one sequence, as [kv_heads, positions, head_dim]."""

    def __init__(self, state: DecodeState, layer: int, slot: int, end: int) -> None:
        self._caches = state.k_cache[layer], state.v_cache[layer]
        self._size = state.block_size
        self._blocks = state.block_table[slot, : -(-end // self._size)].long()

    def append(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes key and value [kv_heads, tokens, head_dim] at positions ``start`` and on."""
        at = torch.arange(start, start + key.shape[1], device=key.device)
        for cache, new in zip(self._caches, (key, value), strict=True):
            cache[self._blocks[at // self._size], :, at % self._size] = new.transpose(0, 1).to(cache.dtype)

    def read(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = begin // self._size
        keys, values = (
            cache[self._blocks[first : -(-end // self._size)]].transpose(0, 1).flatten(1, 2) for cache in self._caches
        )
        cut = slice(begin - first * self._size, end - first * self._size)
        return keys[:, cut], values[:, cut]


def _attention(
    config: ModelConfig,
    layer: LayerWeights,
    index: int,
    hidden: torch.Tensor,
    start: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    query_scale: torch.Tensor | None,
    cache: _PagedLayer,
) -> torch.Tensor:
    """Self-attention of a chunk [tokens, hidden] at positions ``start`` and on over the cache, which gains the chunk's
    keys and values."""
    eps, dtype = config.rms_norm_eps, hidden.dtype
    end = start + hidden.shape[0]
    x = _rms_norm(hidden, layer.input_layernorm, eps)
    bias = None if layer.qkv_bias is None else layer.qkv_bias.to(dtype)
    qkv = F.linear(x, as_tensor(layer.qkv_proj, hidden.dtype), bias)
    query, key, value = split_heads(config, layer, qkv, _rms_norm)
    if query_scale is not None:
        query = query * query_scale[start:end, None].to(dtype)
    cache.append(start, apply_rope(key, *rope), value)
    window = config.sliding_windows[index]
    begin = max(0, start + 1 - window) if window else 0
    keys, values = (each.to(dtype) for each in cache.read(begin, end))
    positions = torch.arange(begin, end, device=hidden.device)
    offsets = torch.arange(start, end, device=hidden.device)[:, None] - positions
    mask = offsets >= 0 if window is None else (offsets >= 0) & (offsets < window)
    attended = attend(config, layer, apply_rope(query, *rope), keys, values, mask)
    o_bias = None if layer.o_proj_bias is None else layer.o_proj_bias.to(dtype)
    attended = attended.transpose(0, 1).reshape(len(hidden), -1)
    return F.linear(attended, as_tensor(layer.o_proj, hidden.dtype), o_bias)


def split_heads(
    config: ModelConfig,
    layer: LayerWeights,
    qkv: torch.Tensor,
    norm: Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """q, k and v [heads, tokens, head_dim] of their projections [tokens, qkv_size], with q and k normed."""
    kv_size, eps = config.num_key_value_heads * config.head_dim, config.rms_norm_eps
    query, key, value = qkv.split([config.attention_size, kv_size, kv_size], dim=-1)
    if config.norms_whole_qk:
        query, key = norm(query, layer.q_norm, eps), norm(key, layer.k_norm, eps)
    query, key, value = (each.view(len(qkv), -1, config.head_dim).transpose(0, 1) for each in (query, key, value))
    if not config.norms_whole_qk:
        query, key = norm(query, layer.q_norm, eps), norm(key, layer.k_norm, eps)
    return query, key, value


def attend(
    config: ModelConfig,
    layer: LayerWeights,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attention of query [heads, tokens, head_dim] over keys and values [kv_heads, positions, head_dim] where mask
    [tokens, positions] is true: [heads, tokens, head_dim]."""
    grouped = config.num_attention_heads != config.num_key_value_heads
    if not config.attention_softcap and layer.sinks is None:
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=config.scaling, enable_gqa=grouped
        )[0]
    groups = config.num_attention_heads // config.num_key_value_heads
    keys, values = (each.repeat_interleave(groups, dim=0) for each in (keys, values))
    scores = softened(query @ keys.transpose(1, 2) * config.scaling, config.attention_softcap)
    return softmax_with_sinks(scores.masked_fill(~mask, -torch.inf).float(), layer.sinks).to(query.dtype) @ values


def _rope(
    config: ModelConfig, weights: ModelWeights, layer: int, start: int, end: int, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [tokens, rotary_pairs] of a chunk, in the weights' dtype. With positions [3, tokens] each channel
    pair has a position of its own, that of its axis; negative ones are the tables' mirror images."""
    all_cos, all_sin = weights.rope_of(config, layer)
    cos, sin = all_cos[start:end], all_sin[start:end]
    if positions is not None:
        at = positions[list(config.position_axes or ()), start:end].T
        cos, sin = all_cos.gather(0, at.abs()), all_sin.gather(0, at.abs()) * at.sign()
    return cos.to(weights.dtype), sin.to(weights.dtype)


def _branch(config: ModelConfig, norm: torch.Tensor | None, change: torch.Tensor) -> torch.Tensor:
    """What is added to the residual stream, of what attention or the FFN gave."""
    normed = change if norm is None else _rms_norm(change, norm, config.rms_norm_eps)
    return normed * config.residual_multiplier


def _ffn(
    config: ModelConfig,
    layer: LayerWeights,
    hidden: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The FFN branch of a layer for [tokens, hidden], without the residual. ``multiply`` makes down_proj's input of the
    activated gates and the ups."""
    x = _rms_norm(hidden, layer.post_attention_layernorm, config.rms_norm_eps)
    if layer.router is not None:
        return of_experts(config, layer, x, multiply)
    gate, up = F.linear(x, as_tensor(layer.gate_up_proj, hidden.dtype)).chunk(2, dim=-1)
    return F.linear(multiply(activation_of(config.activation)(gate), up), as_tensor(layer.down_proj, hidden.dtype))


def of_experts(
    config: ModelConfig,
    layer: LayerWeights,
    x: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mul,
) -> torch.Tensor:
    """The FFN of a layer with experts for its normed input [tokens, hidden]: what route_experts and the ops behind it
    do. ``multiply`` is given the neurons of a token's experts side by side, in the order in which it chose them."""
    router = as_tensor(cast("AnyMatrix", layer.router), x.dtype)  # of floats of its own, where experts are blocks
    gate_up_proj, down_proj = as_tensor(layer.gate_up_proj, x.dtype), as_tensor(layer.down_proj, x.dtype)
    gate_up_proj = gate_up_proj.view(config.num_experts, -1, x.shape[-1])
    down_proj = expert_down_proj(down_proj, config.num_experts, x.shape[-1])
    gate_up_bias, down_proj_bias = (
        None if bias is None else bias.to(x.dtype) for bias in (layer.gate_up_bias, layer.down_proj_bias)
    )
    router_bias = None if layer.router_bias is None else layer.router_bias.to(router.dtype)
    logits = F.linear(x.to(router.dtype), router, router_bias).float()
    chosen = torch.sort(logits, descending=True, stable=True).indices[:, : config.num_experts_per_tok]
    weights = logits.softmax(-1).gather(1, chosen)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    places = [(expert, *(chosen == expert).nonzero(as_tuple=True)) for expert in chosen.unique().tolist()]
    gates, ups = x.new_empty(2, *chosen.shape, config.moe_intermediate_size)
    for expert, tokens, choice in places:
        own = None if gate_up_bias is None else gate_up_bias.view(config.num_experts, -1)[expert]
        gate, up = F.linear(x[tokens], gate_up_proj[expert], own).chunk(2, dim=-1)
        gates[tokens, choice] = activation_of(config.activation)(gate)
        ups[tokens, choice] = up_factor(config.activation, up)
    products = multiply(gates.flatten(1), ups.flatten(1)).view_as(gates)
    branch = torch.zeros_like(x)
    for expert, tokens, choice in places:
        own = None if down_proj_bias is None else down_proj_bias.view(config.num_experts, -1)[expert]
        outputs = F.linear(products[tokens, choice], down_proj[expert], own)
        branch[tokens] += (outputs * weights[tokens, choice, None]).to(x.dtype)
    return branch


def _multiply_kept(
    gate_threshold: torch.Tensor, product_threshold: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """The products, 0 for the neurons below thresholds [tokens, 1]."""
    products = gate.where(gate.abs() >= gate_threshold, 0) * up
    return products.where(products.abs() >= product_threshold, 0)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As transformers: normalised in fp32, scaled in the model's dtype; x itself where there is no weight."""
    if weight is None:
        return x
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)
