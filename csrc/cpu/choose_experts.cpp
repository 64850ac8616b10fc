// The second half of route_experts, by one thread: rows choose, then choices are listed by expert.
#include <algorithm>
#include <cmath>

#include "experts.h"

namespace skipkernels::cpu {

// ids (count) of the largest logits in descending order, the lower id of equals first
static void largest(const float* logits, int64_t num_experts, int64_t count, int32_t* ids) {
    int64_t held = 0;
    for (int32_t expert = 0; expert < num_experts; ++expert) {
        if (held == count && !(logits[expert] > logits[ids[held - 1]])) continue;
        int64_t at = held < count ? held++ : held - 1;
        for (; at > 0 && logits[expert] > logits[ids[at - 1]]; --at) ids[at] = ids[at - 1];
        ids[at] = expert;
    }
}

// weights (count) = the shares of the softmax over all experts that those of `ids` have
static void shares(const float* logits, int64_t num_experts, const int32_t* ids, int64_t count, bool norm,
                   float* weights) {
    const float most = logits[ids[0]];
    float all = 0, chosen = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) all += std::exp(logits[expert] - most);
    for (int64_t i = 0; i < count; ++i) chosen += weights[i] = std::exp(logits[ids[i]] - most) / all;
    for (int64_t i = 0; norm && i < count; ++i) weights[i] /= chosen;
}

void choose_experts(const RouteExperts& op, const Scratch& s) {
    int32_t* const begins = op.expert_begins;
    std::fill(begins, begins + op.num_begins, 0);
    for (int i = 0; i < s.num_rows; ++i) {
        const float* logits = op.router_logits + s.rows[i] * op.num_experts;
        const int64_t at = s.rows[i] * op.experts_per_token;
        largest(logits, op.num_experts, op.experts_per_token, op.expert_ids + at);
        shares(logits, op.num_experts, op.expert_ids + at, op.experts_per_token, op.norm_topk_prob != 0,
               op.expert_weights + at);
        for (int64_t c = 0; c < op.experts_per_token; ++c) ++begins[op.expert_ids[at + c] + 1];
    }
    for (int64_t expert = 0; expert < op.num_experts; ++expert) begins[expert + 1] += begins[expert];
    op.experts_read[op.layer] += num_chosen(begins, op.num_begins);
    // begins[e] walks to the end of e's choices, which is where those of e + 1 begin, and is moved back
    for (int i = 0; i < s.num_rows; ++i) {
        const auto at = static_cast<int32_t>(s.rows[i] * op.experts_per_token);
        for (int32_t c = 0; c < op.experts_per_token; ++c) op.expert_pairs[begins[op.expert_ids[at + c]]++] = at + c;
    }
    std::copy_backward(begins, begins + op.num_experts, begins + op.num_begins);
    begins[0] = 0;
}

}  // namespace skipkernels::cpu
