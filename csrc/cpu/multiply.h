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

}  // namespace skipkernels::SKIPKERNELS_ISA
