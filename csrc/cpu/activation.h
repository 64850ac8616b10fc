// The gate of the FFN: act(gate) * up.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

// GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), so all activations are x sigmoid(z).
inline Vec activated(Activation activation, Vec gate) {
    if (activation == Activation::clamped_swiglu) gate = min(splat(kGateLimit), gate);
    Vec z = gate;
    if (activation == Activation::clamped_swiglu) z = splat(kGateSlope) * gate;
    if (activation == Activation::gelu_tanh) {
        z = splat(1.5957691216057308f) * gate * fma(splat(0.044715f) * gate, gate, splat(1.0f));
    }
    return gate / (splat(1.0f) + exp(splat(0.0f) - z));
}

// cap * tanh(x / cap), in place: no score is larger than cap (Gemma 2)
inline void soften(float* x, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i += Vec::width) {
        const int count = n - i < Vec::width ? static_cast<int>(n - i) : Vec::width;
        const Vec power = exp(load_some(x + i, count) * splat(2.0f / cap));  // tanh(z) = 1 - 2 / (exp(2 z) + 1)
        store_some(x + i, splat(cap) - splat(2.0f * cap) / (power + splat(1.0f)), count);
    }
}

// What the activated gate is multiplied with.
inline Vec up_factor(Activation activation, Vec up) {
    if (activation != Activation::clamped_swiglu) return up;
    return max(splat(-kGateLimit), min(splat(kGateLimit), up)) + splat(1.0f);
}

inline Vec gated(Activation activation, Vec gate, Vec up) {
    return activated(activation, gate) * up_factor(activation, up);
}

// out (height) = act(gate (height)) * up (height)
inline void gate_panel(Activation activation, const float* gate, const float* up, int height, float* out) {
    for (int r = 0; r < height; r += Vec::width) {
        const int n = height - r < Vec::width ? height - r : Vec::width;
        store_some(out + r, gated(activation, load_some(gate + r, n), load_some(up + r, n)), n);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
