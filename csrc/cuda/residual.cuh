// The residual stream before and after a block: sums for the similarity test, taken while both are in registers.
#pragma once

#include "common.cuh"

namespace skipkernels::cuda {

// similarity_partials (partials, sequences, 3) of a decode row: sums of h h', h^2 and h'^2 over 16 neighbouring
// channels, one a lane. Called by whole warps; lanes 0..15 and 16..31 each have a partial of their own. Without a
// channel (`inside` is false) a lane adds nothing; rows that are not to be compared have no `part`.
__device__ __forceinline__ void compare_channels(float* part, bool inside, float before, float after) {
    float sums[3] = {before * after, before * before, after * after};
#pragma unroll
    for (float& sum : sums) {
        if (!inside) sum = 0.0f;
#pragma unroll
        for (int lanes = kRowsPerPartial / 2; lanes; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    const int r = static_cast<int>(threadIdx.x) % kRowsPerPartial;
    if (part && r < 3) part[r] = r == 0 ? sums[0] : r == 1 ? sums[1] : sums[2];
}

}  // namespace skipkernels::cuda
