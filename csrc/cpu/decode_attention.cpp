// attn_output (rows, heads, head_dim) = softmax(scaling q k^T) v over the cached positions of each row's own sequence,
// up to the row's and within its window.
//
// A task is (tile of rows of one sequence, split of kv_split_size positions, key/value head): all query heads of the
// group and all rows of a tile share one read of k and v. Many queries share an arrangement, too, block by block: keys
// transposed, so that a vector holds the scores of neighbouring positions and no score costs a sum over lanes; values
// in the numbers that are multiplied (attend.h). Then scores and outputs are the same small matrix product, of a few
// queries at a time. For few queries the same numbers are put together in registers, from keys and values as they lie
// in the cache, and a thread takes several heads of a split together (heads_together). Each split leaves its maximum,
// its sum and its unnormalised output in attn_partials; the thread that finishes a tile's last split merges them in
// order.
//
// What is computed for a row does not depend on its tile: a score walks head_dim in order, sums over positions have the
// lane of the position in its split, outputs walk the row's own positions in order.
#include "activation.h"
#include "attend.h"
#include "each.h"
#include "kernels.h"
#include "paged_cache.h"

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

// Queries (rows times heads of a group) of one task. More of them share the arrangement of a key and a value: 64 took
// 4 % less time than 32 for the rows of a long prompt.
constexpr int kQueries = cpu::kAttentionQueries;
// Queries and vectors of a small product, whose sums stay in registers.
constexpr int kQueryTile = 6;
constexpr int kVectorTile = Vec::max_accumulators / kQueryTile;
constexpr int kKeys = kVectorTile * Vec::width;  // positions whose keys are arranged together
constexpr int kValues = cpu::kAttentionBlock;    // the same of values
constexpr int kFewQueries = 2 * kQueryTile;      // of a key/value head, for which keys and values are not arranged
constexpr int kKeysInPlace = 2 * Vec::width;     // multiplied together
static_assert(kKeys <= kValues && kValues % kKeys == 0);

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

// A matrix, or what lies from one of its elements on.
template <class E>
struct Numbers {
    E* at;
    int64_t stride;
    Numbers from(int64_t row, int64_t column) const { return {at + row * stride + column, stride}; }
};

// out (G, V vectors) = a (G, steps) @ b (steps, V vectors), or += where it adds
template <class T, int G, int V, class E>
void multiply_tile(const Numbers<float>& a, const Numbers<const E>& b, int64_t steps, const Numbers<float>& out,
                   bool adds) {
    auto result = [&](int g, int v) { return out.at + g * out.stride + v * Vec::width; };
    Vec sum[G][V];
    each<G>([&](auto g) SKIPKERNELS_INLINE {
        each<V>([&](auto v) SKIPKERNELS_INLINE { sum[g][v] = adds ? load(result(g, v)) : splat(0.0f); });
    });
    const float* other[G];
    for (int g = 0; g < G; ++g) other[g] = a.at + g * a.stride;
    const E* row = b.at;
    const int64_t stride = b.stride;
    for (int64_t step = 0; step < steps; ++step, row += stride) {
        Vec number[V];
        each<V>([&](auto v) SKIPKERNELS_INLINE { number[v] = Attend<T>::value(row + v * Vec::width, stride); });
        each<G>([&](auto g) SKIPKERNELS_INLINE {
            const Vec factor = splat(other[g][step]);
            each<V>([&](auto v) SKIPKERNELS_INLINE { sum[g][v] = Attend<T>::add(number[v], factor, sum[g][v]); });
        });
    }
    each<G>([&](auto g)
                SKIPKERNELS_INLINE { each<V>([&](auto v) SKIPKERNELS_INLINE { store(result(g, v), sum[g][v]); }); });
}

