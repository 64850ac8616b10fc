"""embed: hidden_states = the embedding of each row's token, or the one given in its place."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.table import Instruction

BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_prompt_rows"])
def embed_kernel(
    hidden_states,
    embed_tokens,
    input_ids,
    prompt_embeddings,
    row_mask,
    num_rows,
    num_prompt_rows,
    scale,
    hidden_size: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < hidden_size
    token = tl.load(input_ids + row)
    if token >= 0:
        embedding = tl.load(embed_tokens + token.to(tl.int64) * hidden_size + channels, mask=inside).to(tl.float32)
        embedding *= scale
    else:
        prompt_row = row - (num_rows - num_prompt_rows)
        embedding = tl.load(prompt_embeddings + prompt_row * hidden_size + channels, mask=inside)
    tl.store(hidden_states + row * hidden_size + channels, embedding, mask=inside)


def embed(ins: Instruction) -> tuple[Launch, ...]:
    grid = (ins.sizes["num_rows"], triton.cdiv(ins.sizes["hidden_size"], BLOCK))
    return (Launch.of(embed_kernel, ins, grid, {"BLOCK": BLOCK}),)
