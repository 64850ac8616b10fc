// attn_output (rows, heads, head_dim) = softmax(scaling q k^T) v over the cached positions of each row's own sequence,
// up to the row's and within its window.
//
// A task is (tile of rows of one sequence, key/value head, split of kv_split_size positions): all query heads of the
// group and all rows of a tile share one read of k and v. Keys are transposed block by block, so that a vector holds
// the scores of neighbouring positions and no score costs a sum over lanes. Each split leaves its maximum, its sum and
// its unnormalised output in attn_partials; the thread that finishes a tile's last split merges them in order.
//
// What is computed for a row does not depend on its tile: a score walks head_dim in order, sums over positions have the
// lane of the position in its split, outputs walk the row's own positions in order.
#include "kernels.h"
#include "paged_cache.h"
#include "transpose.h"

namespace skipkernels::SKIPKERNELS_ISA {

using Query = cpu::AttentionQuery;
using Range = cpu::Positions;
using cpu::Scratch;

namespace {

template <class N>
N larger(N a, N b) {
    return a > b ? a : b;
}
template <class N>
N smaller(N a, N b) {
    return a < b ? a : b;
}

// Queries (rows times heads of a group) of one task. More of them share the transposition of a key; 32 make it 5 % of
// the work.
constexpr int kQueries = cpu::kAttentionQueries;
// Queries that share one walk over keys or values; what they accumulate stays in registers.
constexpr int kQueryTile = 4;
// Vectors of positions in a transposed block, and of columns in a walk over values.
constexpr int kVectorTile = Vec::max_accumulators >= 24 ? 4 : 2;
constexpr int kBlock = kVectorTile * Vec::width;
static_assert(kBlock <= cpu::kAttentionBlock);

Range attended(const DecodeAttention& op, int row) {
    const int64_t end = op.row_position[row] + 1;
    return {op.sliding_window && end > op.sliding_window ? end - op.sliding_window : 0, end};
}

struct Splits {
    int64_t first, count;
};

Splits splits_of(const DecodeAttention& op, const Range& range) {
    const int64_t first = range.begin / op.kv_split_size;
    return {first, (range.end - 1) / op.kv_split_size - first + 1};
}

// What the rows [begin, end) of a tile attend to together.
Range attended_by_tile(const DecodeAttention& op, const Scratch& s, int begin, int end) {
    Range all = attended(op, s.rows[begin]);
    for (int i = begin + 1; i < end; ++i) {
        const Range range = attended(op, s.rows[i]);
        all = {smaller(all.begin, range.begin), larger(all.end, range.end)};
    }
    return all;
}

int64_t group_size(const DecodeAttention& op) { return op.num_attention_heads / op.num_key_value_heads; }

// Neighbours in the list that belong to one sequence form tiles.
void make_tiles(const DecodeAttention& op, const Scratch& s) {
    const int64_t most_rows = larger<int64_t>(1, kQueries / group_size(op));
    cpu::RowTiles& tiles = *s.attention.tiles;
    tiles.count = 0;
    tiles.most_splits = 0;
    for (int begin = 0, end = 0; begin < s.num_rows; begin = end) {
        const int32_t sequence = op.row_sequence[s.rows[begin]];
        while (end < s.num_rows && end - begin < most_rows && op.row_sequence[s.rows[end]] == sequence) ++end;
        tiles.begins[tiles.count++] = begin;
        const int64_t splits = splits_of(op, attended_by_tile(op, s, begin, end)).count;
        tiles.most_splits = larger(tiles.most_splits, splits);
    }
    tiles.begins[tiles.count] = s.num_rows;
}

// Calls use(memory of the first position, first position, positions) for each run of neighbours in `cache`.
template <class T, class Use>
inline void for_runs(const PagedCache& where, const T* cache, int64_t kv_head, int64_t begin, int64_t end, Use use) {
    for (int64_t p = begin; p < end;) {
        const int64_t n = smaller(end - p, where.block_size - p % where.block_size);
        use(cache + where.offset(kv_head, p), p, n);
        p += n;
    }
}

// What is fetched into the second-level cache while scores are computed: a position's lines every few steps. Many at
// once the processor drops.
struct Coming {
    const char* const* positions;
    int64_t left, bytes, interval, wait;
    void step() {
        if (left == 0 || --wait > 0) return;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(*positions + i, 0, 2);
        ++positions, --left;
        wait = interval;
    }
};

// scores[g][0 .. V vectors) = scaling <query g, keys>, keys (head_dim, kBlock)
template <int G, int V>
void score_block(const Query* queries, const float* keys, int64_t d, float scaling, int64_t at, Coming coming) {
    Vec sum[G][V];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) sum[g][v] = splat(0.0f);
    for (int64_t j = 0; j < d; ++j) {
        coming.step();
        Vec key[V];
        for (int v = 0; v < V; ++v) key[v] = load(keys + j * kBlock + v * Vec::width);
        for (int g = 0; g < G; ++g) {
            const Vec query = splat(queries[g].at[j]);
            for (int v = 0; v < V; ++v) sum[g][v] = fma(query, key[v], sum[g][v]);
        }
    }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) store(queries[g].scores + at + v * Vec::width, splat(scaling) * sum[g][v]);
}

