// Vectors across rows: what lies side by side in out lay one below the other.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
// four vectors' squares of four, lane by lane of 128 bits: v[j] then holds column j of each
inline void transpose_fours(Vec* v) {
#    if defined(SKIPKERNELS_ISA_AVX512)
    auto low = [](Vec a, Vec b) { return Vec{_mm512_unpacklo_ps(a.v, b.v)}; };
    auto high = [](Vec a, Vec b) { return Vec{_mm512_unpackhi_ps(a.v, b.v)}; };
    auto low_pairs = [](Vec a, Vec b) { return Vec{_mm512_shuffle_ps(a.v, b.v, 0x44)}; };
    auto high_pairs = [](Vec a, Vec b) { return Vec{_mm512_shuffle_ps(a.v, b.v, 0xee)}; };
#    else
    auto low = [](Vec a, Vec b) { return Vec{_mm256_unpacklo_ps(a.v, b.v)}; };
    auto high = [](Vec a, Vec b) { return Vec{_mm256_unpackhi_ps(a.v, b.v)}; };
    auto low_pairs = [](Vec a, Vec b) { return Vec{_mm256_shuffle_ps(a.v, b.v, 0x44)}; };
    auto high_pairs = [](Vec a, Vec b) { return Vec{_mm256_shuffle_ps(a.v, b.v, 0xee)}; };
#    endif
    const Vec a = low(v[0], v[1]), b = high(v[0], v[1]), c = low(v[2], v[3]), d = high(v[2], v[3]);
    v[0] = low_pairs(a, c), v[1] = high_pairs(a, c), v[2] = low_pairs(b, d), v[3] = high_pairs(b, d);
}
#endif

// v[i][j] -> v[j][i], for as many vectors as one has elements
inline void transpose_square(Vec* v) {
#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
    for (int i = 0; i < Vec::width; i += 4) transpose_fours(v + i);
    // then the lanes themselves
#    if defined(SKIPKERNELS_ISA_AVX512)
    auto even = [](Vec a, Vec b) { return Vec{_mm512_shuffle_f32x4(a.v, b.v, 0x88)}; };
    auto odd = [](Vec a, Vec b) { return Vec{_mm512_shuffle_f32x4(a.v, b.v, 0xdd)}; };
    for (int j = 0; j < 4; ++j) {
        const Vec a = even(v[j], v[j + 4]), b = odd(v[j], v[j + 4]);
        const Vec c = even(v[j + 8], v[j + 12]), d = odd(v[j + 8], v[j + 12]);
        v[j] = even(a, c), v[j + 8] = odd(a, c);
        v[j + 4] = even(b, d), v[j + 12] = odd(b, d);
    }
#    else
    for (int j = 0; j < 4; ++j) {
        const Vec a = v[j], b = v[j + 4];
        v[j] = {_mm256_permute2f128_ps(a.v, b.v, 0x20)};
        v[j + 4] = {_mm256_permute2f128_ps(a.v, b.v, 0x31)};
    }
#    endif
#else
    for (int i = 0; i < Vec::width; ++i) {
        for (int j = 0; j < i; ++j) {
            const float upper = v[j].v[i];
            v[j].v[i] = v[i].v[j];
            v[i].v[j] = upper;
        }
    }
#endif
}

#if defined(SKIPKERNELS_ISA_AVX512)
constexpr int kHalfSquare = Vec::width / 2;  // columns

// rows (width pointers) -> out[i] = their columns at + i. Loads of half a vector put two rows into one register, which
// saves a quarter of a square's shuffles.
inline void transpose_half(const float* const* rows, int64_t at, Vec (&out)[kHalfSquare]) {
    Vec v[kHalfSquare];
    for (int i = 0; i < kHalfSquare; ++i) {
        const int row = i / 4 * 8 + i % 4;
        const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(rows[row] + at)));
        const __m256d high = _mm256_castps_pd(_mm256_loadu_ps(rows[row + 4] + at));
        v[i] = {_mm512_castpd_ps(_mm512_insertf64x4(low, high, 1))};
    }
    transpose_fours(v);
    transpose_fours(v + 4);
    for (int j = 0; j < 4; ++j) {
        out[j] = {_mm512_shuffle_f32x4(v[j].v, v[4 + j].v, 0x88)};
        out[4 + j] = {_mm512_shuffle_f32x4(v[j].v, v[4 + j].v, 0xdd)};
    }
}
#endif

// rows (width pointers to columns [begin, end), null for zeros) -> out[column * stride + row]
template <class T>
inline void transpose_columns(const T* const* rows, int64_t begin, int64_t end, float* out, int64_t stride) {
    for (int64_t j = begin; j < end; j += Vec::width) {
        const int count = static_cast<int>(end - j < Vec::width ? end - j : Vec::width);
        Vec square[Vec::width];
        for (int i = 0; i < Vec::width; ++i) square[i] = rows[i] ? load_some(rows[i] + j, count) : splat(0.0f);
        transpose_square(square);
        for (int i = 0; i < count; ++i) store(out + (j + i) * stride, square[i]);
    }
}

template <class T>
inline void transpose(const T* const* rows, int64_t columns, float* out, int64_t stride) {
    transpose_columns(rows, 0, columns, out, stride);
}

#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
// bf16 moves two columns at a time, as one number of 32 bits: half the shuffles, and both are fp32 by a shift or a
// mask.
inline void transpose(const bf16* const* rows, int64_t columns, float* out, int64_t stride) {
    constexpr int64_t kPairs = 2 * Vec::width;
    const int64_t whole = columns / kPairs * kPairs;
    for (int64_t j = 0; j < whole; j += kPairs) {
        Vec square[Vec::width];
        for (int i = 0; i < Vec::width; ++i) {
            square[i] = rows[i] ? load(reinterpret_cast<const float*>(rows[i] + j)) : splat(0.0f);
        }
        transpose_square(square);
        for (int i = 0; i < Vec::width; ++i) {
            store(out + (j + 2 * i) * stride, low_bf16(square[i]));
            store(out + (j + 2 * i + 1) * stride, high_bf16(square[i]));
        }
    }
    transpose_columns(rows, whole, columns, out, stride);
}
#endif

}  // namespace skipkernels::SKIPKERNELS_ISA
