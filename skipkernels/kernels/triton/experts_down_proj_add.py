"""experts_down_proj_add: hidden_states += each chosen expert's share, and the partial sums of the similarity test."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.down_proj_add import add_to_stream, channels_of_program
from skipkernels.kernels.triton.experts_gate_up_act import expert_at
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, tile
from skipkernels.program.table import Instruction


@triton.jit
def share(
    out,
    pair,
    expert,
    expert_weights,
    down_proj_bias,  # None: there is none
    channels,
    inside,
    hidden_size: tl.constexpr,
):
    """What a choice adds to its row, f32 [1, channels], of its expert's product ``out`` without a bias."""
    if down_proj_bias is not None:
        out += tl.load(down_proj_bias + expert * hidden_size + channels, mask=inside, other=0.0)[None, :]
    return tl.load(expert_weights + pair) * out


@triton.jit(do_not_specialize=["num_sequences"])
def experts_down_proj_add_kernel(
    expert_intermediate,
    expert_weights,
    expert_begins,
    expert_pairs,
    down_proj,
    down_proj_bias,  # None: there is none
    hidden_states,
    similarity_partials,
    row_mask,
    num_sequences,
    hidden_size: tl.constexpr,
    expert_size: tl.constexpr,
    experts_per_token: tl.constexpr,
    num_begins: tl.constexpr,
    rows_per_partial: tl.constexpr,
    BLOCK_BEGINS: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    # a program is one row, whose experts it takes in the order of their ids; rows with the same expert run next to one
    # another and share its weights in the cache
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    BLOCK_OUT: tl.constexpr = PARTIALS * LANES
    rows = row + tl.arange(0, 1)
    wanted = rows >= 0
    channels, inside = channels_of_program(hidden_size, rows_per_partial, PARTIALS, LANES)
    change = tl.zeros([1, BLOCK_OUT], tl.float32)
    listed = tl.load(expert_begins + num_begins - 1)
    at = 0
    while at < listed:
        pair = tl.load(expert_pairs + at)
        if pair // experts_per_token == row:
            expert = expert_at(expert_begins, at, num_begins, BLOCK_BEGINS)
            out = linear(
                expert_intermediate + pair * expert_size, None, 0.0, down_proj, expert * hidden_size + channels,
                inside, rows, wanted, expert_size, None, 1, BLOCK_OUT, BLOCK_IN,
            )  # fmt: skip
            change += share(out, pair, expert, expert_weights, down_proj_bias, channels, inside, hidden_size)
        at += 1
    add_to_stream(
        change, channels, inside, hidden_states, similarity_partials, rows, wanted, num_sequences,
        hidden_size, rows_per_partial, 1, PARTIALS, LANES,
    )  # fmt: skip


def experts_down_proj_add(ins: Instruction) -> tuple[Launch, ...]:
    sizes, rows_per_partial = ins.sizes, int(ins.scalars["rows_per_partial"])
    lanes = triton.next_power_of_2(rows_per_partial)
    cut = tile(ins.tensors["down_proj"][: sizes["hidden_size"]], 1, unit=lanes)  # of one expert
    partials = cut.out // lanes
    grid = (sizes["num_rows"], triton.cdiv(sizes["hidden_size"], partials * rows_per_partial))
    blocks = {
        "num_sequences": sizes.get("num_sequences", 0),  # only similarity_partials has the symbol
        "BLOCK_BEGINS": triton.next_power_of_2(sizes["num_begins"]),
        "PARTIALS": partials,
        "LANES": lanes,
        "BLOCK_IN": cut.columns,
    }
    return (Launch.of(experts_down_proj_add_kernel, ins, grid, blocks),)
