// intermediate (rows, intermediate) = act(gate @ x), x = rms_norm(hidden_states).
#include "activation.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t gate_proj_act_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.gate_proj_act.gate_proj, ins.gate_proj_act.intermediate_size);
}

void gate_proj_act_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const GateProjAct& op = ins.gate_proj_act;
    pack_rms_norm(op.gate_proj, op.hidden_states, op.hidden_size, op.post_attention_layernorm, op.rms_norm_eps, begin,
                  end, s);
}

void gate_proj_act_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const GateProjAct& op = ins.gate_proj_act;
    const auto activation = static_cast<Activation>(op.activation);
    for_tasks(op.gate_proj, op.intermediate_size, op.hidden_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            float* out = op.intermediate + s.rows[i] * op.intermediate_size + first;
            const float* gate = s.panel + i * cpu::kPanelRows;
            for (int r = 0; r < height; r += Vec::width) {
                const int n = height - r < Vec::width ? height - r : Vec::width;
                store_some(out + r, activated(activation, load_some(gate + r, n)), n);
            }
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
