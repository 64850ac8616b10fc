// Holds one sequence's running skip ratio at its target: the arithmetic of skip_gate with target_ratio, for every
// native executor. The definition is RatioController in skipkernels/program/reference.py; every operation is one fp32
// rounding, so units that use it are compiled without contraction into fused multiply-adds.
#pragma once

#include <cmath>

#include "host_device.h"
#include "program.h"

namespace skipkernels {

// What is to have been left out after so many tokens, per_token of each from ramp_tokens on.
SKIPKERNELS_HOST_DEVICE inline float owed_after(int64_t tokens, float per_token, int64_t warmup, int64_t ramp) {
    if (tokens >= ramp) return per_token * static_cast<float>(tokens);
    const int64_t past_warmup = tokens > warmup ? tokens - warmup : 0;
    return per_token * static_cast<float>(ramp) * static_cast<float>(past_warmup) / static_cast<float>(ramp - warmup);
}

SKIPKERNELS_HOST_DEVICE inline float clamp_to(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

// threshold_scale for the token that begins, where what was owed before is `behind` of a token, in [-1, 1].
SKIPKERNELS_HOST_DEVICE inline float adapted_scale(float scale, float behind) {
    constexpr float kGain = 0.25f, kBound = 1048576.0f;  // 2^20
    return clamp_to(scale * (1.0f + behind * kGain), 1.0f / kBound, kBound);
}

struct RatioController {
    float layers, slack, owed_before, owed_now;

    SKIPKERNELS_HOST_DEVICE RatioController(const SkipGate& op, int row)
        : layers(static_cast<float>(op.num_hidden_layers)),
          slack(layers / 2),
          owed_before(owed(op, row, op.num_generated[row]) - static_cast<float>(op.skipped[row])),
          owed_now(owed(op, row, op.num_generated[row] + 1) - static_cast<float>(op.skipped[row])) {}

    // FFNs to have been skipped after so many tokens.
    SKIPKERNELS_HOST_DEVICE static float owed(const SkipGate& op, int row, int64_t tokens) {
        const float per_token = op.target_ratio[row] * static_cast<float>(op.num_hidden_layers);
        return owed_after(tokens, per_token, op.warmup_tokens[row], op.ramp_tokens[row]);
    }

    SKIPKERNELS_HOST_DEVICE float adapted(float scale) const {
        return adapted_scale(scale, clamp_to(owed_before / layers, -1.0f, 1.0f));
    }

    // FFNs the row may still skip before it runs ahead too far
    SKIPKERNELS_HOST_DEVICE int64_t allowed() const {
        const float room = std::floor(owed_now + slack);
        return room > 0 ? static_cast<int64_t>(room) : 0;
    }

    SKIPKERNELS_HOST_DEVICE bool triggers(float similarity, float threshold, float scale) const {
        const float behind = owed_now / slack;
        if (allowed() == 0 || behind >= 1.0f) return allowed() > 0;
        float limit = (1.0f - threshold) * scale;
        limit = behind >= 0 ? limit * (1.0f + behind) : limit / (1.0f - behind);
        return 1.0f - similarity <= limit;
    }
};

// Holds one sequence's share of FFN bytes not read: the arithmetic of neuron_gate with neuron_target_ratio, whose
// definition is NeuronController in skipkernels/program/reference.py. Units as above.
struct NeuronController {
    static constexpr float kSteer = 2.0f;

    float behind;  // in tokens

    SKIPKERNELS_HOST_DEVICE NeuronController(const NeuronGate& op, int row) {
        const auto per_token = static_cast<float>(op.ffn_bytes * op.num_hidden_layers);
        const int64_t unread = op.left_out[row] + op.ffn_bytes * op.skipped[row];
        const float owed = owed_after(op.num_generated[row], op.neuron_target_ratio[row] * per_token,
                                      op.warmup_tokens[row], op.ramp_tokens[row]);
        behind = clamp_to((owed - static_cast<float>(unread)) / per_token, -1.0f, 1.0f);
    }

    SKIPKERNELS_HOST_DEVICE float adapted(float scale) const { return adapted_scale(scale, behind); }

    SKIPKERNELS_HOST_DEVICE float neuron_scale(float scale) const {
        const float steer = behind * kSteer;
        return steer >= 0 ? scale * (1.0f + steer) : scale / (1.0f - steer);
    }
};

}  // namespace skipkernels
