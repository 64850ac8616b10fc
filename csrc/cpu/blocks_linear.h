// The matrix kernel for quantised weights: groups of 16 rows (blocks.h) times activations in int8.
//
// A row of activations is quantised once, in blocks of 32 with an fp32 scale and the block's sums: what a code's offset
// or minimum contributes is a product with a sum. Inner products are integers, exact until a block's end; then they are
// scaled and added in fp32, block after block in order. So a row gets bitwise what it gets alone, and every instruction
// set multiplies the same integers.
//
// Without VNNI, products of bytes are added in pairs to 16 bits. Codes of 4 bits leave room for all eight quads of a
// block there (16 * 15 * 127 < 2^15), 5 bits for four, 6 bits for two; 8 bits go through sign and magnitude.
#pragma once

#include <type_traits>
#include <utility>

#include "blocks.h"
#include "int8_vec.h"
#include "kernels.h"

namespace skipkernels::SKIPKERNELS_ISA {

using cpu::Scratch;

struct ActivationBlock {
    int8_t q[cpu::kBlockColumns];
    float scale, scaled_sum;  // x is about scale * q; scale * (sum of q)
    int16_t sums[2];          // of the first 16 q, and of the others
};
static_assert(sizeof(ActivationBlock) <= cpu::kBlockColumns * sizeof(float), "packed activations fit where floats do");

// Rows of activations computed together; their sums stay in registers.
constexpr int kMostTogether = Ints::lanes == 16 ? 8 : 4;
// Weights are prefetched into L2 this far ahead: groups follow each other without a gap, but the hardware's own
// prefetching stops at pages. The distance is a choice; runs differed more than 4, 8 and 16 KB did.
constexpr int64_t kAheadBytes = 8192;
constexpr float kSmallestActivation = 1e-30f;  // a block below it is zero: 127 / x would be infinite

// x[0..32) * factor * norm -> a block
inline void quantise_block(const float* x, float factor, const float* norm, ActivationBlock& out) {
    constexpr int kVecs = cpu::kBlockColumns / Vec::width;
    Vec values[kVecs], largest = splat(0.0f);
    for (int i = 0; i < kVecs; ++i) {
        values[i] = load(x + i * Vec::width) * splat(factor);
        if (norm) values[i] = values[i] * load(norm + i * Vec::width);
        largest = max(largest, abs(values[i]));
    }
    const float most = reduce_max(largest);
    const Vec inverse = splat(most >= kSmallestActivation ? 127.0f / most : 0.0f);
    for (int i = 0; i < kVecs; ++i) store_rounded(out.q + i * Vec::width, values[i] * inverse);
    int sums[2] = {0, 0};
    for (int i = 0; i < cpu::kBlockColumns; ++i) sums[i / 16] += out.q[i];
    out.scale = most / 127.0f;
    out.scaled_sum = out.scale * static_cast<float>(sums[0] + sums[1]);
    out.sums[0] = static_cast<int16_t>(sums[0]), out.sums[1] = static_cast<int16_t>(sums[1]);
}

inline int64_t activation_blocks(int64_t columns) { return columns / cpu::kBlockColumns; }

inline ActivationBlock* quantised_row(const Scratch& s, int64_t columns, int index) {
    return reinterpret_cast<ActivationBlock*>(s.x) + index * activation_blocks(columns);
}

// Rows [begin, end) of the list, each row of source times scale(row) * norm.
template <class Scale>
inline void quantise_rows(const float* source, int64_t columns, const float* norm, Scale scale, int begin, int end,
                          Scratch& s) {
    for (int i = begin; i < end; ++i) {
        const float* row = source + s.rows[i] * columns;
        const float factor = scale(row);
        ActivationBlock* out = quantised_row(s, columns, i);
        for (int64_t at = 0; at < columns; at += cpu::kBlockColumns) {
            quantise_block(row + at, factor, norm ? norm + at : nullptr, *out++);
        }
    }
}

// The codes of quad j of a block; `codes` is the block's first vector, at this half of the lanes.
template <int bits, int j>
inline Ints quad_of(const uint8_t* codes) {
    auto vector = [codes](int index) { return load_bytes(codes + index * cpu::kCodeVector); };
    if constexpr (bits == 8) {
        return vector(j);
    } else {
        const Ints low = and_bytes(shift < j<4 ? 0 : 4>(vector(j % 4)), 15);
        if constexpr (bits == 4) return low;
        if constexpr (bits == 5) return or_bytes(low, and_bytes(shift<j - 4>(vector(4)), 16));
        if constexpr (bits == 6) return or_bytes(low, and_bytes(shift<2 * (j % 4) - 4>(vector(4 + j / 4)), 48));
    }
}

// Sums of products of codes and activations: N rows, `lanes` lanes.
template <int bits, int N>
struct Dots {
    Ints sums[N];

#if defined(SKIPKERNELS_ISA_VNNI) || !(defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2))
    static constexpr bool kIsSigned = false;
    template <int first, int last>
    void add(const uint8_t* codes, const ActivationBlock* const (&x)[N]) {
        if constexpr (first < last) {
            const Ints quad = quad_of<bits, first>(codes);
            for (int n = 0; n < N; ++n) sums[n] = add_dot(sums[n], quad, broadcast_quad(x[n]->q + 4 * first));
            add<first + 1, last>(codes, x);
        }
    }
#else
    static constexpr bool kIsSigned = bits == 8;  // codes lose their offset before they are multiplied
    // quads whose products a 16-bit sum holds
    static constexpr int kRoom = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;

