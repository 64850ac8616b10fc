// Ends a row's step: records what ran, appends the token, moves the row on or ends it, arms the next step. A block is a
// row.
//
// token_ids, run_map, similarity_map and progress lie in the host's memory. The host reads progress while the device
// runs on, so progress is written last, in one piece, and behind a fence.
#include "common.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ Advance op, const int32_t* when, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!when[row]) return;
    const int32_t token = op.next_token[row], step = op.generated[row];
    const int32_t generated = step + 1, seq_len = op.seq_len[row] + 1;
    bool done = generated >= op.max_new_tokens[row] || seq_len >= op.max_seq_len;
    for (int64_t i = 0; i < op.max_eos; ++i) done |= op.eos_token_ids[row * op.max_eos + i] == token;
    __syncthreads();  // everybody has read what is about to change

    const int64_t map_at = (row * op.max_seq_len + step) * op.num_hidden_layers;
    for (int64_t layer = threadIdx.x; layer < op.num_hidden_layers; layer += kThreads) {
        int32_t& run = op.run_ffn[layer * op.batch_size + row];
        float& similarity = op.similarity[layer * op.batch_size + row];
        op.run_map[map_at + layer] = run != 0;
        op.similarity_map[map_at + layer] = similarity;
        run = !done;
        similarity = __uint_as_float(0x7fc00000u);  // NaN
    }
    if (threadIdx.x == 0) {
        op.token_ids[row * op.token_capacity + seq_len] = token;
        op.seq_len[row] = seq_len;
        op.generated[row] = generated;
        op.input_ids[row] = token;
        op.seen[row * op.vocab_size + token] = 1;
        op.active[row] = !done;
        op.skip_remaining[row] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::fence_system();
        reinterpret_cast<int2*>(op.progress)[row] = make_int2(generated, !done);
    }
}

}  // namespace

cudaError_t launch_advance(const Step& step, const LaunchContext& context) {
    const Advance& op = step.ins.advance;
    return launch_kernel(context, advance_kernel, static_cast<unsigned>(op.batch_size), kThreads, 0, op, step.ins.when,
                         context.stamps);
}

}  // namespace skipkernels::cuda