template <int G, int... V>
void score_vectors(int vectors, std::integer_sequence<int, V...>, const Query* queries, const float* keys, int64_t d,
                   float scaling, int64_t at, const Coming& coming) {
    ((vectors == V + 1 ? score_block<G, V + 1>(queries, keys, d, scaling, at, coming) : void()), ...);
}

template <int... G>
void score_queries(int count, std::integer_sequence<int, G...>, int vectors, const Query* queries, const float* keys,
                   int64_t d, float scaling, int64_t at, const Coming& coming) {
    constexpr std::make_integer_sequence<int, kVectorTile> tiles{};
    ((count == G + 1 ? score_vectors<G + 1>(vectors, tiles, queries, keys, d, scaling, at, coming) : void()), ...);
}

int64_t rounded_down(int64_t n) { return n / Vec::width * Vec::width; }
int64_t rounded_up(int64_t n) { return rounded_down(n + Vec::width - 1); }

void fill(float* p, int64_t begin, int64_t end, float value) {
    for (int64_t i = begin; i < end; ++i) p[i] = value;
}

// scores -> exp(scores - max) over the query's range, in place; max and their sum into the partials
void exponentials(const Query& query) {
    float* scores = query.scores;
    const int64_t begin = query.range.begin, end = query.range.end;
    const int64_t first = rounded_down(begin), last = rounded_up(end);
    fill(scores, first, begin, scores[begin]);
    fill(scores, end, last, scores[begin]);
    Vec most = load(scores + first);
    for (int64_t i = first + Vec::width; i < last; i += Vec::width) most = max(most, load(scores + i));
    alignas(64) float lanes[Vec::width];
    store(lanes, most);
    float largest = lanes[0];
    for (float lane : lanes) largest = larger(largest, lane);
    for (int64_t i = first; i < last; i += Vec::width) store(scores + i, exp(load(scores + i) - splat(largest)));
    fill(scores, first, begin, 0.0f);
    fill(scores, end, last, 0.0f);
    Vec total = splat(0.0f);
    for (int64_t i = first; i < last; i += Vec::width) total = total + load(scores + i);
    query.partials[0] = largest;
    query.partials[1] = reduce_add(total);
}

// Where values stand, and the position the weights of a split count from.
template <class T>
struct Values {
    PagedCache where;
    const T* cache;
    int64_t kv_head, split_begin;
    const T* keys;            // of the next split, to be fetched meanwhile; null: none
    int64_t split_size, end;  // end of what may be fetched

