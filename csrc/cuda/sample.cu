// next_token (sequences) from logits (sequences, vocab): argmax, or Gumbel-max over the tokens that survive top-k,
// top-p and min-p. The definition is sample() in skipkernels/program/reference.py.
//
// Both are an argmax, which many blocks find together: each takes 4096 tokens of a row, and the last one of the row to
// finish compares their winners. Of equals the lower id wins and NaN beats all, so the order of comparisons is without
// influence. Llama-3-8B: 128256 logits a row, 0.5 MB, by 32 blocks.
//
// Blocks behind those fetch the next step's first weights, while the end of a step leaves the memory idle.
//
// What top-k, top-p and min-p leave is decided by that last block alone (sample_truncated.cuh).
#include "ops.h"
#include "prefetch.cuh"
#include "sample_logprobs.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kTokensOfBlock = 4096;

// One block on an SM: with two, log probabilities and penalties beside the draw spill 20 bytes (80 registers, 64
// there).
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ Sample op, const int32_t* row_mask, int* arrivals, Winners* of_blocks,
                  int blocks, const __grid_constant__ Prefetch next, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int row = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
    const int idle = static_cast<int>(blockIdx.x) - blocks;  // the number among those that have no tokens
    if (idle >= 0) {
        if (row == 0)
            prefetch(next, int64_t{idle} * kSampleThreads + thread, int64_t{gridDim.x - blocks} * kSampleThreads);
        return;
    }
    if (!row_mask[row]) return;
    const RowScores scores(op, row);
    const bool draws_here = scores.draws && !scores.truncates;
    Winners winners;
    const int begin = static_cast<int>(blockIdx.x) * kTokensOfBlock;
    const int end = min(begin + kTokensOfBlock, scores.vocab_size);
    for (int token = begin + thread; token < end; token += kSampleThreads) {
        const float score = scores.of(token);
        winners.top.challenge({ordered(static_cast<double>(score)), token});
        if (draws_here) winners.drawn.challenge({ordered(scores.with_noise(score, token)), token});
    }
    auto& shared = *reinterpret_cast<SampleShared*>(ptx::shared_memory());
    block_winners(winners, shared);

    of_blocks += row * blocks;
    if (thread == 0) of_blocks[blockIdx.x] = winners;
    if (!is_last_block(arrivals + row, blocks, shared.is_last)) return;
    winners = {};
    for (int block = thread; block < blocks; block += kSampleThreads) {
        winners.top.challenge(of_blocks[block].top);
        winners.drawn.challenge(of_blocks[block].drawn);
    }
    block_winners(winners, shared);
    const double top = unordered(winners.top.value);
    int token = winners.top.token;
    if (scores.draws && isfinite(top)) {
        token = scores.truncates ? TruncatedDraw(scores, static_cast<float>(top), shared).token() : winners.drawn.token;
    }
    if (thread == 0) op.next_token[row] = token;
    if (op.num_logprobs[row]) record_logprobs(op, row, token, shared);
}

int64_t blocks_of_row(const Sample& op) { return ceil_div(op.vocab_size, kTokensOfBlock); }

}  // namespace

int64_t sample_scratch_floats(const Sample& op) {
    return op.num_sequences * blocks_of_row(op) * static_cast<int64_t>(sizeof(Winners) / sizeof(float));
}

cudaError_t launch_sample(const Step& step, const LaunchContext& context) {
    const Sample& op = step.ins.sample;
    const int blocks = static_cast<int>(blocks_of_row(op)), idle = step.prefetch.max_bytes ? context.num_sms : 0;
    const dim3 grid(static_cast<unsigned>(blocks + idle), static_cast<unsigned>(op.num_sequences));
    return launch_kernel(context, sample_kernel, grid, kSampleThreads, sizeof(SampleShared), op, step.ins.row_mask,
                         step.arrivals, reinterpret_cast<Winners*>(step.scratch), blocks, step.prefetch,
                         context.stamps);
}

}  // namespace skipkernels::cuda
