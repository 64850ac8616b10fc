"""gate_up_act: intermediate = act(gate_proj(x)) * up_proj(x) of x = rms_norm(hidden_states)."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import activated
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_act_kernel(
    hidden_states,
    post_attention_layernorm,
    gate_up_proj,
    intermediate,
    row_mask,
    num_rows,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    activation: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    # gate and up rows alternate, so that one tile holds both of a channel
    PAIRS: tl.constexpr = BLOCK_OUT // 2
    index = tl.arange(0, BLOCK_OUT)
    channels = tl.program_id(1) * PAIRS + index // 2
    gate_up = linear(
        hidden_states, post_attention_layernorm, rms_norm_eps,
        gate_up_proj, channels + index % 2 * intermediate_size, channels < intermediate_size,
        rows, wanted, hidden_size, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(gate_up, [BLOCK_ROWS, PAIRS, 2]))
    channels = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    tl.store(
        intermediate + rows[:, None] * intermediate_size + channels[None, :],
        activated(activation, gate) * up,
        mask=wanted[:, None] & (channels < intermediate_size)[None, :],
    )


def gate_up_act(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    cut = tile(ins.tensors["gate_up_proj"], ins.sizes["num_rows"], unit=2)
    grid = (tiles, triton.cdiv(ins.sizes["gate_up_size"], cut.out))
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(gate_up_act_kernel, ins, grid, blocks),)
