// Which channels of a head are rotated with each other, and which are not.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// A head's channels in head_dim / 2 pairs: (i, i + pairs) for the first `pairs`, which are rotated; of the channels
// behind those, the first half with the second, so that every channel has its place.
struct ChannelPairs {
    int pairs, half;

    template <class Op>
    __host__ __device__ explicit ChannelPairs(const Op& op)
        : pairs(static_cast<int>(op.rotary_pairs)), half(static_cast<int>(op.head_dim / 2)) {}

    __host__ __device__ bool rotates(int pair) const { return pair < pairs; }
    __host__ __device__ int first(int pair) const { return rotates(pair) ? pair : pair + pairs; }
    __host__ __device__ int second(int pair) const { return first(pair) + (rotates(pair) ? pairs : half - pairs); }
};

}  // namespace skipkernels::cuda
