// The barrier of a persistent kernel: blocks count themselves in and poll until all are there.
#include "launch.h"

namespace {

// `counter` only grows; the caller clears it before a launch.
__device__ void grid_barrier(int* counter, int phase) {
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::atomic_add_acq_rel(counter, 1);
        while (ptx::load_acquire(counter) < (phase + 1) * static_cast<int>(gridDim.x)) ptx::nanosleep(64);
    }
    __syncthreads();
}

// Each round, every block replaces its row of x (gridDim.x, blockDim.x) by the sum of its own and the next block's.
__global__ void add_neighbours(int* x, int rounds, int* counter) {
    const int block = static_cast<int>(blockIdx.x), next = (block + 1) % static_cast<int>(gridDim.x);
    const int width = static_cast<int>(blockDim.x), column = static_cast<int>(threadIdx.x);
    for (int round = 0; round < rounds; ++round) {
        const int sum = x[block * width + column] + x[next * width + column];
        grid_barrier(counter, 2 * round);
        x[block * width + column] = sum;
        grid_barrier(counter, 2 * round + 1);
    }
}

}  // namespace

EXPORT int launch_add_neighbours(int* x, int blocks, int threads, int rounds, int* counter, bool cooperative) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, add_neighbours, x, rounds, counter);
}
