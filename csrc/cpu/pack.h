// Activations as the matrix kernels read them: tiles of a few rows, and in a tile the rows interleaved by what one step
// multiplies: x[k / width][row][width], zero-padded behind k. The stream a kernel reads is then contiguous. Where
// weights fill a cache line, arrange_line may change the order of its columns.
#pragma once

#include <utility>

#include "blocks_linear.h"
#include "kernels.h"
#include "multiply.h"

namespace skipkernels::SKIPKERNELS_ISA {

using cpu::Scratch;

inline int64_t padded(int64_t k) { return (k + Vec::width - 1) / Vec::width * Vec::width; }

struct Tiles {
    int count, rows;  // tiles, rows in all
    explicit Tiles(int num_rows) : count((num_rows + cpu::kMaxTile - 1) / cpu::kMaxTile), rows(num_rows) {}
    int begin(int tile) const { return rows * tile / count; }
    int size(int tile) const { return begin(tile + 1) - begin(tile); }
};

// f(std::integral_constant<int, n>)
template <class F, int... N>
inline void with_tile_size(int n, std::integer_sequence<int, N...>, F f) {
    ((n == N + 1 ? f(std::integral_constant<int, N + 1>{}) : void()), ...);
}

template <class F>
inline void with_tile_size(int n, F f) {
    with_tile_size(n, std::make_integer_sequence<int, cpu::kMaxTile>{}, f);
}

inline int num_tiles(int num_rows) { return Tiles(num_rows).count; }

// Where a tile's activations start: any type of them fits where fp32 would.
template <class T>
inline typename Multiply<T>::Activation* packed_tile(const Scratch& s, int64_t k, int first_row) {
    return reinterpret_cast<typename Multiply<T>::Activation*>(s.x + first_row * padded(k));
}

// Packs source[row * k .. + k] of the rows of tiles [begin, end) for weights of type T, each element multiplied by
// scale(row) * norm[k].
template <class T, class Scale>
inline void pack_tiles(const float* source, int64_t k, const float* norm, Scale scale, int begin, int end, Scratch& s) {
    using M = Multiply<T>;
    const Tiles tiles(s.num_rows);
    for (int tile = begin; tile < end; ++tile) {
        const int n = tiles.size(tile);
        auto* packed = packed_tile<T>(s, k, tiles.begin(tile));
        for (int i = 0; i < n; ++i) {
            const float* row = source + s.rows[tiles.begin(tile) + i] * k;
            const Vec factor = splat(scale(row));
            for (int64_t j = 0; j < k; j += M::width) {
                const int left = static_cast<int>(k - j < M::width ? k - j : M::width);
                M::pack(row + j, factor, norm ? norm + j : nullptr, left, packed + j * n + i * M::width);
            }
            constexpr int kLine = 64 / static_cast<int>(sizeof(T));
            for (int64_t j = 0; j + kLine <= k; j += kLine)
                M::arrange_line(packed + j * n + i * M::width, n * M::width);
        }
    }
}

// 1 / sqrt(mean(x^2) + eps)
inline float rms_scale(const float* x, int64_t n, float eps) {
    Vec sum = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) sum = fma(load(x + i), load(x + i), sum);
    float total = reduce_add(sum);
    for (; i < n; ++i) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

// Packs tiles [begin, end) of source's rows, each times scale(row) * norm, as the format of w wants them.
template <class Scale>
inline void pack_for(const Matrix& w, const float* source, int64_t k, const float* norm, Scale scale, int begin,
                     int end, Scratch& s) {
    with_float_type(w.format, [&](auto type) { pack_tiles<decltype(type)>(source, k, norm, scale, begin, end, s); });
    const Tiles tiles(s.num_rows);
    if (!is_float(w.format)) quantise_rows(source, k, norm, scale, tiles.begin(begin), tiles.begin(end), s);
}

inline void pack_rows(const Matrix& w, const float* source, int64_t k, int begin, int end, Scratch& s) {
    pack_for(w, source, k, nullptr, [](const float*) { return 1.0f; }, begin, end, s);
}

// rms_norm of each row; without a norm, the rows as they are
inline void pack_rms_norm(const Matrix& w, const float* source, int64_t k, const float* norm, float eps, int begin,
                          int end, Scratch& s) {
    if (!norm) return pack_rows(w, source, k, begin, end, s);
    pack_for(w, source, k, norm, [=](const float* row) { return rms_scale(row, k, eps); }, begin, end, s);
}

}  // namespace skipkernels::SKIPKERNELS_ISA
