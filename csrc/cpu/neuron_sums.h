// Sums over the neurons of a transposed matrix, in an order that holds for any number of rows: chunks of neurons, added
// in their order; within a chunk neurons one after the other, or pair after pair (neuron_rows.h).
#pragma once

#include "neuron_rows.h"
#include "residual.h"

namespace skipkernels::SKIPKERNELS_ISA {

// One neuron a row: w (size, columns), of which the listed are read; without a list all.
template <class T>
struct Neurons {
    const T* w;
    int64_t size, columns, chunk;
    const int32_t *list, *list_end;

    int64_t chunks() const { return (size + chunk - 1) / chunk; }
    int64_t end_of(int64_t number) const { return number * chunk + chunk < size ? number * chunk + chunk : size; }
    int64_t collect(int64_t begin, int64_t end, Unit<T>* units) const {
        return collect_units(w, columns, list, list_end, begin, end, units);
    }
};

// A row's activations, as the weights' type multiplies them, row after row; zeros behind them
template <class T>
inline typename Multiply<T>::Activation* packed_row(const Scratch& s, int64_t size, int row) {
    return reinterpret_cast<typename Multiply<T>::Activation*>(s.x + row * padded(size));
}

// `size` activations into a packed row.
template <class T>
inline void pack_row(const float* from, int64_t size, typename Multiply<T>::Activation* to) {
    using M = Multiply<T>;
    for (int64_t j = 0; j < size; j += M::width) {
        const int n = static_cast<int>(size - j < M::width ? size - j : M::width);
        M::pack(from + j, splat(1.0f), nullptr, n, to + j);
    }
}

// y (N rows of `stride`) += P units over columns [begin, end), whose y are in steps; what is `ahead` and the beginning
// of the units after them, of which there are `known` with them, are fetched meanwhile
template <class T, int P, int N>
inline void add_units(const Unit<T>* units, int64_t known, RowsAhead<T> ahead,
                      const typename Multiply<T>::Activation* x, int64_t x_stride, int64_t begin, int64_t end, float* y,
                      int64_t stride) {
    using U = Unit<T>;
    decltype(U::factor(x)) factors[P][N];
    for (int p = 0; p < P; ++p)
        for (int n = 0; n < N; ++n) factors[p][n] = U::factor(x + n * x_stride + units[p].neuron);
    auto step = [&](int64_t column, auto load_weights) {
        Vec sums[N][U::vecs];
        for (int n = 0; n < N; ++n)
            for (int v = 0; v < U::vecs; ++v) sums[n][v] = load(y + n * stride + column + v * Vec::width);
        for (int p = 0; p < P; ++p) {
            const auto weights = load_weights(units[p]);
            for (int n = 0; n < N; ++n)
                for (int v = 0; v < U::vecs; ++v) sums[n][v] = U::add(factors[p][n], weights.v[v], sums[n][v]);
        }
        for (int n = 0; n < N; ++n)
            for (int v = 0; v < U::vecs; ++v) store(y + n * stride + column + v * Vec::width, sums[n][v]);
    };
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    int64_t column = begin;
    for (; column + U::columns <= end; column += U::columns) {
        if (column % kLine == 0) {
            ahead.fetch(P * U::neurons);
            if (N <= 2) {
                for (int p = 0; p < P; ++p) {
                    const U &own = units[p], &next = units[p + P < known ? p + P : p];
                    for (int i = 0; i < U::neurons; ++i)
                        prefetch_beside(own.rows[i], next.rows[i] + begin, column, end);
                }
            }
        }
        step(column, [=](const U& unit) { return unit.load(column); });
    }
    if (column < end) {
        const int n = static_cast<int>(end - column);
        step(column, [=](const U& unit) { return unit.load_first(column, n); });
    }
}

// y (N rows) += `count` units; of those that follow, up to `known`, the first are fetched
template <class T, int N>
inline void add_all(const Unit<T>* units, int64_t count, int64_t known, const typename Multiply<T>::Activation* x,
                    int64_t x_stride, int64_t columns, float* y, int64_t stride) {
    constexpr int P = 8 / Unit<T>::neurons;           // 8 rows of weights for one load and store of y
    constexpr int64_t kBlock = N <= 2 ? 2048 : 1024;  // columns, so that y stays in L1
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
        int64_t at = 0;
        for (; at + P <= count; at += P) {
            const T* coming[P * Unit<T>::neurons];
            int rows = 0;
            for (int64_t next = at + P; next < at + 2 * P && next < known; ++next) {
                for (const T* row : units[next].rows) {
                    if (rows == 0 || coming[rows - 1] != row) coming[rows++] = row;
                }
            }
            add_units<T, P, N>(units + at, known - at, {coming, rows, begin, end}, x, x_stride, begin, end, y, stride);
        }
        for (; at < count; ++at)
            add_units<T, 1, N>(units + at, known - at, {nullptr, 0, begin, end}, x, x_stride, begin, end, y, stride);
    }
}

