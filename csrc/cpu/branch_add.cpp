// hidden_states (rows, hidden) += multiplier * rms_norm(branch (rows, hidden)), or * branch without a norm; branch = 0
// and, where asked for, similarity_partials (panels, sequences, 3) of the decode rows. A task is a row.
#include "pack.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t branch_add_tasks(const Instruction&, const Scratch& s) { return s.num_rows; }

constexpr auto branch_add_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

// Channels [begin, end) of a row; part = the sums of h h', h^2 and h'^2
static void add_channels(const BranchAdd& op, float* branch, float* hidden, float scale, int64_t begin, int64_t end,
                         float* part) {
    float dot = 0, before_squared = 0, after_squared = 0;
    for (int64_t i = begin; i < end; ++i) {
        const float normed = branch[i] * scale * (op.norm ? op.norm[i] : 1.0f);
        const float before = hidden[i], after = before + normed * op.multiplier;
        hidden[i] = after, branch[i] = 0;
        dot += before * after, before_squared += before * before, after_squared += after * after;
    }
    part[0] = dot, part[1] = before_squared, part[2] = after_squared;
}

void branch_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const BranchAdd& op = ins.branch_add;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t row = s.rows[task];
        const bool compared = op.similarity_partials && row < op.num_sequences;
        float *branch = op.branch + row * op.hidden_size, *hidden = op.hidden_states + row * op.hidden_size;
        const float scale = op.norm ? rms_scale(branch, op.hidden_size, op.rms_norm_eps) : 1.0f;
        for (int64_t first = 0, panel = 0; first < op.hidden_size; first += cpu::kPanelRows, ++panel) {
            float unused[3];
            float* part =
                compared ? op.similarity_partials + (panel * op.num_sequences + row) * 3 : static_cast<float*>(unused);
            const int64_t last = first + cpu::kPanelRows < op.hidden_size ? first + cpu::kPanelRows : op.hidden_size;
            add_channels(op, branch, hidden, scale, first, last, part);
        }
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
