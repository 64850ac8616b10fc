// How attention multiplies, by the type of the cache: what is arranged for a matrix product of few rows, and a step of
// it. Arranged numbers have 32 bits each and are kept as floats.
#pragma once

#include "transpose.h"

namespace skipkernels::SKIPKERNELS_ISA {

// One element a number, in fp32.
template <class T>
struct Attend {
    static constexpr int together = 1;     // elements in a number: columns of a key, positions of a value
    static constexpr int key_numbers = 0;  // of Vec::width keys that few registers put side by side; 0: too many

    static Vec add(const Vec& number, const Vec& other, const Vec& sum) { return fma(number, other, sum); }

    // x (n) * factor -> out, zeros up to a whole vector
    static void pack_query(const float* x, int64_t n, float factor, float* out) {
        for (int64_t i = 0; i < n; i += Vec::width) store(out + i, load_up_to(x + i, n - i) * splat(factor));
    }
    // weights [begin, end), whole vectors, in place
    static void pack_weights(float*, int64_t, int64_t) {}
    // keys (Vec::width pointers, null for zeros) -> out[number * stride + key]
    static void arrange_keys(const T* const* keys, int64_t d, float* out, int64_t stride) {
        transpose(keys, d, out, stride);
    }
    // one number of each of Vec::width columns: of arranged values, or of some as they lie in the cache, so many
    // elements a step
    template <class U>
    static Vec value(const U* p, int64_t) {
        return load(p);
    }
    // `together` values (null for zeros) -> out, zeros up to a whole vector
    static void arrange_values(const T* const* values, int64_t d, float* out) {
        for (int64_t i = 0; i < d; i += Vec::width) store(out + i, load_up_to(*values + i, d - i));
    }

    template <class U>
    static Vec load_up_to(const U* p, int64_t left) {
        return load_some(p, static_cast<int>(left < Vec::width ? left : Vec::width));
    }
};

#if defined(SKIPKERNELS_ISA_AVX512_BF16)
// Element 0 of two vectors of bf16, element 1 of both, ...
struct PairOrder {
    alignas(64) uint16_t order[64];
    constexpr PairOrder() : order() {
        for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    }
};
inline constexpr PairOrder kPairs;

// Pairs of bf16, whose products the processor adds to an fp32 lane, at twice the rate of fp32. Queries and weights are
// rounded to bf16 as all activations of such a model (multiply.h): in every row, so that its bits do not depend on how
// it came.
template <>
struct Attend<bf16> {
    static constexpr int together = 2;
    static constexpr int key_numbers = kHalfSquare;

    static __m512bh pairs(const Vec& a) { return reinterpret_cast<__m512bh>(a.v); }
    static Vec add(const Vec& number, const Vec& other, const Vec& sum) {
        return {_mm512_dpbf16_ps(sum.v, pairs(number), pairs(other))};
    }

    static void store_rounded(bf16* out, const Vec& a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
    }
    static void pack_query(const float* x, int64_t n, float factor, float* out) {
        for (int64_t i = 0; i < n; i += Vec::width) {
            store_rounded(reinterpret_cast<bf16*>(out) + i, Attend<float>::load_up_to(x + i, n - i) * splat(factor));
        }
    }
    static void pack_weights(float* weights, int64_t begin, int64_t end) {
        auto* out = reinterpret_cast<bf16*>(weights);  // never ahead of what is still to be read
        for (int64_t i = begin; i < end; i += Vec::width) store_rounded(out + i, load(weights + i));
    }
    static void arrange_keys(const bf16* const* keys, int64_t d, float* out, int64_t stride) {
        transpose(reinterpret_cast<const float* const*>(keys), d / together, out, stride);
    }
    // numbers of Vec::width keys, from their element `at` on
    static void arrange_some_keys(const bf16* const* keys, int64_t at, Vec (&out)[key_numbers]) {
        transpose_half(reinterpret_cast<const float* const*>(keys), at / together, out);
    }
    static Vec value(const float* p, int64_t) { return load(p); }
    static Vec value(const bf16* p, int64_t elements) {
        auto row = [](const bf16* own) {
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(own)));
        };
        const __m512i order = _mm512_load_si512(kPairs.order);
        return {_mm512_castsi512_ps(_mm512_permutex2var_epi16(row(p), order, row(p + elements / together)))};
    }
    static void arrange_values(const bf16* const* values, int64_t d, float* out) {
        const __m512i low = _mm512_load_si512(kPairs.order), high = _mm512_load_si512(kPairs.order + 32);
        for (int64_t i = 0; i < d; i += 32) {
            const __mmask32 columns = d - i < 32 ? (uint32_t{1} << (d - i)) - 1 : ~uint32_t{0};
            auto row = [&](const bf16* p) {
                return p ? _mm512_maskz_loadu_epi16(columns, p + i) : _mm512_setzero_si512();
            };
            const __m512i first = row(values[0]), second = row(values[1]);
            store(out + i, {_mm512_castsi512_ps(_mm512_permutex2var_epi16(first, low, second))});
            if (i + Vec::width < d)
                store(out + i + Vec::width, {_mm512_castsi512_ps(_mm512_permutex2var_epi16(first, high, second))});
        }
    }
    // a pair of which one position counts: the other one's value may be anything
    static Vec only(const Vec& number, bool first) { return first ? lower(number) : high_bf16(number); }

  private:
    static Vec lower(const Vec& a) {
        return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0xffff)))};
    }
};
#endif

}  // namespace skipkernels::SKIPKERNELS_ISA