// sums (rows, stride) = those of a chunk, of rows from the packed row `first` on; units (chunk, kNeuronsAhead)
template <class T>
inline void sum_chunk(const Neurons<T>& neurons, int64_t chunk, int first, int num_rows, Unit<T>* units, float* sums,
                      int64_t stride, const Scratch& s) {
    const int64_t begin = chunk * neurons.chunk, end = neurons.end_of(chunk);
    const int64_t after = end + cpu::kNeuronsAhead < neurons.size ? end + cpu::kNeuronsAhead : neurons.size;
    const int64_t count = neurons.collect(begin, end, units);
    const int64_t known = count + neurons.collect(end, after, units + count);
    const int64_t x_stride = packed_row<T>(s, neurons.size, 1) - packed_row<T>(s, neurons.size, 0);
    std::memset(sums, 0, sizeof(float) * num_rows * stride);
    const Tiles tiles(num_rows);
    for (int tile = 0; tile < tiles.count; ++tile) {
        const int top = tiles.begin(tile);
        with_tile_size(tiles.size(tile), [&](auto size) {
            add_all<T, size>(units, count, known, packed_row<T>(s, neurons.size, first + top), x_stride,
                             neurons.columns, sums + top * stride, stride);
        });
    }
}

// sums (at most kNeuronPanel) = those of the chunks, `stride` apart, in their order
inline void sum_of_chunks(const float* from, int64_t chunks, int64_t stride, int64_t columns, float* sums) {
    for (int at = 0; at < cpu::kNeuronPanel && at < columns; at += Vec::width) {
        Vec sum = splat(0.0f);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load(from + at + chunk * stride);
        store(sums + at, sum);
    }
}

inline int64_t padded_hidden(int64_t hidden_size) {
    return (hidden_size + cpu::kHiddenStep - 1) / cpu::kHiddenStep * cpu::kHiddenStep;
}

// branch (height) from channel `first` on to the residual stream of a row
template <class Op>
inline void add_branch(const Op& op, const float* branch, int64_t first, int height, int row) {
    for (int i = 0; i < height; i += cpu::kPanelRows) {
        const int rest = height - i < cpu::kPanelRows ? height - i : cpu::kPanelRows;
        add_panel(op.hidden_states + row * op.hidden_size, branch + i, first + i, rest, row, op.similarity_partials,
                  op.num_sequences);
    }
}

// Whether `done` tasks are the last of an instruction: the counter is as at its beginning then.
inline bool are_last(int64_t done, int64_t tasks, const Scratch& s) {
    std::atomic<int32_t>& arrived = *s.attention.arrivals;
    const auto count = static_cast<int32_t>(done);
    if (arrived.fetch_add(count, std::memory_order_acq_rel) + count != tasks) return false;
    arrived.store(0, std::memory_order_relaxed);
    return true;
}

// out (height) = y, whose columns are in steps
template <class T>
inline void in_order(const float* y, int height, float* out) {
    using U = Unit<T>;
    for (int i = 0; i < height; ++i) out[i] = y[i / U::columns * U::columns + U::place(i % U::columns)];
}

