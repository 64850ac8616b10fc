"""decode_attention: attn_output = softmax(scaling q k^T) v over the positions of a row's own sequence.

Two kernels. ``attend_split``: a program reads the keys and values of one split and one key/value head once, for all
query heads of the group, and leaves their maximum, sum and unnormalised output in attn_partials. ``merge_splits``
merges a head's splits in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import softened
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.paged_cache import cache_entries
from skipkernels.program.table import Instruction

MERGED_TOGETHER = 32
"""Splits whose partials a merging program has in flight."""


@triton.jit
def attended(row_position, row, sliding_window: tl.constexpr, kv_split_size: tl.constexpr):
    """The positions [begin, end) a row attends to, the split ``begin`` is in, and how many splits they are."""
    end = tl.load(row_position + row) + 1
    begin = tl.maximum(end - sliding_window, 0) if sliding_window else end * 0
    first_split = begin // kv_split_size
    return begin, end, first_split, tl.cdiv(end, kv_split_size) - first_split


# one code for every block_size: a specialised one might sum in another order
@triton.jit(do_not_specialize=["num_splits", "block_size", "blocks_per_sequence"])
def attend_split_kernel(
    query,
    k_cache,
    v_cache,
    block_table,
    row_sequence,
    row_position,
    attn_partials,
    row_mask,
    block_size,
    blocks_per_sequence,
    num_splits,
    scaling,
    softcap: tl.constexpr,
    sliding_window: tl.constexpr,
    kv_split_size: tl.constexpr,
    num_attention_heads: tl.constexpr,
    num_key_value_heads: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(row_mask + row) == 0:
        return
    begin, end, first_split, splits = attended(row_position, row, sliding_window, kv_split_size)
    if split >= splits:
        return
    group: tl.constexpr = num_attention_heads // num_key_value_heads
    member = tl.arange(0, BLOCK_GROUP)
    heads = row * num_attention_heads + kv_head * group + member
    channels = tl.arange(0, BLOCK_DIM)
    channels_inside = channels < head_dim
    lanes = tl.arange(0, BLOCK_SPLIT)
    positions = (first_split + split) * kv_split_size + lanes
    attends = (lanes < kv_split_size) & (positions >= begin) & (positions < end)

    at = query + heads[:, None] * head_dim + channels[None, :]
    group_inside = (member < group)[:, None] & channels_inside[None, :]
    q = tl.load(at, mask=group_inside, other=0.0)
    sequence = tl.load(row_sequence + row)
    entries = cache_entries(
        block_table, sequence, positions, attends, kv_head, blocks_per_sequence, block_size, num_key_value_heads
    )
    at = entries[:, None] * head_dim + channels[None, :]
    mask = attends[:, None] & channels_inside[None, :]
    k = tl.load(k_cache + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_cache + at, mask=mask, other=0.0).to(tl.float32)

    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if softcap > 0:
        scores = softened(softcap, scores)
    scores = tl.where(attends[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    weights = tl.exp(scores - top[:, None])
    out = tl.dot(weights, v, input_precision="tf32x3")

    partial = attn_partials + (heads.to(tl.int64) * num_splits + split) * (head_dim + 2)
    tl.store(partial, top, mask=member < group)
    tl.store(partial + 1, tl.sum(weights, axis=1), mask=member < group)
    tl.store(partial[:, None] + 2 + channels[None, :], out, mask=group_inside)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits_kernel(
    row_position,
    sinks,  # None: there are none
    attn_partials,
    attn_output,
    row_mask,
    num_splits,
    sliding_window: tl.constexpr,
    kv_split_size: tl.constexpr,
    num_attention_heads: tl.constexpr,
    head_dim: tl.constexpr,
    MERGED_TOGETHER: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    if tl.load(row_mask + row) == 0:
        return
    _, _, _, splits = attended(row_position, row, sliding_window, kv_split_size)
    channels = tl.arange(0, BLOCK_DIM)
    channels_inside = channels < head_dim
    of_head = (row * num_attention_heads + head).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if sinks is not None:  # one more score, without a value
        top = tl.load(sinks + head)
        total += 1.0
    out = tl.zeros([BLOCK_DIM], tl.float32)
    start = 0
    while start < splits:
        split = start + tl.arange(0, MERGED_TOGETHER)
        inside = split < splits
        partial = attn_partials + (of_head * num_splits + split) * (head_dim + 2)
        tops = tl.load(partial, mask=inside, other=float("-inf"))
        totals = tl.load(partial + 1, mask=inside, other=0.0)
        mask = inside[:, None] & channels_inside[None, :]
        outs = tl.load(partial[:, None] + 2 + channels[None, :], mask=mask, other=0.0)
        before, top = top, tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp(tops - top)
        total = total * tl.exp(before - top) + tl.sum(totals * weights, axis=0)
        out = out * tl.exp(before - top) + tl.sum(outs * weights[:, None], axis=0)
        start += MERGED_TOGETHER
    tl.store(attn_output + of_head * head_dim + channels, out / total, mask=channels_inside)


def decode_attention(ins: Instruction) -> tuple[Launch, ...]:
    s = ins.sizes
    heads, kv_heads, rows = s["num_attention_heads"], s["num_key_value_heads"], s["num_rows"]
    # tensor cores take 16 at least
    group, dim, split = (
        max(16, triton.next_power_of_2(size))
        for size in (heads // kv_heads, s["head_dim"], int(ins.scalars["kv_split_size"]))
    )
    splits = {"BLOCK_GROUP": group, "BLOCK_SPLIT": split, "BLOCK_DIM": dim}
    merge = {"MERGED_TOGETHER": MERGED_TOGETHER, "BLOCK_DIM": dim}
    return (
        # eight warps: with four, the query's tf32 halves spill at a head_dim of 128
        Launch.of(attend_split_kernel, ins, (s["num_splits"], kv_heads, rows), splits, num_warps=8),
        Launch.of(merge_splits_kernel, ins, (heads, rows), merge),
    )
