"""down_proj_neurons_add: hidden_states += the products that are not 0 times their rows of the transposed down_proj.

select_neurons lists a neuron exactly where some row's product is not 0, so the products themselves say which rows of
weights to load. A program owns some channels and goes through all neurons in their order, whoever is listed: a row's
bits do not depend on what its neighbours keep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.down_proj_add import add_to_stream, channels_of_program
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import load_weights
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction

BYTES_OF_ROW, FEWEST_PROGRAMS, BYTES_OF_TILE = 128, 128, 16384
"""What a program reads of a row of weights, unless that leaves multiprocessors of a GPU idle; and at a time."""


@triton.jit
def kept_products(
    intermediate,  # f32 [num_rows, intermediate_size]
    down_proj,  # [intermediate_size, hidden_size]
    channels,
    inside,
    rows,
    wanted,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
):
    """intermediate @ down_proj[:, channels], f32 [BLOCK_ROWS, BLOCK_OUT]; rows of neurons that all are 0 at are not
    read."""
    if BLOCK_ROWS == 1:
        sums = tl.zeros([BLOCK_NEURONS, BLOCK_OUT], tl.float32)
        for start in range(0, intermediate_size, BLOCK_NEURONS):
            neurons = start + tl.arange(0, BLOCK_NEURONS)
            products = tl.load(intermediate + neurons, mask=neurons < intermediate_size, other=0.0)
            weights = load_weights(down_proj, neurons, products != 0, channels, inside, hidden_size)
            sums += weights * products[:, None]
        out = tl.sum(sums, axis=0)[None, :]
    else:
        totals = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        for start in range(0, intermediate_size, BLOCK_NEURONS):
            neurons = start + tl.arange(0, BLOCK_NEURONS)
            at = intermediate + rows[None, :] * intermediate_size + neurons[:, None]
            mask = wanted[None, :] & (neurons < intermediate_size)[:, None]
            products = tl.load(at, mask=mask, other=0.0)
            kept = tl.max((products != 0).to(tl.int32), axis=1) != 0
            weights = load_weights(down_proj, neurons, kept, channels, inside, hidden_size)
            totals = tl.dot(tl.trans(weights), products, totals, input_precision="tf32x3")
        out = tl.trans(totals)
    return out


@triton.jit(do_not_specialize=["num_rows", "num_sequences"])
def down_proj_neurons_add_kernel(
    intermediate,
    down_proj,
    hidden_states,
    similarity_partials,
    row_mask,
    num_rows,
    num_sequences,
    hidden_size: tl.constexpr,
    intermediate_size: tl.constexpr,
    rows_per_partial: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    channels, inside = channels_of_program(hidden_size, rows_per_partial, PARTIALS, LANES)
    change = kept_products(
        intermediate, down_proj, channels, inside, rows, wanted,
        hidden_size, intermediate_size, BLOCK_ROWS, PARTIALS * LANES, BLOCK_NEURONS,
    )  # fmt: skip
    add_to_stream(
        change, channels, inside, hidden_states, similarity_partials, rows, wanted, num_sequences,
        hidden_size, rows_per_partial, BLOCK_ROWS, PARTIALS, LANES,
    )  # fmt: skip


def cut_columns(ins: Instruction, neurons: int, block_rows: int) -> tuple[int, dict[str, int]]:
    """The programs that share the columns of a transposed down_proj, and what each takes of it."""
    rows_per_partial, hidden_size = int(ins.scalars["rows_per_partial"]), ins.sizes["hidden_size"]
    lanes, size = triton.next_power_of_2(rows_per_partial), ins.tensors["down_proj"].element_size()
    least, out = max(lanes, 16), BYTES_OF_ROW // size  # tensor cores take 16 channels at least
    while out > least and hidden_size < out * FEWEST_PROGRAMS:
        out //= 2
    partials = max(out, least) // lanes
    # more rows: 128 bytes of each channel, as in ``linear.tile``
    together = BYTES_OF_TILE // (partials * lanes * size) if block_rows == 1 else 128 // size
    blocks = {
        "num_sequences": ins.sizes.get("num_sequences", 0),  # only similarity_partials has the symbol
        "PARTIALS": partials,
        "LANES": lanes,
        "BLOCK_NEURONS": max(16, min(together, triton.next_power_of_2(neurons))),
    }
    return triton.cdiv(hidden_size, partials * rows_per_partial), blocks


def down_proj_neurons_add(ins: Instruction) -> tuple[Launch, ...]:
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    programs, blocks = cut_columns(ins, ins.sizes["intermediate_size"], block_rows)
    blocks |= {"BLOCK_ROWS": block_rows}
    return (Launch.of(down_proj_neurons_add_kernel, ins, (tiles, programs), blocks),)
