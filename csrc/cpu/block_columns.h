// Quantised columns, each a neuron's, that are listed one by one (blocks.h: single columns): y (rows) += columns * x.
//
// Of a block of 32 columns those that are listed are taken four at a time: interleaving their bytes gives quads as in
// interleaved rows, and inner products are the same integers, in whatever order they are added. A column left out has
// an activation of 0, so that a block's sum, and with it every bit of y, is that of all 32 columns.
#pragma once

#include "blocks_linear.h"
#include "neuron_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

// Rows of activations computed together; their sums, of eight groups, stay in registers.
constexpr int kColumnsTogether = Ints::lanes == 16 ? 3 : 2;

// The listed columns of one block of a matrix, and where its scales are.
struct ListedColumns {
    static constexpr int kMostParts = 2;  // q6_k: 16 columns have a scale

    const uint8_t *supers, *scales;
    int64_t block;
    int count, parts;
    const uint8_t* columns[cpu::kBlockColumns];  // of each part from 32 / parts on, in whole quads
    uint8_t places[cpu::kBlockColumns];          // in the block
    int quads[kMostParts];
    bool all;

    int part_begin(int part) const { return part * cpu::kBlockColumns / parts; }
};

// The block's columns among list[0 .. ) (null: all of them), which goes on to list_end; returns the list behind them.
inline const int32_t* list_block(const cpu::BlockTraits& traits, const cpu::ColumnLayout& layout, const uint8_t* data,
                                 int64_t block, const int32_t* list, const int32_t* list_end, ListedColumns& out) {
    const uint8_t* at = data + layout.blocks + block * layout.block_bytes;
    out.supers = data + block / (cpu::kSuperColumns / cpu::kBlockColumns) * layout.super_bytes;
    out.scales = at;
    out.block = block;
    out.count = 0;
    out.parts = traits.scales == cpu::Scales::q6_k ? 2 : 1;
    const int64_t first = block * cpu::kBlockColumns;
    const int part_columns = cpu::kBlockColumns / out.parts;
    int sizes[ListedColumns::kMostParts] = {0, 0};
    auto add = [&](int place) {
        const int part = place / part_columns, to = out.part_begin(part) + sizes[part]++;
        out.columns[to] = at + layout.scale_bytes + place * layout.column_bytes;
        out.places[to] = static_cast<uint8_t>(place);
        ++out.count;
    };
    if (!list) {
        for (int place = 0; place < cpu::kBlockColumns; ++place) add(place);
    } else {
        for (; list < list_end && *list < first + cpu::kBlockColumns; ++list) add(static_cast<int>(*list - first));
    }
    out.all = out.count == cpu::kBlockColumns;
    out.quads[1] = 0;
    for (int part = 0; part < out.parts; ++part) {
        out.quads[part] = (sizes[part] + 3) / 4;
        const int begin = out.part_begin(part);  // quads are filled up with a column that is read anyway, times 0
        for (int i = sizes[part]; i < 4 * out.quads[part]; ++i) out.columns[begin + i] = out.columns[begin];
        for (int i = sizes[part]; i < part_columns; ++i) out.places[begin + i] = cpu::kBlockColumns;
    }
    return list;
}

// A row's activations of the block in the order of the listed columns.
inline const ActivationBlock* in_list_order(const ListedColumns& listed, const ActivationBlock& x,
                                            ActivationBlock& ordered) {
    if (listed.all) return &x;
    int8_t q[cpu::kBlockColumns + 1];
    std::memcpy(q, x.q, cpu::kBlockColumns);
    q[cpu::kBlockColumns] = 0;
    ordered = x;
    for (int i = 0; i < cpu::kBlockColumns; ++i) ordered.q[i] = q[listed.places[i]];
    return &ordered;
}

// Fetches what the next block will read into L2, in the order of addresses.
class ColumnsAhead {
  public:
    ColumnsAhead(const ListedColumns& listed, const cpu::ColumnLayout& layout) : count_(0) {
        if (listed.count == 0) return;
        pieces_[count_++] = {listed.scales, listed.scales + layout.scale_bytes};
        for (int part = 0; part < listed.parts; ++part) {
            for (int i = listed.part_begin(part); i < listed.part_begin(part) + 4 * listed.quads[part]; ++i) {
                if (listed.places[i] == cpu::kBlockColumns) break;
                pieces_[count_++] = {listed.columns[i], listed.columns[i] + layout.column_bytes};
            }
        }
    }
    int64_t lines() const {
        int64_t bytes = 0;
        for (int i = 0; i < count_; ++i) bytes += pieces_[i].end - pieces_[i].at;
        return bytes / cpu::kCodeVector;
    }
    void fetch(int64_t lines) {
        for (; lines > 0 && next_ < count_; --lines) {
            Piece& piece = pieces_[next_];
            __builtin_prefetch(piece.at, 0, 2);
            piece.at += cpu::kCodeVector;
            if (piece.at >= piece.end) ++next_;
        }
    }

  private:
    struct Piece {
        const uint8_t *at, *end;
    };
    Piece pieces_[cpu::kBlockColumns + 1];
    int count_, next_ = 0;
};

