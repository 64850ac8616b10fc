// hidden_states (batch, hidden) += down_proj (hidden, intermediate) @ intermediate (batch, intermediate)
// and, where asked for, similarity_partials (panels, batch, 3): sums of h h', h^2 and h'^2 over the panel's channels,
// taken while both are at hand. The similarity test costs no pass of its own.
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t down_proj_add_tasks(const Instruction& ins, const Scratch&) {
    return num_panels(ins.down_proj_add.hidden_size);
}

void down_proj_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    pack_rows(ins.down_proj_add.intermediate, ins.down_proj_add.intermediate_size, begin, end, s);
}

void down_proj_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DownProjAdd& op = ins.down_proj_add;
    with_weight_type(ins.weight_dtype, [&](auto type) {
        const auto* w = static_cast<const decltype(type)*>(op.down_proj);
        for_panels(w, op.hidden_size, op.intermediate_size, begin, end, s, [&](int64_t first, int height) {
            for (int i = 0; i < s.num_rows; ++i) {
                float* hidden = op.hidden_states + s.rows[i] * op.hidden_size + first;
                float dot = 0, before_squared = 0, after_squared = 0;
                for (int r = 0; r < height; ++r) {
                    const float before = hidden[r], after = before + s.panel[i * cpu::kPanelRows + r];
                    hidden[r] = after;
                    dot += before * after, before_squared += before * before, after_squared += after * after;
                }
                if (op.similarity_partials) {
                    float* part = op.similarity_partials + (first / cpu::kPanelRows * op.batch_size + s.rows[i]) * 3;
                    part[0] = dot, part[1] = before_squared, part[2] = after_squared;
                }
            }
        });
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
