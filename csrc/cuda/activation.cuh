// The gate's activation.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// act(gate); GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
__device__ __forceinline__ float activated(Activation activation, float gate) {
    if (activation == Activation::clamped_swiglu && gate > kGateLimit) gate = kGateLimit;
    float z = gate;
    if (activation == Activation::clamped_swiglu) z *= kGateSlope;
    if (activation == Activation::gelu_tanh) z *= 1.5957691216057308f * (0.044715f * gate * gate + 1.0f);
    return gate / (1.0f + expf(-z));
}

// what the activated gate is multiplied with
__device__ __forceinline__ float up_factor(Activation activation, float up) {
    if (activation != Activation::clamped_swiglu) return up;
    if (up > kGateLimit) up = kGateLimit;
    if (up < -kGateLimit) up = -kGateLimit;
    return up + 1.0f;
}

// act(gate) * up
__device__ __forceinline__ float gated(Activation activation, float gate, float up) {
    return activated(activation, gate) * up_factor(activation, up);
}

// cap * tanh(x / cap): no score is larger than cap (Gemma 2)
__device__ __forceinline__ float softened(float cap, float x) {
    return cap - 2.0f * cap / (expf(2.0f / cap * x) + 1.0f);  // tanh(z) = 1 - 2 / (exp(2 z) + 1)
}

}  // namespace skipkernels::cuda