// Chunks of rows that a vector of a column's codes holds.
template <int bits>
constexpr int kChunksTogether = bits == 8 ? 1 : 2;

// The bytes of four columns' vectors at an offset, interleaved, at this half of the vectors.
[[gnu::always_inline]] inline void interleaved_at(const uint8_t* const* columns, int64_t offset, int half,
                                                  Ints (&out)[cpu::kChunkGroups]) {
    Ints bytes[4];
    each<4>([&](auto i) SKIPKERNELS_INLINE { bytes[i] = load_bytes(columns[i] + offset + half * 4 * Ints::lanes); });
    interleave_bytes(bytes, out);
}

// Quads of codes of four columns, of every group of the chunks that lie together from `chunk` on.
template <int bits>
[[gnu::always_inline]] inline void load_column_quads(const uint8_t* const* columns, const cpu::ColumnLayout& layout,
                                                     int64_t chunk, int half,
                                                     Ints (&out)[kChunksTogether<bits>][cpu::kChunkGroups]) {
    constexpr int kTogether = kChunksTogether<bits>;
    interleaved_at(columns, chunk / kTogether * cpu::kCodeVector, half, out[0]);
    if constexpr (bits != 8) {
        each<cpu::kChunkGroups>([&](auto k) SKIPKERNELS_INLINE {
            out[1][k] = and_bytes(shift<4>(out[0][k]), 15);
            out[0][k] = and_bytes(out[0][k], 15);
        });
    }
    if constexpr (bits == 5 || bits == 6) {
        constexpr int kUpper = bits - 4, kInVector = 8 / kUpper;
        Ints upper[cpu::kChunkGroups];
        interleaved_at(columns, layout.upper + chunk / kInVector * cpu::kCodeVector, half, upper);
        each<kTogether>([&](auto c) SKIPKERNELS_INLINE {
            const int at = static_cast<int>(chunk % kInVector + c) * kUpper;
            each<cpu::kChunkGroups>([&](auto k) SKIPKERNELS_INLINE {
                const Ints own = and_bytes(shift_right(upper[k], at), (1 << kUpper) - 1);
                out[c][k] = or_bytes(out[c][k], shift<-4>(own));
            });
        });
    }
}

// sums[c][k][n] += the products of listed columns with q, the columns' activations of row n, for group k of chunk c.
template <int bits, int N>
struct ColumnDots {
    static constexpr int kTogether = kChunksTogether<bits>;
    using Quads = Ints[kTogether][cpu::kChunkGroups];

    Ints sums[kTogether][cpu::kChunkGroups][N];

#if defined(SKIPKERNELS_ISA_VNNI) || !(defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2))
    static constexpr bool kIsSigned = false;

    template <class Fetch>
    [[gnu::always_inline]] void add(const uint8_t* const* columns, int quads, const cpu::ColumnLayout& layout,
                                    int64_t chunk, int half, const int8_t* const (&q)[N], Fetch fetch) {
        for (int quad = 0; quad < quads; ++quad) {
            fetch();
            Quads codes;
            load_column_quads<bits>(columns + 4 * quad, layout, chunk, half, codes);
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                const Ints activations = broadcast_quad(q[n] + 4 * quad);
                each_group([&](auto c, auto k) SKIPKERNELS_INLINE {
                    sums[c][k][n] = add_dot(sums[c][k][n], codes[c][k], activations);
                });
            });
        }
    }
#else
    static constexpr bool kIsSigned = Dots<bits, N>::kIsSigned;

    template <class Fetch>
    [[gnu::always_inline]] void add(const uint8_t* const* columns, int quads, const cpu::ColumnLayout& layout,
                                    int64_t chunk, int half, const int8_t* const (&q)[N], Fetch fetch) {
        for (int first = 0; first < quads; first += Dots<bits, N>::kRoom) {
            Ints words[kTogether][cpu::kChunkGroups][N];
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                each_group([&](auto c, auto k) SKIPKERNELS_INLINE { words[c][k][n] = zero_ints(); });
            });
            const int last = first + Dots<bits, N>::kRoom < quads ? first + Dots<bits, N>::kRoom : quads;
            for (int quad = first; quad < last; ++quad) {
                fetch();
                Quads codes;
                load_column_quads<bits>(columns + 4 * quad, layout, chunk, half, codes);
                if constexpr (kIsSigned) {
                    each_group([&](auto c, auto k) SKIPKERNELS_INLINE { codes[c][k] = flip_signs(codes[c][k]); });
                }
                each<N>([&](auto n) SKIPKERNELS_INLINE {
                    const Ints activations = broadcast_quad(q[n] + 4 * quad);
                    each_group([&](auto c, auto k) SKIPKERNELS_INLINE {
                        words[c][k][n] = add_words(words[c][k][n], Dots<bits, N>::products(codes[c][k], activations));
                    });
                });
            }
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                each_group([&](auto c, auto k) SKIPKERNELS_INLINE {
                    sums[c][k][n] = add_ints(sums[c][k][n], multiply_words(words[c][k][n], splat_words(1, 1)));
                });
            });
        }
    }
