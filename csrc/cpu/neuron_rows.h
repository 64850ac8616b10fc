// How rows of a transposed matrix add to an output: y (columns) += m * row (columns), some neurons at a time.
//
// A unit is what one step adds: one neuron, or, where the processor multiplies pairs of bf16, the neurons 2i and 2i
// + 1. Of a pair with one neuron left out, the other's row is read in its place, times the 0 that stands for it. So
// what a unit adds to a row of activations does not depend on which of the two a neighbour keeps.
#pragma once

#include "linear.h"
#include "rows_ahead.h"

namespace skipkernels::SKIPKERNELS_ISA {

// Rows of weights become fp32 in registers.
template <class T>
struct Unit {
    static constexpr int neurons = 1, vecs = 1, columns = Vec::width;  // of a step

    const T* rows[1];
    int32_t neuron;

    static Vec factor(const float* x) { return splat(*x); }
    struct Step {
        Vec v[1];
    };
    Step load(int64_t column) const { return {{skipkernels::SKIPKERNELS_ISA::load(rows[0] + column)}}; }
    Step load_first(int64_t column, int n) const {
        return {{skipkernels::SKIPKERNELS_ISA::load_first(rows[0] + column, n)}};
    }
    static Vec add(Vec factor, Vec weight, Vec y) { return fma(factor, weight, y); }
    static int place(int column) { return column; }  // where a step's column stands in y
};

#if defined(SKIPKERNELS_ISA_AVX512_BF16)
template <>
struct Unit<bf16> {
    static constexpr int neurons = 2, vecs = 2, columns = 2 * Vec::width;

    const bf16* rows[2];
    int32_t neuron;  // the even one

    static __m512bh factor(const bf16* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
    }
    struct Step {
        __m512bh v[2];
    };
    static Step pairs(__m512i even, __m512i odd) {
        return {{reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(even, odd)),
                 reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(even, odd))}};
    }
    Step load(int64_t column) const {
        return pairs(_mm512_loadu_si512(rows[0] + column), _mm512_loadu_si512(rows[1] + column));
    }
    Step load_first(int64_t column, int n) const {
        const __mmask32 mask = n == 32 ? ~__mmask32{0} : (uint32_t{1} << n) - 1;
        return pairs(_mm512_maskz_loadu_epi16(mask, rows[0] + column),
                     _mm512_maskz_loadu_epi16(mask, rows[1] + column));
    }
    static Vec add(__m512bh factor, __m512bh weight, Vec y) { return {_mm512_dpbf16_ps(y.v, weight, factor)}; }
    // unpacking leaves columns 8 i + 0..3 in the first vector and 8 i + 4..7 in the second
    static int place(int column) { return (column & 4) * 4 + column / 8 * 4 + (column & 3); }
};
#endif

// Fetches rows that are read side by side into L1, a fixed way ahead: where a row ends, the first
// pieces of the row that takes its place. What lies behind a row in memory is another neuron's, often one left out.
template <class T>
inline void prefetch_beside(const T* row, const T* next, int64_t at, int64_t end) {
    constexpr int64_t kAhead = 512 / static_cast<int64_t>(sizeof(T));
    prefetch_l1(reinterpret_cast<const char*>(at + kAhead < end ? row + at + kAhead : next + (at + kAhead - end)));
}

// The first of a list that is not below `begin`.
inline const int32_t* first_listed(const int32_t* list, const int32_t* list_end, int64_t begin) {
    int64_t low = 0, high = list_end - list;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (list[middle] < begin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return list + low;
}

// The units of neurons [begin, end) that are listed, or of all, where there is no list; returns how many.
template <class T>
inline int64_t collect_units(const T* w, int64_t columns, const int32_t* list, const int32_t* list_end, int64_t begin,
                             int64_t end, Unit<T>* units) {
    int64_t count = 0;
    auto add = [&](int64_t first, int64_t second) {
        Unit<T>& unit = units[count++];
        unit.rows[0] = w + first * columns;
        if constexpr (Unit<T>::neurons == 2) unit.rows[1] = w + second * columns;
        unit.neuron = static_cast<int32_t>(first / Unit<T>::neurons * Unit<T>::neurons);
    };
    if (!list) {
        for (int64_t j = begin; j < end; j += Unit<T>::neurons) add(j, j + 1 < end ? j + 1 : j);
        return count;
    }
    for (const int32_t* at = first_listed(list, list_end, begin); at < list_end && *at < end; ++at) {
        const bool pair = Unit<T>::neurons == 2 && *at % 2 == 0 && at + 1 < list_end && at[1] == *at + 1;
        add(*at, pair ? at[1] : *at);
        at += pair;
    }
    return count;
}

}  // namespace skipkernels::SKIPKERNELS_ISA
