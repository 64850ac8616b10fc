"""advance: records what ran, appends the token, moves the sequence on or ends it, arms the next step."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.state import DECODING as _DECODING
from skipkernels.program.state import ENDED as _ENDED
from skipkernels.program.state import WAITS_FOR_BLOCK as _WAITS_FOR_BLOCK
from skipkernels.program.table import Instruction

DECODING = tl.constexpr(_DECODING)
ENDED = tl.constexpr(_ENDED)
WAITS_FOR_BLOCK = tl.constexpr(_WAITS_FOR_BLOCK)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fence_for_host():
    """The host sees what this program has written before anything that it writes from here on."""
    tl.debug_barrier()
    if not INTERPRETED:  # the interpreter knows no assembly, and its writes are the host's own
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r,~{memory}", [], tl.int32, False, 1)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "block_size", "blocks_per_sequence"])
def advance_kernel(
    next_token,
    eos_token_ids,
    max_new_tokens,
    block_table,
    input_ids,
    token_ids,
    seen,
    row_position,
    num_generated,
    active,
    skip_remaining,
    run_ffn,
    similarity,
    run_map,
    similarity_map,
    progress,
    row_mask,
    num_rows,
    num_sequences,
    block_size,
    blocks_per_sequence,
    max_seq_len,
    max_eos: tl.constexpr,
    vocab_size: tl.constexpr,
    num_hidden_layers: tl.constexpr,
    BLOCK_EOS: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    layers = tl.arange(0, BLOCK_LAYERS)
    inside = layers < num_hidden_layers
    flags = run_ffn + layers * num_rows + row
    if row >= num_sequences:  # a prompt row
        tl.store(flags, tl.zeros([BLOCK_LAYERS], tl.int32), mask=inside)
        tl.store(active + row, 0)
        return

    token = tl.load(next_token + row)
    step = tl.load(num_generated + row)
    position = tl.load(row_position + row) + 1
    eos = tl.arange(0, BLOCK_EOS)
    ends = tl.load(eos_token_ids + row * max_eos + eos, mask=eos < max_eos, other=-1) == token
    is_eos = tl.max(ends.to(tl.int32), axis=0) != 0
    ended = is_eos | (step + 1 >= tl.load(max_new_tokens + row)) | (position >= max_seq_len)
    block = block_table + row * blocks_per_sequence + position // block_size
    has_block = tl.load(block, mask=position < max_seq_len, other=-1) >= 0
    becomes = tl.where(ended, ENDED, tl.where(has_block, DECODING, WAITS_FOR_BLOCK))
    goes_on = tl.where(becomes == DECODING, 1, 0)

    similarities = similarity + layers * num_sequences + row
    at = (row.to(tl.int64) * max_seq_len + step) * num_hidden_layers + layers
    tl.store(run_map + at, (tl.load(flags, mask=inside, other=0) != 0).to(tl.uint8), mask=inside)
    tl.store(similarity_map + at, tl.load(similarities, mask=inside, other=0.0), mask=inside)
    tl.store(flags, goes_on + tl.zeros([BLOCK_LAYERS], tl.int32), mask=inside)
    tl.store(similarities, tl.full([BLOCK_LAYERS], float("nan"), tl.float32), mask=inside)

    tl.store(row_position + row, position)
    tl.store(num_generated + row, step + 1)
    tl.store(token_ids + row.to(tl.int64) * (max_seq_len + 1) + position, token)
    tl.store(input_ids + row, token)
    count = seen + row.to(tl.int64) * vocab_size + token
    tl.store(count, tl.minimum((tl.load(count).to(tl.int32) | 1) + 2, 255).to(tl.uint8))
    tl.store(active + row, goes_on)
    tl.store(skip_remaining + row, 0)

    # The host polls progress in its own memory: both numbers in one plain store of 8 bytes, which needs no atomics of
    # the bus, behind everything else.
    fence_for_host()
    both = (becomes.to(tl.int64) << 32) | (step + 1).to(tl.int64)
    tl.store(progress.to(tl.pointer_type(tl.int64), bitcast=True) + row, both)


def advance(ins: Instruction) -> tuple[Launch, ...]:
    blocks = {
        "BLOCK_EOS": triton.next_power_of_2(ins.sizes["max_eos"]),
        "BLOCK_LAYERS": triton.next_power_of_2(ins.sizes["num_hidden_layers"]),
    }
    return (Launch.of(advance_kernel, ins, (ins.sizes["num_rows"],), blocks, num_warps=1),)
