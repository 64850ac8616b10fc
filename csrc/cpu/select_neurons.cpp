// intermediate = 0 below each row's own threshold, and the list of what is not 0 in some row. One thread does it: a few
// microseconds, where the rows of weights that follow take hundreds.
#include "pack.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t select_neurons_tasks(const Instruction&, const Scratch&) { return 1; }

constexpr auto select_neurons_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

// values = 0 below the threshold, at(j, n) of n neurons from j on; adds a bit to `kept` (one word for a vector) for
// each that is not 0, and counts them
template <class At>
static int64_t leave_out(float* values, int64_t size, At at, uint32_t* kept) {
    int64_t count = 0;
    for (int64_t j = 0; j < size; j += Vec::width) {
        const int n = static_cast<int>(size - j < Vec::width ? size - j : Vec::width);
        const Vec value = zero_below(load_some(values + j, n), at(j, n));
        store_some(values + j, value, n);
        const uint32_t bits = nonzero_bits(value);
        kept[j / Vec::width] |= bits;
        count += __builtin_popcount(bits);
    }
    return count;
}

void select_neurons_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const SelectNeurons& op = ins.select_neurons;
    const int64_t size = op.intermediate_size, words = (size + Vec::width - 1) / Vec::width;
    auto* kept = reinterpret_cast<uint32_t*>(s.op_scratch);
    for (int64_t word = 0; word < words; ++word) kept[word] = 0;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        const float* thresholds =
            op.neuron_thresholds + (op.row_sequence[row] * op.num_hidden_layers + op.layer) * op.num_thresholds;
        const Vec scale = splat(op.neuron_scale[row]), shared = splat(*thresholds) * scale;
        float* values = op.intermediate + row * size;
        const int64_t count =
            op.num_thresholds == 1
                ? leave_out(
                      values, size, [=](int64_t, int) { return shared; }, kept)
                : leave_out(values, size, [=](int64_t j, int n) { return load_some(thresholds + j, n) * scale; }, kept);
        if (row < op.num_sequences) {
            const int64_t token = row * op.max_seq_len + op.num_generated[row];
            op.kept_map[(token * op.num_hidden_layers + op.layer) * 2 + op.stage] = static_cast<int32_t>(count);
            op.left_out[row] += (size - count) * op.neuron_bytes;
        }
    }
    int32_t listed = 0;
    for (int64_t j = 0; j < size; ++j) {  // without a branch: which neurons are kept cannot be predicted
        op.neurons[listed] = static_cast<int32_t>(j);
        listed += static_cast<int32_t>(kept[j / Vec::width] >> (j % Vec::width) & 1u);
    }
    *op.num_neurons = listed;
}

}  // namespace skipkernels::SKIPKERNELS_ISA
