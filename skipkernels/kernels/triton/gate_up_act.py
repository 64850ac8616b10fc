"""gate_up_act: intermediate = act(gate_proj(x)) * up_proj(x) of x = rms_norm(hidden_states)."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import gated
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.model.matrix import StackedMatrix
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_act_kernel(
    hidden_states,
    post_attention_layernorm,
    gate_up_proj,
    up_proj,  # None: below gate_proj in gate_up_proj
    intermediate,
    row_mask,
    num_rows,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    activation: tl.constexpr,
    planes: tl.constexpr,
    up_planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    PAIRS: tl.constexpr = BLOCK_OUT // 2
    if up_proj is None:
        # gate and up rows alternate, so that one tile holds both of a channel
        index = tl.arange(0, BLOCK_OUT)
        channels = tl.program_id(1) * PAIRS + index // 2
        gate_up = linear(
            hidden_states, post_attention_layernorm, rms_norm_eps,
            gate_up_proj, channels + index % 2 * intermediate_size, channels < intermediate_size,
            rows, wanted, hidden_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        gate, up = tl.split(tl.reshape(gate_up, [BLOCK_ROWS, PAIRS, 2]))
        channels = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    else:
        channels = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
        gate = linear(
            hidden_states, post_attention_layernorm, rms_norm_eps, gate_up_proj, channels,
            channels < intermediate_size, rows, wanted, hidden_size, planes, BLOCK_ROWS, PAIRS, BLOCK_IN,
        )  # fmt: skip
        up = linear(
            hidden_states, post_attention_layernorm, rms_norm_eps, up_proj, channels,
            channels < intermediate_size, rows, wanted, hidden_size, up_planes,
            BLOCK_ROWS, PAIRS, BLOCK_IN,
        )  # fmt: skip
    tl.store(
        intermediate + rows[:, None] * intermediate_size + channels[None, :],
        gated(activation, gate, up),
        mask=wanted[:, None] & (channels < intermediate_size)[None, :],
    )


def gate_up_act(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    matrix = ins.tensors["gate_up_proj"]
    if isinstance(matrix, StackedMatrix):  # gate and up in formats of their own
        gate, up = matrix.parts
        parts = operand("gate_up_proj", gate) | operand("up_proj", up, "up_planes")
        cut = tile(gate, ins.sizes["num_rows"], unit=32)  # tensor cores take 16 rows of either
    else:
        parts = operand("gate_up_proj", matrix) | {"up_proj": None, "up_planes": None}
        cut = tile(matrix, ins.sizes["num_rows"], unit=2)
    grid = (tiles, triton.cdiv(ins.sizes["gate_up_size"], cut.out))
    blocks = parts | {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(gate_up_act_kernel, ins, grid, blocks),)
