// expert_intermediate (rows, choices, expert) = act(gate @ x) * (up @ x) of each chosen expert, x =
// rms_norm(hidden_states); gate_up_proj (experts, 2 expert, hidden), gate_up_bias (experts, 2 expert). A task is a
// panel of gate and up of one chosen expert: other experts are not read. Each thread packs the rows of an expert for
// itself when it comes to it.
//
// With thresholds a task is several panels of gate, then the rows of up whose neurons some row of the expert keeps:
// what a list of a whole panel or less would leave in between is too little to fetch ahead.
#include "activation.h"
#include "experts.h"
#include "listed_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

constexpr auto experts_gate_up_act_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

static int64_t rows_of_task(const ExpertsGateUpAct& op) {
    return op.gate_thresholds ? cpu::kNeuronPanel : panels_of_task(op.gate_up_proj) * cpu::kPanelRows;
}

static int64_t tasks_of_expert(const ExpertsGateUpAct& op) {
    return (op.expert_size + rows_of_task(op) - 1) / rows_of_task(op);
}

int64_t experts_gate_up_act_tasks(const Instruction& ins, const Scratch&) {
    const ExpertsGateUpAct& op = ins.experts_gate_up_act;
    return cpu::num_chosen(op.expert_begins, op.num_begins) * tasks_of_expert(op);
}

// The scratch of an expert's rows, packed behind their list.
static Scratch pack_choices(const ExpertsGateUpAct& op, const cpu::Choices& chosen, const Scratch& s) {
    Scratch own = s;
    own.x = s.op_scratch;
    int* rows = reinterpret_cast<int*>(s.op_scratch + chosen.count() * padded(op.hidden_size));
    for (int i = 0; i < chosen.count(); ++i) {
        rows[i] = static_cast<int>(op.expert_pairs[chosen.begin + i] / op.experts_per_token);
    }
    own.rows = rows, own.num_rows = chosen.count();
    pack_rms_norm(op.gate_up_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps, 0,
                  num_tiles(own.num_rows), own);
    return own;
}

static void add_bias(const float* bias, int n, float* out) {
    for (int r = 0; r < n; ++r) out[r] += bias[r];
}

// Rows [first, first + height) of an expert's gate and up; weights of `after` are wanted next, if that is an expert.
static void multiply_expert(const ExpertsGateUpAct& op, const cpu::Choices& chosen, int64_t first, int height,
                            int64_t after, Scratch& s) {
    const int64_t k = op.hidden_size, size = op.expert_size, top = chosen.expert * 2 * size;
    with_float_type(op.gate_up_proj.format, [&](auto type) {
        const auto* gate = static_cast<const decltype(type)*>(op.gate_up_proj.data) + (top + first) * k;
        const auto* up = gate + size * k;
        const bool last = first + height == size;
        const auto* next =
            last && after < op.num_begins - 1 ? gate + ((after * 2 * size) - top - first) * k : gate + height * k;
        linear_panel(gate, k, height, up, s.panel, s);
        linear_panel(up, k, height, next, s.second_panel, s);
    });
    if (!is_float(op.gate_up_proj.format)) {
        blocks_to_panels(op.gate_up_proj, k, top + first, height, s.panel, s);
        blocks_to_panels(op.gate_up_proj, k, top + size + first, height, s.second_panel, s);
    }
    each_panel(first, height, s, [&](int64_t at, int n) {
        for (int i = 0; i < s.num_rows; ++i) {
            float *gate = s.panel + i * cpu::kPanelRows, *up = s.second_panel + i * cpu::kPanelRows;
            if (op.gate_up_bias) {
                add_bias(op.gate_up_bias + top + at, n, gate);
                add_bias(op.gate_up_bias + top + size + at, n, up);
            }
            gate_panel(static_cast<Activation>(op.activation), gate, up, n,
                       op.expert_intermediate + op.expert_pairs[chosen.begin + i] * size + at);
        }
    });
}

static float* intermediate_of(const ExpertsGateUpAct& op, const cpu::Choices& chosen, int i) {
    return op.expert_intermediate + op.expert_pairs[chosen.begin + i] * op.expert_size;
}

static float threshold_of(const ExpertsGateUpAct& op, int row) {
    const float* own = op.gate_thresholds + op.row_sequence[row] * op.num_hidden_layers + op.layer;
    return *own * op.neuron_scale[row];
}

