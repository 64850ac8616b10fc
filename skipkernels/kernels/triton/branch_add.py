"""branch_add: hidden_states += multiplier * rms_norm(branch), the partial sums of the similarity test, branch = 0."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.program.table import Instruction


@triton.jit(do_not_specialize=["num_sequences"])
def branch_add_kernel(
    branch,
    norm,
    hidden_states,
    similarity_partials,
    row_mask,
    num_sequences,
    multiplier,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    rows_per_partial: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(row_mask + row) == 0:
        return
    index = tl.arange(0, PARTIALS * LANES)
    lanes = index % LANES
    channels = index // LANES * rows_per_partial + lanes
    inside = (lanes < rows_per_partial) & (channels < hidden_size)
    change = tl.load(branch + row * hidden_size + channels, mask=inside, other=0.0)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(change * change, axis=0) / hidden_size + rms_norm_eps)
        change *= scale * tl.load(norm + channels, mask=inside, other=0.0)
    before = tl.load(hidden_states + row * hidden_size + channels, mask=inside, other=0.0)
    after = before + change * multiplier
    tl.debug_barrier()  # threads of several warps may hold the same element: all have read it before one writes it
    tl.store(hidden_states + row * hidden_size + channels, after, mask=inside)
    tl.store(branch + row * hidden_size + channels, tl.zeros_like(change), mask=inside)
    if similarity_partials is not None and row < num_sequences:
        num_partials: tl.constexpr = tl.cdiv(hidden_size, rows_per_partial)
        partials = tl.arange(0, PARTIALS)
        at = similarity_partials + (partials * num_sequences + row) * 3
        used = partials < num_partials
        tl.store(at, tl.sum(tl.reshape(before * after, [PARTIALS, LANES]), axis=1), mask=used)
        tl.store(at + 1, tl.sum(tl.reshape(before * before, [PARTIALS, LANES]), axis=1), mask=used)
        tl.store(at + 2, tl.sum(tl.reshape(after * after, [PARTIALS, LANES]), axis=1), mask=used)


def branch_add(ins: Instruction) -> tuple[Launch, ...]:
    rows_per_partial = int(ins.scalars["rows_per_partial"])
    blocks = {
        "num_sequences": ins.sizes.get("num_sequences", 0),  # only similarity_partials has the symbol
        "PARTIALS": triton.next_power_of_2(triton.cdiv(ins.sizes["hidden_size"], rows_per_partial)),
        "LANES": triton.next_power_of_2(rows_per_partial),
    }
    return (Launch.of(branch_add_kernel, ins, (ins.sizes["num_rows"],), blocks),)
