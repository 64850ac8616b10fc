"""select_neurons: intermediate = 0 below each row's own thresholds, and the list of what is not 0 in some row.

One program goes through the rows, then lists: its order is that of the neurons, whatever the schedule. 57 KB a row of
Llama-3-8B, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.rows import wanted_rows
from skipkernels.program.table import Instruction

NEURONS_OF_WARP, MOST_NEURONS = 512, 8192
"""16 neurons a thread, and at most 16 warps."""


@triton.jit
def leave_out(values, thresholds, scale, size: tl.constexpr, num_thresholds: tl.constexpr, BLOCK: tl.constexpr):
    """values [size] = 0 below their thresholds; returns how many are not 0."""
    count = tl.zeros([], tl.int32)
    least = tl.load(thresholds) * scale
    for start in range(0, size, BLOCK):
        neurons = start + tl.arange(0, BLOCK)
        inside = neurons < size
        if num_thresholds > 1:
            least = tl.load(thresholds + neurons, mask=inside, other=0.0) * scale
        value = tl.load(values + neurons, mask=inside, other=0.0)
        value = tl.where(tl.abs(value) < least, 0.0, value)
        tl.store(values + neurons, value, mask=inside)
        count += tl.sum((value != 0).to(tl.int32), axis=0)
    return count


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_sequences",
        "num_hidden_layers",
        "max_seq_len",
        "layer",
        "stage",
        "neuron_bytes",
    ]
)
def select_neurons_kernel(
    intermediate,
    neuron_thresholds,
    row_sequence,
    neuron_scale,
    num_generated,
    neurons,
    num_neurons,
    left_out,
    kept_map,
    row_mask,
    num_rows,
    num_sequences,
    num_hidden_layers,
    max_seq_len,
    layer,
    stage,
    neuron_bytes,
    intermediate_size: tl.constexpr,
    num_thresholds: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, _, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    for row in range(num_rows):
        if tl.load(row_mask + row) != 0:
            of_layer = tl.load(row_sequence + row).to(tl.int64) * num_hidden_layers + layer
            count = leave_out(
                intermediate + row * intermediate_size, neuron_thresholds + of_layer * num_thresholds,
                tl.load(neuron_scale + row), intermediate_size, num_thresholds, BLOCK,
            )  # fmt: skip
            if row < num_sequences:
                token = tl.load(num_generated + row).to(tl.int64) + row * max_seq_len
                tl.store(kept_map + (token * num_hidden_layers + layer) * 2 + stage, count)
                so_far = tl.load(left_out + row)
                tl.debug_barrier()  # all threads have read it before one writes it
                tl.store(left_out + row, so_far + (intermediate_size - count).to(tl.int64) * neuron_bytes)
    tl.debug_barrier()  # what one thread wrote another may read
    listed = tl.zeros([], tl.int32)
    for start in range(0, intermediate_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        kept = tl.zeros([BLOCK], tl.int32)
        for row in range(num_rows):
            if tl.load(row_mask + row) != 0:
                at = intermediate + row * intermediate_size + index
                kept |= (tl.load(at, mask=index < intermediate_size, other=0.0) != 0).to(tl.int32)
        tl.store(neurons + listed + tl.cumsum(kept, axis=0) - 1, index, mask=kept != 0)
        listed += tl.sum(kept, axis=0)
    tl.store(num_neurons, listed)


def select_neurons(ins: Instruction) -> tuple[Launch, ...]:
    block = min(MOST_NEURONS, max(NEURONS_OF_WARP, triton.next_power_of_2(ins.sizes["intermediate_size"])))
    blocks = {"BLOCK_ROWS": triton.next_power_of_2(ins.sizes["num_rows"]), "BLOCK": block}
    warps = block // NEURONS_OF_WARP
    return (Launch.of(select_neurons_kernel, ins, (1,), blocks, num_warps=warps, fuse_multiply_add=False),)
