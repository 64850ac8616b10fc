// hidden_states (rows, hidden) += sum over a row's chosen experts, in the order of their ids, of weight *
// (expert_intermediate (rows, choices, expert) @ down_proj (experts, expert, hidden) + down_proj_bias (experts,
// hidden)), where a row of down_proj is read if its neuron is not 0 in some row. similarity_partials as for
// down_proj_add.
//
// With few rows a task is a chunk of one chosen expert's neurons, and the last task to end adds the chunks up; with
// many rows it is a panel of columns, of all chosen experts: see down_proj_neurons_add, whose sums these are.
#include "experts.h"
#include "neuron_sums.h"

namespace skipkernels::SKIPKERNELS_ISA {

static int64_t num_chunks(const ExpertsDownProjNeuronsAdd& op) {
    return (op.expert_size + op.neuron_chunk - 1) / op.neuron_chunk;
}

static int num_listed(const ExpertsDownProjNeuronsAdd& op) { return op.expert_begins[op.num_begins - 1]; }

int64_t experts_down_proj_neurons_add_tasks(const Instruction& ins, const Scratch& s) {
    const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
    if (s.num_rows <= cpu::kFewRows) return cpu::num_chosen(op.expert_begins, op.num_begins) * num_chunks(op);
    return (op.hidden_size + cpu::kNeuronPanel - 1) / cpu::kNeuronPanel;
}

// Packed rows are the choices in the order of the list. Tiles are those of the rows; here they stand for a share of it.
void experts_down_proj_neurons_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
    const int64_t listed = num_listed(op), tiles = num_tiles(s.num_rows), size = op.expert_size;
    with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        for (int64_t i = listed * begin / tiles; i < listed * end / tiles; ++i) {
            pack_row<T>(op.expert_intermediate + op.expert_pairs[i] * size, size,
                        packed_row<T>(s, size, static_cast<int>(i)));
        }
    });
}

// Lists the neurons [begin, end) of an expert that some of its choices keep; returns the list's end.
static int32_t* list_kept(const ExpertsDownProjNeuronsAdd& op, const cpu::Choices& chosen, int64_t begin, int64_t end,
                          int32_t* list) {
    for (int64_t j = begin; j < end; j += Vec::width) {
        const int n = static_cast<int>(end - j < Vec::width ? end - j : Vec::width);
        const uint32_t all = (uint32_t{1} << n) - 1;
        uint32_t kept = 0;
        for (int i = chosen.begin; i < chosen.end && kept != all; ++i) {
            kept |= nonzero_bits(load_some(op.expert_intermediate + op.expert_pairs[i] * op.expert_size + j, n));
        }
        for (int at = 0; at < n; ++at) {  // without a branch: which neurons are kept cannot be predicted
            *list = static_cast<int32_t>(j + at);
            list += kept >> at & 1u;
        }
    }
    return list;
}

template <class T>
static Neurons<T> neurons_of(const ExpertsDownProjNeuronsAdd& op, const cpu::Choices& chosen, const int32_t* list,
                             const int32_t* list_end) {
    const auto* w = static_cast<const T*>(op.down_proj.data) + chosen.expert * op.expert_size * op.hidden_size;
    return {w, op.expert_size, op.hidden_size, op.neuron_chunk, list, list_end};
}

// branch (height) += a choice's weight * (y (height), whose columns are in steps, + bias), from channel `first` on
template <class T>
static void add_choice(const ExpertsDownProjNeuronsAdd& op, const cpu::Choices& chosen, int32_t pair, const float* y,
                       int64_t first, int height, float* branch) {
    float outputs[cpu::kNeuronPanel];
    in_order<T>(y, height, outputs);
    if (op.down_proj_bias) {
        const float* bias = op.down_proj_bias + chosen.expert * op.hidden_size + first;
        for (int i = 0; i < height; ++i) outputs[i] += bias[i];
    }
    const float weight = op.expert_weights[pair];
    for (int i = 0; i < height; ++i) branch[i] += weight * outputs[i];
}

