// How a weight meets an activation, by the weights' type: what one step of the matrix kernels loads and multiplies.
#pragma once

#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

// Weights become fp32 in registers; activations are fp32.
template <class T>
struct Multiply {
    using Activation = float;
    static constexpr int width = Vec::width;  // elements of k in a step

    static Vec weight(const T* p) { return load(p); }
    // What a step takes of a whole cache line of weights. A type may choose the order of the line's columns;
    // arrange_line then puts the activations of a row, each step's `stride` behind those before, in the same order.
    static Vec weight_of_line(const T* line, int step) { return load(line + step * width); }
    static void arrange_line(float* /*x*/, int64_t /*stride*/) {}
    static Vec weight_first(const T* p, int n) { return load_first(p, n); }
    static Vec activation(const float* p) { return load(p); }
    static Vec add(const Vec& weight, const Vec& activation, const Vec& sum) { return fma(weight, activation, sum); }

    // `width` activations of a row, each times factor and, where given, norm[i]; zeros behind the n-th
    static void pack(const float* row, const Vec& factor, const float* norm, int n, float* out) {
        Vec value = load_some(row, n) * factor;
        if (norm) value = value * load_some(norm, n);
        store(out, value);
    }
};

#if defined(SKIPKERNELS_ISA_AVX512_BF16)
// The processor multiplies pairs of bf16 and adds both products to an fp32 lane: activations are rounded to bf16, as
// transformers and llama.cpp do with such a model. That holds for every row, so that a token's bits do not depend on
// whether it came as a prompt row or as a decode row.
template <>
struct Multiply<bf16> {
    using Activation = bf16;
    static constexpr int width = 2 * Vec::width;

    static __m512bh weight(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static __m512bh weight_of_line(const bf16* line, int step) { return weight(line + step * width); }
    static void arrange_line(bf16* /*x*/, int64_t /*stride*/) {}
    static __m512bh weight_first(const bf16* p, int n) {
        const __mmask32 mask = (uint32_t{1} << n) - 1;
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
    }
    static __m512bh activation(const bf16* p) { return weight(p); }
    static Vec add(__m512bh weight, __m512bh activation, const Vec& sum) {
        return {_mm512_dpbf16_ps(sum.v, weight, activation)};
    }

    static void pack(const float* row, const Vec& factor, const float* norm, int n, bf16* out) {
        alignas(64) float values[width] = {};
        for (int i = 0; i < n; i += Vec::width) {
            const int left = n - i < Vec::width ? n - i : Vec::width;
            Multiply<float>::pack(row + i, factor, norm ? norm + i : nullptr, left, values + i);
        }
        const __m512bh pairs = _mm512_cvtne2ps_pbh(load(values + Vec::width).v, load(values).v);
        _mm512_storeu_si512(out, reinterpret_cast<__m512i>(pairs));
    }
};
#endif

#if defined(SKIPKERNELS_ISA_AVX2)
// The even ones of 16 bf16 become fp32 by a shift, the odd ones by a mask. Widening them in order would take a shuffle
// and a shift each, on ports that the multiplications use too.
template <>
struct Multiply<bf16> : Multiply<float> {
    static Vec weight(const bf16* p) { return load(p); }
    static Vec weight_first(const bf16* p, int n) { return load_first(p, n); }
    static Vec weight_of_line(const bf16* line, int step) {
        const Vec pairs{_mm256_loadu_ps(reinterpret_cast<const float*>(line + step / 2 * 16))};
        return step % 2 ? high_bf16(pairs) : low_bf16(pairs);
    }
    static void arrange_line(float* x, int64_t stride) {
        for (float* p = x; p < x + 4 * stride; p += 2 * stride) {
            const __m256 first = load(p).v, second = load(p + stride).v;
            store(p, in_order(_mm256_shuffle_ps(first, second, 0x88)));
            store(p + stride, in_order(_mm256_shuffle_ps(first, second, 0xdd)));
        }
    }

  private:
    static Vec in_order(__m256 quarters) {  // 0 2 1 3 -> 0 1 2 3
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(quarters), 0xd8))};
    }
};
#endif

}  // namespace skipkernels::SKIPKERNELS_ISA
