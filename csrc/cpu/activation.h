// The gate of the FFN: act(gate) * up.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

// GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), so both activations are x sigmoid(z).
inline Vec activated(Activation activation, Vec gate) {
    Vec z = gate;
    if (activation == Activation::gelu_tanh) {
        z = splat(1.5957691216057308f) * gate * fma(splat(0.044715f) * gate, gate, splat(1.0f));
    }
    return gate / (splat(1.0f) + exp(splat(0.0f) - z));
}

inline Vec gated(Activation activation, Vec gate, Vec up) { return activated(activation, gate) * up; }

// out (height) = act(gate (height)) * up (height)
inline void gate_panel(Activation activation, const float* gate, const float* up, int height, float* out) {
    for (int r = 0; r < height; r += Vec::width) {
        const int n = height - r < Vec::width ? height - r : Vec::width;
        store_some(out + r, gated(activation, load_some(gate + r, n), load_some(up + r, n)), n);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
