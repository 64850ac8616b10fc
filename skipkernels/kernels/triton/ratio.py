"""Holding a ratio: what ``skip_gate`` and ``neuron_gate`` share, each operation one fp32 rounding as in
``program.reference``."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.program.reference import SCALE_BOUND, SCALE_GAIN

GAIN = tl.constexpr(SCALE_GAIN)
BOUND = tl.constexpr(SCALE_BOUND)


@triton.jit
def owed(tokens, per_token, warmup, ramp):
    """What is to have been left out after so many tokens."""
    past_warmup = tl.maximum(tokens - warmup, 0).to(tl.float32)
    of_ramp = tl.where(ramp == warmup, 1, ramp - warmup).to(tl.float32)  # both are 0 where no ratio is held
    on_ramp = tl.div_rn(per_token * ramp.to(tl.float32) * past_warmup, of_ramp)
    return tl.where(tokens >= ramp, per_token * tokens.to(tl.float32), on_ramp)


@triton.jit
def clamp(value, low, high):
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def adapted_scale(scale, behind):
    """threshold_scale for the token that begins, where what was owed before is ``behind`` of a token, in [-1, 1]."""
    return clamp(scale * (1.0 + behind * GAIN), 1.0 / BOUND, BOUND)
