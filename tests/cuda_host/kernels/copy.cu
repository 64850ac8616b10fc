// y = x reversed within each block, by way of shared memory and cp.async, two groups of copies.
#include "launch.h"

namespace {

enum Mistake { none, no_wait, waits_for_first_only, no_barrier };

// 4 * 2 * blockDim.x floats a block
__global__ void reverse(int mistake, const float* x, float* y) {
    auto* shared = reinterpret_cast<float4*>(ptx::shared_memory());
    const unsigned n = 2 * blockDim.x, first = blockIdx.x * n, i = threadIdx.x;
    const auto* from = reinterpret_cast<const float4*>(x) + first;
    ptx::copy_async(shared + i, from + i);
    ptx::commit_copies();
    ptx::copy_async(shared + blockDim.x + i, from + blockDim.x + i);
    ptx::commit_copies();
    if (mistake == waits_for_first_only) ptx::wait_copies<1>();
    if (mistake == none || mistake == no_barrier) ptx::wait_copies<0>();
    if (mistake != no_barrier) __syncthreads();
    auto* to = reinterpret_cast<float4*>(y) + first;
    for (unsigned at = i; at < n; at += blockDim.x) {
        const float4 v = shared[n - 1 - at];
        to[at] = make_float4(v.w, v.z, v.y, v.x);
    }
}

}  // namespace

EXPORT int launch_reverse(int mistake, const float* x, float* y, int blocks, int threads) {
    return launch(reverse, blocks, threads, 2 * threads * sizeof(float4), mistake, x, y);
}
