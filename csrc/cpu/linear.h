// The matrix kernel under every projection: a panel of weight rows times the packed activations of all active rows.
//
// With few rows a step is bound by the one read of the weights, so two things matter. The memory must see one linear
// stream: rows are computed several at a time for the sake of registers, and software prefetches walk the panel in
// address order into L2, one group of rows ahead; four interleaved rows without them ran at 60 % of
// the bandwidth of one. And activations must come from L1: k is blocked, accumulators rest in memory
// between blocks.
//
// With many rows it is bound by multiplications. Up to four tiles of rows take turns in each block of k. Its weights
// then come from L2 for all tiles but the first, and the tiles' activations of that block fit into L2 too. When each
// tile went through all of k by itself, TinyLlama's down_proj with 16 rows, whose activations take 360 KB, took 1.04 to
// 1.12 times as long (two runs, Zen 3, 512 KB of L2). Meanwhile each of these tiles fetches an equal share of the
// weights that come next, and its own activations: the last tile alone kept the memory idle before it, and a burst is
// partly dropped. Converting weights in registers, again for each tile, costs little beside the multiplications: an
// fp32 copy of the panel, made once, was slower, for twice the bytes came from L2.
//
// Each (weight row, row) pair has one vector accumulator that walks k in order, whatever the tile it is in: that is why
// a row gets bitwise what it gets alone.
#pragma once

#include "blocks_panels.h"
#include "pack.h"

namespace skipkernels::SKIPKERNELS_ISA {

inline void prefetch_l1(const char* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const char* p) { __builtin_prefetch(p, 0, 2); }

// What is fetched into L2 while a tile is computed: `pieces` pieces of `bytes` bytes, `stride` apart, and then the
// range from `then` to `then_end`. Each call of fetch(), one for each cache line by which a register tile moves on,
// fetches `Lines` lines.
template <int Lines>
struct Ahead {
    const char* at;
    int64_t bytes, stride = 0;
    int pieces = 1;
    const char *then = nullptr, *then_end = nullptr;
    const char* end = pieces ? at + bytes : at;

    void fetch() {
        if (at >= end) {
            if (pieces > 1) {
                --pieces;
                at = end - bytes + stride, end = at + bytes;
            } else {
                if (then >= then_end) return;
                at = then, end = then_end, then = then_end;
            }
        }
        for (int line = 0; line < Lines; ++line) prefetch_l2(at + 64 * line);
        at += 64 * Lines;
    }
};

// out (N, kPanelRows) = the sums over the lanes of acc, four at a time
template <int R, int N>
inline void reduce_tile(const Vec (&acc)[R][N], float* out) {
    auto of = [&](int i) { return acc[i / N][i % N]; };
    auto to = [&](int i) -> float& { return out[i % N * cpu::kPanelRows + i / N]; };
    constexpr int kWhole = R * N / 4 * 4;
    for (int i = 0; i < kWhole; i += 4) {
        const Vec four[4] = {of(i), of(i + 1), of(i + 2), of(i + 3)};
        alignas(16) float sums[4];
        reduce_add_four(four, sums);
        for (int j = 0; j < 4; ++j) to(i + j) = sums[j];
    }
    for (int i = kWhole; i < R * N; ++i) to(i) = reduce_add(of(i));
}

// A function by itself: inlined into its callers, gcc 12 keeps sums in memory, and 8 rows take a tenth longer (Zen 3).
// acc[R][N] += w[R][k_begin..k_end) * x; at the end of k the sums go to out (N, kPanelRows)
template <class T, int R, int N, int Lines>
[[gnu::noinline]] void tile_block(const T* w, int64_t k, int64_t k_begin, int64_t k_end,
                                  const typename Multiply<T>::Activation* x, float* accumulators, float* out,
                                  Ahead<Lines>& ahead) {
    using M = Multiply<T>;
    constexpr int W = M::width;
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));  // elements in a cache line
    constexpr int U = kLine / W;                             // steps in a cache line
    auto at = [&](int r, int n) { return accumulators + (r * N + n) * Vec::width; };
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = k_begin == 0 ? splat(0.0f) : load(at(r, n));

    int64_t j = k_begin;
    auto step = [&](int64_t from, int u, auto load_weight) {
        decltype(load_weight(w)) weight[R];
        for (int r = 0; r < R; ++r) weight[r] = load_weight(w + r * k + from);
        for (int n = 0; n < N; ++n) {
            const auto activation = M::activation(x + (from + u * W) * N + n * W);
            for (int r = 0; r < R; ++r) acc[r][n] = M::add(weight[r], activation, acc[r][n]);
        }
    };
    for (; j + kLine <= k_end; j += kLine) {
        ahead.fetch();
        if (N <= 2) {  // too little arithmetic to hide the latency of L2, so L1 as well
            for (int r = 0; r < R; ++r) prefetch_l1(reinterpret_cast<const char*>(w + r * k + j) + 512);
        }
        for (int u = 0; u < U; ++u) step(j, u, [u](const T* line) { return M::weight_of_line(line, u); });
    }
    for (; j + W <= k_end; j += W) step(j, 0, [](const T* p) { return M::weight(p); });
    if (j < k_end) {
        const int left = static_cast<int>(k_end - j);
        step(j, 0, [left](const T* p) { return M::weight_first(p, left); });
    }
    if (k_end < k) {
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) store(at(r, n), acc[r][n]);
    } else {
        reduce_tile<R, N>(acc, out);
    }
}

