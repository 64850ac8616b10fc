"""The rows an instruction acts on, taken in tiles of at most 16."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_TILE = 16
"""Rows of a tile: with more, a matrix kernel's sums no longer fit its registers."""


@triton.jit
def wanted_rows(row_mask, num_rows, BLOCK_ROWS: tl.constexpr):
    """The rows [BLOCK_ROWS] of this program's tile, which of them are wanted, and whether any is."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    wanted = tl.load(row_mask + rows, mask=rows < num_rows, other=0) != 0
    return rows, wanted, tl.max(wanted.to(tl.int32), axis=0) != 0


def row_tiles(num_rows: int) -> tuple[int, int]:
    """How many tiles ``num_rows`` are taken in, and the rows of each.

    All tiles are of one size, so that a row's bits do not depend on which tile it is in. They are the first axis of a
    grid: programs that read the same weights run next to one another, and share them in the cache. Tensor cores take
    8 rows at least; a single row needs none.
    """
    block = 1 if num_rows == 1 else min(LARGEST_TILE, max(8, triton.next_power_of_2(num_rows)))
    return triton.cdiv(num_rows, block), block
