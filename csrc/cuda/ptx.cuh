// All inline PTX of the kernels, behind small functions. Their host twins, with which the same sources run on a CPU
// under test, are in tests/cuda_host/include/ptx_host.h.
#pragma once

#ifndef __CUDACC__
#    include "ptx_host.h"
#else
#    include <cuda_runtime.h>

#    include <cstdint>

namespace skipkernels::cuda::ptx {

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// threadIdx.x, read here and not kept from before: saves the registers of what is computed from it.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Memory

// Brings [p, p + bytes) into L2; both multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#    if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#    else
    for (uint32_t at = 0; at < bytes; at += 128) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p) + at) : "memory");
    }
#    endif
}

// 16 bytes from global to shared memory, with no register in between and past L1; both aligned.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
                 "l"(from)
                 : "memory");
}

// The same for weights; `policy` is kEvictFirst or kEvictNormal (kernels.h).
__device__ __forceinline__ void copy_weights_async(void* to_shared, const void* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
                 "l"(from), "l"(policy)
                 : "memory");
}

// 4, 8 or 16 bytes, aligned to as many: of weights' scales, which neighbours read too.
template <int bytes>
__device__ __forceinline__ void copy_few_async(void* to_shared, const void* from) {
    if constexpr (bytes == 16) {
        copy_async(to_shared, from);
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                         static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
                     "l"(from), "n"(bytes)
                     : "memory");
    }
}

// 16 bytes of weights to registers, past L1; aligned. `policy` as above.
__device__ __forceinline__ uint4 load_weights(const void* from, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(policy));
    return v;
}

// Brings what lies at p into L1, without waiting for it. Nothing in flight may write it.
__device__ __forceinline__ void touch(const void* p) {
    uint32_t unused;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(unused) : "l"(p));
}

// Ends this thread's group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but this thread's latest `pending` groups of copies are done, and visible to this thread.
template <int pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Numbers

__device__ __forceinline__ float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

__device__ __forceinline__ uint16_t float_to_bf16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two at once, `low` in the lower half.
__device__ __forceinline__ uint32_t floats_to_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// a b + c of both halves, rounded once; numbers that are no normal ones count.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a + b and a b of both halves; sm_80 has no instructions of their own for them.
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, 0x3f803f80u, b); }
__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }

__device__ __forceinline__ float fp16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t float_to_fp16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Tensor cores: d (16, 8) += a (16, k) b (k, 8). Lane 4 g + t holds rows g and g + 8 of a, column g of b, and of d
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).

// a: {row g, row g + 8} at k = 2t, 2t + 1, then both at k = 2t + 8, 2t + 9; b: k = 2t, 2t + 1, then 2t + 8, 2t + 9
__device__ __forceinline__ void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a: {row g, row g + 8} at k = t, then both at k = t + 4; b: k = t, then t + 4. Floats of which the lower 13 bits are
// ignored.
__device__ __forceinline__ void mma_tf32_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Order between grids and with the host

// Returns when the grid before this one has ended and its writes are visible. Every thread must call it, also of a
// block that has nothing to do: the grid after this one relies on all before it having ended.
__device__ __forceinline__ void grid_dependency_wait() {
#    if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#    endif
}

// Lets the next grid start, as soon as all blocks have said so.
__device__ __forceinline__ void grid_dependency_launch() {
#    if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#    endif
}

// What other SMs wrote in earlier kernels, for reads before grid_dependency_wait(): L1 may still
// hold what was there before.
__device__ __forceinline__ int load_relaxed(const int* p) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}

// Returns the old value. Publishes what the block wrote before (after a barrier), and shows what others published.
__device__ __forceinline__ int atomic_add_acq_rel(int* p, int value) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
    return old;
}

// Nanoseconds, the same clock on all SMs.
__device__ __forceinline__ unsigned long long global_timer() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Number of the SM that this thread is on.
__device__ __forceinline__ unsigned multiprocessor() {
    unsigned number;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
    return number;
}

// All earlier writes reach the host before any later one does.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

}  // namespace skipkernels::cuda::ptx
#endif
