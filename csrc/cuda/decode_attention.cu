// attn_output (rows, heads, head_dim) = softmax(scaling q k^T) v over the cached positions in the window.
//
// The positions of a row are cut into splits of 64, and these into at most 32 runs of neighbours, by the length alone:
// the result does not depend on how many blocks there are, how large those of the cache are or which other rows there
// are. A work item is (row, run, key/value head), with up to
// kHeads of its query heads, which share one read of k and v. Blocks are persistent and take items in turn. A run
// leaves maximum, sum and unnormalised output in attn_partials; the block that finishes a head's last run merges them
// in order. A row of a single run needs no merge.
//
// For head_dim 128 in bf16 a split is 16 KB of k and 16 KB of v. A block copies one split while it computes the one
// before, and there are two blocks per SM: 64 KB in flight. Llama-2-7B at 8,192 positions reads 134 MB a layer, 31 us
// at 4.3 TB/s; at 128 positions 2 MB.
//
// Blocks without an item are free to fetch the next weights into L2: see Prefetch in kernels.h.
// They do so behind the wait: what is fetched earlier has left the cache by the time it is read, since the
// qkv_rope_append that still runs streams its own weights through it.
#include <algorithm>

#include "attention.cuh"
#include "ops.h"
#include "prefetch.cuh"

namespace skipkernels::cuda {

namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kStagedBytes = 256;  // head_dim in bytes up to which splits are copied to shared memory

template <class T, int V, int kHeads, bool kStaged>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksPerSm)
    decode_attention_kernel(const __grid_constant__ DecodeAttention op, const __grid_constant__ PagedCache cache,
                            const int32_t* row_mask, bool flags_are_settled, bool prefetches_early,
                            const __grid_constant__ Prefetch next, int* arrivals, Stamps stamps) {
    Clock clock(stamps);
    const Attention<T, V, kHeads, kStaged> attention(op, cache);
    auto& shared = attention.shared;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int block = static_cast<int>(blockIdx.x), grid = static_cast<int>(gridDim.x);
    if (!flags_are_settled) ptx::grid_dependency_wait();
    if (thread < 32) {
        const bool has_prompt = attention.items.cut(op, row_mask);
        if (lane == 0) shared.has_prompt = has_prompt;
    }
    __syncthreads();
    const int count = attention.items.count(op);
    if (block >= count) {
        const auto prefetch_next = [&] {
            if (count == 0 || next.max_bytes == 0) return;
            prefetch(next, int64_t{block - count} * kAttentionThreads + thread,
                     int64_t{grid - count} * kAttentionThreads);
        };
        if (prefetches_early) prefetch_next();
        ptx::grid_dependency_wait();
        clock.waited();
        ptx::grid_dependency_launch();
        if (!prefetches_early) prefetch_next();
        return;
    }
    if (thread == 0) shared.item[0] = attention.items.at(op, block);
    __syncthreads();

    // The copies run ahead by one split. Of a sequence without prompt rows only the newest position was written by the
    // kernel before this one: nobody else writes into a block that it attends to.
    const int first_split = shared.item[0].first_split;
    const bool is_old = !shared.has_prompt && !shared.item[0].has_newest(first_split);
    if (is_old) attention.copy(shared.item[0], first_split, 0);
    ptx::grid_dependency_wait();
    clock.waited();
    ptx::grid_dependency_launch();
    if (!is_old) attention.copy(shared.item[0], first_split, 0);

    int stage = 0, turn = 0;
    for (int index = block; index < count; index += grid, turn ^= 1) {
        const AttentionItem &item = shared.item[turn], &next_item = shared.item[turn ^ 1];
        const bool is_last_item = index + grid >= count;
        if (thread == 0 && !is_last_item) shared.item[turn ^ 1] = attention.items.at(op, index + grid);
        attention.load_query(item);
        float max = -INFINITY, sum = 0.0f;
        if (op.sinks && item.run == 0 && warp < item.num_heads) {  // one more score, without a value
            max = op.sinks[item.first_head + warp] * kLog2e, sum = 1.0f;
        }
        typename Attention<T, V, kHeads, kStaged>::Output output = {};
        for (int split = item.first_split; split <= item.last_split; ++split, stage ^= 1) {
            ptx::wait_copies<0>();
            __syncthreads();
            if (split < item.last_split) {
                attention.copy(item, split + 1, stage ^ 1);
            } else if (!is_last_item) {
                attention.copy(next_item, next_item.first_split, stage ^ 1);
            }
            const SplitView<T> view = attention.view(stage);
            attention.score_keys(item, split, view.keys);
            __syncthreads();
            attention.exponentials(warp, lane, max, sum);
            __syncthreads();
            attention.add_values(item, split, view.values, output);
        }
        if (warp < kHeads && lane == 0) shared.max[warp] = max, shared.sum[warp] = sum;
        __syncthreads();  // nobody reads the last stage any more
        attention.add_outputs(output, stage ^ 1, item.num_heads, [&](int head, int channel, float value) {
            if (item.num_runs == 1) {
                attention.result(item, head, channel) = value / shared.sum[head];
                return;
            }
            float* part = attention.partial(item, head, item.run);
            if (channel == 0) part[0] = shared.max[head], part[1] = shared.sum[head];
            part[2 + channel] = value;
        });
        if (item.num_runs > 1 && attention.is_last(item, arrivals)) attention.merge(item);
        __syncthreads();  // before the item and what it left in shared memory are overwritten
    }
}

