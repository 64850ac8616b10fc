// hidden_states (rows, hidden) = scale * embed_tokens (vocab, hidden)[input_ids (rows)]; where a prompt row has no
// token, its row of prompt_embeddings (prompt rows, hidden)
#include <algorithm>

#include "common.cuh"
#include "ops.h"
#include "planes.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kChannelsOfThread = 4;

template <class Weight>
__device__ __forceinline__ void embed_row(const Embed& op, const int32_t* row_mask, Stamps stamps, Weight weight) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.y;
    if (!row_mask[row]) return;
    const int64_t token = op.input_ids[row], prompt_row = row - (op.num_rows - op.num_prompt_rows);
    float* to = op.hidden_states + row * op.hidden_size;
    const int64_t first = int64_t{blockIdx.x} * kThreads * kChannelsOfThread + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kChannelsOfThread; ++i) {
        const int64_t channel = first + i * kThreads;
        if (channel >= op.hidden_size) return;
        to[channel] =
            token < 0 ? op.prompt_embeddings[prompt_row * op.hidden_size + channel] : weight(token, channel) * op.scale;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const __grid_constant__ Embed op, const int32_t* row_mask, Stamps stamps) {
    const T* weights = static_cast<const T*>(op.embed_tokens.data);
    embed_row(op, row_mask, stamps,
              [&](int64_t token, int64_t channel) { return to_float(weights[token * op.hidden_size + channel]); });
}

template <Format kFormat>
__global__ void __launch_bounds__(kThreads)
    embed_blocks_kernel(const __grid_constant__ Embed op, const int32_t* row_mask, const Planes planes, Stamps stamps) {
    embed_row(op, row_mask, stamps, [&](int64_t token, int64_t channel) {
        return weight_at(planes, kFormat, token, static_cast<int>(channel));
    });
}

}  // namespace

cudaError_t launch_embed(const Step& step, const LaunchContext& context) {
    const Embed& op = step.ins.embed;
    const dim3 grid(static_cast<unsigned>(ceil_div(op.hidden_size, kThreads * kChannelsOfThread)),
                    static_cast<unsigned>(op.num_rows));
    if (!is_float(op.embed_tokens.format)) {
        return with_block_format(op.embed_tokens.format, [&](auto format) {
            const Planes planes(op.embed_tokens.data, op.embed_tokens.format, op.vocab_size, op.hidden_size);
            return launch_kernel(context, embed_blocks_kernel<decltype(format)::value>, grid, kThreads, 0, op,
                                 step.ins.row_mask, planes, context.stamps);
        });
    }
    return with_float_type(op.embed_tokens.format, [&](auto type) {
        return launch_kernel(context, embed_kernel<decltype(type)>, grid, kThreads, 0, op, step.ins.row_mask,
                             context.stamps);
    });
}

}  // namespace skipkernels::cuda
