// In which order threads ran, and what they found in shared memory.
#include "launch.h"

namespace {

__global__ void record_order(int* count, int* order) {
    order[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// The second block gets what the first one has used.
__global__ void read_fresh_shared_memory(float* out) {
    auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
    shared[threadIdx.x] = 1.0f;
}

}  // namespace

EXPORT int launch_record_order(int* count, int* order, int blocks, int threads) {
    return launch(record_order, blocks, threads, 0, count, order);
}

EXPORT int launch_read_fresh_shared_memory(float* out) {
    return launch(read_fresh_shared_memory, 2, 64, 64 * sizeof(float), out);
}
