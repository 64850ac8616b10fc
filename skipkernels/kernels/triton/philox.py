"""Philox4x32-10 as numbers in (0, 1), the twin of ``skipkernels.program.philox``."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.program.philox import GATE_STREAM as _GATE_STREAM
from skipkernels.program.philox import SAMPLE_STREAM as _SAMPLE_STREAM

SAMPLE_STREAM = tl.constexpr(_SAMPLE_STREAM)
GATE_STREAM = tl.constexpr(_GATE_STREAM)


@triton.jit
def philox_uniform(seed, block, step, stream: tl.constexpr):
    """fp64 numbers [blocks, 4] of the indices 4 block .. 4 block + 3; ``block`` and ``step`` are i32 [blocks]."""
    zero = block * 0
    a, b, c, d = tl.philox(seed, block, step, zero + stream, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [block.shape[0], 4])
    return ((bits >> 8).to(tl.float64) + 0.5) * 2.0**-24
