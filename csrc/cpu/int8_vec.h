// The integer vocabulary of the kernels for quantised weights: Ints holds `lanes` times four bytes, or one int32 for
// each of these lanes.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

#if defined(SKIPKERNELS_ISA_AVX512)

struct Ints {
    static constexpr int lanes = 16;
    __m512i v;
};
inline Ints load_bytes(const uint8_t* p) { return {_mm512_load_si512(p)}; }
// four bytes, the same in each lane
inline Ints broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof quad);
    return {_mm512_set1_epi32(quad)};
}
inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints and_bytes(Ints a, int mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(mask)))}; }
inline Ints flip_signs(Ints a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(static_cast<char>(0x80)))}; }
inline Ints or_bytes(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int bits>  // to the right, or to the left where negative; bits of a neighbouring byte come in
inline Ints shift(Ints a) {
    if constexpr (bits > 0) return {_mm512_srli_epi16(a.v, bits)};
    if constexpr (bits < 0) return {_mm512_slli_epi16(a.v, -bits)};
    return a;
}
inline Ints add_words(Ints a, Ints b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Ints add_ints(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
// neighbouring words multiplied and added
inline Ints multiply_words(Ints a, Ints b) { return {_mm512_madd_epi16(a.v, b.v)}; }
inline Ints splat_words(int low, int high) { return {_mm512_set1_epi32((low & 0xffff) | high * 65536)}; }
#    if defined(SKIPKERNELS_ISA_VNNI)
inline Ints add_dot(Ints sum, Ints u, Ints s) { return {_mm512_dpbusd_epi32(sum.v, u.v, s.v)}; }
#    else
// unsigned times signed, neighbouring products added with saturation
inline Ints multiply_bytes(Ints u, Ints s) { return {_mm512_maddubs_epi16(u.v, s.v)}; }
inline Ints magnitude(Ints a) { return {_mm512_abs_epi8(a.v)}; }
inline Ints with_sign_of(Ints a, Ints sign) {
    return {_mm512_mask_sub_epi8(a.v, _mm512_movepi8_mask(sign.v), _mm512_setzero_si512(), a.v)};
}
#    endif
inline Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vec load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load_i8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))))};
}
// `width` floats, rounded, as int8
inline void store_rounded(int8_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }

#elif defined(SKIPKERNELS_ISA_AVX2)

struct Ints {
    static constexpr int lanes = 8;
    __m256i v;
};
inline Ints load_bytes(const uint8_t* p) { return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof quad);
    return {_mm256_set1_epi32(quad)};
}
inline Ints zero_ints() { return {_mm256_setzero_si256()}; }
inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints and_bytes(Ints a, int mask) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(static_cast<char>(mask)))}; }
inline Ints flip_signs(Ints a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi8(static_cast<char>(0x80)))}; }
inline Ints or_bytes(Ints a, Ints b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int bits>
inline Ints shift(Ints a) {
    if constexpr (bits > 0) return {_mm256_srli_epi16(a.v, bits)};
    if constexpr (bits < 0) return {_mm256_slli_epi16(a.v, -bits)};
    return a;
}
inline Ints add_words(Ints a, Ints b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints multiply_words(Ints a, Ints b) { return {_mm256_madd_epi16(a.v, b.v)}; }
inline Ints splat_words(int low, int high) { return {_mm256_set1_epi32((low & 0xffff) | high * 65536)}; }
#    if defined(SKIPKERNELS_ISA_VNNI)
inline Ints add_dot(Ints sum, Ints u, Ints s) { return {_mm256_dpbusd_avx_epi32(sum.v, u.v, s.v)}; }
#    else
inline Ints multiply_bytes(Ints u, Ints s) { return {_mm256_maddubs_epi16(u.v, s.v)}; }
inline Ints magnitude(Ints a) { return {_mm256_abs_epi8(a.v)}; }
inline Ints with_sign_of(Ints a, Ints sign) { return {_mm256_sign_epi8(a.v, sign.v)}; }
#    endif
inline Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vec load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load_i8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store_rounded(int8_t* p, Vec a) {
    const __m256i ints = _mm256_cvtps_epi32(a.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

#else

struct Ints {
    static constexpr int lanes = 8;
    uint32_t v[8];
};
template <class F>
inline Ints map_ints(F f) {
    Ints r;
    for (int i = 0; i < Ints::lanes; ++i) r.v[i] = f(i);
    return r;
}
inline Ints load_bytes(const uint8_t* p) {
    Ints r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline Ints broadcast_quad(const int8_t* p) {
    uint32_t quad;
    std::memcpy(&quad, p, sizeof quad);
    return map_ints([=](int) { return quad; });
}
inline Ints zero_ints() {
    return map_ints([](int) { return 0u; });
}
inline Ints splat_int(int32_t x) {
    return map_ints([=](int) { return static_cast<uint32_t>(x); });
}
inline Ints and_bytes(const Ints& a, uint32_t mask) {
    return map_ints([&](int i) { return a.v[i] & mask * 0x01010101u; });
}
inline Ints or_bytes(const Ints& a, const Ints& b) {
    return map_ints([&](int i) { return a.v[i] | b.v[i]; });
}
template <int bits>
inline Ints shift(const Ints& a) {
    return map_ints([&](int i) { return bits < 0 ? a.v[i] << -bits : a.v[i] >> bits; });
}
inline Ints add_dot(const Ints& sum, const Ints& u, const Ints& s) {
    return map_ints([&](int i) {
        int32_t dot = static_cast<int32_t>(sum.v[i]);
        for (int byte = 0; byte < 4; ++byte) {
            dot += static_cast<int32_t>(u.v[i] >> 8 * byte & 255) * static_cast<int8_t>(s.v[i] >> 8 * byte & 255);
        }
        return static_cast<uint32_t>(dot);
    });
}
inline Vec to_floats(const Ints& a) {
    return map([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
inline Vec load_u8(const uint8_t* p) {
    return map([=](int i) { return static_cast<float>(p[i]); });
}
inline Vec load_i8(const uint8_t* p) {
    return map([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
inline void store_rounded(int8_t* p, const Vec& a) {
    for (int i = 0; i < Vec::width; ++i) p[i] = static_cast<int8_t>(std::nearbyint(a.v[i]));
}
inline Vec abs(const Vec& a) {
    return map([&](int i) { return std::fabs(a.v[i]); });
}

#endif

}  // namespace skipkernels::SKIPKERNELS_ISA
