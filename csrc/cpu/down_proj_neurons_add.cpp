// hidden_states (rows, hidden) += intermediate (rows, intermediate) @ down_proj (intermediate, hidden), over the listed
// neurons: a row of down_proj that no neuron of the list needs is not read. And similarity_partials, as in
// down_proj_add.
//
// The sum over neurons is that of chunks of neuron_chunk, added in their order; within a chunk neurons are added one
// after the other, or pair after pair (neuron_rows.h). That order holds for both ways of going about it:
//
// With few rows a step is bound by reading weights. A task is a chunk: whole rows of down_proj, the longest pieces
// there are, which matters where rows between them are left out. Several neurons are added for one load and store of y,
// while the next ones are fetched. The last task to end adds the chunks up.
//
// With many rows it is bound by multiplications. A task is a panel of columns, copied in the order in which it is read,
// for down_proj's rows lie kilobytes apart; sums stay in registers.
//
// Of blocks, whose neurons lie as block_columns.h reads them, both ways and the order of sums are the same; within a
// chunk the sum is that of blocks of 32 neurons, one after the other.
#include "block_columns.h"
#include "neuron_rows.h"
#include "residual.h"

namespace skipkernels::SKIPKERNELS_ISA {

static int64_t num_chunks(const DownProjNeuronsAdd& op) {
    return (op.intermediate_size + op.neuron_chunk - 1) / op.neuron_chunk;
}

static int64_t padded_hidden(const DownProjNeuronsAdd& op) {
    return (op.hidden_size + cpu::kHiddenStep - 1) / cpu::kHiddenStep * cpu::kHiddenStep;
}

int64_t down_proj_neurons_add_tasks(const Instruction& ins, const Scratch& s) {
    const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
    if (s.num_rows <= cpu::kFewRows) return num_chunks(op);
    const int panel = is_float(op.down_proj.format) ? cpu::kNeuronPanel : cpu::kColumnsPanel;
    return (op.hidden_size + panel - 1) / panel;
}

// A row's activations, as the weights' type multiplies them, row after row; zeros behind them
template <class T>
static typename Multiply<T>::Activation* packed_row(const Scratch& s, int64_t size, int row) {
    return reinterpret_cast<typename Multiply<T>::Activation*>(s.x + row * padded(size));
}

void down_proj_neurons_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
    const int64_t size = op.intermediate_size;
    const Tiles tiles(s.num_rows);
    if (!is_float(op.down_proj.format)) return pack_rows(op.down_proj, op.intermediate, size, begin, end, s);
    with_float_type(op.down_proj.format, [&](auto type) {
        using M = Multiply<decltype(type)>;
        for (int i = tiles.begin(begin); i < tiles.begin(end); ++i) {
            const float* from = op.intermediate + s.rows[i] * size;
            auto* to = packed_row<decltype(type)>(s, size, i);
            for (int64_t j = 0; j < size; j += M::width) {
                const int n = static_cast<int>(size - j < M::width ? size - j : M::width);
                M::pack(from + j, splat(1.0f), nullptr, n, to + j);
            }
        }
    });
}