// Rows [first, first + height) of an expert's gate: activated, and 0 below each row's threshold; s.panel holds them.
static void keep_gates(const ExpertsGateUpAct& op, const cpu::Choices& chosen, int64_t first, int height,
                       const Scratch& s) {
    const auto activation = static_cast<Activation>(op.activation);
    for (int i = 0; i < s.num_rows; ++i) {
        float* gate = s.panel + i * cpu::kPanelRows;
        if (op.gate_up_bias) add_bias(op.gate_up_bias + chosen.expert * 2 * op.expert_size + first, height, gate);
        const Vec threshold = splat(threshold_of(op, s.rows[i]));
        for (int r = 0; r < height; r += Vec::width) {
            const int n = height - r < Vec::width ? height - r : Vec::width;
            const Vec value = zero_below(activated(activation, load_some(gate + r, n)), threshold);
            store_some(intermediate_of(op, chosen, i) + first + r, value, n);
        }
    }
}

// Gates, where they are not 0, times the listed rows' ups, which s.panel holds.
static void multiply_ups(const ExpertsGateUpAct& op, const cpu::Choices& chosen, const int32_t* list, int count,
                         const Scratch& s) {
    const float* bias = op.gate_up_bias ? op.gate_up_bias + (chosen.expert * 2 + 1) * op.expert_size : nullptr;
    for (int i = 0; i < s.num_rows; ++i) {
        float *up = s.panel + i * cpu::kPanelRows, *values = intermediate_of(op, chosen, i);
        for (int r = 0; bias && r < count; ++r) up[r] += bias[list[r]];
        for (int r = 0; r < count; r += Vec::width) {
            const int n = count - r < Vec::width ? count - r : Vec::width;
            store_some(up + r, up_factor(static_cast<Activation>(op.activation), load_some(up + r, n)), n);
        }
        for (int r = 0; r < count; ++r) {
            float& value = values[list[r]];
            if (value != 0.0f) value *= up[r];
        }
    }
}

// Neurons [first, first + height) of an expert; weights of `after` are wanted next, if that is an expert.
template <class T>
static void multiply_kept(const ExpertsGateUpAct& op, const cpu::Choices& chosen, int64_t first, int height,
                          int64_t after, Scratch& s) {
    const int64_t k = op.hidden_size, size = op.expert_size;
    const T* gates = static_cast<const T*>(op.gate_up_proj.data) + chosen.expert * 2 * size * k;
    for (int64_t at = first; at < first + height; at += cpu::kPanelRows) {
        const int n = static_cast<int>(first + height - at < cpu::kPanelRows ? first + height - at : cpu::kPanelRows);
        const bool last = at + n == size && after < op.num_begins - 1;
        const T* next = last ? gates + (after - chosen.expert) * 2 * size * k : gates + (at + n) * k;
        linear_panel(gates + at * k, k, n, next, s.panel, s);
        keep_gates(op, chosen, at, n, s);
    }
    int32_t list[cpu::kNeuronPanel];
    int listed = 0;
    for (int64_t j = first; j < first + height; ++j) {
        bool kept = false;
        for (int i = 0; i < s.num_rows && !kept; ++i) kept = intermediate_of(op, chosen, i)[j] != 0.0f;
        list[listed] = static_cast<int32_t>(j);
        listed += kept;
    }
    for (int at = 0; at < listed; at += cpu::kPanelRows) {
        const int count = listed - at < cpu::kPanelRows ? listed - at : cpu::kPanelRows;
        product_of_listed(gates + size * k, list + at, count, list + listed, k, s);
        multiply_ups(op, chosen, list + at, count, s);
    }
}

void experts_gate_up_act_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const ExpertsGateUpAct& op = ins.experts_gate_up_act;
    const int64_t each = tasks_of_expert(op), task_rows = rows_of_task(op);
    cpu::Choices chosen = cpu::chosen_from(0, op.expert_begins, op.num_begins);
    for (int64_t done = 0; done < end && chosen.count() > 0; done += each) {
        const cpu::Choices after = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins);
        if (begin < done + each) {
            Scratch own = pack_choices(op, chosen, s);
            const int64_t from = begin > done ? begin - done : 0, to = end - done < each ? end - done : each;
            for (int64_t first = from * task_rows; first < to * task_rows && first < op.expert_size;
                 first += task_rows) {
                const int64_t left = op.expert_size - first;
                const int height = static_cast<int>(left < task_rows ? left : task_rows);
                if (!op.gate_thresholds) {
                    multiply_expert(op, chosen, first, height, after.expert, own);
                    continue;
                }
                with_float_type(op.gate_up_proj.format, [&](auto type) {
                    multiply_kept<decltype(type)>(op, chosen, first, height, after.expert, own);
                });
            }
        }
        chosen = after;
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
