// What a block of decode_attention does with one work item.
#pragma once

#include "activation.cuh"
#include "attention_items.cuh"
#include "paged_cache.cuh"

namespace skipkernels::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr float kLog2e = 1.44269504f;                 // scores are in powers of two
constexpr int kKeyLanes = 8;                          // lanes that share a key
constexpr int kKeys = kAttentionThreads / kKeyLanes;  // keys a block takes at a time

// Shared memory: two stages of a split's k and v (or, where they are not copied, what the warps' outputs need), then
// these.
template <int kHeads>
struct alignas(16) AttentionShared {
    float scores[kKvSplit][kHeads];  // then their exponentials; in a merge, the weights of the runs
    float factor[kHeads];            // by which a new maximum shrinks what was summed before
    float max[kHeads], sum[kHeads];
    AttentionItem item[2];  // the one at work, and the one after it
    int has_prompt;         // whether a row of this step is a prompt row
    int is_last;
    // [kHeads][head_dim], times scaling and log2(e): what follows; then the rows of the items
    __device__ float* query() { return reinterpret_cast<float*>(this + 1); }
};

template <class T, int kHeads, bool kStaged>
__host__ __device__ constexpr int64_t stage_bytes(int64_t head_dim) {
    const int64_t keys_and_values = 2 * kKvSplit * head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t outputs = kAttentionWarps * kHeads * head_dim * static_cast<int64_t>(sizeof(float));
    return kStaged && keys_and_values > outputs ? keys_and_values : outputs;
}
template <class T, int kHeads, bool kStaged>
constexpr int64_t attention_shared_bytes(int64_t head_dim, int64_t num_rows) {
    return (kStaged ? 2 : 1) * stage_bytes<T, kHeads, kStaged>(head_dim) +
           static_cast<int64_t>(sizeof(AttentionShared<kHeads>)) +
           kHeads * head_dim * static_cast<int64_t>(sizeof(float)) +
           num_rows * static_cast<int64_t>(sizeof(AttentionRow));
}

// N neighbouring elements in one load, aligned to their size.
template <class T, int N>
__device__ __forceinline__ void load_elements(const T* from, float (&to)[N]) {
    struct alignas(N * sizeof(T)) Bits {
        T element[N];
    };
    const Bits bits = *reinterpret_cast<const Bits*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(bits.element[i]);
}

// Where a block reads a split, in shared memory or in the cache itself: see Attention::offset.
template <class T>
struct SplitView {
    const T *keys, *values;
};

template <class T, int V, int kHeads, bool kStaged>
struct Attention {
    // A lane adds up kLanePieces pieces of kPiece channels of v, 32 pieces apart: copied heads have up to 128 channels,
    // others up to 256.
    static constexpr int kPiece = V == 1 ? 1 : 4, kLanePieces = (kStaged ? 4 : 8) / kPiece;

    const DecodeAttention& op;
    int head_dim;
    char* memory;
    AttentionShared<kHeads>& shared;
    const AttentionItems<kHeads> items;
    const PagedCache& cache;

    __device__ Attention(const DecodeAttention& op, const PagedCache& cache)
        : op(op),
          head_dim(static_cast<int>(op.head_dim)),
          memory(ptx::shared_memory()),
          shared(*reinterpret_cast<AttentionShared<kHeads>*>(memory + (kStaged ? 2 : 1) * stage(1))),
          items{reinterpret_cast<AttentionRow*>(shared.query() + kHeads * head_dim), static_cast<int>(op.num_rows)},
          cache(cache) {}

    __device__ int64_t stage(int number) const { return number * stage_bytes<T, kHeads, kStaged>(head_dim); }
    __device__ SplitView<T> view(int number) const {
        if constexpr (kStaged) {
            const T* keys = reinterpret_cast<const T*>(memory + stage(number));
            return {keys, keys + kKvSplit * head_dim};
        } else {
            return {static_cast<const T*>(op.k_cache), static_cast<const T*>(op.v_cache)};
        }
    }
    // Of a position of a split, counted from its beginning, in a view.
    __device__ auto offset(const AttentionItem& item, int split, int position) const {
        if constexpr (kStaged) {
            return position * head_dim;
        } else {
            return int64_t{cache.row(item.sequence, split * kKvSplit + position, item.kv_head)} * head_dim;
        }
    }

