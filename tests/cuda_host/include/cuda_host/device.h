// What kernels call. Shared memory is dynamic only (ptx::shared_memory), so there is no __shared__: a static variable
// could not belong to many resident blocks at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define CUDA_HOST_INTERNAL __attribute__((visibility("hidden")))
// Accesses of these functions are not announced to the race detector (src/race.h).
#define CUDA_HOST_UNWATCHED __attribute__((noinline, no_sanitize("thread")))

// The scheduler sets these whenever it resumes a thread.
extern CUDA_HOST_INTERNAL uint3 threadIdx, blockIdx;
extern CUDA_HOST_INTERNAL dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

// Where in a kernel a call stands. As a default argument it is made at the caller.
struct Site {
    const char* call;
    const char* file;
    int line;
};
#define CUDA_HOST_SITE(call) ::cuda_host::Site site = {call, __builtin_FILE(), __builtin_LINE()}

// Implemented in src/collectives.cpp; most may run other threads before they return.
using LaneOperands = void* const[32];
void block_barrier(Site site);
// Waits until every lane of `mask` stands at the same site with the same mask; the last one to arrive runs
// complete(operands of the lanes, mask) for all of them.
void warp_collective(Site site, uint32_t mask, void* operand, void (*complete)(LaneOperands& operands, uint32_t mask));
void maybe_yield();  // under shuffling seeds, others may run here
void fence();
void wait_a_while();                           // everybody else runs first: belongs into every loop that polls
void made_progress();                          // memory changed that others may poll: the launch is not stuck
[[noreturn]] void fail(const char* what, ...)  // ends the launch with an error; printf-like
    __attribute__((format(printf, 1, 2)));
unsigned lane_id();

struct ShuffleOperand {
    uint64_t bits;  // the lane's value, and afterwards its result
    int source;     // lane whose value it takes
};
void complete_shuffle(LaneOperands& operands, uint32_t mask);

template <class T>
T shuffle(Site site, uint32_t mask, T value, int source) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles exchange arithmetic types of 4 or 8 bytes");
    ShuffleOperand operand{0, source};
    std::memcpy(&operand.bits, &value, sizeof value);
    warp_collective(site, mask, &operand, complete_shuffle);
    std::memcpy(&value, &operand.bits, sizeof value);
    return value;
}

uint32_t vote(Site site, uint32_t mask, bool predicate);  // bit set of the lanes of mask whose predicate holds

// For the race detector, src/race.cpp.
enum class AtomicOrder { relaxed, acquire, release, acquire_release };
void watch_atomic(const void* p, size_t bytes, AtomicOrder order);
void watch_read(const void* p, size_t bytes);
void watch_read_past_l1(const void* p, size_t bytes);
void watch_write(const void* p, size_t bytes);

template <class T>
CUDA_HOST_UNWATCHED T load_unwatched(const T* p) {
    return *static_cast<const volatile T*>(p);
}
template <class T>
CUDA_HOST_UNWATCHED void store_unwatched(T* p, T value) {
    *p = value;
}

template <class T, class Change>
T atomic(T* p, Change change, AtomicOrder order = AtomicOrder::relaxed) {
    maybe_yield();
    watch_atomic(p, sizeof *p, order);
    const T old = load_unwatched(p), changed = change(old);
    store_unwatched(p, changed);
    if (changed != old) made_progress();
    maybe_yield();
    return old;
}

}  // namespace cuda_host

inline void __syncthreads(CUDA_HOST_SITE("__syncthreads")) { cuda_host::block_barrier(site); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_HOST_SITE("__syncwarp")) {
    cuda_host::warp_collective(site, mask, nullptr, [](cuda_host::LaneOperands&, uint32_t) {});
}

// A lane whose source lies outside its segment of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CUDA_HOST_SITE("__shfl_sync")) {
    const int segment = static_cast<int>(cuda_host::lane_id()) & -width;
    return cuda_host::shuffle(site, mask, value, segment | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, CUDA_HOST_SITE("__shfl_xor_sync")) {
    const int lane = static_cast<int>(cuda_host::lane_id()), source = lane ^ lanes;
    return cuda_host::shuffle(site, mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, CUDA_HOST_SITE("__shfl_down_sync")) {
    const int lane = static_cast<int>(cuda_host::lane_id()), source = lane + delta;
    return cuda_host::shuffle(site, mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, CUDA_HOST_SITE("__shfl_up_sync")) {
    const int lane = static_cast<int>(cuda_host::lane_id()), source = lane - delta;
    return cuda_host::shuffle(site, mask, value, source >= (lane & -width) ? source : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, CUDA_HOST_SITE("__ballot_sync")) {
    return cuda_host::vote(site, mask, predicate);
}
inline int __any_sync(uint32_t mask, bool predicate, CUDA_HOST_SITE("__any_sync")) {
    return cuda_host::vote(site, mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, CUDA_HOST_SITE("__all_sync")) {
    return cuda_host::vote(site, mask, predicate) == mask;
}

inline void __threadfence() { cuda_host::fence(); }
inline void __threadfence_block() { cuda_host::fence(); }
inline void __threadfence_system() { cuda_host::fence(); }
inline void __nanosleep(unsigned) { cuda_host::wait_a_while(); }

#define CUDA_HOST_ATOMICS(T)                                                             \
    inline T atomicAdd(T* p, T value) {                                                  \
        return cuda_host::atomic(p, [=](T old) { return static_cast<T>(old + value); }); \
    }                                                                                    \
    inline T atomicExch(T* p, T value) {                                                 \
        return cuda_host::atomic(p, [=](T) { return value; });                           \
    }
#define CUDA_HOST_INTEGER_ATOMICS(T)                                                       \
    CUDA_HOST_ATOMICS(T)                                                                   \
    inline T atomicCAS(T* p, T expected, T value) {                                        \
        return cuda_host::atomic(p, [=](T old) { return old == expected ? value : old; }); \
    }                                                                                      \
    inline T atomicMax(T* p, T value) {                                                    \
        return cuda_host::atomic(p, [=](T old) { return old < value ? value : old; });     \
    }                                                                                      \
    inline T atomicMin(T* p, T value) {                                                    \
        return cuda_host::atomic(p, [=](T old) { return value < old ? value : old; });     \
    }
CUDA_HOST_ATOMICS(float)
CUDA_HOST_INTEGER_ATOMICS(int)
CUDA_HOST_INTEGER_ATOMICS(unsigned)
CUDA_HOST_INTEGER_ATOMICS(unsigned long long)
#undef CUDA_HOST_INTEGER_ATOMICS
#undef CUDA_HOST_ATOMICS

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
