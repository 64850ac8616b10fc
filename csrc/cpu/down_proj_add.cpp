// hidden_states (rows, hidden) += down_proj (hidden, intermediate) @ intermediate (rows, intermediate)
// and, where asked for, similarity_partials (panels, sequences, 3) of the decode rows: sums of h h', h^2 and h'^2 over
// the panel's channels, taken while both are at hand. The similarity test costs no pass of its own.
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t down_proj_add_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.down_proj_add.down_proj, ins.down_proj_add.hidden_size);
}

void down_proj_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const DownProjAdd& op = ins.down_proj_add;
    pack_rows(op.down_proj, op.intermediate, op.intermediate_size, begin, end, s);
}

// hidden (height) += branch (height); part = the sums of h h', h^2 and h'^2
static void add_and_compare(float* hidden, const float* branch, int height, float* part) {
    float dot = 0, before_squared = 0, after_squared = 0;
    for (int r = 0; r < height; ++r) {
        const float before = hidden[r], after = before + branch[r];
        hidden[r] = after;
        dot += before * after, before_squared += before * before, after_squared += after * after;
    }
    part[0] = dot, part[1] = before_squared, part[2] = after_squared;
}

void down_proj_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DownProjAdd& op = ins.down_proj_add;
    const int64_t compared = op.similarity_partials ? op.num_sequences : 0;
    for_tasks(op.down_proj, op.hidden_size, op.intermediate_size, begin, end, s, [&](int64_t first, int height) {
        for (int i = 0; i < s.num_rows; ++i) {
            const int row = s.rows[i];
            float* hidden = op.hidden_states + row * op.hidden_size + first;
            const float* branch = s.panel + i * cpu::kPanelRows;
            if (row < compared) {
                const int64_t at = first / cpu::kPanelRows * op.num_sequences + row;
                add_and_compare(hidden, branch, height, op.similarity_partials + 3 * at);
            } else {
                for (int r = 0; r < height; ++r) hidden[r] += branch[r];
            }
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
