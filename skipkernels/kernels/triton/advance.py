"""advance: records what ran, appends the token, moves the row on or ends it, arms the next step."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.table import Instruction


@triton.jit
def advance_kernel(
    next_token,
    eos_token_ids,
    max_new_tokens,
    input_ids,
    token_ids,
    seen,
    seq_len,
    generated,
    active,
    skip_remaining,
    run_ffn,
    similarity,
    run_map,
    similarity_map,
    progress,
    when,
    batch_size,
    max_seq_len,
    max_eos: tl.constexpr,
    vocab_size: tl.constexpr,
    num_hidden_layers: tl.constexpr,
    BLOCK_EOS: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(when + row) == 0:
        return
    token = tl.load(next_token + row)
    step = tl.load(generated + row)
    length = tl.load(seq_len + row) + 1
    eos = tl.arange(0, BLOCK_EOS)
    ends = tl.load(eos_token_ids + row * max_eos + eos, mask=eos < max_eos, other=-1) == token
    is_eos = tl.max(ends.to(tl.int32), axis=0) != 0
    done = is_eos | (step + 1 >= tl.load(max_new_tokens + row)) | (length >= max_seq_len)
    goes_on = tl.where(done, 0, 1)

    layers = tl.arange(0, BLOCK_LAYERS)
    inside = layers < num_hidden_layers
    flags = run_ffn + layers * batch_size + row
    similarities = similarity + layers * batch_size + row
    at = (row.to(tl.int64) * max_seq_len + step) * num_hidden_layers + layers
    tl.store(run_map + at, (tl.load(flags, mask=inside, other=0) != 0).to(tl.uint8), mask=inside)
    tl.store(similarity_map + at, tl.load(similarities, mask=inside, other=0.0), mask=inside)
    tl.store(flags, goes_on + tl.zeros([BLOCK_LAYERS], tl.int32), mask=inside)
    tl.store(similarities, tl.full([BLOCK_LAYERS], float("nan"), tl.float32), mask=inside)

    tl.store(seq_len + row, length)
    tl.store(generated + row, step + 1)
    tl.store(token_ids + row.to(tl.int64) * (max_seq_len + 1) + length, token)
    tl.store(input_ids + row, token)
    tl.store(seen + row.to(tl.int64) * vocab_size + token, 1)
    tl.store(active + row, goes_on)
    tl.store(skip_remaining + row, 0)

    # The host polls progress: both numbers in one store, released behind everything this program wrote.
    tl.debug_barrier()
    both = (goes_on.to(tl.int64) << 32) | (step + 1).to(tl.int64)
    tl.atomic_xchg(progress.to(tl.pointer_type(tl.int64), bitcast=True) + row, both, sem="release", scope="sys")


def advance(ins: Instruction) -> tuple[Launch, ...]:
    blocks = {
        "BLOCK_EOS": triton.next_power_of_2(ins.sizes["max_eos"]),
        "BLOCK_LAYERS": triton.next_power_of_2(ins.sizes["num_hidden_layers"]),
    }
    return (Launch.of(advance_kernel, ins, (ins.sizes["batch_size"],), blocks, num_warps=1),)
