"""gate_proj_act: intermediate = act(gate_proj(x)) of x = rms_norm(hidden_states), of every neuron."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import activated
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_rows"])
def gate_proj_act_kernel(
    hidden_states,
    post_attention_layernorm,
    gate_proj,
    intermediate,
    row_mask,
    num_rows,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    activation: tl.constexpr,
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    neurons = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = neurons < intermediate_size
    gate = linear(
        hidden_states, post_attention_layernorm, rms_norm_eps, gate_proj, neurons, inside, rows, wanted,
        hidden_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    at = intermediate + rows[:, None] * intermediate_size + neurons[None, :]
    tl.store(at, activated(activation, gate), mask=wanted[:, None] & inside[None, :])


def gate_proj_act(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    cut = tile(ins.tensors["gate_proj"], ins.sizes["num_rows"])
    grid = (tiles, triton.cdiv(ins.sizes["intermediate_size"], cut.out))
    blocks = operand("gate_proj", ins.tensors["gate_proj"])
    blocks |= {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(gate_proj_act_kernel, ins, grid, blocks),)
