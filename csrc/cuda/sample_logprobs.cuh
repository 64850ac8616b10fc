// Log softmax of a row's own logits, of its token and of the likeliest ones, by one block: for rows that ask for it.
//
// The likeliest are found one after the other, each by a pass over the vocabulary below the one before: 20 passes over
// 128256 logits by 512 threads are some 0.2 ms, and few requests want them.
#pragma once

#include "sample_truncated.cuh"

namespace skipkernels::cuda {

__device__ __forceinline__ double block_sum_in_order(double value, SampleShared& shared) {
    auto* sums = reinterpret_cast<double*>(shared.sums);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
    if (thread % 32 == 0) sums[thread / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kSampleWarps; ++i) value += sums[i];
    __syncthreads();
    return value;
}

__device__ inline void record_logprobs(const Sample& op, int row, int token, SampleShared& shared) {
    const float* logits = op.logits + row * op.vocab_size;
    const int vocab_size = static_cast<int>(op.vocab_size), thread = static_cast<int>(threadIdx.x);
    const int64_t at = row * op.max_seq_len + op.num_generated[row];
    float* logprobs = op.logprobs + at * op.num_logprobs_kept;
    const int count = min(op.num_logprobs[row], vocab_size + 1);
    Candidate before;  // the likeliest so far; those that come are below it
    double log_total = 0;
    for (int i = 0; i < count; ++i) {
        Winners winners;
        for (int other = thread; other < vocab_size; other += kSampleThreads) {
            const uint64_t value = ordered(static_cast<double>(logits[other]));
            const bool below = i < 2 || value < before.value || (value == before.value && other > before.token);
            if (below) winners.top.challenge({value, other});
        }
        block_winners(winners, shared);
        before = winners.top;
        const double logit = unordered(before.value);
        if (i == 0) {  // the largest is needed first
            double total = 0;
            for (int other = thread; other < vocab_size; other += kSampleThreads) total += exp(logits[other] - logit);
            log_total = logit + log(block_sum_in_order(total, shared));
            if (thread == 0) logprobs[0] = static_cast<float>(logits[token] - log_total);
        } else if (thread == 0) {
            op.top_tokens[at * op.num_top_kept + i - 1] = before.token;
            logprobs[i] = static_cast<float>(logit - log_total);
        }
    }
}

}  // namespace skipkernels::cuda
