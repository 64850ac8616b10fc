// A sum over a block of threads.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// The sum of the block's values, in every thread, the same order whatever else runs; sums (warps of the block) is in
// shared memory. Whoever calls it again synchronises before.
__device__ __forceinline__ float block_sum(float value, float* sums) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += sums[warp];
    return sum;
}

}  // namespace skipkernels::cuda