    // The keys `split_size` positions behind n neighbours from p on.
    const char* coming(int64_t p, int64_t n) const {
        if (!keys || p + split_size + n > end) return nullptr;
        return reinterpret_cast<const char*>(keys + where.offset(kv_head, p + split_size));
    }
};

// out[g][0 .. C vectors) += sum over n neighbouring positions of weights[g][first + p] values[p]; a last vector that is
// not Whole has `left` columns. One loop: around two, GCC 12 keeps sums in memory.
template <class T, int G, int C, bool Whole>
void add_columns(const Query* queries, const T* values, int64_t first, int64_t n, int64_t d, int64_t column, int left,
                 const char* coming) {
    auto load_columns = [left](const auto* p) {
        if constexpr (Whole) {
            return load(p);
        } else {
            return load_first(p, left);
        }
    };
    auto out = [&](int g, int c) { return queries[g].partials + 2 + column + c * Vec::width; };
    const float* weights[G];
    Vec sum[G][C];
    for (int g = 0; g < G; ++g) {
        weights[g] = queries[g].scores + first;
        for (int c = 0; c < C; ++c) sum[g][c] = load_columns(out(g, c));
    }
    const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
    for (int64_t p = 0; p < n; ++p) {
        if (coming) {
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(coming + p * bytes + i, 0, 2);
        }
        Vec value[C];
        for (int c = 0; c < C; ++c) value[c] = load_columns(values + p * d + column + c * Vec::width);
        for (int g = 0; g < G; ++g) {
            const Vec weight = splat(weights[g][p]);
            for (int c = 0; c < C; ++c) sum[g][c] = fma(weight, value[c], sum[g][c]);
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int c = 0; c < C; ++c) {
            if constexpr (Whole) {
                store(out(g, c), sum[g][c]);
            } else {
                store_some(out(g, c), sum[g][c], left);
            }
        }
    }
}

// outputs += sum over `range` of weights times values, for G queries
template <class T, int G>
void add_values(const Query* queries, const Values<T>& v, const Range& range) {
    const int64_t d = v.where.head_dim, base = v.split_begin;
    for_runs(v.where, v.cache, v.kv_head, base + range.begin, base + range.end, [&](const T* at, int64_t p, int64_t n) {
        const char* coming = v.coming(p, n);
        int64_t j = 0;
        for (; j + kBlock <= d; j += kBlock, coming = nullptr)
            add_columns<T, G, kVectorTile, true>(queries, at, p - base, n, d, j, Vec::width, coming);
        for (; j + Vec::width <= d; j += Vec::width, coming = nullptr)
            add_columns<T, G, 1, true>(queries, at, p - base, n, d, j, Vec::width, coming);
        if (j < d) add_columns<T, G, 1, false>(queries, at, p - base, n, d, j, static_cast<int>(d - j), coming);
    });
}

Range common(const Range& a, const Range& b) { return {larger(a.begin, b.begin), smaller(a.end, b.end)}; }

// Of the positions in `block`, those that all G queries attend to are walked once; those at the ends, by each alone.
template <class T, int G>
void add_values_of_tile(const Query* queries, const Values<T>& values, const Range& block) {
    Range own[G], shared = block;
    for (int g = 0; g < G; ++g) {
        own[g] = common(block, queries[g].range);
        shared = common(shared, own[g]);
    }
    if (shared.begin >= shared.end) shared = {block.end, block.end};
    for (int g = 0; g < G; ++g) {
        add_values<T, 1>(queries + g, values, {own[g].begin, smaller(own[g].end, shared.begin)});
    }
    add_values<T, G>(queries, values, shared);
    for (int g = 0; g < G; ++g) {
        add_values<T, 1>(queries + g, values, {larger(own[g].begin, shared.end), own[g].end});
    }
}