    // Begins to copy a split's positions; those of a cache block are neighbours.
    __device__ void copy(const AttentionItem& item, int split, int number) const {
        if constexpr (!kStaged) return;
        const SplitView<T> to = view(number);
        const int pieces = head_dim / V, end = item.last_position(split), thread = static_cast<int>(threadIdx.x);
        for (int first = item.first_position(split), count; first < end; first += count) {
            const int position = split * kKvSplit + first;
            count = min(end - first, cache.left_in_block(position));
            const int64_t from = int64_t{cache.row(item.sequence, position, item.kv_head)} * head_dim;
            const int at = first * head_dim;
            for (int i = thread; i < count * pieces; i += kAttentionThreads) {
                ptx::copy_async(const_cast<T*>(to.keys) + at + i * V, static_cast<const T*>(op.k_cache) + from + i * V);
            }
            for (int i = thread; i < count * pieces; i += kAttentionThreads) {
                ptx::copy_async(const_cast<T*>(to.values) + at + i * V,
                                static_cast<const T*>(op.v_cache) + from + i * V);
            }
        }
        ptx::commit_copies();
    }

    __device__ void load_query(const AttentionItem& item) const {
        const float* query = op.query + (int64_t{item.row} * op.num_attention_heads + item.first_head) * head_dim;
        for (int i = static_cast<int>(threadIdx.x); i < kHeads * head_dim; i += kAttentionThreads) {
            shared.query()[i] = i < item.num_heads * head_dim ? query[i] * (op.scaling * kLog2e) : 0.0f;
        }
    }

