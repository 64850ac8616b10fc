// The twin of the inline PTX in csrc/cuda/ptx.cuh: the same functions, for the CPU, stricter where PTX leaves something
// undefined.
//
//   char* shared_memory()                        the block's dynamic shared memory, 16-byte aligned
//   void prefetch_l2(const void* p, uint32_t bytes)   p and bytes multiples of 16; here the range is read
//   void copy_async(void* to_shared, const void* from), commit_copies(), wait_copies<pending>()
//                                                cp.async of 16 bytes; here done when waited for, or a bit earlier
//   copy_few_async<bytes>(to, from)              the same of 4, 8 or 16
//   uint32_t add_bf16x2(uint32_t a, uint32_t b), multiply_bf16x2(uint32_t a, uint32_t b)    pairs; here the result of
//                                                floats is rounded, which sums and products of two bf16 bear
//   copy_weights_async(to, from, policy), uint4 load_weights(from, policy), touch(const void* p)
//   int thread_index(), unsigned multiprocessor()    threadIdx.x; one of those of the device
//   unsigned long long global_timer()            here a counter: later calls get larger numbers
//   float bf16_to_float(uint16_t), uint16_t float_to_bf16(float), uint32_t floats_to_bf16(float low, float high),
//   float fp16_to_float(uint16_t), uint16_t float_to_fp16(float)    to nearest even; NaN stays NaN
//   void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])    d += a b;
//   void mma_tf32_m16n8k8(...)                   both collectives of the 32 lanes, fragments as in the PTX ISA
//   void grid_dependency_wait(), grid_dependency_launch()    griddepcontrol; every thread must wait before it exits
//   int atomic_add_acq_rel(int* p, int value)    returns the old value
//   int load_relaxed(const int* p)               past L1
//   int load_acquire(const int* p)               lets others run, so a loop around it gets somewhere
//   void store_release_system(int* p, int value), fence_system(), nanosleep(uint32_t ns)
#pragma once

#include <cuda_runtime.h>

namespace skipkernels::cuda::ptx {

// These are in src/.
char* shared_memory();
void grid_dependency_wait();
void grid_dependency_launch();
void start_copy(void* to_shared, const void* from, uint32_t bytes);
void commit_copies();
void finish_copies(int pending);

inline void check_alignment(const void* p, const char* what, uint32_t bytes = 16) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) cuda_host::fail("%s: %p is not aligned to %u bytes", what, p, bytes);
}

// Reads 8 bytes at a time: no address that AddressSanitizer guards lies in between.
CUDA_HOST_UNWATCHED inline void touch(const void* p, uint32_t bytes) {
    for (uint32_t at = 0; at < bytes; at += 8) {
        static_cast<void>(*reinterpret_cast<const volatile uint64_t*>(static_cast<const char*>(p) + at));
    }
}

inline void prefetch_l2(const void* p, uint32_t bytes) {
    check_alignment(p, "prefetch_l2");
    if (bytes % 16) cuda_host::fail("prefetch_l2: the size %u is not a multiple of 16", bytes);
    touch(p, bytes);
}

// 4, 8 or 16 bytes.
template <int bytes>
inline void copy_few_async(void* to_shared, const void* from) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    check_alignment(from, "copy_async", bytes);
    check_alignment(to_shared, "copy_async", bytes);
    if constexpr (bytes == 4) {
        static_cast<void>(cuda_host::load_unwatched(static_cast<const uint32_t*>(from)));
    } else {
        touch(from, bytes);
    }
    cuda_host::watch_read(from, bytes);
    cuda_host::watch_write(to_shared, bytes);
    start_copy(to_shared, from, bytes);
}

inline void copy_async(void* to_shared, const void* from) { copy_few_async<16>(to_shared, from); }

// The cache keeps everything: a policy only has to be one of the two that are used.
inline void check_policy(unsigned long long policy, const char* what) {
    if (policy != 0x10F0000000000000 && policy != 0x12F0000000000000)
        cuda_host::fail("%s: %llx is no policy", what, policy);
}

inline void copy_weights_async(void* to_shared, const void* from, unsigned long long policy) {
    check_policy(policy, "copy_weights_async");
    copy_async(to_shared, from);
}

inline uint4 load_weights(const void* from, unsigned long long policy) {
    check_policy(policy, "load_weights");
    check_alignment(from, "load_weights");
    return *static_cast<const uint4*>(from);
}

