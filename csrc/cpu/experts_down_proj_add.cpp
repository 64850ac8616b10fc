// hidden_states (rows, hidden) += sum over a row's chosen experts of weight * (down_proj (experts, hidden, expert) @
// expert_intermediate (rows, choices, expert) + down_proj_bias (experts, hidden)), expert after expert, so that a row
// sums in the order it has alone. similarity_partials as for down_proj_add. A task is a panel of channels, of all
// chosen experts.
#include "experts.h"
#include "linear.h"
#include "residual.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t experts_down_proj_add_tasks(const Instruction& ins, const Scratch&) {
    return num_matrix_tasks(ins.experts_down_proj_add.down_proj, ins.experts_down_proj_add.hidden_size);
}

// The scratch of an expert's choices: the pairs are the rows of expert_intermediate.
static Scratch scratch_of_choices(const ExpertsDownProjAdd& op, const cpu::Choices& chosen, const Scratch& s) {
    Scratch own = s;
    own.x = s.x + chosen.begin * padded(op.expert_size);
    own.rows = op.expert_pairs + chosen.begin, own.num_rows = chosen.count();
    return own;
}

// Tiles are those of the rows; here they stand for a share of the experts.
void experts_down_proj_add_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const ExpertsDownProjAdd& op = ins.experts_down_proj_add;
    const int64_t experts = op.num_begins - 1, tiles = num_tiles(s.num_rows);
    const int64_t last = experts * end / tiles;
    cpu::Choices chosen = cpu::chosen_from(static_cast<int>(experts * begin / tiles), op.expert_begins, op.num_begins);
    for (; chosen.expert < last; chosen = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins)) {
        Scratch own = scratch_of_choices(op, chosen, s);
        pack_rows(op.down_proj, op.expert_intermediate, op.expert_size, 0, num_tiles(own.num_rows), own);
    }
}

// s.panel (panels, choices, kPanelRows) = rows [first, first + height) of an expert's down_proj times its choices;
// weights at row `next` of the matrix are wanted next
static void multiply_choices(const ExpertsDownProjAdd& op, int64_t top, int64_t first, int height, int64_t next,
                             Scratch& own) {
    const int64_t k = op.expert_size;
    with_float_type(op.down_proj.format, [&](auto type) {
        const auto* w = static_cast<const decltype(type)*>(op.down_proj.data);
        linear_panel(w + (top + first) * k, k, height, w + next * k, own.panel, own);
    });
    if (!is_float(op.down_proj.format)) blocks_to_panels(op.down_proj, k, top + first, height, own.panel, own);
}

// sums (panels, rows, kPanelRows) += weight * (own.panel (panels, choices, kPanelRows) + bias (height))
static void add_choices(const ExpertsDownProjAdd& op, const float* bias, const int* position, int num_rows, int height,
                        const Scratch& own, float* sums) {
    const int panels = static_cast<int>(num_panels(height));
    for (int i = 0; i < own.num_rows; ++i) {
        const int at = position[own.rows[i] / op.experts_per_token];
        const float weight = op.expert_weights[own.rows[i]];
        for (int panel = 0; panel < panels; ++panel) {
            const float* from = own.panel + (panel * own.num_rows + i) * cpu::kPanelRows;
            float* to = sums + (panel * num_rows + at) * cpu::kPanelRows;
            const int left = height - panel * cpu::kPanelRows;
            const int n = left < cpu::kPanelRows ? left : cpu::kPanelRows;
            if (bias) {
                const float* add = bias + panel * cpu::kPanelRows;
                for (int r = 0; r < n; ++r) to[r] += weight * (from[r] + add[r]);
            } else {
                for (int r = 0; r < n; ++r) to[r] += weight * from[r];
            }
        }
    }
}

void experts_down_proj_add_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const ExpertsDownProjAdd& op = ins.experts_down_proj_add;
    int* const position = reinterpret_cast<int*>(s.op_scratch);
    for (int i = 0; i < s.num_rows; ++i) position[s.rows[i]] = i;
    const int64_t hidden = op.hidden_size, task_rows = panels_of_task(op.down_proj) * cpu::kPanelRows;
    const cpu::Choices lowest = cpu::chosen_from(0, op.expert_begins, op.num_begins);
    for (int64_t first = begin * task_rows; first < end * task_rows && first < hidden; first += task_rows) {
        const int height = static_cast<int>(hidden - first < task_rows ? hidden - first : task_rows);
        float* const sums = s.second_panel;
        std::memset(sums, 0, num_panels(height) * s.num_rows * cpu::kPanelRows * sizeof(float));
        for (cpu::Choices chosen = lowest; chosen.count() > 0;) {
            const cpu::Choices after = cpu::chosen_from(chosen.expert + 1, op.expert_begins, op.num_begins);
            const int64_t next =
                after.count() > 0 ? after.expert * hidden + first : lowest.expert * hidden + first + height;
            Scratch own = scratch_of_choices(op, chosen, s);
            multiply_choices(op, chosen.expert * hidden, first, height, next, own);
            const float* bias = op.down_proj_bias ? op.down_proj_bias + chosen.expert * hidden + first : nullptr;
            add_choices(op, bias, position, s.num_rows, height, own, sums);
            chosen = after;
        }
        for (int64_t at = 0; at < height; at += cpu::kPanelRows) {
            const int n = static_cast<int>(height - at < cpu::kPanelRows ? height - at : cpu::kPanelRows);
            for (int i = 0; i < s.num_rows; ++i) {
                const int row = s.rows[i];
                add_panel(op.hidden_states + row * hidden, sums + at * s.num_rows + i * cpu::kPanelRows, first + at, n,
                          row, op.similarity_partials, op.num_sequences);
            }
        }
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
