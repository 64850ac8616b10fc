// attn_output (batch, heads, head_dim) = softmax(scaling q k^T) v over the cached positions in the window.
//
// A task is (batch row, key/value head, split of kv_split positions): the group's query heads share one read of k and
// v. Each split leaves its maximum, its sum and its unnormalised output in attn_partials; the thread that finishes a
// head's last split merges them in order, so the result is the same for any number of threads.
#include "linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

namespace {

template <class N>
N larger(N a, N b) {
    return a > b ? a : b;
}
template <class N>
N smaller(N a, N b) {
    return a < b ? a : b;
}

struct Range {  // positions one row attends to, and the splits they fall into
    int64_t begin, end, first_split, num_splits;
};

Range attended(const DecodeAttention& op, int row) {
    Range range;
    range.end = op.seq_len[row] + 1;
    range.begin = op.sliding_window && range.end > op.sliding_window ? range.end - op.sliding_window : 0;
    range.first_split = range.begin / op.kv_split;
    range.num_splits = (range.end - 1) / op.kv_split - range.first_split + 1;
    return range;
}

int64_t most_splits(const Instruction& ins) {
    int64_t most = 0;
    for (int64_t row = 0; row < ins.batch_size; ++row) {
        if (ins.when[row]) most = larger(most, attended(ins.decode_attention, static_cast<int>(row)).num_splits);
    }
    return most;
}

template <class T>
float dot(const float* a, const T* b, int64_t n) {
    Vec sum = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) sum = fma(load(a + i), load(b + i), sum);
    float total = reduce_add(sum);
    for (; i < n; ++i) total += a[i] * to_float(b[i]);
    return total;
}

// to += scale * from
template <class T>
void add_scaled(float* to, float scale, const T* from, int64_t n) {
    const Vec factor = splat(scale);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) store(to + i, fma(factor, load(from + i), load(to + i)));
    for (; i < n; ++i) to[i] += scale * to_float(from[i]);
}

float largest(const float* scores, int64_t n) {
    float most = scores[0];
    for (int64_t i = 1; i < n; ++i) most = larger(most, scores[i]);
    return most;
}

// scores (n) -> exp(scores - max) in place; returns their sum
float exponentials(float* scores, float max, int64_t n) {
    float total = 0;
    for (int64_t i = 0; i < n; i += Vec::width) {
        const int left = static_cast<int>(n - i < Vec::width ? n - i : Vec::width);
        alignas(64) float buffer[Vec::width];
        store(buffer, exp(load_first(scores + i, left) - splat(max)));
        for (int j = 0; j < left; ++j) total += scores[i + j] = buffer[j];
    }
    return total;
}

// partials (num_splits, head_dim + 2): max, sum, output -> out (head_dim)
void merge_splits(const float* partials, int64_t num_splits, int64_t d, float* out) {
    float max = partials[0];
    for (int64_t i = 1; i < num_splits; ++i) max = larger(max, partials[i * (d + 2)]);
    float total = 0;
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    for (int64_t i = 0; i < num_splits; ++i) {
        const float* part = partials + i * (d + 2);
        const float scale = std::exp(part[0] - max);
        total += scale * part[1];
        add_scaled(out, scale, part + 2, d);
    }
    for (int64_t j = 0; j < d; ++j) out[j] /= total;
}

template <class T>
void attend_split(const DecodeAttention& op, int row, int64_t kv_head, int64_t split, const Range& range, Scratch& s) {
    const int64_t d = op.head_dim, group = op.num_attention_heads / op.num_key_value_heads;
    const int64_t begin = larger(range.begin, (range.first_split + split) * op.kv_split);
    const int64_t end = smaller(range.end, (range.first_split + split + 1) * op.kv_split);
    const int64_t cache_at = ((row * op.num_key_value_heads + kv_head) * op.max_seq_len) * d;
    const T* keys = static_cast<const T*>(op.k_cache) + cache_at;
    const T* values = static_cast<const T*>(op.v_cache) + cache_at;
    const int64_t first_head = row * op.num_attention_heads + kv_head * group;
    const float* query = op.query + first_head * d;
    float* partials = op.attn_partials + (first_head * op.num_splits + split) * (d + 2);
    const int64_t partials_stride = op.num_splits * (d + 2);

    float* scores = s.head;  // (group, kv_split)
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t g = 0; g < group; ++g) {
            scores[g * op.kv_split + p - begin] = op.scaling * dot(query + g * d, keys + p * d, d);
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        float* part = partials + g * partials_stride;
        float* score = scores + g * op.kv_split;
        part[0] = largest(score, end - begin);
        part[1] = exponentials(score, part[0], end - begin);
        for (int64_t j = 0; j < d; ++j) part[2 + j] = 0;
    }
    for (int64_t p = begin; p < end; ++p) {
        for (int64_t g = 0; g < group; ++g) {
            add_scaled(partials + g * partials_stride + 2, scores[g * op.kv_split + p - begin], values + p * d, d);
        }
    }

    auto& arrivals = s.arrivals[row * op.num_key_value_heads + kv_head];
    if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < range.num_splits) return;
    arrivals.store(0, std::memory_order_relaxed);
    for (int64_t g = 0; g < group; ++g) {
        merge_splits(op.attn_partials + (first_head + g) * partials_stride, range.num_splits, d,
                     op.attn_output + (first_head + g) * d);
    }
}

}  // namespace

int64_t decode_attention_tasks(const Instruction& ins) {
    return cpu::count_rows(ins) * ins.decode_attention.num_key_value_heads * most_splits(ins);
}

void decode_attention_prepare(const Instruction& ins, Scratch& s) { find_rows(ins, s); }

void decode_attention_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DecodeAttention& op = ins.decode_attention;
    const int64_t splits = most_splits(ins);
    with_weight_type(ins.weight_dtype, [&](auto type) {
        for (int64_t task = begin; task < end; ++task) {
            const int row = s.rows[task / splits / op.num_key_value_heads];
            const int64_t kv_head = task / splits % op.num_key_value_heads, split = task % splits;
            const Range range = attended(op, row);
            if (split < range.num_splits) attend_split<decltype(type)>(op, row, kv_head, split, range, s);
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
