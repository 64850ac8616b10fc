// Activations as the matrix kernels read them: tiles of a few rows, and in a tile the rows interleaved by vector:
// x[k / width][row][width], zero-padded behind k. The stream a kernel reads is then contiguous.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace skipkernels::SKIPKERNELS_ISA {

using cpu::Scratch;

inline int64_t padded(int64_t k) { return (k + Vec::width - 1) / Vec::width * Vec::width; }

struct Tiles {
    int count, rows;  // tiles, rows in all
    explicit Tiles(int num_rows) : count((num_rows + cpu::kMaxTile - 1) / cpu::kMaxTile), rows(num_rows) {}
    int begin(int tile) const { return rows * tile / count; }
    int size(int tile) const { return begin(tile + 1) - begin(tile); }
};

inline int num_tiles(int num_rows) { return Tiles(num_rows).count; }

// Packs source[row * k .. + k] of the rows of tiles [begin, end), each element multiplied by scale(row) * weight[k].
template <class Scale>
inline void pack_scaled(const float* source, int64_t k, const float* weight, Scale scale, int begin, int end,
                        Scratch& s) {
    constexpr int W = Vec::width;
    const Tiles tiles(s.num_rows);
    for (int tile = begin; tile < end; ++tile) {
        const int n = tiles.size(tile);
        float* packed = s.x + tiles.begin(tile) * padded(k);
        for (int i = 0; i < n; ++i) {
            const float* row = source + s.rows[tiles.begin(tile) + i] * k;
            const Vec factor = splat(scale(row));
            for (int64_t j = 0; j < k; j += W) {
                const int left = static_cast<int>(k - j < W ? k - j : W);
                Vec value = (left == W ? load(row + j) : load_first(row + j, left)) * factor;
                if (weight) value = value * (left == W ? load(weight + j) : load_first(weight + j, left));
                store(packed + j * n + i * W, value);
            }
        }
    }
}

inline void pack_rows(const float* source, int64_t k, int begin, int end, Scratch& s) {
    pack_scaled(source, k, nullptr, [](const float*) { return 1.0f; }, begin, end, s);
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

inline void pack_rms_norm(const float* source, int64_t k, const float* weight, float eps, int begin, int end,
                          Scratch& s) {
    pack_scaled(source, k, weight, [=](const float* row) { return rms_scale(row, k, eps); }, begin, end, s);
}

}  // namespace skipkernels::SKIPKERNELS_ISA