// out (G, vectors) = a (G, steps) @ b (steps, vectors), or += where it adds
template <class T, int G, class E, int... V>
void multiply_columns(std::integer_sequence<int, V...>, int64_t vectors, const Numbers<float>& a,
                      const Numbers<const E>& b, int64_t steps, const Numbers<float>& out, bool adds) {
    int64_t at = 0;
    for (; vectors >= kVectorTile; vectors -= kVectorTile, at += kVectorTile * Vec::width) {
        multiply_tile<T, G, kVectorTile, E>(a, b.from(0, at), steps, out.from(0, at), adds);
    }
    ((vectors == V + 1 ? multiply_tile<T, G, V + 1, E>(a, b.from(0, at), steps, out.from(0, at), adds) : void()), ...);
}

template <class T, class E, int... G>
void multiply_queries(std::integer_sequence<int, G...>, int queries, int64_t vectors, const Numbers<float>& a,
                      const Numbers<const E>& b, int64_t steps, const Numbers<float>& out, bool adds) {
    constexpr std::make_integer_sequence<int, kVectorTile - 1> kRest{};
    ((queries == G + 1 ? multiply_columns<T, G + 1>(kRest, vectors, a, b, steps, out, adds) : void()), ...);
}

// out (queries <= kQueryTile, vectors) = a (queries, steps) @ b (steps, vectors), or += where it adds
template <class T, class E>
void multiply(int queries, int64_t vectors, const Numbers<float>& a, const Numbers<const E>& b, int64_t steps,
              const Numbers<float>& out, bool adds) {
    constexpr std::make_integer_sequence<int, kQueryTile> kTiles{};
    multiply_queries<T>(kTiles, queries, vectors, a, b, steps, out, adds);
}

// out (G, V vectors of keys) = queries (G, head_dim) @ keys (pointers, `offset` elements on), put side by side in
// registers
template <class T, int G, int V>
void score_tile(const Numbers<float>& queries, const T* const* keys, int64_t offset, int64_t head_dim,
                const Numbers<float>& out) {
    constexpr int kNumbers = Attend<T>::key_numbers;
    Vec sum[G][V];
    each<G>([&](auto g) SKIPKERNELS_INLINE { each<V>([&](auto v) SKIPKERNELS_INLINE { sum[g][v] = splat(0.0f); }); });
    const float* other[G];
    for (int g = 0; g < G; ++g) other[g] = queries.at + g * queries.stride;
    for (int64_t at = 0; at < head_dim; at += kNumbers * Attend<T>::together) {
        Vec number[V][kNumbers];
        each<V>([&](auto v) SKIPKERNELS_INLINE {
            Attend<T>::arrange_some_keys(keys + v * Vec::width, offset + at, number[v]);
        });
        each<kNumbers>([&](auto i) SKIPKERNELS_INLINE {
            each<G>([&](auto g) SKIPKERNELS_INLINE {
                const Vec factor = splat(other[g][i]);
                each<V>([&](auto v)
                            SKIPKERNELS_INLINE { sum[g][v] = Attend<T>::add(number[v][i], factor, sum[g][v]); });
            });
        });
        for (int g = 0; g < G; ++g) other[g] += kNumbers;
    }
    each<G>([&](auto g) SKIPKERNELS_INLINE {
        each<V>([&](auto v) SKIPKERNELS_INLINE { store(out.at + g * out.stride + v * Vec::width, sum[g][v]); });
    });
}

template <class T, int... G>
void score_queries(std::integer_sequence<int, G...>, int count, int64_t vectors, const Numbers<float>& queries,
                   const T* const* keys, int64_t offset, int64_t head_dim, const Numbers<float>& out) {
    constexpr int kMost = kKeysInPlace / Vec::width;
    if (vectors == kMost) {
        ((count == G + 1 ? score_tile<T, G + 1, kMost>(queries, keys, offset, head_dim, out) : void()), ...);
        return;
    }
    for (int64_t at = 0; at < vectors * Vec::width; at += Vec::width) {
        ((count == G + 1 ? score_tile<T, G + 1, 1>(queries, keys + at, offset, head_dim, out.from(0, at)) : void()),
         ...);
    }
}