// The sums (chunks, choices, padded hidden) of a row's choices, expert after expert.
template <class T>
static void add_chunks(const ExpertsDownProjNeuronsAdd& op, int row, const Scratch& s) {
    const int64_t stride = padded_hidden(op.hidden_size);
    for (int64_t first = 0; first < op.hidden_size; first += cpu::kNeuronPanel) {
        const int height = columns_of_panel(op.hidden_size, first, cpu::kNeuronPanel);
        float branch[cpu::kNeuronPanel] = {};
        cpu::Choices chosen = cpu::chosen_from(0, op.expert_begins, op.num_begins);
        for (; chosen.count() > 0; chosen = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins)) {
            for (int i = chosen.begin; i < chosen.end; ++i) {
                if (op.expert_pairs[i] / op.experts_per_token != row) continue;
                alignas(64) float sums[cpu::kNeuronPanel];
                sum_of_chunks(s.neuron_sums + i * stride + first, num_chunks(op), num_listed(op) * stride,
                              stride - first, sums);
                add_choice<T>(op, chosen, op.expert_pairs[i], sums, first, height, branch);
            }
        }
        add_branch(op, branch, first, height, row);
    }
}

template <class T>
static void run_chunks(const ExpertsDownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    const int64_t stride = padded_hidden(op.hidden_size), chunks = num_chunks(op), listed = num_listed(op);
    auto* list = reinterpret_cast<int32_t*>(s.op_scratch);
    auto* units = reinterpret_cast<Unit<T>*>(list + (op.neuron_chunk + cpu::kNeuronsAhead + 1) / 2 * 2);
    cpu::Choices chosen = cpu::chosen_from(0, op.expert_begins, op.num_begins);
    for (int64_t done = 0; done < end && chosen.count() > 0; done += chunks) {
        for (int64_t task = begin > done ? begin : done; task < end && task < done + chunks; ++task) {
            const int64_t chunk = task - done, first = chunk * op.neuron_chunk;
            const int64_t after = first + op.neuron_chunk + cpu::kNeuronsAhead;
            const int32_t* list_end =
                list_kept(op, chosen, first, after < op.expert_size ? after : op.expert_size, list);
            sum_chunk(neurons_of<T>(op, chosen, list, list_end), chunk, chosen.begin, chosen.count(), units,
                      s.neuron_sums + (chunk * listed + chosen.begin) * stride, stride, s);
        }
        chosen = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins);
    }
    const int64_t tasks = cpu::num_chosen(op.expert_begins, op.num_begins) * chunks;
    if (!are_last(end - begin, tasks, s)) return;
    for (int i = 0; i < s.num_rows; ++i) add_chunks<T>(op, s.rows[i], s);
}

template <class T>
static void run_panels(const ExpertsDownProjNeuronsAdd& op, int64_t begin, int64_t end, Scratch& s) {
    ManyRows<T> many;
    Unit<T>* units;
    float* y = cut_many_rows(neurons_of<T>(op, {}, nullptr, nullptr), s.op_scratch, many, units);
    float* branches = y + s.num_rows * cpu::kNeuronPanel;
    int* position = reinterpret_cast<int*>(branches + s.num_rows * cpu::kNeuronPanel);
    auto* list = position + op.num_rows;
    for (int i = 0; i < s.num_rows; ++i) position[s.rows[i]] = i;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * cpu::kNeuronPanel;
        const int height = columns_of_panel(op.hidden_size, first, cpu::kNeuronPanel);
        std::memset(branches, 0, sizeof(float) * s.num_rows * cpu::kNeuronPanel);
        cpu::Choices chosen = cpu::chosen_from(0, op.expert_begins, op.num_begins);
        for (; chosen.count() > 0; chosen = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins)) {
            const int32_t* list_end = list_kept(op, chosen, 0, op.expert_size, list);
            sum_panel(neurons_of<T>(op, chosen, list, list_end), first, height, chosen.begin, chosen.count(), many,
                      units, y, s);
            for (int i = chosen.begin; i < chosen.end; ++i) {
                const int32_t pair = op.expert_pairs[i];
                add_choice<T>(op, chosen, pair, y + (i - chosen.begin) * cpu::kNeuronPanel, first, height,
                              branches + position[pair / op.experts_per_token] * cpu::kNeuronPanel);
            }
        }
        for (int i = 0; i < s.num_rows; ++i) {
            add_branch(op, branches + i * cpu::kNeuronPanel, first, height, s.rows[i]);
        }
    }
}

void experts_down_proj_neurons_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const ExpertsDownProjNeuronsAdd& op = ins.experts_down_proj_neurons_add;
    with_float_type(op.down_proj.format, [&](auto type) {
        using T = decltype(type);
        s.num_rows <= cpu::kFewRows ? run_chunks<T>(op, begin, end, s) : run_panels<T>(op, begin, end, s);
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
