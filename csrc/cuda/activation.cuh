// The gate's activation.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// act(gate); GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
__device__ __forceinline__ float activated(Activation activation, float gate) {
    float z = gate;
    if (activation == Activation::gelu_tanh) z *= 1.5957691216057308f * (0.044715f * gate * gate + 1.0f);
    return gate / (1.0f + expf(-z));
}

}  // namespace skipkernels::cuda