    template <int first, int last>
    void add(const uint8_t* codes, const ActivationBlock* const (&x)[N]) {
        if constexpr (first < last) {
            constexpr int stop = first + kRoom < last ? first + kRoom : last;
            Ints words[N];
            add_words_of<first, stop, true>(codes, x, words);
            for (int n = 0; n < N; ++n) sums[n] = add_ints(sums[n], multiply_words(words[n], splat_words(1, 1)));
            add<stop, last>(codes, x);
        }
    }

  private:
    template <int at, int stop, bool is_first>
    static void add_words_of(const uint8_t* codes, const ActivationBlock* const (&x)[N], Ints (&words)[N]) {
        if constexpr (at < stop) {
            const Ints quad = quad_of<bits, at>(codes);
            for (int n = 0; n < N; ++n) {
                const Ints activations = broadcast_quad(x[n]->q + 4 * at);
                Ints products;
                if constexpr (kIsSigned) {
                    const Ints weights = flip_signs(quad);
                    products = multiply_bytes(magnitude(weights), with_sign_of(activations, weights));
                } else {
                    products = multiply_bytes(quad, activations);
                }
                words[n] = is_first ? products : add_words(words[n], products);
            }
            add_words_of<at + 1, stop, false>(codes, x, words);
        }
    }
#endif
};

// What the offset of a code takes off: -offset * the sum of a block's activations, or of the half given.
template <int offset>
inline Ints offset_sum(const ActivationBlock& x, bool first, bool second) {
    if constexpr (offset == 0) return zero_ints();
    return multiply_words(broadcast_quad(reinterpret_cast<const int8_t*>(x.sums)),
                          splat_words(first ? -offset : 0, second ? -offset : 0));
}

inline Vec load_halves(const uint8_t* p) { return load(reinterpret_cast<const fp16*>(p)); }

// One block of columns, `Ints::lanes` lanes from `lane` on: acc[n] += weights * x[n].
template <Format format, int N>
inline void add_block(const uint8_t* super, const uint8_t* scales, const uint8_t* codes, int lane,
                      const ActivationBlock* const (&x)[N], Vec (&acc)[N]) {
    constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);
    using BlockDots = Dots<kTraits.code_bits, N>;
    constexpr int kOffset = BlockDots::kIsSigned ? 0 : kTraits.offset;
    const uint8_t* own_codes = codes + 4 * lane;
    auto add_scaled = [&](const Vec& scale, const BlockDots& dots) {
        for (int n = 0; n < N; ++n) acc[n] = fma(to_floats(dots.sums[n]), scale * splat(x[n]->scale), acc[n]);
    };
    BlockDots dots;
    if constexpr (kTraits.scales == cpu::Scales::q6_k) {
        const Vec d = load_halves(super + 2 * lane);
        for (int n = 0; n < N; ++n) dots.sums[n] = offset_sum<kOffset>(*x[n], true, false);
        dots.template add<0, cpu::kQuads / 2>(own_codes, x);
        add_scaled(d * load_i8(scales + lane), dots);
        for (int n = 0; n < N; ++n) dots.sums[n] = offset_sum<kOffset>(*x[n], false, true);
        dots.template add<cpu::kQuads / 2, cpu::kQuads>(own_codes, x);
        add_scaled(d * load_i8(scales + cpu::kLanes + lane), dots);
    } else {
        for (int n = 0; n < N; ++n) dots.sums[n] = offset_sum<kOffset>(*x[n], true, true);
        dots.template add<0, cpu::kQuads>(own_codes, x);
        if constexpr (kTraits.scales == cpu::Scales::k) {
            add_scaled(load_halves(super + 2 * lane) * load_u8(scales + lane), dots);
            const Vec minimum = load_halves(super + 2 * (cpu::kLanes + lane)) * load_u8(scales + cpu::kLanes + lane);
            for (int n = 0; n < N; ++n) acc[n] = fma(minimum, splat(-x[n]->scaled_sum), acc[n]);
        } else {
            add_scaled(load_halves(scales + 2 * lane), dots);
            if constexpr (kTraits.scales == cpu::Scales::half_and_min) {
                const Vec minimum = load_halves(scales + 2 * (cpu::kLanes + lane));
                for (int n = 0; n < N; ++n) acc[n] = fma(minimum, splat(x[n]->scaled_sum), acc[n]);
            }
        }
    }
}

