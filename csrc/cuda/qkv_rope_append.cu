// q, k, v = qkv_proj (qkv_size, hidden) @ rms_norm(hidden_states) + bias; per-head norm of q and k where given; rotary;
// q -> query, k and v -> the paged caches at the row's position. A tile is 8 channels of a head's first half and the 8
// they are rotated with.
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
#include "paged_cache.cuh"
#include "skip_gate.cuh"

namespace skipkernels::cuda {

namespace {

template <class T, bool kHeadsNormed>
struct RopeAppend {
    static constexpr bool kNormed = true, kFinishesTiles = kHeadsNormed, kHasExtraBlock = true;
    struct Turn {
        float cos, sin;
    };
    struct Early {
        float bias;
        Turn turn;
        int cache_row;  // of the row's position and the tile's head
    };
    QkvRopeAppend op;
    PagedCache cache;
    int tiles_of_head, rotated_heads;
    int* arrivals;   // (passes, heads of q and k): tiles done of each; kHeadsNormed only, as the next
    float* scratch;  // (num_rows, heads of q and k, head_dim)
    bool wants_extra_block;
    SkipGate gate;

    RopeAppend(const Step& step)
        : op(step.ins.qkv_rope_append),
          cache(op),
          tiles_of_head(static_cast<int>(ceil_div(op.half_head_dim, kRunRows))),
          rotated_heads(static_cast<int>(op.num_attention_heads + op.num_key_value_heads)),
          arrivals(step.arrivals),
          scratch(step.scratch),
          wants_extra_block(step.takes_gate_along),
          gate(step.gate) {}

    // The channel in the first half of its head that row r of tile `index` is, or is rotated with.
    __device__ int pair(int index, int r) const { return index % tiles_of_head * kRunRows + r % kRunRows; }

    __device__ Tile tile(int index) const {
        const int64_t first = index / tiles_of_head * op.head_dim + pair(index, 0);
        const int count = static_cast<int>(min(int64_t{kRunRows}, op.half_head_dim - pair(index, 0)));
        return {{first, first + op.half_head_dim}, {count, count}};
    }
    __device__ int64_t channel(int index, int r) const {
        return (r < kRunRows ? tile(index).first[0] : tile(index).first[1]) + r % kRunRows;
    }
    __device__ void extra_block(const int32_t* row_mask) const {
        static_assert(kLinearThreads == kGateThreads && kRingBytes >= gate_shared_bytes(kMostRows));
        decide_apart(gate, row_mask);
    }
    __device__ void touch(int index, int row, int r) const {
        if (!tile(index).has(r)) return;
        if (op.qkv_bias) ptx::touch(op.qkv_bias + channel(index, r));
        const int position = turning_position(row, pair(index, r), ptx::load_relaxed(op.row_position + row));
        const int64_t angle = int64_t{abs(position)} * op.half_head_dim + pair(index, r);
        ptx::touch(op.rope_cos + angle), ptx::touch(op.rope_sin + angle);
    }
    __device__ Early early(int index, int row, int r) const {
        Early early{};
        if (!tile(index).has(r)) return early;
        if (op.qkv_bias) early.bias = op.qkv_bias[channel(index, r)];
        early.turn = turn(row, pair(index, r));
        early.cache_row = cache_row(index / tiles_of_head, row);
        return early;
    }
    // The position by which a row's pair of channels is turned, given the row's own; backwards where it is negative.
    __device__ int turning_position(int row, int pair, int own) const {
        if (!op.position_axes || row < op.num_sequences) return own;
        return op.prompt_positions[(row - op.num_sequences) * 3 + op.position_axes[pair]];
    }
    __device__ Turn turn(int row, int pair) const {
        const int position = turning_position(row, pair, op.row_position[row]);
        const int64_t angle = int64_t{abs(position)} * op.half_head_dim + pair;
        const float sin = op.rope_sin[angle];
        return {op.rope_cos[angle], position < 0 ? -sin : sin};
    }
    __device__ int cache_row(int head, int row) const {
        if (head < op.num_attention_heads) return 0;
        const auto kv_head = static_cast<int>((head - op.num_attention_heads) % op.num_key_value_heads);
        return cache.row(op.row_sequence[row], op.row_position[row], kv_head);
    }
    __device__ void store(int head, int row, int cache_row, int channel, float value) const {
        if (head < op.num_attention_heads) {
            op.query[(row * op.num_attention_heads + head) * op.head_dim + channel] = value;
            return;
        }
        auto* to = static_cast<T*>(head < rotated_heads ? op.k_cache : op.v_cache);
        store_as(to + int64_t{cache_row} * op.head_dim + channel, value);
    }
    __device__ void operator()(int index, int row, int r, float value, const Early& early) const {
        const int head = index / tiles_of_head;
        const int channel = pair(index, r) + (r < kRunRows ? 0 : static_cast<int>(op.half_head_dim));
        value += early.bias;
        const float other = __shfl_xor_sync(kAllLanes, value, kRunRows);
        if (row < 0 || !tile(index).has(r)) return;
        if (head >= rotated_heads) {
            store(head, row, early.cache_row, channel, value);
        } else if (kHeadsNormed) {
            scratch[(int64_t{row} * rotated_heads + head) * op.head_dim + channel] = value;
        } else {
            const float turned = r < kRunRows ? -other * early.turn.sin : other * early.turn.sin;
            store(head, row, early.cache_row, channel, value * early.turn.cos + turned);
        }
    }

