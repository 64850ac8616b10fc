// The integer vocabulary of the kernels for quantised weights: Ints holds `lanes` times four bytes, or one int32 for
// each of these lanes.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
inline __m128i load_128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
#endif

#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
// A sum that is computed where it stands. gcc 12 moves a chain of sums behind all its products, which then do not fit
// into registers: a block of q4_0 times four rows wrote 50 of them to memory, and took 1.5 times as long (AVX2, Zen 3).
template <class V>
inline V computed_here(V v) {
    asm("" : "+v"(v));
    return v;
}
#endif

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
// to the right, by a count that is known at run time only
inline Ints shift_right(Ints a, int bits) { return {_mm512_srl_epi16(a.v, _mm_cvtsi32_si128(bits))}; }
// in each lane of 128 bits: out[k] holds bytes 4 k .. 4 k + 3, each as four bytes, one of every a
inline void interleave_bytes(const Ints (&a)[4], Ints (&out)[4]) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(a[0].v, a[1].v), _mm512_unpacklo_epi8(a[2].v, a[3].v)};
    const __m512i high[2] = {_mm512_unpackhi_epi8(a[0].v, a[1].v), _mm512_unpackhi_epi8(a[2].v, a[3].v)};
    out[0].v = _mm512_unpacklo_epi16(low[0], low[1]), out[1].v = _mm512_unpackhi_epi16(low[0], low[1]);
    out[2].v = _mm512_unpacklo_epi16(high[0], high[1]), out[3].v = _mm512_unpackhi_epi16(high[0], high[1]);
}
// a group's vector of lanes with four bytes each -> two halves of every lane, or four bytes of every lane
inline void split_halves(uint8_t* p) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    _mm512_store_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), _mm512_load_si512(p)));
}
inline void split_bytes(uint8_t* p) {
    alignas(64) static constexpr uint32_t kLaneOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i fours = _mm512_shuffle_epi8(_mm512_load_si512(p), order);
    _mm512_store_si512(p, _mm512_permutexvar_epi32(_mm512_load_si512(kLaneOrder), fours));
}
inline Ints add_words(Ints a, Ints b) { return {computed_here(_mm512_add_epi16(a.v, b.v))}; }
inline Ints add_ints(Ints a, Ints b) { return {computed_here(_mm512_add_epi32(a.v, b.v))}; }
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
// Blocks of rows that lie in one piece: a 128-bit lane each, or two of them (Ints::lanes / 4 lanes in all).
// from any address
inline Ints load_unaligned(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// of neighbouring blocks of 32 bytes: the first halves, and the second halves
inline void load_halves_of_blocks(const uint8_t* p, Ints& first, Ints& second) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    first.v = _mm512_shuffle_i32x4(a, b, 0x88), second.v = _mm512_shuffle_i32x4(a, b, 0xdd);
}
// of blocks of 20 bytes: the first 16, and the other four, four times
inline void load_blocks_of_20(const uint8_t* p, Ints& low, Ints& upper) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_castsi128_si512(load_128(p + 64));
    const __m512i ends = _mm512_setr_epi32(4, 4, 4, 4, 9, 9, 9, 9, 14, 14, 14, 14, 19, 19, 19, 19);
    low.v = _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18), b);
    upper.v = _mm512_permutex2var_epi32(a, ends, b);
}
// of blocks of 24 bytes: the first 16, and twice four, each four times
inline void load_blocks_of_24(const uint8_t* p, Ints& low, Ints (&upper)[2]) {
    const __m512i a = _mm512_loadu_si512(p);
    const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64)));
    const __m512i ends = _mm512_setr_epi32(4, 4, 4, 4, 10, 10, 10, 10, 16, 16, 16, 16, 22, 22, 22, 22);
    low.v = _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21), b);
    upper[0].v = _mm512_permutex2var_epi32(a, ends, b);
    upper[1].v = _mm512_permutex2var_epi32(a, _mm512_add_epi32(ends, _mm512_set1_epi32(1)), b);
}
// the four elements of each 128-bit lane to the right by 0, step, 2 step and 3 step bits
template <int step>
inline Ints shift_each(Ints a) {
    return {_mm512_srlv_epi32(a.v, _mm512_broadcast_i32x4(_mm_setr_epi32(0, step, 2 * step, 3 * step)))};
}
// element e of a 128-bit lane: the sum of the four elements of a[e] there
inline Ints add_fours(const Ints (&a)[4]) {
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0].v, a[1].v), _mm512_unpackhi_epi32(a[0].v, a[1].v));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2].v, a[3].v), _mm512_unpackhi_epi32(a[2].v, a[3].v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high))};
}
// of as many vectors as one has 128-bit lanes: out[i] holds the i-th lane of every a
inline void transpose_lanes(const Ints* a, Ints (&out)[4]) {
    const __m512i low[2] = {_mm512_shuffle_i32x4(a[0].v, a[1].v, 0x44), _mm512_shuffle_i32x4(a[2].v, a[3].v, 0x44)};
    const __m512i high[2] = {_mm512_shuffle_i32x4(a[0].v, a[1].v, 0xee), _mm512_shuffle_i32x4(a[2].v, a[3].v, 0xee)};
    out[0].v = _mm512_shuffle_i32x4(low[0], low[1], 0x88), out[1].v = _mm512_shuffle_i32x4(low[0], low[1], 0xdd);
    out[2].v = _mm512_shuffle_i32x4(high[0], high[1], 0x88), out[3].v = _mm512_shuffle_i32x4(high[0], high[1], 0xdd);
}

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
inline Ints shift_right(Ints a, int bits) { return {_mm256_srl_epi16(a.v, _mm_cvtsi32_si128(bits))}; }
inline void interleave_bytes(const Ints (&a)[4], Ints (&out)[4]) {
    const __m256i low[2] = {_mm256_unpacklo_epi8(a[0].v, a[1].v), _mm256_unpacklo_epi8(a[2].v, a[3].v)};
    const __m256i high[2] = {_mm256_unpackhi_epi8(a[0].v, a[1].v), _mm256_unpackhi_epi8(a[2].v, a[3].v)};
    out[0].v = _mm256_unpacklo_epi16(low[0], low[1]), out[1].v = _mm256_unpackhi_epi16(low[0], low[1]);
    out[2].v = _mm256_unpacklo_epi16(high[0], high[1]), out[3].v = _mm256_unpackhi_epi16(high[0], high[1]);
}
inline void split_halves(uint8_t* p) {
    auto* at = reinterpret_cast<__m256i*>(p);
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    auto split = [&](__m256i v) { return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8); };
    const __m256i first = split(_mm256_load_si256(at)), second = split(_mm256_load_si256(at + 1));
    _mm256_store_si256(at, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_store_si256(at + 1, _mm256_permute2x128_si256(first, second, 0x31));
}
inline void split_bytes(uint8_t* p) {
    auto* at = reinterpret_cast<__m256i*>(p);
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    auto split = [&](__m256i v) { return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, order), lanes); };
    const __m256i first = split(_mm256_load_si256(at)), second = split(_mm256_load_si256(at + 1));
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
    _mm256_store_si256(at, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_store_si256(at + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
inline Ints add_words(Ints a, Ints b) { return {computed_here(_mm256_add_epi16(a.v, b.v))}; }
inline Ints add_ints(Ints a, Ints b) { return {computed_here(_mm256_add_epi32(a.v, b.v))}; }
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
inline Ints load_unaligned(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void load_halves_of_blocks(const uint8_t* p, Ints& first, Ints& second) {
    const __m256i a = load_unaligned(p).v, b = load_unaligned(p + 32).v;
    first.v = _mm256_permute2x128_si256(a, b, 0x20), second.v = _mm256_permute2x128_si256(a, b, 0x31);
}
// of two blocks `stride` bytes apart: 16 bytes, and four of them, four times
inline Ints load_pair(const uint8_t* p, int stride) {
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(load_128(p)), load_128(p + stride), 1)};
}
inline Ints broadcast_pair(const uint8_t* p, int stride) {
    int32_t bits[2];
    std::memcpy(bits, p, sizeof *bits), std::memcpy(bits + 1, p + stride, sizeof *bits);
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(bits[0])), _mm_set1_epi32(bits[1]), 1)};
}
inline void load_blocks_of_20(const uint8_t* p, Ints& low, Ints& upper) {
    low = load_pair(p, 20), upper = broadcast_pair(p + 16, 20);
}
inline void load_blocks_of_24(const uint8_t* p, Ints& low, Ints (&upper)[2]) {
    low = load_pair(p, 24), upper[0] = broadcast_pair(p + 16, 24), upper[1] = broadcast_pair(p + 20, 24);
}
template <int step>
inline Ints shift_each(Ints a) {
    return {_mm256_srlv_epi32(a.v, _mm256_broadcastsi128_si256(_mm_setr_epi32(0, step, 2 * step, 3 * step)))};
}
inline Ints add_fours(const Ints (&a)[4]) {
    const __m256i low = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0].v, a[1].v), _mm256_unpackhi_epi32(a[0].v, a[1].v));
    const __m256i high = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2].v, a[3].v), _mm256_unpackhi_epi32(a[2].v, a[3].v));
    return {_mm256_add_epi32(_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high))};
}
inline void transpose_lanes(const Ints* a, Ints (&out)[2]) {
    out[0].v = _mm256_permute2x128_si256(a[0].v, a[1].v, 0x20),
    out[1].v = _mm256_permute2x128_si256(a[0].v, a[1].v, 0x31);
}

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
inline Ints shift_right(const Ints& a, int bits) {
    return map_ints([&](int i) { return a.v[i] >> bits; });
}
inline void interleave_bytes(const Ints (&a)[4], Ints (&out)[4]) {
    for (int k = 0; k < 4; ++k) {
        for (int i = 0; i < Ints::lanes; ++i) {
            const int byte = i % 4;  // of the k-th four bytes of a 128-bit lane
            out[k].v[i] = 0;
            for (int j = 0; j < 4; ++j) out[k].v[i] |= (a[j].v[i / 4 * 4 + k] >> 8 * byte & 255) << 8 * j;
        }
    }
}
inline void split_halves(uint8_t* p) {
    uint8_t from[64];
    std::memcpy(from, p, sizeof from);
    for (int i = 0; i < 64; ++i) p[i % 4 / 2 * 32 + i / 4 * 2 + i % 2] = from[i];
}
inline void split_bytes(uint8_t* p) {
    uint8_t from[64];
    std::memcpy(from, p, sizeof from);
    for (int i = 0; i < 64; ++i) p[i % 4 * 16 + i / 4] = from[i];
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
inline Ints add_ints(const Ints& a, const Ints& b) {
    return map_ints([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints load_unaligned(const uint8_t* p) { return load_bytes(p); }
// element i of the result: four bytes at place(block, element of its lane)
template <class Place>
inline Ints load_places(const uint8_t* p, Place place) {
    return map_ints([&](int i) {
        uint32_t bytes;
        std::memcpy(&bytes, p + place(i / 4, i % 4), sizeof bytes);
        return bytes;
    });
}
inline void load_halves_of_blocks(const uint8_t* p, Ints& first, Ints& second) {
    first = load_places(p, [](int block, int i) { return 32 * block + 4 * i; });
    second = load_places(p, [](int block, int i) { return 32 * block + 16 + 4 * i; });
}
inline void load_blocks_of_20(const uint8_t* p, Ints& low, Ints& upper) {
    low = load_places(p, [](int block, int i) { return 20 * block + 4 * i; });
    upper = load_places(p, [](int block, int) { return 20 * block + 16; });
}
inline void load_blocks_of_24(const uint8_t* p, Ints& low, Ints (&upper)[2]) {
    low = load_places(p, [](int block, int i) { return 24 * block + 4 * i; });
    for (int k = 0; k < 2; ++k) upper[k] = load_places(p, [k](int block, int) { return 24 * block + 16 + 4 * k; });
}
template <int step>
inline Ints shift_each(const Ints& a) {
    return map_ints([&](int i) { return a.v[i] >> i % 4 * step; });
}
inline Ints add_fours(const Ints (&a)[4]) {
    return map_ints([&](int i) {
        const uint32_t* four = a[i % 4].v + i / 4 * 4;
        return four[0] + four[1] + four[2] + four[3];
    });
}
inline void transpose_lanes(const Ints* a, Ints (&out)[2]) {
    for (int k = 0; k < 2; ++k) out[k] = map_ints([&](int i) { return a[i / 4].v[4 * k + i % 4]; });
}

#endif

}  // namespace skipkernels::SKIPKERNELS_ISA