// A group of rows times N rows of activations -> out (N, kLanes); `fetches` weights ahead, which one of the tiles of
// rows should do.
template <Format format, int N>
inline void group_times_rows(const uint8_t* group, int64_t columns, const ActivationBlock* first_row, bool fetches,
                             float* out) {
    constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);
    constexpr int kHalves = cpu::kLanes / Ints::lanes;
    const cpu::GroupLayout layout(kTraits, columns);
    const int64_t blocks = activation_blocks(columns);
    Vec acc[kHalves][N];
    for (int h = 0; h < kHalves; ++h)
        for (int n = 0; n < N; ++n) acc[h][n] = splat(0.0f);
    const ActivationBlock* x[N];
    for (int n = 0; n < N; ++n) x[n] = first_row + n * blocks;
    const uint8_t *scales = group + layout.scales, *codes = group + layout.codes;
    constexpr int kLineBytes = 64, kBlockBytes = kTraits.code_bytes() + kTraits.scale_bytes();
    const uint8_t* ahead = group + kAheadBytes;
    for (int64_t block = 0; block < blocks; ++block) {
        if (fetches) {
            for (int i = 0; i < kBlockBytes; i += kLineBytes) __builtin_prefetch(ahead + i, 0, 2);
            ahead += kBlockBytes;
        }
        const uint8_t* super = group + block / (cpu::kSuperColumns / cpu::kBlockColumns) * kTraits.super_bytes();
        for (int h = 0; h < kHalves; ++h) {
            // the second half loads its activations again: kept from the first, they would not fit the registers
            if (N > 1) asm volatile("" ::: "memory");
            add_block<format, N>(super, scales, codes, h * Ints::lanes, x, acc[h]);
        }
        for (int n = 0; n < N; ++n) ++x[n];
        scales += kTraits.scale_bytes();
        codes += kTraits.code_bytes();
    }
    for (int h = 0; h < kHalves; ++h)
        for (int n = 0; n < N; ++n) store(out + n * cpu::kLanes + h * Ints::lanes, acc[h][n]);
}

template <Format format, int... N>
inline void group_of(int n, std::integer_sequence<int, N...>, const uint8_t* group, int64_t columns,
                     const ActivationBlock* x, bool fetches, float* out) {
    ((n == N + 1 ? group_times_rows<format, N + 1>(group, columns, x, fetches, out) : void()), ...);
}

