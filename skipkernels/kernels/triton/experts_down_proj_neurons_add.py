"""experts_down_proj_neurons_add: hidden_states += each chosen expert's share, of neurons whose products are not 0."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.down_proj_add import add_to_stream, channels_of_program
from skipkernels.kernels.triton.down_proj_neurons_add import cut_columns, kept_products
from skipkernels.kernels.triton.experts_down_proj_add import share
from skipkernels.kernels.triton.experts_gate_up_act import expert_at
from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_sequences"])
def experts_down_proj_neurons_add_kernel(
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
    BLOCK_NEURONS: tl.constexpr,
):
    # a program is one row, whose experts it takes in the order of their ids, as in experts_down_proj_add
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
            out = kept_products(
                expert_intermediate + pair * expert_size, down_proj + expert.to(tl.int64) * (expert_size * hidden_size),
                channels, inside, rows, wanted, hidden_size, expert_size, 1, BLOCK_OUT, BLOCK_NEURONS,
            )  # fmt: skip
            change += share(out, pair, expert, expert_weights, down_proj_bias, channels, inside, hidden_size)
        at += 1
    add_to_stream(
        change, channels, inside, hidden_states, similarity_partials, rows, wanted, num_sequences,
        hidden_size, rows_per_partial, 1, PARTIALS, LANES,
    )  # fmt: skip


def experts_down_proj_neurons_add(ins: Instruction) -> tuple[Launch, ...]:
    programs, blocks = cut_columns(ins, ins.sizes["expert_size"], 1)
    blocks |= {"BLOCK_BEGINS": triton.next_power_of_2(ins.sizes["num_begins"])}
    return (Launch.of(experts_down_proj_neurons_add_kernel, ins, (ins.sizes["num_rows"], programs), blocks),)
