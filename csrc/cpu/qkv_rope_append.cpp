// q, k, v = qkv_proj (qkv_size, hidden) @ rms_norm(hidden_states) + bias; per-head norm of q and k where given; rotary;
// q -> query, k and v -> the paged caches at the row's position. A task is one head of q, k or v.
#include "heads.h"
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t qkv_rope_append_tasks(const Instruction& ins, const Scratch&) {
    return ins.qkv_rope_append.num_attention_heads + 2 * ins.qkv_rope_append.num_key_value_heads;
}

void qkv_rope_append_pack(const Instruction& ins, int begin, int end, Scratch& s) {
    const QkvRopeAppend& op = ins.qkv_rope_append;
    pack_rms_norm(op.qkv_proj, op.hidden_states, op.hidden_size, op.input_layernorm, op.rms_norm_eps, begin, end, s);
}

// rotate() by three axes: each pair has the position of its own, and a negative one rotates backwards.
static void rotate_by_axes(const QkvRopeAppend& op, float* x, const int32_t* positions) {
    const int64_t half = op.rotary_pairs;
    for (int64_t i = 0; i < half; ++i) {
        const int64_t position = positions[op.position_axes[i]], at = (position < 0 ? -position : position) * half + i;
        const float cos = op.rope_cos[at], sin = position < 0 ? -op.rope_sin[at] : op.rope_sin[at];
        const float first = x[i], second = x[i + half];
        x[i] = first * cos - second * sin;
        x[i + half] = second * cos + first * sin;
    }
}

static void rotate_row(const QkvRopeAppend& op, int row, float* x) {
    if (op.position_axes && row >= op.num_sequences) {
        return rotate_by_axes(op, x, op.prompt_positions + (row - op.num_sequences) * op.three);
    }
    const int64_t at = op.row_position[row] * op.rotary_pairs;
    rotate(x, op.rope_cos + at, op.rope_sin + at, op.rotary_pairs);
}

// x (head_dim) of q or k in place: normed where the op norms heads, rotated, scaled by the position
static void prepare(const QkvRopeAppend& op, bool is_query, int row, float* x) {
    if (const float* norm = is_query ? op.q_norm : op.k_norm) {
        const float scale = rms_scale(x, op.head_dim, op.rms_norm_eps);
        for (int64_t i = 0; i < op.head_dim; ++i) x[i] = x[i] * scale * norm[i];
    }
    rotate_row(op, row, x);
    if (!is_query || !op.query_scale) return;
    const float scale = op.query_scale[op.row_position[row]];
    for (int64_t i = 0; i < op.head_dim; ++i) x[i] *= scale;
}

// op_scratch (rows, head_dim), the outputs of one head -> query or a cache
static void store_heads(const Instruction& ins, int64_t head, const Scratch& s) {
    const QkvRopeAppend& op = ins.qkv_rope_append;
    with_float_type(ins.cache_dtype, [&](auto type) {
        for (int i = 0; i < s.num_rows; ++i) {
            float* x = s.op_scratch + i * op.head_dim;
            if (head < op.num_attention_heads + op.num_key_value_heads) {
                prepare(op, head < op.num_attention_heads, s.rows[i], x);
            }
            store_head<decltype(type)>(op, head, s.rows[i], x);
        }
    });
}

// Rows of one head -> op_scratch (rows, head_dim), with the bias.
static void multiply_head(const QkvRopeAppend& op, int64_t head, Scratch& s) {
    const int64_t k = op.hidden_size, d = op.head_dim;
    auto add_bias = [&](int i, int at, const float* values, int n) {
        for (int r = 0; r < n; ++r) {
            s.op_scratch[i * d + at + r] = values[r] + (op.qkv_bias ? op.qkv_bias[head * d + at + r] : 0.0f);
        }
    };
    with_float_type(op.qkv_proj.format, [&](auto type) {
        const auto* w = static_cast<const decltype(type)*>(op.qkv_proj.data) + head * d * k;
        for_panels(w, d, k, 0, num_panels(d), s, [&](int64_t first, int height) {
            for (int i = 0; i < s.num_rows; ++i) {
                add_bias(i, static_cast<int>(first), s.panel + i * cpu::kPanelRows, height);
            }
        });
    });
    if (!is_float(op.qkv_proj.format)) blocks_times_rows(op.qkv_proj, k, head * d, d, s, add_bias);
}

void qkv_rope_append_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    for (int64_t head = begin; head < end; ++head) {
        multiply_head(ins.qkv_rope_append, head, s);
        store_heads(ins, head, s);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