    // scores[h][p] = <query[h], keys[p]>; eight lanes share a key, and take its pieces in turn.
    __device__ void score_keys(const AttentionItem& item, int split, const T* keys) const {
        const int begin = item.first_position(split), end = item.last_position(split);
        const int part = static_cast<int>(threadIdx.x) % kKeyLanes;
        for (int first = 0; first < kKvSplit; first += kKeys) {
            const int position = first + static_cast<int>(threadIdx.x) / kKeyLanes;
            const bool attended = position >= begin && position < end;
            float sum[kHeads] = {};
            const T* own = keys + (attended ? offset(item, split, position) : 0);
            for (int channel = part * V; attended && channel < head_dim; channel += kKeyLanes * V) {
                float key[V];
                load_elements(own + channel, key);
#pragma unroll
                for (int h = 0; h < kHeads; ++h) {
                    float query[V];
                    load_floats(shared.query() + h * head_dim + channel, query);
#pragma unroll
                    for (int i = 0; i < V; ++i) sum[h] = fmaf(query[i], key[i], sum[h]);
                }
            }
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
#pragma unroll
                for (int lanes = kKeyLanes / 2; lanes; lanes /= 2) {
                    sum[h] += __shfl_xor_sync(kAllLanes, sum[h], lanes);
                }
                if (op.softcap > 0.0f) sum[h] = softened(op.softcap * kLog2e, sum[h]);
                if (part == 0) shared.scores[position][h] = attended ? sum[h] : -INFINITY;
            }
        }
    }

    // Turns the scores of head `warp` into exponentials, relative to the maximum so far.
    __device__ void exponentials(int warp, int lane, float& max_so_far, float& sum_so_far) const {
        static_assert(kHeads <= kAttentionWarps && kKvSplit == 64);
        if (warp >= kHeads) return;
        float &first = shared.scores[lane][warp], &second = shared.scores[lane + 32][warp];
        const float max_now = fmaxf(max_so_far, warp_max(fmaxf(first, second)));
        const float factor = exp2f(max_so_far - max_now);
        first = exp2f(first - max_now), second = exp2f(second - max_now);
        sum_so_far = sum_so_far * factor + warp_sum(first + second);
        max_so_far = max_now;
        if (lane == 0) shared.factor[warp] = factor;
    }

    // The lanes of a warp are cut into groups, each with a value of its own at a time: as many lanes as a head has
    // pieces, rounded up to a power of two.
    __device__ int group_lanes() const {
        int lanes = 1;
        while (lanes < 32 && lanes * kPiece < head_dim) lanes *= 2;
        return lanes;
    }

    using Output = float[kHeads][kLanePieces][kPiece];

    __device__ void add_values(const AttentionItem& item, int split, const T* values, Output& output) const {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int lanes = group_lanes(), groups = 32 / lanes, first_channel = lane % lanes * kPiece;
        const int begin = item.first_position(split), end = item.last_position(split);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
            for (int j = 0; j < kLanePieces; ++j) {
#pragma unroll
                for (float& sum : output[h][j]) sum *= shared.factor[h];
            }
        }
        // counted from the split's beginning, so that a warp's share does not depend on the window
        for (int position = warp * groups + lane / lanes; position < end; position += kAttentionWarps * groups) {
            if (position < begin) continue;
            const T* own = values + offset(item, split, position);
            float weight[kHeads];
            load_floats(shared.scores[position], weight);
#pragma unroll
            for (int j = 0; j < kLanePieces; ++j) {
                const int channel = first_channel + j * 32 * kPiece;
                if (channel >= head_dim) break;
                float value[kPiece];
                load_elements(own + channel, value);
#pragma unroll
                for (int h = 0; h < kHeads; ++h) {
#pragma unroll
                    for (int i = 0; i < kPiece; ++i) output[h][j][i] = fmaf(weight[h], value[i], output[h][j][i]);
                }
            }
        }
    }

    // Adds up what the warps have in the order of the warps and hands each sum to take(head, channel, sum); a stage
    // that nobody uses is where they leave it, [warp][head][channel].
    template <class Take>
    __device__ void add_outputs(Output& output, int free_stage, int num_heads, Take take) const {
        auto* outputs = reinterpret_cast<float*>(memory + (kStaged ? stage(free_stage) : 0));
        const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
        const int lanes = group_lanes();
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
            for (int j = 0; j < kLanePieces; ++j) {
                const int channel = lane * kPiece + j * 32 * kPiece;
#pragma unroll
                for (int i = 0; i < kPiece; ++i) {
                    float sum = output[h][j][i];
                    for (int distance = 16; distance >= lanes; distance /= 2) {
                        sum += __shfl_xor_sync(kAllLanes, sum, distance);
                    }
                    if (lane < lanes && channel < head_dim) outputs[(warp * kHeads + h) * head_dim + channel + i] = sum;
                }
            }
        }
        __syncthreads();
        for (int i = thread; i < num_heads * head_dim; i += kAttentionThreads) {
            float sum = 0.0f;
            for (int w = 0; w < kAttentionWarps; ++w) sum += outputs[w * kHeads * head_dim + i];
            take(i / head_dim, i % head_dim, sum);
        }
    }

    __device__ float* partial(const AttentionItem& item, int head, int run) const {
        const int64_t head_of_all = int64_t{item.row} * op.num_attention_heads + item.first_head + head;
        return op.attn_partials + (head_of_all * op.num_splits + run) * op.partial_size;
    }
    __device__ float& result(const AttentionItem& item, int head, int channel) const {
        const int64_t head_of_all = int64_t{item.row} * op.num_attention_heads + item.first_head + head;
        return op.attn_output[head_of_all * head_dim + channel];
    }

    // Counts the item's run as done; true in the block that finds all of them so.
    __device__ bool is_last(const AttentionItem& item, int* arrivals) const {
        return is_last_block(arrivals + item.arrival, item.num_runs, shared.is_last);
    }

    __device__ void merge(const AttentionItem& item) const {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        static_assert(kMaxRuns <= 32);
        if (warp < item.num_heads) {
            const float* part = partial(item, warp, min(lane, item.num_runs - 1));
            const float max = warp_max(part[0]);
            const float weight = lane < item.num_runs ? exp2f(part[0] - max) : 0.0f;
            const float total = warp_sum(weight * part[1]);
            shared.scores[lane][warp] = weight / total;
        }
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < item.num_heads * head_dim; i += kAttentionThreads) {
            const int head = i / head_dim, channel = i % head_dim;
            const float* part = partial(item, head, 0) + 2 + channel;
            float sum = 0.0f;
#pragma unroll 8
            for (int run = 0; run < item.num_runs; ++run) {
                sum = fmaf(shared.scores[run][head], part[run * op.partial_size], sum);
            }
            result(item, head, channel) = sum;
        }
    }
};

}  // namespace skipkernels::cuda