template <class T, int... G>
void add_values_of(int count, std::integer_sequence<int, G...>, const Query* queries, const Values<T>& values,
                   const Range& block) {
    ((count == G + 1 ? add_values_of_tile<T, G + 1>(queries, values, block) : void()), ...);
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

// The queries of the tile's rows that attend to positions of `split`; returns their number.
int find_queries(const DecodeAttention& op, const Scratch& s, int begin, int end, int64_t kv_head, int64_t split) {
    const int64_t d = op.head_dim, group = group_size(op), size = op.kv_split_size, first = split * size;
    int count = 0;
    for (int i = begin; i < end; ++i) {
        const Range range = attended(op, s.rows[i]);
        const Range own{larger<int64_t>(0, range.begin - first), smaller(size, range.end - first)};
        if (own.begin >= own.end) continue;
        const int64_t number = split - splits_of(op, range).first;
        for (int64_t g = 0; g < group; ++g, ++count) {
            const int64_t head = s.rows[i] * op.num_attention_heads + kv_head * group + g;
            float* partials = op.attn_partials + (head * op.num_splits + number) * (d + 2);
            float* scores = s.attention.scores + count * s.attention.scores_stride;
            s.attention.queries[count] = {op.query + head * d, own, scores, partials};
        }
    }
    return count;
}

// Where one task reads.
template <class T>
struct Split {
    PagedCache where;
    const T *k_cache, *v_cache;
    int64_t kv_head, begin;  // its first position
    int64_t end;             // of what the tile attends to, in this split or a later one

    // Reads a byte of every cache line of `range`: many loads in flight at once, where those of the computation wait
    // for each other. Blocks lie anywhere in memory, and the processor's own prefetches end with a page.
    void fetch(const T* cache, const Range& range) const {
        for_runs(where, cache, kv_head, begin + range.begin, begin + range.end, [&](const T* p, int64_t, int64_t n) {
            const auto* bytes = reinterpret_cast<const volatile char*>(p);
            const auto size = static_cast<int64_t>(sizeof(T)) * n * where.head_dim;
            for (int64_t i = 0; i < size; i += 64) (void)bytes[i];
        });
    }
};

// keys[j][lane] = key of position at + lane of the split, for `block` of them; zeros in the other lanes
template <class T>
void transpose_keys(const Split<T>& split, const Range& block, int64_t at, int vectors, const T** rows, float* keys) {
    for_runs(split.where, split.k_cache, split.kv_head, split.begin + block.begin, split.begin + block.end,
             [&](const T* p, int64_t first, int64_t n) {
                 for (int64_t i = 0; i < n; ++i) rows[first - split.begin - at + i] = p + i * split.where.head_dim;
             });
    for (int v = 0; v < vectors; ++v) {
        transpose(rows + v * Vec::width, split.where.head_dim, keys + v * Vec::width, kBlock);
    }
}

// The queries' exponentials over the positions `all` of the split.
template <class T>
void weigh(const DecodeAttention& op, const Scratch& s, int count, const Split<T>& split, const Range& all) {
    constexpr std::make_integer_sequence<int, kQueryTile> tiles{};
    const Query* queries = s.attention.queries;
    float* keys = s.attention.keys;
    split.fetch(split.k_cache, all);  // the first split of several: those after it were fetched by the one before
    // whole vectors count from the split's first position, so a position's lane is the same for every row
    for (int64_t at = rounded_down(all.begin); at < all.end; at += kBlock) {
        const Range block{larger(at, all.begin), smaller(at + kBlock, all.end)};
        const int vectors = static_cast<int>((block.end - at + Vec::width - 1) / Vec::width);
        const T* rows[kBlock] = {};
        transpose_keys(split, block, at, vectors, rows, keys);
        const char* values[kBlock];  // of the same positions
        const int64_t n = block.end - block.begin, bytes = op.head_dim * static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0; i < n; ++i) {
            values[i] = reinterpret_cast<const char*>(split.v_cache + (rows[block.begin - at + i] - split.k_cache));
        }
        const int64_t interval = larger<int64_t>(1, op.head_dim / kBlock);
        for (int q = 0; q < count; q += kQueryTile) {
            const Coming coming{values, q == 0 ? n : 0, bytes, interval, 1};
            score_queries(smaller(kQueryTile, count - q), tiles, vectors, queries + q, keys, op.head_dim, op.scaling,
                          at, coming);
        }
    }
    for (int q = 0; q < count; ++q) exponentials(queries[q]);
}

