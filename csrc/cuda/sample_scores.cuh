// The scores of a row's tokens, and their comparison: what both ways to sample share.
#pragma once

#include "common.cuh"
#include "philox.h"

namespace skipkernels::cuda {

constexpr int kSampleThreads = 512;
constexpr int kSampleWarps = kSampleThreads / 32;

// Integers in the order of the numbers, NaN above all; 0 and -0 are equal.
__device__ __forceinline__ uint32_t ordered(float value) {
    if (isnan(value)) return ~uint32_t{0};
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ uint64_t ordered(double value) {
    if (isnan(value)) return ~uint64_t{0};
    const auto bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ __forceinline__ double unordered(uint64_t key) {
    return __longlong_as_double(static_cast<long long>(key >> 63 ? key & ~uint64_t{0} >> 1 : ~key));
}

// A token with an ordered value; the first of equals wins.
struct Candidate {
    uint64_t value = 0;
    int token = 0x7fffffff;

    __device__ void challenge(const Candidate& other) {
        if (other.value > value || (other.value == value && other.token < token)) *this = other;
    }
    __device__ Candidate of_lane_xor(int lanes) const {
        return {__shfl_xor_sync(kAllLanes, value, lanes), __shfl_xor_sync(kAllLanes, token, lanes)};
    }
};

struct Winners {
    Candidate top;    // by score
    Candidate drawn;  // by score and noise

    __device__ void challenge(const Winners& other) {
        top.challenge(other.top);
        drawn.challenge(other.drawn);
    }
    __device__ Winners of_lane_xor(int lanes) const { return {top.of_lane_xor(lanes), drawn.of_lane_xor(lanes)}; }
};

struct RowScores {
    const float* logits;
    const uint8_t* seen;
    int vocab_size;
    int adjusts;
    const float* logit_bias;
    const int32_t* token_mask;
    float penalty, frequency, presence, temperature;
    bool draws;
    int top_k;  // 0: off
    float top_p, min_p;
    bool truncates;
    uint64_t seed;
    uint32_t step;

    __device__ RowScores(const Sample& op, int row)
        : logits(op.logits + row * op.vocab_size),
          seen(op.seen + row * op.vocab_size),
          vocab_size(static_cast<int>(op.vocab_size)),
          adjusts(op.adjusts[row]),
          logit_bias(op.logit_bias + row * op.vocab_size),
          token_mask(op.token_mask + row * op.mask_words),
          penalty(op.repetition_penalty[row]),
          frequency(op.frequency_penalty[row]),
          presence(op.presence_penalty[row]),
          temperature(op.temperature[row]),
          draws(temperature != 0.0f),
          top_k(op.top_k[row] > 0 && op.top_k[row] < vocab_size ? op.top_k[row] : 0),
          top_p(op.top_p[row]),
          min_p(op.min_p[row]),
          truncates(top_k > 0 || top_p < 1.0f || min_p > 0.0f),
          seed(static_cast<uint64_t>(op.seed[row])),
          step(static_cast<uint32_t>(op.num_generated[row])) {}

    __device__ float of(int token) const {
        float score = logits[token];
        if (adjusts & kAdjustsBias) score += logit_bias[token];
        if (const int times = seen[token]) {
            score = score > 0.0f ? score / penalty : score * penalty;
            if (times > 1 && adjusts & kAdjustsCounts) {  // no contraction: each operation rounds, as elsewhere
                const float much = __fmul_rn(static_cast<float>(times >> 1), frequency);
                score = __fsub_rn(__fsub_rn(score, much), presence);
            }
        }
        const bool allowed =
            !(adjusts & kAdjustsMask) || (static_cast<uint32_t>(token_mask[token / 32]) >> (token % 32) & 1);
        if (!allowed) score = -INFINITY;
        return draws ? score / temperature : score;
    }
    // Gumbel-max: the token with the largest of these is a draw from the softmax of the scores.
    __device__ double with_noise(float score, int token) const {
        const double uniform = philox_uniform(seed, static_cast<uint32_t>(token), step, kSampleStream);
        return static_cast<double>(score) - log(-log(uniform));
    }
};

}  // namespace skipkernels::cuda