// out (queries <= kQueryTile, vectors of keys) = queries (queries, head_dim) @ keys (pointers, `offset` elements on)
template <class T>
void score(int count, int64_t vectors, const Numbers<float>& queries, const T* const* keys, int64_t offset,
           int64_t head_dim, const Numbers<float>& out) {
    constexpr std::make_integer_sequence<int, kQueryTile> kTiles{};
    score_queries(kTiles, count, vectors, queries, keys, offset, head_dim, out);
}

// use(first, count) for `queries` in tiles of nearly the same size
template <class Use>
void for_query_tiles(int queries, Use use) {
    const int tiles = (queries + kQueryTile - 1) / kQueryTile;
    for (int tile = 0; tile < tiles; ++tile) {
        const int first = queries * tile / tiles;
        use(first, queries * (tile + 1) / tiles - first);
    }
}

int64_t rounded_down(int64_t n) { return n / Vec::width * Vec::width; }
int64_t rounded_up(int64_t n) { return rounded_down(n + Vec::width - 1); }

void fill(float* p, int64_t begin, int64_t end, float value) {
    for (int64_t i = begin; i < end; ++i) p[i] = value;
}

// scores -> exp(scores - max) over the query's range, in place, then packed; max and their sum into the partials
template <class T>
[[gnu::noinline]] void exponentials(const Query& query, float* scores) {
    const int64_t begin = query.range.begin, end = query.range.end;
    const int64_t first = rounded_down(begin), last = rounded_up(end);
    fill(scores, first, begin, scores[begin]);
    fill(scores, end, last, scores[begin]);
    Vec most = load(scores + first);
    for (int64_t i = first + Vec::width; i < last; i += Vec::width) most = max(most, load(scores + i));
    const float largest = reduce_max(most);
    Vec total = splat(0.0f);
    for (int64_t i = first; i < last; i += Vec::width) {
        Vec value = exp(load(scores + i) - splat(largest));
        store(scores + i, value);
        if (i < begin || i + Vec::width > end) {
            fill(scores, i, smaller(begin, i + Vec::width), 0.0f);
            fill(scores, larger(end, i), i + Vec::width, 0.0f);
            value = load(scores + i);
        }
        total = total + value;
    }
    query.partials[0] = largest;
    query.partials[1] = reduce_add(total);
    Attend<T>::pack_weights(scores, first, last);
}

Range common(const Range& a, const Range& b) { return {larger(a.begin, b.begin), smaller(a.end, b.end)}; }

// What one task computes with; positions count from the split's first.
struct Task {
    const cpu::AttentionScratch& scratch;
    int64_t head_dim;
    int heads;  // key/value heads

    int64_t vectors() const { return (head_dim + Vec::width - 1) / Vec::width; }
    int64_t width() const { return vectors() * Vec::width; }
    Numbers<float> queries(int q) const { return {scratch.packed_queries + q * width(), width()}; }
    Numbers<float> scores(int q) const { return {scratch.scores + q * scratch.scores_stride, scratch.scores_stride}; }
    Numbers<float> outputs(int q) const { return {scratch.outputs + q * width(), width()}; }
    Numbers<const float> keys() const { return {scratch.arranged, kKeys}; }
    Numbers<const float> values() const { return {scratch.arranged, width()}; }
};

// Values of neighbouring positions, arranged or, of one element a number, as they lie.
template <class E>
struct Values {
    Numbers<const E> numbers;
    Range positions;
};

// output += weight times value of position p, which does not fill its number
template <class T, class E>
void add_part(const Task& task, int q, const Values<E>& values, int64_t p) {
    constexpr int64_t together = Attend<T>::together;
    const int64_t step = p / together;
    const Vec weight = splat(task.scores(q).at[step]);
    const E* value = values.numbers.from(step - values.positions.begin / together, 0).at;
    float* out = task.outputs(q).at;
    for (int64_t i = 0; i < task.width(); i += Vec::width) {
        const Vec number = Attend<T>::only(Attend<T>::value(value + i, values.numbers.stride), p % together == 0);
        store(out + i, Attend<T>::add(number, weight, load(out + i)));
    }
}

