"""Where positions of a sequence lie in the paged KV cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cache_entries(
    block_table,
    sequence,
    position,
    wanted,
    kv_head,
    blocks_per_sequence,
    block_size,
    num_key_value_heads: tl.constexpr,
):
    """The number i64 of each position's entry [head_dim] in k_cache and v_cache, where it is wanted."""
    at = block_table + sequence * blocks_per_sequence + position // block_size
    block = tl.load(at, mask=wanted, other=0).to(tl.int64)
    return (block * num_key_value_heads + kv_head) * block_size + position % block_size