// y (N rows of `stride`) += P units over columns [begin, end), whose y are in steps; what is `ahead` and the beginning
// of the units after them, of which there are `known` with them, are fetched meanwhile
template <class T, int P, int N>
static void add_units(const Unit<T>* units, int64_t known, RowsAhead<T> ahead,
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
static void add_all(const Unit<T>* units, int64_t count, int64_t known, const typename Multiply<T>::Activation* x,
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

template <class T, int... N>
static void add_all_of(int n, std::integer_sequence<int, N...>, const Unit<T>* units, int64_t count, int64_t known,
                       const typename Multiply<T>::Activation* x, int64_t x_stride, int64_t columns, float* y,
                       int64_t stride) {
    ((n == N + 1 ? add_all<T, N + 1>(units, count, known, x, x_stride, columns, y, stride) : void()), ...);
}

// A panel's columns of y, in order, to the residual stream
template <class T>
static void add_steps(const DownProjNeuronsAdd& op, const float* y, int64_t first, int height, int row) {
    using U = Unit<T>;
    float branch[cpu::kNeuronPanel];
    for (int i = 0; i < height; ++i) branch[i] = y[i / U::columns * U::columns + U::place(i % U::columns)];
    for (int i = 0; i < height; i += cpu::kPanelRows) {
        const int rest = height - i < cpu::kPanelRows ? height - i : cpu::kPanelRows;
        add_panel(op.hidden_states + row * op.hidden_size, branch + i, first + i, rest, row, op.similarity_partials,
                  op.num_sequences);
    }
}

static int panel_height(const DownProjNeuronsAdd& op, int64_t first, int panel) {
    const int64_t left = op.hidden_size - first;
    return static_cast<int>(left < panel ? left : panel);
}

// The chunks' sums (chunks, rows, padded hidden), in their order
template <class T>
static void add_chunks(const DownProjNeuronsAdd& op, const Scratch& s) {
    const int64_t stride = padded_hidden(op), chunks = num_chunks(op);
    for (int i = 0; i < s.num_rows; ++i) {
        for (int64_t first = 0; first < op.hidden_size; first += cpu::kNeuronPanel) {
            alignas(64) float sums[cpu::kNeuronPanel];
            for (int at = 0; at < cpu::kNeuronPanel && first + at < stride; at += Vec::width) {
                const float* from = s.neuron_sums + i * stride + first + at;
                Vec sum = splat(0.0f);
                for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load(from + chunk * s.num_rows * stride);
                store(sums + at, sum);
            }
            add_steps<T>(op, sums, first, panel_height(op, first, cpu::kNeuronPanel), s.rows[i]);
        }
    }
}

// Adds the chunks up where `done` of them were the last.
template <class T>
static void add_when_last(const DownProjNeuronsAdd& op, int64_t done, const Scratch& s) {
    std::atomic<int32_t>& arrived = *s.attention.arrivals;
    const auto count = static_cast<int32_t>(done);
    if (arrived.fetch_add(count, std::memory_order_acq_rel) + count == num_chunks(op)) {
        arrived.store(0, std::memory_order_relaxed);
        add_chunks<T>(op, s);
    }
}

template <class T>
static void run_chunks(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    const auto* w = static_cast<const T*>(op.down_proj.data);
    const int32_t* list_end = op.neurons ? op.neurons + *op.num_neurons : nullptr;
    const int64_t stride = padded_hidden(op), size = op.intermediate_size;
    const int64_t x_stride = packed_row<T>(s, size, 1) - packed_row<T>(s, size, 0);
    auto* units = reinterpret_cast<Unit<T>*>(s.op_scratch);
    const Tiles tiles(s.num_rows);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * op.neuron_chunk;
        const int64_t last = first + op.neuron_chunk < size ? first + op.neuron_chunk : size;
        const int64_t count = collect_units(w, op.hidden_size, op.neurons, list_end, first, last, units);
        const int64_t after = last + cpu::kNeuronsAhead < size ? last + cpu::kNeuronsAhead : size;
        const int64_t known =
            count + collect_units(w, op.hidden_size, op.neurons, list_end, last, after, units + count);
        float* sums = s.neuron_sums + chunk * s.num_rows * stride;
        std::memset(sums, 0, sizeof(float) * s.num_rows * stride);
        for (int tile = 0; tile < tiles.count; ++tile) {
            const int top = tiles.begin(tile);
            add_all_of<T>(tiles.size(tile), std::make_integer_sequence<int, cpu::kMaxTile>{}, units, count, known,
                          packed_row<T>(s, size, top), x_stride, op.hidden_size, sums + top * stride, stride);
        }
    }
    add_when_last<T>(op, end - begin, s);
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
static void many_rows(const ManyRows<T>& panel, int64_t chunks, const typename Multiply<T>::Activation* x,
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

template <class T>
static void run_panels(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    using U = Unit<T>;
    using Many = ManyRows<T>;
    const auto* w = static_cast<const T*>(op.down_proj.data);
    const int32_t* list_end = op.neurons ? op.neurons + *op.num_neurons : nullptr;
    const int64_t size = op.intermediate_size, chunks = num_chunks(op);
    const int64_t x_stride = packed_row<T>(s, size, 1) - packed_row<T>(s, size, 0);
    // cut from op_scratch, see cpu::neuron_scratch
    auto* weights = reinterpret_cast<typename U::Step*>(s.op_scratch);
    auto* units = reinterpret_cast<U*>(weights + size);
    auto* neurons = reinterpret_cast<int32_t*>(units + op.neuron_chunk);
    auto* chunk_ends = reinterpret_cast<int64_t*>(neurons + (size + 1) / 2 * 2);
    auto* y = reinterpret_cast<float*>(chunk_ends + chunks);
    const Many panel{weights, neurons, chunk_ends};
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * cpu::kNeuronPanel;
        const int height = panel_height(op, first, cpu::kNeuronPanel);
        for (int column = 0; column < height; column += U::columns) {
            const int n = height - column < U::columns ? height - column : U::columns;
            int64_t count = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t low = chunk * op.neuron_chunk;
                const int64_t high = low + op.neuron_chunk < size ? low + op.neuron_chunk : size;
                const int64_t added = collect_units(w, op.hidden_size, op.neurons, list_end, low, high, units);
                for (int64_t i = 0; i < added; ++i, ++count) {
                    weights[count] =
                        n == U::columns ? units[i].load(first + column) : units[i].load_first(first + column, n);
                    neurons[count] = units[i].neuron;
                }
                chunk_ends[chunk] = count;
            }
            int row = 0;
            for (; row + Many::kRows <= s.num_rows; row += Many::kRows) {
                many_rows<T, Many::kRows>(panel, chunks, packed_row<T>(s, size, row), x_stride,
                                          y + row * cpu::kNeuronPanel + column, cpu::kNeuronPanel);
            }
            for (; row < s.num_rows; ++row) {
                many_rows<T, 1>(panel, chunks, packed_row<T>(s, size, row), x_stride,
                                y + row * cpu::kNeuronPanel + column, cpu::kNeuronPanel);
            }
        }
        for (int i = 0; i < s.num_rows; ++i) add_steps<T>(op, y + i * cpu::kNeuronPanel, first, height, s.rows[i]);
    }
}

// Calls add(listed, what comes next) for each block of neurons [first, last), of which some are listed.
template <Format format, class Add>
static void each_listed_block(const DownProjNeuronsAdd& op, const cpu::ColumnLayout& layout, int64_t first,
                              int64_t last, Add add) {
    constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);
    const auto* data = static_cast<const uint8_t*>(op.down_proj.data);
    const int32_t* end = op.neurons ? op.neurons + *op.num_neurons : nullptr;
    const int32_t* list = op.neurons ? first_listed(op.neurons, end, first) : nullptr;
    // also the next chunk's first block, which the same thread computes or another one soon
    const int64_t blocks = op.intermediate_size / cpu::kBlockColumns;
    int64_t block = first / cpu::kBlockColumns;
    ListedColumns listed[2];
    auto find_next = [&](ListedColumns& to) {
        for (to.count = 0; block < blocks && to.count == 0; ++block) {
            list = list_block(kTraits, layout, data, block, list, end, to);
        }
    };
    find_next(listed[0]);
    for (int at = 0; listed[at].count && listed[at].block * cpu::kBlockColumns < last; at = 1 - at) {
        find_next(listed[1 - at]);
        add(listed[at], ColumnsAhead(listed[1 - at], layout));
    }
}

