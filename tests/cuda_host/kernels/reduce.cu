// Sums of rows, the pattern of every kernel: shuffles in a warp, shared memory between warps, then the last block to
// finish adds what the blocks found.
#include "launch.h"

namespace {

__device__ float warp_sum(float value) {
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

__device__ float block_sum(float value, float* warp_sums) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warp_sums[warp];
    __syncthreads();
    return sum;
}

// sums (gridDim.x) of x (gridDim.x, n)
__global__ void __launch_bounds__(1024) sum_rows(const float* __restrict__ x, int n, float* sums) {
    auto* warp_sums = reinterpret_cast<float*>(ptx::shared_memory());
    float value = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) value += x[blockIdx.x * n + i];
    value = block_sum(value, warp_sums);
    if (threadIdx.x == 0) sums[blockIdx.x] = value;
}

// total (1) of x (gridDim.x, n), the partials added in the order of blocks by whichever block comes last
__global__ void sum_all(const float* x, int n, float* partials, int* arrivals, float* total) {
    auto* warp_sums = reinterpret_cast<float*>(ptx::shared_memory());
    auto* is_last = reinterpret_cast<int*>(warp_sums + blockDim.x / 32);
    float value = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) value += x[blockIdx.x * n + i];
    value = block_sum(value, warp_sums);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = value;
        *is_last = ptx::atomic_add_acq_rel(arrivals, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (!*is_last) return;
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (unsigned block = 0; block < gridDim.x; ++block) sum += partials[block];
        *total = sum;
        *arrivals = 0;  // for the next launch
    }
}

}  // namespace

EXPORT int launch_sum_rows(const float* x, int rows, int n, int threads, float* sums) {
    return launch(sum_rows, rows, threads, threads / 32 * sizeof(float), x, n, sums);
}

EXPORT int launch_sum_all(const float* x, int rows, int n, int threads, float* partials, int* arrivals, float* total) {
    return launch(sum_all, rows, threads, (threads / 32 + 1) * sizeof(float), x, n, partials, arrivals, total);
}