// outputs of query q += weights times values over `range`
template <class T, class E>
void add_own(const Task& task, int q, const Values<E>& values, const Range& range) {
    constexpr int64_t together = Attend<T>::together;
    for (int64_t p = range.begin; p < range.end;) {
        const int64_t step = p / together, whole = range.end / together - step;
        if (p % together == 0 && whole > 0) {
            const auto from = values.numbers.from(step - values.positions.begin / together, 0);
            multiply<T>(1, task.vectors(), task.scores(q).from(0, step), from, whole, task.outputs(q), true);
            p += whole * together;
        } else {
            if constexpr (together > 1) add_part<T>(task, q, values, p);
            ++p;
        }
    }
}

// Of the positions of `values`, those that all queries of the tile attend to are walked once; those at the ends, by
// each alone.
template <class T, class E>
void add_values(const Task& task, int first, int count, const Values<E>& values) {
    constexpr int64_t together = Attend<T>::together;
    const Query* queries = task.scratch.queries + first;
    const Range& all = values.positions;
    Range shared = all;
    for (int q = 0; q < count; ++q) shared = common(shared, queries[q].range);
    if (shared.begin == all.begin && shared.end == all.end && (all.end - all.begin) % together == 0) {
        return multiply<T>(count, task.vectors(), task.scores(first).from(0, all.begin / together), values.numbers,
                           (all.end - all.begin) / together, task.outputs(first), true);
    }
    int64_t begin = (shared.begin + together - 1) / together, end = shared.end / together;
    if (begin >= end) begin = end = (all.end + together - 1) / together;
    for (int q = 0; q < count; ++q) {
        const Range own = common(all, queries[q].range);
        add_own<T>(task, first + q, values, {own.begin, smaller(own.end, begin * together)});
    }
    multiply<T>(count, task.vectors(), task.scores(first).from(0, begin),
                values.numbers.from(begin - all.begin / together, 0), end - begin, task.outputs(first), true);
    for (int q = 0; q < count; ++q) {
        const Range own = common(all, queries[q].range);
        add_own<T>(task, first + q, values, {larger(own.begin, end * together), own.end});
    }
}

// partials (num_splits, head_dim + 2): max, sum, output -> out (head_dim). A sink is one more score, without a value.
void merge_splits(const float* partials, int64_t num_splits, int64_t d, const float* sink, float* out) {
    float max = sink ? larger(*sink, partials[0]) : partials[0];
    for (int64_t i = 1; i < num_splits; ++i) max = larger(max, partials[i * (d + 2)]);
    float total = sink ? std::exp(*sink - max) : 0;
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    for (int64_t i = 0; i < num_splits; ++i) {
        const float* part = partials + i * (d + 2);
        const float scale = std::exp(part[0] - max);
        total += scale * part[1];
        for (int64_t j = 0; j < d; ++j) out[j] += scale * part[2 + j];
    }
    for (int64_t j = 0; j < d; ++j) out[j] /= total;
}

// Some of a tile's key/value heads in one of its splits.
struct Piece {
    int begin, end;  // the tile's rows
    int64_t split;
    int kv_head, kv_heads;
};

// The queries of the rows that attend to positions of the split, packed, head by head; returns their number for a head.
template <class T>
int find_queries(const DecodeAttention& op, const Scratch& s, const Piece& piece) {
    const Task task{s.attention, op.head_dim, piece.kv_heads};
    const int64_t d = op.head_dim, group = group_size(op), size = op.kv_split_size, first = piece.split * size;
    int count = 0;
    for (int64_t kv_head = piece.kv_head; kv_head < piece.kv_head + piece.kv_heads; ++kv_head) {
        for (int i = piece.begin; i < piece.end; ++i) {
            const Range range = attended(op, s.rows[i]);
            const Range own{larger<int64_t>(0, range.begin - first), smaller(size, range.end - first)};
            if (own.begin >= own.end) continue;
            const int64_t number = piece.split - splits_of(op, range).first;
            for (int64_t g = 0; g < group; ++g, ++count) {
                const int64_t head = s.rows[i] * op.num_attention_heads + kv_head * group + g;
                s.attention.queries[count] = {own, op.attn_partials + (head * op.num_splits + number) * (d + 2)};
                Attend<T>::pack_query(op.query + head * d, d, op.scaling, task.queries(count).at);
            }
        }
    }
    return count / piece.kv_heads;
}

