// intermediate (rows, intermediate) = act(gate @ x) * (up @ x), x = rms_norm(hidden_states);
// gate_up_proj (2 intermediate, hidden) holds the gate rows, then the up rows. A task is a panel of both.
#include "activation.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t gate_up_act_tasks(const Instruction& ins, const Scratch&) {
    return num_panels(ins.gate_up_act.intermediate_size);
}

void gate_up_act_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const GateUpAct& op = ins.gate_up_act;
    pack_rms_norm(op.gate_up_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps,
                  begin, end, s);
}

void gate_up_act_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const GateUpAct& op = ins.gate_up_act;
    const int64_t k = op.hidden_size;
    const auto activation = static_cast<Activation>(op.activation);
    with_float_type(op.gate_up_proj.format, [&](auto type) {
        const auto* gate = static_cast<const decltype(type)*>(op.gate_up_proj.data);
        const auto* up = gate + op.intermediate_size * k;
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * cpu::kPanelRows, left = op.intermediate_size - first;
            const int height = static_cast<int>(left < cpu::kPanelRows ? left : cpu::kPanelRows);
            linear_panel(gate + first * k, k, height, up + first * k, s.panel, s);
            linear_panel(up + first * k, k, height, gate + (first + height) * k, s.second_panel, s);
            for (int i = 0; i < s.num_rows; ++i) {
                float* out = op.intermediate + s.rows[i] * op.intermediate_size + first;
                const float *g = s.panel + i * cpu::kPanelRows, *u = s.second_panel + i * cpu::kPanelRows;
                for (int r = 0; r < height; r += Vec::width) {
                    const int n = height - r < Vec::width ? height - r : Vec::width;
                    store_some(out + r, gated(activation, load_some(g + r, n), load_some(u + r, n)), n);
                }
            }
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
