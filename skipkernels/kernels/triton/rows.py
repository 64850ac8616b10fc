"""The rows of the batch an instruction acts on."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.program.table import Instruction


@triton.jit
def wanted_rows(when, batch_size, BLOCK_BATCH: tl.constexpr):
    """The batch's rows [BLOCK_BATCH], which of them are wanted, and whether any is."""
    rows = tl.arange(0, BLOCK_BATCH)
    wanted = tl.load(when + rows, mask=rows < batch_size, other=0) != 0
    return rows, wanted, tl.max(wanted.to(tl.int32), axis=0) != 0


def block_batch(ins: Instruction) -> int:
    """The batch as tensor cores take it: 8 columns at least. One row is no batch."""
    batch_size = ins.sizes["batch_size"]
    return 1 if batch_size == 1 else max(8, triton.next_power_of_2(batch_size))
