// Ends a row's step: records what ran, appends the token, moves the row on, ends it or lets it rest, and arms the next
// step. A block is a row; prompt rows end here.
//
// token_ids, run_map, similarity_map and progress lie in the host's memory. The host reads progress while the device
// runs on, so progress is written last, in one piece, and behind a fence.
#include "common.cuh"
#include "ops.h"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 128;

enum Progress : int32_t { kEnded, kDecoding, kWaitsForBlock };  // as in skipkernels/program/state.py

// A prompt row lives for one step.
__device__ void end_prompt_row(const Advance& op, int64_t row) {
    __syncthreads();  // everybody has read the row's flag
    if (threadIdx.x == 0) op.active[row] = 0;
    for (int64_t layer = threadIdx.x; layer < op.num_hidden_layers; layer += kThreads) {
        op.run_ffn[layer * op.num_rows + row] = 0;
    }
}

// A decode row has its token.
__device__ void end_decode_row(const Advance& op, int64_t row) {
    const int32_t token = op.next_token[row], step = op.num_generated[row];
    const int32_t generated = step + 1, position = op.row_position[row] + 1;
    bool ended = generated >= op.max_new_tokens[row] || position >= op.max_seq_len;
    for (int i = 0; i < static_cast<int>(op.max_eos); ++i) ended |= op.eos_token_ids[row * op.max_eos + i] == token;
    const bool waits =
        !ended && op.block_table[row * op.blocks_per_sequence + position / static_cast<int32_t>(op.block_size)] < 0;
    const bool goes_on = !ended && !waits;
    __syncthreads();  // everybody has read what is about to change

    const int64_t map_at = (row * op.max_seq_len + step) * op.num_hidden_layers;
    for (int64_t layer = threadIdx.x; layer < op.num_hidden_layers; layer += kThreads) {
        int32_t& run = op.run_ffn[layer * op.num_rows + row];
        float& similarity = op.similarity[layer * op.num_sequences + row];
        op.run_map[map_at + layer] = run != 0;
        op.similarity_map[map_at + layer] = similarity;
        run = goes_on;
        similarity = __uint_as_float(0x7fc00000u);  // NaN
    }
    if (threadIdx.x == 0) {
        op.token_ids[row * op.token_capacity + position] = token;
        op.row_position[row] = position;
        op.num_generated[row] = generated;
        op.input_ids[row] = token;
        uint8_t& seen = op.seen[row * op.vocab_size + token];
        seen = static_cast<uint8_t>(min((seen | 1) + 2, 255));
        op.active[row] = goes_on;
        op.skip_remaining[row] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::fence_system();
        const Progress now = ended ? kEnded : waits ? kWaitsForBlock : kDecoding;
        reinterpret_cast<int2*>(op.progress)[row] = make_int2(generated, now);
    }
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ Advance op, const int32_t* row_mask, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!row_mask[row]) return;
    if (row < op.num_sequences) {
        end_decode_row(op, row);
    } else {
        end_prompt_row(op, row);
    }
}

}  // namespace

cudaError_t launch_advance(const Step& step, const LaunchContext& context) {
    const Advance& op = step.ins.advance;
    return launch_kernel(context, advance_kernel, static_cast<unsigned>(op.num_rows), kThreads, 0, op,
                         step.ins.row_mask, context.stamps);
}

}  // namespace skipkernels::cuda