inline int columns_of_panel(int64_t columns, int64_t first, int panel) {
    return static_cast<int>(columns - first < panel ? columns - first : panel);
}

// Many rows: a step of columns of every unit, in order, with its neuron.
template <class T>
struct ManyRows {
    using U = Unit<T>;
    using Step = typename U::Step;
    static constexpr int kRows = Vec::max_accumulators / 2 / U::vecs;

    Step* weights;
    int32_t* neurons;
    int64_t* chunk_ends;
};

// sums (R, vecs) of rows x, over all chunks
template <class T, int R>
inline void many_rows(const ManyRows<T>& panel, int64_t chunks, const typename Multiply<T>::Activation* x,
                      int64_t x_stride, float* y, int64_t stride) {
    using U = Unit<T>;
    Vec total[R][U::vecs], sums[R][U::vecs];
    auto clear = [](Vec(&all)[R][U::vecs]) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < U::vecs; ++v) all[r][v] = splat(0.0f);
    };
    clear(total);
    int64_t at = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        clear(sums);
        for (; at < panel.chunk_ends[chunk]; ++at) {
            const auto step = panel.weights[at];
            const auto* own = x + panel.neurons[at];
            for (int r = 0; r < R; ++r) {
                const auto factor = U::factor(own + r * x_stride);
                for (int v = 0; v < U::vecs; ++v) sums[r][v] = U::add(factor, step.v[v], sums[r][v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < U::vecs; ++v) total[r][v] = total[r][v] + sums[r][v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < U::vecs; ++v) store(y + r * stride + v * Vec::width, total[r][v]);
}

// Cuts `memory` for sum_panel, see cpu::Needs; returns what is behind.
template <class T>
inline float* cut_many_rows(const Neurons<T>& neurons, float* memory, ManyRows<T>& panel, Unit<T>*& units) {
    panel.weights = reinterpret_cast<typename Unit<T>::Step*>(memory);
    units = reinterpret_cast<Unit<T>*>(panel.weights + neurons.size);
    panel.neurons = reinterpret_cast<int32_t*>(units + neurons.chunk);
    panel.chunk_ends = reinterpret_cast<int64_t*>(panel.neurons + (neurons.size + 1) / 2 * 2);
    return reinterpret_cast<float*>(panel.chunk_ends + neurons.chunks());
}

// y (rows, kNeuronPanel) = columns [first, first + height) of the sums over all neurons, of rows from the packed row
// `top` on
template <class T>
inline void sum_panel(const Neurons<T>& neurons, int64_t first, int height, int top, int num_rows,
                      const ManyRows<T>& panel, Unit<T>* units, float* y, const Scratch& s) {
    using U = Unit<T>;
    using Many = ManyRows<T>;
    const int64_t chunks = neurons.chunks(), size = neurons.size;
    const int64_t x_stride = packed_row<T>(s, size, 1) - packed_row<T>(s, size, 0);
    for (int column = 0; column < height; column += U::columns) {
        const int n = height - column < U::columns ? height - column : U::columns;
        int64_t count = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t added = neurons.collect(chunk * neurons.chunk, neurons.end_of(chunk), units);
            for (int64_t i = 0; i < added; ++i, ++count) {
                panel.weights[count] =
                    n == U::columns ? units[i].load(first + column) : units[i].load_first(first + column, n);
                panel.neurons[count] = units[i].neuron;
            }
            panel.chunk_ends[chunk] = count;
        }
        int row = 0;
        for (; row + Many::kRows <= num_rows; row += Many::kRows) {
            many_rows<T, Many::kRows>(panel, chunks, packed_row<T>(s, size, top + row), x_stride,
                                      y + row * cpu::kNeuronPanel + column, cpu::kNeuronPanel);
        }
        for (; row < num_rows; ++row) {
            many_rows<T, 1>(panel, chunks, packed_row<T>(s, size, top + row), x_stride,
                            y + row * cpu::kNeuronPanel + column, cpu::kNeuronPanel);
        }
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