constexpr int kGroupRows = 12;  // a group is prefetched while the one before it is computed: both fit 1 MB to k = 20k

// The register tile's height for N batch rows: a divisor of kGroupRows whose accumulators stay in registers.
template <int N>
constexpr int tile_height() {
    if (N == 1) return 4;
    for (int height : {6, 3, 2})  // not 4: four rows of 4 KB fall on the same cache sets, 1.6 times the cycles at N = 6
        if (height * N <= Vec::max_accumulators) return height;
    return 1;
}

// Columns of k in a block: 16 KB of a tile's activations, half of L1.
template <class T>
constexpr int64_t block_columns(int n) {
    return 16384 / static_cast<int64_t>(sizeof(typename Multiply<T>::Activation)) / n / 64 * 64;
}

// Columns [begin, end) of k of `count` rows.
template <class T, int N, int Lines>
inline void rows_block(const T* w, int64_t k, int64_t begin, int64_t end, int count,
                       const typename Multiply<T>::Activation* x, float* accumulators, float* out,
                       Ahead<Lines>& ahead) {
    constexpr int W = Vec::width, R = tile_height<N>();
    static_assert(kGroupRows % R == 0 && cpu::kPanelRows % kGroupRows == 0);
    int row = 0;
    for (; row + R <= count; row += R) {
        tile_block<T, R, N>(w + row * k, k, begin, end, x, accumulators + row * N * W, out + row, ahead);
    }
    for (; row < count; ++row) {
        tile_block<T, 1, N>(w + row * k, k, begin, end, x, accumulators + row * N * W, out + row, ahead);
    }
}

// A tile that is alone walks the panel by groups and fetches the next group.
template <class T, int N>
void lone_tile(const T* w, int64_t k, int rows, const T* next, float* out, const Scratch& s) {
    constexpr int64_t kBlock = block_columns<T>(N);
    const auto* x = packed_tile<T>(s, k, 0);
    for (int top = 0; top < rows; top += kGroupRows) {
        const int height = top + kGroupRows < rows ? kGroupRows : rows - top;
        const T* after = top + height < rows ? w + (top + height) * k : next;
        const auto bytes = static_cast<int64_t>(kGroupRows * k * sizeof(T));
        Ahead<tile_height<N>()> ahead{reinterpret_cast<const char*>(after), bytes};
        for (int64_t begin = 0; begin < k; begin += kBlock) {
            const int64_t end = begin + kBlock < k ? begin + kBlock : k;
            rows_block<T, N>(w + top * k, k, begin, end, height, x, s.accumulators, out + top, ahead);
        }
    }
}

// Tiles [first, last) take turns in every block of k.
template <class T>
inline void tiles_together(const T* w, int64_t k, int rows, const T* next, float* out, const Scratch& s,
                           const Tiles& tiles, int first, int last) {
    constexpr int64_t kBlock = block_columns<T>(cpu::kMaxTile);
    constexpr int kTileAccumulators = cpu::kPanelRows * cpu::kMaxTile * Vec::width;
    auto bytes = [](const void* p) { return static_cast<const char*>(p); };
    const int together = last - first;
    auto share = [&](int tile) { return (tile - first) * rows / together; };
    for (int64_t begin = 0; begin < k; begin += kBlock) {
        const int64_t end = begin + kBlock < k ? begin + kBlock : k;
        // what comes next: the same tiles in the next block of k, or other ones in the first
        const bool ends = end == k;
        const int64_t coming = ends ? 0 : end, coming_end = coming + kBlock < k ? coming + kBlock : k;
        const int shift = ends ? (last < tiles.count ? last : 0) - first : 0;
        for (int tile = first; tile < last; ++tile) {
            const int coming_tile = tile + shift < tiles.count ? tile + shift : tiles.count - 1;
            const int coming_rows = tiles.size(coming_tile);
            const auto* coming_x = packed_tile<T>(s, k, tiles.begin(coming_tile));
            with_tile_size(tiles.size(tile), [&](auto size) {
                // enough for the weights that two tiles or more share; then come activations, as far as time allows
                constexpr int kLines = 1 + (tile_height<size>() + cpu::kTilesTogether - 1) / cpu::kTilesTogether;
                Ahead<kLines> ahead{bytes((ends ? next : w) + share(tile) * k + coming),
                                    static_cast<int64_t>((coming_end - coming) * sizeof(T)),
                                    static_cast<int64_t>(k * sizeof(T)),
                                    share(tile + 1) - share(tile),
                                    bytes(coming_x + coming_rows * coming),
                                    bytes(coming_x + coming_rows * coming_end)};
                rows_block<T, size>(w, k, begin, end, rows, packed_tile<T>(s, k, tiles.begin(tile)),
                                    s.accumulators + (tile - first) * kTileAccumulators,
                                    out + tiles.begin(tile) * cpu::kPanelRows, ahead);
            });
        }
    }
}

