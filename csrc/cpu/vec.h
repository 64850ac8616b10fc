// The SIMD vocabulary of the CPU kernels: one Vec type per instruction set, chosen by the macro the including
// isa_*.cpp defines (SKIPKERNELS_ISA_AVX512, SKIPKERNELS_ISA_AVX2, or neither for plain C++).
// Everything is in the including file's namespace, so the same kernel compiled twice is two functions.
#pragma once

#include "numbers.h"
#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
#    include <immintrin.h>
#endif
#if defined(SKIPKERNELS_ISA_AVX512) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own AVX-512 intrinsics (GCC bug 105593)
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace skipkernels::SKIPKERNELS_ISA {

#if defined(SKIPKERNELS_ISA_AVX512)

struct Vec {
    static constexpr int width = 16, max_accumulators = 24;  // of 32 registers
    __m512 v;
};
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
// each 32 bits as two bf16: the one at the lower address, and the other
inline Vec low_bf16(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
inline Vec high_bf16(Vec a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(-65536)))};
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 0 where |a| < least; NaN stays
inline Vec zero_below(Vec a, Vec least) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(a.v), least.v, _CMP_NLT_UQ), a.v)};
}
inline uint32_t nonzero_bits(Vec a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
inline __m128 fold(Vec a) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#elif defined(SKIPKERNELS_ISA_AVX2)

struct Vec {
    static constexpr int width = 8, max_accumulators = 12;  // of 16 registers
    __m256 v;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
// each 32 bits as two bf16: the one at the lower address, and the other
inline Vec low_bf16(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))}; }
inline Vec high_bf16(Vec a) {
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(-65536)))};
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 0 where |a| < least; NaN stays
inline Vec zero_below(Vec a, Vec least) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
    return {_mm256_and_ps(_mm256_cmp_ps(magnitude, least.v, _CMP_NLT_UQ), a.v)};
}
inline uint32_t nonzero_bits(Vec a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
}
inline __m128 fold(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)); }
inline Vec scale_by_power_of_two(Vec a, Vec n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}

#else

struct Vec {
    // loops over 8 floats, which any compiler turns into what the target has
    static constexpr int width = 8, max_accumulators = 12;
    float v[8];
};
template <class F>
inline Vec map(F f) {
    Vec r;
    for (int i = 0; i < Vec::width; ++i) r.v[i] = f(i);
    return r;
}
inline Vec splat(float x) {
    return map([=](int) { return x; });
}
template <class T>
inline Vec load(const T* p) {
    return map([=](int i) { return to_float(p[i]); });
}
inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec operator+(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec round_nearest(const Vec& a) {
    return map([&](int i) { return std::nearbyint(a.v[i]); });
}
inline Vec scale_by_power_of_two(const Vec& a, const Vec& n) {
    return map([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}
// 0 where |a| < least; NaN stays
inline Vec zero_below(const Vec& a, const Vec& least) {
    return map([&](int i) { return std::fabs(a.v[i]) < least.v[i] ? 0.0f : a.v[i]; });
}
inline uint32_t nonzero_bits(const Vec& a) {
    uint32_t bits = 0;
    for (int i = 0; i < Vec::width; ++i) bits |= static_cast<uint32_t>(a.v[i] != 0.0f) << i;
    return bits;
}
inline float reduce_max(const Vec& a) {
    float largest = a.v[0];
    for (float value : a.v) largest = value > largest ? value : largest;
    return largest;
}
inline float reduce_add(const Vec& a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

#endif

#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
inline float reduce_add(Vec a) {
    __m128 s = fold(a);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
#    if defined(SKIPKERNELS_ISA_AVX512)
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#    else
    const __m256 half = a.v;
#    endif
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
#endif

// out[i] = reduce_add(v[i]), to the bit: four at a time take half the instructions of one after the other
inline void reduce_add_four(const Vec* v, float* out) {
#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
    const __m128 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
#else
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
#endif
}

// The first n (< width) elements, zeros behind them.
template <class T>
inline Vec load_first(const T* p, int n) {
    alignas(64) float buffer[Vec::width] = {};
    for (int i = 0; i < n; ++i) buffer[i] = to_float(p[i]);
    return load(buffer);
}

#if defined(SKIPKERNELS_ISA_AVX512)
inline Vec load_first(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
#endif

// The same, for n up to the whole width.
template <class T>
inline Vec load_some(const T* p, int n) {
    return n == Vec::width ? load(p) : load_first(p, n);
}

// Stores the first n (<= width) elements.
inline void store_some(float* p, Vec a, int n) {
    if (n == Vec::width) return store(p, a);
#if defined(SKIPKERNELS_ISA_AVX512)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
#else
    alignas(64) float buffer[Vec::width];
    store(buffer, a);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// e^x to 2 ulp over the finite range: 2^n e^r with |r| <= ln2 / 2 and a Taylor polynomial of degree 7 (error 3e-9).
// NaN stays NaN: of a pair with one, min and max return the second.
inline Vec exp(Vec x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));
    const Vec n = round_nearest(x * splat(1.44269504f));
    Vec r = fma(n, splat(-0.693359375f), x);  // ln2 in two parts, the first exact in 9 bits
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
    return scale_by_power_of_two(p, n);
}

}  // namespace skipkernels::SKIPKERNELS_ISA
