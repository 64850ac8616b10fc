"""o_proj_add: hidden_states += o_proj(attn_output)."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_rows"])
def o_proj_add_kernel(
    attn_output,
    o_proj,
    o_proj_bias,
    hidden_states,
    row_mask,
    num_rows,
    hidden_size: tl.constexpr,
    attention_size: tl.constexpr,
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    channels = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = channels < hidden_size
    change = linear(
        attn_output, None, 0.0, o_proj, channels, inside, rows, wanted,
        attention_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if o_proj_bias is not None:
        change += tl.load(o_proj_bias + channels, mask=inside, other=0.0)[None, :]
    at = hidden_states + rows[:, None] * hidden_size + channels[None, :]
    mask = wanted[:, None] & inside[None, :]
    tl.store(at, tl.load(at, mask=mask) + change, mask=mask)


def o_proj_add(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    cut = tile(ins.tensors["o_proj"], ins.sizes["num_rows"])
    grid = (tiles, triton.cdiv(ins.sizes["hidden_size"], cut.out))
    blocks = operand("o_proj", ins.tensors["o_proj"])
    blocks |= {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(o_proj_add_kernel, ins, grid, blocks),)
