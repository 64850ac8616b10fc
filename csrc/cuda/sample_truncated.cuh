// The draw from what top-k, top-p and min-p leave of a row, by one block of a few hundred threads.
//
// Both cuts ask for the smallest score such that the tokens above it number less than k, or weigh less than top_p of
// all. That is a search by halving over the bits of the score, with a sum over the tokens at each step. A step over the
// whole vocabulary costs some 10 us, so first those close to the top are gathered in shared memory, where it costs
// about 0.3 us: 4,096 of them are enough unless k is larger or the distribution very flat.
//
// Weights are integers, 2^44 for the top token: their sums do not depend on the order, and hold 2^19 tokens.
#pragma once

#include "sample_scores.cuh"

namespace skipkernels::cuda {

struct SampleShared {
    static constexpr int kListed = 4096;
    uint32_t keys[kListed];
    int tokens[kListed];
    int num_listed;
    int is_last;
    Winners winners[kSampleWarps];
    uint64_t sums[kSampleWarps];
};

__device__ __forceinline__ void block_winners(Winners& winners, SampleShared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) winners.challenge(winners.of_lane_xor(lanes));
    if (thread % 32 == 0) shared.winners[thread / 32] = winners;
    __syncthreads();
    winners = shared.winners[0];
    for (int i = 1; i < kSampleWarps; ++i) winners.challenge(shared.winners[i]);
    __syncthreads();
}

__device__ __forceinline__ uint64_t block_sum(uint64_t value, SampleShared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    if (thread % 32 == 0) shared.sums[thread / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kSampleWarps; ++i) value += shared.sums[i];
    __syncthreads();
    return value;
}

// The smallest number in [low, high] that passes, where all above one that passes do too, and high does.
template <class Passes>
__device__ uint32_t smallest(uint32_t low, uint32_t high, Passes passes) {
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (passes(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

class TruncatedDraw {
  public:
    __device__ TruncatedDraw(const RowScores& scores, float top, SampleShared& shared)
        : scores_(scores), shared_(shared), top_(top), first_key_(0), last_tie_(scores.vocab_size) {}

    __device__ int token() {
        if (scores_.top_k > 0 || scores_.top_p < 1.0f) gather();
        if (scores_.top_k > 0) keep_top_k();
        if (scores_.top_p < 1.0f) keep_top_p();
        const double least = scores_.min_p > 0.0f ? static_cast<double>(top_) + log(static_cast<double>(scores_.min_p))
                                                  : -static_cast<double>(INFINITY);
        Winners winners;
        for_each([&](uint32_t key, int token) {
            const float score = unordered(key);
            if (!keeps(key, token) || static_cast<double>(score) < least) return;
            winners.drawn.challenge({ordered(scores_.with_noise(score, token)), token});
        });
        block_winners(winners, shared_);
        return winners.drawn.token;
    }

  private:
    // All tokens, or those in the list, which hold all that is kept.
    template <class Visit>
    __device__ void for_each(Visit visit) const {
        if (listed_) {
            for (int i = static_cast<int>(threadIdx.x); i < shared_.num_listed; i += kSampleThreads) {
                visit(shared_.keys[i], shared_.tokens[i]);
            }
            return;
        }
#pragma unroll 4
        for (int token = static_cast<int>(threadIdx.x); token < scores_.vocab_size; token += kSampleThreads) {
            visit(ordered(scores_.of(token)), token);
        }
    }
    template <class Value>
    __device__ uint64_t sum(Value value) const {
        uint64_t sum = 0;
        for_each([&](uint32_t key, int token) { sum += value(key, token); });
        return block_sum(sum, shared_);
    }
    __device__ uint64_t weight(uint32_t key) const {
        return static_cast<uint64_t>(expf(unordered(key) - top_) * 0x1p44f);
    }
    __device__ bool keeps(uint32_t key, int token) const {
        return key > first_key_ || (key == first_key_ && token <= last_tie_);
    }

    // Lists the tokens within some distance of the top that holds all that is kept and fits; tries a few.
    __device__ void gather() {
        float too_near = 0.0f, too_far = INFINITY, distance = 10.0f;
        for (int attempt = 0; attempt < 6; ++attempt) {
            if (threadIdx.x == 0) shared_.num_listed = 0;
            __syncthreads();
            const uint32_t least = ordered(top_ - distance);
            uint64_t of_all = 0, of_listed = 0;
            for_each([&](uint32_t key, int token) {
                const uint64_t own = scores_.top_k > 0 ? 1 : weight(key);
                of_all += own;
                if (key < least) return;
                of_listed += own;
                const int at = atomicAdd(&shared_.num_listed, 1);
                if (at < SampleShared::kListed) shared_.keys[at] = key, shared_.tokens[at] = token;
            });
            of_all = block_sum(of_all, shared_);
            of_listed = block_sum(of_listed, shared_);
            const bool fits = shared_.num_listed <= SampleShared::kListed;
            const bool holds_all = scores_.top_k > 0 ? of_listed >= static_cast<uint64_t>(scores_.top_k)
                                                     : reaches_top_p(of_listed, of_all);
            weight_of_all_ = of_all;
            if (fits && holds_all) {
                listed_ = true;
                first_key_ = least;
                return;
            }
            __syncthreads();
            if (!fits && holds_all) {
                too_far = distance;
            } else if (fits) {
                too_near = distance;
            } else {
                return;  // neither: there is no such distance
            }
            distance = too_far < INFINITY ? (too_near + too_far) / 2 : 2 * distance;
        }
    }

    // Keeps the tokens above which there are less than k: ties at the edge too.
    __device__ void keep_top_k() {
        const auto k = static_cast<uint64_t>(scores_.top_k);
        first_key_ = smallest(first_key_, ordered(top_), [&](uint32_t least) {
            return sum([&](uint32_t key, int) { return static_cast<uint64_t>(key > least); }) < k;
        });
    }

    // Keeps, by falling score and rising id, the tokens before which there is less than top_p of the weight, and the
    // first in any case.
    __device__ void keep_top_p() {
        const uint64_t all = scores_.top_k > 0
                                 ? sum([&](uint32_t key, int) { return key >= first_key_ ? weight(key) : 0; })
                                 : weight_of_all_;
        auto above = [&](uint32_t least) {
            return sum([&](uint32_t key, int) { return key > least ? weight(key) : 0; });
        };
        const uint32_t edge =
            smallest(first_key_, ordered(top_), [&](uint32_t least) { return !reaches_top_p(above(least), all); });
        first_key_ = edge;
        const uint64_t before = above(edge), own = weight(edge);
        auto ties_up_to = [&](uint32_t last) {
            return sum([&](uint32_t key, int token) {
                return static_cast<uint64_t>(key == edge && static_cast<uint32_t>(token) <= last);
            });
        };
        // the smallest id whose next tie would have top_p before it
        last_tie_ = static_cast<int>(smallest(0, static_cast<uint32_t>(scores_.vocab_size), [&](uint32_t last) {
            const uint64_t ties = ties_up_to(last);
            return ties > 0 && reaches_top_p(before + ties * own, all);
        }));
    }
    __device__ bool reaches_top_p(uint64_t weight, uint64_t all) const {
        return static_cast<double>(weight) >= static_cast<double>(scores_.top_p) * static_cast<double>(all);
    }

    const RowScores& scores_;
    SampleShared& shared_;
    const float top_;
    // what is kept so far: keys above this one, and of those equal to it the tokens up to last_tie_
    uint32_t first_key_;
    int last_tie_;
    bool listed_ = false;
    uint64_t weight_of_all_ = 0;  // where there is no top-k
};

}  // namespace skipkernels::cuda