// Where one task reads: its first key/value head; the heads lie one behind the other in a block.
template <class T>
struct Split {
    PagedCache where;
    const T *k_cache, *v_cache;
    int64_t kv_head, begin;  // its first position
    int64_t end;             // of what the tile attends to, in this split or a later one

    int64_t head_stride() const { return where.block_size * where.head_dim; }
    // The first head's element of a position, which counts from the split's first; null behind the end.
    const T* at(const T* cache, int64_t p) const {
        return begin + p < end ? cache + where.offset(kv_head, begin + p) : nullptr;
    }
    // Brings so many neighbouring positions of a head into L2 before others are multiplied. Of requests in every cycle
    // some are dropped; three cycles apart they took a fifth less time, further apart the products waited for them.
    void fetch(const T* p, int64_t positions) const {
        if (!p) return;
        const auto* bytes = reinterpret_cast<const char*>(p);
        const int64_t size = positions * where.head_dim * static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0, zero = 0; i < size; i += 64) {
            __builtin_prefetch(bytes + i + zero, 0, 2);
#if defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2)
            asm volatile("imul %0, %0" : "+r"(zero));
#endif
        }
    }

    // rows[i] = position range.begin + i
    template <class P>
    void find(const T* cache, const Range& range, P* rows) const {
        for_runs(where, cache, kv_head, begin + range.begin, begin + range.end,
                 [&](const T* p, int64_t first, int64_t n) {
                     P* out = rows + (first - begin - range.begin);
                     for (int64_t i = 0; i < n; ++i) out[i] = reinterpret_cast<P>(p + i * where.head_dim);
                 });
    }
};

// Calls use(block, its positions in `all`) for the blocks of positions that `all` meets. Whole vectors count from the
// split's first position, so a position's lane is the same for every row.
template <class Use>
void for_blocks(int64_t size, const Range& all, Use use) {
    for (int64_t at = rounded_down(all.begin); at < all.end; at += size) {
        const Range block{at, at + size};
        use(block, common(block, all));
    }
}

// Few queries of a head are multiplied with keys and values as they lie in the cache, many with arranged ones.
template <class T>
bool keys_in_place(const DecodeAttention& op, int count) {
    return Attend<T>::key_numbers > 0 && count <= kFewQueries &&
           op.head_dim % larger(1, Attend<T>::key_numbers * Attend<T>::together) == 0;
}
template <class T>
bool values_in_place(const DecodeAttention& op, int count) {
    return count <= kFewQueries && op.head_dim % Vec::width == 0 && op.block_size % Attend<T>::together == 0;
}

// keys[i] of the positions `own` of a block of positions; beside them, of as many vectors, any that may be read: their
// scores are never looked at. Returns the number of vectors.
template <class T>
int64_t find_keys(const Split<T>& split, const Range& block, const Range& own, const T** keys) {
    const int64_t first = own.begin - block.begin, end = own.end - block.begin, last = rounded_up(end);
    split.find(split.k_cache, own, keys + first);
    for (int64_t i = 0; i < first; ++i) keys[i] = keys[first];
    for (int64_t i = end; i < last; ++i) keys[i] = keys[first];
    return last / Vec::width;
}

template <class T>
void score_in_place(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    for_blocks(kKeysInPlace, all, [&](const Range& block, const Range& own) {
        const T* keys[kKeysInPlace];
        const int64_t vectors = find_keys(split, block, own, keys), stride = split.head_stride();
        const T* const behind =
            own.end < all.end ? split.at(split.k_cache, own.end) : split.at(split.v_cache, all.begin);
        for (int head = 0; head < task.heads; ++head) {
            split.fetch(head + 1 < task.heads ? keys[0] + (head + 1) * stride : behind, kKeysInPlace);
            for_query_tiles(count, [&](int first, int n) {
                const int q = head * count + first;
                score<T>(n, vectors, task.queries(q), keys, head * stride, op.head_dim,
                         task.scores(q).from(0, block.begin));
            });
        }
    });
}

