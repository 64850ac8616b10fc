"""embed: hidden_states = the embedding of each row's token, or the one given in its place."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import operand
from skipkernels.kernels.triton.linear_blocks import store_row_of_blocks
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
    planes: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    first = tl.program_id(1) * BLOCK
    token = tl.load(input_ids + row)
    to = hidden_states + row * hidden_size
    if token < 0:
        channels = first + tl.arange(0, BLOCK)
        prompt_row = row - (num_rows - num_prompt_rows)
        embedding = tl.load(prompt_embeddings + prompt_row * hidden_size + channels, mask=channels < hidden_size)
        tl.store(to + channels, embedding, mask=channels < hidden_size)
    elif planes is None:
        channels = first + tl.arange(0, BLOCK)
        at = embed_tokens + token.to(tl.int64) * hidden_size + channels
        embedding = tl.load(at, mask=channels < hidden_size).to(tl.float32) * scale
        tl.store(to + channels, embedding, mask=channels < hidden_size)
    else:
        store_row_of_blocks(to, embed_tokens, token, first, scale, hidden_size, planes, BLOCK)


def embed(ins: Instruction) -> tuple[Launch, ...]:
    grid = (ins.sizes["num_rows"], triton.cdiv(ins.sizes["hidden_size"], BLOCK))
    blocks = operand("embed_tokens", ins.tensors["embed_tokens"]) | {"BLOCK": BLOCK}
    return (Launch.of(embed_kernel, ins, grid, blocks),)