// The queries' outputs, of those weights.
template <class T>
void add_up(const DecodeAttention& op, const Scratch& s, int count, const Split<T>& split, const Range& all) {
    constexpr std::make_integer_sequence<int, kQueryTile> tiles{};
    const Query* queries = s.attention.queries;
    Values<T> values{split.where,   split.v_cache,    split.kv_head, split.begin,
                     split.k_cache, op.kv_split_size, split.end};
    for (int q = 0; q < count; ++q) fill(queries[q].partials, 2, op.head_dim + 2, 0.0f);
    for (int64_t at = rounded_down(all.begin); at < all.end; at += kBlock) {
        for (int q = 0; q < count; q += kQueryTile) {
            values.keys = q == 0 ? split.k_cache : nullptr;
            add_values_of(smaller(kQueryTile, count - q), tiles, queries + q, values, {at, at + kBlock});
        }
    }
}

template <class T>
void attend_split(const DecodeAttention& op, const Scratch& s, int begin, int end, int64_t kv_head, int64_t split) {
    const int count = find_queries(op, s, begin, end, kv_head, split);
    if (count == 0) return;
    const Query* queries = s.attention.queries;
    Range all = queries[0].range;
    for (int q = 1; q < count; ++q) {
        all = {smaller(all.begin, queries[q].range.begin), larger(all.end, queries[q].range.end)};
    }
    const Split<T> place{PagedCache(op, op.row_sequence[s.rows[begin]]),
                         static_cast<const T*>(op.k_cache),
                         static_cast<const T*>(op.v_cache),
                         kv_head,
                         split * op.kv_split_size,
                         attended_by_tile(op, s, begin, end).end};
    weigh(op, s, count, place, all);
    add_up(op, s, count, place, all);
}

void merge_rows(const DecodeAttention& op, const Scratch& s, int begin, int end, int64_t kv_head) {
    const int64_t d = op.head_dim, group = group_size(op);
    for (int i = begin; i < end; ++i) {
        const int64_t num_splits = splits_of(op, attended(op, s.rows[i])).count;
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = s.rows[i] * op.num_attention_heads + kv_head * group + g;
            merge_splits(op.attn_partials + head * op.num_splits * (d + 2), num_splits, d, op.attn_output + head * d);
        }
    }
}

}  // namespace

int64_t decode_attention_tasks(const Instruction& ins, const Scratch& s) {
    make_tiles(ins.decode_attention, s);
    return s.attention.tiles->count * ins.decode_attention.num_key_value_heads * s.attention.tiles->most_splits;
}

constexpr auto decode_attention_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

void decode_attention_run(const Instruction& ins, int64_t first, int64_t last, Scratch& s) {
    const DecodeAttention& op = ins.decode_attention;
    const int64_t most_splits = s.attention.tiles->most_splits;
    with_float_type(ins.cache_dtype, [&](auto type) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t tile = task / most_splits / op.num_key_value_heads;
            const int64_t kv_head = task / most_splits % op.num_key_value_heads, split = task % most_splits;
            const int begin = s.attention.tiles->begins[tile], end = s.attention.tiles->begins[tile + 1];
            const Splits splits = splits_of(op, attended_by_tile(op, s, begin, end));
            if (split >= splits.count) continue;
            attend_split<decltype(type)>(op, s, begin, end, kv_head, splits.first + split);
            auto& arrivals = s.attention.arrivals[tile * op.num_key_value_heads + kv_head];
            if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < splits.count) continue;
            arrivals.store(0, std::memory_order_relaxed);
            merge_rows(op, s, begin, end, kv_head);
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
