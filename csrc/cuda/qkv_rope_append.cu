// q, k, v = qkv_proj (qkv_size, hidden) @ rms_norm(hidden_states) + bias; per-head norm of q and k where given; rotary;
// q -> query, k and v -> the paged caches at the row's position. A tile is 8 channels of a head and the 8
// they are rotated with, or of those that are not rotated.
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
#include "rotary.cuh"
#include "skip_gate.cuh"

namespace skipkernels::cuda {

namespace {

// The cache holds T, or, where T is void, what the instruction says.
template <class T, bool kHeadsNormed>
struct RopeAppend {
    static constexpr bool kNormed = true, kFinishesTiles = kHeadsNormed, kHasExtraBlock = true;
    struct Turn {
        float cos, sin;
        float scale;  // of a query, by its position
    };
    struct Early {
        float bias;
        Turn turn;
        int cache_row;  // of the row's position and the tile's head
    };
    QkvRopeAppend op;
    PagedCache cache;
    ChannelPairs channels;
    int rotated_tiles, tiles_of_head, rotated_heads;
    int* arrivals;   // (passes, heads of q and k): tiles done of each; kHeadsNormed only, as the next
    float* scratch;  // (num_rows, heads of q and k, head_dim)
    bool wants_extra_block;
    SkipGate gate;
    Format cache_dtype;

    RopeAppend(const Step& step)
        : op(step.ins.qkv_rope_append),
          cache(op),
          channels(op),
          rotated_tiles(static_cast<int>(ceil_div(channels.pairs, kRunRows))),
          tiles_of_head(tiles_of(channels)),
          rotated_heads(static_cast<int>(op.num_attention_heads + op.num_key_value_heads)),
          arrivals(step.arrivals),
          scratch(step.scratch),
          wants_extra_block(step.takes_gate_along),
          gate(step.gate),
          cache_dtype(step.ins.cache_dtype) {}

    static int tiles_of(const ChannelPairs& channels) {
        return static_cast<int>(ceil_div(channels.pairs, kRunRows) +
                                ceil_div(channels.half - channels.pairs, kRunRows));
    }

    // The pair of channels that row r of tile `index` is of.
    __device__ int pair(int index, int r) const {
        const int tile = index % tiles_of_head;
        return (tile < rotated_tiles ? tile * kRunRows : channels.pairs + (tile - rotated_tiles) * kRunRows) +
               r % kRunRows;
    }

    __device__ Tile tile(int index) const {
        const int64_t head = index / tiles_of_head * op.head_dim;
        const int at = pair(index, 0), end = channels.rotates(at) ? channels.pairs : channels.half;
        const int count = min(kRunRows, end - at);
        return {{head + channels.first(at), head + channels.second(at)}, {count, count}};
    }
    __device__ int channel_of_head(int index, int r) const {
        const int at = pair(index, r);
        return r < kRunRows ? channels.first(at) : channels.second(at);
    }
    __device__ int64_t channel(int index, int r) const {
        return index / tiles_of_head * op.head_dim + channel_of_head(index, r);
    }
    __device__ void extra_block(const int32_t* row_mask) const {
        static_assert(kLinearThreads == kGateThreads && kRingBytes >= gate_shared_bytes(kMostRows));
        decide_apart(gate, row_mask);
    }
    __device__ void touch(int index, int row, int r) const {
        if (!tile(index).has(r)) return;
        if (op.qkv_bias) ptx::touch(op.qkv_bias + channel(index, r));
        if (!channels.rotates(pair(index, r))) return;
        const int position = turning_position(row, pair(index, r), ptx::load_relaxed(op.row_position + row));
        const int64_t angle = int64_t{abs(position)} * op.rotary_pairs + pair(index, r);
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
        const float scale = op.query_scale ? op.query_scale[op.row_position[row]] : 1.0f;
        if (!channels.rotates(pair)) return {1.0f, 0.0f, scale};
        const int position = turning_position(row, pair, op.row_position[row]);
        const int64_t angle = int64_t{abs(position)} * op.rotary_pairs + pair;
        const float sin = op.rope_sin[angle];
        return {op.rope_cos[angle], position < 0 ? -sin : sin, scale};
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
        void* to = head < rotated_heads ? op.k_cache : op.v_cache;
        const int64_t at = int64_t{cache_row} * op.head_dim + channel;
        if constexpr (!std::is_void_v<T>) {
            store_as(static_cast<T*>(to) + at, value);
        } else if (cache_dtype == Format::f32) {
            store_as(static_cast<float*>(to) + at, value);
        } else if (cache_dtype == Format::bf16) {
            store_as(static_cast<bf16*>(to) + at, value);
        } else {
            store_as(static_cast<fp16*>(to) + at, value);
        }
    }
    __device__ void operator()(int index, int row, int r, float value, const Early& early) const {
        const int head = index / tiles_of_head;
        const int channel = channel_of_head(index, r);
        value += early.bias;
        const float other = __shfl_xor_sync(kAllLanes, value, kRunRows);
        if (row < 0 || !tile(index).has(r)) return;
        if (head >= rotated_heads) {
            store(head, row, early.cache_row, channel, value);
        } else if (kHeadsNormed) {
            scratch[(int64_t{row} * rotated_heads + head) * op.head_dim + channel] = value;
        } else {
            const float turned = r < kRunRows ? -other * early.turn.sin : other * early.turn.sin;
            const float scale = head < op.num_attention_heads ? early.turn.scale : 1.0f;
            store(head, row, early.cache_row, channel, (value * early.turn.cos + turned) * scale);
        }
    }

