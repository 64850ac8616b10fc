// intermediate (rows, intermediate) *= up @ x for the listed neurons, x = rms_norm(hidden_states); no other row of
// up_proj (intermediate, hidden) is read. A task is a panel of the list; of quantised rows, which lie in one piece
// each, a group. With every neuron listed the bits are those of gate_up_act.
#include "listed_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t up_proj_mul_tasks(const Instruction& ins, const Scratch&) {
    const int64_t listed = *ins.up_proj_mul.num_neurons;
    return is_float(ins.up_proj_mul.up_proj.format) ? num_panels(listed) : cpu::num_groups(listed);
}

void up_proj_mul_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const UpProjMul& op = ins.up_proj_mul;
    pack_rms_norm(op.up_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps, begin,
                  end, s);
}

// intermediate of a row *= products, for `count` neurons
static void multiply_listed(const UpProjMul& op, int row, const int32_t* list, int count, const float* products) {
    float* values = op.intermediate + row * op.intermediate_size;
    for (int r = 0; r < count; ++r) {
        float& value = values[list[r]];
        if (value != 0.0f) value *= products[r];
    }
}

template <class T>
static void multiply_panels(const UpProjMul& op, int64_t begin, int64_t end, Scratch& s) {
    const auto* up = static_cast<const T*>(op.up_proj.data);
    const int64_t k = op.hidden_size;
    const int32_t* list_end = op.neurons + *op.num_neurons;
    for (int64_t panel = begin; panel < end; ++panel) {
        const int32_t* list = op.neurons + panel * cpu::kPanelRows;
        if (list >= list_end) return;  // none is listed
        const int count = static_cast<int>(list_end - list < cpu::kPanelRows ? list_end - list : cpu::kPanelRows);
        product_of_listed(up, list, count, list_end, k, s);
        for (int i = 0; i < s.num_rows; ++i) multiply_listed(op, s.rows[i], list, count, s.panel + i * cpu::kPanelRows);
    }
}

template <Format format>
static void multiply_groups(const UpProjMul& op, int64_t begin, int64_t end, const Scratch& s) {
    const int32_t* list_end = op.neurons + *op.num_neurons;
    const SingleRowsProduct<format> product(op.hidden_size, s);
    for (int64_t group = begin; group < end; ++group) {
        const int32_t* list = op.neurons + group * cpu::kLanes;
        if (list >= list_end) return;  // none is listed
        const int count = static_cast<int>(list_end - list < cpu::kLanes ? list_end - list : cpu::kLanes);
        product.listed(op.up_proj.parts[0], list, count, list_end,
                       [&](int i, const float* products) { multiply_listed(op, s.rows[i], list, count, products); });
    }
}

void up_proj_mul_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const UpProjMul& op = ins.up_proj_mul;
    with_float_type(op.up_proj.format, [&](auto type) { multiply_panels<decltype(type)>(op, begin, end, s); });
    with_block_format(op.up_proj.format,
                      [&](auto format) { multiply_groups<decltype(format)::value>(op, begin, end, s); });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
