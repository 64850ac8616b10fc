"""The gate's activation, as ``model.config.ACTIVATIONS`` numbers it."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.model.config import ACTIVATIONS

GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))


@triton.jit
def activated(activation: tl.constexpr, gate):
    """act(gate); GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    z = gate
    if activation == GELU_TANH:
        z *= 1.5957691216057308 * (0.044715 * gate * gate + 1.0)
    return gate * tl.sigmoid(z)
