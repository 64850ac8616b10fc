// Decides run_ffn[layer] of each decode row by its sequence's own policy: FFN-SkipLLM's similarity rule (arXiv
// 2404.03865), a fixed set, or a random draw.
#include <algorithm>
#include <cmath>

#include "../philox.h"
#include "../ratio_controller.h"
#include "kernels.h"

namespace skipkernels::cpu {

int64_t skip_gate_tasks(const Instruction&, const Scratch&) { return 1; }

namespace {

GateMode mode_of(const SkipGate& op, int row) {
    const bool gated = op.gated[op.layer * op.num_sequences + row] != 0;
    return gated ? static_cast<GateMode>(op.gate_mode[row]) : GateMode::dense;
}

bool is_warm(const SkipGate& op, int row) { return op.num_generated[row] >= op.warmup_tokens[row]; }

// Partial sums (num_partials, sequences, 3) of <h, h'>, |h|^2, |h'|^2 -> cosine, 0 for a zero vector
float cosine(const SkipGate& op, int row) {
    float dot = 0, before = 0, after = 0;
    for (int64_t i = 0; i < op.num_partials; ++i) {
        const float* part = op.similarity_partials + (i * op.num_sequences + row) * 3;
        dot += part[0], before += part[1], after += part[2];
    }
    const float norm = std::sqrt(before) * std::sqrt(after);
    return norm > 0 ? dot / norm : 0.0f;
}

// FFNs that the row's own similarity wants to skip from this layer on; 0 where it does not trigger.
int32_t wanted_span(const SkipGate& op, int row) {
    const bool warm = is_warm(op, row), held = op.target_ratio[row] > 0;
    const int64_t tested = (op.layer - 1) * op.num_sequences + row;
    const RatioController controller(op, row);
    if (held && warm && op.layer == op.first_gated[row]) {
        op.threshold_scale[row] = controller.adapted(op.threshold_scale[row]);
    }
    if (!op.run_ffn[(op.layer - 1) * op.num_rows + row]) return 0;
    const float similarity = op.similarity[tested] = cosine(op, row), threshold = op.gate_threshold[tested];
    if (!warm) return 0;
    if (!held) return similarity >= threshold ? op.gate_span[row] : 0;
    if (!controller.triggers(similarity, threshold, op.threshold_scale[row])) return 0;
    return static_cast<int32_t>(std::min<int64_t>(op.gate_span[row], controller.allowed()));
}

// The sequences of one batch rule that decide together, and how they vote.
struct Vote {
    int voters = 0, wanting = 0;
    bool all_warm = true;

    bool passes(BatchRule rule) const {
        return all_warm && wanting >= (rule == BatchRule::all ? voters : voters / 2 + 1);
    }
};

void gate_by_similarity(const SkipGate& op, const Scratch& s) {
    Vote votes[3];
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        if (mode_of(op, row) != GateMode::similarity) continue;
        const int32_t span = wanted_span(op, row);
        Vote& vote = votes[op.batch_rule[row]];
        ++vote.voters;
        vote.wanting += span > 0;
        vote.all_warm &= is_warm(op, row);
        if (span > 0 && static_cast<BatchRule>(op.batch_rule[row]) == BatchRule::per_row) op.skip_remaining[row] = span;
    }
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        if (mode_of(op, row) != GateMode::similarity) continue;
        const auto rule = static_cast<BatchRule>(op.batch_rule[row]);
        if (rule != BatchRule::per_row && votes[op.batch_rule[row]].passes(rule)) {
            op.skip_remaining[row] = op.gate_span[row];
        }
        if (op.skip_remaining[row] > 0) {
            --op.skip_remaining[row];
            ++op.skipped[row];
            op.run_ffn[op.layer * op.num_rows + row] = 0;
        }
    }
}

void gate_by_plan(const SkipGate& op, int row, GateMode mode) {
    const double draw = mode == GateMode::fixed
                            ? -1.0
                            : philox_uniform(static_cast<uint64_t>(op.gate_seed[row]), static_cast<uint32_t>(op.layer),
                                             static_cast<uint32_t>(op.num_generated[row]), kGateStream);
    if (draw < op.gate_probability[row]) op.run_ffn[op.layer * op.num_rows + row] = 0;
}

}  // namespace

void skip_gate_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const SkipGate& op = ins.skip_gate;
    gate_by_similarity(op, s);
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        const GateMode mode = mode_of(op, row);
        if ((mode == GateMode::fixed || mode == GateMode::random) && is_warm(op, row)) gate_by_plan(op, row, mode);
    }
}

}  // namespace skipkernels::cpu
