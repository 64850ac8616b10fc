// intermediate (rows, intermediate) = act(gate @ x) * (up @ x), x = rms_norm(hidden_states);
// gate_up_proj (2 intermediate, hidden) holds the gate rows, then the up rows. A task is a panel of both.
#include "activation.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t gate_up_act_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.gate_up_act.gate_up_proj, ins.gate_up_act.intermediate_size);
}

void gate_up_act_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const GateUpAct& op = ins.gate_up_act;
    pack_rms_norm(op.gate_up_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps,
                  begin, end, s);
}

// act(panel) * second_panel -> intermediate, for rows [first, first + height) of gate and up
static void multiply_panels(const GateUpAct& op, int64_t first, int height, const Scratch& s) {
    const auto activation = static_cast<Activation>(op.activation);
    for (int i = 0; i < s.num_rows; ++i) {
        float* out = op.intermediate + s.rows[i] * op.intermediate_size + first;
        gate_panel(activation, s.panel + i * cpu::kPanelRows, s.second_panel + i * cpu::kPanelRows, height, out);
    }
}

void gate_up_act_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const GateUpAct& op = ins.gate_up_act;
    const int64_t k = op.hidden_size, rows = op.intermediate_size;
    const int64_t task_rows = panels_of_task(op.gate_up_proj) * cpu::kPanelRows;
    for (int64_t first = begin * task_rows; first < end * task_rows && first < rows; first += task_rows) {
        const int height = static_cast<int>(rows - first < task_rows ? rows - first : task_rows);
        with_float_type(op.gate_up_proj.format, [&](auto type) {
            const auto* gate = static_cast<const decltype(type)*>(op.gate_up_proj.data);
            const auto* up = gate + rows * k;
            linear_panel(gate + first * k, k, height, up + first * k, s.panel, s);
            linear_panel(up + first * k, k, height, gate + (first + height) * k, s.second_panel, s);
        });
        if (!is_float(op.gate_up_proj.format)) {
            blocks_to_panels(op.gate_up_proj, k, first, height, s.panel, s);
            blocks_to_panels(op.gate_up_proj, k, rows + first, height, s.second_panel, s);
        }
        each_panel(first, height, s, [&](int64_t at, int n) { multiply_panels(op, at, n, s); });
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
