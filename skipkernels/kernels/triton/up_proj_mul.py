"""up_proj_mul: intermediate *= up_proj(x) of x = rms_norm(hidden_states), for the neurons of a list on the device.

The grid is that of a full list; programs behind the end of the list at hand leave at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_rows"])
def up_proj_mul_kernel(
    hidden_states,
    post_attention_layernorm,
    up_proj,
    neurons,
    num_neurons,
    intermediate,
    row_mask,
    num_rows,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    listed = tl.load(num_neurons)
    if tl.program_id(1) * BLOCK_OUT >= listed:
        return
    entries = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = entries < listed
    chosen = tl.load(neurons + entries, mask=inside, other=0)
    up = linear(
        hidden_states, post_attention_layernorm, rms_norm_eps, up_proj, chosen, inside, rows, wanted,
        hidden_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    at = intermediate + rows[:, None] * intermediate_size + chosen[None, :]
    mask = wanted[:, None] & inside[None, :]
    gate = tl.load(at, mask=mask, other=0.0)
    tl.store(at, tl.where(gate == 0, 0.0, gate * up), mask=mask)


def up_proj_mul(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    cut = tile(ins.tensors["up_proj"], ins.sizes["num_rows"])
    grid = (tiles, triton.cdiv(ins.sizes["intermediate_size"], cut.out))
    blocks = operand("up_proj", ins.tensors["up_proj"])
    blocks |= {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(up_proj_mul_kernel, ins, grid, blocks),)
