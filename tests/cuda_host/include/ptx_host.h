// The twin of the inline PTX in csrc/cuda/ptx.cuh: the same functions, for the CPU.
//
//   char* shared_memory()                       the block's dynamic shared memory, 16-byte aligned (extern __shared__)
//   uint4 load_weights(const void* p)           16 bytes, streamed past L1; p 16-byte aligned
//   uint2 load_weights_8(p), uint32_t load_weights_4(p), uint16_t load_weights_2(p)    the same, narrower
//   void prefetch_l2(const void* p, uint32_t bytes)    p and bytes multiples of 16; here the range is read
//   float bf16_to_float(uint16_t), uint16_t float_to_bf16(float)    to nearest even; NaN stays NaN
//   float fp16_to_float(uint16_t), uint16_t float_to_fp16(float)    the same; overflow to infinity, subnormals
//   void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])    d += a @ b, row.col;
//   void mma_fp16_m16n8k16(...)                 a collective of the 32 lanes, fragments as in the PTX ISA
//   void grid_dependency_wait(), grid_dependency_launch()    griddepcontrol.wait and .launch_dependents
//   int atomic_add_acq_rel(int* p, int v)       atom.acq_rel.gpu.add; returns the old value
//   int load_acquire(const int* p)              ld.acquire.gpu; lets others run, so a loop around it gets somewhere
//   void store_release_system(int* p, int v)    st.release.sys
//   void fence_system()                         __threadfence_system
//   void nanosleep(uint32_t ns)
#pragma once

#include <cuda_runtime.h>

namespace skipkernels::cuda::ptx {

char* shared_memory();  // src/scheduler.cpp, like the next two
void grid_dependency_wait();
void grid_dependency_launch();

template <class T>
inline T load_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) {
        cuda_host::fail("load_weights: %p is not aligned to its %zu bytes", p, sizeof(T));
    }
    return *static_cast<const T*>(p);
}
inline uint4 load_weights(const void* p) { return load_aligned<uint4>(p); }
inline uint2 load_weights_8(const void* p) { return load_aligned<uint2>(p); }
inline uint32_t load_weights_4(const void* p) { return load_aligned<uint32_t>(p); }
inline uint16_t load_weights_2(const void* p) { return load_aligned<uint16_t>(p); }

inline void prefetch_l2(const void* p, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % 16 || bytes % 16) {
        cuda_host::fail("prefetch_l2: address %p and size %u must be multiples of 16", p, bytes);
    }
    for (uint32_t at = 0; at < bytes; at += 8) {  // 8: no address that AddressSanitizer guards lies between
        static_cast<void>(*reinterpret_cast<const volatile uint64_t*>(static_cast<const char*>(p) + at));
    }
}

inline float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;  // as cvt.rn.bf16.f32 has it
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexpf(static_cast<float>(mantissa), -24);
    return sign * ldexpf(static_cast<float>(mantissa | 0x400), exponent - 25);
}

inline uint16_t float_to_fp16(float value) {
    if (value != value) return 0x7fff;  // as cvt.rn.f16.f32 has it
    const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000;
    const float magnitude = fabsf(value);
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);  // halfway from 65504 to 65536
    int exponent;
    frexpf(magnitude, &exponent);   // magnitude = f * 2^exponent, 1/2 <= f < 1
    exponent = max(exponent, -13);  // 2^-14 is the smallest normal number: below it the spacing stays 2^-24
    // nearbyint rounds to even; a mantissa rounded up to 2048 carries into the exponent
    const auto mantissa = static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 11 - exponent)));
    if (mantissa < 0x400) return static_cast<uint16_t>(sign | mantissa);
    return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 13) << 10) + mantissa));
}

struct MmaOperand {
    float (&d)[4];
    const uint32_t (&a)[4];
    const uint32_t (&b)[2];
};

// Lane 4 g + t holds, low half first:  a[0], a[1]: rows g, g + 8 of A (16 x 16), columns 2 t, 2 t + 1; a[2], a[3]: the
// same rows, 8 columns on.  b[0], b[1]: rows 2 t, 2 t + 1 and 8 rows on of B (16 x 8), column g.  d: (g, 2 t),
// (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1) of D (16 x 8).
template <float (*to_float)(uint16_t)>
void complete_mma(cuda_host::LaneOperands& operands, uint32_t) {
    float a[16][16], b[16][8];
    const auto half = [](uint32_t pair, int which) { return to_float(static_cast<uint16_t>(pair >> 16 * which)); };
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int k = 0; k < 2; ++k) b[pair + i + 8 * k][group] = half(operand.b[k], i);
            for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + i + r / 2 * 8] = half(operand.a[r], i);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) operand.d[i] += a[row][k] * b[k][column];
        }
    }
}

inline void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              CUDA_HOST_SITE("mma_bf16_m16n8k16")) {
    MmaOperand operand{d, a, b};
    cuda_host::warp_collective(site, 0xffffffffu, &operand, complete_mma<bf16_to_float>);
}

inline void mma_fp16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              CUDA_HOST_SITE("mma_fp16_m16n8k16")) {
    MmaOperand operand{d, a, b};
    cuda_host::warp_collective(site, 0xffffffffu, &operand, complete_mma<fp16_to_float>);
}

inline int atomic_add_acq_rel(int* p, int v) { return atomicAdd(p, v); }

inline int load_acquire(const int* p) {
    cuda_host::wait_a_while();
    return *static_cast<const volatile int*>(p);
}

inline void store_release_system(int* p, int v) { atomicExch(p, v); }

inline void fence_system() { __threadfence_system(); }

inline void nanosleep(uint32_t ns) { __nanosleep(ns); }

}  // namespace skipkernels::cuda::ptx
