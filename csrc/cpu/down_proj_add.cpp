// hidden_states (rows, hidden) += down_proj (hidden, intermediate) @ intermediate (rows, intermediate)
// and, where asked for, similarity_partials (panels, sequences, 3) of the decode rows: sums of h h', h^2 and h'^2 over
// the panel's channels, taken while both are at hand. The similarity test costs no pass of its own.
#include "linear.h"
#include "residual.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t down_proj_add_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.down_proj_add.down_proj, ins.down_proj_add.hidden_size);
}

void down_proj_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const DownProjAdd& op = ins.down_proj_add;
    pack_rows(op.down_proj, op.intermediate, op.intermediate_size, begin, end, s);
}

void down_proj_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DownProjAdd& op = ins.down_proj_add;
    for_tasks(op.down_proj, op.hidden_size, op.intermediate_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            const int row = s.rows[i];
            add_panel(op.hidden_states + row * op.hidden_size, s.panel + i * cpu::kPanelRows, first, height, row,
                      op.similarity_partials, op.num_sequences);
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