// Into L1: a read like others, of which the race detector asks that nothing in flight writes there.
inline void touch(const void* p) {
    cuda_host::watch_read(p, 4);
    static_cast<void>(cuda_host::load_unwatched(static_cast<const uint32_t*>(p)));
}

template <int pending>
inline void wait_copies() {
    finish_copies(pending);
}

inline float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;  // as cvt.rn.bf16.f32 has it
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t floats_to_bf16(float low, float high) {
    return float_to_bf16(low) | uint32_t{float_to_bf16(high)} << 16;
}

inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    const auto sum = [&](int half) {
        return bf16_to_float(static_cast<uint16_t>(a >> half)) + bf16_to_float(static_cast<uint16_t>(b >> half));
    };
    return floats_to_bf16(sum(0), sum(16));
}

inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    const auto product = [&](int half) {
        return bf16_to_float(static_cast<uint16_t>(a >> half)) * bf16_to_float(static_cast<uint16_t>(b >> half));
    };
    return floats_to_bf16(product(0), product(16));
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

// d (16, 8) += a (16, k) b (k, 8). Lane 4 g + t holds of d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), and
// words of a and b that unpack(lane, operand, a, b) writes where they belong.
template <int k>
void multiply_add(cuda_host::LaneOperands& operands,
                  void (*unpack)(int, const MmaOperand&, float (&)[16][k], float (&)[k][8])) {
    float a[16][k], b[k][8];
    for (int lane = 0; lane < 32; ++lane) unpack(lane, *static_cast<const MmaOperand*>(operands[lane]), a, b);
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int j = 0; j < k; ++j) operand.d[i] += a[row][j] * b[j][column];
        }
    }
}

// a: {row g, row g + 8} at k = 2t, 2t + 1, then both at k = 2t + 8, 2t + 9; b: column g at the same k. Low half first.
inline void unpack_bf16(int lane, const MmaOperand& operand, float (&a)[16][16], float (&b)[16][8]) {
    const int group = lane / 4, first = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
        const auto value = [&](uint32_t pair) { return bf16_to_float(static_cast<uint16_t>(pair >> 16 * i)); };
        for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][first + i + r / 2 * 8] = value(operand.a[r]);
        for (int r = 0; r < 2; ++r) b[first + i + r * 8][group] = value(operand.b[r]);
    }
}

// a: {row g, row g + 8} at k = t, then both at k = t + 4; b: column g at the same k. The lower 13 bits do not count.
inline void unpack_tf32(int lane, const MmaOperand& operand, float (&a)[16][8], float (&b)[8][8]) {
    const int group = lane / 4, first = lane % 4;
    const auto value = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
    for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][first + r / 2 * 4] = value(operand.a[r]);
    for (int r = 0; r < 2; ++r) b[first + r * 4][group] = value(operand.b[r]);
}

inline void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              CUDA_HOST_SITE("mma_bf16_m16n8k16")) {
    MmaOperand operand{d, a, b};
    cuda_host::warp_collective(site, 0xffffffffu, &operand, [](cuda_host::LaneOperands& operands, uint32_t) {
        multiply_add<16>(operands, unpack_bf16);
    });
}

inline void mma_tf32_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             CUDA_HOST_SITE("mma_tf32_m16n8k8")) {
    MmaOperand operand{d, a, b};
    cuda_host::warp_collective(site, 0xffffffffu, &operand, [](cuda_host::LaneOperands& operands, uint32_t) {
        multiply_add<8>(operands, unpack_tf32);
    });
}

inline int atomic_add_acq_rel(int* p, int value) {
    return cuda_host::atomic(p, [=](int old) { return old + value; }, cuda_host::AtomicOrder::acquire_release);
}

inline int load_relaxed(const int* p) {
    cuda_host::watch_read_past_l1(p, sizeof *p);
    return cuda_host::load_unwatched(p);
}

inline int load_acquire(const int* p) {
    cuda_host::wait_a_while();
    cuda_host::watch_atomic(p, sizeof *p, cuda_host::AtomicOrder::acquire);
    return cuda_host::load_unwatched(p);
}

inline void store_release_system(int* p, int value) {
    cuda_host::atomic(p, [=](int) { return value; }, cuda_host::AtomicOrder::release);
}

inline int thread_index() { return static_cast<int>(threadIdx.x); }

// In src/.
unsigned long long global_timer();
unsigned multiprocessor();

inline void fence_system() { __threadfence_system(); }

inline void nanosleep(uint32_t ns) { __nanosleep(ns); }

}  // namespace skipkernels::cuda::ptx
