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
#include "neuron_sums.h"

namespace skipkernels::SKIPKERNELS_ISA {

static int64_t num_chunks(const DownProjNeuronsAdd& op) {
    return (op.intermediate_size + op.neuron_chunk - 1) / op.neuron_chunk;
}

template <class T>
static Neurons<T> neurons_of(const DownProjNeuronsAdd& op) {
    return {static_cast<const T*>(op.down_proj.data),
            op.intermediate_size,
            op.hidden_size,
            op.neuron_chunk,
            op.neurons,
            op.neurons ? op.neurons + *op.num_neurons : nullptr};
}

int64_t down_proj_neurons_add_tasks(const Instruction& ins, const Scratch& s) {
    const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
    if (s.num_rows <= cpu::kFewRows) return num_chunks(op);
    const int panel = is_float(op.down_proj.format) ? cpu::kNeuronPanel : cpu::kColumnsPanel;
    return (op.hidden_size + panel - 1) / panel;
}

void down_proj_neurons_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const DownProjNeuronsAdd& op = ins.down_proj_neurons_add;
    const int64_t size = op.intermediate_size;
    const Tiles tiles(s.num_rows);
    if (!is_float(op.down_proj.format)) return pack_rows(op.down_proj, op.intermediate, size, begin, end, s);
    with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        for (int i = tiles.begin(begin); i < tiles.begin(end); ++i) {
            pack_row<T>(op.intermediate + s.rows[i] * size, size, packed_row<T>(s, size, i));
        }
    });
}

// A panel's columns of y, in order, to the residual stream
template <class T>
static void add_steps(const DownProjNeuronsAdd& op, const float* y, int64_t first, int height, int row) {
    float branch[cpu::kNeuronPanel];
    in_order<T>(y, height, branch);
    add_branch(op, branch, first, height, row);
}

// The chunks' sums (chunks, rows, padded hidden), in their order
template <class T>
static void add_chunks(const DownProjNeuronsAdd& op, const Scratch& s) {
    const int64_t stride = padded_hidden(op.hidden_size);
    for (int i = 0; i < s.num_rows; ++i) {
        for (int64_t first = 0; first < op.hidden_size; first += cpu::kNeuronPanel) {
            alignas(64) float sums[cpu::kNeuronPanel];
            sum_of_chunks(s.neuron_sums + i * stride + first, num_chunks(op), s.num_rows * stride, stride - first,
                          sums);
            add_steps<T>(op, sums, first, columns_of_panel(op.hidden_size, first, cpu::kNeuronPanel), s.rows[i]);
        }
    }
}

template <class T>
static void run_chunks(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    const Neurons<T> neurons = neurons_of<T>(op);
    const int64_t stride = padded_hidden(op.hidden_size);
    auto* units = reinterpret_cast<Unit<T>*>(s.op_scratch);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        sum_chunk(neurons, chunk, 0, s.num_rows, units, s.neuron_sums + chunk * s.num_rows * stride, stride, s);
    }
    if (are_last(end - begin, num_chunks(op), s)) add_chunks<T>(op, s);
}

template <class T>
static void run_panels(const DownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    const Neurons<T> neurons = neurons_of<T>(op);
    ManyRows<T> many;
    Unit<T>* units;
    float* y = cut_many_rows(neurons, s.op_scratch, many, units);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * cpu::kNeuronPanel;
        const int height = columns_of_panel(op.hidden_size, first, cpu::kNeuronPanel);
        sum_panel(neurons, first, height, 0, s.num_rows, many, units, y, s);
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
    const int64_t stride = padded_hidden(op.hidden_size), size = op.intermediate_size;
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
    if (are_last(end - begin, num_chunks(op), s)) add_chunks<float>(op, s);
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
            for (int at = 0; at < columns_of_panel(op.hidden_size, first, kPanel); at += cpu::kNeuronPanel) {
                add_steps<float>(op, total + i * kPanel + at, first + at,
                                 columns_of_panel(op.hidden_size, first + at, cpu::kNeuronPanel), s.rows[i]);
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
