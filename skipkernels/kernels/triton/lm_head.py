"""lm_head: logits = lm_head(rms_norm(hidden_states)) of the decode rows."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import softened
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_sequences"])
def lm_head_kernel(
    hidden_states,
    norm,
    lm_head,
    logits,
    row_mask,
    num_sequences,
    rms_norm_eps,
    softcap: tl.constexpr,
    hidden_size: tl.constexpr,
    vocab_size: tl.constexpr,
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_sequences, BLOCK_ROWS)
    if not any_wanted:
        return
    tokens = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tokens < vocab_size
    scores = linear(
        hidden_states, norm, rms_norm_eps, lm_head, tokens, inside, rows, wanted,
        hidden_size, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if softcap > 0:
        scores = softened(softcap, scores)
    at = logits + rows[:, None] * vocab_size + tokens[None, :]
    tl.store(at, scores, mask=wanted[:, None] & inside[None, :])


def lm_head(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_sequences"])
    cut = tile(ins.tensors["lm_head"], ins.sizes["num_sequences"])
    grid = (tiles, triton.cdiv(ins.sizes["vocab_size"], cut.out))
    blocks = operand("lm_head", ins.tensors["lm_head"])
    blocks |= {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(lm_head_kernel, ins, grid, blocks),)