template <class T>
void score_arranged(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    for_blocks(kKeys, all, [&](const Range& block, const Range& own) {
        const T* keys[kKeys];
        const int64_t vectors = find_keys(split, block, own, keys);
        const T* const behind =
            own.end < all.end ? split.at(split.k_cache, own.end) : split.at(split.v_cache, all.begin);
        for (int head = 0; head < task.heads; ++head) {
            split.fetch(head + 1 < task.heads ? keys[0] + split.head_stride() : behind, kKeys);
            for (int64_t i = 0; i < vectors * Vec::width; i += Vec::width) {
                Attend<T>::arrange_keys(keys + i, op.head_dim, task.scratch.arranged + i, kKeys);
            }
            for (int64_t i = 0; i < vectors * Vec::width; ++i) keys[i] += split.head_stride();
            for_query_tiles(count, [&](int first, int n) {
                const int q = head * count + first;
                multiply<T>(n, vectors, task.queries(q), task.keys(), op.head_dim / Attend<T>::together,
                            task.scores(q).from(0, block.begin), false);
            });
        }
    });
}

// The queries' weights of the positions `all` of the split.
template <class T>
void weigh(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    if constexpr (Attend<T>::key_numbers > 0) {
        if (keys_in_place<T>(op, count)) score_in_place(op, task, count, split, all);
    }
    if (!keys_in_place<T>(op, count)) score_arranged(op, task, count, split, all);
    for (int q = 0; q < task.heads * count; ++q) {
        const Query& query = task.scratch.queries[q];
        float* scores = task.scores(q).at;
        if (op.softcap > 0) soften(scores + query.range.begin, query.range.end - query.range.begin, op.softcap);
        exponentials<T>(query, scores);
    }
}

template <class T>
void add_in_place(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    constexpr int64_t together = Attend<T>::together;
    const int64_t begin = all.begin / together * together;
    for_runs(split.where, split.v_cache, split.kv_head, split.begin + begin, split.begin + all.end,
             [&](const T* p, int64_t first, int64_t n) {
                 const Range positions{first - split.begin, first - split.begin + n};
                 const T* const behind = positions.end < all.end ? split.at(split.v_cache, positions.end)
                                                                 : split.at(split.k_cache, op.kv_split_size);
                 for (int head = 0; head < task.heads; ++head, p += split.head_stride()) {
                     split.fetch(head + 1 < task.heads ? p + split.head_stride() : behind, n);
                     const Values<T> values{{p, together * op.head_dim}, positions};
                     for_query_tiles(count,
                                     [&](int query, int n) { add_values<T>(task, head * count + query, n, values); });
                 }
             });
}

// of one head
template <class T>
void add_arranged(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    constexpr int64_t together = Attend<T>::together;
    for_blocks(kValues, all, [&](const Range& block, const Range& own) {
        const T* rows[kValues] = {};
        split.find(split.v_cache, own, rows + (own.begin - block.begin));
        for (int64_t i = own.begin / together * together - block.begin; i < own.end - block.begin; i += together) {
            Attend<T>::arrange_values(rows + i, op.head_dim, task.scratch.arranged + i / together * task.width());
        }
        for_query_tiles(count,
                        [&](int first, int n) { add_values<T>(task, first, n, Values<float>{task.values(), block}); });
    });
}

// The queries' outputs, of those weights.
template <class T>
void add_up(const DecodeAttention& op, const Task& task, int count, const Split<T>& split, const Range& all) {
    fill(task.outputs(0).at, 0, task.heads * count * task.width(), 0.0f);
    if (values_in_place<T>(op, count)) {
        add_in_place(op, task, count, split, all);
    } else {
        add_arranged(op, task, count, split, all);
    }
    for (int q = 0; q < task.heads * count; ++q) {
        std::memcpy(task.scratch.queries[q].partials + 2, task.outputs(q).at, op.head_dim * sizeof(float));
    }
}

