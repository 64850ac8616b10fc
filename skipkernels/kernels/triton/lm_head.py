"""lm_head: logits = lm_head(rms_norm(hidden_states))."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, tile
from skipkernels.kernels.triton.rows import block_batch, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["batch_size"])
def lm_head_kernel(
    hidden_states,
    norm,
    lm_head,
    logits,
    when,
    batch_size,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    vocab_size: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(when, batch_size, BLOCK_BATCH)
    if not any_wanted:
        return
    tokens = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tokens < vocab_size
    scores = linear(
        hidden_states, norm, rms_norm_eps, lm_head, tokens, inside, rows, wanted,
        hidden_size, BLOCK_BATCH, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    at = logits + rows[:, None] * vocab_size + tokens[None, :]
    tl.store(at, scores, mask=wanted[:, None] & inside[None, :])


def lm_head(ins: Instruction) -> tuple[Launch, ...]:
    cut = tile(ins.tensors["lm_head"], ins.sizes["batch_size"])
    grid = (triton.cdiv(ins.sizes["vocab_size"], cut.out),)
    blocks = {"BLOCK_BATCH": block_batch(ins), "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}
    return (Launch.of(lm_head_kernel, ins, grid, blocks),)
