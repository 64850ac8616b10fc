// qkv (rows, qkv_size) -> query and the paged caches at the row's position: q and k normed, each over all its heads
// together, and rotated; qkv = 0. A task is a row.
#include "heads.h"

namespace skipkernels::SKIPKERNELS_ISA {

int64_t norm_rope_append_tasks(const Instruction&, const Scratch& s) { return s.num_rows; }

constexpr auto norm_rope_append_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

// x (n) in place
static void norm_heads(float* x, int64_t n, const float* norm, float eps) {
    const float scale = rms_scale(x, n, eps);
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] * scale * norm[i];
}

template <class T>
static void append_row(const NormRopeAppend& op, int row) {
    float* qkv = op.qkv + row * op.qkv_size;
    norm_heads(qkv, op.query_size, op.q_norm, op.rms_norm_eps);
    norm_heads(qkv + op.query_size, op.key_size, op.k_norm, op.rms_norm_eps);
    const int64_t rotated = op.num_attention_heads + op.num_key_value_heads;
    const int64_t angles = op.row_position[row] * op.rotary_pairs;
    for (int64_t head = 0; head < rotated + op.num_key_value_heads; ++head) {
        float* x = qkv + head * op.head_dim;
        if (head < rotated) rotate(x, op.rope_cos + angles, op.rope_sin + angles, op.rotary_pairs);
        store_head<T>(op, head, row, x);
    }
    std::memset(qkv, 0, op.qkv_size * sizeof(float));
}

void norm_rope_append_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    with_float_type(ins.cache_dtype, [&](auto type) {
        for (int64_t task = begin; task < end; ++task) append_row<decltype(type)>(ins.norm_rope_append, s.rows[task]);
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