    __device__ void finish_tile(int index, Rows& rows) const {
        const int head = index / tiles_of_head, thread = ptx::thread_index();
        if (head >= rotated_heads) return;
        // another block may be a pass ahead; all but the last have kRowsOfPass rows, so no two begin in the same 16
        int* arrived = arrivals + rows.at(0) / kRowsOfPass * rotated_heads + head;
        if (!is_last_block(arrived, tiles_of_head, rows.flag)) return;
        const float* norm = head < op.num_attention_heads ? op.q_norm : op.k_norm;
        const int half = static_cast<int>(op.half_head_dim), lane = thread % 32;
        for (int n = thread / 32; n < rows.count(); n += kLinearWarps) {
            const int row = rows.at(n);
            const int at = cache_row(head, row);
            const float* x = scratch + (int64_t{row} * rotated_heads + head) * op.head_dim;
            float scale = 1.0f;
            if (norm) {
                float squares = 0.0f;
                for (int i = lane; i < 2 * half; i += 32) squares = fmaf(x[i], x[i], squares);
                scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(2 * half) + op.rms_norm_eps);
            }
            for (int i = lane; i < half; i += 32) {
                const float first = x[i] * scale * (norm ? norm[i] : 1.0f);
                const float second = x[i + half] * scale * (norm ? norm[i + half] : 1.0f);
                const Turn angle = turn(row, i);
                store(head, row, at, i, first * angle.cos - second * angle.sin);
                store(head, row, at, i + half, second * angle.cos + first * angle.sin);
            }
        }
    }
};

}  // namespace

cudaError_t launch_qkv_rope_append(const Step& step, const LaunchContext& context) {
    const QkvRopeAppend& op = step.ins.qkv_rope_append;
    return with_float_type(step.ins.cache_dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t tiles = op.qkv_size / op.head_dim * ceil_div(op.half_head_dim, kRunRows);
        const auto in = make_linear<T>(step, op.qkv_proj.data, op.hidden_states, op.hidden_size, tiles,
                                       op.input_layernorm, op.rms_norm_eps);
        if (!op.q_norm && !op.k_norm) return launch_linear(in, RopeAppend<T, false>(step), context);
        return launch_linear(in, RopeAppend<T, true>(step), context);
    });
}

}  // namespace skipkernels::cuda