template <class T>
void attend(const DecodeAttention& op, const Scratch& s, const Piece& piece) {
    const int count = find_queries<T>(op, s, piece);
    if (count == 0) return;
    const Query* queries = s.attention.queries;
    Range all = queries[0].range;
    for (int q = 1; q < count; ++q) {
        all = {smaller(all.begin, queries[q].range.begin), larger(all.end, queries[q].range.end)};
    }
    const Split<T> split{PagedCache(op, op.row_sequence[s.rows[piece.begin]]),
                         static_cast<const T*>(op.k_cache),
                         static_cast<const T*>(op.v_cache),
                         piece.kv_head,
                         piece.split * op.kv_split_size,
                         attended_by_tile(op, s, piece.begin, piece.end).end};
    const Task task{s.attention, op.head_dim, piece.kv_heads};
    weigh(op, task, count, split, all);
    add_up(op, task, count, split, all);
}

void merge_rows(const DecodeAttention& op, const Scratch& s, int begin, int end, int64_t kv_head) {
    const int64_t d = op.head_dim, group = group_size(op);
    for (int i = begin; i < end; ++i) {
        const int64_t num_splits = splits_of(op, attended(op, s.rows[i])).count;
        for (int64_t g = 0; g < group; ++g) {
            const int64_t own = kv_head * group + g, head = s.rows[i] * op.num_attention_heads + own;
            merge_splits(op.attn_partials + head * op.num_splits * (d + 2), num_splits, d,
                         op.sinks ? op.sinks + own : nullptr, op.attn_output + head * d);
        }
    }
}

// Tasks [task, last) begin with so many that are heads of one split, to be computed together: a block of the cache
// holds its heads one behind the other, so both are one stream in memory. Head by head every 4 KB came from somewhere
// else, and plain reads took 2.5 times as long. Where there are many queries, their arithmetic takes longer than that.
int heads_together(const DecodeAttention& op, const Scratch& s, int64_t tile, int64_t kv_head, int64_t tasks) {
    const int* begins = s.attention.tiles->begins;
    const int64_t count = (begins[tile + 1] - begins[tile]) * group_size(op);
    if (count > kFewQueries || op.head_dim % Vec::width != 0 || op.block_size % 2 != 0) return 1;
    const int64_t heads = smaller(op.num_key_value_heads - kv_head, tasks);
    return static_cast<int>(smaller(heads, kQueries / count));
}

}  // namespace

int64_t decode_attention_tasks(const Instruction& ins, const Scratch& s) {
    make_tiles(ins.decode_attention, s);
    return s.attention.tiles->count * s.attention.tiles->most_splits * ins.decode_attention.num_key_value_heads;
}

constexpr auto decode_attention_pack = static_cast<decltype(cpu::Kernel::pack)>(nullptr);

void decode_attention_run(const Instruction& ins, int64_t first, int64_t last, Scratch& s) {
    const DecodeAttention& op = ins.decode_attention;
    const int64_t most_splits = s.attention.tiles->most_splits, kv_heads = op.num_key_value_heads;
    with_float_type(ins.cache_dtype, [&](auto type) {
        for (int64_t task = first, heads; task < last; task += heads) {
            const int64_t tile = task / kv_heads / most_splits, split = task / kv_heads % most_splits;
            const int kv_head = static_cast<int>(task % kv_heads);
            heads = heads_together(op, s, tile, kv_head, last - task);
            const int begin = s.attention.tiles->begins[tile], end = s.attention.tiles->begins[tile + 1];
            const Splits splits = splits_of(op, attended_by_tile(op, s, begin, end));
            if (split >= splits.count) continue;
            attend<decltype(type)>(op, s, {begin, end, splits.first + split, kv_head, static_cast<int>(heads)});
            for (int64_t head = kv_head; head < kv_head + heads; ++head) {
                auto& arrivals = s.attention.arrivals[tile * kv_heads + head];
                if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < splits.count) continue;
                arrivals.store(0, std::memory_order_relaxed);
                merge_rows(op, s, begin, end, head);
            }
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
