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

}  // namespace skipkernels::SKIPKERNELS_ISA
