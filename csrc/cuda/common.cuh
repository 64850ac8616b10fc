// What all kernels share: number formats, the rows an instruction acts on, launching.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "ptx.cuh"

namespace skipkernels::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return ptx::bf16_to_float(value.bits); }
__device__ __forceinline__ float to_float(fp16 value) { return ptx::fp16_to_float(value.bits); }

__device__ __forceinline__ void store_as(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_as(bf16* to, float value) { to->bits = ptx::float_to_bf16(value); }
__device__ __forceinline__ void store_as(fp16* to, float value) { to->bits = ptx::float_to_fp16(value); }

// Elements of T in 16 bytes, the widest load.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Element i of 16 loaded bytes; i is known at compile time.
template <class T>
__device__ __forceinline__ float element(const uint4& v, int i) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(word[i]);
    } else {
        return to_float(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
    }
}

// V neighbouring floats, 16-byte aligned if there are several.
template <int V>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[V]) {
    if constexpr (V == 1) {
        to[0] = *from;
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    }
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* p, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
    return value;
}

// Takes the stamps of a kernel, by the first thread of each of its blocks.
class Clock {
  public:
    __device__ explicit Clock(Stamps stamps) : stamps_(threadIdx.x == 0 ? stamps : nullptr) {
        if (stamps_) atomicMin(stamps_, ptx::global_timer());
    }
    __device__ void waited() const {
        if (stamps_) atomicMin(stamps_ + 1, ptx::global_timer());
    }
    __device__ ~Clock() {
        if (stamps_) atomicMax(stamps_ + 2, ptx::global_timer());
    }

  private:
    Stamps stamps_;
};

// f with a value of a float format's type.
template <class F>
cudaError_t with_float_type(Format format, F f) {
    switch (format) {
        case Format::f32:
            return f(float{});
        case Format::bf16:
            return f(bf16{});
        case Format::f16:
            return f(fp16{});
        default:
            return cudaErrorInvalidValue;
    }
}

constexpr size_t kSharedBytesOfAll = 48 * 1024;  // a kernel must ask for the right to use more

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const LaunchContext& context, void (*kernel)(Parameters...), dim3 grid, int threads,
                          size_t shared_bytes, Arguments... arguments) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = context.stream;
    config.attrs = &overlap;
    config.numAttrs = context.programmatic ? 1 : 0;
    // An SM changes its carve-out only when it is idle: kernels that differ in it cannot share one.
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, context.carveout)) {
        return error;
    }
    if (shared_bytes > kSharedBytesOfAll) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Counts a block as done; true, for all of its threads, in the one that finds all `blocks` of them done, which sees
// what they wrote and leaves the counter at 0. `flag` lies in shared memory. By the whole block.
template <class Flag>
__device__ __forceinline__ bool is_last_block(int* arrivals, int blocks, Flag& flag) {
    __syncthreads();  // all that the block writes is written
    if (threadIdx.x == 0) {
        flag = ptx::atomic_add_acq_rel(arrivals, 1) == blocks - 1;
        if (flag) *arrivals = 0;
    }
    __syncthreads();
    return flag;
}

}  // namespace skipkernels::cuda
