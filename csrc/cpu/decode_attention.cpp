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

int64_t most_splits(const DecodeAttention& op, const Scratch& s) {
    int64_t most = 0;
    for (int i = 0; i < s.num_rows; ++i) most = larger(most, attended(op, s.rows[i]).num_splits);
    return most;
}

// Query heads that share one walk over the keys or values; what they accumulate stays in registers.
constexpr int kHeadTile = 4;
constexpr int kVectorTile = Vec::max_accumulators >= 24 ? 4 : 2;

// scores[g][p] = scaling <query[g], keys[p]> for G heads (rows of d) and n positions
template <class T, int G>
void score_keys(const float* query, const T* keys, int64_t n, int64_t d, float scaling, float* scores,
                int64_t scores_stride) {
    const int64_t whole = d / Vec::width * Vec::width;
    const int left = static_cast<int>(d - whole);
    for (int64_t p = 0; p < n; ++p) {
        const T* key = keys + p * d;
        Vec sum[G];
        for (int g = 0; g < G; ++g) sum[g] = splat(0.0f);
        for (int64_t j = 0; j < whole; j += Vec::width) {
            const Vec k = load(key + j);
            for (int g = 0; g < G; ++g) sum[g] = fma(load(query + g * d + j), k, sum[g]);
        }
        if (left) {
            const Vec k = load_first(key + whole, left);
            for (int g = 0; g < G; ++g) sum[g] = fma(load_first(query + g * d + whole, left), k, sum[g]);
        }
        float total[G];
        if constexpr (G == 4) {
            reduce_add_four(sum, total);
        } else {
            for (int g = 0; g < G; ++g) total[g] = reduce_add(sum[g]);
        }
        for (int g = 0; g < G; ++g) scores[g * scores_stride + p] = scaling * total[g];
    }
}

// out[g][0 .. C vectors) = sum over p of weights[g][p] values[p]; the last vector may be cut to `left` columns
template <class T, int G, int C>
void sum_columns(const float* weights, int64_t weights_stride, const T* values, int64_t n, int64_t d, float* out,
                 int64_t out_stride, int left = Vec::width) {
    Vec sum[G][C];
    for (int g = 0; g < G; ++g)
        for (int c = 0; c < C; ++c) sum[g][c] = splat(0.0f);
    for (int64_t p = 0; p < n; ++p) {
        Vec value[C];
        for (int c = 0; c < C; ++c) {
            const T* at = values + p * d + c * Vec::width;
            value[c] = left == Vec::width ? load(at) : load_first(at, left);
        }
        for (int g = 0; g < G; ++g) {
            const Vec weight = splat(weights[g * weights_stride + p]);
            for (int c = 0; c < C; ++c) sum[g][c] = fma(weight, value[c], sum[g][c]);
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int c = 0; c < C; ++c) {
            if (left == Vec::width) {
                store(out + g * out_stride + c * Vec::width, sum[g][c]);
            } else {
                alignas(64) float buffer[Vec::width];
                store(buffer, sum[g][c]);
                for (int i = 0; i < left; ++i) out[g * out_stride + i] = buffer[i];
            }
        }
    }
}

// out[g] (d) = sum over p of weights[g][p] values[p] for G heads
template <class T, int G>
void sum_values(const float* weights, int64_t weights_stride, const T* values, int64_t n, int64_t d, float* out,
                int64_t out_stride) {
    int64_t j = 0;
    for (; j + kVectorTile * Vec::width <= d; j += kVectorTile * Vec::width)
        sum_columns<T, G, kVectorTile>(weights, weights_stride, values + j, n, d, out + j, out_stride);
    for (; j + Vec::width <= d; j += Vec::width)
        sum_columns<T, G, 1>(weights, weights_stride, values + j, n, d, out + j, out_stride);
    if (j < d)
        sum_columns<T, G, 1>(weights, weights_stride, values + j, n, d, out + j, out_stride, static_cast<int>(d - j));
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
        for (int64_t j = 0; j < d; ++j) out[j] += scale * part[2 + j];
    }
    for (int64_t j = 0; j < d; ++j) out[j] /= total;
}

// One tile of G query heads over one split; leaves max, sum and unnormalised output in their partials.
template <class T, int G>
void attend_heads(const DecodeAttention& op, const float* query, const T* keys, const T* values, int64_t n,
                  float* scores, float* partials, int64_t partials_stride) {
    score_keys<T, G>(query, keys, n, op.head_dim, op.scaling, scores, op.kv_split);
    for (int g = 0; g < G; ++g) {
        float* part = partials + g * partials_stride;
        part[0] = largest(scores + g * op.kv_split, n);
        part[1] = exponentials(scores + g * op.kv_split, part[0], n);
    }
    sum_values<T, G>(scores, op.kv_split, values, n, op.head_dim, partials + 2, partials_stride);
}

template <class T, int... G>
void attend_tile(int heads, std::integer_sequence<int, G...>, const DecodeAttention& op, const float* query,
                 const T* keys, const T* values, int64_t n, float* scores, float* partials, int64_t stride) {
    ((heads == G + 1 ? attend_heads<T, G + 1>(op, query, keys, values, n, scores, partials, stride) : void()), ...);
}

template <class T>
void attend_split(const DecodeAttention& op, int row, int64_t kv_head, int64_t split, const Range& range, Scratch& s) {
    const int64_t d = op.head_dim, group = op.num_attention_heads / op.num_key_value_heads;
    const int64_t begin = larger(range.begin, (range.first_split + split) * op.kv_split);
    const int64_t end = smaller(range.end, (range.first_split + split + 1) * op.kv_split);
    const int64_t cache_at = ((row * op.num_key_value_heads + kv_head) * op.max_seq_len + begin) * d;
    const T* keys = static_cast<const T*>(op.k_cache) + cache_at;
    const T* values = static_cast<const T*>(op.v_cache) + cache_at;
    const int64_t first_head = row * op.num_attention_heads + kv_head * group;
    const int64_t partials_stride = op.num_splits * (d + 2);
    for (int64_t g = 0; g < group; g += kHeadTile) {
        const int heads = static_cast<int>(smaller<int64_t>(kHeadTile, group - g));
        float* partials = op.attn_partials + (first_head + g) * partials_stride + split * (d + 2);
        attend_tile(heads, std::make_integer_sequence<int, kHeadTile>{}, op, op.query + (first_head + g) * d, keys,
                    values, end - begin, s.head, partials, partials_stride);
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

int64_t decode_attention_tasks(const Instruction& ins, const Scratch& s) {
    return s.num_rows * ins.decode_attention.num_key_value_heads * most_splits(ins.decode_attention, s);
}

constexpr auto decode_attention_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

void decode_attention_run(const Instruction& ins, int64_t begin, int64_t end, Scratch& s) {
    const DecodeAttention& op = ins.decode_attention;
    const int64_t splits = most_splits(op, s);
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
