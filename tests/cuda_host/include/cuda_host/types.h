// CUDA's vector types, with its sizes and alignments.
#pragma once

#include <cstdint>

#define CUDA_HOST_VECTORS(T, name)                                        \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                    \
    struct name##3 { T x, y, z; };                                        \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };              \
    constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(unsigned, uint)
CUDA_HOST_VECTORS(float, float)
#undef CUDA_HOST_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