template <Format format>
static void run_block_chunks(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    const int64_t stride = padded_hidden(op), size = op.intermediate_size;
    const cpu::ColumnLayout layout(cpu::block_traits(format), op.hidden_size, size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * op.neuron_chunk;
        const int64_t last = first + op.neuron_chunk < size ? first + op.neuron_chunk : size;
        float* sums = s.neuron_sums + chunk * s.num_rows * stride;
        std::memset(sums, 0, sizeof(float) * s.num_rows * stride);
        each_listed_block<format>(op, layout, first, last, [&](const ListedColumns& listed, const ColumnsAhead& ahead) {
            add_block_columns<format>(listed, layout, size, 0, layout.chunks, ahead, sums, stride, s);
        });
    }
    add_when_last<float>(op, end - begin, s);
}

template <Format format>
static void run_block_panels(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    constexpr int kPanel = cpu::kColumnsPanel;
    const int64_t size = op.intermediate_size, floats = static_cast<int64_t>(s.num_rows) * kPanel;
    const cpu::ColumnLayout layout(cpu::block_traits(format), op.hidden_size, size);
    float *const total = s.op_scratch, *const sums = total + floats;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t top = task * (kPanel / cpu::kChunkRows), below = top + kPanel / cpu::kChunkRows;
        const int64_t bottom = below < layout.chunks ? below : layout.chunks;
        std::memset(total, 0, sizeof(float) * floats);
        for (int64_t first = 0; first < size; first += op.neuron_chunk) {
            const int64_t last = first + op.neuron_chunk < size ? first + op.neuron_chunk : size;
            std::memset(sums, 0, sizeof(float) * floats);
            each_listed_block<format>(op, layout, first, last, [&](const ListedColumns& listed, const ColumnsAhead&) {
                ListedColumns none;
                none.count = 0;
                add_block_columns<format>(listed, layout, size, top, bottom, {none, layout}, sums, kPanel, s);
            });
            for (int64_t i = 0; i < floats; i += Vec::width) store(total + i, load(total + i) + load(sums + i));
        }
        const int64_t first = task * kPanel;
        for (int i = 0; i < s.num_rows; ++i) {
            for (int at = 0; at < panel_height(op, first, kPanel); at += cpu::kNeuronPanel) {
                add_steps<float>(op, total + i * kPanel + at, first + at,
                                 panel_height(op, first + at, cpu::kNeuronPanel), s.rows[i]);
            }
        }
    }
}

void down_proj_neurons_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
    const bool few = s.num_rows <= cpu::kFewRows;
    with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        few ? run_chunks<T>(op, begin, end, s) : run_panels<T>(op, begin, end, s);
    });
    with_block_format(op.down_proj.format, [&](auto format) {
        constexpr Format kFormat = decltype(format)::value;
        few ? run_block_chunks<kFormat>(op, begin, end, s) : run_block_panels<kFormat>(op, begin, end, s);
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
