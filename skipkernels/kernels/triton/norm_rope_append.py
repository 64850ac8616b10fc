"""norm_rope_append: q and k of a finished projection, each normed as a whole, rotated -> query and the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.paged_cache import cache_entries
from skipkernels.kernels.triton.qkv_rope_append import channels_of, store_pairs
from skipkernels.program.table import Instruction


@triton.jit
def load_pairs(buffer, offsets, channels, inside):
    return tl.load(buffer + offsets + channels[0], mask=inside, other=0.0), tl.load(
        buffer + offsets + channels[1], mask=inside, other=0.0
    )


@triton.jit
def norm_heads(first, second, norm, offsets, channels, inside, size: tl.constexpr, eps):
    """rms_norm of all heads of a row together, in pairs of channels [heads, pairs]."""
    squares = tl.sum(tl.sum(first * first + second * second, axis=1), axis=0)
    scale = tl.rsqrt(squares / size + eps)
    weights = load_pairs(norm, offsets, channels, inside)
    return first * scale * weights[0], second * scale * weights[1]


@triton.jit(do_not_specialize=["block_size", "blocks_per_sequence"])
def norm_rope_append_kernel(
    qkv,
    q_norm,
    k_norm,
    rope_cos,
    rope_sin,
    query,
    k_cache,
    v_cache,
    block_table,
    row_sequence,
    row_position,
    row_mask,
    block_size,
    blocks_per_sequence,
    rms_norm_eps,
    qkv_size: tl.constexpr,
    query_size: tl.constexpr,
    key_size: tl.constexpr,
    num_attention_heads: tl.constexpr,
    num_key_value_heads: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_pairs: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    half: tl.constexpr = head_dim // 2
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    channels = channels_of(pair, half, rotary_pairs)
    position = tl.load(row_position + row)
    turns = pair < rotary_pairs
    at = position.to(tl.int64) * rotary_pairs + pair
    cos = tl.load(rope_cos + at, mask=turns, other=1.0)
    sin = tl.load(rope_sin + at, mask=turns, other=0.0)

    head = tl.arange(0, BLOCK_HEADS)[:, None]
    inside = (head < num_attention_heads) & (pair < half)
    of_query = row * qkv_size + head * head_dim
    first, second = load_pairs(qkv, of_query, channels, inside)
    first, second = norm_heads(first, second, q_norm, head * head_dim, channels, inside, query_size, rms_norm_eps)
    first, second = first * cos - second * sin, second * cos + first * sin
    store_pairs(query, row * query_size + head * head_dim, channels, first, second, inside)

    kv_head = tl.arange(0, BLOCK_KV_HEADS)[:, None]
    kv_inside = (kv_head < num_key_value_heads) & (pair < half)
    of_key = row * qkv_size + query_size + kv_head * head_dim
    first, second = load_pairs(qkv, of_key, channels, kv_inside)
    first, second = norm_heads(first, second, k_norm, kv_head * head_dim, channels, kv_inside, key_size, rms_norm_eps)
    first, second = first * cos - second * sin, second * cos + first * sin
    sequence = tl.load(row_sequence + row)
    entry = cache_entries(
        block_table, sequence, position, True, kv_head, blocks_per_sequence, block_size, num_key_value_heads
    )
    store_pairs(k_cache, entry * head_dim, channels, first, second, kv_inside)
    of_value = of_key + key_size
    first, second = load_pairs(qkv, of_value, channels, kv_inside)
    store_pairs(v_cache, entry * head_dim, channels, first, second, kv_inside)

    tl.debug_barrier()  # threads of several warps may hold the same element: all have read it before one writes it
    zeros = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], tl.float32)
    store_pairs(qkv, of_query, channels, zeros, zeros, inside)
    kv_zeros = tl.zeros([BLOCK_KV_HEADS, BLOCK_PAIRS], tl.float32)
    store_pairs(qkv, of_key, channels, kv_zeros, kv_zeros, kv_inside)
    store_pairs(qkv, of_value, channels, kv_zeros, kv_zeros, kv_inside)


def norm_rope_append(ins: Instruction) -> tuple[Launch, ...]:
    sizes = ins.sizes
    blocks = {
        "BLOCK_HEADS": triton.next_power_of_2(sizes["num_attention_heads"]),
        "BLOCK_KV_HEADS": triton.next_power_of_2(sizes["num_key_value_heads"]),
        "BLOCK_PAIRS": triton.next_power_of_2(sizes["head_dim"] // 2),
    }
    # a row is one program: 40 heads of 128 channels are 20 KB, of which eight warps hold 80 bytes a thread
    return (Launch.of(norm_rope_append_kernel, ins, (sizes["num_rows"],), blocks, num_warps=8),)