#endif

    // f(chunk, group) for all of them
    template <class F>
    [[gnu::always_inline]] static void each_group(F f) {
        each<kTogether>(
            [&](auto c) SKIPKERNELS_INLINE { each<cpu::kChunkGroups>([&](auto k) SKIPKERNELS_INLINE { f(c, k); }); });
    }
};

// y (N rows of `stride`, from chunk `first` on) += a block's listed columns * x, over chunks [first, last) of rows;
// `lines` are fetched for every quad of columns
template <Format format, int N>
[[gnu::noinline]] void add_listed_columns(const ListedColumns& listed, const cpu::ColumnLayout& layout,
                                          const ActivationBlock* const (&x)[N], int64_t first, int64_t last,
                                          ColumnsAhead& ahead, int64_t lines, float* y, int64_t stride) {
    constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);
    using ChunkDots = ColumnDots<kTraits.code_bits, N>;
    constexpr int kTogether = ChunkDots::kTogether;
    for (int64_t chunk = first; chunk < last; chunk += kTogether) {
        for (int half = 0; half < kHalves; ++half) {
            for (int part = 0; part < kScaledParts<format>; ++part) {
                const int begin = listed.part_begin(part);
                const int8_t* q[N];
                for (int n = 0; n < N; ++n) q[n] = x[n]->q + begin;
                ChunkDots dots;
                each<N>([&](auto n) SKIPKERNELS_INLINE {
                    const Ints sum = first_sum<format, ChunkDots::kIsSigned>(*x[n], part);
                    ChunkDots::each_group([&](auto c, auto k) SKIPKERNELS_INLINE { dots.sums[c][k][n] = sum; });
                });
                dots.add(listed.columns + begin, listed.quads[part], layout, chunk, half, q,
                         [&]() SKIPKERNELS_INLINE { ahead.fetch(lines); });
                ChunkDots::each_group([&](auto c, auto k) SKIPKERNELS_INLINE {
                    if (kTogether == 2 && c == 1 && chunk + 1 == last) return;  // there is no such chunk
                    const int64_t group = (chunk + c) * cpu::kChunkGroups + k;
                    float* at = y + (chunk + c - first) * cpu::kChunkRows + k * cpu::kLanes + half * Ints::lanes;
                    Vec acc[N];
                    each<N>([&](auto n) SKIPKERNELS_INLINE { acc[n] = load(at + n * stride); });
                    add_scaled<format, N>(listed.supers + group * kTraits.super_bytes(),
                                          listed.scales + group * kTraits.scale_bytes(), part, half * Ints::lanes,
                                          dots.sums[c][k], x, acc);
                    each<N>([&](auto n) SKIPKERNELS_INLINE { store(at + n * stride, acc[n]); });
                });
            }
        }
    }
}

// The same for rows [row, row + n) of the list, n <= kColumnsTogether.
template <Format format, int... N>
inline void add_columns_of(int n, std::integer_sequence<int, N...>, const ListedColumns& listed,
                           const cpu::ColumnLayout& layout, int64_t columns, int row, int64_t first, int64_t last,
                           ColumnsAhead& ahead, int64_t lines, float* y, int64_t stride, const Scratch& s) {
    ActivationBlock ordered[sizeof...(N)];
    const ActivationBlock* blocks[sizeof...(N)];
    for (int i = 0; i < n; ++i) {
        blocks[i] = in_list_order(listed, quantised_row(s, columns, row + i)[listed.block], ordered[i]);
    }
    auto of = [&](auto number) {
        constexpr int kRows = decltype(number)::value;
        const ActivationBlock* x[kRows];
        for (int i = 0; i < kRows; ++i) x[i] = blocks[i];
        add_listed_columns<format, kRows>(listed, layout, x, first, last, ahead, lines, y, stride);
    };
    ((n == N + 1 ? of(std::integral_constant<int, N + 1>{}) : void()), ...);
}

// y (all rows of the list, of `stride`) += a block's listed columns * x, over chunks [first, last) of rows; what the
// next block wants is fetched meanwhile
template <Format format>
inline void add_block_columns(const ListedColumns& listed, const cpu::ColumnLayout& layout, int64_t columns,
                              int64_t first, int64_t last, ColumnsAhead ahead, float* y, int64_t stride,
                              const Scratch& s) {
    const int tiles = (s.num_rows + kColumnsTogether - 1) / kColumnsTogether;
    constexpr int kTogether = kChunksTogether<cpu::block_traits(format).code_bits>;
    const int64_t quads = (last - first + kTogether - 1) / kTogether * kHalves * (listed.quads[0] + listed.quads[1]);
    const int64_t lines = (ahead.lines() + quads - 1) / quads;
    for (int tile = 0; tile < tiles; ++tile) {
        const int row = s.num_rows * tile / tiles, n = s.num_rows * (tile + 1) / tiles - row;
        add_columns_of<format>(n, std::make_integer_sequence<int, kColumnsTogether>{}, listed, layout, columns, row,
                               first, last, ahead, lines, y + row * stride, stride, s);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
