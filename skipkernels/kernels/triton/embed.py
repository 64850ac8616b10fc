"""embed: hidden_states = the embedding of each row's current token."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.table import Instruction

BLOCK = 1024


@triton.jit
def embed_kernel(hidden_states, embed_tokens, input_ids, when, hidden_size: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if tl.load(when + row) == 0:
        return
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < hidden_size
    token = tl.load(input_ids + row).to(tl.int64)
    embedding = tl.load(embed_tokens + token * hidden_size + channels, mask=inside)
    tl.store(hidden_states + row * hidden_size + channels, embedding.to(tl.float32), mask=inside)


def embed(ins: Instruction) -> tuple[Launch, ...]:
    grid = (ins.sizes["batch_size"], triton.cdiv(ins.sizes["hidden_size"], BLOCK))
    return (Launch.of(embed_kernel, ins, grid, {"BLOCK": BLOCK}),)
