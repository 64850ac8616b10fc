"""qkv_rope_append: rms_norm -> qkv_proj -> rotary -> query, and each row's own position of the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.paged_cache import cache_entries
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit
def norm_head(x, norm, channels, inside, head_dim: tl.constexpr, eps):
    """rms_norm of a whole head [BLOCK_ROWS, BLOCK_OUT], zero outside; the head itself where there is no norm."""
    if norm is not None:
        mean_square = tl.sum(x * x, axis=1) / head_dim
        weight = tl.load(norm + channels, mask=inside, other=0.0)
        x *= tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]
    return x


@triton.jit
def channels_of(pair, half: tl.constexpr, rotary_pairs: tl.constexpr):
    """A head's channels in ``half`` pairs: those that are rotated with each other, then, of the channels behind those,
    the first half with the second."""
    first = tl.where(pair < rotary_pairs, pair, pair + rotary_pairs)
    return first, first + tl.where(pair < rotary_pairs, rotary_pairs, half - rotary_pairs)


@triton.jit
def store_pairs(buffer, offsets, channels, first, second, mask):
    tl.store(buffer + offsets + channels[0], first.to(buffer.dtype.element_ty), mask=mask)
    tl.store(buffer + offsets + channels[1], second.to(buffer.dtype.element_ty), mask=mask)


@triton.jit
def angles(
    rope_cos,
    rope_sin,
    position,
    pair,
    mask,
    rows,
    position_axes,
    prompt_positions,
    num_sequences,
    rotary_pairs: tl.constexpr,
):
    """Cosine and sine [BLOCK_ROWS, pairs] of each row's position, or of a prompt row's position on the pair's axis; of
    an angle of 0 for pairs that are not rotated."""
    mask = mask & (pair < rotary_pairs)[None, :]
    turn = position[:, None]
    if position_axes is not None:
        prompt_row = (rows - num_sequences)[:, None]
        axis = tl.load(position_axes + pair, mask=pair < rotary_pairs, other=0)
        on_axis = tl.load(prompt_positions + prompt_row * 3 + axis[None, :], mask=mask & (prompt_row >= 0), other=0)
        turn = tl.where(prompt_row >= 0, on_axis, turn)
    at = tl.abs(turn).to(tl.int64) * rotary_pairs + pair[None, :]
    cos = tl.load(rope_cos + at, mask=mask, other=1.0)
    sin = tl.load(rope_sin + at, mask=mask, other=0.0)
    return cos, tl.where(turn < 0, -sin, sin)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "block_size", "blocks_per_sequence"])
def qkv_rope_append_kernel(
    hidden_states,
    input_layernorm,
    qkv_proj,
    qkv_bias,
    q_norm,
    k_norm,
    rope_cos,
    rope_sin,
    query_scale,
    position_axes,
    prompt_positions,
    query,
    k_cache,
    v_cache,
    block_table,
    row_sequence,
    row_position,
    row_mask,
    num_rows,
    num_sequences,
    block_size,
    blocks_per_sequence,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    num_attention_heads: tl.constexpr,
    num_key_value_heads: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_pairs: tl.constexpr,
    first_head: tl.constexpr,  # of those in qkv_proj: a part of the matrix, where its formats differ
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    # a program has one head; channels that are rotated together alternate
    half: tl.constexpr = head_dim // 2
    PAIRS: tl.constexpr = BLOCK_OUT // 2
    head = first_head + tl.program_id(1)
    index = tl.arange(0, BLOCK_OUT)
    pair = tl.program_id(2) * PAIRS + index // 2
    inside = pair < half
    low, high = channels_of(pair, half, rotary_pairs)
    channels = tl.where(index % 2 == 0, low, high)
    features = head * head_dim + channels
    out = linear(
        hidden_states, input_layernorm, rms_norm_eps, qkv_proj, features - first_head * head_dim, inside, rows, wanted,
        hidden_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if qkv_bias is not None:
        out += tl.load(qkv_bias + features, mask=inside, other=0.0)[None, :]
    is_query = head < num_attention_heads
    is_value = head >= num_attention_heads + num_key_value_heads
    if is_query:
        out = norm_head(out, q_norm, channels, inside, head_dim, rms_norm_eps)
    elif not is_value:
        out = norm_head(out, k_norm, channels, inside, head_dim, rms_norm_eps)
    first, second = tl.split(tl.reshape(out, [BLOCK_ROWS, PAIRS, 2]))

    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    mask = wanted[:, None] & (pair < half)[None, :]
    position = tl.load(row_position + rows, mask=wanted, other=0)
    if not is_value:
        cos, sin = angles(
            rope_cos, rope_sin, position, pair, mask, rows, position_axes, prompt_positions, num_sequences,
            rotary_pairs,
        )  # fmt: skip
        first, second = first * cos - second * sin, second * cos + first * sin
    low, high = channels_of(pair[None, :], half, rotary_pairs)
    if is_query:
        if query_scale is not None:
            scale = tl.load(query_scale + position, mask=wanted, other=0.0)[:, None]
            first, second = first * scale, second * scale
        of_query = (rows[:, None] * num_attention_heads + head) * head_dim
        store_pairs(query, of_query, (low, high), first, second, mask)
    else:
        kv_head = (head - num_attention_heads) % num_key_value_heads
        sequence = tl.load(row_sequence + rows, mask=wanted, other=0)
        entry = cache_entries(
            block_table, sequence, position, wanted, kv_head, blocks_per_sequence, block_size, num_key_value_heads
        )
        of_entry = entry[:, None] * head_dim
        if is_value:
            store_pairs(v_cache, of_entry, (low, high), first, second, mask)
        else:
            store_pairs(k_cache, of_entry, (low, high), first, second, mask)


def qkv_rope_append(ins: Instruction) -> tuple[Launch, ...]:
    sizes = ins.sizes
    has_norm = ins.tensors["q_norm"] is not None or ins.tensors["k_norm"] is not None
    tiles, block_rows = row_tiles(sizes["num_rows"])
    whole_head = 2 * triton.next_power_of_2(sizes["head_dim"] // 2)
    matrix, launches, first_head = ins.tensors["qkv_proj"], [], 0
    for part in (matrix,) if isinstance(matrix, torch.Tensor) else matrix.parts:
        heads = part.shape[0] // sizes["head_dim"]
        cut = tile(part, sizes["num_rows"], unit=whole_head if has_norm else 2)
        grid = (tiles, heads, triton.cdiv(sizes["head_dim"], cut.out))
        blocks = {"first_head": first_head, "BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
        # eight warps for a whole head of several rows: with four, 16 rows of 128 channels spill
        num_warps = 8 if block_rows > 1 and cut.out > 64 else 4
        blocks |= operand("qkv_proj", part)
        launches.append(Launch.of(qkv_rope_append_kernel, ins, grid, blocks, num_warps=num_warps))
        first_head += heads
    return tuple(launches)
