// Decides run_ffn[layer] per row: FFN-SkipLLM's similarity rule (arXiv 2404.03865), a fixed set, or a random draw.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../philox.h"
#include "../ratio_controller.h"
#include "kernels.h"

namespace skipkernels::cpu {

int64_t skip_gate_tasks(const Instruction&, const Scratch&) { return 1; }

// Partial sums (num_partials, batch, 3) of <h, h'>, |h|^2, |h'|^2 -> cosine, 0 for a zero vector
static float cosine(const SkipGate& op, int row) {
    float dot = 0, before = 0, after = 0;
    for (int64_t i = 0; i < op.num_partials; ++i) {
        const float* part = op.similarity_partials + (i * op.batch_size + row) * 3;
        dot += part[0], before += part[1], after += part[2];
    }
    const float norm = std::sqrt(before) * std::sqrt(after);
    return norm > 0 ? dot / norm : 0.0f;
}

static void gate_by_similarity(const SkipGate& op, const Scratch& s) {
    const int64_t tested = (op.layer - 1) * op.batch_size;
    std::vector<char> triggered(s.num_rows);
    std::vector<int64_t> span(s.num_rows);
    int wanting = 0;
    bool all_warm = true;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        const bool warm = op.generated[row] >= op.warmup_tokens;
        triggered[i] = false;
        span[i] = op.span;
        const bool held = op.target_ratio > 0;
        const RatioController controller(op, row);
        if (held && warm && op.first_gate) op.threshold_scale[row] = controller.adapted(op.threshold_scale[row]);
        if (op.run_ffn[tested + row]) {
            const float similarity = op.similarity[tested + row] = cosine(op, row);
            if (held) span[i] = std::min(span[i], controller.allowed());
            triggered[i] = warm && (held ? controller.triggers(similarity, op.threshold, op.threshold_scale[row])
                                         : similarity >= op.threshold);
        }
        wanting += triggered[i];
        all_warm &= warm;
    }
    const auto rule = static_cast<BatchRule>(op.batch_rule);
    const int needed = rule == BatchRule::all ? s.num_rows : s.num_rows / 2 + 1;
    const bool together = all_warm && wanting >= needed;
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        if (rule == BatchRule::per_row ? triggered[i] : together)
            op.skip_remaining[row] = static_cast<int32_t>(span[i]);
        if (op.skip_remaining[row] > 0) {
            --op.skip_remaining[row];
            ++op.skipped[row];
            op.run_ffn[op.layer * op.batch_size + row] = 0;
        }
    }
}

void skip_gate_run(const Instruction& ins, int64_t, int64_t, Scratch& s) {
    const SkipGate& op = ins.skip_gate;
    const auto mode = static_cast<GateMode>(op.mode);
    if (mode == GateMode::similarity) return gate_by_similarity(op, s);
    for (int i = 0; i < s.num_rows; ++i) {
        const int row = s.rows[i];
        if (op.generated[row] < op.warmup_tokens) continue;
        const double draw = mode == GateMode::random
                                ? philox_uniform(static_cast<uint64_t>(op.seed), static_cast<uint32_t>(op.layer),
                                                 static_cast<uint32_t>(op.generated[row]), kGateStream)
                                : 0.0;
        if (draw < op.probability) op.run_ffn[op.layer * op.batch_size + row] = 0;
    }
}

}  // namespace skipkernels::cpu
