// Rows of a matrix that are listed times the packed activations of all active rows.
//
// Each (listed row, row) pair has one vector accumulator that walks k in order, as in linear.h: what it gets does not
// depend on the list it stands in, and its bits are those of linear_panel.
#pragma once

#include "linear.h"
#include "neuron_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

// out (N, kPanelRows) = w[R] (k) * x; what is `ahead` and the beginning of the rows `next` are fetched meanwhile
template <class T, int R, int N>
inline void listed_rows(const T* const* w, const T* const* next, RowsAhead<T>& ahead, int64_t k,
                        const typename Multiply<T>::Activation* x, float* out) {
    using M = Multiply<T>;
    constexpr int W = M::width, kLine = 64 / static_cast<int>(sizeof(T));
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    auto step = [&](int64_t from, int u, auto load_weight) {
        decltype(load_weight(w[0])) weight[R];
        for (int r = 0; r < R; ++r) weight[r] = load_weight(w[r] + from);
        for (int n = 0; n < N; ++n) {
            const auto activation = M::activation(x + (from + u * W) * N + n * W);
            for (int r = 0; r < R; ++r) acc[r][n] = M::add(weight[r], activation, acc[r][n]);
        }
    };
    int64_t j = 0;
    for (; j + kLine <= k; j += kLine) {
        ahead.fetch(R);
        if (N <= 2) {
            for (int r = 0; r < R; ++r) prefetch_beside(w[r], next[r], j, k);
        }
        for (int u = 0; u < kLine / W; ++u) step(j, u, [u](const T* line) { return M::weight_of_line(line, u); });
    }
    for (; j + W <= k; j += W) step(j, 0, [](const T* p) { return M::weight(p); });
    if (j < k) {
        const int left = static_cast<int>(k - j);
        step(j, 0, [left](const T* p) { return M::weight_first(p, left); });
    }
    reduce_tile<R, N>(acc, out);
}

// out (active rows, kPanelRows) of `count` neurons from list[0] on; the list goes on to `end`
template <class T>
inline void listed_panel(const T* matrix, const int32_t* list, int count, const int32_t* end, int64_t k, Scratch& s) {
    constexpr int R = 4, kDistance = 2 * R;  // rows, of which L2 holds many
    const Tiles tiles(s.num_rows);
    for (int at = 0; at < count; at += R) {
        const T *w[R], *next[R], *coming[R];
        const int height = count - at < R ? count - at : R;
        int fetched = 0;
        for (int r = 0; r < R; ++r) {
            auto row = [&](const int32_t* neuron) { return matrix + *(neuron < end ? neuron : end - 1) * k; };
            const int32_t* own = list + at + r;
            w[r] = row(own);
            next[r] = row(own + R);
            if (own + kDistance < end) coming[fetched++] = matrix + own[kDistance] * k;
        }
        RowsAhead<T> ahead(coming, fetched, 0, k);
        for (int tile = 0; tile < tiles.count; ++tile) {
            const int begin = tiles.begin(tile);
            const auto* x = packed_tile<T>(s, k, begin);
            float* out = s.panel + begin * cpu::kPanelRows + at;
            with_tile_size(tiles.size(tile), [&](auto size) {
                if (height == R) {
                    listed_rows<T, R, size>(w, next, ahead, k, x, out);
                } else {
                    for (int r = 0; r < height; ++r) listed_rows<T, 1, size>(w + r, next + r, ahead, k, x, out + r);
                }
            });
        }
    }
}

// The same, of at most kPanelRows listed rows of w: into s.panel.
template <class T>
inline void product_of_listed(const T* w, const int32_t* list, int count, const int32_t* list_end, int64_t k,
                              Scratch& s) {
    if (list[count - 1] - list[0] == count - 1) {  // neighbours, as where prompts keep all
        const auto* rows = w + list[0] * k;
        linear_panel(rows, k, count, rows + count * k, s.panel, s);
    } else {
        listed_panel(w, list, count, list_end, k, s);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
