// expert_intermediate (rows, choices, expert) = act(gate @ x) * (up @ x) of each chosen expert, x =
// rms_norm(hidden_states); gate_up_proj (experts, 2 expert, hidden), gate_up_bias (experts, 2 expert). A task is a
// panel of gate and up of one chosen expert: other experts are not read. Each thread packs the rows of an expert for
// itself when it comes to it.
#include "activation.h"
#include "experts.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

constexpr auto experts_gate_up_act_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

static int64_t tasks_of_expert(const ExpertsGateUpAct& op) { return num_matrix_tasks(op.gate_up_proj, op.expert_size); }

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

void experts_gate_up_act_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const ExpertsGateUpAct& op = ins.experts_gate_up_act;
    const int64_t each = tasks_of_expert(op), task_rows = panels_of_task(op.gate_up_proj) * cpu::kPanelRows;
    cpu::Choices chosen = cpu::chosen_from(0, op.expert_begins, op.num_begins);
    for (int64_t done = 0; done < end && chosen.count() > 0; done += each) {
        const cpu::Choices after = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins);
        if (begin < done + each) {
            Scratch own = pack_choices(op, chosen, s);
            const int64_t from = begin > done ? begin - done : 0, to = end - done < each ? end - done : each;
            for (int64_t first = from * task_rows; first < to * task_rows && first < op.expert_size;
                 first += task_rows) {
                const int64_t left = op.expert_size - first;
                multiply_expert(op, chosen, first, static_cast<int>(left < task_rows ? left : task_rows), after.expert,
                                own);
            }
        }
        chosen = after;
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
