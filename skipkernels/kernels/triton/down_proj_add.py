"""down_proj_add: hidden_states += down_proj(intermediate), and the partial sums of the similarity test."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, operand, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction


@triton.jit
def store_partials(
    products,
    which: tl.constexpr,  # of <h, h'>, |h|^2, |h'|^2
    similarity_partials,
    rows,
    wanted,
    num_sequences,
    num_partials: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
):
    sums = tl.sum(tl.reshape(products, [BLOCK_ROWS, PARTIALS, LANES]), axis=2)
    partials = tl.program_id(1) * PARTIALS + tl.arange(0, PARTIALS)
    at = similarity_partials + (partials[None, :] * num_sequences + rows[:, None]) * 3 + which
    tl.store(at, sums, mask=wanted[:, None] & (partials < num_partials)[None, :])


@triton.jit
def add_to_stream(
    change,  # f32 [BLOCK_ROWS, PARTIALS * LANES]
    channels,
    inside,
    hidden_states,
    similarity_partials,
    rows,
    wanted,
    num_sequences,
    hidden_size: tl.constexpr,
    rows_per_partial: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
):
    """hidden_states += change, and where wanted the sums of the similarity test."""
    at = hidden_states + rows[:, None] * hidden_size + channels[None, :]
    mask = wanted[:, None] & inside[None, :]
    before = tl.load(at, mask=mask, other=0.0)
    after = before + change
    tl.debug_barrier()  # threads of several warps may hold the same element: all have read it before one writes it
    tl.store(at, after, mask=mask)
    if similarity_partials is not None:
        num_partials: tl.constexpr = tl.cdiv(hidden_size, rows_per_partial)
        sizes: tl.constexpr = (num_partials, BLOCK_ROWS, PARTIALS, LANES)
        decoding = wanted & (rows < num_sequences)
        store_partials(before * after, 0, similarity_partials, rows, decoding, num_sequences, *sizes)
        store_partials(before * before, 1, similarity_partials, rows, decoding, num_sequences, *sizes)
        store_partials(after * after, 2, similarity_partials, rows, decoding, num_sequences, *sizes)


@triton.jit
def channels_of_program(
    hidden_size: tl.constexpr, rows_per_partial: tl.constexpr, PARTIALS: tl.constexpr, LANES: tl.constexpr
):
    """The channels [PARTIALS * LANES] of this program, partial by partial, and which of them there are."""
    index = tl.arange(0, PARTIALS * LANES)
    lanes = index % LANES
    channels = (tl.program_id(1) * PARTIALS + index // LANES) * rows_per_partial + lanes
    return channels, (lanes < rows_per_partial) & (channels < hidden_size)


@triton.jit(do_not_specialize=["num_rows", "num_sequences"])
def down_proj_add_kernel(
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
    planes: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    channels, inside = channels_of_program(hidden_size, rows_per_partial, PARTIALS, LANES)
    change = linear(
        intermediate, None, 0.0, down_proj, channels, inside, rows, wanted,
        intermediate_size, planes, BLOCK_ROWS, PARTIALS * LANES, BLOCK_IN,
    )  # fmt: skip
    add_to_stream(
        change, channels, inside, hidden_states, similarity_partials, rows, wanted, num_sequences,
        hidden_size, rows_per_partial, BLOCK_ROWS, PARTIALS, LANES,
    )  # fmt: skip


def down_proj_add(ins: Instruction) -> tuple[Launch, ...]:
    rows_per_partial = int(ins.scalars["rows_per_partial"])
    tiles, block_rows = row_tiles(ins.sizes["num_rows"])
    lanes = triton.next_power_of_2(rows_per_partial)
    cut = tile(ins.tensors["down_proj"], ins.sizes["num_rows"], unit=lanes)
    partials = cut.out // lanes
    grid = (tiles, triton.cdiv(ins.sizes["hidden_size"], partials * rows_per_partial))
    blocks = {
        **operand("down_proj", ins.tensors["down_proj"]),
        "num_sequences": ins.sizes.get("num_sequences", 0),  # only similarity_partials has the symbol
        "BLOCK_ROWS": block_rows,
        "PARTIALS": partials,
        "LANES": lanes,
        "BLOCK_IN": cut.columns,
    }
    return (Launch.of(down_proj_add_kernel, ins, grid, blocks),)
