// Holds one row's running skip ratio at its target: the arithmetic of skip_gate with target_ratio, for every native
// executor. The definition is RatioController in skipkernels/program/reference.py; every operation is one fp32
// rounding, so units that use it are compiled without contraction into fused multiply-adds.
#pragma once

#include <cmath>

#include "host_device.h"
#include "program.h"

namespace skipkernels {

struct RatioController {
    static constexpr float kGain = 0.25f;
    static constexpr float kScaleBound = 1048576.0f;  // 2^20

    float layers, slack, owed_before, owed_now;

    SKIPKERNELS_HOST_DEVICE RatioController(const SkipGate& op, int row)
        : layers(static_cast<float>(op.num_hidden_layers)),
          slack(layers / 2),
          owed_before(owed(op, op.generated[row]) - static_cast<float>(op.skipped[row])),
          owed_now(owed(op, op.generated[row] + 1) - static_cast<float>(op.skipped[row])) {}

    // FFNs to have been skipped after so many tokens.
    SKIPKERNELS_HOST_DEVICE static float owed(const SkipGate& op, int64_t tokens) {
        const float per_token = op.target_ratio * static_cast<float>(op.num_hidden_layers);
        if (tokens >= op.ramp_tokens) return per_token * static_cast<float>(tokens);
        const int64_t past_warmup = tokens > op.warmup_tokens ? tokens - op.warmup_tokens : 0;
        return per_token * static_cast<float>(op.ramp_tokens) * static_cast<float>(past_warmup) /
               static_cast<float>(op.ramp_tokens - op.warmup_tokens);
    }

    // threshold_scale for the token that begins
    SKIPKERNELS_HOST_DEVICE float adapted(float scale) const {
        const float behind = clamp(owed_before / layers, -1.0f, 1.0f);
        return clamp(scale * (1.0f + behind * kGain), 1.0f / kScaleBound, kScaleBound);
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

    SKIPKERNELS_HOST_DEVICE static float clamp(float value, float low, float high) {
        return value < low ? low : value > high ? high : value;
    }
};

}  // namespace skipkernels
