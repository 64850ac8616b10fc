// hidden_states (rows, hidden) += o_proj (hidden, attention_size) @ attn_output (rows, attention_size) + bias
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t o_proj_add_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.o_proj_add.o_proj, ins.o_proj_add.hidden_size);
}

void o_proj_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    pack_rows(ins.o_proj_add.o_proj, ins.o_proj_add.attn_output, ins.o_proj_add.attention_size, begin, end, s);
}

void o_proj_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const OProjAdd& op = ins.o_proj_add;
    for_tasks(op.o_proj, op.hidden_size, op.attention_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            float* hidden = op.hidden_states + s.rows[i] * op.hidden_size + first;
            for (int r = 0; r < height; ++r) {
                hidden[r] += s.panel[i * cpu::kPanelRows + r] + (op.o_proj_bias ? op.o_proj_bias[first + r] : 0.0f);
            }
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