// w (rows, k) @ x (active rows, k) -> out (active rows, kPanelRows), 1 <= rows <= kPanelRows.
// `next` is where the weights needed after this panel begin; it is only prefetched, never read.
template <class T>
inline void linear_panel(const T* w, int64_t k, int rows, const T* next, float* out, const Scratch& s) {
    const Tiles tiles(s.num_rows);
    if (tiles.count == 1) {
        with_tile_size(s.num_rows, [&](auto size) { lone_tile<T, size>(w, k, rows, next, out, s); });
        return;
    }
    const int groups = (tiles.count + cpu::kTilesTogether - 1) / cpu::kTilesTogether;
    for (int group = 0; group < groups; ++group) {
        const int first = tiles.count * group / groups, last = tiles.count * (group + 1) / groups;
        tiles_together(w, k, rows, last < tiles.count ? w : next, out, s, tiles, first, last);
    }
}

inline int64_t num_panels(int64_t rows) { return (rows + cpu::kPanelRows - 1) / cpu::kPanelRows; }

inline int panels_of_task(const Matrix& w) { return is_float(w.format) ? 1 : cpu::kBlockPanels; }

// Tasks of an op that computes so many rows of w.
inline int64_t num_matrix_tasks(const Matrix& w, int64_t rows) {
    const int panels = panels_of_task(w);
    return (num_panels(rows) + panels - 1) / panels;
}

// Runs panels [begin, end) of w (rows, k) and hands each to epilogue(first weight row, rows of the panel).
template <class T, class Epilogue>
inline void for_panels(const T* w, int64_t rows, int64_t k, int64_t begin, int64_t end, Scratch& s, Epilogue epilogue) {
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t row = panel * cpu::kPanelRows;
        const int height = static_cast<int>(rows - row < cpu::kPanelRows ? rows - row : cpu::kPanelRows);
        linear_panel(w + row * k, k, height, w + (row + height) * k, s.panel, s);
        epilogue(row, height);
    }
}

// epilogue(first row, rows) for each of the panels that blocks_to_panels has filled; where it runs, s.panel and
// s.second_panel are the panel's.
template <class Epilogue>
inline void each_panel(int64_t first, int64_t count, Scratch& s, Epilogue epilogue) {
    float *const panel = s.panel, *const second_panel = s.second_panel;
    for (int64_t at = 0; at < count; at += cpu::kPanelRows) {
        s.panel = panel + at * s.num_rows, s.second_panel = second_panel + at * s.num_rows;
        epilogue(first + at, static_cast<int>(count - at < cpu::kPanelRows ? count - at : cpu::kPanelRows));
    }
    s.panel = panel, s.second_panel = second_panel;
}

// Runs tasks [begin, end) of the `rows` x k matrix w, in whatever format, and hands each panel to epilogue.
template <class Epilogue>
inline void for_tasks(const Matrix& w, int64_t rows, int64_t k, int64_t begin, int64_t end, Scratch& s,
                      Epilogue epilogue) {
    with_float_type(w.format, [&](auto type) {
        for_panels(static_cast<const decltype(type)*>(w.data), rows, k, begin, end, s, epilogue);
    });
    if (is_float(w.format)) return;
    constexpr int64_t kTaskRows = cpu::kBlockPanels * cpu::kPanelRows;
    for (int64_t first = begin * kTaskRows; first < end * kTaskRows && first < rows; first += kTaskRows) {
        const int64_t count = rows - first < kTaskRows ? rows - first : kTaskRows;
        blocks_to_panels(w, k, first, count, s.panel, s);
        each_panel(first, count, s, epilogue);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