template <class F>
inline void with_block_format(Format format, F f) {
    switch (format) {
        case Format::q8_0:
            return f(std::integral_constant<Format, Format::q8_0>{});
        case Format::q4_0:
            return f(std::integral_constant<Format, Format::q4_0>{});
        case Format::q4_1:
            return f(std::integral_constant<Format, Format::q4_1>{});
        case Format::q5_0:
            return f(std::integral_constant<Format, Format::q5_0>{});
        case Format::q5_1:
            return f(std::integral_constant<Format, Format::q5_1>{});
        case Format::q4_k:
            return f(std::integral_constant<Format, Format::q4_k>{});
        case Format::q5_k:
            return f(std::integral_constant<Format, Format::q5_k>{});
        case Format::q6_k:
            return f(std::integral_constant<Format, Format::q6_k>{});
        default:
            return;
    }
}

// Rows [first, first + count) of a part times all rows of the list: sink(index in the list, row - first, values, how
// many) for pieces of up to kLanes rows.
template <class Sink>
inline void blocks_times_rows(const MatrixPart& part, int64_t columns, int64_t first, int64_t count, const Scratch& s,
                              Sink sink) {
    with_block_format(part.format, [&](auto format) {
        constexpr Format kFormat = decltype(format)::value;
        const int64_t group_bytes = cpu::GroupLayout(cpu::block_traits(kFormat), columns).bytes;
        const int tiles = (s.num_rows + kMostTogether - 1) / kMostTogether;
        alignas(64) float results[kMostTogether * cpu::kLanes];
        for (int64_t index = first / cpu::kLanes; index * cpu::kLanes < first + count; ++index) {
            const auto* group = static_cast<const uint8_t*>(part.data) + index * group_bytes;
            const int64_t top = index * cpu::kLanes, begin = top < first ? first : top;
            const int64_t end = top + cpu::kLanes < first + count ? top + cpu::kLanes : first + count;
            for (int tile = 0; tile < tiles; ++tile) {
                const int row = s.num_rows * tile / tiles, n = s.num_rows * (tile + 1) / tiles - row;
                group_of<kFormat>(n, std::make_integer_sequence<int, kMostTogether>{}, group, columns,
                                  quantised_row(s, columns, row), tile == 0, results);
                for (int i = 0; i < n; ++i) {
                    sink(row + i, static_cast<int>(begin - first), results + i * cpu::kLanes + (begin - top),
                         static_cast<int>(end - begin));
                }
            }
        }
    });
}

// The same of a stack of parts.
template <class Sink>
inline void blocks_times_rows(const Matrix& w, int64_t columns, int64_t first, int64_t count, const Scratch& s,
                              Sink sink) {
    int64_t top = 0, done = 0;
    for (int i = 0; i < w.num_parts && done < count; top += w.parts[i++].rows) {
        const MatrixPart& part = w.parts[i];
        const int64_t from = first + done - top;
        if (from >= part.rows) continue;
        const int64_t here = from + count - done < part.rows ? count - done : part.rows - from;
        blocks_times_rows(part, columns, from, here, s, [&](int row, int at, const float* values, int n) {
            sink(row, static_cast<int>(done) + at, values, n);
        });
        done += here;
    }
}

// Rows [first, first + count) of w -> out (panels, active rows, kPanelRows)
inline void blocks_to_panels(const Matrix& w, int64_t columns, int64_t first, int64_t count, float* out,
                             const Scratch& s) {
    blocks_times_rows(w, columns, first, count, s, [&](int row, int at, const float* values, int n) {
        for (int done = 0; done < n;) {
            const int column = (at + done) % cpu::kPanelRows, left = cpu::kPanelRows - column;
            const int here = left < n - done ? left : n - done;
            float* panel = out + (at + done) / cpu::kPanelRows * s.num_rows * cpu::kPanelRows;
            std::memcpy(panel + row * cpu::kPanelRows + column, values + done, here * sizeof(float));
            done += here;
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
