// qkv (rows, qkv_size) -> query and the paged caches at the row's position: q and k normed, each over all its heads
// together, and rotated; qkv = 0.
//
// A block is a row. Of OLMo 2 7B 48 KB are read and as many written, and 32 KB of results: it costs its launch.
#include "block_sum.cuh"
#include "ops.h"
#include "paged_cache.cuh"
#include "rotary.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// 1 / rms of x (n), by the whole block
__device__ float norm_scale_of(const float* x, int64_t n, float eps, float* sums) {
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares = fmaf(x[i], x[i], squares);
    return 1.0f / sqrtf(block_sum(squares, sums) / static_cast<float>(n) + eps);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_rope_append_kernel(const __grid_constant__ NormRopeAppend op, const __grid_constant__ PagedCache cache,
                            const int32_t* row_mask, Stamps stamps) {
    Clock clock(stamps);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    const int64_t row = blockIdx.x;
    if (!row_mask[row]) return;
    auto* sums = reinterpret_cast<float*>(ptx::shared_memory());
    float* qkv = op.qkv + row * op.qkv_size;
    const float query_scale = norm_scale_of(qkv, op.query_size, op.rms_norm_eps, sums);
    const float key_scale = norm_scale_of(qkv + op.query_size, op.key_size, op.rms_norm_eps, sums + kWarps);
    const ChannelPairs channels(op);
    const int heads = static_cast<int>(op.num_attention_heads), kv_heads = static_cast<int>(op.num_key_value_heads);
    const int position = op.row_position[row];
    for (int i = static_cast<int>(threadIdx.x); i < op.qkv_size / 2; i += kThreads) {
        const int head = i / channels.half, pair = i % channels.half;
        const int first_channel = channels.first(pair), second_channel = channels.second(pair);
        float* x = qkv + int64_t{head} * op.head_dim;
        float first = x[first_channel], second = x[second_channel];
        x[first_channel] = 0.0f, x[second_channel] = 0.0f;
        const bool is_query = head < heads;
        if (head < heads + kv_heads) {
            const float* norm =
                is_query ? op.q_norm + int64_t{head} * op.head_dim : op.k_norm + int64_t{head - heads} * op.head_dim;
            const float scale = is_query ? query_scale : key_scale;
            first *= scale * norm[first_channel], second *= scale * norm[second_channel];
            if (channels.rotates(pair)) {
                const int64_t angle = int64_t{position} * op.rotary_pairs + pair;
                const float cos = op.rope_cos[angle], sin = op.rope_sin[angle], before = first;
                first = before * cos - second * sin;
                second = second * cos + before * sin;
            }
        }
        if (is_query) {
            float* to = op.query + (row * heads + head) * op.head_dim;
            to[first_channel] = first, to[second_channel] = second;
            continue;
        }
        auto* to = static_cast<T*>(head < heads + kv_heads ? op.k_cache : op.v_cache) +
                   int64_t{cache.row(op.row_sequence[row], position, (head - heads) % kv_heads)} * op.head_dim;
        store_as(to + first_channel, first), store_as(to + second_channel, second);
    }
}

}  // namespace

cudaError_t launch_norm_rope_append(const Step& step, const LaunchContext& context) {
    const NormRopeAppend& op = step.ins.norm_rope_append;
    return with_float_type(step.ins.cache_dtype, [&](auto type) {
        return launch_kernel(context, norm_rope_append_kernel<decltype(type)>, static_cast<unsigned>(op.num_rows),
                             kThreads, 2 * kWarps * sizeof(float), op, PagedCache(op), step.ins.row_mask,
                             context.stamps);
    });
}

}  // namespace skipkernels::cuda
