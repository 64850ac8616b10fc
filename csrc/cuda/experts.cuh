// What the kernels of experts share.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// The expert whose choice entry `entry` of the list is; there is such an entry.
__device__ __forceinline__ int expert_at(const int32_t* begins, int64_t num_begins, int entry) {
    int low = 0, high = static_cast<int>(num_begins) - 1;  // begins[low] <= entry < begins[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (begins[middle] <= entry ? low : high) = middle;
    }
    return low;
}

// <w, x> of k numbers each, by a warp; every lane gets it. V of w at a time.
template <class T, int V>
__device__ __forceinline__ float warp_dot(const T* w, const float* x, int k, uint64_t policy) {
    float sum = 0.0f;
    for (int at = static_cast<int>(threadIdx.x) % 32 * V; at < k; at += 32 * V) {
        if constexpr (V > 1) {
            const uint4 weights = ptx::load_weights(w + at, policy);
            float xs[V];
            load_floats(x + at, xs);
#pragma unroll
            for (int i = 0; i < V; ++i) sum = fmaf(element<T>(weights, i), xs[i], sum);
        } else {
            sum = fmaf(to_float(w[at]), x[at], sum);
        }
    }
    return warp_sum(sum);
}

// What the biases of a row's experts add to a channel. Behind all products: among them it would take more than the 64
// registers that two blocks of a multiprocessor have.
template <class Op>
__device__ __forceinline__ float biases_of(const Op& op, int64_t row, int64_t channel) {
    if (!op.down_proj_bias) return 0.0f;
    float sum = 0.0f;
    const int listed = op.expert_begins[op.num_begins - 1];
    for (int entry = 0; entry < listed; ++entry) {
        const int pair = op.expert_pairs[entry];
        if (pair / op.experts_per_token != row) continue;
        const int64_t expert = expert_at(op.expert_begins, op.num_begins, entry);
        sum = fmaf(op.expert_weights[pair], op.down_proj_bias[expert * op.hidden_size + channel], sum);
    }
    return sum;
}

}  // namespace skipkernels::cuda