    __device__ void finish_tile(int index, Rows& rows) const {
        const int head = index / tiles_of_head, thread = ptx::thread_index();
        if (head >= rotated_heads) return;
        // another block may be a pass ahead; all but the last have kRowsOfPass rows, so no two begin in the same 16
        int* arrived = arrivals + rows.at(0) / kRowsOfPass * rotated_heads + head;
        if (!is_last_block(arrived, tiles_of_head, rows.flag)) return;
        const float* norm = head < op.num_attention_heads ? op.q_norm : op.k_norm;
        const int half = channels.half, lane = thread % 32;
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
                const int low = channels.first(i), high = channels.second(i);
                const float first = x[low] * scale * (norm ? norm[low] : 1.0f);
                const float second = x[high] * scale * (norm ? norm[high] : 1.0f);
                const Turn angle = turn(row, i);
                const float longer = head < op.num_attention_heads ? angle.scale : 1.0f;
                store(head, row, at, low, (first * angle.cos - second * angle.sin) * longer);
                store(head, row, at, high, (second * angle.cos + first * angle.sin) * longer);
            }
        }
    }
};

// A kernel for each part of blocks: v_proj may have another format than q_proj and k_proj.
template <class Epilogue>
cudaError_t launch_parts(const Step& step, Epilogue epilogue, const LaunchContext& context) {
    const QkvRopeAppend& op = step.ins.qkv_rope_append;
    int64_t first_row = 0;
    for (int i = 0; i < op.qkv_proj.num_parts; ++i) {
        const MatrixPart& part = op.qkv_proj.parts[i];
        const cudaError_t error = with_block_format(part.format, [&](auto format) {
            auto in = make_block_linear<decltype(format)::value>(step, part, part, op.hidden_states, op.hidden_size,
                                                                 part.rows / op.head_dim * epilogue.tiles_of_head,
                                                                 op.input_layernorm, op.rms_norm_eps);
            in.first_row[0] = in.first_row[1] = first_row;
            in.first_tile = static_cast<int>(first_row / op.head_dim) * epilogue.tiles_of_head;
            return launch_linear(in, epilogue, context);
        });
        if (error != cudaSuccess) return error;
        first_row += part.rows;
        epilogue.wants_extra_block = false;
    }
    return cudaSuccess;
}

}  // namespace

cudaError_t launch_qkv_rope_append(const Step& step, const LaunchContext& context) {
    const QkvRopeAppend& op = step.ins.qkv_rope_append;
    if (!is_float(op.qkv_proj.format)) {
        if (!op.q_norm && !op.k_norm) return launch_parts(step, RopeAppend<void, false>(step), context);
        return launch_parts(step, RopeAppend<void, true>(step), context);
    }
    return with_float_type(step.ins.cache_dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t tiles = op.qkv_size / op.head_dim * RopeAppend<T, false>::tiles_of(ChannelPairs(op));
        const auto in = make_linear<T>(step, op.qkv_proj.data, op.hidden_states, op.hidden_size, tiles,
                                       op.input_layernorm, op.rms_norm_eps);
        if (!op.q_norm && !op.k_norm) return launch_linear(in, RopeAppend<T, false>(step), context);
        return launch_linear(in, RopeAppend<T, true>(step), context);
    });
}

}  // namespace skipkernels::cuda