template <class T, int V, int kHeads, bool kStaged>
cudaError_t launch_attention(const Step& step, const LaunchContext& context) {
    const DecodeAttention& op = step.ins.decode_attention;
    const int64_t most_items = op.num_rows * kMaxRuns * op.num_key_value_heads *
                               ceil_div(op.num_attention_heads / op.num_key_value_heads, kHeads);
    // with weights to prefetch no block is without use
    const int64_t blocks = int64_t{context.num_sms} * kBlocksPerSm;
    const int64_t grid = step.prefetch.max_bytes ? blocks : std::min(most_items, blocks);
    return launch_kernel(context, decode_attention_kernel<T, V, kHeads, kStaged>, static_cast<unsigned>(grid),
                         kAttentionThreads, attention_shared_bytes<T, kHeads, kStaged>(op.head_dim, op.num_rows), op,
                         PagedCache(op), step.ins.row_mask, step.flags_are_settled, step.prefetches_early,
                         step.prefetch, step.arrivals, context.stamps);
}

// The kernel for a group of query heads; larger groups take several items.
template <class T, int V, bool kStaged>
cudaError_t launch_for_group(int64_t group, const Step& step, const LaunchContext& context) {
    if constexpr (kStaged) {
        if (group == 1) return launch_attention<T, V, 1, kStaged>(step, context);
        if constexpr (sizeof(T) == 2) {
            if (group > 4) return launch_attention<T, V, 8, kStaged>(step, context);
        }
    }
    return launch_attention<T, V, 4, kStaged>(step, context);
}

}  // namespace

cudaError_t launch_decode_attention(const Step& step, const LaunchContext& context) {
    const DecodeAttention& op = step.ins.decode_attention;
    const int64_t group = op.num_attention_heads / op.num_key_value_heads;
    return with_float_type(step.ins.cache_dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kVector<T>;
        const bool vectors = op.head_dim % V == 0 && is_aligned(op.k_cache) && is_aligned(op.v_cache);
        if (!vectors) return launch_for_group<T, 1, false>(group, step, context);
        if (op.head_dim * static_cast<int64_t>(sizeof(T)) > kStagedBytes) {
            return launch_for_group<T, V, false>(group, step, context);
        }
        return launch_for_group<T, V, true>(group, step, context);
    });
}

}  // namespace skipkernels::cuda
