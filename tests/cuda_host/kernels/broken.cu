// Two correct kernels, and others with one mistake each, of the kind the harness is there to find. All rotate x by one:
// y[i] = x[i + 1].
#include "launch.h"

namespace {

__device__ float* shared_floats() { return reinterpret_cast<float*>(ptx::shared_memory()); }

__device__ unsigned after(unsigned i, unsigned n) { return i + 1 < n ? i + 1 : 0; }

__global__ void correct(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

// no thread needs another warp's value from shared memory
__global__ void correct_by_warps(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = threadIdx.x % 32 < 31 ? shared[threadIdx.x + 1] : x[after(threadIdx.x, blockDim.x)];
}

__global__ void no_barrier(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

// the first warp's values are there; whoever reads them from another warp must wait
__global__ void warp_barrier_instead_of_block_barrier(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

__global__ void no_warp_barrier(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = threadIdx.x % 32 < 31 ? shared[threadIdx.x + 1] : x[after(threadIdx.x, blockDim.x)];
}

// the second round overwrites what slow threads still read of the first
__global__ void no_barrier_before_reuse(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
    shared[threadIdx.x] = 0.0f;
    __syncthreads();
}

__global__ void barrier_in_a_branch(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x != 13) __syncthreads();
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

__global__ void two_barriers_that_are_not_one(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

__global__ void return_before_barrier(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x] = x[threadIdx.x];
    if (x[threadIdx.x] < -1e30f || threadIdx.x + 1 == blockDim.x) return;
    __syncthreads();
    y[threadIdx.x] = shared[after(threadIdx.x, blockDim.x)];
}

__global__ void shuffle_of_half_a_warp(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_after_exit(const float* x, float* y) {
    if (threadIdx.x % 32 == 31) return;
    y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_from_outside_the_mask(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0xffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_without_itself(const float* x, float* y) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}

__global__ void two_masks(const float* x, float* y) {
    const uint32_t mask = threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_down_sync(mask, x[threadIdx.x], 1);
}

__global__ void waits_for_nobody(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
    while (ptx::load_acquire(reinterpret_cast<const int*>(y)) != -1) ptx::nanosleep(64);
}

__global__ void writes_behind_shared_memory(const float* x, float* y) {
    float* shared = shared_floats();
    shared[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = threadIdx.x + 1 < blockDim.x ? shared[threadIdx.x + 2] : x[0];
}

__global__ void reads_behind_global_memory(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void misaligned_copy(const float* x, float* y) {
    ptx::copy_async(shared_floats() + threadIdx.x, x);
    y[threadIdx.x] = x[after(threadIdx.x, blockDim.x)];
}

// more than the 256 KB of its stack, all of it written
__global__ void needs_a_large_stack(const float* x, float* y) {
    volatile float frame[(256 << 10) / sizeof(float)];
    for (volatile float& value : frame) value = x[threadIdx.x];
    y[threadIdx.x] = frame[threadIdx.x];
}

using Kernel = void (*)(const float*, float*);
constexpr struct {
    const char* name;
    Kernel kernel;
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(correct),
    KERNEL(correct_by_warps),
    KERNEL(no_barrier),
    KERNEL(warp_barrier_instead_of_block_barrier),
    KERNEL(no_warp_barrier),
    KERNEL(no_barrier_before_reuse),
    KERNEL(barrier_in_a_branch),
    KERNEL(two_barriers_that_are_not_one),
    KERNEL(return_before_barrier),
    KERNEL(shuffle_of_half_a_warp),
    KERNEL(shuffle_after_exit),
    KERNEL(shuffle_from_outside_the_mask),
    KERNEL(shuffle_without_itself),
    KERNEL(two_masks),
    KERNEL(waits_for_nobody),
    KERNEL(writes_behind_shared_memory),
    KERNEL(reads_behind_global_memory),
    KERNEL(misaligned_copy),
    KERNEL(needs_a_large_stack),
};

}  // namespace

// x (threads) -> y (threads)
EXPORT int launch_rotate(const char* kernel, const float* x, float* y, int threads) {
    for (const auto& known : kKernels) {
        if (std::strcmp(kernel, known.name) == 0)
            return launch(known.kernel, 1, threads, threads * sizeof(float), x, y);
    }
    return cudaErrorInvalidDeviceFunction;
}
