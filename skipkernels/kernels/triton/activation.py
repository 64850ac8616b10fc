"""The gate's activation, as ``model.config.ACTIVATIONS`` numbers it."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.model.config import ACTIVATIONS, GATE_LIMIT, GATE_SLOPE

GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
CLAMPED_SWIGLU = tl.constexpr(ACTIVATIONS.index("clamped_swiglu"))
LIMIT, SLOPE = tl.constexpr(GATE_LIMIT), tl.constexpr(GATE_SLOPE)


@triton.jit
def activated(activation: tl.constexpr, gate):
    """act(gate); GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    if activation == CLAMPED_SWIGLU:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    z = gate
    if activation == CLAMPED_SWIGLU:
        z *= SLOPE
    if activation == GELU_TANH:
        z *= 1.5957691216057308 * (0.044715 * gate * gate + 1.0)
    return gate * tl.sigmoid(z)


@triton.jit
def up_factor(activation: tl.constexpr, up):
    """What the activated gate is multiplied with."""
    if activation == CLAMPED_SWIGLU:
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
    return up


@triton.jit
def gated(activation: tl.constexpr, gate, up):
    """act(gate) * up."""
    return activated(activation, gate) * up_factor(activation, up)


@triton.jit
def softened(cap: tl.constexpr, x):
    """cap * tanh(x / cap): no score is larger than cap (Gemma 2)."""
    return cap * (2 * tl.sigmoid(2 / cap * x) - 1)
