// q, k, v = qkv_proj (qkv_size, hidden) @ rms_norm(hidden_states) + bias; per-head norm of q and k where given; rotary;
// q -> query, k and v -> the caches at position seq_len. A tile is 8 channels of a head's first half and the 8 they are
// rotated with.
//
// A per-head norm needs the whole head, which is several tiles of several blocks: they leave its channels in scratch,
// and the block that finishes a head's last tile norms, rotates and stores it.
//
// The skip_gate in front of it may be an extra block here: nobody needs its decision before attention has begun, and
// alone it would hold up everything for 3.5 to 5 us (by estimate).
//
// Llama-2-7B, bf16: 12288 x 4096 weights, 101 MB, 23 us at 4.3 TB/s.
#include "linear_kernel.cuh"
#include "ops.h"
#include "skip_gate.cuh"

namespace skipkernels::cuda {

namespace {

template <class T, bool kHeadsNormed>
struct RopeAppend {
    static constexpr bool kNormed = true, kFinishesTiles = kHeadsNormed, kHasExtraBlock = true;
    struct Early {
        float bias, cos, sin;
        int position;
    };
    QkvRopeAppend op;
    int* arrivals;   // (heads of q and k): tiles done of each; kHeadsNormed only, as the next
    float* scratch;  // (batch_size, heads of q and k, head_dim)
    bool wants_extra_block;
    SkipGate gate;

    __device__ int tiles_of_head() const { return static_cast<int>(ceil_div(op.half_head_dim, kRunRows)); }
    __device__ int rotated_heads() const { return static_cast<int>(op.num_attention_heads + op.num_key_value_heads); }
    // The channel in the first half of its head that row r of tile `index` is, or is rotated with.
    __device__ int pair(int index, int r) const { return index % tiles_of_head() * kRunRows + r % kRunRows; }

    __device__ Tile tile(int index) const {
        const int64_t first = index / tiles_of_head() * op.head_dim + pair(index, 0);
        const int count = static_cast<int>(min(int64_t{kRunRows}, op.half_head_dim - pair(index, 0)));
        return {{first, first + op.half_head_dim}, {count, count}};
    }
    __device__ int64_t channel(int index, int r) const {
        return (r < kRunRows ? tile(index).first[0] : tile(index).first[1]) + r % kRunRows;
    }
    __device__ void extra_block(const int32_t* when) const {
        static_assert(kLinearThreads == kGateThreads && kRingBytes >= kGateSharedBytes);
        decide_apart(gate, when);
    }
    __device__ void touch(int index, int row, int r) const {
        if (!tile(index).has(r)) return;
        if (op.qkv_bias) ptx::touch(op.qkv_bias + channel(index, r));
        const int64_t angle = int64_t{ptx::load_relaxed(op.seq_len + row)} * op.half_head_dim + pair(index, r);
        ptx::touch(op.rope_cos + angle), ptx::touch(op.rope_sin + angle);
    }
    __device__ Early early(int index, int row, int r) const {
        Early early{};
        if (!tile(index).has(r)) return early;
        if (op.qkv_bias) early.bias = op.qkv_bias[channel(index, r)];
        early.position = op.seq_len[row];
        const int64_t angle = early.position * op.half_head_dim + pair(index, r);
        early.cos = op.rope_cos[angle], early.sin = op.rope_sin[angle];
        return early;
    }
    __device__ int64_t cache_at(int64_t row, int64_t kv_head, int64_t position) const {
        return ((row * op.num_key_value_heads + kv_head) * op.max_seq_len + position) * op.head_dim;
    }
    __device__ void store(int head, int row, int position, int channel, float value) const {
        if (head < op.num_attention_heads) {
            op.query[(row * op.num_attention_heads + head) * op.head_dim + channel] = value;
            return;
        }
        auto* cache = static_cast<T*>(head < rotated_heads() ? op.k_cache : op.v_cache);
        const int64_t kv_head = (head - op.num_attention_heads) % op.num_key_value_heads;
        store_as(cache + cache_at(row, kv_head, position) + channel, value);
    }
    __device__ void operator()(int index, int row, int r, float value, const Early& early) const {
        const int head = index / tiles_of_head();
        const int channel = pair(index, r) + (r < kRunRows ? 0 : static_cast<int>(op.half_head_dim));
        value += early.bias;
        const float other = __shfl_xor_sync(kAllLanes, value, kRunRows);
        if (row < 0 || !tile(index).has(r)) return;
        if (head >= rotated_heads()) {
            store(head, row, early.position, channel, value);
        } else if (kHeadsNormed) {
            scratch[(int64_t{row} * rotated_heads() + head) * op.head_dim + channel] = value;
        } else {
            const float turned = r < kRunRows ? -other * early.sin : other * early.sin;
            store(head, row, early.position, channel, value * early.cos + turned);
        }
    }

    __device__ void finish_tile(int index, const Rows& rows, int* is_last) const {
        const int head = index / tiles_of_head();
        if (head >= rotated_heads()) return;
        __syncthreads();  // all of the tile is in scratch
        if (threadIdx.x == 0) {
            *is_last = ptx::atomic_add_acq_rel(arrivals + head, 1) == tiles_of_head() - 1;
            if (*is_last) arrivals[head] = 0;
        }
        __syncthreads();
        if (!*is_last) return;
        const float* norm = head < op.num_attention_heads ? op.q_norm : op.k_norm;
        const int half = static_cast<int>(op.half_head_dim), lane = static_cast<int>(threadIdx.x) % 32;
        for (int n = static_cast<int>(threadIdx.x) / 32; n < rows.count(); n += kLinearWarps) {
            const int row = rows.at(n), position = op.seq_len[row];
            const float* x = scratch + (int64_t{row} * rotated_heads() + head) * op.head_dim;
            float scale = 1.0f;
            if (norm) {
                float squares = 0.0f;
                for (int i = lane; i < 2 * half; i += 32) squares = fmaf(x[i], x[i], squares);
                scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(2 * half) + op.rms_norm_eps);
            }
            for (int i = lane; i < half; i += 32) {
                const float first = x[i] * scale * (norm ? norm[i] : 1.0f);
                const float second = x[i + half] * scale * (norm ? norm[i + half] : 1.0f);
                const float cos = op.rope_cos[int64_t{position} * half + i],
                            sin = op.rope_sin[int64_t{position} * half + i];
                store(head, row, position, i, first * cos - second * sin);
                store(head, row, position, i + half, second * cos + first * sin);
            }
        }
    }
};

}  // namespace

cudaError_t launch_qkv_rope_append(const Step& step, const LaunchContext& context) {
    const QkvRopeAppend& op = step.ins.qkv_rope_append;
    return with_weight_type(step.ins.weight_dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t tiles = op.qkv_size / op.head_dim * ceil_div(op.half_head_dim, kRunRows);
        const auto in = make_linear<T>(step, op.qkv_proj, op.hidden_states, op.hidden_size, tiles, op.input_layernorm,
                                       op.rms_norm_eps);
        const bool gated = step.takes_gate_along;
        if (!op.q_norm && !op.k_norm) {
            return launch_linear(in, RopeAppend<T, false>{op, nullptr, nullptr, gated, step.gate}, context);
        }
        return launch_linear(in, RopeAppend<T, true>{op, step.arrivals, step.scratch, gated, step.gate}, context);
    });
}

}  // namespace skipkernels::cuda
